//! A vault in memory: for `dev` and for tests. Clones share what it holds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_credential_types::Credentials;

use super::{Held, Vault, VaultError};

/// A vault that ends with the process.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<Held>>);

impl Memory {
    fn held(&self) -> MutexGuard<'_, Held> {
        // Every change is a single step, so that a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Vault for Memory {
    async fn read(&self) -> Result<Held, VaultError> {
        Ok(self.held().clone())
    }

    async fn stage(&self, id: &str, key: &Credentials) -> Result<(), VaultError> {
        self.held().stage(id, key)
    }

    async fn promote(&self, from: Option<&str>, to: &str) -> Result<(), VaultError> {
        self.held().promote(from, to)
    }

    async fn unstage(&self, id: &str) -> Result<(), VaultError> {
        self.held().unstage(id);
        Ok(())
    }
}
