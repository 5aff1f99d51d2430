//! `Revoke`, as callers see it.

use fileaccess::pb;
use fileaccess::pb::revoke_request::Target;
use fileaccess::pb::revoke_response::Outcome;

use crate::service::{fields, reason};
use crate::stage::{Backend, Stage, download};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        a_leaked_download_is_ended_and_proven_dead,
        a_rotation_goes_on_when_nobody_waits,
        what_cannot_be_revoked_says_why
    ]
}

fn object(key: &str, request_id: &str) -> pb::RevokeRequest {
    let object = pb::ObjectRef { bucket: "files".into(), key: key.into() };
    pb::RevokeRequest {
        target: Some(Target::Object(object)),
        reason: "posted in a chat".into(),
        request_id: request_id.into(),
        dry_run: false,
    }
}

fn rotation(response: &pb::RevokeResponse) -> &pb::ObjectRotation {
    let Some(Outcome::ObjectRotation(rotation)) = &response.outcome else { panic!("no outcome") };
    rotation
}

async fn a_leaked_download_is_ended_and_proven_dead(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("report.pdf", "the figures").await;
    stage.put("report.pdf.sig", "a neighbour").await;
    let leaked = stage.presign("report.pdf", download()).await;
    let neighbour = stage.presign("report.pdf.sig", download()).await;
    assert_eq!(stage.send(&leaked, "").await.status, 200);

    let mut api = stage.api.clone();
    let dry = pb::RevokeRequest { dry_run: true, ..object("report.pdf", "leak-1") };
    let planned = api.revoke(dry).await.unwrap().into_inner();
    assert_eq!(rotation(&planned).confirmed_at, None);
    assert_eq!(stage.send(&leaked, "").await.status, 200);

    let revoked = api.revoke(object("report.pdf", "leak-1")).await.unwrap().into_inner();
    assert_eq!(revoked.request_id, "leak-1");
    let done = rotation(&revoked);
    assert_eq!(done.new_key, rotation(&planned).new_key);
    assert!(done.confirmed_at.is_some());
    let steps: Vec<_> = done.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(steps, ["copied", "verified", "deleted", "confirmed"]);
    assert_eq!(stage.send(&leaked, "").await.status, 404);
    assert_eq!(stage.send(&neighbour, "").await.text(), "a neighbour");
    assert_eq!(stage.get(&done.new_key).await.text(), "the figures");

    let again = api.revoke(object("report.pdf", "leak-1")).await.unwrap().into_inner();
    assert_eq!(rotation(&again).new_key, done.new_key);
    let status = api.revoke(object("report.pdf", "leak-2")).await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::NotFound, "OBJECT_NOT_FOUND".into()));
}

async fn a_rotation_goes_on_when_nobody_waits(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("k", "bytes").await;
    let leaked = stage.presign("k", download()).await;
    // Two at once are one, and a third caller has gone by the time it is done.
    let revoke = || {
        let mut api = stage.api.clone();
        async move { api.revoke(object("k", "same")).await }
    };
    let gone = tokio::time::timeout(std::time::Duration::from_millis(1), revoke()).await;
    let (one, two) = tokio::join!(revoke(), revoke());
    let (one, two) = (one.unwrap().into_inner(), two.unwrap().into_inner());
    assert_eq!(rotation(&one).new_key, rotation(&two).new_key);
    assert!(gone.is_err() || gone.is_ok_and(|answer| answer.is_ok()));
    assert_eq!(stage.send(&leaked, "").await.status, 404);
    assert_eq!(stage.get(&rotation(&one).new_key).await.text(), "bytes");
}

async fn what_cannot_be_revoked_says_why(backend: Backend) {
    let stage = Stage::new(backend).await;
    let ours = stage.presign("k", download()).await.url;
    let foreign = ours.replace("X-Amz-Credential=", "X-Amz-Credential=AKIAFOREIGN");
    for (target, code, expect) in [
        (Target::Signer("main".into()), tonic::Code::FailedPrecondition, "NOT_REVOCABLE"),
        (Target::Url(ours), tonic::Code::FailedPrecondition, "NOT_REVOCABLE"),
        (Target::Url(foreign), tonic::Code::FailedPrecondition, "FOREIGN_URL"),
        (Target::Signer("nobody".into()), tonic::Code::NotFound, "UNKNOWN_SIGNER"),
    ] {
        let request = pb::RevokeRequest { target: Some(target), ..pb::RevokeRequest::default() };
        let status = stage.api.clone().revoke(request).await.unwrap_err();
        assert_eq!(reason(&status), (code, expect.into()));
        assert!(!status.message().contains("X-Amz"), "{}", status.message());
    }
    let wrong = pb::RevokeRequest { request_id: "a b".into(), ..pb::RevokeRequest::default() };
    assert_eq!(fields(&stage.api.clone().revoke(wrong).await.unwrap_err()), ["target", "request_id"]);
}
