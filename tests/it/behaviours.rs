//! What callers rely on, on every S3 that can serve it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use fileaccess::pb;
use fileaccess::pb::presign_request::Operation;
use futures_util::StreamExt as _;
use sha2::Digest as _;

use crate::stage::{Backend, SIGNER_USER, Stage, ask, download, seconds};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        every_operation_end_to_end,
        download_options_override_the_answer,
        upload_options_are_signed_and_stored,
        every_checksum_is_bound,
        create_only_refuses_the_second_upload,
        keys_come_through_unchanged,
        hard_keys_come_through_unchanged,
        a_batch_answers_each_item_in_order,
        paging_goes_through_all_of_it,
        a_cache_window_keeps_the_url,
        a_key_that_ends_cuts_the_url_short,
        a_deactivated_key_kills_its_urls,
        the_issue_id_can_be_switched_off,
    ]
}

pub fn localstack_cases() -> Vec<Case> {
    cases![tags_encryption_and_storage_class_are_stored, versions_can_be_named]
}

async fn every_operation_end_to_end(backend: Backend) {
    let stage = Stage::new(backend).await;
    let text = "be generous with the paprika";
    let upload = Operation::Upload(pb::Upload { content_type: Some("text/plain".into()), ..pb::Upload::default() });
    let upload = stage.presign("secret-recipe.txt", upload).await;
    assert_eq!(upload.method, "PUT");
    assert_eq!(upload.signer, "main");
    assert_eq!(upload.issue_id.len(), 26);
    assert!(upload.url.contains(&format!("x-issue-id={}", upload.issue_id)));
    assert_eq!(stage.send(&upload, text).await.status, 200);

    let answer = stage.get("secret-recipe.txt").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, text));
    assert_eq!(answer.header("content-type"), "text/plain");

    let head = stage.presign("secret-recipe.txt", Operation::Head(pb::Head::default())).await;
    let answer = stage.send(&head, "").await;
    assert_eq!((answer.status, answer.header("content-length")), (200, "28"));

    let request = pb::StatRequest { bucket: "files".into(), key: "secret-recipe.txt".into(), version_id: None };
    let stat = stage.api.clone().stat(request.clone()).await.unwrap().into_inner();
    assert_eq!((stat.size, stat.content_type.as_str()), (28, "text/plain"));
    assert_eq!(stat.etag, answer.header("etag"));
    assert!(stat.last_modified.is_some());

    let delete = stage.presign("secret-recipe.txt", Operation::Delete(pb::Delete::default())).await;
    assert_eq!(stage.send(&delete, "").await.status, 204);
    assert_eq!(stage.get("secret-recipe.txt").await.status, 404);
    assert_eq!(stage.api.clone().stat(request).await.unwrap_err().code(), tonic::Code::NotFound);
}

async fn download_options_override_the_answer(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("report", "x").await;
    let download = pb::Download {
        filename: Some("Bericht 2026 für €.pdf".into()),
        content_type: Some("application/pdf".into()),
        cache_control: Some("private, max-age=60".into()),
        ..pb::Download::default()
    };
    let presigned = stage.presign("report", Operation::Download(download)).await;
    assert_eq!(presigned.headers, BTreeMap::new());
    let answer = stage.send(&presigned, "").await;
    assert_eq!(answer.header("content-type"), "application/pdf");
    assert_eq!(answer.header("cache-control"), "private, max-age=60");
    assert_eq!(
        answer.header("content-disposition"),
        "attachment; filename=\"Bericht 2026 f_r _.pdf\"; filename*=UTF-8''Bericht%202026%20f%C3%BCr%20%E2%82%AC.pdf"
    );
    let inline = Operation::Download(pb::Download { inline: true, ..pb::Download::default() });
    let answer = stage.send(&stage.presign("report", inline).await, "").await;
    assert_eq!(answer.header("content-disposition"), "inline");
}

