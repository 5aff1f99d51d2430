//! The rules as a whole: every caller, action and key, and the compiled table
//! against a plain scan.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::grant::{CallerPattern, GrantSettings, Load, PrefixTemplate};
use super::*;
use crate::object::ObjectKey;
use crate::ops::delete::Delete;
use crate::ops::download::Download;
use crate::ops::head::Head;
use crate::ops::presign::Operation;
use crate::ops::upload::{Checksum, Upload};
use crate::ops::{list, presign, revoke, signers, stat};

const ORDERS: &str = "spiffe://mesh.test/ns/shop/sa/orders";
const WEB: &str = "spiffe://mesh.test/ns/shop/sa/web-1";
const OTHER_NS: &str = "spiffe://mesh.test/ns/shopping/sa/orders";
const OTHER_DOMAIN: &str = "spiffe://mesh.tes/ns/shop/sa/orders";
const DEEPER: &str = "spiffe://mesh.test/ns/shop/sa/orders/x";
const DNS: &str = "dns:orders.shop";

fn policy(grants: &str) -> Policy {
    let text = format!(
        "{grants}\n[buckets.photos]\nbucket = 'photos'\nregion = 'eu-central-1'\n\
         [buckets.papers]\nbucket = 'papers'\nregion = 'eu-central-1'\n\
         [signers.a]\nkind = 'ambient'\n[signers.b]\nkind = 'ambient'\n[signers.idle]\nkind = 'ambient'\n\
         [[routes]]\nbucket = 'photos'\nprefix = 'tenant-a/'\nsigner = 'a'\n\
         [[routes]]\nbucket = 'photos'\nprefix = 'tenant-ab/'\nsigner = 'b'\n\
         [[routes]]\nbucket = 'papers'\nprefix = 'tenant-a/'\nsigner = 'b'\n\
         [ttl]\nceiling = '2h'\n"
    );
    Policy::new(&Settings::load(&text, &BTreeMap::new()).unwrap())
}

fn grant(caller: &str, bucket: &str, prefix: &str, actions: &str, more: &str) -> String {
    format!(
        "[[grants]]\ncaller = '{caller}'\nbucket = '{bucket}'\nprefix = '{prefix}'\nactions = [{actions}]\n{more}\n"
    )
}

fn bucket(name: &str) -> BucketName {
    BucketName::parse(name).unwrap()
}

fn presigns(bucket_name: &str, key: &str, operation: Operation) -> presign::Ask {
    presign::Ask { bucket: bucket(bucket_name), key: ObjectKey::parse(key).unwrap(), ttl: None, operation }
}

fn lists(bucket_name: &str, prefix: &str) -> list::Ask {
    list::Ask {
        bucket: bucket(bucket_name),
        prefix: Prefix::parse(prefix).unwrap(),
        delimiter: "/".into(),
        page_size: 1,
        page_token: String::new(),
        download_ttl: None,
    }
}

fn revokes(target: revoke::Target) -> revoke::Ask {
    revoke::Ask { target, immediate: false, reason: String::new(), request_id: String::new(), dry_run: true }
}

/// Every ask that there is about one key, with the action that it needs.
fn asks(bucket_name: &str, key: &str) -> Vec<(Action, Box<dyn Ask>)> {
    let stat = stat::Ask { bucket: bucket(bucket_name), key: ObjectKey::parse(key).unwrap(), version_id: None };
    let object = revoke::Target::Object(bucket(bucket_name), ObjectKey::parse(key).unwrap());
    vec![
        (Action::Download, Box::new(presigns(bucket_name, key, Operation::Download(Download::default())))),
        (Action::Upload, Box::new(presigns(bucket_name, key, Operation::Upload(Upload::default())))),
        (Action::Head, Box::new(presigns(bucket_name, key, Operation::Head(Head::default())))),
        (Action::Delete, Box::new(presigns(bucket_name, key, Operation::Delete(Delete::default())))),
        (Action::List, Box::new(lists(bucket_name, key))),
        (Action::Stat, Box::new(stat)),
        (Action::RevokeObject, Box::new(revokes(object))),
    ]
}

fn is_granted(policy: &Policy, caller: &str, ask: &dyn Ask) -> bool {
    matches!(policy.judge(caller, &ask.needs()), Verdict::Granted(_))
}

