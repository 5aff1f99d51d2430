//! What is slow or out of reach: the vault, IAM, and S3's view of IAM.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fileaccess::issuer::Status;
use fileaccess::pb::Urgency;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::fleet::{Fleet, Load, PATIENCE, Proxy};
use crate::puppet;
use crate::stage::Backend;
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        health_tells_when_the_vault_is_out_of_reach,
        a_rotation_outlasts_an_outage_of_iam,
        a_planned_rotation_waits_until_s3_has_heard_of_it,
        an_immediate_rotation_waits_until_s3_has_heard_of_it,
    ]
}

const LEASE: Duration = Duration::from_secs(2);
const TEMPO: &str = "refresh = '200ms'\nlease = '2s'\nreconcile = '300ms'\norphan_age = '3s'\npoll = '50ms'";

async fn health_tells_when_the_vault_is_out_of_reach(_: Backend) {
    let fleet = Fleet::new(1).await;
    let vault = Proxy::start(&fleet.endpoint).await;
    let replica = fleet.replica(&fleet.settings(&["s0"], TEMPO, &vault.endpoint, &fleet.endpoint)).await;
    fleet.ready(&replica, "s0").await;
    let mut health = HealthClient::new(replica.channel.clone().unwrap());
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let mut hears = async |wanted: ServingStatus| {
        let heard = async { while watch.message().await.unwrap().expect("it goes on").status() != wanted {} };
        tokio::time::timeout(PATIENCE, heard).await.expect("health changes");
    };
    hears(ServingStatus::Serving).await;
    for _ in 0..2 {
        // It does not even hang up.
        vault.hold(true);
        let cut = Instant::now();
        let signing = async {
            while fleet.presign(&replica, "s0").await.is_ok() {
                assert!(cut.elapsed() < LEASE + Duration::from_millis(300), "signed after the lease");
            }
            cut.elapsed()
        };
        let ((), signed) = tokio::join!(hears(ServingStatus::NotServing), signing);
        let told = cut.elapsed();
        assert!(signed > LEASE / 2, "it may sign until the lease is over: {signed:?}");
        assert!(told < LEASE + Duration::from_secs(1), "NOT_SERVING only after {told:?}");
        vault.hold(false);
        let back = Instant::now();
        hears(ServingStatus::Serving).await;
        eprintln!(
            "vault out of reach, lease {LEASE:?}: signed for {signed:?}, NOT_SERVING after {told:?}, SERVING {:?} \
             after it was back",
            back.elapsed()
        );
        // The read that was held up renews the lease only from when it was asked for.
        tokio::time::sleep(LEASE / 4).await;
        assert_eq!(fleet.fetch(&fleet.ready(&replica, "s0").await.url).await, 200);
    }
    drop(replica);
    fleet.nothing_leaked().await;
}