async fn upload_options_are_signed_and_stored(backend: Backend) {
    let stage = Stage::new(backend).await;
    let upload = pb::Upload {
        content_type: Some("image/png".into()),
        content_length: Some(4),
        metadata: [("owner".into(), "ann o'neil".into()), ("batch".into(), "7".into())].into(),
        cache_control: Some("no-store".into()),
        content_disposition: Some("attachment; filename=\"a.png\"".into()),
        ..pb::Upload::default()
    };
    let presigned = stage.presign("a.png", Operation::Upload(upload)).await;
    let expect = [
        ("cache-control", "no-store"),
        ("content-disposition", "attachment; filename=\"a.png\""),
        ("content-length", "4"),
        ("content-type", "image/png"),
        ("x-amz-meta-batch", "7"),
        ("x-amz-meta-owner", "ann o'neil"),
    ];
    assert_eq!(presigned.headers, expect.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let answer = stage.send(&presigned, "\u{89}PNG".get(..4).unwrap_or("1234")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());

    let answer = stage.get("a.png").await;
    for (name, value) in expect {
        assert_eq!(answer.header(name), value, "{name}");
    }
    let request = pb::StatRequest { bucket: "files".into(), key: "a.png".into(), version_id: None };
    let stat = stage.api.clone().stat(request).await.unwrap().into_inner();
    assert_eq!(stat.metadata.get("owner").map(String::as_str), Some("ann o'neil"));
}

async fn every_checksum_is_bound(backend: Backend) {
    use pb::checksum::Value;
    let stage = Stage::new(backend).await;
    let body = "123456789";
    // The check values of each algorithm's catalogue entry, for this very text.
    let sha256: [u8; 32] = sha2::Sha256::digest(body).into();
    let sums = [
        ("x-amz-checksum-crc32", Value::Crc32(0xcbf4_3926_u32.to_be_bytes().to_vec())),
        ("x-amz-checksum-crc32c", Value::Crc32c(0xe306_9283_u32.to_be_bytes().to_vec())),
        ("x-amz-checksum-crc64nvme", Value::Crc64nvme(0xae8b_1486_0a79_9888_u64.to_be_bytes().to_vec())),
        (
            "x-amz-checksum-sha1",
            Value::Sha1(vec![
                0xf7, 0xc3, 0xbc, 0x1d, 0x80, 0x8e, 0x04, 0x73, 0x2a, 0xdf, 0x67, 0x99, 0x65, 0xcc, 0xc3, 0x4c, 0xa7,
                0xae, 0x34, 0x41,
            ]),
        ),
        ("x-amz-checksum-sha256", Value::Sha256(sha256.to_vec())),
    ];
    for (header, sum) in sums {
        let checksum = Some(pb::Checksum { value: Some(sum.clone()) });
        let upload = Operation::Upload(pb::Upload { checksum: checksum.clone(), ..pb::Upload::default() });
        let presigned = stage.presign(header, upload).await;
        assert_eq!(presigned.headers.keys().collect::<Vec<_>>(), [header]);
        let answer = stage.send(&presigned, body).await;
        assert_eq!(answer.status, 200, "{header}: {}", answer.text());
        let answer = stage.send(&presigned, "987654321").await;
        assert_eq!(answer.status, 400, "{header}: {}", answer.text());
        let request = pb::StatRequest { bucket: "files".into(), key: header.into(), version_id: None };
        let stat = stage.api.clone().stat(request).await.unwrap().into_inner();
        assert_eq!(stat.checksum, checksum, "{header}");
    }
}

async fn create_only_refuses_the_second_upload(backend: Backend) {
    let stage = Stage::new(backend).await;
    let upload = Operation::Upload(pb::Upload { create_only: true, ..pb::Upload::default() });
    let presigned = stage.presign("once", upload).await;
    assert_eq!(presigned.headers, [("if-none-match".to_owned(), "*".to_owned())].into());
    assert_eq!(stage.send(&presigned, "first").await.status, 200);
    assert_eq!(stage.send(&presigned, "second").await.status, 412);
    assert_eq!(stage.get("once").await.text(), "first");
}

async fn round_trip(stage: &Stage, keys: &[String]) {
    for key in keys {
        let body: &'static str = Box::leak(format!("the bytes of {key}").into_boxed_str());
        stage.put(key, body).await;
    }
    for key in keys {
        assert_eq!(stage.get(key).await.text(), format!("the bytes of {key}"));
    }
    let mut request = pb::ListRequest { bucket: "files".into(), page_size: 1000, ..pb::ListRequest::default() };
    request.download_ttl = seconds(60);
    let page = stage.api.clone().list(request).await.unwrap().into_inner();
    let listed: Vec<_> = page.objects.iter().map(|o| o.key.clone()).collect();
    let mut sorted = keys.to_vec();
    sorted.sort();
    assert_eq!(listed, sorted);
    for object in page.objects {
        let answer = stage.send(&object.download.expect("a URL in each entry"), "").await;
        assert_eq!(answer.text(), format!("the bytes of {}", object.key));
    }
}

async fn keys_come_through_unchanged(backend: Backend) {
    let stage = Stage::new(backend).await;
    let keys = [
        "plain.txt",
        "with space",
        "plus+plus",
        "percent%20and%",
        "%2e%2e/dots",
        "ünïcödé/Ω",
        "emoji/🦀",
        "a&b=c;d,e",
        "que?ry#frag",
        "quote\"'<>",
        "~tilde!*()@:$",
        "...",
        ".hidden/..x/x..",
    ];
    round_trip(&stage, &keys.map(str::to_owned)).await;
}

async fn hard_keys_come_through_unchanged(backend: Backend) {
    let stage = Stage::new(backend).await;
    let keys = ["/leading", "a//b", "a/b", "trailing/", "back\\slash", &"k".repeat(1024), &"é".repeat(512)];
    round_trip(&stage, &keys.map(str::to_owned)).await;
}

async fn a_batch_answers_each_item_in_order(backend: Backend) {
    use pb::presign_result::Result;
    let stage = Stage::new(backend).await;
    stage.put("item-500", "five hundred").await;
    let requests = (0..1000).map(|n| match n {
        7 => ask("a/../b", download()),
        70 => pb::PresignRequest { bucket: "nobody".into(), ..ask("k", download()) },
        700 => pb::PresignRequest { operation: None, ..ask("k", download()) },
        _ => ask(&format!("item-{n}"), download()),
    });
    let request = pb::BatchPresignRequest { requests: requests.collect() };
    let results = stage.api.clone().batch_presign(request).await.unwrap().into_inner().results;
    assert_eq!(results.len(), 1000);
    for (n, result) in results.iter().enumerate() {
        match (n, result.result.as_ref().unwrap()) {
            (7 | 700, Result::Error(status)) => assert_eq!(status.code, tonic::Code::InvalidArgument as i32),
            (70, Result::Error(status)) => assert_eq!(status.code, tonic::Code::PermissionDenied as i32),
            (_, Result::Response(response)) => assert!(response.url.contains(&format!("/item-{n}?"))),
            (_, other) => panic!("item {n}: {other:?}"),
        }
    }
    let Some(Result::Response(response)) = &results[500].result else { panic!("no URL") };
    assert_eq!(stage.send(response, "").await.text(), "five hundred");

    for count in [0, 1001] {
        let request = pb::BatchPresignRequest { requests: vec![ask("k", download()); count] };
        let status = stage.api.clone().batch_presign(request).await.unwrap_err();
        assert_eq!(crate::service::reason(&status), (tonic::Code::InvalidArgument, "BATCH_SIZE".into()));
    }
}

async fn paging_goes_through_all_of_it(backend: Backend) {
    let stage = Stage::new(backend).await;
    let names: Vec<_> = (0..2500).map(|n| format!("p/{n:04}")).chain(["p/sub/x".into(), "q/y".into()]).collect();
    let key = match backend {
        Backend::Embedded => stage.app.signers["main"].key(SystemTime::now()).unwrap().credentials.clone(),
        Backend::LocalStack => Credentials::new("test", "test", None, None, "test"),
    };
    let s3 = stage.s3(key);
    let puts = names.iter().map(|name| s3.put_object().bucket(&stage.bucket).key(name).send());
    let puts: Vec<_> = futures_util::stream::iter(puts).buffer_unordered(16).collect().await;
    assert!(puts.iter().all(Result::is_ok));

    let first = pb::ListRequest {
        bucket: "files".into(),
        prefix: "p/".into(),
        delimiter: "/".into(),
        page_size: 1000,
        ..pb::ListRequest::default()
    };
    let (mut seen, mut prefixes, mut sizes, mut token) = (Vec::new(), Vec::new(), Vec::new(), String::new());
    loop {
        let request = pb::ListRequest { page_token: token.clone(), ..first.clone() };
        let page = stage.api.clone().list(request).await.unwrap().into_inner();
        sizes.push(page.objects.len() + page.common_prefixes.len());
        seen.extend(page.objects.into_iter().map(|o| o.key));
        prefixes.extend(page.common_prefixes);
        if page.next_page_token.is_empty() {
            break;
        }
        token = page.next_page_token;
    }
    assert_eq!(sizes, [1000, 1000, 501]);
    assert_eq!(seen, names[..2500]);
    assert_eq!(prefixes, ["p/sub/"]);

    for other in [
        pb::ListRequest { prefix: "q/".into(), ..first.clone() },
        pb::ListRequest { delimiter: String::new(), ..first.clone() },
    ] {
        let status = stage.api.clone().list(pb::ListRequest { page_token: token.clone(), ..other }).await.unwrap_err();
        assert_eq!(crate::service::reason(&status), (tonic::Code::InvalidArgument, "INVALID_PAGE_TOKEN".into()));
    }
}

async fn a_cache_window_keeps_the_url(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("logo", "svg").await;
    let windowed =
        |window| Operation::Download(pb::Download { cache_window: seconds(window), ..pb::Download::default() });
    // A day's window: the two asks are in the same one but for midnight's instant.
    let request = pb::PresignRequest { ttl: seconds(90_000), ..ask("logo", windowed(86_400)) };
    let stage_ttl = Stage::with(backend, "[ttl]\nceiling = '7days'", None).await;
    let (one, two) =
        (stage_ttl.try_presign(request.clone()).await.unwrap(), stage_ttl.try_presign(request).await.unwrap());
    assert_eq!((&one.url, &one.issue_id, one.expires_at), (&two.url, &two.issue_id, two.expires_at));
    let other = pb::PresignRequest { ttl: seconds(90_001), ..ask("logo", windowed(86_400)) };
    assert_ne!(stage_ttl.try_presign(other).await.unwrap().issue_id, one.issue_id);
    assert_eq!(stage.send(&stage.presign("logo", windowed(60)).await, "").await.text(), "svg");
    assert_ne!(stage.presign("logo", download()).await.url, stage.presign("logo", download()).await.url);

    let too_wide = pb::PresignRequest { ttl: seconds(60), ..ask("logo", windowed(60)) };
    let status = stage.try_presign(too_wide).await.unwrap_err();
    assert_eq!(crate::service::fields(&status), ["download.cache_window"]);
}

async fn a_key_that_ends_cuts_the_url_short(backend: Backend) {
    let now = SystemTime::now();
    let until = now + Duration::from_secs(100);
    let key = Credentials::new("ASIAENDSSOON", "secret", Some("token".into()), Some(until), "test");
    let stage = Stage::with(backend, "", Some(key)).await;
    let long = pb::PresignRequest { ttl: seconds(3600), ..ask("k", download()) };
    let presigned = stage.try_presign(long).await.unwrap();
    let expires_at = SystemTime::try_from(presigned.expires_at.unwrap()).unwrap();
    assert!(expires_at <= until && expires_at > until - Duration::from_secs(2), "{expires_at:?}");
    assert!((95..=100).contains(&presigned.expires_in.unwrap().seconds));
    let signed: u64 = presigned.url.split("X-Amz-Expires=").nth(1).unwrap().split('&').next().unwrap().parse().unwrap();
    assert!(signed <= 100, "{signed}");

    let ended = Credentials::new("ASIAENDED", "secret", Some("token".into()), Some(now), "test");
    let stage = Stage::with(backend, "", Some(ended)).await;
    let status = stage.try_presign(ask("k", download())).await.unwrap_err();
    assert_eq!(crate::service::reason(&status), (tonic::Code::Unavailable, "SIGNER_UNAVAILABLE".into()));
}

async fn a_deactivated_key_kills_its_urls(backend: Backend) {
    match backend {
        Backend::Embedded => {
            let stage = Stage::new(backend).await;
            stage.put("k", "v").await;
            let presigned = stage.presign("k", download()).await;
            assert_eq!(stage.send(&presigned, "").await.status, 200);
            let id = stage.iam.list_access_keys(SIGNER_USER).unwrap()[0].id.clone();
            stage.iam.set_status(SIGNER_USER, &id, fileaccess::issuer::Status::Inactive).unwrap();
            assert_eq!(stage.send(&presigned, "").await.status, 403);
        }
        Backend::LocalStack => {
            let endpoint = &crate::localstack::shared().unwrap().endpoint;
            let user = format!("user-{}", std::process::id());
            iam(endpoint, "CreateUser", &[("UserName", &user)]).await;
            let made = iam(endpoint, "CreateAccessKey", &[("UserName", &user)]).await;
            let field =
                |name: &str| made.split(&format!("<{name}>")).nth(1).unwrap().split('<').next().unwrap().to_owned();
            let (id, secret) = (field("AccessKeyId"), field("SecretAccessKey"));
            let stage = Stage::with(backend, "", Some(Credentials::new(id.clone(), secret, None, None, "test"))).await;
            stage.put("k", "v").await;
            let presigned = stage.presign("k", download()).await;
            assert_eq!(stage.send(&presigned, "").await.status, 200);
            let update = [("UserName", user.as_str()), ("AccessKeyId", &id), ("Status", "Inactive")];
            iam(endpoint, "UpdateAccessKey", &update).await;
            assert_eq!(stage.send(&presigned, "").await.status, 403);
        }
    }
}

/// LocalStack's IAM, which looks at the credential scope but not the signature.
pub async fn iam(endpoint: &str, action: &str, parameters: &[(&str, &str)]) -> String {
    let body: Vec<_> = parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let response = fileaccess::rotation::probe::Probe::http_client()
        .post(endpoint)
        .header(
            "authorization",
            "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/iam/aws4_request, SignedHeaders=host, Signature=0",
        )
        .header("content-type", "application/x-www-form-urlencoded")
        .body(format!("Action={action}&Version=2010-05-08&{}", body.join("&")))
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.status(), 200);
    response.text().await.expect("a text")
}