#[test]
fn each_caller_action_and_key_is_granted_or_refused_as_the_table_has_it() {
    const CALLERS: [&str; 9] = ["loopback", "uid:1000", "uid:10", DNS, ORDERS, WEB, OTHER_NS, OTHER_DOMAIN, DEEPER];
    const KEYS: [(&str, &str); 16] = [
        ("photos", "tenant-a/x"),
        ("photos", "tenant-a/"),
        ("photos", "tenant-a"),
        ("photos", "tenant-ab/x"),
        ("photos", "Tenant-a/x"),
        ("photos", "tenant-a%2Fx"),
        ("photos", "tenant-a//x"),
        ("photos", "/tenant-a/x"),
        ("photos", "tenant-\u{430}/x"),  // Cyrillic
        ("photos", "tenant-a\u{2215}x"), // a division slash
        ("photos", "tenant-a\u{301}/x"), // á, decomposed
        ("photos", "orders/x"),
        ("photos", "shop/web-1/x"),
        ("photos", "other"),
        ("papers", "tenant-a/x"),
        ("unknown", "tenant-a/x"),
    ];
    let actions = |all: &[Action]| all.iter().map(|action| format!("'{action}'")).collect::<Vec<_>>().join(", ");
    let read = [Action::Download, Action::Head, Action::Stat, Action::List];
    let write = [Action::Upload, Action::Delete];
    let policy = policy(
        &[
            grant("loopback", "photos", "", &actions(&Action::ALL), ""),
            grant("uid:1000", "photos", "tenant-a/", &actions(&read), ""),
            grant("dns:orders.shop", "photos", "tenant-a", "'revoke_object'", ""),
            grant(ORDERS, "papers", "", "'download'", ""),
            grant("spiffe://mesh.test/ns/shop/sa/*", "photos", "{caller.sa}/", &actions(&write), ""),
            grant("spiffe://mesh.test/ns/*/sa/web-*", "photos", "{caller.ns}/{caller.name}/", &actions(&read), ""),
        ]
        .concat(),
    );
    let expect = |caller: &str, action: Action, bucket: &str, key: &str| match caller {
        "loopback" => bucket == "photos",
        "uid:1000" => {
            read.contains(&action) && bucket == "photos" && matches!(key, "tenant-a/x" | "tenant-a/" | "tenant-a//x")
        }
        DNS => {
            action == Action::RevokeObject
                && bucket == "photos"
                // Without a slash at its end a prefix is just the beginning of the bytes.
                && (key.as_bytes().starts_with(b"tenant-a"))
        }
        ORDERS => {
            (action == Action::Download && bucket == "papers")
                || (write.contains(&action) && bucket == "photos" && key == "orders/x")
        }
        WEB => read.contains(&action) && bucket == "photos" && key == "shop/web-1/x",
        _ => false,
    };
    let mut granted = 0;
    for caller in CALLERS {
        for (bucket, key) in KEYS {
            for (action, ask) in asks(bucket, key) {
                let is = is_granted(&policy, caller, &*ask);
                assert_eq!(is, expect(caller, action, bucket, key), "{caller} {action} {bucket} {key}");
                granted += usize::from(is);
            }
        }
    }
    assert_eq!(granted, 14 * 7 + 3 * 4 + 8 + 1 + 2 + 4);
}

#[test]
fn no_grants_are_no_rights() {
    let policy = policy("");
    for (_, ask) in asks("photos", "tenant-a/x") {
        assert!(!is_granted(&policy, "loopback", &*ask));
    }
    assert!(!is_granted(&policy, "loopback", &signers::Ask));
    assert!(!is_granted(&policy, "loopback", &OfSigner(Action::RevokeSigner, "a")));
}

#[test]
fn a_pattern_fits_whole_segments_and_no_empty_one() {
    let policy = policy(&grant("spiffe://mesh.test/ns/*/sa/web-*", "photos", "", "'stat'", ""));
    let ask = stat::Ask { bucket: bucket("photos"), key: ObjectKey::parse("x").unwrap(), version_id: None };
    for (caller, fits) in [
        (WEB, true),
        ("spiffe://mesh.test/ns/shop/sa/web-", true),
        ("spiffe://mesh.test/ns/shop/sa/web", false),
        ("spiffe://mesh.test/ns//sa/web-1", false),
        ("spiffe://mesh.test/ns/shop/x/sa/web-1", false),
        ("spiffe://mesh.test/ns/shop/sa/web-1/", false),
        ("spiffe://mesh.test/ns/shop/sa/web-1/x", false),
        ("spiffe://mesh.test/ns/shop/sa/Web-1", false),
        ("spiffe://mesh.test/ns/shop/sa", false),
        ("spiffe://mesh.test/ns/shop%2Fsa/web-1", false),
        ("SPIFFE://mesh.test/ns/shop/sa/web-1", false),
        ("spiffe://mesh.test.evil/ns/shop/sa/web-1", false),
        ("mesh.test/ns/shop/sa/web-1", false),
        ("dns:spiffe://mesh.test/ns/shop/sa/web-1", false),
        ("", false),
    ] {
        assert_eq!(is_granted(&policy, caller, &ask), fits, "{caller}");
    }
}

