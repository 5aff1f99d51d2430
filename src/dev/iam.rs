//! The IAM of `dev`: users with at most two access keys each, in memory.
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/id_credentials_access-keys.html>

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use aws_credential_types::Credentials;

use crate::issuer::{IssuerError, KeyFacts, KeyIssuer, Status};

/// AWS's quota of access keys per user.
pub const MAX_KEYS: usize = 2;

/// Why IAM refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IamError {
    /// There is no such user or key.
    #[error("NoSuchEntity")]
    NoSuchEntity,
    /// The user has two keys already.
    #[error("LimitExceeded")]
    LimitExceeded,
    /// There is such a user already.
    #[error("EntityAlreadyExists")]
    EntityAlreadyExists,
}

struct Key {
    credentials: Credentials,
    facts: KeyFacts,
}

/// The users and their keys. Clones share them.
#[derive(Clone, Default)]
pub struct MemoryIam(Arc<Mutex<BTreeMap<String, Vec<Key>>>>);

impl fmt::Debug for MemoryIam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryIam").finish_non_exhaustive()
    }
}

impl MemoryIam {
    fn users(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Key>>> {
        // Every change is a single step, so that a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a user without keys.
    ///
    /// # Errors
    /// [`IamError::EntityAlreadyExists`].
    pub fn create_user(&self, name: &str) -> Result<(), IamError> {
        let mut users = self.users();
        if users.contains_key(name) {
            return Err(IamError::EntityAlreadyExists);
        }
        users.insert(name.to_owned(), Vec::new());
        Ok(())
    }

    /// Makes a key of `user`, active at once.
    ///
    /// # Errors
    /// [`IamError::NoSuchEntity`], [`IamError::LimitExceeded`].
    pub fn create_access_key(&self, user: &str, now: SystemTime) -> Result<Credentials, IamError> {
        let mut users = self.users();
        let keys = users.get_mut(user).ok_or(IamError::NoSuchEntity)?;
        if keys.len() >= MAX_KEYS {
            return Err(IamError::LimitExceeded);
        }
        let id = format!("AKIA{}", pick(16, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"));
        let secret = pick(40, b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/");
        let credentials = Credentials::new(id.clone(), secret, None, None, "dev");
        keys.push(Key {
            credentials: credentials.clone(),
            facts: KeyFacts { id, status: Status::Active, created: now },
        });
        Ok(credentials)
    }

    /// The keys of `user`.
    ///
    /// # Errors
    /// [`IamError::NoSuchEntity`].
    pub fn list_access_keys(&self, user: &str) -> Result<Vec<KeyFacts>, IamError> {
        let users = self.users();
        let keys = users.get(user).ok_or(IamError::NoSuchEntity)?;
        Ok(keys.iter().map(|key| key.facts.clone()).collect())
    }

    /// Activates or deactivates a key of `user`.
    ///
    /// # Errors
    /// [`IamError::NoSuchEntity`].
    pub fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IamError> {
        let mut users = self.users();
        let key = users.get_mut(user).and_then(|keys| keys.iter_mut().find(|key| key.facts.id == id));
        key.ok_or(IamError::NoSuchEntity)?.facts.status = status;
        Ok(())
    }

    /// Removes a key of `user` for good.
    ///
    /// # Errors
    /// [`IamError::NoSuchEntity`].
    pub fn delete_access_key(&self, user: &str, id: &str) -> Result<(), IamError> {
        let mut users = self.users();
        let keys = users.get_mut(user).ok_or(IamError::NoSuchEntity)?;
        let at = keys.iter().position(|key| key.facts.id == id).ok_or(IamError::NoSuchEntity)?;
        keys.remove(at);
        Ok(())
    }

    /// The key with this id, if it is there and active: what S3 verifies with.
    #[must_use]
    pub fn active_key(&self, id: &str) -> Option<Credentials> {
        let users = self.users();
        let mut keys = users.values().flatten();
        let key = keys.find(|key| key.facts.id == id && key.facts.status == Status::Active)?;
        Some(key.credentials.clone())
    }
}

#[tonic::async_trait]
impl KeyIssuer for MemoryIam {
    async fn list(&self, user: &str) -> Result<Vec<KeyFacts>, IssuerError> {
        self.list_access_keys(user).map_err(failed_for_user)
    }

    async fn create(&self, user: &str) -> Result<Credentials, IssuerError> {
        self.create_access_key(user, SystemTime::now()).map_err(failed_for_user)
    }

    async fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IssuerError> {
        match self.set_status(user, id, status) {
            Err(IamError::NoSuchEntity) if status == Status::Inactive => Ok(()),
            set => set.map_err(|e| IssuerError::Refused(e.to_string())),
        }
    }

    async fn delete(&self, user: &str, id: &str) -> Result<(), IssuerError> {
        match self.delete_access_key(user, id) {
            Err(IamError::NoSuchEntity) => Ok(()),
            deleted => deleted.map_err(|e| IssuerError::Refused(e.to_string())),
        }
    }
}

fn failed_for_user(error: IamError) -> IssuerError {
    match error {
        IamError::NoSuchEntity => IssuerError::NoSuchUser,
        IamError::LimitExceeded => IssuerError::LimitExceeded,
        IamError::EntityAlreadyExists => IssuerError::Refused(error.to_string()),
    }
}

/// `n` characters of `alphabet`, from the thread's cryptographic generator.
fn pick(n: usize, alphabet: &[u8]) -> String {
    (0..n).map(|_| char::from(alphabet[rand::random_range(0..alphabet.len())])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_two_keys_at_most_and_only_active_ones_count() {
        let (iam, now) = (MemoryIam::default(), SystemTime::now());
        assert_eq!(iam.create_access_key("u", now).unwrap_err(), IamError::NoSuchEntity);
        iam.create_user("u").unwrap();
        assert_eq!(iam.create_user("u"), Err(IamError::EntityAlreadyExists));
        let first = iam.create_access_key("u", now).unwrap();
        let second = iam.create_access_key("u", now).unwrap();
        assert_eq!(iam.create_access_key("u", now).unwrap_err(), IamError::LimitExceeded);

        let id = first.access_key_id();
        assert_eq!(iam.active_key(id), Some(first.clone()));
        iam.set_status("u", id, Status::Inactive).unwrap();
        assert_eq!(iam.active_key(id), None);
        iam.set_status("u", id, Status::Active).unwrap();
        assert_eq!(iam.active_key(id), Some(first.clone()));
        iam.delete_access_key("u", id).unwrap();
        assert_eq!(iam.active_key(id), None);
        let left: Vec<_> = iam.list_access_keys("u").unwrap().into_iter().map(|key| key.id).collect();
        assert_eq!(left, [second.access_key_id()]);
        assert!(!format!("{second:?}").contains(second.secret_access_key()));
    }
}