async fn the_issue_id_can_be_switched_off(backend: Backend) {
    let stage = Stage::with(backend, "[buckets.plain]\nbucket = 'plain'\nregion = 'eu-central-1'\nissue_id = false\n[[routes]]\nbucket = 'plain'\nsigner = 'main'", None).await;
    let request = pb::PresignRequest { bucket: "plain".into(), ..ask("k", download()) };
    let presigned = stage.try_presign(request).await.unwrap();
    assert_eq!(presigned.issue_id, "");
    assert!(!presigned.url.contains("x-issue-id"));
    assert!(presigned.url.starts_with("https://plain.s3.eu-central-1.amazonaws.com/k?"), "{}", presigned.url);
}

async fn tags_encryption_and_storage_class_are_stored(backend: Backend) {
    let stage = Stage::new(backend).await;
    let upload = pb::Upload {
        tags: [("team".into(), "a @ b".into()), ("cost=center".into(), "7+8".into())].into(),
        encryption: Some(pb::Encryption { method: Some(pb::encryption::Method::SseS3(pb::SseS3 {})) }),
        storage_class: pb::StorageClass::StandardIa.into(),
        ..pb::Upload::default()
    };
    let presigned = stage.presign("tagged", Operation::Upload(upload)).await;
    let names: Vec<_> = presigned.headers.keys().map(String::as_str).collect();
    assert_eq!(names, ["x-amz-server-side-encryption", "x-amz-storage-class", "x-amz-tagging"]);
    let answer = stage.send(&presigned, "v").await;
    assert_eq!(answer.status, 200, "{}", answer.text());

    let s3 = stage.s3(Credentials::new("test", "test", None, None, "test"));
    let tags = s3.get_object_tagging().bucket(&stage.bucket).key("tagged").send().await.unwrap();
    let mut tags: Vec<_> = tags.tag_set().iter().map(|t| (t.key(), t.value())).collect();
    tags.sort_unstable();
    assert_eq!(tags, [("cost=center", "7+8"), ("team", "a @ b")]);
    let request = pb::StatRequest { bucket: "files".into(), key: "tagged".into(), version_id: None };
    assert_eq!(stage.api.clone().stat(request).await.unwrap().into_inner().storage_class, "STANDARD_IA");
}

