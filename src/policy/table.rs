//! Grants, compiled: which of them bear on a caller and a key is looked up, and
//! not searched for.

use std::collections::{BTreeMap, HashMap};

use super::grant::{Action, CallerPattern, GrantSettings, Segment, segments};
use crate::error::Violation;
use crate::object::{BucketName, Lifetime, PrefixMap};
use crate::ops::upload::Upload;

/// All grants. A look-up goes by the caller, then by the bucket, then by the
/// prefix; only grants that have all three in common, templates apart, are
/// looked at one by one.
#[derive(Debug, Default)]
pub struct Grants {
    exact: HashMap<Box<str>, Buckets>,
    patterns: Node,
    count: usize,
}

/// What one caller pattern is granted.
type Buckets = HashMap<BucketName, PrefixMap<Vec<GrantSettings>>>;

/// SPIFFE IDs by their segments.
#[derive(Debug, Default)]
struct Node {
    /// For those that end here.
    here: Buckets,
    exact: HashMap<Box<str>, Node>,
    stems: PrefixMap<Node>,
}

/// What is looked up: may this caller do this, to what begins with this?
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The caller's identity.
    pub caller: &'a str,
    /// What it wants to do.
    pub action: Action,
    /// The bucket.
    pub bucket: &'a BucketName,
    /// A key, or a prefix that is wanted whole.
    pub key: &'a str,
    /// What is to be uploaded, for the ceilings.
    pub upload: Option<&'a Upload>,
}

/// What the grants say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A grant allows it. A URL may live this long. `None`: as long as any.
    Granted(Option<Lifetime>),
    /// A grant would allow it, if it were not for these.
    OverCeiling(Vec<Violation>),
    /// No grant has to do with it.
    NotGranted,
}

impl Verdict {
    /// The more favourable of two.
    fn or(self, other: Self) -> Self {
        match (&self, &other) {
            // No limit is the longest.
            (Self::Granted(one), Self::Granted(two)) => Self::Granted(one.zip(*two).map(|(one, two)| one.max(two))),
            (Self::Granted(_), _) | (_, Self::NotGranted) => self,
            // The one that lacks least is the easiest to put right.
            (Self::OverCeiling(one), Self::OverCeiling(two)) if one.len() <= two.len() => self,
            _ => other,
        }
    }
}

impl Grants {
    /// Compiles them.
    #[must_use]
    pub fn compile(grants: &[GrantSettings]) -> Self {
        let mut exact: HashMap<&str, Vec<&GrantSettings>> = HashMap::new();
        let mut patterns = Vec::new();
        for grant in grants {
            match &grant.caller {
                CallerPattern::Exact(caller) => exact.entry(caller).or_default().push(grant),
                CallerPattern::Segments(segments) => patterns.push((segments.as_slice(), grant)),
            }
        }
        Self {
            exact: exact.into_iter().map(|(caller, grants)| (caller.into(), buckets(grants))).collect(),
            patterns: Node::compile(patterns),
            count: grants.len(),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// What they say.
    #[must_use]
    pub fn judge(&self, question: &Question<'_>) -> Verdict {
        let mut verdict = Verdict::NotGranted;
        let mut weigh = |buckets: &Buckets| {
            let Some(prefixes) = buckets.get(question.bucket) else { return };
            for grant in prefixes.covering(question.key).flatten() {
                if grant.actions.contains(&question.action) && grant.prefix.covers(question.key, question.caller) {
                    let lacks = question.upload.map(|upload| grant.lacks(upload)).unwrap_or_default();
                    let this =
                        if lacks.is_empty() { Verdict::Granted(grant.max_ttl) } else { Verdict::OverCeiling(lacks) };
                    verdict = std::mem::replace(&mut verdict, Verdict::NotGranted).or(this);
                }
            }
        };
        if let Some(buckets) = self.exact.get(question.caller) {
            weigh(buckets);
        }
        if let Some(segments) = segments(question.caller) {
            self.patterns.visit(segments, &mut weigh);
        }
        verdict
    }
}

impl Node {
    fn compile(patterns: Vec<(&[Segment], &GrantSettings)>) -> Self {
        let (mut here, mut exact, mut stems) = (Vec::new(), HashMap::new(), BTreeMap::new());
        for (segments, grant) in patterns {
            match segments.split_first() {
                None => here.push(grant),
                Some((Segment::Exact(segment), rest)) => {
                    exact.entry(segment.as_str()).or_insert_with(Vec::new).push((rest, grant));
                }
                Some((Segment::Stem(stem), rest)) => {
                    stems.entry(stem.as_str()).or_insert_with(Vec::new).push((rest, grant));
                }
            }
        }
        Self {
            here: buckets(here),
            exact: exact.into_iter().map(|(segment, rest)| (segment.into(), Self::compile(rest))).collect(),
            stems: stems.into_iter().map(|(stem, rest)| (stem, Self::compile(rest))).collect(),
        }
    }

    /// Shows what all patterns grant that the segments fit.
    fn visit<'a>(&self, mut segments: impl Iterator<Item = &'a str> + Clone, weigh: &mut impl FnMut(&Buckets)) {
        let Some(segment) = segments.next() else { return weigh(&self.here) };
        if let Some(node) = self.exact.get(segment) {
            node.visit(segments.clone(), weigh);
        }
        if !segment.is_empty() {
            for node in self.stems.covering(segment) {
                node.visit(segments.clone(), weigh);
            }
        }
    }
}

fn buckets(grants: Vec<&GrantSettings>) -> Buckets {
    let mut sorted: HashMap<BucketName, BTreeMap<&str, Vec<GrantSettings>>> = HashMap::new();
    for grant in grants {
        let prefixes = sorted.entry(grant.bucket.clone()).or_default();
        prefixes.entry(grant.prefix.stem()).or_default().push(grant.clone());
    }
    sorted.into_iter().map(|(bucket, prefixes)| (bucket, prefixes.into_iter().collect())).collect()
}