async fn a_rotation_outlasts_an_outage_of_iam(_: Backend) {
    let fleet = Arc::new(Fleet::new(1).await);
    let iam = Proxy::start(&fleet.endpoint).await;
    let settings = fleet.settings(&["s0"], TEMPO, &fleet.endpoint, &iam.endpoint);
    // One rotates; the other one only cleans up, and finds IAM out of reach too.
    let replicas = Arc::new(vec![fleet.replica(&settings).await, fleet.replica(&settings).await]);
    for replica in replicas.iter() {
        fleet.ready(replica, "s0").await;
    }
    fleet.at_rest("s0").await;
    for urgency in [Urgency::Planned, Urgency::Immediate] {
        let old = fleet.ready(&replicas[0], "s0").await;
        let cut = async {
            while fleet.keys("s0").await.iter().all(|key| key.id == old.key && key.status == Status::Active) {}
            iam.hold(true);
            // Longer than a lease, in which the signer's key has to be read again.
            let load = Load::start(&fleet, &replicas, "s0", Duration::from_millis(100), Duration::ZERO);
            tokio::time::sleep(LEASE * 2).await;
            let seen = load.stop().await;
            assert!(seen.unavailable.is_empty(), "IAM alone is out of reach: {:?}", seen.unavailable);
            assert!(
                seen.issued.iter().any(|(place, _)| *place == 0) && seen.issued.iter().any(|(place, _)| *place == 1)
            );
            for (_, issued) in &seen.refused {
                assert_eq!((urgency, &issued.key), (Urgency::Immediate, &old.key), "refused");
            }
            assert!(fleet.keys("s0").await.iter().any(|key| key.id == old.key), "it can't be at its end");
            iam.hold(false);
            Instant::now()
        };
        let (revoked, back) = tokio::join!(fleet.revoke(&replicas[0], "s0", urgency, ""), cut);
        let revoked = revoked.unwrap();
        eprintln!("IAM out of reach in a rotation ({urgency:?}): confirmed {:?} after it was back", back.elapsed());
        assert_eq!(revoked.old, old.key);
        assert_eq!(fleet.fetch(&old.url).await, 403, "alive after confirmed_at");
        assert_eq!(fleet.at_rest("s0").await, revoked.new);
    }
    drop(replicas);
    fleet.nothing_leaked().await;
}

async fn a_planned_rotation_waits_until_s3_has_heard_of_it(_: Backend) {
    s3_is_late(Urgency::Planned).await;
}

async fn an_immediate_rotation_waits_until_s3_has_heard_of_it(_: Backend) {
    s3_is_late(Urgency::Immediate).await;
}

/// S3 hears of what IAM does only after this.
const LAG: Duration = Duration::from_secs(3);

async fn s3_is_late(urgency: Urgency) {
    let fleet = Arc::new(Fleet::new(1).await);
    let lag = LAG.as_millis().to_string();
    let replica = fleet.puppet(&fleet.plain(&["s0"], TEMPO), &[(puppet::LAG, &lag)]).await;
    let replicas = Arc::new(vec![replica]);
    let old = fleet.ready(&replicas[0], "s0").await;
    assert_eq!(fleet.fetch(&old.url).await, 200, "the first key too was probed");
    let load = Load::start(&fleet, &replicas, "s0", Duration::from_millis(100), Duration::ZERO);
    // The leaked URL, fetched again and again.
    let (mut served, mut after) = (None, 0);
    let revoking = {
        let (fleet, replicas) = (Arc::clone(&fleet), Arc::clone(&replicas));
        tokio::spawn(async move { fleet.revoke(&replicas[0], "s0", urgency, "").await.unwrap() })
    };
    let mut begun = SystemTime::now();
    while !revoking.is_finished() || after < 20 {
        after += usize::from(revoking.is_finished());
        if fleet.fetch(&old.url).await == 200 {
            served = Some(begun);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        begun = SystemTime::now();
    }
    let revoked = revoking.await.unwrap();
    let seen = load.stop().await;
    let at = |step| revoked.at(step).expect("it did all by itself");
    let (served, deactivated) = (served.expect("it works at first"), at("deactivated"));
    assert!(revoked.confirmed > served, "confirmed, and served after that");
    assert!(revoked.confirmed >= deactivated + LAG, "confirmed before S3 can have heard of it");
    assert!(served > deactivated + LAG / 2, "S3 was not late, so nothing is shown");
    assert!(at("promoted") > at("created") + LAG / 2, "promoted before S3 can have heard of it");
    for (_, issued) in &seen.refused {
        assert_eq!((urgency, &issued.key), (Urgency::Immediate, &old.key), "refused");
    }
    eprintln!(
        "S3 {LAG:?} late, {urgency:?}, lease {LEASE:?}: confirmed {:?} after the call; {} of {} URLs refused meanwhile",
        revoked.took,
        seen.refused.len(),
        seen.issued.len()
    );
    drop(replicas);
    fleet.nothing_leaked().await;
}
