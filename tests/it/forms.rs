//! Uploads by a browser's form, and what S3 refuses of them.

use std::time::{Duration, SystemTime};

use fileaccess::pb;
use fileaccess::pb::presign_request::Operation;

use crate::service::{fields, reason};
use crate::stage::{Answer, Backend, Stage, ask, seconds};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        a_form_stores_what_its_policy_allows,
        each_condition_is_held_to,
        the_holder_picks_the_rest_of_the_key,
        a_form_ends_when_it_says,
        wrong_forms_are_told_what_is_wrong,
        ceilings_hold_for_forms,
        no_form_reaches_the_keys_of_another_signer,
    ]
}

type Fields = Vec<(String, String)>;

async fn form(stage: &Stage, key: &str, form: pb::FormUpload) -> pb::PresignResponse {
    stage.presign(key, Operation::FormUpload(form)).await
}

fn fields_of(presigned: &pb::PresignResponse) -> Fields {
    presigned.form_fields.iter().map(|field| (field.name.clone(), field.value.clone())).collect()
}

/// Posts a form as a browser does.
async fn post(stage: &Stage, url: &str, fields: &Fields, file: &[u8]) -> Answer {
    const BOUNDARY: &str = "----a-boundary";
    let mut body = Vec::new();
    for (name, value) in fields {
        let field = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
        body.extend_from_slice(field.as_bytes());
    }
    let head = "Content-Disposition: form-data; name=\"file\"; filename=\"my cat.png\"\r\nContent-Type: image/png";
    body.extend_from_slice(format!("--{BOUNDARY}\r\n{head}\r\n\r\n").as_bytes());
    body.extend_from_slice(file);
    body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
    let request = stage.http.post(url).header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"));
    let response = request.body(body).send().await.expect("an answer");
    Answer {
        status: response.status().as_u16(),
        headers: response.headers().clone(),
        body: response.bytes().await.map(|b| b.to_vec()).unwrap_or_default(),
    }
}

fn strict() -> pb::FormUpload {
    pb::FormUpload {
        min_size: 3,
        max_size: 10,
        content_type: "image/png".into(),
        metadata: [("owner".into(), "ann".into())].into(),
        success_status: 201,
        ..pb::FormUpload::default()
    }
}

async fn a_form_stores_what_its_policy_allows(backend: Backend) {
    let stage = Stage::new(backend).await;
    let presigned = form(&stage, "dir/ä \"b\".png", strict()).await;
    assert_eq!((presigned.method.as_str(), presigned.headers.len()), ("POST", 0));
    assert_eq!(presigned.url, format!("{}/{}/", stage.endpoint, stage.bucket));
    let fields = fields_of(&presigned);
    let of = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    assert_eq!(of("x-ignore-issue-id"), Some(presigned.issue_id.as_str()));
    assert!(of("x-amz-credential").unwrap().contains("/us-east-1/s3/aws4_request"));
    let answer = post(&stage, &presigned.url, &fields, b"1234567890").await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let stored = stage.get("dir/ä \"b\".png").await;
    assert_eq!(stored.text(), "1234567890");
    assert_eq!((stored.header("content-type"), stored.header("x-amz-meta-owner")), ("image/png", "ann"));

    for (status, success_redirect, expect) in
        [(0, "", 204), (204, "", 204), (200, "", 200), (0, "http://127.0.0.1:9/done?a=b", 303)]
    {
        let success_redirect = success_redirect.to_owned();
        let ask = pb::FormUpload { success_status: status, success_redirect, ..pb::FormUpload::default() };
        let presigned = form(&stage, "k", ask).await;
        let answer = post(&stage, &presigned.url, &fields_of(&presigned), b"").await;
        assert_eq!(answer.status, expect, "{}", answer.text());
        if expect == 303 {
            let to = answer.header("location");
            assert!(to.starts_with("http://127.0.0.1:9/done?a=b&") && to.contains("key=k"), "{to}");
        }
    }
    assert_eq!(stage.get("k").await.body, b"");
}

