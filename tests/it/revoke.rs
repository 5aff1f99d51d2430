//! `Revoke`, as callers see it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use fileaccess::pb;
use fileaccess::pb::presign_request::Operation;
use fileaccess::pb::revoke_request::Target;
use fileaccess::pb::revoke_response::Outcome;

use crate::fleet::Proxy;
use crate::service::{fields, reason};
use crate::stage::{Backend, Stage, download};
use crate::{Case, cases};

pub fn localstack_cases() -> Vec<Case> {
    cases![no_url_is_signed_after_the_lease]
}

pub fn cases() -> Vec<Case> {
    cases![
        a_leaked_download_is_ended_and_proven_dead,
        a_rotation_goes_on_when_nobody_waits,
        what_cannot_be_revoked_says_why,
        a_signer_is_revoked_for_every_operation,
        a_leaked_url_ends_its_signer_at_once,
    ]
}

fn object(key: &str, request_id: &str) -> pb::RevokeRequest {
    let object = pb::ObjectRef { bucket: "files".into(), key: key.into() };
    pb::RevokeRequest {
        target: Some(Target::Object(object)),
        reason: "posted in a chat".into(),
        request_id: request_id.into(),
        ..pb::RevokeRequest::default()
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

/// A signer of its own for `tenant/`, with a vault that may be elsewhere.
pub fn managed(vault: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let user = format!("managed-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    format!(
        "[signers.tenant]\nkind = 'iam-user'\nuser = '{user}'\n\
         vault = {{ secrets_manager = {{ secret = '{user}', region = 'us-east-1' {vault} }} }}\n\
         [[routes]]\nbucket = 'files'\nprefix = 'tenant/'\nsigner = 'tenant'\n\
         [rotation]\nrefresh = '200ms'\nlease = '1s'\npoll = '20ms'\n"
    )
}

pub fn signer_rotation(response: pb::RevokeResponse) -> pb::SignerRotation {
    let Some(Outcome::SignerRotation(rotation)) = response.outcome else { panic!("no outcome") };
    rotation
}

async fn a_signer_is_revoked_for_every_operation(backend: Backend) {
    let stage = Stage::with(backend, &managed(""), None).await;
    stage.put("tenant/a", "bytes").await;
    stage.put("other", "neighbour").await;
    let upload = Operation::Upload(pb::Upload::default());
    let (head, delete) = (Operation::Head(pb::Head::default()), Operation::Delete(pb::Delete::default()));
    let mut urls = Vec::new();
    for operation in [download(), upload, head, delete] {
        let presigned = stage.presign("tenant/a", operation).await;
        assert_eq!(presigned.signer, "tenant");
        if presigned.method != "DELETE" {
            assert_eq!(stage.send(&presigned, "bytes").await.status, 200);
        }
        urls.push(presigned);
    }
    let neighbour = stage.presign("other", download()).await;

    let request = pb::RevokeRequest {
        target: Some(Target::Signer("tenant".into())),
        request_id: "tenant-1".into(),
        ..pb::RevokeRequest::default()
    };
    let mut api = stage.api.clone();
    let dry = api.revoke(pb::RevokeRequest { dry_run: true, ..request.clone() }).await.unwrap().into_inner();
    let dry = signer_rotation(dry);
    assert!(dry.confirmed_at.is_none() && urls[0].url.contains(&dry.old_access_key_id));
    // Two at once, one with another id, are one rotation.
    let other = pb::RevokeRequest { request_id: "tenant-2".into(), ..request.clone() };
    let (mut one_api, mut two_api) = (api.clone(), api.clone());
    let (one, two) = tokio::join!(one_api.revoke(request.clone()), two_api.revoke(other));
    let (one, two) = (signer_rotation(one.unwrap().into_inner()), signer_rotation(two.unwrap().into_inner()));
    assert_eq!(one, two);
    assert_eq!(one.old_access_key_id, dry.old_access_key_id);
    assert!(one.confirmed_at.is_some());

    // New URLs work at once, the old ones are dead, and nobody else's.
    let fresh = stage.presign("tenant/a", download()).await;
    assert!(fresh.url.contains(&one.new_access_key_id));
    assert_eq!(stage.send(&fresh, "").await.text(), "bytes");
    for presigned in &urls {
        assert_eq!(stage.send(presigned, "poison").await.status, 403, "{}", presigned.method);
    }
    assert_eq!(stage.send(&neighbour, "").await.text(), "neighbour");
}

async fn a_leaked_url_ends_its_signer_at_once(backend: Backend) {
    let stage = Stage::with(backend, &managed(""), None).await;
    stage.put("tenant/a", "bytes").await;
    let leaked = stage.presign("tenant/a", download()).await;
    assert_eq!(stage.send(&leaked, "").await.status, 200);
    let request = pb::RevokeRequest {
        target: Some(Target::Url(leaked.url.split("&X-Amz-Signature=").next().unwrap().into())),
        urgency: pb::Urgency::Immediate.into(),
        ..pb::RevokeRequest::default()
    };
    let mut api = stage.api.clone();
    let revoked = api.revoke(request.clone()).await.unwrap().into_inner();
    assert!(!revoked.already_dead);
    let rotation = signer_rotation(revoked);
    assert_eq!(rotation.steps[0].name, "deactivated");
    assert_eq!(stage.send(&leaked, "").await.status, 403);
    assert_eq!(stage.get("tenant/a").await.text(), "bytes");
    // The same URL again: it was dead already, and the new key stays.
    let revoked = api.revoke(request).await.unwrap().into_inner();
    assert!(revoked.already_dead);
    assert_eq!(signer_rotation(revoked).new_access_key_id, rotation.new_access_key_id);
    assert_eq!(stage.get("tenant/a").await.text(), "bytes");
    // A retry of a revoke by name, whose first answer was lost, is not another rotation.
    let by_name = pb::RevokeRequest {
        target: Some(Target::Signer("tenant".into())),
        request_id: "again".into(),
        ..pb::RevokeRequest::default()
    };
    let first = signer_rotation(api.revoke(by_name.clone()).await.unwrap().into_inner());
    let again = signer_rotation(api.revoke(by_name).await.unwrap().into_inner());
    assert_eq!(
        (&again.old_access_key_id, &again.new_access_key_id),
        (&first.old_access_key_id, &first.new_access_key_id)
    );
}

async fn no_url_is_signed_after_the_lease(backend: Backend) {
    let to = &crate::localstack::shared().unwrap().endpoint;
    let proxy = Proxy::start(to).await;
    let stage = Stage::with(backend, &managed(&format!(", endpoint = '{}'", proxy.endpoint)), None).await;
    let ask = crate::stage::ask("tenant/a", download());
    stage.try_presign(ask.clone()).await.unwrap();

    let address = proxy.stop().await;
    let stopped = Instant::now();
    let status = loop {
        match stage.try_presign(ask.clone()).await {
            Ok(_) => assert!(stopped.elapsed() < Duration::from_millis(1500), "signed after the lease"),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&status), (tonic::Code::Unavailable, "SIGNER_UNAVAILABLE".into()));
    assert!(stopped.elapsed() > Duration::from_millis(500), "it may sign until then");
    // The others go on, and it comes back by itself.
    stage.presign("other", download()).await;
    let _proxy = Proxy::on(&address, to).await;
    let back = async { while stage.try_presign(ask.clone()).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(20), back).await.expect("it recovers");
}
