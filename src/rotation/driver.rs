//! Carries out [`plan`]: one step, look again, and repeat.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use tokio::sync::watch;

use super::plan::{Goal, Label, Observed, Step, plan};
use super::probe::{Probe, Verdict};
use crate::error::Error;
use crate::issuer::{IssuerError, KeyFacts, KeyIssuer, Status};
use crate::vault::{Held, Vault, VaultError, Version};

/// How many refusals in a row are proof. S3 has many hosts, and IAM is
/// eventually consistent.
pub(super) const REFUSALS: u32 = 3;

/// How a rotation is paced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// How long a replica may sign after its last good read of the vault.
    pub lease: Duration,
    /// How old a key is that no vault knows, for it to be an orphan.
    pub orphan_age: Duration,
    /// How soon a step that waits is looked at again.
    pub poll: Duration,
}

/// What was done, and when it was seen to be so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// What was done: `created`, `accepted`, `promoted`, `deactivated`,
    /// `refused`, `deleted`.
    pub step: &'static str,
    /// The access key id it was done to.
    pub key: String,
    /// When.
    pub at: SystemTime,
}

/// A rotation that has come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignerRotation {
    /// The key that signs no more.
    pub old_key: String,
    /// The key that signs now.
    pub new_key: String,
    /// When S3 had been seen to refuse the old key.
    pub confirmed_at: SystemTime,
    /// The steps that this replica has carried out.
    pub steps: Vec<Done>,
}

/// Rotates the key of one IAM user, which is used for nothing else.
#[derive(Debug)]
pub struct Driver {
    /// The IAM user.
    pub user: String,
    /// Where replicas find the key.
    pub vault: Arc<dyn Vault>,
    /// Who makes keys.
    pub issuer: Arc<dyn KeyIssuer>,
    /// How S3 is asked what it thinks of a key.
    pub probe: Probe,
    /// The pace.
    pub pace: Pace,
}

/// What this driver has seen by itself. Lost with a crash, and seen again.
#[derive(Default)]
struct Memory {
    /// The pending key that S3 has accepted.
    accepted: Option<String>,
    /// The key that S3 refuses, and how often in a row.
    refused: Option<(String, u32)>,
    /// Where AWSCURRENT is, and since when that is known.
    current: Option<(String, Instant)>,
}