async fn each_condition_is_held_to(backend: Backend) {
    let stage = Stage::new(backend).await;
    let presigned = form(&stage, "k", strict()).await;
    let fields = fields_of(&presigned);
    let other = form(&stage, "k", pb::FormUpload { max_size: 1000, ..strict() }).await;
    let with = |name: &str, value: Option<&str>| -> Fields {
        let mut changed = fields.clone();
        let at = changed.iter().position(|(n, _)| n == name).unwrap_or_else(|| panic!("no field {name}"));
        match value {
            Some(value) => value.clone_into(&mut changed[at].1),
            None => drop(changed.remove(at)),
        }
        changed
    };
    let of = |name: &str| fields.iter().find(|(n, _)| n == name).unwrap().1.clone();
    let credential = of("x-amz-credential").replace("us-east-1", "eu-west-1");
    let date = of("x-amz-date").replace('T', "U");
    let policy = fields_of(&other).into_iter().find(|(name, _)| name == "policy").unwrap().1;
    let signature: String = of("x-amz-signature").chars().map(|c| if c == '0' { '1' } else { '0' }).collect();
    for (name, value) in [
        ("key", Some("l")),
        ("key", Some("kk")),
        ("Content-Type", Some("text/html")),
        ("Content-Type", None),
        ("x-amz-meta-owner", Some("bob")),
        ("x-amz-meta-owner", None),
        ("success_action_status", Some("200")),
        ("x-amz-algorithm", Some("AWS4-HMAC-SHA1")),
        ("x-amz-credential", Some(credential.as_str())),
        ("x-amz-date", Some(date.as_str())),
        ("policy", Some(policy.as_str())),
        ("x-amz-signature", Some(signature.as_str())),
    ] {
        let answer = post(&stage, &presigned.url, &with(name, value), b"12345").await;
        let refused = (400..=403).contains(&answer.status) || answer.status == 501;
        assert!(refused, "{name} {value:?}: {} {}", answer.status, answer.text());
    }
    for size in [2, 11] {
        let answer = post(&stage, &presigned.url, &fields, &vec![b'x'; size]).await;
        assert_eq!(answer.status, 400, "{size}: {}", answer.text());
    }
    // A bucket that is there, and another redirection.
    let another = format!("{}-2", stage.bucket);
    let key = stage.app.signers["main"].key(SystemTime::now()).unwrap().credentials.clone();
    stage.s3(key).create_bucket().bucket(&another).send().await.unwrap();
    let elsewhere = presigned.url.replace(&stage.bucket, &another);
    let answer = post(&stage, &elsewhere, &fields, b"12345").await;
    assert!((400..=403).contains(&answer.status), "{}", answer.text());
    let success_redirect = "http://127.0.0.1:9/done".to_owned();
    let redirecting = form(&stage, "k", pb::FormUpload { success_redirect, ..pb::FormUpload::default() }).await;
    let mut astray = fields_of(&redirecting);
    let at = astray.iter().position(|(name, _)| name == "success_action_redirect").unwrap();
    "http://127.0.0.1:9/elsewhere".clone_into(&mut astray[at].1);
    let answer = post(&stage, &redirecting.url, &astray, b"12345").await;
    assert!((400..=403).contains(&answer.status), "{}", answer.text());
    if backend == Backend::Embedded {
        // LocalStack takes fields that the policy does not name, and forms without a policy.
        let mut more = fields.clone();
        more.insert(1, ("x-amz-meta-more".into(), "1".into()));
        assert_eq!(post(&stage, &presigned.url, &more, b"12345").await.status, 403);
        for name in ["policy", "x-amz-signature"] {
            assert!((400..=403).contains(&post(&stage, &presigned.url, &with(name, None), b"12345").await.status));
        }
    }
    for key in ["k", "kk", "l"] {
        assert_eq!(stage.get(key).await.status, 404, "{key}");
    }
    let answer = post(&stage, &presigned.url, &fields, b"12345").await;
    assert_eq!(answer.status, 201, "{}", answer.text());
}