#[test]
fn what_is_listed_lies_within_one_prefix() {
    let policy = policy(
        &[grant("uid:1", "photos", "tenant-a/", "'list'", ""), grant("uid:1", "photos", "deep/in/side", "'list'", "")]
            .concat(),
    );
    for (prefix, granted) in [
        ("tenant-a/", true),
        ("tenant-a/b", true),
        ("tenant-a", false),
        ("tenant-ab/", false),
        ("", false),
        ("deep/in/", false),
        ("deep/in/sidecar/", true),
    ] {
        assert_eq!(is_granted(&policy, "uid:1", &lists("photos", prefix)), granted, "{prefix}");
    }
}

#[test]
fn a_signer_takes_a_grant_on_each_of_its_routes() {
    let all = "'revoke_signer', 'signers'";
    let policy = policy(
        &[
            grant("uid:1", "photos", "tenant-a/", all, ""),
            grant("uid:2", "photos", "tenant-ab/", all, ""),
            grant("uid:3", "photos", "tenant-ab/", all, ""),
            grant("uid:3", "papers", "", all, ""),
            grant("uid:4", "photos", "tenant-a/deeper/", all, ""),
            grant("uid:5", "photos", "", all, ""),
            grant("uid:5", "papers", "tenant-a/", "'revoke_signer'", ""),
            grant("uid:6", "photos", "", "'download', 'revoke_object'", ""),
        ]
        .concat(),
    );
    let names = ["a", "b", "idle", "nobody"];
    for (caller, revokes_these, sees_these, by_url) in [
        ("uid:1", "a", "a", true),
        // One of two routes is not enough.
        ("uid:2", "", "", false),
        ("uid:3", "b", "b", true),
        ("uid:4", "", "", false),
        // Who may do it to all of them may hear of those that sign for nothing.
        ("uid:5", "a b idle nobody", "a", true),
        ("uid:6", "", "", false),
        ("loopback", "", "", false),
    ] {
        for name in names {
            let revoke = revokes(revoke::Target::Signer(name.into()));
            assert_eq!(
                is_granted(&policy, caller, &revoke),
                revokes_these.split(' ').any(|n| n == name),
                "{caller} {name}"
            );
            let see = OfSigner(Action::Signers, name);
            assert_eq!(is_granted(&policy, caller, &see), sees_these.split(' ').any(|n| n == name), "{caller} {name}");
        }
        let url = revokes(revoke::Target::KeyOfUrl("AKIA".into()));
        assert_eq!(is_granted(&policy, caller, &url), by_url, "{caller}");
        assert_eq!(is_granted(&policy, caller, &signers::Ask), !sees_these.is_empty(), "{caller}");
    }
}

#[test]
fn a_refusal_is_the_same_whatever_there_is() {
    let policy = policy(&grant("uid:1", "photos", "mine/", "'stat'", ""));
    let refuse = |bucket: &str, key: &str| {
        let ask = stat::Ask { bucket: self::bucket(bucket), key: ObjectKey::parse(key).unwrap(), version_id: None };
        policy.authorize(Caller::user(1), ask).unwrap_err().to_string()
    };
    let text =
        |bucket: &str, key: &str| format!("no grant lets caller `uid:1` do `stat` on key `{key}` of bucket `{bucket}`");
    for (bucket, key) in [("photos", "theirs/x"), ("papers", "mine/x"), ("unknown", "mine/x")] {
        assert_eq!(refuse(bucket, key), text(bucket, key));
    }
}