impl Driver {
    /// Ends all URLs of the key that `goal` names, or finishes what is half
    /// done. A new key is stored as version `version`, unless that has held
    /// another one before.
    ///
    /// Goes on through outages of IAM, the vault and S3: it ends when there is
    /// nothing left to do, or when it can't be done.
    ///
    /// # Errors
    /// [`Error::KeySlotsTaken`].
    pub async fn drive(
        &self,
        goal: &Goal,
        version: &str,
        progress: &watch::Sender<Vec<Done>>,
    ) -> Result<Option<SignerRotation>, Error> {
        let mut memory = Memory::default();
        let mut version = version.to_owned();
        let mut outgoing: Option<Credentials> = None;
        let mut confirmed_at = None;
        loop {
            let (held, keys) = match self.look().await {
                Ok(seen) => seen,
                Err(why) => {
                    tracing::warn!(user = self.user, why, "rotation waits");
                    tokio::time::sleep(self.pace.poll).await;
                    continue;
                }
            };
            if outgoing.is_none() {
                outgoing = Self::outgoing(goal, &held);
            }
            let seen = self.observe(&mut memory, &held, keys);
            let step = plan(&seen, goal, SystemTime::now(), self.pace.orphan_age);
            tracing::debug!(user = self.user, ?step, "rotation");
            let told = match &step {
                Step::Done => {
                    let (Some(old), Some(current)) = (&outgoing, &held.current) else { return Ok(None) };
                    // Another driver may have done the last steps: what it saw is not proof here.
                    if confirmed_at.is_none() && !self.refused(&mut memory, old).await {
                        tokio::time::sleep(self.pace.poll).await;
                        continue;
                    }
                    return Ok(Some(SignerRotation {
                        old_key: old.access_key_id().to_owned(),
                        new_key: current.key.access_key_id().to_owned(),
                        confirmed_at: *confirmed_at.get_or_insert_with(SystemTime::now),
                        steps: progress.borrow().clone(),
                    }));
                }
                Step::Blocked(keys) => {
                    return Err(Error::KeySlotsTaken { user: self.user.clone(), keys: keys.clone() });
                }
                Step::AwaitLease | Step::AwaitOrphan => Ok(None),
                Step::Create => self.create(&mut version, &seen).await.map(|key| Some(("created", key))),
                Step::Probe => Ok(self.accepted(&mut memory, &held).await.map(|key| ("accepted", key))),
                Step::Promote { from, to } => self
                    .vault
                    .promote(from.as_deref(), to)
                    .await
                    .map(|()| seen.pending.as_ref().map(|pending| ("promoted", pending.key.clone())))
                    .map_err(|e| e.to_string()),
                Step::Deactivate(key) => self
                    .issuer
                    .set_status(&self.user, key, Status::Inactive)
                    .await
                    .map(|()| Some(("deactivated", key.clone())))
                    .map_err(|e| e.to_string()),
                Step::Canary(key) => {
                    match held.previous.as_ref().filter(|previous| previous.key.access_key_id() == key) {
                        Some(previous) if self.refused(&mut memory, &previous.key).await => {
                            // Not that of an earlier rotation, which may be on its way out as well.
                            if outgoing.as_ref().is_some_and(|outgoing| outgoing.access_key_id() == key) {
                                confirmed_at.get_or_insert_with(SystemTime::now);
                            }
                            Ok(Some(("refused", key.clone())))
                        }
                        _ => Ok(None),
                    }
                }
                Step::Delete(key) => self.delete(key, &held).await.map(|()| Some(("deleted", key.clone()))),
                Step::Unstage(version) => self.vault.unstage(version).await.map(|()| None).map_err(|e| e.to_string()),
            };
            match told {
                Ok(Some((step, key))) => {
                    tracing::info!(user = self.user, step, access_key_id = key, "rotation step");
                    progress.send_modify(|steps| steps.push(Done { step, key, at: SystemTime::now() }));
                }
                Ok(None) => tokio::time::sleep(self.pace.poll).await,
                // Somebody else was quicker, or something is down: look again.
                Err(why) => {
                    tracing::warn!(user = self.user, ?step, why, "rotation step not done");
                    tokio::time::sleep(self.pace.poll).await;
                }
            }
        }
    }

    async fn look(&self) -> Result<(Held, Vec<KeyFacts>), String> {
        let held = self.vault.read().await.map_err(|e| e.to_string())?;
        let keys = self.issuer.list(&self.user).await.map_err(|e| e.to_string())?;
        Ok((held, keys))
    }

    /// Deletes a key.
    ///
    /// INVARIANT: no key is taken for an orphan that the vault names by now. IAM
    /// may have taken longer to list the keys than an orphan needs to get old, and
    /// what was stored since `held` was read is in use.
    async fn delete(&self, key: &str, held: &Held) -> Result<(), String> {
        if !names(held, key) && names(&self.vault.read().await.map_err(|e| e.to_string())?, key) {
            return Err("it was stored meanwhile".into());
        }
        self.issuer.delete(&self.user, key).await.map_err(|e| e.to_string())
    }

    /// Whether S3 refuses `key` now, as far as one answer tells.
    pub async fn is_refused(&self, key: &Credentials) -> bool {
        matches!(self.probe.ask(key).await, Ok(Verdict::Refused))
    }

    /// Whether S3 knows no key `id`, as far as one answer tells.
    ///
    /// # Errors
    /// Why S3 can't be asked, for the log.
    pub async fn is_forgotten(&self, id: &str) -> Result<bool, String> {
        self.probe.is_unknown(id).await
    }

    /// The key that `goal` is to end, with its secret, for the canary.
    fn outgoing(goal: &Goal, held: &Held) -> Option<Credentials> {
        let Goal::Replace { key, .. } = goal else { return None };
        [&held.current, &held.previous, &held.pending]
            .into_iter()
            .flatten()
            .find(|version| version.key.access_key_id() == key)
            .map(|version| version.key.clone())
    }

