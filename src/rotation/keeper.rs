//! Keeps an `iam-user` signer: reads its vault, finishes what a crash has left,
//! and rotates its key when asked.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::driver::{Done, Driver, REFUSALS, SignerRotation};
use super::flight::Flights;
use super::plan::Goal;
use crate::error::Error;
use crate::issuer::Status;
use crate::signer::Signer;
use crate::vault::{Held, Version};

/// Keeps one signer.
pub struct Keeper {
    signer: Arc<Signer>,
    driver: Driver,
    refresh: Duration,
    reconcile: Duration,
    /// The rotations under way on this replica, by the key that they end.
    running: Flights<String, SignerRotation>,
    /// The last one that was begun, while it is under way.
    under_way: ArcSwapOption<UnderWay>,
    known: ArcSwap<Known>,
    /// When the newest good read of the vault was asked for.
    newest: Mutex<Option<Instant>>,
    /// The key that this replica has seen S3 refuse, often enough.
    dead: ArcSwapOption<String>,
}

/// The ids of this signer's keys, as the vault had them at the last look.
#[derive(Debug, Default)]
struct Known {
    current: Option<String>,
    pending: Option<String>,
    previous: Option<Version>,
    retired: Vec<String>,
}

/// Whether what a key has signed is still good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is, as far as this replica knows.
    Live,
    /// S3 has been seen to refuse it.
    Dead,
}

/// A rotation that has not ended yet.
#[derive(Clone, Debug)]
pub struct UnderWay {
    /// The key whose URLs are to end.
    pub old_key: String,
    /// Whether it was asked for as immediate.
    pub immediate: bool,
    /// When this replica began it.
    pub since: SystemTime,
    progress: watch::Receiver<Vec<Done>>,
}

impl UnderWay {
    /// What this replica has done so far.
    #[must_use]
    pub fn steps(&self) -> Vec<Done> {
        self.progress.borrow().clone()
    }
}

/// Which URLs a revoke is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doomed {
    /// The access key id whose URLs are to end.
    pub key: String,
    /// S3 refused that key before anything was done.
    pub already_dead: bool,
}

impl Keeper {
    /// Keeps `signer` with what `driver` knows of it.
    #[must_use]
    pub fn new(signer: Arc<Signer>, driver: Driver, refresh: Duration, reconcile: Duration) -> Arc<Self> {
        let (under_way, dead) = (ArcSwapOption::empty(), ArcSwapOption::empty());
        let (running, known, newest) = (Flights::default(), ArcSwap::default(), Mutex::default());
        Arc::new(Self { signer, driver, refresh, reconcile, running, under_way, known, newest, dead })
    }

    /// Reads the vault once, and takes up what it holds.
    pub async fn refresh(&self) {
        // The lease counts from before the question: the answer may be that old.
        let asked = Instant::now();
        let read = self.driver.vault.read().await;
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.is_some_and(|newest| newest > asked) {
            return; // Somebody has asked after us, and was answered before.
        }
        match read {
            Ok(held) => {
                *newest = Some(asked);
                self.learn(&held);
                match held.current {
                    Some(current) => {
                        // INVARIANT: in this order, lest the key before get another lease.
                        self.signer.adopt(current.key, SystemTime::now());
                        self.signer.renew(asked);
                    }
                    None => self.signer.withdraw("its vault holds no key yet"),
                }
            }
            // It may sign until its lease runs out.
            Err(why) => tracing::warn!(signer = self.signer.name, %why, "vault not read"),
        }
    }

    /// Keeps the signer, for ever.
    pub async fn keep(self: Arc<Self>) {
        // Side by side: a rotation that waits, as when IAM is down, must not keep
        // the vault from being read.
        tokio::join!(self.keep_key(), self.keep_clean(), self.keep_told(), self.keep_watch());
    }

    async fn keep_key(&self) {
        loop {
            tokio::time::sleep(self.refresh).await;
            self.refresh_in_time().await;
        }
    }

    /// Reads the vault once, unless that takes longer than a lease: what comes
    /// later is too old to renew it.
    pub async fn refresh_in_time(&self) {
        if tokio::time::timeout(self.driver.pace.lease, self.refresh()).await.is_err() {
            tracing::warn!(signer = self.signer.name, "vault not read within a lease");
        }
    }

