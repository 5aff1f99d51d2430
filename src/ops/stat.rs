//! `Stat`: the facts of one object.

use crate::app::App;
use crate::error::Error;
use crate::object::{BucketName, ObjectKey};
use crate::policy::Permit;
use crate::store::Facts;

/// The object whose facts are asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The bucket, by its name in the settings.
    pub bucket: BucketName,
    /// The object.
    pub key: ObjectKey,
    /// The version. `None`: the current one.
    pub version_id: Option<String>,
}

/// Looks the object up that the permit allows.
///
/// # Errors
/// [`Error::ObjectNotFound`], [`Error::UnknownBucket`], those of the store.
pub async fn stat(app: &App, permit: Permit<Ask>) -> Result<(ObjectKey, Facts), Error> {
    let ask = permit.ask();
    let facts = app.bucket(&ask.bucket)?.store.head(&ask.key, ask.version_id.clone()).await?;
    Ok((ask.key.clone(), facts))
}
