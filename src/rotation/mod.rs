//! Revoke by rotation: URLs end because what they depend on is replaced.

pub mod driver;
pub mod keeper;
pub mod object;
pub mod plan;
pub mod probe;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};

use crate::app::App;
use crate::error::Error;
use crate::object::{BucketName, ObjectKey};
use object::{Ask, ObjectRotation};

/// A rotation that any number of calls wait for.
type Running = Shared<BoxFuture<'static, Result<ObjectRotation, Error>>>;
/// What makes two asks the same: bucket, key and request id.
type Name = (BucketName, ObjectKey, String);

/// The object rotations under way on this replica.
#[derive(Default)]
pub struct Rotations(Mutex<HashMap<Name, Running>>);

impl Rotations {
    fn running(&self) -> MutexGuard<'_, HashMap<Name, Running>> {
        // Every change is a single step, so that a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the rotation, or joins it, and waits for its end. When nobody
    /// waits any more, as after a deadline, it goes on.
    ///
    /// # Errors
    /// Those of [`object::rotate`].
    pub async fn rotate(&self, app: &Arc<App>, bucket: BucketName, ask: Ask) -> Result<ObjectRotation, Error> {
        let name = (bucket.clone(), ask.key.clone(), ask.request_id.clone());
        let running =
            self.running().entry(name.clone()).or_insert_with(|| begin(Arc::clone(app), bucket, ask, name)).clone();
        running.await
    }
}

fn begin(app: Arc<App>, bucket: BucketName, ask: Ask, name: Name) -> Running {
    let task = tokio::spawn(async move {
        let ended = match app.bucket(&bucket) {
            Ok(bucket) => object::rotate(&bucket.store, &ask).await,
            Err(error) => Err(error),
        };
        app.rotations.running().remove(&name);
        ended
    });
    task.map(|ended| ended.unwrap_or_else(|e| Err(Error::internal(format!("object rotation: {e}"))))).boxed().shared()
}