async fn the_holder_picks_the_rest_of_the_key(backend: Backend) {
    let stage = Stage::new(backend).await;
    let ask = pb::FormUpload {
        key_prefix_only: true,
        content_type_prefix: "image/".into(),
        max_size: 100,
        ..pb::FormUpload::default()
    };
    let presigned = form(&stage, "user/ann/", ask).await;
    let with = |key: &str, content_type: &str| -> Fields {
        let mut fields = fields_of(&presigned);
        assert_eq!((fields[0].0.as_str(), fields[0].1.as_str()), ("key", "user/ann/${filename}"));
        assert_eq!((fields[1].0.as_str(), fields[1].1.as_str()), ("Content-Type", "image/"));
        key.clone_into(&mut fields[0].1);
        content_type.clone_into(&mut fields[1].1);
        fields
    };
    for (key, content_type) in [("user/bob/x", "image/png"), ("user/ann", "image/png"), ("user/ann/x", "text/html")] {
        let answer = post(&stage, &presigned.url, &with(key, content_type), b"cat").await;
        assert!((400..=403).contains(&answer.status), "{key} {content_type}: {}", answer.text());
    }
    let answer = post(&stage, &presigned.url, &with("user/ann/a/b", "image/webp"), b"cat").await;
    assert_eq!(answer.status, 204, "{}", answer.text());
    let stored = stage.get("user/ann/a/b").await;
    assert_eq!((stored.text().as_str(), stored.header("content-type")), ("cat", "image/webp"));
    // As a plain page sends it.
    let answer = post(&stage, &presigned.url, &with("user/ann/${filename}", "image/png"), b"my cat").await;
    assert_eq!(answer.status, 204, "{}", answer.text());
    assert_eq!(stage.get("user/ann/my cat.png").await.text(), "my cat");
}

async fn a_form_ends_when_it_says(backend: Backend) {
    let stage = Stage::new(backend).await;
    let operation = Operation::FormUpload(pb::FormUpload::default());
    let brief = pb::PresignRequest { ttl: seconds(1), ..ask("k", operation) };
    let presigned = stage.try_presign(brief).await.unwrap();
    // Time itself is what the test is about. S3 counts whole seconds.
    let end = SystemTime::try_from(presigned.expires_at.unwrap()).unwrap() + Duration::from_millis(1100);
    tokio::time::sleep(end.duration_since(SystemTime::now()).unwrap_or_default()).await;
    let answer = post(&stage, &presigned.url, &fields_of(&presigned), b"late").await;
    assert_eq!(answer.status, 403, "{}", answer.text());
    assert_eq!(stage.get("k").await.status, 404);
}

async fn wrong_forms_are_told_what_is_wrong(backend: Backend) {
    let stage = Stage::new(backend).await;
    let good = pb::FormUpload::default();
    for (key, form, wrong) in [
        ("k", pb::FormUpload { min_size: -1, ..good.clone() }, "form_upload.min_size"),
        ("k", pb::FormUpload { min_size: 2, max_size: 1, ..good.clone() }, "form_upload.min_size"),
        ("k", pb::FormUpload { max_size: (5 << 30) + 1, ..good.clone() }, "form_upload.max_size"),
        ("k", pb::FormUpload { success_status: 202, ..good.clone() }, "form_upload.success_status"),
        ("k", pb::FormUpload { success_redirect: "ftp://x".into(), ..good.clone() }, "form_upload.success_redirect"),
        ("k", pb::FormUpload { content_type: "a b ".into(), ..good.clone() }, "form_upload.content_type"),
        ("k", pb::FormUpload { content_type: "${filename}".into(), ..good.clone() }, "form_upload"),
        ("a/${filename}", good.clone(), "key"),
        ("", pb::FormUpload { key_prefix_only: true, ..good.clone() }, "key"),
        (
            "k",
            pb::FormUpload { content_type: "a/b".into(), content_type_prefix: "a/".into(), ..good },
            "form_upload.content_type_prefix",
        ),
    ] {
        let status = stage.try_presign(ask(key, Operation::FormUpload(form))).await.unwrap_err();
        assert_eq!(fields(&status), [wrong], "{status:?}");
    }
}

