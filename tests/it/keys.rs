//! Property: any key that is accepted survives sign → URL → decode unchanged,
//! and never leaves its bucket and prefix.

use fileaccess::object::ObjectKey;
use fileaccess::pb;
use fileaccess::pb::presign_request::Operation;
use percent_encoding::percent_decode_str;
use proptest::strategy::{Strategy, ValueTree as _};
use proptest::test_runner::TestRunner;

use crate::stage::{Backend, Stage, ask, download};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![any_key_survives, refused_keys_say_what_would_be_right]
}

async fn any_key_survives(backend: Backend) {
    let virtual_host =
        "[buckets.hosted]\nbucket = 'hosted'\nregion = 'eu-central-1'\n[[routes]]\nbucket = 'hosted'\nsigner = 'main'";
    let stage = Stage::with(backend, virtual_host, None).await;
    let root = format!("/{}/", stage.bucket);
    let mut runner = TestRunner::default();
    let keys = proptest::prop_oneof!["\\PC{1,40}", "[/.%+ a]{1,12}", "([a-zé%/]{0,9}/){0,4}[\\PC]{1,9}"];
    let mut accepted = 0;
    for _ in 0..1500 {
        let key = keys.new_tree(&mut runner).unwrap().current();
        if ObjectKey::parse(key.as_str()).is_err() {
            continue;
        }
        accepted += 1;
        let upload = Operation::Upload(pb::Upload::default());
        for (bucket, root, operation) in [("files", root.as_str(), upload), ("hosted", "/", download())] {
            let request = pb::PresignRequest { bucket: bucket.into(), ..ask(&key, operation) };
            let presigned = stage.try_presign(request).await.unwrap_or_else(|e| panic!("{key:?}: {e}"));
            // As it stands in the URL, and as a browser (WHATWG) would send it.
            let (_, raw) = presigned.url.split_once("://").unwrap();
            let raw = &raw[raw.find('/').unwrap()..raw.find('?').unwrap()];
            let parsed = reqwest::Url::parse(&presigned.url).unwrap();
            assert_eq!(parsed.path(), raw, "a client rewrites {key:?}");
            let path = percent_decode_str(raw).decode_utf8().unwrap();
            assert_eq!(path.strip_prefix(root), Some(key.as_str()));
        }
    }
    assert!(accepted > 500, "{accepted}");
}

async fn refused_keys_say_what_would_be_right(backend: Backend) {
    let stage = Stage::new(backend).await;
    for key in ["", ".", "..", "a/./b", "../a", "a/..", "a\nb", "a\u{7f}", &"k".repeat(1025)] {
        let status = stage.try_presign(ask(key, download())).await.unwrap_err();
        assert_eq!(crate::service::reason(&status), (tonic::Code::InvalidArgument, "INVALID_FIELD".into()), "{key:?}");
        assert_eq!(crate::service::fields(&status), ["key"]);
        assert!(status.message().starts_with("`key` must "), "{}", status.message());
    }
}
