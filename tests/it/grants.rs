//! Grants, as callers meet them.

use std::sync::Arc;
use std::time::SystemTime;

use fileaccess::api::Api;
use fileaccess::caller::Caller;
use fileaccess::pb;
use fileaccess::pb::file_access_server::FileAccess as _;
use fileaccess::pb::presign_request::Operation;
use fileaccess::pb::presign_result::Result as Item;
use fileaccess::pb::revoke_request::Target;
use tonic::{Code, Request, Status};

use crate::service::{fields, reason};
use crate::stage::{Backend, Stage, ask, download, seconds};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        every_call_needs_its_grant,
        batch_items_are_judged_each_on_its_own,
        a_listing_shows_what_is_granted_and_no_more,
        a_page_token_is_of_no_use_to_another_caller,
        ceilings_clamp_or_refuse,
        a_url_tells_only_those_who_may_revoke_its_signer,
        signers_are_shown_to_those_who_are_granted_their_routes,
    ]
}

/// A call by a process of this user, as if it came through a Unix socket.
fn by<T>(uid: u32, message: T) -> Request<T> {
    let mut request = Request::new(message);
    Caller::put(Ok(Caller::user(uid)), request.extensions_mut());
    request
}

fn grant(caller: &str, prefix: &str, actions: &str, more: &str) -> String {
    format!("[[grants]]\ncaller = '{caller}'\nbucket = 'files'\nprefix = '{prefix}'\nactions = [{actions}]\n{more}\n")
}

/// A stage with these grants, where the test itself (`loopback`) may do all
/// that it takes to arrange things.
async fn stage(backend: Backend, grants: &[String], more: &str) -> (Stage, Api) {
    let arrange = grant("loopback", "", "'upload', 'download'", "");
    let stage = Stage::with(backend, &format!("{more}{arrange}{}", grants.concat()), None).await;
    let api = Api(Arc::clone(&stage.app));
    (stage, api)
}

fn refused(status: &Status) -> (Code, String) {
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    reason(status)
}

const NOT_GRANTED: (Code, &str) = (Code::PermissionDenied, "NOT_GRANTED");

fn is_not_granted(status: &Status) -> bool {
    let (code, reason) = reason(status);
    (code, reason.as_str()) == NOT_GRANTED
}

async fn every_call_needs_its_grant(backend: Backend) {
    let actions = ["download", "upload", "head", "delete", "list", "stat", "revoke_object", "revoke_signer", "signers"];
    // Caller 100 may do the first to all of the bucket, and so on; 99 may do nothing.
    let grants: Vec<_> =
        actions.iter().zip(100..).map(|(a, uid)| grant(&format!("uid:{uid}"), "", &format!("'{a}'"), "")).collect();
    let (stage, api) = stage(backend, &grants, "").await;
    stage.put("k", "bytes").await;
    let operation = |action: &str| match action {
        "download" => Some(download()),
        "upload" => Some(Operation::Upload(pb::Upload::default())),
        "head" => Some(Operation::Head(pb::Head::default())),
        "delete" => Some(Operation::Delete(pb::Delete::default())),
        _ => None,
    };
    let revoke = |target| pb::RevokeRequest { target: Some(target), dry_run: true, ..pb::RevokeRequest::default() };
    let object = Target::Object(pb::ObjectRef { bucket: "files".into(), key: "k".into() });
    for (n, action) in actions.into_iter().enumerate() {
        for uid in 99..100 + u32::try_from(actions.len()).unwrap() {
            let answer = match action {
                "list" => {
                    let all = pb::ListRequest { bucket: "files".into(), ..pb::ListRequest::default() };
                    api.list(by(uid, all)).await.map(|_| ())
                }
                "stat" => {
                    let stat = pb::StatRequest { bucket: "files".into(), key: "k".into(), version_id: None };
                    api.stat(by(uid, stat)).await.map(|_| ())
                }
                "revoke_object" => api.revoke(by(uid, revoke(object.clone()))).await.map(|_| ()),
                "revoke_signer" => match api.revoke(by(uid, revoke(Target::Signer("main".into())))).await {
                    // It is ambient. To hear that takes the grant.
                    Err(status) if reason(&status).1 == "NOT_REVOCABLE" => Ok(()),
                    answer => answer.map(|_| panic!("an ambient signer was revoked")),
                },
                "signers" => api.list_signers(by(uid, pb::ListSignersRequest {})).await.map(|_| ()),
                _ => api.presign(by(uid, ask("k", operation(action).unwrap()))).await.map(|_| ()),
            };
            if uid as usize == 100 + n {
                answer.unwrap_or_else(|status| panic!("{action}: {status:?}"));
            } else {
                assert!(is_not_granted(&answer.unwrap_err()), "{action} by uid {uid}");
            }
        }
    }
    // Whether there is such an object, bucket or signer makes no difference to who may not know.
    let refusal = |bucket: &str, key: &str| {
        let stat = pb::StatRequest { bucket: bucket.into(), key: key.into(), version_id: None };
        let (api, text) = (&api, format!("key `{key}` of bucket `{bucket}`"));
        async move { api.stat(by(99, stat)).await.unwrap_err().message().replace(&text, "") }
    };
    assert_eq!(refusal("files", "k").await, refusal("files", "none").await);
    assert_eq!(refusal("files", "k").await, refusal("nobody", "k").await);
    let status = api.revoke(by(99, revoke(Target::Signer("nobody".into())))).await.unwrap_err();
    assert!(is_not_granted(&status));
}

