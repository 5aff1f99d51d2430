//! What it costs to look a grant up among 10,000, and what all of caller, grant
//! and audit cost a call: `cargo bench`. Prints the numbers of the README's
//! "Cost", and fails if a look-up is above 1 µs or the whole above 1.5 µs.
//!
//! The look-ups are in random order, so that the table is not in the nearest
//! caches, and each is granted. What counts is the fastest of 300 passes: in
//! the others somebody else had the core, or its caches, for a while.

#![allow(clippy::cast_precision_loss, clippy::unwrap_used, missing_docs, reason = "bench")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant, SystemTime};

use fileaccess::audit::{Asked, Audit};
use fileaccess::caller::Caller;
use fileaccess::config::{AuditSettings, Settings, WhenFull};
use fileaccess::object::{BucketName, ObjectKey};
use fileaccess::ops::download::Download;
use fileaccess::ops::presign;
use fileaccess::ops::stat::Ask;
use fileaccess::policy::Policy;
use fileaccess::policy::grant::Action;
use fileaccess::policy::table::{Grants, Question, Verdict};
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderName};
use rand::seq::SliceRandom as _;

/// As the binary has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const GRANTS: usize = 10_000;
const PASSES: usize = 300;
/// In ns.
const ALLOWED: f64 = 1000.0;
/// In ns, for caller, grant and audit record together.
const ALLOWED_WHOLE: f64 = 1500.0;

fn main() {
    let mut worst = 0_f64;
    let orders = |_: usize| "spiffe://mesh.test/ns/shop/sa/orders".to_owned();
    let own = |n: usize| format!("spiffe://mesh.test/ns/team-{n}/sa/web-{}", n % 7);
    let tenant = |n: usize| format!("tenants/{n:05}/");
    for (what, pattern, prefix, caller) in [
        (
            "a caller each",
            &own as &dyn Fn(usize) -> String,
            &tenant as &dyn Fn(usize) -> String,
            &own as &dyn Fn(usize) -> String,
        ),
        ("one caller, a prefix each", &orders, &tenant, &orders),
        (
            "a pattern and a template each",
            &|n| format!("spiffe://mesh.test/ns/team-{n}/sa/web-*"),
            &|_| "tenants/{caller.ns}/".to_owned(),
            &own,
        ),
    ] {
        let keys = |n: usize| if prefix(0).contains('{') { format!("tenants/team-{n}/") } else { prefix(n) };
        worst = worst.max(measure(what, &settings(pattern, prefix), caller, keys));
    }
    worst = worst.max(authorize());
    let whole = whole();
    assert!(worst <= ALLOWED, "a look-up costs too much: {worst:.0} ns, allowed {ALLOWED}");
    assert!(whole <= ALLOWED_WHOLE, "caller, grant and audit cost too much: {whole:.0} ns, allowed {ALLOWED_WHOLE}");
}

fn settings(caller: &dyn Fn(usize) -> String, prefix: &dyn Fn(usize) -> String) -> Settings {
    let mut text = "[buckets.photos]\nbucket = 'photos'\nregion = 'eu-central-1'\n[signers.main]\nkind = 'ambient'\n\
                    [[routes]]\nbucket = 'photos'\nsigner = 'main'\n"
        .to_owned();
    for n in 0..GRANTS {
        let (caller, prefix) = (caller(n), prefix(n));
        writeln!(
            text,
            "[[grants]]\ncaller = '{caller}'\nbucket = 'photos'\nprefix = '{prefix}'\nactions = ['download', 'stat']"
        )
        .unwrap();
    }
    Settings::load(&text, &BTreeMap::new()).unwrap()
}

fn measure(what: &str, settings: &Settings, caller: &dyn Fn(usize) -> String, prefix: impl Fn(usize) -> String) -> f64 {
    let grants = Grants::compile(&settings.grants);
    let bucket = BucketName::parse("photos").unwrap();
    let mut asked: Vec<_> = (0..GRANTS).map(|n| (caller(n), format!("{}2026/IMG_{n}.jpg", prefix(n)))).collect();
    asked.shuffle(&mut rand::rng());
    let pass = || {
        let begun = Instant::now();
        for (caller, key) in &asked {
            let question = Question { caller, action: Action::Download, bucket: &bucket, key, upload: None };
            assert!(matches!(black_box(grants.judge(&question)), Verdict::Granted(_)));
        }
        begun.elapsed()
    };
    report(what, (0..PASSES).map(|_| pass()))
}

