//! Replicas side by side under load, and replicas that are killed at every step.

use std::os::unix::process::ExitStatusExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fileaccess::issuer::{KeyIssuer as _, Status};
use fileaccess::pb::Urgency;
use fileaccess::pb::revoke_request::Target;
use fileaccess::vault::Vault as _;
use futures_util::StreamExt as _;
use rand::RngExt as _;

use crate::fleet::{Fleet, Issued, Load, Replica, Seen};
use crate::puppet;
use crate::stage::Backend;
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        nobody_notices_twenty_planned_rotations,
        an_immediate_revoke_costs_one_lease_at_most,
        a_planned_rotation_survives_a_kill_at_every_boundary,
        an_immediate_rotation_survives_a_kill_at_every_boundary,
        a_first_key_and_a_spoiled_one_survive_a_kill_at_every_boundary,
    ]
}

/// A URL that is fetched that late still works, because a replica takes up a
/// new key long before the old one's lease is over.
const LATE: Duration = Duration::from_millis(400);
const LEASE: Duration = Duration::from_millis(1500);
const TEMPO: &str = "refresh = '100ms'\nlease = '1500ms'\nreconcile = '2s'\norphan_age = '3s'\npoll = '20ms'";

/// Three replicas of one signer, `s0`, under load.
async fn three() -> (Arc<Fleet>, Arc<Vec<Replica>>, Load) {
    let fleet = Arc::new(Fleet::new(1).await);
    let settings = fleet.plain(&["s0"], TEMPO);
    let (a, b, c) = tokio::join!(fleet.replica(&settings), fleet.replica(&settings), fleet.replica(&settings));
    let replicas = Arc::new(vec![a, b, c]);
    for replica in replicas.iter() {
        fleet.ready(replica, "s0").await;
    }
    // All three have begun to make a first key, perhaps: one is left.
    fleet.at_rest("s0").await;
    let load = Load::start(&fleet, &replicas, "s0", Duration::from_millis(60), LATE);
    (fleet, replicas, load)
}

/// URLs of `key`, from all replicas, the first and the last.
fn samples<'a>(seen: &'a Seen, key: &str) -> Vec<&'a Issued> {
    let of_key = |place: usize| seen.issued.iter().filter(move |(at, _)| *at == place).map(|(_, issued)| issued);
    let urls = (0..3).flat_map(|place| {
        let urls: Vec<_> = of_key(place).filter(|issued| issued.key == key).collect();
        [urls.first().copied(), urls.last().copied()].into_iter().flatten()
    });
    urls.collect()
}

async fn nobody_notices_twenty_planned_rotations(_: Backend) {
    let (fleet, replicas, load) = three().await;
    let mut dead = Vec::new();
    let mut took = Vec::new();
    for n in 0..20 {
        let replica = &replicas[rand::rng().random_range(0..3)];
        let revoked = fleet.revoke(replica, "s0", Urgency::Planned, &format!("rotation-{n}")).await.unwrap();
        let seen = load.so_far();
        let samples = samples(&seen, &revoked.old);
        assert!(samples.len() >= 3, "every replica has signed with it");
        for issued in samples {
            assert_eq!(fleet.fetch(&issued.url).await, 403, "alive after confirmed_at, rotation {n}");
            dead.push(issued.clone());
        }
        // No replica hands out what is dead, nor ever will again.
        if let Some(deactivated) = revoked.at("deactivated") {
            let last = seen.issued.iter().filter(|(_, issued)| issued.key == revoked.old).map(|(_, i)| i.asked).max();
            assert!(last.unwrap() < deactivated, "handed out after it was deactivated");
        }
        took.push(revoked.took);
    }
    let seen = load.stop().await;
    for issued in &dead {
        assert_eq!(fleet.fetch(&issued.url).await, 403);
    }
    took.sort();
    eprintln!(
        "20 planned rotations, lease {LEASE:?}: call to confirmed_at {:?} to {:?}, median {:?}; {} URLs issued, {} \
         fetched, {} refused, {} not issued",
        took[0],
        took[19],
        took[10],
        seen.issued.len(),
        seen.fetched,
        seen.refused.len(),
        seen.unavailable.values().sum::<usize>()
    );
    assert!(seen.fetched > 500, "no load to speak of: {}", seen.fetched);
    assert!(seen.refused.is_empty(), "{:?}", seen.refused);
    // On a machine too busy to read the vault within a lease, a replica rightly says no.
    let unavailable = seen.unavailable.values().sum::<usize>();
    assert!(unavailable * 20 < seen.issued.len(), "{:?}", seen.unavailable);
    drop(replicas);
    fleet.nothing_leaked().await;
}