async fn versions_can_be_named(backend: Backend) {
    use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};
    let stage = Stage::new(backend).await;
    let s3 = stage.s3(Credentials::new("test", "test", None, None, "test"));
    let on = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled).build();
    s3.put_bucket_versioning().bucket(&stage.bucket).versioning_configuration(on).send().await.unwrap();
    stage.put("doc", "old").await;
    let request = pb::StatRequest { bucket: "files".into(), key: "doc".into(), version_id: None };
    let old = stage.api.clone().stat(request).await.unwrap().into_inner().version_id;
    stage.put("doc", "new").await;

    let version_id = Some(old.clone());
    let pinned = Operation::Download(pb::Download { version_id: version_id.clone(), ..pb::Download::default() });
    let pinned = stage.presign("doc", pinned).await;
    assert_eq!(stage.send(&pinned, "").await.text(), "old");
    assert_eq!(stage.get("doc").await.text(), "new");
    let head = stage.presign("doc", Operation::Head(pb::Head { version_id: version_id.clone() })).await;
    assert_eq!(stage.send(&head, "").await.header("x-amz-version-id"), old);
    let delete = stage.presign("doc", Operation::Delete(pb::Delete { version_id })).await;
    assert_eq!(stage.send(&delete, "").await.status, 204);
    assert_eq!(stage.send(&pinned, "").await.status, 404);
    assert_eq!(stage.get("doc").await.text(), "new");
}