#[test]
fn ceilings_clamp_the_ttl_and_refuse_the_rest() {
    let limits = "max_size = 100\ncontent_types = ['image/*', 'text/plain']\ncreate_only = true\nchecksum = true";
    let policy = policy(
        &[
            grant("uid:1", "photos", "strict/", "'upload', 'download'", limits),
            grant("uid:1", "photos", "strict/", "'download'", "max_ttl = '1m'"),
            grant("uid:2", "photos", "", "'download'", "max_ttl = '1m'"),
            grant("uid:2", "photos", "a/", "'download'", "max_ttl = '1h'"),
            grant("uid:2", "photos", "a/b/", "'download'", "max_ttl = '7days'"),
            grant("uid:3", "photos", "", "'upload'", "max_size = 100\nmax_ttl = '1h'"),
            grant("uid:3", "photos", "", "'upload'", "max_size = 1000\nmax_ttl = '1m'"),
            grant("uid:3", "photos", "", "'upload'", "create_only = true\nchecksum = true"),
        ]
        .concat(),
    );
    let life = |uid, key: &str| {
        let ask = presigns("photos", key, Operation::Download(Download::default()));
        policy.authorize(Caller::user(uid), ask).unwrap().ceiling().seconds()
    };
    // Of those that allow it the most favourable counts, and the ceiling of all.
    assert_eq!([life(1, "strict/x"), life(2, "x"), life(2, "a/x"), life(2, "a/b/x")], [7200, 60, 3600, 7200]);

    let upload = |uid, key: &str, upload| match policy
        .authorize(Caller::user(uid), presigns("photos", key, Operation::Upload(upload)))
    {
        Ok(permit) => Ok(permit.ceiling().seconds()),
        Err(Error::OverCeiling(fields)) => Err(fields.into_iter().map(|v| v.field).collect::<Vec<_>>().join(" ")),
        Err(other) => Err(other.code().1.as_str_name().to_owned()),
    };
    let good = Upload {
        content_length: Some(100),
        content_type: Some("image/png".into()),
        create_only: true,
        checksum: Some(Checksum::Crc32([0; 4])),
        ..Upload::default()
    };
    assert_eq!(upload(1, "strict/x", good.clone()), Ok(7200));
    for (wrong, lacks) in [
        (Upload::default(), "upload.content_length upload.content_type upload.create_only upload.checksum"),
        (Upload { content_length: Some(101), ..good.clone() }, "upload.content_length"),
        (Upload { content_length: None, ..good.clone() }, "upload.content_length"),
        (Upload { content_type: Some("text/html".into()), ..good.clone() }, "upload.content_type"),
        (Upload { content_type: Some("image/png, text/html".into()), ..good.clone() }, "upload.content_type"),
        (Upload { content_type: None, ..good.clone() }, "upload.content_type"),
        (Upload { create_only: false, ..good.clone() }, "upload.create_only"),
        (Upload { checksum: None, ..good.clone() }, "upload.checksum"),
    ] {
        assert_eq!(upload(1, "strict/x", wrong), Err(lacks.to_owned()));
    }
    assert_eq!(upload(1, "other/x", good.clone()), Err("ERROR_REASON_NOT_GRANTED".to_owned()));

    let of = |length, create_only| Upload { content_length: length, create_only, ..Upload::default() };
    // One grant must allow all of it, and then its own ttl counts.
    assert_eq!(upload(3, "x", of(Some(100), false)), Ok(3600));
    assert_eq!(upload(3, "x", of(Some(101), false)), Ok(60));
    assert_eq!(upload(3, "x", good), Ok(7200));
    // Nearest is the one that lacks least.
    assert_eq!(upload(3, "x", of(None, true)), Err("upload.content_length".to_owned()));

    let told = policy.authorize(Caller::user(3), presigns("photos", "x", Operation::Upload(of(None, false))));
    let told = told.unwrap_err().to_string();
    assert_eq!(told, "no grant goes this far: `upload.content_length` must be given, and be at most 100 bytes");
}

/// Whether a pattern fits, the slow way.
fn fits(pattern: &str, caller: &str) -> bool {
    let (pattern, caller): (Vec<_>, Vec<_>) = (pattern.split('/').collect(), caller.split('/').collect());
    pattern.len() == caller.len()
        && pattern.iter().zip(caller).all(|(pattern, part)| match pattern.strip_suffix('*') {
            Some(stem) => !part.is_empty() && part.starts_with(stem),
            None => *pattern == part,
        })
}

