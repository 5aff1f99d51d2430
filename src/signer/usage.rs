//! What a key has signed that is still out, by caller: the blast radius of its
//! revocation, as far as this replica has caused it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::caller::Caller;

/// How many callers are told apart. Further ones are counted together.
const MAX_CALLERS: usize = 256;

/// The URLs that one key has signed on this replica.
#[derive(Debug, Default)]
pub struct Usage(Mutex<HashMap<Option<Caller>, Out>>);

/// The URLs of one caller: how many end by each minute.
///
/// The further off an end, the coarser it is counted, so that a caller has some
/// 330 counts at the most.
#[derive(Debug, Default)]
struct Out {
    ends: BTreeMap<u64, u64>,
    latest: u64,
}

/// URLs that are out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlsOut {
    /// Who asked for them. `None`: callers past the first 256.
    pub caller: Option<Caller>,
    /// How many, or up to a quarter more: ends are rounded up.
    pub urls: u64,
    /// When the last of them ends.
    pub latest_expiry: SystemTime,
}

impl Usage {
    /// A URL that ends at `end` was given to `caller` at `now`.
    pub fn record(&self, caller: &Caller, end: SystemTime, now: SystemTime) {
        let (end, now) = (seconds(end), seconds(now));
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Two look-ups only for a caller that is new.
        let known = Some(caller.clone());
        let caller = if all.len() < MAX_CALLERS || all.contains_key(&known) { known } else { None };
        let out = all.entry(caller).or_default();
        out.latest = out.latest.max(end);
        *out.ends.entry(rounded_up(end, now)).or_default() += 1;
        while out.ends.first_key_value().is_some_and(|(first, _)| *first <= now) {
            out.ends.pop_first();
        }
    }

    /// What is out at `now`, by caller; who has most comes first.
    #[must_use]
    pub fn out(&self, now: SystemTime) -> Vec<UrlsOut> {
        let now = seconds(now);
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<_> = all
            .iter()
            .map(|(caller, out)| UrlsOut {
                caller: caller.clone(),
                urls: out.ends.range(now + 1..).map(|(_, urls)| urls).sum(),
                latest_expiry: SystemTime::UNIX_EPOCH + Duration::from_secs(out.latest),
            })
            .filter(|out| out.urls > 0)
            .collect();
        found.sort_by(|a, b| b.urls.cmp(&a.urls).then_with(|| name(a).cmp(&name(b))));
        found
    }
}

fn name(out: &UrlsOut) -> Option<&str> {
    out.caller.as_ref().map(Caller::as_str)
}

/// `end`, counted as the end of a minute, quarter of an hour, or hour.
fn rounded_up(end: u64, now: u64) -> u64 {
    let step = match end.saturating_sub(now) {
        0..=3_600 => 60,
        3_601..=86_400 => 900,
        _ => 3_600,
    };
    end.div_ceil(step) * step
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000 + seconds)
    }

    #[test]
    fn urls_are_out_by_caller_until_they_end() {
        let (usage, one, two) = (Usage::default(), Caller::user(1), Caller::user(2));
        usage.record(&one, at(100), at(0));
        usage.record(&one, at(7_000), at(0));
        for _ in 0..3 {
            usage.record(&two, at(300), at(0));
        }
        let out = |now| usage.out(at(now)).into_iter().map(|o| (o.caller, o.urls, o.latest_expiry)).collect::<Vec<_>>();
        assert_eq!(out(0), [(Some(two.clone()), 3, at(300)), (Some(one.clone()), 2, at(7_000))]);
        // Counted to the end of its minute, and no longer.
        assert_eq!(out(99)[1].1, 2);
        assert_eq!(out(160), [(Some(two), 3, at(300)), (Some(one.clone()), 1, at(7_000))]);
        assert_eq!(out(400), [(Some(one), 1, at(7_000))]);
        assert_eq!(out(8_000), []);
    }

    #[test]
    fn memory_is_bounded_whoever_calls_and_however_long_urls_live() {
        let usage = Usage::default();
        for caller in 0..1_000 {
            usage.record(&Caller::user(caller), at(60), at(0));
        }
        let out = usage.out(at(0));
        assert_eq!(out.len(), MAX_CALLERS + 1);
        assert_eq!((out[0].caller.as_ref(), out[0].urls), (None, 1_000 - MAX_CALLERS as u64));
        let one = Caller::user(1);
        for second in 0..604_800 {
            usage.record(&one, at(second), at(0));
        }
        let all = usage.0.lock().unwrap();
        assert!(all[&Some(one)].ends.len() < 330, "{}", all[&Some(Caller::user(1))].ends.len());
    }
}
