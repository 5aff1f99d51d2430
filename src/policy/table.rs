//! Grants, compiled: which of them bear on a caller and a key is looked up, and
//! not searched for.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::grant::{Action, CallerPattern, GrantSettings, Load, PrefixTemplate, Segment, segments};
use crate::error::Violation;
use crate::object::{BucketName, Lifetime, PrefixMap};

/// All grants. A look-up goes by the caller, then by the bucket, then by the
/// prefix; only grants that have all three in common, templates apart, are
/// looked at one by one. What a look-up costs is waiting for memory, so it is
/// kept to few places.
#[derive(Debug, Default)]
pub struct Grants {
    buckets: HashMap<BucketName, u32>,
    exact: HashMap<Box<str>, Given>,
    patterns: Node,
    count: usize,
}

/// What one caller pattern is granted, by the number of the bucket.
type Given = Vec<(u32, PrefixMap<Vec<Rule>>)>;

/// A grant, with what most look-ups need of it at hand.
#[derive(Debug)]
struct Rule {
    /// One bit for each action.
    actions: u16,
    /// Its prefix, if that depends on the caller.
    template: Option<Arc<PrefixTemplate>>,
    max_ttl: Option<Lifetime>,
    grant: Box<GrantSettings>,
}

/// SPIFFE IDs by their segments.
#[derive(Debug)]
enum Node {
    /// All that is left fits one pattern, as it is written: a segment of it that
    /// ends in `*` is a stem.
    Tail(Option<Box<str>>, Given),
    /// Several patterns part here.
    Fork { here: Given, exact: HashMap<Box<str>, Node>, stems: PrefixMap<Node> },
}

impl Default for Node {
    fn default() -> Self {
        Self::Tail(None, Vec::new())
    }
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
    pub upload: Option<Load<'a>>,
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
        let mut buckets = HashMap::new();
        let mut exact: HashMap<&str, Vec<Granted>> = HashMap::new();
        let mut patterns = Vec::new();
        let mut templates = HashMap::new();
        for grant in grants {
            let next = u32::try_from(buckets.len()).unwrap_or(u32::MAX);
            let bucket = *buckets.entry(grant.bucket.clone()).or_insert(next);
            // Few templates serve many grants, and are then at hand in the caches.
            let template =
                grant.prefix.variables().next().map(|_| {
                    Arc::clone(templates.entry(&grant.prefix).or_insert_with(|| Arc::new(grant.prefix.clone())))
                });
            let granted = (bucket, grant, template);
            match &grant.caller {
                CallerPattern::Exact(caller) => exact.entry(caller).or_default().push(granted),
                CallerPattern::Segments(segments) => patterns.push((segments.as_slice(), granted)),
            }
        }
        Self {
            buckets,
            exact: exact.into_iter().map(|(caller, granted)| (caller.into(), given(&granted))).collect(),
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
        let Some(bucket) = self.buckets.get(question.bucket) else { return verdict };
        let action = bit(question.action);
        let covers = |template: Option<&PrefixTemplate>| {
            template.is_none_or(|template| template.covers(question.key, question.caller))
        };
        let mut weigh = |given: &Given| {
            let Some((_, prefixes)) = given.iter().find(|(number, _)| number == bucket) else { return };
            for Rule { actions, template, max_ttl, grant } in prefixes.covering(question.key).flatten() {
                if actions & action != 0 && covers(template.as_deref()) {
                    let lacks = question.upload.as_ref().map(|load| grant.lacks(load)).unwrap_or_default();
                    let this = if lacks.is_empty() { Verdict::Granted(*max_ttl) } else { Verdict::OverCeiling(lacks) };
                    verdict = std::mem::replace(&mut verdict, Verdict::NotGranted).or(this);
                }
            }
        };
        if let Some(given) = self.exact.get(question.caller) {
            weigh(given);
        }
        if let Some(segments) = segments(question.caller) {
            self.patterns.visit(segments, &mut weigh);
        }
        verdict
    }
}

/// A grant, the number of its bucket, and its prefix if that depends on the
/// caller.
type Granted<'a> = (u32, &'a GrantSettings, Option<Arc<PrefixTemplate>>);

impl Node {
    fn compile(patterns: Vec<(&[Segment], Granted<'_>)>) -> Self {
        let first = patterns.first().map(|(segments, _)| *segments).unwrap_or_default();
        if patterns.iter().all(|(segments, _)| *segments == first) {
            let granted: Vec<_> = patterns.into_iter().map(|(_, granted)| granted).collect();
            let tail: Vec<_> = first.iter().map(Segment::to_string).collect();
            return Self::Tail((!tail.is_empty()).then(|| tail.join("/").into()), given(&granted));
        }
        let (mut here, mut exact, mut stems) = (Vec::new(), HashMap::new(), BTreeMap::new());
        for (segments, granted) in patterns {
            match segments.split_first() {
                None => here.push(granted),
                Some((Segment::Exact(segment), rest)) => {
                    exact.entry(segment.as_str()).or_insert_with(Vec::new).push((rest, granted));
                }
                Some((Segment::Stem(stem), rest)) => {
                    stems.entry(stem.as_str()).or_insert_with(Vec::new).push((rest, granted));
                }
            }
        }
        Self::Fork {
            here: given(&here),
            exact: exact.into_iter().map(|(segment, rest)| (segment.into(), Self::compile(rest))).collect(),
            stems: stems.into_iter().map(|(stem, rest)| (stem, Self::compile(rest))).collect(),
        }
    }

    /// Shows what all patterns grant that the segments fit.
    fn visit<'a>(&self, mut segments: impl Iterator<Item = &'a str> + Clone, weigh: &mut impl FnMut(&Given)) {
        match self {
            Self::Tail(tail, given) => {
                let mut tail = tail.iter().flat_map(|tail| tail.split('/'));
                let fit = tail.all(|pattern| segments.next().is_some_and(|segment| fits(pattern, segment)));
                if fit && segments.next().is_none() {
                    weigh(given);
                }
            }
            Self::Fork { here, exact, stems } => {
                let Some(segment) = segments.next() else { return weigh(here) };
                if let Some(node) = exact.get(segment) {
                    node.visit(segments.clone(), weigh);
                }
                if !segment.is_empty() {
                    for node in stems.covering(segment) {
                        node.visit(segments.clone(), weigh);
                    }
                }
            }
        }
    }
}

fn fits(pattern: &str, segment: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == segment, |stem| !segment.is_empty() && segment.starts_with(stem))
}

fn given(granted: &[Granted<'_>]) -> Given {
    let mut sorted: BTreeMap<u32, BTreeMap<&str, Vec<Rule>>> = BTreeMap::new();
    for (bucket, grant, template) in granted {
        let rule = Rule {
            actions: grant.actions.iter().fold(0, |all, action| all | bit(*action)),
            template: template.clone(),
            max_ttl: grant.max_ttl,
            grant: Box::new((*grant).clone()),
        };
        sorted.entry(*bucket).or_default().entry(grant.prefix.stem()).or_default().push(rule);
    }
    sorted.into_iter().map(|(bucket, prefixes)| (bucket, prefixes.into_iter().collect())).collect()
}

fn bit(action: Action) -> u16 {
    1 << action as u16
}