/// The prefix of a template for a caller, the slow way. `None`: there is none.
fn fill(template: &str, caller: &str) -> Option<String> {
    let mut filled = template.to_owned();
    let parts: Vec<_> = caller.split('/').skip(2).collect();
    let pairs: Vec<_> = parts.get(1..).unwrap_or_default().chunks_exact(2).collect();
    for (variable, values) in [
        ("{caller.trust_domain}", parts.first().into_iter().copied().collect::<Vec<_>>()),
        ("{caller.name}", parts.get(1..).unwrap_or_default().last().into_iter().copied().collect()),
        ("{caller.a}", pairs.iter().filter(|pair| pair[0] == "a").map(|pair| pair[1]).collect()),
    ] {
        if filled.contains(variable) {
            let [value] = values.as_slice() else { return None };
            filled = filled.replace(variable, value);
        }
    }
    Some(filled)
}

proptest! {
    #[test]
    fn the_table_says_what_a_scan_says(
        grants in proptest::collection::vec(
            (
                prop_oneof!["spiffe://m(/(a|b|ab|a\\*|\\*)){1,4}", "uid:[12]", Just("loopback".to_owned())],
                "photos|papers",
                prop_oneof!["[ab/é]{0,4}", "[ab/]{0,2}\\{caller\\.(a|name|trust_domain)\\}/[ab/]{0,2}(\\{caller\\.name\\}/b?)?"],
                proptest::sample::subsequence(&Action::ALL[..], 1..4),
                (proptest::option::of(1..5_u32), proptest::option::of(0..3_u64), any::<bool>()),
            ),
            0..40,
        ),
        caller in prop_oneof!["spiffe://m(/(a|b|ab)){0,4}", "uid:[12]", Just("loopback".to_owned())],
        bucket_name in "photos|papers",
        key in "(m/)?[ab/é]{1,8}",
        action in proptest::sample::select(&Action::ALL[..]),
        length in proptest::option::of(0..3_u64),
        create_only: bool,
    ) {
        let grants: Vec<_> = grants.into_iter().map(|(pattern, bucket_name, prefix, actions, (minutes, max_size, create_only))| {
            let max_ttl = minutes.map(|m| Lifetime::new(std::time::Duration::from_secs(u64::from(m) * 60)).unwrap());
            let settings = GrantSettings {
                caller: CallerPattern::parse(&pattern).unwrap(),
                bucket: bucket(&bucket_name),
                prefix: PrefixTemplate::parse(&prefix).unwrap(),
                actions,
                max_ttl,
                max_size,
                content_types: None,
                create_only,
                checksum: false,
            };
            (settings, pattern, prefix)
        }).collect();
        let upload = Upload { content_length: length, create_only, ..Upload::default() };
        let upload = (action == Action::Upload).then(|| Load::from(&upload));
        let mut scan = Verdict::NotGranted;
        for (grant, pattern, prefix) in &grants {
            let covers = fill(prefix, &caller).is_some_and(|prefix| key.starts_with(&prefix));
            if !(covers && fits(pattern, &caller) && grant.bucket.as_str() == bucket_name && grant.actions.contains(&action)) {
                continue;
            }
            let lacks = upload.as_ref().map(|load| grant.lacks(load)).unwrap_or_default();
            scan = match (scan, lacks.is_empty()) {
                (Verdict::Granted(None), _) => Verdict::Granted(None),
                (Verdict::Granted(life), true) => Verdict::Granted(grant.max_ttl.and_then(|this| life.map(|life| life.max(this)))),
                (Verdict::Granted(life), false) => Verdict::Granted(life),
                (_, true) => Verdict::Granted(grant.max_ttl),
                (Verdict::OverCeiling(least), false) if least.len() <= lacks.len() => Verdict::OverCeiling(least),
                (_, false) => Verdict::OverCeiling(lacks),
            };
        }
        let bucket = bucket(&bucket_name);
        let table = Grants::compile(&grants.into_iter().map(|(grant, ..)| grant).collect::<Vec<_>>());
        let said = table.judge(&Question { caller: &caller, action, bucket: &bucket, key: &key, upload });
        if let (Verdict::OverCeiling(said), Verdict::OverCeiling(scan)) = (&said, &scan) {
            // Which of two that lack as much is told is all the same.
            prop_assert_eq!(said.len(), scan.len());
        } else {
            prop_assert_eq!(said, scan);
        }
    }
}