async fn an_immediate_revoke_costs_one_lease_at_most(_: Backend) {
    let (fleet, replicas, load) = three().await;
    for n in 0..3 {
        let old = fleet.ready(&replicas[n], "s0").await;
        let before = load.so_far();
        let revoke = fleet.revoke(&replicas[n], "s0", Urgency::Immediate, "");
        // As soon as IAM shows another key, the old one is dead.
        let dead_first = async {
            while fleet.keys("s0").await.iter().all(|key| key.id == old.key) {}
            assert_eq!(fleet.fetch(&old.url).await, 403, "a new key before the old one is dead");
        };
        let (revoked, ()) = tokio::join!(revoke, dead_first);
        let revoked = revoked.unwrap();
        assert_eq!((revoked.old.as_str(), revoked.steps[0].0.as_str()), (old.key.as_str(), "deactivated"));
        for issued in samples(&load.so_far(), &revoked.old) {
            assert_eq!(fleet.fetch(&issued.url).await, 403, "alive after confirmed_at");
        }
        for replica in replicas.iter() {
            while fleet.ready(replica, "s0").await.key != revoked.new {}
        }
        // Whatever is asked for from now on works.
        let recovered = SystemTime::now();
        tokio::time::sleep(LEASE).await;
        let seen = load.so_far();
        let refused: Vec<_> = seen.refused[before.refused.len()..].iter().map(|(_, issued)| issued).collect();
        for issued in &refused {
            assert_eq!(issued.key, revoked.old, "a new URL is refused");
            assert!(issued.asked < recovered, "refused after all have recovered");
        }
        // No replica signs with an old key that had a lease to notice.
        let signed = |key: &str| {
            let of_key = seen.issued.iter().filter(|(_, issued)| issued.key == key).map(|(_, issued)| issued.asked);
            of_key.collect::<Vec<_>>()
        };
        let (last, first) = (signed(&revoked.old).into_iter().max(), signed(&revoked.new).into_iter().min());
        let late = last.unwrap().duration_since(first.unwrap()).unwrap_or_default();
        assert!(late < LEASE, "an old key {late:?} after another was there");
        eprintln!(
            "immediate, lease {LEASE:?}: call to confirmed_at {:?}; the last URL of the old key {late:?} after the \
             first of the new one; {} of {} URLs refused meanwhile",
            revoked.took,
            refused.len(),
            seen.issued.len() - before.issued.len()
        );
    }
    load.stop().await;
    drop(replicas);
    fleet.nothing_leaked().await;
}

/// Slow enough for so many signers.
fn calm(reconcile: &str) -> String {
    format!("refresh = '500ms'\nlease = '2s'\norphan_age = '3s'\npoll = '30ms'\nreconcile = {reconcile}")
}

/// What a replica is in the middle of when it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Planned,
    Immediate,
    /// The signer's first key.
    First,
    /// A planned rotation that finds a pending key which is of no use.
    Spoiled,
}

async fn a_planned_rotation_survives_a_kill_at_every_boundary(_: Backend) {
    survives(&boundaries(Work::Planned, &["create", "stage", "promote", "set_status", "delete"])).await;
}

async fn an_immediate_rotation_survives_a_kill_at_every_boundary(_: Backend) {
    survives(&boundaries(Work::Immediate, &["set_status", "create", "stage", "promote", "delete"])).await;
}

async fn a_first_key_and_a_spoiled_one_survive_a_kill_at_every_boundary(_: Backend) {
    let mut all = boundaries(Work::First, &["create", "stage", "promote"]);
    all.extend(boundaries(Work::Spoiled, &["delete", "unstage"]));
    survives(&all).await;
}

/// A place to be killed at.
struct Boundary {
    work: Work,
    die: String,
}

fn boundaries(work: Work, effects: &[&str]) -> Vec<Boundary> {
    let places = effects.iter().flat_map(|effect| ["before", "after"].map(|when| format!("{when} {effect}")));
    places.map(|die| Boundary { work, die }).collect()
}