async fn batch_items_are_judged_each_on_its_own(backend: Backend) {
    let grants = [
        grant("uid:1", "tenant-a/", "'download'", "max_ttl = '1m'"),
        grant("uid:1", "tenant-a/in/", "'upload'", "max_size = 5"),
    ];
    let (_stage, api) = stage(backend, &grants, "").await;
    let upload = |length| Operation::Upload(pb::Upload { content_length: Some(length), ..pb::Upload::default() });
    let requests = vec![
        ask("tenant-a/x", download()),
        ask("tenant-ab/x", download()),
        ask("tenant-a%2Fx", download()),
        ask("tenant-a/../tenant-ab/x", download()),
        ask("tenant-a/in/x", upload(5)),
        ask("tenant-a/in/x", upload(6)),
        ask("tenant-a/x", upload(5)),
        pb::PresignRequest { bucket: "nobody".into(), ..ask("tenant-a/x", download()) },
        ask("tenant-a//x", download()),
    ];
    let answer = api.batch_presign(by(1, pb::BatchPresignRequest { requests })).await.unwrap().into_inner();
    let codes: Vec<_> = answer
        .results
        .iter()
        .map(|result| match result.result.as_ref().unwrap() {
            Item::Response(_) => Code::Ok,
            Item::Error(status) => Code::from(status.code),
        })
        .collect();
    let (ok, no) = (Code::Ok, Code::PermissionDenied);
    assert_eq!(codes, [ok, no, no, Code::InvalidArgument, ok, no, no, no, ok]);
    let Some(Item::Response(clamped)) = &answer.results[0].result else { panic!() };
    assert!(clamped.url.contains("X-Amz-Expires=60&"), "{}", clamped.url);
}

async fn a_listing_shows_what_is_granted_and_no_more(backend: Backend) {
    let grants =
        [grant("uid:1", "tenant-a/", "'list'", ""), grant("uid:1", "tenant-a/open/", "'download'", "max_ttl = '1m'")];
    let (stage, api) = stage(backend, &grants, "").await;
    for key in ["tenant-a/closed/x", "tenant-a/open/x", "tenant-a/y", "tenant-ab/secret", "tenant-b/secret"] {
        stage.put(key, "bytes").await;
    }
    let list = |prefix: &str, delimiter: &str| {
        let request = pb::ListRequest {
            bucket: "files".into(),
            prefix: prefix.into(),
            delimiter: delimiter.into(),
            download_ttl: seconds(600),
            ..pb::ListRequest::default()
        };
        let api = &api;
        async move { api.list(by(1, request)).await.map(tonic::Response::into_inner) }
    };
    // A prefix that is wider than the grant would show its neighbours as common prefixes.
    for prefix in ["", "tenant-a", "tenant-", "tenant-ab/", "tenant-b/"] {
        for delimiter in ["", "/", "-"] {
            assert!(is_not_granted(&list(prefix, delimiter).await.unwrap_err()), "{prefix} {delimiter}");
        }
    }
    let page = list("tenant-a/", "/").await.unwrap();
    assert_eq!(page.common_prefixes, ["tenant-a/closed/", "tenant-a/open/"]);
    assert_eq!(page.objects.iter().map(|o| o.key.as_str()).collect::<Vec<_>>(), ["tenant-a/y"]);
    // What is listed but not granted to be downloaded comes without a URL.
    let page = list("tenant-a/", "").await.unwrap();
    let urls: Vec<_> = page.objects.iter().map(|o| (o.key.as_str(), o.download.is_some())).collect();
    assert_eq!(urls, [("tenant-a/closed/x", false), ("tenant-a/open/x", true), ("tenant-a/y", false)]);
    let url = &page.objects[1].download.as_ref().unwrap().url;
    assert!(url.contains("X-Amz-Expires=60&"), "{url}");
}

