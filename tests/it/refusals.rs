//! What the S3 side must refuse: otherwise a presigned URL proves nothing.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use fileaccess::pb;
use fileaccess::pb::presign_request::Operation;

use crate::stage::{Backend, Stage, ask, download, seconds};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![a_tampered_url, an_expired_url, a_url_for_another_method, an_upload_that_is_not_as_signed]
}

async fn a_tampered_url(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("mine", "m").await;
    stage.put("yours", "y").await;
    let presigned = stage.presign("mine", download()).await;
    assert_eq!(stage.send(&presigned, "").await.status, 200);
    let url = &presigned.url;
    let signature = url.split("X-Amz-Signature=").nth(1).unwrap();
    let flipped: String = signature.chars().map(|c| if c == '0' { '1' } else { '0' }).collect();
    for tampered in [
        url.replace("/mine?", "/yours?"),
        url.replace("X-Amz-Expires=900", "X-Amz-Expires=901"),
        url.replace(&presigned.issue_id, "01ARZ3NDEKTSV4RRFFQ69G5FAV"),
        url.replace(signature, &flipped),
        format!("{url}&response-content-type=text%2Fhtml"),
    ] {
        assert_ne!(tampered, *url);
        let answer = stage.send_as("GET", &tampered, &BTreeMap::new(), "").await;
        assert_eq!(answer.status, 403, "{tampered}: {}", answer.text());
    }
}

async fn an_expired_url(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("k", "v").await;
    let brief = pb::PresignRequest { ttl: seconds(2), ..ask("k", download()) };
    let presigned = stage.try_presign(brief).await.unwrap();
    assert_eq!(stage.send(&presigned, "").await.status, 200);
    // Time itself is what the test is about. S3 counts whole seconds.
    let end = SystemTime::try_from(presigned.expires_at.unwrap()).unwrap() + Duration::from_millis(1100);
    tokio::time::sleep(end.duration_since(SystemTime::now()).unwrap_or_default()).await;
    assert_eq!(stage.send(&presigned, "").await.status, 403);
}

async fn a_url_for_another_method(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("k", "v").await;
    let download = stage.presign("k", download()).await;
    let upload = stage.presign("k", Operation::Upload(pb::Upload::default())).await;
    let delete = stage.presign("k", Operation::Delete(pb::Delete::default())).await;
    for (method, presigned) in
        [("PUT", &download), ("DELETE", &download), ("GET", &upload), ("DELETE", &upload), ("GET", &delete)]
    {
        let answer = stage.send_as(method, &presigned.url, &presigned.headers, "poison").await;
        assert_eq!(answer.status, 403, "{method}: {}", answer.text());
    }
    assert_eq!(stage.get("k").await.text(), "v");
}

async fn an_upload_that_is_not_as_signed(backend: Backend) {
    let stage = Stage::new(backend).await;
    let upload = pb::Upload {
        content_type: Some("text/plain".into()),
        content_length: Some(5),
        create_only: true,
        metadata: [("owner".into(), "ann".into())].into(),
        ..pb::Upload::default()
    };
    let presigned = stage.presign("strict", Operation::Upload(upload)).await;
    for (header, wrong) in [
        ("content-type", Some("text/html")),
        ("content-type", None),
        ("x-amz-meta-owner", Some("bob")),
        ("x-amz-meta-owner", None),
        ("if-none-match", None),
    ] {
        let mut headers = presigned.headers.clone();
        match wrong {
            Some(value) => headers.insert(header.into(), value.into()),
            None => headers.remove(header),
        };
        let answer = stage.send_as("PUT", &presigned.url, &headers, "12345").await;
        assert!((400..=403).contains(&answer.status), "{header} {wrong:?}: {} {}", answer.status, answer.text());
    }
    // A longer body under its own length: another signed header that is not as signed.
    let mut headers = presigned.headers.clone();
    headers.insert("content-length".into(), "6".into());
    let answer = stage.send_as("PUT", &presigned.url, &headers, "123456").await;
    assert_eq!(answer.status, 403, "{}", answer.text());
    assert_eq!(stage.get("strict").await.status, 404);
    assert_eq!(stage.send(&presigned, "12345").await.status, 200);
}