async fn ceilings_hold_for_forms(backend: Backend) {
    let grant = |prefix: &str, more: &str| {
        format!(
            "[[grants]]\ncaller = 'loopback'\nbucket = 'files'\nprefix = '{prefix}'\nactions = ['upload']\n{more}\n"
        )
    };
    let settings = grant("in/", "max_size = 100\ncontent_types = ['image/*']")
        + &grant("new/", "create_only = true")
        + &grant("sum/", "checksum = true");
    let stage = Stage::with(backend, &settings, None).await;
    let good = pb::FormUpload { max_size: 100, content_type: "image/png".into(), ..pb::FormUpload::default() };
    form(&stage, "in/k", good.clone()).await;
    form(&stage, "in/", pb::FormUpload { key_prefix_only: true, ..good.clone() }).await;
    for (key, form, over) in [
        ("in/k", pb::FormUpload { max_size: 0, ..good.clone() }, "form_upload.max_size"),
        ("in/k", pb::FormUpload { content_type: String::new(), ..good.clone() }, "form_upload.content_type"),
        (
            "in/k",
            pb::FormUpload { content_type: String::new(), content_type_prefix: "image/".into(), ..good.clone() },
            "form_upload.content_type",
        ),
        ("new/k", good.clone(), "operation"),
        ("sum/k", good.clone(), "operation"),
    ] {
        let status = stage.try_presign(ask(key, Operation::FormUpload(form))).await.unwrap_err();
        assert_eq!((reason(&status).1.as_str(), fields(&status)), ("OVER_CEILING", vec![over.to_owned()]));
    }
    // A key within a grant is not a prefix within it.
    let prefix = pb::FormUpload { key_prefix_only: true, ..good };
    let status = stage.try_presign(ask("in", Operation::FormUpload(prefix))).await.unwrap_err();
    assert_eq!(reason(&status).1, "NOT_GRANTED");
}

async fn no_form_reaches_the_keys_of_another_signer(backend: Backend) {
    let route = |prefix: &str, signer: &str| {
        format!("[[routes]]\nbucket = 'files'\nprefix = '{prefix}'\nsigner = '{signer}'\n")
    };
    let settings = "[signers.tenant]\nkind = 'ambient'\n".to_owned()
        + &route("in/a/", "tenant")
        + &route("in/a/b/", "main")
        + &route("in/c/", "main")
        + "[buckets.other]\nbucket = 'other'\nregion = 'us-east-1'\n"
        + "[[routes]]\nbucket = 'other'\nprefix = 'in/c/d/'\nsigner = 'tenant'\n";
    let stage = Stage::with(backend, &settings, None).await;
    let prefix = pb::FormUpload { key_prefix_only: true, ..pb::FormUpload::default() };
    // Revoking one signer would not end a form that another has signed for its keys.
    for key in ["i", "in/", "in/a", "in/a/", "in/a/b"] {
        let status = stage.try_presign(ask(key, Operation::FormUpload(prefix.clone()))).await.unwrap_err();
        assert_eq!(fields(&status), ["form_upload.key_prefix_only"], "{key}: {status:?}");
        // One key has one signer.
        form(&stage, key, pb::FormUpload::default()).await;
    }
    for (key, signer) in
        [("in/a/x", "tenant"), ("in/a/b/", "main"), ("in/a/c", "tenant"), ("in/b", "main"), ("in/c", "main")]
    {
        assert_eq!(form(&stage, key, prefix.clone()).await.signer, signer, "{key}");
    }
}
