//! `Inspect`, the blast radius and `ListSigners`, as callers see them.

use std::time::{Duration, SystemTime};

use fileaccess::pb;
use fileaccess::pb::State;
use fileaccess::pb::presign_request::Operation;
use fileaccess::pb::revoke_request::Target;
use fileaccess::pb::revoke_response::Outcome;

use crate::revoke::{managed, signer_rotation};
use crate::service::{fields, reason};
use crate::stage::{Backend, Stage, ask, download, seconds};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        a_url_is_live_then_revoked_for_good,
        a_url_expires_and_a_foreign_one_is_told,
        the_blast_radius_is_told_before_and_with_the_revoke,
        a_rotation_under_way_is_listed,
    ]
}

async fn inspect(stage: &Stage, url: &str) -> pb::InspectResponse {
    stage.api.clone().inspect(pb::InspectRequest { url: url.into() }).await.expect("an answer").into_inner()
}

fn revoke(target: Target) -> pb::RevokeRequest {
    pb::RevokeRequest { target: Some(target), ..pb::RevokeRequest::default() }
}

async fn a_url_is_live_then_revoked_for_good(backend: Backend) {
    let stage = Stage::with(backend, &managed(""), None).await;
    let key = "tenant/ä b+c%2F";
    let leaked = stage.presign(key, Operation::Upload(pb::Upload::default())).await;
    let told = inspect(&stage, &leaked.url).await;
    assert_eq!(told.state(), State::Live);
    assert_eq!((told.bucket.as_str(), told.key.as_str(), told.method.as_str()), ("files", key, "PUT"));
    assert_eq!((told.signer.as_str(), &told.issue_id), ("tenant", &leaked.issue_id));
    assert_eq!(told.expires_at, leaked.expires_at);
    assert!(leaked.url.contains(&told.access_key_id));
    let cut = leaked.url.split("&X-Amz-Signature=").next().unwrap();
    assert_eq!(inspect(&stage, cut).await, told);

    let by_signer = || revoke(Target::Signer("tenant".into()));
    let mut api = stage.api.clone();
    let first = signer_rotation(api.revoke(by_signer()).await.unwrap().into_inner());
    assert_eq!(inspect(&stage, &leaked.url).await.state(), State::Revoked);
    assert_eq!(inspect(&stage, &stage.presign(key, download()).await.url).await.state(), State::Live);
    // When the vault has no more than the id of the key, it still is ours.
    let last = signer_rotation(api.revoke(by_signer()).await.unwrap().into_inner());
    let told = inspect(&stage, &leaked.url).await;
    assert_eq!((told.state(), told.signer.as_str()), (State::Revoked, "tenant"));
    let revoked = api.revoke(revoke(Target::Url(leaked.url.clone()))).await.unwrap().into_inner();
    assert!(revoked.already_dead);
    let proof = signer_rotation(revoked);
    assert_eq!(
        (&proof.old_access_key_id, &proof.new_access_key_id),
        (&first.old_access_key_id, &last.new_access_key_id)
    );
    assert!(proof.confirmed_at.is_some() && proof.steps.is_empty());
}

async fn a_url_expires_and_a_foreign_one_is_told(backend: Backend) {
    let stage = Stage::new(backend).await;
    let brief = stage.try_presign(pb::PresignRequest { ttl: seconds(1), ..ask("k", download()) }).await.unwrap();
    let expired = async { while inspect(&stage, &brief.url).await.state() == State::Live {} };
    tokio::time::timeout(Duration::from_secs(5), expired).await.expect("it ends");
    assert_eq!(inspect(&stage, &brief.url).await.state(), State::Expired);
    let end = SystemTime::try_from(brief.expires_at.unwrap()).unwrap();
    assert!(SystemTime::now() >= end);

    let foreign = brief.url.replace("X-Amz-Credential=", "X-Amz-Credential=AKIAFOREIGN");
    let told = inspect(&stage, &foreign).await;
    assert_eq!((told.state(), told.signer.as_str(), told.key.as_str()), (State::Foreign, "", "k"));
    let elsewhere = brief.url.replace(&stage.bucket, "somebody-elses");
    assert_eq!(inspect(&stage, &elsewhere).await.bucket, "");
    let wrong = stage.api.clone().inspect(pb::InspectRequest { url: "https://x/y?z=1".into() }).await.unwrap_err();
    assert_eq!((reason(&wrong).1.as_str(), fields(&wrong)), ("INVALID_FIELD", vec!["url".to_owned()]));
}