/// All that a call pays: a permit for its ask.
fn authorize() -> f64 {
    let policy = Policy::new(&settings(&|n| format!("uid:{n}"), &|n| format!("tenants/{n:05}/")));
    let mut asked: Vec<_> = (0..GRANTS)
        .map(|n| {
            let key = ObjectKey::parse(format!("tenants/{n:05}/2026/IMG_{n}.jpg")).unwrap();
            (
                Caller::user(n.try_into().unwrap()),
                Ask { bucket: BucketName::parse("photos").unwrap(), key, version_id: None },
            )
        })
        .collect();
    asked.shuffle(&mut rand::rng());
    let mut permits = Vec::with_capacity(GRANTS);
    let pass = || {
        permits.clear();
        let asked = asked.clone();
        let begun = Instant::now();
        permits.extend(asked.into_iter().map(|(caller, ask)| policy.authorize(caller, ask).unwrap()));
        begun.elapsed()
    };
    report("Policy::authorize, a caller each", std::iter::repeat_with(pass).take(PASSES))
}

/// What the path of a call pays before and after the signature: the caller is
/// read from a sidecar's header, judged, and the record is handed over. Another
/// thread writes it.
fn whole() -> f64 {
    let policy = Policy::new(&settings(&|n| format!("spiffe://mesh.test/ns/shop/sa/web-{n}"), &|n| format!("{n:05}/")));
    let settings =
        AuditSettings { stdout: false, file: Some("/dev/null".into()), queue: 1_000_000, when_full: WhenFull::Refuse };
    let audit = Audit::start(&settings).unwrap();
    let now = SystemTime::now();
    let mut asked: Vec<_> = (0..GRANTS)
        .map(|n| {
            let header = format!(
                "By=spiffe://mesh.test/ns/shop/sa/fileaccess;Hash=468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688;\
                 Subject=\"CN=web,O=Shop\";URI=spiffe://mesh.test/ns/shop/sa/web-{n}"
            );
            let headers: HeaderMap =
                [(HeaderName::from_static("x-forwarded-client-cert"), header.parse().unwrap())].into_iter().collect();
            let ask = presign::Ask {
                bucket: BucketName::parse("photos").unwrap(),
                key: ObjectKey::parse(format!("{n:05}/albums/IMG.jpg")).unwrap(),
                ttl: None,
                operation: presign::Operation::Download(Download::default()),
            };
            (headers, ask)
        })
        .collect();
    asked.shuffle(&mut rand::rng());
    // A call drops what it was asked for, recorded or not: that is not counted.
    let mut permits = Vec::with_capacity(GRANTS);
    let pass = || {
        permits.clear();
        let asked = asked.clone();
        let mut headers = Vec::with_capacity(GRANTS);
        let begun = Instant::now();
        for (header, ask) in asked {
            let caller = Caller::forwarded(&header, false).unwrap();
            headers.push(header);
            let record = Asked::from(&ask);
            let permit = policy.authorize(caller.clone(), ask);
            let entry = audit.open(caller, record, now).now_or_never().unwrap().unwrap();
            entry.close(&permit);
            permits.push(permit);
        }
        let took = begun.elapsed();
        assert!(audit.flush(Duration::from_mins(1)));
        took
    };
    report("caller, grant and audit record", std::iter::repeat_with(pass).take(PASSES))
}

/// Tells what a look-up took, in ns.
fn report(what: &str, passes: impl Iterator<Item = Duration>) -> f64 {
    let mut each: Vec<_> = passes.map(|took| took.as_nanos() as f64 / GRANTS as f64).collect();
    each.sort_by(f64::total_cmp);
    let (fastest, median) = (each[0], each[each.len() / 2]);
    println!("{GRANTS} grants, {what:32} {fastest:6.0} ns each, median {median:.0} ns");
    fastest
}
