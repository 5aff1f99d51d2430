//! `Presign`, and each item of `BatchPresign`.

use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use ulid::Ulid;

use super::delete::Delete;
use super::download::Download;
use super::head::Head;
use super::upload::Upload;
use crate::app::App;
use crate::error::Error;
use crate::object::{BucketName, Lifetime, ObjectKey};
use crate::policy::Permit;
use crate::signer::presign::{SignedRequest, Terms};

/// One presigned request, as it is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The bucket, by its name in the settings.
    pub bucket: BucketName,
    /// The object.
    pub key: ObjectKey,
    /// How long the URL is to live. `None`: the default of the settings.
    pub ttl: Option<Lifetime>,
    /// What the holder may do.
    pub operation: Operation,
}

/// What the holder of a URL may do.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Fetch the object.
    Download(Download),
    /// Store the object.
    Upload(Upload),
    /// Fetch its headers.
    Head(Head),
    /// Remove it.
    Delete(Delete),
}

/// A presigned request, and all that its asker should know of it.
pub struct Presigned {
    /// What to send.
    pub request: SignedRequest,
    /// When S3 begins to refuse it.
    pub expires_at: SystemTime,
    /// The time until then, in whole seconds, rounded down.
    pub expires_in: Duration,
    /// The signer's name.
    pub signer: String,
    /// Its issue id, if the bucket has them.
    pub issue_id: Option<Ulid>,
}

/// Signs what the permit allows.
///
/// # Errors
/// [`Error::UnknownBucket`], [`Error::NoRoute`], [`Error::SignerUnavailable`].
pub async fn presign(app: &App, permit: Permit<Ask>, now: SystemTime) -> Result<Presigned, Error> {
    let ask = permit.ask();
    let bucket = app.bucket(&ask.bucket)?;
    let signer = bucket.route(&ask.key)?;
    let key = signer.key(now)?;
    let client = key
        .client(&ask.bucket)
        .ok_or_else(|| Error::internal(format!("signer `{}` has no client for `{}`", signer.name, ask.bucket)))?;

    let window = match &ask.operation {
        Operation::Download(Download { cache_window, .. }) => *cache_window,
        Operation::Upload(_) | Operation::Head(_) | Operation::Delete(_) => None,
    };
    let ttl = ask.ttl.unwrap_or(app.ttl_default).min(permit.ceiling());
    if window.is_some_and(|window| window >= Duration::from(ttl)) {
        let must = format!("be shorter than the URL's life, {} s", ttl.seconds());
        return Err(Error::invalid("download.cache_window", must));
    }
    let start = floor(now, window.unwrap_or(Duration::from_secs(1)));
    let expires = lifetime(start, ttl, key.credentials.expiry()).ok_or_else(|| Error::SignerUnavailable {
        signer: signer.name.clone(),
        detail: "its key ends within a second".into(),
    })?;
    let expires_at = start + Duration::from(expires);
    let issue_id = bucket.settings.issue_id.then(|| match window {
        // The same ask in the same window must give the same URL, id included.
        Some(_) => derived_id(&permit, start),
        None => Ulid::from_parts(millis(now), rand::random()),
    });

    let terms = Terms { client, bucket: &bucket.settings.bucket, key: &ask.key, start, expires, issue_id };
    let request = match &ask.operation {
        Operation::Download(download) => download.sign(&terms).await?,
        Operation::Upload(upload) => upload.sign(&terms).await?,
        Operation::Head(head) => head.sign(&terms).await?,
        Operation::Delete(delete) => delete.sign(&terms).await?,
    };
    let left = expires_at.duration_since(now).unwrap_or_default();
    let expires_in = Duration::from_secs(left.as_secs());
    Ok(Presigned { request, expires_at, expires_in, signer: signer.name.clone(), issue_id })
}

/// The life of a URL signed at `start`: no longer than `ttl`, and no longer
/// than its key. `None` if nothing is left of the key.
fn lifetime(start: SystemTime, ttl: Lifetime, key_end: Option<SystemTime>) -> Option<Lifetime> {
    let Some(end) = key_end else { return Some(ttl) };
    let left = end.duration_since(start).ok()?.as_secs();
    Lifetime::new(Duration::from_secs(left.min(ttl.seconds().into())))
}

/// `time` rounded down to a multiple of `window`, which is in whole seconds.
fn floor(time: SystemTime, window: Duration) -> SystemTime {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds - seconds % window.as_secs().max(1))
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// An id made of caller, ask and window. `Debug` escapes what it prints, so
/// that no two asks look the same.
fn derived_id(permit: &Permit<Ask>, window_start: SystemTime) -> Ulid {
    let text = format!("{:?}\n{:?}", permit.caller(), permit.ask());
    let hash: [u8; 32] = Sha256::digest(text).into();
    let random = hash.iter().take(10).fold(0, |sum: u128, byte| (sum << 8) | u128::from(*byte));
    Ulid::from_parts(millis(window_start), random)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
    }

    #[test]
    fn a_url_never_outlives_its_key() {
        let minute = Lifetime::new(Duration::from_mins(1)).unwrap();
        let life = |end| lifetime(at(10_000), minute, end).map(Lifetime::seconds);
        assert_eq!(life(None), Some(60));
        assert_eq!(life(Some(at(200_000))), Some(60));
        assert_eq!(life(Some(at(40_999))), Some(30));
        assert_eq!(life(Some(at(10_999))), None);
        assert_eq!(life(Some(at(9_000))), None);
    }

    #[test]
    fn signing_time_is_rounded_down() {
        assert_eq!(floor(at(61_999), Duration::from_secs(1)), at(61_000));
        assert_eq!(floor(at(61_999), Duration::from_mins(1)), at(60_000));
    }
}
