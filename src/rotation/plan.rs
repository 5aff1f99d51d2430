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

    let immediate = matches!(goal, Goal::Replace { immediate: true, .. });
    if let Goal::Replace { key, .. } = goal
        && immediate
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
            // What is urgent ends the URLs of an earlier rotation's key as well.
            Status::Active if !seen.settled && !immediate => Step::AwaitLease,
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
        if wanted && age < orphan_age {
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
        /// When a key was last AWSCURRENT and active: replicas may sign with it until a lease later.
        was_current: BTreeMap<String, u64>,
        probed: Vec<String>,
        refused: Vec<String>,
        /// Keys that were gone before they were AWSCURRENT: of them there is nothing to prove.
        stillborn: Vec<String>,
        /// Keys that a driver has made and is about to store.
        in_hand: Vec<String>,
    }

    /// What a driver remembers, and what it is in the middle of.
    #[derive(Clone, Debug, Default)]
    struct Mind {
        accepted: Option<String>,
        refused: Option<String>,
        current: Option<(Option<Label>, u64)>,
        /// What it has seen and not acted on yet.
        seen: Option<Observed>,
        /// A key that was made and is not stored yet.
        holding: Option<String>,
        version: usize,
    }

    /// Which driver moves, and what becomes of it: see [`World::play`].
    type Move = (usize, u8);

    fn moves(most: usize) -> impl Strategy<Value = Vec<Move>> {
        proptest::collection::vec((0..2_usize, 0..16_u8), 0..most)
    }

    impl World {
        fn at(seconds: u64) -> SystemTime {
            SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
        }

        fn make(&mut self) -> String {
            self.made += 1;
            let id = format!("K{}", self.made);
            self.keys.push(KeyFacts { id: id.clone(), status: Status::Active, created: Self::at(self.now) });
            id
        }

        fn status(&mut self, id: &str) -> Option<&mut KeyFacts> {
            self.keys.iter_mut().find(|key| key.id == id)
        }

        fn is_active(&self, id: &str) -> bool {
            self.keys.iter().any(|key| key.id == id && key.status == Status::Active)
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

        fn tick(&mut self) {
            self.now += 1;
            if let Some(Label { key, .. }) = self.current.clone()
                && self.is_active(&key)
            {
                self.was_current.insert(key, self.now);
            }
        }

        /// Carries out one step of one driver. Checks what must never happen.
        fn step(&mut self, mind: &mut Mind, goal: &Goal) -> Result<Step, TestCaseError> {
            self.tick();
            if let Some(key) = mind.holding.take() {
                // The second half of Create.
                self.in_hand.retain(|k| *k != key);
                self.pending = Some(Label { version: format!("v{}-{key}", mind.version), key });
                return Ok(Step::Create);
            }
            let seen = mind.seen.take().unwrap_or_else(|| self.seen(mind));
            let step = plan(&seen, goal, Self::at(self.now), Duration::from_secs(ORPHAN_AGE));
            let immediate = matches!(goal, Goal::Replace { immediate: true, .. });
            let labels = [&seen.current, &seen.pending, &seen.previous];
            let known = |id: &String| labels.iter().any(|l| l.as_ref().is_some_and(|l| l.key == *id));
            if let Goal::Replace { key, immediate: true } = goal
                && matches!(step, Step::Create | Step::Probe | Step::Promote { .. })
            {
                let alive = seen.keys.iter().any(|k| k.id == *key && k.status == Status::Active);
                prop_assert!(!alive, "the old key is not dead first");
            }
            match &step {
                Step::Create => {
                    prop_assert!(seen.keys.len() < 2, "asked for a key where there is no room");
                    let young = Self::at(self.now.saturating_sub(ORPHAN_AGE));
                    let stored = seen.keys.iter().all(|key| known(&key.id) || key.created <= young);
                    prop_assert!(stored, "made a key beside one that is being stored");
                    // Else IAM refuses: somebody was quicker.
                    if self.keys.len() < 2 {
                        let id = self.make();
                        self.in_hand.push(id.clone());
                        mind.holding = Some(id);
                    }
                }
                Step::Probe => {
                    let key = self.pending.clone().map(|p| p.key).unwrap_or_default();
                    if self.is_active(&key) {
                        self.probed.push(key.clone());
                        mind.accepted = Some(key);
                    }
                }
                Step::Promote { from, to } => {
                    let at = self.current.as_ref().map(|c| c.version.clone());
                    if at == *from && self.pending.as_ref().is_some_and(|p| p.version == *to) {
                        let new = self.pending.take();
                        let gone = new.iter().filter(|new| self.keys.iter().all(|key| key.id != new.key));
                        self.stillborn.extend(gone.map(|new| new.key.clone()));
                        prop_assert!(new.as_ref().is_some_and(|n| self.probed.contains(&n.key)), "promoted unprobed");
                        self.previous = std::mem::replace(&mut self.current, new);
                    }
                }
                Step::Deactivate(key) => {
                    if !immediate {
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
                    prop_assert!(!self.is_active(key), "expects S3 to refuse what is active");
                    self.refused.push(key.clone());
                    mind.refused = Some(key.clone());
                }
                Step::Delete(key) => {
                    let current = self.current.as_ref().is_some_and(|current| current.key == *key);
                    prop_assert!(!current || !self.is_active(key), "deleted the current key");
                    if self.was_current.contains_key(key) {
                        prop_assert!(self.refused.contains(key), "deleted without proof");
                    }
                    prop_assert!(!self.in_hand.contains(key), "deleted while it was being stored");
                    prop_assert!(seen.current.is_some() || known(key), "deleted what may be somebody else's");
                    self.keys.retain(|k| k.id != *key);
                }
                Step::Unstage(version) => {
                    if self.pending.as_ref().is_some_and(|p| p.version == *version) {
                        self.pending = None;
                    }
                }
                Step::AwaitLease => prop_assert!(!immediate, "what is urgent waits"),
                Step::Done => {
                    let current = seen.current.as_ref().and_then(|c| seen.keys.iter().find(|key| key.id == c.key));
                    prop_assert_eq!(current.map(|key| key.status), Some(Status::Active));
                }
                Step::AwaitOrphan | Step::Blocked(_) => {}
            }
            prop_assert!(self.keys.len() <= 2, "a third key");
            Ok(step)
        }

        /// Two drivers move in turns, the second of which only cleans up. One may
        /// crash after its move, and forget, or act late on what it has seen; or
        /// somebody spoils the pending key.
        fn play(&mut self, minds: &mut [Mind; 2], moves: &[Move], goal: &Goal) -> Result<(), TestCaseError> {
            for (who, fate) in moves {
                let mind = &mut minds[*who];
                if *fate == 1 && mind.holding.is_none() {
                    self.tick();
                    mind.seen = Some(self.seen(mind));
                    continue;
                }
                self.step(mind, if *who == 0 { goal } else { &Goal::Finish })?;
                let pending = self.pending.as_ref().map(|p| p.key.clone()).unwrap_or_default();
                match *fate {
                    0 => self.crash(mind),
                    2 => self.status(&pending).into_iter().for_each(|key| key.status = Status::Inactive),
                    3 => self.keys.retain(|key| key.id != pending),
                    _ => {}
                }
            }
            Ok(())
        }

        fn crash(&mut self, mind: &mut Mind) {
            self.in_hand.retain(|key| mind.holding.as_ref() != Some(key));
            *mind = Mind { version: mind.version + 2, ..Mind::default() };
        }

        /// One driver goes on alone, and comes to an end; then it cleans up.
        fn end(&mut self, minds: &mut [Mind; 2], goal: &Goal) -> Result<Step, TestCaseError> {
            self.crash(&mut minds[1]);
            let mut last = Step::Create;
            for goal in [goal, &Goal::Finish] {
                for _ in 0..200 {
                    last = self.step(&mut minds[0], goal)?;
                }
            }
            Ok(last)
        }

        /// What a rotation leaves: one key, and it is the current one.
        fn is_clean(&self) -> Result<String, TestCaseError> {
            let current = self.current.clone().expect("a current key");
            let left: Vec<_> = self.keys.iter().map(|k| (&k.id, k.status)).collect();
            prop_assert_eq!(left, [(&current.key, Status::Active)]);
            prop_assert!(self.pending.is_none());
            Ok(current.key)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn it_ends_well_whatever_happens_in_between(
            // A key that was there before us.
            theirs in any::<bool>(),
            urgent in any::<(bool, bool)>(),
            boot in moves(20),
            first in moves(120),
            second in moves(60),
        ) {
            let mut world = World { now: 1, ..World::default() };
            let mut minds = [Mind { version: 1, ..Mind::default() }, Mind { version: 2, ..Mind::default() }];
            if theirs {
                world.make();
                world.now += ORPHAN_AGE;
            }
            world.play(&mut minds, &boot, &Goal::Finish)?;
            if let Step::Blocked(keys) = world.end(&mut minds, &Goal::Finish)? {
                // Keys that no vault has ever named, and whose they are nobody knows.
                prop_assert!(keys.len() == 2 && world.current.is_none());
                return Ok(());
            }
            let old = world.is_clean()?;

            // A rotation, and another one of the key that signs by then.
            let goal = Goal::Replace { key: old.clone(), immediate: urgent.0 };
            world.play(&mut minds, &first, &goal)?;
            let newer = world.current.clone().expect("a current key").key;
            let goal = Goal::Replace { key: newer.clone(), immediate: urgent.1 };
            world.play(&mut minds, &second, &goal)?;
            prop_assert_eq!(world.end(&mut minds, &goal)?, Step::Done);
            let current = world.is_clean()?;
            prop_assert!(current != old && current != newer);
            prop_assert!(world.refused.contains(&old));
            prop_assert!(world.refused.contains(&newer) || world.stillborn.contains(&newer));
        }
    }

    #[test]
    fn a_key_that_no_vault_knows_is_waited_for_and_then_deleted() {
        let key = |id: &str| KeyFacts { id: id.into(), status: Status::Active, created: World::at(1000) };
        let current = Some(Label { version: "v".into(), key: "A".into() });
        let (ours, both) = (vec![key("B")], vec![key("A"), key("B")]);
        let replace = Goal::Replace { key: "A".into(), immediate: false };
        let step = |keys: &Vec<KeyFacts>, current: &Option<Label>, goal: &Goal, now| {
            let seen = Observed { keys: keys.clone(), current: current.clone(), ..Observed::default() };
            plan(&seen, goal, World::at(now), Duration::from_secs(ORPHAN_AGE))
        };
        let (young, old) = (999 + ORPHAN_AGE, 1000 + ORPHAN_AGE);
        assert_eq!(step(&both, &current, &replace, young), Step::AwaitOrphan);
        assert_eq!(step(&both, &current, &Goal::Finish, young), Step::Done);
        assert_eq!(step(&both, &current, &replace, old), Step::Delete("B".into()));
        assert_eq!(step(&both, &current, &Goal::Finish, old), Step::Delete("B".into()));
        // Before there is a key of ours, it may be somebody else's.
        assert_eq!(step(&ours, &None, &Goal::Finish, young), Step::AwaitOrphan);
        assert_eq!(step(&ours, &None, &Goal::Finish, old), Step::Create);
    }

    #[test]
    fn keys_of_somebody_else_are_named_and_left_alone() {
        let key = |id: &str| KeyFacts { id: id.into(), status: Status::Active, created: World::at(0) };
        let seen = Observed { keys: vec![key("A"), key("B")], ..Observed::default() };
        let step = plan(&seen, &Goal::Finish, World::at(1_000_000), Duration::from_secs(1));
        assert_eq!(step, Step::Blocked(vec!["A".into(), "B".into()]));
    }
}