async fn a_page_token_is_of_no_use_to_another_caller(backend: Backend) {
    let grants = [grant("uid:1", "", "'list'", ""), grant("uid:2", "", "'list'", "")];
    let (stage, api) = stage(backend, &grants, "").await;
    for key in ["a", "b"] {
        stage.put(key, "bytes").await;
    }
    let page = |page_token: String| pb::ListRequest {
        bucket: "files".into(),
        page_size: 1,
        page_token,
        ..pb::ListRequest::default()
    };
    let token = api.list(by(1, page(String::new()))).await.unwrap().into_inner().next_page_token;
    let status = api.list(by(2, page(token.clone()))).await.unwrap_err();
    assert_eq!(reason(&status), (Code::InvalidArgument, "INVALID_PAGE_TOKEN".into()));
    assert_eq!(api.list(by(1, page(token))).await.unwrap().into_inner().objects[0].key, "b");
}

async fn ceilings_clamp_or_refuse(backend: Backend) {
    let limits =
        "max_ttl = '1m'\nmax_size = 5\ncontent_types = ['image/*', 'text/plain']\ncreate_only = true\nchecksum = true";
    let (stage, api) = stage(backend, &[grant("uid:1", "in/", "'upload'", limits)], "").await;
    let good = pb::Upload {
        content_length: Some(5),
        content_type: Some("image/png".into()),
        create_only: true,
        checksum: Some(pb::Checksum { value: Some(pb::checksum::Value::Crc32(0xcbf5_3a1c_u32.to_be_bytes().into())) }),
        ..pb::Upload::default()
    };
    let presign = |upload| {
        let request = pb::PresignRequest { ttl: seconds(3600), ..ask("in/x", Operation::Upload(upload)) };
        api.presign(by(1, request))
    };
    let none = presign(pb::Upload::default()).await.unwrap_err();
    assert_eq!(refused(&none).1, "OVER_CEILING");
    let all = ["upload.content_length", "upload.content_type", "upload.create_only", "upload.checksum"];
    assert_eq!(fields(&none), all);
    assert!(none.message().contains("`upload.content_type` must be given, and be `image/*` or `text/plain`"));
    for (wrong, field) in [
        (pb::Upload { content_length: Some(6), ..good.clone() }, all[0]),
        (pb::Upload { content_type: Some("text/html".into()), ..good.clone() }, all[1]),
        (pb::Upload { content_type: Some("image/png, text/html".into()), ..good.clone() }, all[1]),
        (pb::Upload { create_only: false, ..good.clone() }, all[2]),
        (pb::Upload { checksum: None, ..good.clone() }, all[3]),
    ] {
        assert_eq!(fields(&presign(wrong).await.unwrap_err()), [field]);
    }
    let before = SystemTime::now();
    let presigned = presign(good).await.unwrap().into_inner();
    assert!(presigned.url.contains("X-Amz-Expires=60&"), "{}", presigned.url);
    let end = SystemTime::try_from(presigned.expires_at.unwrap()).unwrap();
    assert!(end <= before + std::time::Duration::from_secs(61));
    // All of it is signed: S3 holds the holder to it.
    let mut headers = presigned.headers.clone();
    headers.insert("content-length".into(), "6".into());
    assert_eq!(stage.send_as("PUT", &presigned.url, &headers, "123456").await.status, 403);
    assert_eq!(stage.send(&presigned, "12345").await.status, 200);
}

