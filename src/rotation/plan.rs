//! What to do next, from what can be seen: a pure function.
//!
//! There is no step counter to lose. Whoever looks next, on any replica, after
//! any crash, goes on from what is there. Each step is idempotent.

use std::time::{Duration, SystemTime};

use crate::issuer::{KeyFacts, Status};

/// A version in the vault, and the key that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The version's id.
    pub version: String,
    /// The access key id.
    pub key: String,
}

/// What IAM, the vault and S3 show, and what this driver has seen by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The access keys of the signer's user.
    pub keys: Vec<KeyFacts>,
    /// The vault's AWSCURRENT.
    pub current: Option<Label>,
    /// The vault's AWSPENDING.
    pub pending: Option<Label>,
    /// The vault's AWSPREVIOUS.
    pub previous: Option<Label>,
    /// S3 has accepted a URL that was signed with the pending key.
    pub accepted: bool,
    /// S3 has refused a URL that was signed with the outgoing key, after it
    /// was deactivated.
    pub refused: bool,
    /// AWSCURRENT has been where it is for a lease, as far as this driver has
    /// seen: no replica signs with an earlier key any more.
    pub settled: bool,
}

/// What a rotation is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Leave nothing half done.
    Finish,
    /// End all URLs that this key has signed.
    Replace {
        /// The access key id.
        key: String,
        /// Deactivate it first, before there is another.
        immediate: bool,
    },
}

/// One step. What it waits for is looked at again after a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make a key, and store it as AWSPENDING.
    Create,
    /// Sign a URL with the pending key, and see whether S3 accepts it.
    Probe,
    /// Move AWSCURRENT.
    Promote {
        /// The version that has it, if any has.
        from: Option<String>,
        /// The version that gets it.
        to: String,
    },
    /// Wait until [`Observed::settled`].
    AwaitLease,
    /// Have S3 honour this key no more.
    Deactivate(String),
    /// Sign a URL with this key, and see whether S3 refuses it.
    Canary(String),
    /// Delete this key, which S3 has been seen to refuse, or that was never in use.
    Delete(String),
    /// Take AWSPENDING from this version, whose key is of no use.
    Unstage(String),
    /// A key that nobody's vault knows is being stored this moment, or lost.
    AwaitOrphan,
    /// Both places are taken by keys that are not ours to delete.
    Blocked(Vec<String>),
    /// There is nothing to do.
    Done,
}