    /// Has whoever watches hear of the end of the lease when it comes, and not
    /// when the vault has failed to answer at last.
    async fn keep_told(&self) {
        loop {
            let left = self.signer.lease_left();
            if left.is_zero() {
                self.signer.look_again();
                tokio::time::sleep(self.refresh).await;
            } else {
                tokio::time::sleep(left).await;
            }
        }
    }

    async fn keep_clean(&self) {
        tokio::time::sleep(self.refresh).await;
        // At once: a new signer has no key yet, and a crash may have left something.
        loop {
            if self.running.is_empty() {
                self.finish().await;
            }
            tokio::time::sleep(self.reconcile).await;
        }
    }

    async fn keep_watch(&self) {
        loop {
            tokio::time::sleep(self.refresh).await;
            self.watch_previous().await;
        }
    }

    fn learn(&self, held: &Held) {
        let id = |version: &Option<Version>| version.as_ref().map(|v| v.key.access_key_id().to_owned());
        let retired = held.current.as_ref().map(|current| current.retired.clone()).unwrap_or_default();
        let (current, pending, previous) = (id(&held.current), id(&held.pending), held.previous.clone());
        self.known.store(Arc::new(Known { current, pending, previous, retired }));
    }

    /// Sees for itself whether the key before is dead, whoever has rotated it.
    async fn watch_previous(&self) {
        let Some(previous) = self.known.load().previous.as_ref().map(|previous| previous.key.clone()) else { return };
        if self.is_dead(previous.access_key_id()) {
            return;
        }
        for _ in 0..REFUSALS {
            if !self.driver.is_refused(&previous).await {
                return;
            }
        }
        self.dead.store(Some(Arc::new(previous.access_key_id().to_owned())));
    }

    fn is_dead(&self, key: &str) -> bool {
        self.dead.load().as_ref().is_some_and(|dead| ***dead == *key)
    }

    /// What the last look has shown of `key`; `None` if it is not this
    /// signer's. Asks nobody.
    #[must_use]
    pub fn standing(&self, key: &str) -> Option<Standing> {
        let known = self.known.load();
        let previous = known.previous.as_ref().map(|previous| previous.key.access_key_id());
        if self.is_dead(key) {
            Some(Standing::Dead)
        } else if [known.current.as_deref(), known.pending.as_deref(), previous].contains(&Some(key)) {
            Some(Standing::Live)
        } else {
            // The next key was not made before this one was proven dead.
            known.retired.iter().any(|retired| retired == key).then_some(Standing::Dead)
        }
    }

    /// The rotation that this replica is in the middle of.
    #[must_use]
    pub fn under_way(&self) -> Option<Arc<UnderWay>> {
        self.under_way.load_full()
    }

    /// The key that is to sign next, whichever replica has made it.
    #[must_use]
    pub fn pending(&self) -> Option<String> {
        self.known.load().pending.clone()
    }

    /// Leaves nothing half done: makes the first key, or finishes a rotation
    /// that somebody has left.
    pub async fn finish(&self) {
        let (progress, _) = watch::channel(Vec::new());
        let version = version_of(&self.signer.name, &rand::random::<u128>().to_string());
        if let Err(why) = self.driver.drive(&Goal::Finish, &version, &progress).await {
            tracing::error!(signer = self.signer.name, %why, "rotation can't be finished");
        }
        self.refresh().await;
    }

    /// The key that a revoke of all that the signer has signed would end.
    ///
    /// # Errors
    /// [`Error::SignerUnavailable`] if the vault can't be read or is empty.
    pub async fn doomed(&self, request_id: &str) -> Result<String, Error> {
        let held = self.read().await?;
        let version = version_of(&self.signer.name, request_id);
        // A retry of what has been done already is about the key before.
        let version = match (held.current, held.previous) {
            (Some(current), Some(previous)) if current.id == version => previous,
            (Some(current), _) => current,
            (None, _) => return Err(self.unavailable("its vault holds no key yet".into())),
        };
        Ok(version.key.access_key_id().to_owned())
    }

