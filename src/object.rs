//! The nouns: buckets, keys, prefixes and lifetimes. Valid or unconstructible.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// S3's limit on a key, in bytes of UTF-8.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html>
pub const MAX_KEY_BYTES: usize = 1024;

/// A bucket's name in the settings: a lower-case label that callers use. Its
/// name in S3 is [`crate::config::BucketSettings::bucket`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BucketName(Arc<str>);

impl BucketName {
    /// Parses 1 to 63 characters of `a-z 0-9 - . _`.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(name: &str) -> Result<Self, &'static str> {
        let fits = (1..=63).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b));
        if fits { Ok(Self(name.into())) } else { Err("1 to 63 characters of a-z, 0-9, `-`, `.` and `_`") }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BucketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An object's key: opaque UTF-8, never rewritten.
///
/// INVARIANT: a URL path made of it comes through every HTTP client unchanged,
/// so that the signature holds: no `.` or `..` segment, no control character.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey(String);

impl ObjectKey {
    /// Parses a key of 1 to 1,024 bytes.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(key: impl Into<String>) -> Result<Self, &'static str> {
        let key = key.into();
        if key.is_empty() {
            return Err("not be empty");
        }
        // The SDK takes such a key for none, and does not sign it.
        if key.trim().is_empty() {
            return Err("not be white space alone");
        }
        check(&key)?;
        Ok(Self(key))
    }

    /// The key.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The beginning of keys; empty for all of a bucket. Never rewritten.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix(String);

impl Prefix {
    /// Parses a prefix of 0 to 1,024 bytes.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(prefix: impl Into<String>) -> Result<Self, &'static str> {
        let prefix = prefix.into();
        check(&prefix)?;
        Ok(Self(prefix))
    }

    /// The prefix.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `key` begins with this prefix, byte for byte.
    #[must_use]
    pub fn covers(&self, key: &str) -> bool {
        key.starts_with(&self.0)
    }
}

/// Values by prefix, looked up by the prefixes of a key.
#[derive(Clone, Debug)]
pub struct PrefixMap<T>(Vec<Slot<T>>);

#[derive(Clone, Debug)]
struct Slot<T> {
    prefix: Box<str>,
    /// The slot of the longest other prefix that this one begins with.
    shorter: Option<usize>,
    value: T,
}

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'a, T> FromIterator<(&'a str, T)> for PrefixMap<T> {
    /// Of values with the same prefix the last is kept.
    fn from_iter<I: IntoIterator<Item = (&'a str, T)>>(values: I) -> Self {
        let sorted: BTreeMap<&str, T> = values.into_iter().collect();
        let mut map = Self(Vec::with_capacity(sorted.len()));
        for (prefix, value) in sorted {
            let shorter = map.chain(map.0.len(), prefix).next().map(|(at, _)| at);
            map.0.push(Slot { prefix: prefix.into(), shorter, value });
        }
        map
    }
}

impl<T> PrefixMap<T> {
    /// The value of the longest prefix that covers `key`.
    #[must_use]
    pub fn longest(&self, key: &str) -> Option<&T> {
        self.covering(key).next()
    }

    /// The values of all prefixes that cover `key`, the longest first.
    pub fn covering(&self, key: &str) -> impl Iterator<Item = &T> {
        let end = self.0.partition_point(|slot| *slot.prefix <= *key);
        self.chain(end, key).map(|(_, slot)| &slot.value)
    }

    /// The values of all prefixes that begin with `key`.
    pub fn under(&self, key: &str) -> impl Iterator<Item = &T> {
        let from = self.0.partition_point(|slot| *slot.prefix < *key);
        self.0.iter().skip(from).take_while(move |slot| slot.prefix.starts_with(key)).map(|slot| &slot.value)
    }

    /// The slots that cover `key`, of those before `end`, none of which sorts
    /// after it.
    ///
    /// INVARIANT: whatever sorts between a prefix of `key` and `key` begins with
    /// that prefix too, so that the last slot leads to all of them.
    fn chain(&self, end: usize, key: &str) -> impl Iterator<Item = (usize, &Slot<T>)> {
        let slot = |at: usize| self.0.get(at).map(|slot| (at, slot));
        std::iter::successors(end.checked_sub(1).and_then(slot), move |(_, slot)| {
            slot.shorter.and_then(|at| self.0.get(at).map(|slot| (at, slot)))
        })
        .skip_while(move |(_, slot)| !key.starts_with(&*slot.prefix))
    }
}