/// The next step towards `goal`.
///
/// A key that the vault does not know is an orphan once it is older than
/// `orphan_age`: its secret was lost with a crash.
#[must_use]
pub fn plan(seen: &Observed, goal: &Goal, now: SystemTime, orphan_age: Duration) -> Step {
    let status = |id: &str| seen.keys.iter().find(|key| key.id == id).map(|key| key.status);
    let is = |label: &Option<Label>, id: &str| label.as_ref().is_some_and(|label| label.key == id);
    let known = |id: &str| is(&seen.current, id) || is(&seen.pending, id) || is(&seen.previous, id);

    if let Goal::Replace { key, immediate: true } = goal
        && status(key) == Some(Status::Active)
        && known(key)
    {
        return Step::Deactivate(key.clone());
    }

    // A new key on its way.
    if let Some(Label { version, key }) = &seen.pending
        && !is(&seen.current, key)
    {
        return match status(key) {
            Some(Status::Active) if seen.accepted => Step::Promote {
                from: seen.current.as_ref().map(|current| current.version.clone()),
                to: version.clone(),
            },
            Some(Status::Active) => Step::Probe,
            // Somebody deactivated it before it was ever in use.
            Some(Status::Inactive) => Step::Delete(key.clone()),
            None => Step::Unstage(version.clone()),
        };
    }

    // An old key on its way out.
    if let Some(Label { key, .. }) = &seen.previous
        && !is(&seen.current, key)
        && let Some(status) = status(key)
    {
        return match status {
            Status::Active if !seen.settled => Step::AwaitLease,
            Status::Active => Step::Deactivate(key.clone()),
            Status::Inactive if !seen.refused => Step::Canary(key.clone()),
            Status::Inactive => Step::Delete(key.clone()),
        };
    }

    // Keys that the vault does not know.
    let unknown: Vec<&KeyFacts> = seen.keys.iter().filter(|key| !known(&key.id)).collect();
    let current = seen.current.as_ref().and_then(|current| status(&current.key));
    let wanted = match goal {
        Goal::Finish => current != Some(Status::Active),
        Goal::Replace { key, .. } => current != Some(Status::Active) || is(&seen.current, key),
    };
    if unknown.len() > 1 {
        // No vault has ever named a key of this user: it may be somebody else's.
        return Step::Blocked(unknown.into_iter().map(|key| key.id.clone()).collect());
    }
    if let Some(orphan) = unknown.first() {
        let age = now.duration_since(orphan.created).unwrap_or_default();
        if age >= orphan_age && seen.current.is_some() {
            return Step::Delete(orphan.id.clone());
        }
        if wanted && seen.keys.len() > 1 {
            return Step::AwaitOrphan;
        }
    }
    if wanted { Step::Create } else { Step::Done }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const ORPHAN_AGE: u64 = 50;
    const LEASE: u64 = 15;

    /// IAM, the vault, S3 and the replicas, with a clock of whole seconds.
    #[derive(Clone, Debug, Default)]
    struct World {
        now: u64,
        keys: Vec<KeyFacts>,
        current: Option<Label>,
        pending: Option<Label>,
        previous: Option<Label>,
        made: usize,
        /// When a key was last AWSCURRENT: replicas may sign with it until a lease later.
        was_current: BTreeMap<String, u64>,
        probed: Vec<String>,
        refused: Vec<String>,
    }

    /// What a driver remembers, and what it is in the middle of.
    #[derive(Clone, Debug, Default)]
    struct Mind {
        accepted: Option<String>,
        refused: Option<String>,
        current: Option<(Option<Label>, u64)>,
        /// A key that was made and is not stored yet.
        holding: Option<String>,
        version: usize,
    }

    impl World {
        fn at(seconds: u64) -> SystemTime {
            SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
        }

        fn status(&mut self, id: &str) -> Option<&mut KeyFacts> {
            self.keys.iter_mut().find(|key| key.id == id)
        }

        fn seen(&self, mind: &mut Mind) -> Observed {
            let since = match &mind.current {
                Some((label, since)) if *label == self.current => *since,
                _ => self.now,
            };
            mind.current = Some((self.current.clone(), since));
            Observed {
                keys: self.keys.clone(),
                current: self.current.clone(),
                pending: self.pending.clone(),
                previous: self.previous.clone(),
                accepted: self.pending.is_some() && self.pending.as_ref().map(|p| &p.key) == mind.accepted.as_ref(),
                refused: self.previous.is_some() && self.previous.as_ref().map(|p| &p.key) == mind.refused.as_ref(),
                settled: self.now - since > LEASE,
            }
        }

        /// Carries out one step of one driver. Checks what must never happen.
        fn step(&mut self, mind: &mut Mind, goal: &Goal) -> Result<Step, TestCaseError> {
            self.now += 1;
            if let Some(current) = &self.current {
                self.was_current.insert(current.key.clone(), self.now);
            }
            if let Some(key) = mind.holding.take() {
                // The second half of Create.
                self.pending = Some(Label { version: format!("v{}-{key}", mind.version), key });
                return Ok(Step::Create);
            }
            let seen = self.seen(mind);
            let step = plan(&seen, goal, Self::at(self.now), Duration::from_secs(ORPHAN_AGE));
            match &step {
                Step::Create => {
                    if self.keys.len() < 2 {
                        self.made += 1;
                        let id = format!("K{}", self.made);
                        self.keys.push(KeyFacts {
                            id: id.clone(),
                            status: Status::Active,
                            created: Self::at(self.now),
                        });
                        mind.holding = Some(id);
                    }
                }
                Step::Probe => {
                    let key = self.pending.clone().map(|p| p.key).unwrap_or_default();
                    self.probed.push(key.clone());
                    mind.accepted = Some(key);
                }
                Step::Promote { from, to } => {
                    let at = self.current.as_ref().map(|c| c.version.clone());
                    if at == *from && self.pending.as_ref().is_some_and(|p| p.version == *to) {
                        let new = self.pending.take();
                        prop_assert!(new.as_ref().is_some_and(|n| self.probed.contains(&n.key)), "promoted unprobed");
                        self.previous = std::mem::replace(&mut self.current, new);
                    }
                }
                Step::Deactivate(key) => {
                    let planned = !matches!(goal, Goal::Replace { immediate: true, .. });
                    if planned {
                        prop_assert!(
                            self.current.as_ref().is_none_or(|c| c.key != *key),
                            "deactivated the current key"
                        );
                        let last = self.was_current.get(key).copied().unwrap_or_default();
                        prop_assert!(self.now - last >= LEASE, "deactivated within its lease");
                    }
                    if let Some(facts) = self.status(key) {
                        facts.status = Status::Inactive;
                    }
                }
                Step::Canary(key) => {
                    prop_assert_eq!(self.status(key).map(|k| k.status), Some(Status::Inactive));
                    self.refused.push(key.clone());
                    mind.refused = Some(key.clone());
                }
                Step::Delete(key) => {
                    prop_assert!(self.current.as_ref().is_none_or(|c| c.key != *key), "deleted the current key");
                    if self.was_current.contains_key(key) {
                        prop_assert!(self.refused.contains(key), "deleted without proof");
                    }
                    self.keys.retain(|k| k.id != *key);
                }
                Step::Unstage(version) => {
                    if self.pending.as_ref().is_some_and(|p| p.version == *version) {
                        self.pending = None;
                    }
                }
                Step::AwaitLease | Step::AwaitOrphan | Step::Blocked(_) | Step::Done => {}
            }
            prop_assert!(self.keys.len() <= 2, "a third key");
            Ok(step)
        }
    }

    proptest! {
        #[test]
        fn it_ends_well_whatever_happens_in_between(
            urgent in any::<bool>(),
            // Which driver moves, and whether it crashes (and forgets) after that.
            moves in proptest::collection::vec((0..2_usize, 0..6_u8), 0..120),
        ) {
            let mut world = World::default();
            let mut founder = Mind::default();
            for _ in 0..20 {
                world.step(&mut founder, &Goal::Finish)?;
            }
            let old = world.current.clone().expect("a first key").key;
            let goal = Goal::Replace { key: old.clone(), immediate: urgent };
            let mut minds = [Mind { version: 1, ..Mind::default() }, Mind { version: 2, ..Mind::default() }];
            for (who, fate) in moves {
                // The second driver came to clean up, and knows of no goal.
                let goal = if who == 0 { &goal } else { &Goal::Finish };
                world.step(&mut minds[who], goal)?;
                if fate == 0 {
                    minds[who] = Mind { version: minds[who].version + 2, ..Mind::default() };
                }
            }
            // Then one goes on alone, and comes to an end.
            minds[1] = Mind::default();
            let mut last = Step::Create;
            for _ in 0..200 {
                last = world.step(&mut minds[0], &goal)?;
                if last == Step::Done {
                    break;
                }
            }
            prop_assert_eq!(last, Step::Done);
            for _ in 0..100 {
                world.step(&mut minds[0], &Goal::Finish)?;
            }
            let current = world.current.clone().expect("a current key");
            prop_assert_ne!(&current.key, &old);
            let left: Vec<_> = world.keys.iter().map(|k| (&k.id, k.status)).collect();
            prop_assert_eq!(left, [(&current.key, Status::Active)]);
            prop_assert!(world.refused.contains(&old));
        }
    }

    #[test]
    fn keys_of_somebody_else_are_named_and_left_alone() {
        let key = |id: &str| KeyFacts { id: id.into(), status: Status::Active, created: World::at(0) };
        let seen = Observed { keys: vec![key("A"), key("B")], ..Observed::default() };
        let step = plan(&seen, &Goal::Finish, World::at(1_000_000), Duration::from_secs(1));
        assert_eq!(step, Step::Blocked(vec!["A".into(), "B".into()]));
    }
}
