//! Work that any number of callers wait for: it is begun once, and goes on
//! when nobody waits for it any more.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use crate::error::Error;

/// A piece of work under way, to wait for.
pub type Flight<T> = Shared<BoxFuture<'static, Result<T, Error>>>;

/// All work of one sort that is under way on this replica. Clones share it.
pub struct Flights<K, T>(Arc<Mutex<HashMap<K, Flight<T>>>>);

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K, T> Clone for Flights<K, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K, T> Flights<K, T>
where
    K: Clone + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// The work named `key`: begun with what `begin` makes, unless it is under
    /// way already. Says also whether it was.
    pub fn join<F>(&self, key: K, begin: impl FnOnce() -> F) -> (Flight<T>, bool)
    where
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let mut all = self.all();
        if let Some(flight) = all.get(&key) {
            return (flight.clone(), true);
        }
        let (flights, name, work) = (self.clone(), key.clone(), begin());
        let task = tokio::spawn(async move {
            let ended = work.await;
            flights.all().remove(&name);
            ended
        });
        let ended = task.map(|ended| ended.unwrap_or_else(|e| Err(Error::internal(format!("work under way: {e}")))));
        let flight = ended.boxed().shared();
        all.insert(key, flight.clone());
        (flight, false)
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<K, Flight<T>>> {
        // Every change is a single step, so that a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