/// The rule that keys and prefixes share.
fn check(key: &str) -> Result<(), &'static str> {
    if key.len() > MAX_KEY_BYTES {
        return Err("be at most 1,024 bytes of UTF-8");
    }
    if key.chars().any(char::is_control) {
        return Err("have no control character: HTTP clients rewrite or refuse it");
    }
    if key.split('/').any(|segment| segment == "." || segment == "..") {
        return Err("have no `.` or `..` segment: HTTP clients rewrite such paths, which breaks the signature");
    }
    Ok(())
}

/// How long a URL may live: 1 second to 7 days, in whole seconds.
///
/// 7 days is `SigV4`'s own limit.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-presigned-url.html>
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lifetime(u32);

impl Lifetime {
    /// 7 days.
    pub const MAX: Self = Self(7 * 24 * 60 * 60);

    /// What [`Lifetime::new`] wants.
    pub const WANT: &'static str = "be 1 second to 7 days, in whole seconds";

    /// `duration`, if it is 1 second to 7 days in whole seconds.
    #[must_use]
    pub fn new(duration: Duration) -> Option<Self> {
        let seconds = u32::try_from(duration.as_secs()).ok()?;
        (duration.subsec_nanos() == 0 && (1..=Self::MAX.0).contains(&seconds)).then_some(Self(seconds))
    }

    /// In seconds.
    #[must_use]
    pub fn seconds(self) -> u32 {
        self.0
    }
}

impl From<Lifetime> for Duration {
    fn from(lifetime: Lifetime) -> Self {
        Duration::from_secs(lifetime.0.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_that_clients_would_rewrite_are_refused() {
        for key in ["", " ", "\u{3000}", ".", "..", "a/./b", "a/..", "../a", "a\nb", "a\0", "a\u{7f}", "a\u{85}b"] {
            assert!(ObjectKey::parse(key).is_err(), "{key:?}");
        }
        assert!(ObjectKey::parse("k".repeat(1025)).is_err());
        assert!(ObjectKey::parse("é".repeat(513)).is_err());
    }

    #[test]
    fn keys_are_kept_as_they_are() {
        for key in ["a", "/a", "a//b", "a b+c%20", "...", "a/.b/c.", "héllo/🦀", "%2e%2e/x", "a\\..\\b", "a/"] {
            assert_eq!(ObjectKey::parse(key).unwrap().as_str(), key);
        }
        assert!(ObjectKey::parse("k".repeat(1024)).is_ok());
    }

    proptest! {
        #[test]
        fn the_prefixes_of_a_key_are_those_that_a_scan_finds(
            prefixes in proptest::collection::vec("[abé/]{0,5}", 0..20), key in "[abé/]{1,8}",
        ) {
            let map: PrefixMap<String> = prefixes.iter().map(|p| (p.as_str(), p.clone())).collect();
            let mut all: Vec<_> = prefixes.iter().filter(|p| key.starts_with(p.as_str())).collect();
            all.sort_by_key(|p| std::cmp::Reverse(p.len()));
            all.dedup();
            prop_assert_eq!(map.covering(&key).collect::<Vec<_>>(), all);
        }

        #[test]
        fn the_prefixes_under_a_key_are_those_that_a_scan_finds(
            prefixes in proptest::collection::btree_set("[abé/]{0,4}", 0..20), key in "[abé/]{0,3}",
        ) {
            let map: PrefixMap<String> = prefixes.iter().map(|p| (p.as_str(), p.clone())).collect();
            let all: Vec<_> = prefixes.iter().filter(|p| p.starts_with(&key)).collect();
            prop_assert_eq!(map.under(&key).collect::<Vec<_>>(), all);
        }
    }

    #[test]
    fn a_lifetime_is_whole_seconds_up_to_a_week() {
        assert_eq!(Lifetime::new(Duration::from_secs(1)).unwrap().seconds(), 1);
        assert_eq!(Lifetime::new(Duration::from_hours(168)), Some(Lifetime::MAX));
        for wrong in [Duration::ZERO, Duration::from_millis(1500), Duration::from_secs(604_801), Duration::MAX] {
            assert_eq!(Lifetime::new(wrong), None);
        }
    }
}