    /// Whether `key` is, or has been, this signer's; and whether S3 refuses it
    /// already.
    ///
    /// # Errors
    /// [`Error::SignerUnavailable`] if the vault can't be read.
    pub async fn owns(&self, key: &str) -> Result<Option<Doomed>, Error> {
        let held = self.read().await?;
        let retired = held.current.as_ref().is_some_and(|current| current.retired.iter().any(|id| id == key));
        let mut versions = [held.current, held.pending, held.previous].into_iter().flatten();
        if let Some(version) = versions.find(|version| version.key.access_key_id() == key) {
            return Ok(Some(Doomed { key: key.to_owned(), already_dead: self.driver.is_refused(&version.key).await }));
        }
        Ok(retired.then(|| Doomed { key: key.to_owned(), already_dead: true }))
    }

    /// Ends all URLs that `key` has signed, or joins a rotation that does, and
    /// waits for its end. When nobody waits any more, it goes on. A key that
    /// was retired long ago is only proven dead.
    ///
    /// # Errors
    /// [`Error::KeySlotsTaken`], and [`Error::SignerUnavailable`] if the vault,
    /// IAM or S3 do not answer.
    pub async fn rotate(
        self: &Arc<Self>,
        key: &str,
        immediate: bool,
        request_id: &str,
    ) -> Result<SignerRotation, Error> {
        let (running, joined) =
            self.running.join(key.to_owned(), || Arc::clone(self).begin(key.to_owned(), immediate, request_id));
        if joined && immediate {
            // The one under way may be planned: what is urgent need not wait for its lease.
            let done = self.driver.issuer.set_status(&self.driver.user, key, Status::Inactive).await;
            done.map_err(|why| self.unavailable(why.to_string()))?;
        }
        running.await
    }

    fn begin(
        self: Arc<Self>,
        key: String,
        immediate: bool,
        request_id: &str,
    ) -> impl Future<Output = Result<SignerRotation, Error>> + use<> {
        let version = version_of(&self.signer.name, request_id);
        let (tell, progress) = watch::channel(Vec::new());
        let begun = Arc::new(UnderWay { old_key: key.clone(), immediate, since: SystemTime::now(), progress });
        self.under_way.store(Some(Arc::clone(&begun)));
        async move {
            let goal = Goal::Replace { key: key.clone(), immediate };
            let ended = match self.driver.drive(&goal, &version, &tell).await {
                Ok(Some(rotation)) => {
                    self.dead.store(Some(Arc::new(key)));
                    Ok(rotation)
                }
                // It is not in the vault any more.
                Ok(None) => self.proven_dead(key).await,
                Err(error) => Err(error),
            };
            self.refresh().await;
            // Another one may have begun meanwhile.
            if self.under_way.load().as_ref().is_some_and(|latest| Arc::ptr_eq(latest, &begun)) {
                self.under_way.store(None);
            }
            ended
        }
    }

    /// The proof that a key, whose secret nobody has any more, is dead.
    async fn proven_dead(&self, old_key: String) -> Result<SignerRotation, Error> {
        let held = self.read().await?;
        let Some(current) = held.current else { return Err(self.unavailable("its vault holds no key yet".into())) };
        for _ in 0..REFUSALS {
            match self.driver.is_forgotten(&old_key).await {
                Ok(true) => {}
                Ok(false) => return Err(self.unavailable(format!("S3 still knows the retired key `{old_key}`"))),
                Err(why) => return Err(self.unavailable(why)),
            }
        }
        let new_key = current.key.access_key_id().to_owned();
        Ok(SignerRotation { old_key, new_key, confirmed_at: SystemTime::now(), steps: Vec::new() })
    }

    async fn read(&self) -> Result<Held, Error> {
        self.driver.vault.read().await.map_err(|why| self.unavailable(why.to_string()))
    }

    fn unavailable(&self, detail: String) -> Error {
        Error::SignerUnavailable { signer: self.signer.name.clone(), detail }
    }
}

/// The vault's version id of a rotation: the same for every retry.
#[must_use]
pub fn version_of(signer: &str, request_id: &str) -> String {
    let hash = Sha256::digest(format!("{signer}\n{request_id}"));
    let id = hash.iter().take(16).fold(0, |id: u128, byte| (id << 8) | u128::from(*byte));
    format!("{id:032x}")
}
