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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract;

    #[tokio::test]
    async fn memory_keeps_the_contract() {
        let pair = || {
            let vault = Memory::default();
            [Box::new(vault.clone()) as Box<dyn Vault>, Box::new(vault)]
        };
        contract::vault(pair).await;
        contract::one_of_two_rotations_wins(pair).await;
    }
}
