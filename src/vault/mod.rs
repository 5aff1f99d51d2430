//! Vaults: where `iam-user` keys are kept for all replicas. One vault holds
//! the keys of one signer.

pub mod file;
pub mod memory;
pub mod secrets_manager;

use aws_credential_types::Credentials;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// A key with the id that it is kept under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The id of the rotation that made the key.
    pub id: String,
    /// The key. Its `Debug` hides the secret, and it is zeroized when dropped.
    pub key: Credentials,
    /// The access key ids that were current before, the last one last. Each
    /// was proven dead before the next was made: they tell whose an old URL is.
    pub retired: Vec<String>,
}

/// How many retired ids are kept: far more than rotations in the seven days
/// that a URL may live.
const MAX_RETIRED: usize = 200;

/// What a vault holds of one signer, by staging label.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// AWSCURRENT: the key that signs.
    pub current: Option<Version>,
    /// AWSPENDING: the key that is to sign next. Never the current one, even
    /// where a crash left both labels on it.
    pub pending: Option<Version>,
    /// AWSPREVIOUS: the key that signed before.
    pub previous: Option<Version>,
}

/// Why a vault fails. The details are for the log only and hold no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VaultError {
    /// It does not answer, or not now.
    #[error("the vault does not answer at present: {0}")]
    Unavailable(String),
    /// It does not let us, or is not to be trusted.
    #[error("the vault refuses: {0}")]
    Refused(String),
    /// Another writer was there first: look again.
    #[error("another writer has changed the vault")]
    Conflict,
    /// It holds something that is no key.
    #[error("the vault holds something unreadable: {0}")]
    Corrupt(String),
}

/// Keeps the keys of one signer.
#[tonic::async_trait]
pub trait Vault: Send + Sync + std::fmt::Debug {
    /// What it holds. Nothing yet is no error.
    ///
    /// # Errors
    /// [`VaultError::Unavailable`], [`VaultError::Refused`],
    /// [`VaultError::Corrupt`].
    async fn read(&self) -> Result<Held, VaultError>;

    /// Stores `key` as AWSPENDING under the version `id` (32 to 64
    /// characters), for which another pending version silently loses the
    /// label. The same id with the same key again is fine.
    ///
    /// # Errors
    /// [`VaultError::Conflict`] if `id` holds another key, or has lost the
    /// label and can't be pending again; else as [`Vault::read`].
    async fn stage(&self, id: &str, key: &Credentials) -> Result<(), VaultError>;

    /// Moves AWSCURRENT from the version `from` (`None`: there is none yet) to
    /// the pending version `to`, which is not pending any more; the old one
    /// becomes AWSPREVIOUS. Fine if AWSCURRENT is at `to` already.
    ///
    /// # Errors
    /// [`VaultError::Conflict`] if AWSCURRENT is elsewhere or `to` is not
    /// pending, so that of two writers at most one wins; else as
    /// [`Vault::read`].
    async fn promote(&self, from: Option<&str>, to: &str) -> Result<(), VaultError>;

    /// Takes AWSPENDING away from the version `id`, if it still has it.
    ///
    /// # Errors
    /// As [`Vault::read`].
    async fn unstage(&self, id: &str) -> Result<(), VaultError>;
}

impl Held {
    /// What [`Vault::stage`] does to it.
    fn stage(&mut self, id: &str, key: &Credentials) -> Result<(), VaultError> {
        check_id(id)?;
        let known = [&self.current, &self.pending, &self.previous].into_iter().flatten().find(|v| v.id == id);
        if let Some(known) = known {
            return if same_key(&known.key, key) { Ok(()) } else { Err(VaultError::Conflict) };
        }
        let retired = self.current.as_ref().map(retired_with).unwrap_or_default();
        self.pending = Some(Version { id: id.to_owned(), key: key.clone(), retired });
        Ok(())
    }

    /// What [`Vault::promote`] does to it.
    fn promote(&mut self, from: Option<&str>, to: &str) -> Result<(), VaultError> {
        let current = id_of(self.current.as_ref());
        if current == Some(to) {
            return Ok(());
        }
        if current != from || id_of(self.pending.as_ref()) != Some(to) {
            return Err(VaultError::Conflict);
        }
        self.previous = self.current.take();
        self.current = self.pending.take();
        Ok(())
    }

    /// What [`Vault::unstage`] does to it.
    fn unstage(&mut self, id: &str) {
        self.pending.take_if(|pending| pending.id == id);
    }
}

/// What has been current once `current` is that no more.
fn retired_with(current: &Version) -> Vec<String> {
    let mut retired = current.retired.clone();
    retired.push(current.key.access_key_id().to_owned());
    retired.drain(..retired.len().saturating_sub(MAX_RETIRED));
    retired
}

fn id_of(version: Option<&Version>) -> Option<&str> {
    version.map(|version| version.id.as_str())
}

/// Whether both are the same key, wherever each was read from.
fn same_key(one: &Credentials, other: &Credentials) -> bool {
    one.access_key_id() == other.access_key_id() && one.secret_access_key() == other.secret_access_key()
}

/// Secrets Manager's rule for `ClientRequestToken`, kept by every vault.
fn check_id(id: &str) -> Result<(), VaultError> {
    if (32..=64).contains(&id.len()) {
        Ok(())
    } else {
        Err(VaultError::Refused(format!("a version's id must have 32 to 64 characters, unlike `{id}`")))
    }
}

/// A key as AWS's own rotation keeps it. No `Debug`: it would show the secret.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct KeyJson {
    access_key_id: String,
    secret_access_key: Zeroizing<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    retired: Vec<String>,
}

impl KeyJson {
    fn new(key: &Credentials, retired: Vec<String>) -> Self {
        Self {
            access_key_id: key.access_key_id().to_owned(),
            secret_access_key: Zeroizing::new(key.secret_access_key().to_owned()),
            retired,
        }
    }

    fn into_version(self, id: String) -> Version {
        let key = Credentials::new(self.access_key_id, self.secret_access_key.as_str(), None, None, "vault");
        Version { id, key, retired: self.retired }
    }
}

/// `value` as JSON, in a buffer large enough not to move and leave copies.
fn to_json(value: &impl Serialize) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let mut json = Zeroizing::new(Vec::with_capacity(32 << 10));
    serde_json::to_writer_pretty(&mut *json, value).map_err(|e| unreadable(&e))?;
    Ok(json)
}

/// Says where the JSON is wrong. What is there may be a secret.
fn unreadable(error: &serde_json::Error) -> VaultError {
    VaultError::Corrupt(format!("{:?} error at line {}, column {}", error.classify(), error.line(), error.column()))
}
