//! Keeps an `iam-user` signer: reads its vault, finishes what a crash has left,
//! and rotates its key when asked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::driver::{Driver, SignerRotation};
use super::plan::Goal;
use crate::error::Error;
use crate::issuer::Status;
use crate::signer::Signer;
use crate::vault::Held;

/// A rotation that any number of calls wait for.
type Running = Shared<BoxFuture<'static, Result<SignerRotation, Error>>>;

/// Keeps one signer.
pub struct Keeper {
    signer: Arc<Signer>,
    driver: Driver,
    refresh: Duration,
    reconcile: Duration,
    /// The rotations under way on this replica, by the key that they end.
    running: Mutex<HashMap<String, Running>>,
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
        Arc::new(Self { signer, driver, refresh, reconcile, running: Mutex::default() })
    }

    /// Reads the vault once, and takes up what it holds.
    pub async fn refresh(&self) {
        // The lease counts from before the question: the answer may be that old.
        let asked = Instant::now();
        match self.driver.vault.read().await {
            Ok(Held { current: Some(current), .. }) => {
                self.signer.renew(asked);
                self.signer.adopt(current.key, SystemTime::now());
            }
            Ok(Held { current: None, .. }) => self.signer.withdraw("its vault holds no key yet"),
            // It may sign until its lease runs out.
            Err(why) => {
                tracing::warn!(signer = self.signer.name, %why, "vault not read");
                self.signer.look_again();
            }
        }
    }

    /// Keeps the signer, for ever.
    pub async fn keep(self: Arc<Self>) {
        // At once: a new signer has no key yet, and a crash may have left something.
        let mut looked: Option<Instant> = None;
        loop {
            tokio::time::sleep(self.refresh).await;
            self.refresh().await;
            let idle = self.running().is_empty();
            if idle && looked.is_none_or(|at| at.elapsed() >= self.reconcile) {
                looked = Some(Instant::now());
                self.finish().await;
            }
        }
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

    /// Whether `key` is, or has last been, this signer's; and whether S3
    /// refuses it already.
    ///
    /// # Errors
    /// [`Error::SignerUnavailable`] if the vault can't be read.
    pub async fn owns(&self, key: &str) -> Result<Option<Doomed>, Error> {
        let held = self.read().await?;
        let mut versions = [held.current, held.pending, held.previous].into_iter().flatten();
        let Some(version) = versions.find(|version| version.key.access_key_id() == key) else { return Ok(None) };
        Ok(Some(Doomed { key: key.to_owned(), already_dead: self.driver.is_refused(&version.key).await }))
    }

    /// Ends all URLs that `key` has signed, or joins a rotation that does, and
    /// waits for its end. When nobody waits any more, it goes on.
    ///
    /// # Errors
    /// [`Error::KeySlotsTaken`].
    pub async fn rotate(
        self: &Arc<Self>,
        key: &str,
        immediate: bool,
        request_id: &str,
    ) -> Result<SignerRotation, Error> {
        let (running, joined) = {
            let mut all = self.running();
            let joined = all.contains_key(key);
            let begin = || Arc::clone(self).begin(key.to_owned(), immediate, request_id);
            (all.entry(key.to_owned()).or_insert_with(begin).clone(), joined)
        };
        if joined && immediate {
            // The one under way may be planned: what is urgent need not wait for its lease.
            let done = self.driver.issuer.set_status(&self.driver.user, key, Status::Inactive).await;
            done.map_err(|why| self.unavailable(why.to_string()))?;
        }
        running.await
    }

    fn begin(self: Arc<Self>, key: String, immediate: bool, request_id: &str) -> Running {
        let version = version_of(&self.signer.name, request_id);
        let task = tokio::spawn(async move {
            let (progress, _) = watch::channel(Vec::new());
            let goal = Goal::Replace { key: key.clone(), immediate };
            let ended = self.driver.drive(&goal, &version, &progress).await;
            self.refresh().await;
            self.running().remove(&key);
            match ended {
                Ok(Some(rotation)) => Ok(rotation),
                Ok(None) => Err(Error::internal(format!("the key `{key}` is not in the vault any more"))),
                Err(error) => Err(error),
            }
        });
        task.map(|ended| ended.unwrap_or_else(|e| Err(Error::internal(format!("signer rotation: {e}")))))
            .boxed()
            .shared()
    }

    async fn read(&self) -> Result<Held, Error> {
        self.driver.vault.read().await.map_err(|why| self.unavailable(why.to_string()))
    }

    fn unavailable(&self, detail: String) -> Error {
        Error::SignerUnavailable { signer: self.signer.name.clone(), detail }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, Running>> {
        // Every change is a single step, so that a panic leaves nothing half done.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The vault's version id of a rotation: the same for every retry.
fn version_of(signer: &str, request_id: &str) -> String {
    let hash = Sha256::digest(format!("{signer}\n{request_id}"));
    let id = hash.iter().take(16).fold(0, |id: u128, byte| (id << 8) | u128::from(*byte));
    format!("{id:032x}")
}