    fn observe(&self, memory: &mut Memory, held: &Held, keys: Vec<KeyFacts>) -> Observed {
        let label = |version: &Option<Version>| {
            version.as_ref().map(|v| Label { version: v.id.clone(), key: v.key.access_key_id().to_owned() })
        };
        let (current, pending, previous) = (label(&held.current), label(&held.pending), label(&held.previous));
        let at = current.as_ref().map(|current| current.version.clone()).unwrap_or_default();
        let since = match &memory.current {
            Some((version, since)) if *version == at => *since,
            _ => {
                let now = Instant::now();
                memory.current = Some((at, now));
                now
            }
        };
        Observed {
            accepted: pending.is_some() && pending.as_ref().map(|p| &p.key) == memory.accepted.as_ref(),
            refused: previous.as_ref().is_some_and(|previous| {
                memory.refused.as_ref().is_some_and(|(key, times)| *key == previous.key && *times >= REFUSALS)
            }),
            settled: since.elapsed() > self.pace.lease,
            keys,
            current,
            pending,
            previous,
        }
    }

    /// Makes a key and stores it. A crash in between leaves an orphan.
    async fn create(&self, version: &mut String, seen: &Observed) -> Result<String, String> {
        let key = match self.issuer.create(&self.user).await {
            Ok(key) => key,
            // The lock: somebody else has made one.
            Err(IssuerError::LimitExceeded) => return Err("both places are taken".into()),
            Err(error) => return Err(error.to_string()),
        };
        let id = key.access_key_id().to_owned();
        if self.is_late(&id, seen).await {
            // Nobody else has its secret.
            let _ = self.issuer.delete(&self.user, &id).await;
            return Err("somebody else has made a key at the same time".into());
        }
        loop {
            match self.vault.stage(version, &key).await {
                Ok(()) => return Ok(id),
                Err(VaultError::Unavailable(why)) => {
                    // The only place where the secret is, is here.
                    tracing::warn!(user = self.user, why, "new key can't be stored yet");
                    tokio::time::sleep(self.pace.poll).await;
                }
                Err(error) => {
                    // Not in the vault, so of no use to anybody.
                    let _ = self.issuer.delete(&self.user, &id).await;
                    if error == VaultError::Conflict {
                        // A request's id that comes again after other rotations.
                        *version = format!("{:032x}", rand::random::<u128>());
                    }
                    return Err(error.to_string());
                }
            }
        }
    }

    /// Whether somebody else has made a key since `seen`, and goes first. IAM is
    /// no lock where the user had no key, as when replicas start for the first
    /// time; a second key would be in the way until it is an orphan.
    async fn is_late(&self, id: &str, seen: &Observed) -> bool {
        let Ok((held, keys)) = self.look().await else { return false };
        let moved = held.current.map(|v| v.id) != seen.current.as_ref().map(|label| label.version.clone());
        let rank = |key: &KeyFacts| (key.created, key.id.clone());
        let mine = keys.iter().find(|key| key.id == id).map(rank);
        let others = keys.iter().filter(|key| seen.keys.iter().all(|before| before.id != key.id));
        moved || held.pending.is_some() || mine.is_some_and(|mine| others.map(rank).any(|other| other < mine))
    }

    /// Whether S3 accepts the pending key by now.
    async fn accepted(&self, memory: &mut Memory, held: &Held) -> Option<String> {
        let pending = held.pending.as_ref()?;
        match self.probe.ask(&pending.key).await {
            Ok(Verdict::Honoured) => {
                memory.accepted = Some(pending.key.access_key_id().to_owned());
                memory.accepted.clone()
            }
            Ok(Verdict::Refused) => None,
            Err(why) => {
                tracing::warn!(user = self.user, why, "probe not answered");
                None
            }
        }
    }

    /// Whether S3 has refused `key` often enough by now.
    async fn refused(&self, memory: &mut Memory, key: &Credentials) -> bool {
        let id = key.access_key_id();
        let times = match &memory.refused {
            Some((refused, times)) if refused == id => *times,
            _ => 0,
        };
        let times = match self.probe.ask(key).await {
            Ok(Verdict::Refused) => times + 1,
            Ok(Verdict::Honoured) => 0,
            Err(why) => {
                tracing::warn!(user = self.user, why, "canary not answered");
                times
            }
        };
        memory.refused = Some((id.to_owned(), times));
        times >= REFUSALS
    }
}

/// Whether the vault names `key`.
fn names(held: &Held, key: &str) -> bool {
    let versions = [&held.current, &held.pending, &held.previous];
    versions.into_iter().flatten().any(|version| version.key.access_key_id() == key)
}