/// Two more signers, each for one prefix.
fn two_signers() -> String {
    let signer = |name: &str| {
        let user = format!("{name}-{}-{}", std::process::id(), rand::random::<u32>());
        format!(
            "[signers.{name}]\nkind = 'iam-user'\nuser = '{user}'\n\
             vault = {{ secrets_manager = {{ secret = '{user}', region = 'us-east-1' }} }}\n\
             [[routes]]\nbucket = 'files'\nprefix = '{name}/'\nsigner = '{name}'\n"
        )
    };
    format!("{}{}[rotation]\nrefresh = '200ms'\nlease = '1s'\npoll = '20ms'\n", signer("tenant-a"), signer("tenant-ab"))
}

async fn a_url_tells_only_those_who_may_revoke_its_signer(backend: Backend) {
    let grants = [
        grant("uid:1", "tenant-a/", "'revoke_signer'", ""),
        grant("uid:2", "", "'revoke_signer'", ""),
        grant("uid:3", "tenant-a/", "'revoke_object', 'signers'", ""),
    ];
    let (stage, api) = stage(backend, &grants, &two_signers()).await;
    let [a, ab, main] = [
        stage.presign("tenant-a/x", download()).await.url,
        stage.presign("tenant-ab/x", download()).await.url,
        stage.presign("x", download()).await.url,
    ];
    let foreign = a.replace("X-Amz-Credential=", "X-Amz-Credential=AKIAFOREIGN");
    let revoke = |uid, url: &str| {
        let request =
            pb::RevokeRequest { target: Some(Target::Url(url.into())), dry_run: true, ..pb::RevokeRequest::default() };
        let api = &api;
        async move {
            match api.revoke(by(uid, request)).await {
                Ok(revoked) => match revoked.into_inner().outcome {
                    Some(pb::revoke_response::Outcome::SignerRotation(rotation)) => Ok(rotation.signer),
                    other => panic!("{other:?}"),
                },
                Err(status) => Err((reason(&status).1, status.message().to_owned())),
            }
        }
    };
    assert_eq!(revoke(1, &a).await, Ok("tenant-a".into()));
    // Somebody else's and nobody's look the same, to the letter.
    let refusal = revoke(1, &foreign).await.unwrap_err();
    assert_eq!(refusal.0, "NOT_GRANTED");
    for url in [&ab, &main] {
        assert_eq!(revoke(1, url).await.unwrap_err(), refusal);
    }
    assert_eq!(revoke(2, &a).await, Ok("tenant-a".into()));
    assert_eq!(revoke(2, &ab).await, Ok("tenant-ab".into()));
    assert_eq!(revoke(2, &main).await.unwrap_err().0, "NOT_REVOCABLE");
    assert_eq!(revoke(2, &foreign).await.unwrap_err().0, "FOREIGN_URL");
    for url in [&a, &ab, &main, &foreign] {
        assert_eq!(revoke(3, url).await.unwrap_err().0, "NOT_GRANTED");
    }
}

async fn signers_are_shown_to_those_who_are_granted_their_routes(backend: Backend) {
    let grants = [
        grant("uid:1", "tenant-a/", "'signers'", ""),
        grant("uid:2", "", "'signers'", ""),
        grant("uid:3", "tenant-a/deeper/", "'signers'", ""),
    ];
    let (_stage, api) = stage(backend, &grants, &two_signers()).await;
    let seen = |uid| {
        let api = &api;
        async move {
            let listed = api.list_signers(by(uid, pb::ListSignersRequest {})).await?.into_inner().signers;
            Ok::<_, Status>(listed.into_iter().map(|signer| signer.name).collect::<Vec<_>>())
        }
    };
    assert_eq!(seen(1).await.unwrap(), ["tenant-a"]);
    assert_eq!(seen(2).await.unwrap(), ["main", "tenant-a", "tenant-ab"]);
    assert!(is_not_granted(&seen(3).await.unwrap_err()));
}