async fn the_blast_radius_is_told_before_and_with_the_revoke(backend: Backend) {
    let stage = Stage::with(backend, &managed(""), None).await;
    let mut latest = None;
    for ttl in [60, 7200, 600] {
        let request = pb::PresignRequest { ttl: seconds(ttl), ..ask("tenant/a", download()) };
        let presigned = stage.try_presign(request).await.unwrap();
        latest = latest.max(presigned.expires_at.map(|end| end.seconds));
    }
    stage.presign("not/of/this/signer", download()).await;
    let request = pb::RevokeRequest { dry_run: true, ..revoke(Target::Signer("tenant".into())) };
    let mut api = stage.api.clone();
    let dry = api.revoke(request.clone()).await.unwrap().into_inner();
    let radius = dry.blast_radius.expect("a blast radius");
    assert_eq!((radius.signer.as_str(), radius.generation), ("tenant", 1));
    assert_eq!(radius.routes, [pb::Route { bucket: "files".into(), prefix: "tenant/".into() }]);
    let out: Vec<_> = radius.urls_out.iter().map(|out| (out.caller.as_str(), out.urls)).collect();
    assert_eq!(out, [("loopback", 3)]);
    assert_eq!(radius.latest_expiry.map(|end| end.seconds), latest);

    let listed = api.list_signers(pb::ListSignersRequest {}).await.unwrap().into_inner().signers;
    let tenant = listed.iter().find(|signer| signer.name == "tenant").unwrap();
    assert_eq!((&tenant.urls_out, tenant.latest_expiry), (&radius.urls_out, radius.latest_expiry));
    assert_eq!(tenant.rotation, None);

    let done = api.revoke(pb::RevokeRequest { dry_run: false, ..request }).await.unwrap().into_inner();
    assert_eq!(done.blast_radius, Some(radius));
    let listed = api.list_signers(pb::ListSignersRequest {}).await.unwrap().into_inner().signers;
    let tenant = listed.iter().find(|signer| signer.name == "tenant").unwrap();
    assert_eq!((tenant.generation, tenant.urls_out.len()), (2, 0), "the new key has nothing out");
}

async fn a_rotation_under_way_is_listed(backend: Backend) {
    let stage = Stage::with(backend, &managed(""), None).await;
    let mut api = stage.api.clone();
    let rotating = tokio::spawn(async move { api.revoke(revoke(Target::Signer("tenant".into()))).await });
    let mut api = stage.api.clone();
    // Planned, so that it waits for a lease after this step.
    let rotation = loop {
        let listed = api.list_signers(pb::ListSignersRequest {}).await.unwrap().into_inner().signers;
        let tenant = listed.into_iter().find(|signer| signer.name == "tenant").unwrap();
        match tenant.rotation {
            Some(rotation) if rotation.steps.iter().any(|step| step.name == "promoted") => break rotation,
            _ => assert!(!rotating.is_finished(), "it was never listed"),
        }
    };
    assert!(rotation.since.is_some() && !rotation.immediate);
    let done = rotating.await.unwrap().unwrap().into_inner();
    let Some(Outcome::SignerRotation(done)) = done.outcome else { panic!("no outcome") };
    assert_eq!(done.old_access_key_id, rotation.old_access_key_id);
    assert_eq!(done.steps[..rotation.steps.len()], rotation.steps[..]);
    let listed = api.list_signers(pb::ListSignersRequest {}).await.unwrap().into_inner().signers;
    assert!(listed.iter().all(|signer| signer.rotation.is_none()));
}