/// Kills a replica at each of them, and has another one finish.
async fn survives(boundaries: &[Boundary]) {
    let fleet = Arc::new(Fleet::new(boundaries.len()).await);
    let scenes: Vec<_> = fleet.signers.keys().cloned().collect();
    let all: Vec<_> = scenes.iter().map(String::as_str).collect();
    let with_key: Vec<_> = (0..all.len()).filter(|n| boundaries[*n].work != Work::First).map(|n| all[n]).collect();

    // Makes the first keys, and then cleans up nothing: it has looked once.
    let bystander = fleet.replica(&fleet.plain(&with_key, &calm("'1h'"))).await;
    let mut old = Vec::new();
    for signer in &with_key {
        let issued = fleet.ready(&bystander, signer).await;
        fleet.at_rest(signer).await;
        assert_eq!(fleet.fetch(&issued.url).await, 200);
        old.push((*signer, issued));
    }
    let old_of = |signer: &str| old.iter().find(|(of, _)| *of == signer).map(|(_, issued)| issued.clone());
    let bystander = Arc::new(vec![bystander]);
    let loads: Vec<_> = with_key
        .iter()
        .map(|signer| (*signer, Load::start(&fleet, &bystander, signer, Duration::from_millis(200), Duration::ZERO)))
        .collect();

    // The victims.
    let victims = (0..all.len()).map(|n| {
        let (fleet, signer, Boundary { work, die }) = (&fleet, all[n], &boundaries[n]);
        let key = old_of(signer).map(|issued| issued.key).unwrap_or_default();
        async move {
            if *work == Work::Spoiled {
                let (user, vault) = (&fleet.signers[signer], fleet.vault(signer));
                let spoiled = fleet.issuer.create(user).await.unwrap();
                vault.stage(&format!("{:032x}", rand::random::<u128>()), &spoiled).await.unwrap();
                fleet.issuer.set_status(user, spoiled.access_key_id(), Status::Inactive).await.unwrap();
            }
            let urgency = if *work == Work::Immediate { "immediate" } else { "planned" };
            let strings = [
                (puppet::ROTATE, key.as_str()),
                (puppet::URGENCY, urgency),
                (puppet::REQUEST, "leak-1"),
                (puppet::DIE, die),
            ];
            // It is not to clean up: the rotation alone is under test.
            let settings = fleet.plain(&[signer], &calm("'1h'"));
            let status = fleet.puppet(&settings, &strings).await.ended().await;
            assert_eq!(status.signal(), Some(9), "{work:?} {die}: {status:?}");
            let keys = fleet.keys(signer).await;
            assert!(keys.len() <= 2, "{work:?} {die}: a third key: {keys:?}");
        }
    });
    futures_util::stream::iter(victims).buffer_unordered(3).collect::<Vec<()>>().await;

    // Another replica comes, and knows nothing.
    let finisher = fleet.replica(&fleet.plain(&all, &calm("'600ms'"))).await;
    let finishing = (0..all.len()).map(|n| {
        let (fleet, finisher, signer, Boundary { work, die }) = (&fleet, &finisher, all[n], &boundaries[n]);
        let old = old_of(signer);
        async move {
            let at_rest = fleet.at_rest(signer).await;
            let Some(old) = old else {
                let issued = fleet.ready(finisher, signer).await;
                assert_eq!((fleet.fetch(&issued.url).await, issued.key), (200, at_rest), "{work:?} {die}");
                return;
            };
            // Its caller asks again, and hears of the same rotation. Of an urgent one
            // that had no version in the vault yet, only the key tells which it was.
            let stored = ["after stage", "before promote", "after promote", "before delete", "after delete"];
            let unnamed = *work == Work::Immediate && !stored.contains(&die.as_str());
            let target = if unnamed { Target::Url(old.url.clone()) } else { Target::Signer(signer.to_owned()) };
            let urgency = if *work == Work::Immediate { Urgency::Immediate } else { Urgency::Planned };
            let revoked = fleet.revoke_target(finisher, signer, target, urgency, "leak-1").await.unwrap();
            assert_eq!(revoked.old, old.key, "{work:?} {die}");
            if at_rest != old.key {
                assert_eq!(revoked.new, at_rest, "{work:?} {die}: rotated twice");
            }
            assert_eq!(fleet.fetch(&old.url).await, 403, "{work:?} {die}: alive after confirmed_at");
            let at_rest = fleet.at_rest(signer).await;
            assert_eq!(at_rest, revoked.new, "{work:?} {die}");
            while fleet.ready(finisher, signer).await.key != at_rest {}
            assert_eq!(fleet.fetch(&fleet.ready(finisher, signer).await.url).await, 200, "{work:?} {die}");
        }
    });
    futures_util::stream::iter(finishing).buffer_unordered(all.len()).collect::<Vec<()>>().await;

    // Whoever asked the bystander meanwhile always got what works.
    for (signer, load) in loads {
        let Boundary { work, die } = &boundaries[all.iter().position(|of| *of == signer).unwrap()];
        let seen = load.stop().await;
        // A machine that is too busy to read the vault within a lease is another matter.
        let unavailable = seen.unavailable.values().sum::<usize>();
        assert!(unavailable * 5 < seen.fetched, "{work:?} {die}: {:?} of {}", seen.unavailable, seen.fetched);
        let old = old_of(signer).unwrap().key;
        for (_, refused) in &seen.refused {
            assert_eq!((*work, &refused.key), (Work::Immediate, &old), "{work:?} {die}: a URL is refused");
        }
    }
    drop((bystander, finisher));
    fleet.nothing_leaked().await;
}
