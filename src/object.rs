//! The nouns: buckets, keys, prefixes and lifetimes. Valid or unconstructible.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound::{Included, Unbounded};
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

impl Borrow<str> for Prefix {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Values by prefix, looked up by the longest prefix of a key.
#[derive(Clone, Debug)]
pub struct PrefixMap<T>(BTreeMap<Prefix, T>);

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> PrefixMap<T> {
    /// Sets the value of `prefix`.
    pub fn insert(&mut self, prefix: Prefix, value: T) {
        self.0.insert(prefix, value);
    }

    /// The value of the longest prefix that covers `key`.
    #[must_use]
    pub fn longest(&self, key: &str) -> Option<&T> {
        let mut probe = key;
        loop {
            let (prefix, value) = self.0.range::<str, _>((Unbounded, Included(probe))).next_back()?;
            if prefix.covers(key) {
                return Some(value);
            }
            // `prefix` sorts before `probe` and parts from it here, so that every prefix
            // that covers the key and is longer than this would sort after `prefix`.
            let common = probe
                .char_indices()
                .zip(prefix.as_str().chars())
                .find_map(|((at, a), b)| (a != b).then_some(at))
                .unwrap_or(prefix.as_str().len().min(probe.len()));
            probe = &probe[..common];
        }
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
        fn the_longest_prefix_is_the_one_that_a_scan_finds(
            prefixes in proptest::collection::vec("[abé/]{0,5}", 0..20), key in "[abé/]{1,8}",
        ) {
            let mut map = PrefixMap::default();
            for prefix in &prefixes {
                map.insert(Prefix::parse(prefix.as_str()).unwrap(), prefix.clone());
            }
            let scan = prefixes.iter().filter(|p| key.starts_with(p.as_str())).max_by_key(|p| p.len());
            prop_assert_eq!(map.longest(&key), scan);
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
