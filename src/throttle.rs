//! How much one caller may ask for, and how much all of them at once.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

use crate::caller::Caller;
use crate::error::Error;

/// How many checks pass between two looks for callers that have gone.
const TIDY_EVERY: u32 = 65_536;

/// A token bucket for each caller: so many a second, and as many at once.
pub struct Throttle {
    /// What is counted, for the error.
    what: &'static str,
    limiter: Option<RateLimiter<Caller, HashMapStateStore<Caller>, DefaultClock>>,
    checks: AtomicU32,
}

impl Throttle {
    /// `per_second` of `what` for each caller. 0: no limit.
    #[must_use]
    pub fn new(what: &'static str, per_second: u32) -> Self {
        let limiter = NonZeroU32::new(per_second).map(|n| RateLimiter::hashmap(Quota::per_second(n)));
        Self { what, limiter, checks: AtomicU32::new(0) }
    }

    /// Takes one.
    ///
    /// # Errors
    /// [`Error::RateLimited`], with the time to wait.
    pub fn take(&self, caller: &Caller) -> Result<(), Error> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        if self.checks.fetch_add(1, Ordering::Relaxed) % TIDY_EVERY == TIDY_EVERY - 1 {
            limiter.retain_recent();
        }
        limiter.check_key(caller).map_err(|until| {
            let wait = until.wait_time_from(DefaultClock::default().now());
            // Whole milliseconds, rounded up: who waits that long is let through.
            let wait = Duration::from_millis(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(1));
            Error::RateLimited { what: self.what, wait }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_caller_has_a_bucket_of_its_own() {
        let throttle = Throttle::new("calls", 3);
        let (one, two) = (Caller::user(1), Caller::user(2));
        for _ in 0..3 {
            throttle.take(&one).unwrap();
        }
        let Err(Error::RateLimited { what: "calls", wait }) = throttle.take(&one) else { panic!("no limit") };
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(335), "{wait:?}");
        throttle.take(&two).unwrap();
        let none = Throttle::new("calls", 0);
        for _ in 0..10_000 {
            none.take(&one).unwrap();
        }
    }
}
