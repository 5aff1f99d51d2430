//! Ends the download URLs of one object: its bytes move to a new key, and the
//! old one answers 404.
//!
//! There is no state but what the bucket shows, so that whoever asks again with
//! the same request id, on any replica, after any crash, goes on from there:
//!
//! | old key | new key | what is next |
//! |---|---|---|
//! | there | none | copy |
//! | there | its copy | delete the old, the copied version after all others |
//! | there | a copy of what was there before | nothing: both are kept, `ABORTED` |
//! | gone | there | delete what is left of the old, confirm |
//! | gone | none | `NOT_FOUND` |
//!
//! Upload URLs of the old key go on working: what they write is a new object.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use ulid::Ulid;

use crate::error::{Error, Violation};
use crate::object::ObjectKey;
use crate::store::copy::Source;
use crate::store::versions::{Version, Versions};
use crate::store::{Facts, Store};

/// How long a deleted object may still be seen. S3 forgets at once.
const PATIENCE: Duration = Duration::from_mins(1);

/// The object whose URLs are to end.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The object.
    pub key: ObjectKey,
    /// Who asks again with the same id goes on with the same rotation. Not
    /// empty.
    pub request_id: String,
}

/// A rotation that is confirmed.
#[derive(Clone, Debug)]
pub struct ObjectRotation {
    /// Where the object is now.
    pub new_key: ObjectKey,
    /// Its size in bytes.
    pub size: i64,
    /// The versions and delete markers of the old key that this call deleted;
    /// less if an earlier one had deleted some.
    pub versions_deleted: u64,
    /// When the old key was seen to be gone.
    pub confirmed_at: SystemTime,
    /// What this call did, and when it had done it.
    pub steps: Vec<(Step, SystemTime)>,
}

/// A step of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The object was copied to its new key.
    Copied,
    /// The copy was found to be one of the object.
    Verified,
    /// All versions of the old key were deleted.
    Deleted,
    /// The old key was seen to be gone.
    Confirmed,
}

impl Step {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Copied => "copied",
            Self::Verified => "verified",
            Self::Deleted => "deleted",
            Self::Confirmed => "confirmed",
        }
    }
}

/// The first half of a rotation: the copy exists, the old key is untouched.
#[derive(Debug)]
pub struct Copied {
    key: ObjectKey,
    /// What was copied. `None`: it is gone already.
    source: Option<Facts>,
    copy: Source,
    /// Whether this call made the copy.
    made: bool,
    steps: Vec<(Step, SystemTime)>,
}

/// Ends the download URLs of one object: copies it to a new key beside the old
/// one, deletes the old with all its versions, and confirms that the old key is
/// gone. Dropped, it stops where it is; the same ask goes on from there.
///
/// # Errors
/// [`Error::Invalid`]: the request id is empty, or the new key would be too
/// long. [`Error::ObjectNotFound`]. [`Error::SourceChanged`]: someone wrote to
/// the object in the meantime. Those of the store.
pub async fn rotate(store: &Store, ask: &Ask) -> Result<ObjectRotation, Error> {
    finish(store, copy(store, ask).await?).await
}

/// The first half of [`rotate`]: copies the object, or finds its copy.
///
/// # Errors
/// Those of [`rotate`].
pub async fn copy(store: &Store, ask: &Ask) -> Result<Copied, Error> {
    let new_key = new_key(ask)?;
    let mut steps = Vec::new();
    let mut tried = false;
    loop {
        let source = found(store.source(&ask.key).await)?;
        let (source, copy) = match (source, found(store.source(&new_key).await)?) {
            (None, None) => return Err(Error::ObjectNotFound),
            (None, Some(copy)) => (None, copy),
            (Some(source), Some(copy)) if is_copy(&source, &copy) => (Some(source), copy),
            (Some(_), Some(_)) => return Err(Error::SourceChanged { kept: Some(new_key) }),
            (Some(_), None) if tried => return Err(Error::SourceChanged { kept: None }),
            (Some(source), None) => match store.copy(&source, &new_key).await {
                Ok(()) => {
                    steps.push((Step::Copied, SystemTime::now()));
                    // Another call may have undone it, because the source is another by now.
                    let Some(copy) = found(store.source(&new_key).await)? else {
                        return Err(Error::SourceChanged { kept: None });
                    };
                    if !agree(&source, &copy).unwrap_or(source.facts.size == copy.facts.size) {
                        store.delete_version(&new_key, &version(&copy.facts)).await?;
                        return Err(Error::internal("a copy is not like its source"));
                    }
                    (Some(source), copy)
                }
                // The source is another, or another call has made the copy: look again.
                Err(Error::SourceChanged { .. } | Error::ObjectNotFound) => {
                    tried = true;
                    continue;
                }
                Err(error) => return Err(error),
            },
        };
        store.abandon_copies(&new_key, copy.facts.size).await?;
        let made = !steps.is_empty();
        steps.push((Step::Verified, SystemTime::now()));
        return Ok(Copied { key: ask.key.clone(), source: source.map(|source| source.facts), copy, made, steps });
    }
}

/// The second half of [`rotate`]: deletes the old key with all its versions,
/// and confirms that it is gone.
///
/// # Errors
/// Those of [`rotate`].
pub async fn finish(store: &Store, copied: Copied) -> Result<ObjectRotation, Error> {
    let mut versions_deleted = 0;
    let mut deleted_at = None;
    let mut pause = Duration::from_millis(50);
    let until = Instant::now() + PATIENCE;
    loop {
        match left(store, &copied).await {
            Ok(None) => break,
            Ok(Some(left)) => {
                if deleted_at.is_some() {
                    if Instant::now() > until {
                        return Err(Error::StoreUnavailable { detail: "a deleted object does not go away".into() });
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                versions_deleted += delete(store, &copied.key, left).await?;
                deleted_at = Some(SystemTime::now());
            }
            Err(Error::SourceChanged { .. }) if copied.made && versions_deleted == 0 => {
                return Err(Error::SourceChanged { kept: undo(store, copied).await? });
            }
            Err(error) => return Err(error),
        }
    }
    let confirmed_at = SystemTime::now();
    let mut steps = copied.steps;
    steps.extend(deleted_at.map(|at| (Step::Deleted, at)));
    steps.push((Step::Confirmed, confirmed_at));
    let (new_key, size) = (copied.copy.key, copied.copy.facts.size);
    Ok(ObjectRotation { new_key, size, versions_deleted, confirmed_at, steps })
}

/// Removes the copy of what was overwritten. It is kept, and named, if the
/// version that was copied is gone: another call may have answered with it.
async fn undo(store: &Store, copied: Copied) -> Result<Option<ObjectKey>, Error> {
    let id = copied.source.map(|source| source.version_id).filter(|id| !id.is_empty() && id != "null");
    if id.is_some() && found(store.head(&copied.key, id).await)?.is_none() {
        return Ok(Some(copied.copy.key));
    }
    store.delete_version(&copied.copy.key, &version(&copied.copy.facts)).await?;
    Ok(None)
}

/// What is left of the old key, if it is no newer than what was copied. `None`:
/// nothing, and it answers 404.
async fn left(store: &Store, copied: &Copied) -> Result<Option<Versions>, Error> {
    let changed = || Error::SourceChanged { kept: Some(copied.copy.key.clone()) };
    let current = found(store.head(&copied.key, None).await)?;
    match (&current, &copied.source) {
        (None, _) => {}
        (Some(now), Some(then))
            if (&now.etag, &now.version_id, now.last_modified)
                == (&then.etag, &then.version_id, then.last_modified) => {}
        (Some(_), _) => return Err(changed()),
    }
    let mut left = store
        .versions(&copied.key)
        .await?
        .unwrap_or_else(|| Versions { versions: current.iter().map(version).collect(), markers: Vec::new() });
    if let Some(newest) = left.versions.first_mut() {
        let was_copied = match &copied.source {
            // A bucket without versions lists each object as its version `null`.
            Some(source) if source.version_id.is_empty() => {
                (newest.id == "null" || newest.id.is_empty()) && newest.etag == source.etag
            }
            Some(source) => newest.id == source.version_id && newest.etag == source.etag,
            None => newest.etag == copied.copy.facts.etag || older(newest.last_modified, &copied.copy),
        };
        if !was_copied {
            return Err(changed());
        }
        if current.as_ref().is_some_and(|current| current.version_id.is_empty()) {
            newest.id.clear();
        }
    }
    let gone = current.is_none() && left.versions.is_empty() && left.markers.is_empty();
    Ok((!gone).then_some(left))
}

/// Deletes what is left of the old key.
///
/// INVARIANT: no version becomes the current one by this, and the copied one is
/// current until no other is left. So the old URLs never serve something else,
/// and whoever goes on after a crash sees what was copied, or nothing.
async fn delete(store: &Store, key: &ObjectKey, left: Versions) -> Result<u64, Error> {
    let mut deleted = left.markers.len();
    if let Some((newest, older)) = left.versions.split_first() {
        let older: Vec<_> = older.iter().map(|version| version.id.clone()).collect();
        store.delete_versions(key, &older).await?;
        match store.delete_version(key, newest).await {
            // It has been overwritten this moment. The next look says so.
            Err(Error::SourceChanged { .. }) => return Ok(0),
            answer => answer?,
        }
        deleted += left.versions.len();
    }
    store.delete_versions(key, &left.markers).await?;
    Ok(deleted as u64)
}

/// Whether a copy that was there before is one of `source`, and not of what
/// `source` has replaced.
fn is_copy(source: &Source, copy: &Source) -> bool {
    // Nothing but a rotation writes to such a key, and it copies what is current at that time.
    source.facts.size == copy.facts.size
        && agree(source, copy).unwrap_or_else(|| older(source.facts.last_modified, copy))
}

/// Whether two objects have the same bytes. `None`: S3 keeps nothing of them
/// that can be compared.
fn agree(one: &Source, two: &Source) -> Option<bool> {
    use std::mem::discriminant;
    match (&one.facts.checksum, &two.facts.checksum) {
        (Some(a), Some(b)) if discriminant(a) == discriminant(b) => Some(a == b && one.facts.size == two.facts.size),
        _ if one.facts.etag == two.facts.etag => Some(true),
        _ if one.etag_is_md5() && two.etag_is_md5() => Some(false),
        _ => None,
    }
}

/// Whether something was written before `copy` was begun. S3 dates an object in
/// whole seconds, and one in parts by when its upload was begun.
fn older(written: Option<SystemTime>, copy: &Source) -> bool {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).ok();
    match (written.and_then(seconds), copy.facts.last_modified.and_then(seconds)) {
        (Some(written), Some(begun)) => written < begun,
        _ => false,
    }
}

fn version(facts: &Facts) -> Version {
    Version { id: facts.version_id.clone(), etag: facts.etag.clone(), last_modified: facts.last_modified }
}

fn found<T>(looked: Result<T, Error>) -> Result<Option<T>, Error> {
    match looked {
        Err(Error::ObjectNotFound) => Ok(None),
        looked => looked.map(Some),
    }
}

/// The key beside the old one: `dir/report.pdf` becomes `dir/report-ID.pdf`,
/// with an id of 26 characters that comes from old key and request id alone.
///
/// # Errors
/// [`Error::Invalid`]: the request id is empty, or the key would be too long.
pub fn new_key(ask: &Ask) -> Result<ObjectKey, Error> {
    if ask.request_id.is_empty() {
        return Err(Error::invalid("request_id", "not be empty"));
    }
    let key = ask.key.as_str();
    // The length parts key from id, so that no two pairs look the same.
    let hash: [u8; 32] = Sha256::digest(format!("{}\n{key}{}", key.len(), ask.request_id)).into();
    let id = hash.iter().take(16).fold(0, |sum: u128, byte| (sum << 8) | u128::from(*byte));
    let name = key.rfind('/').map_or(0, |slash| slash + 1);
    let is_extension = |text: &str| text.len() > 1 && text.bytes().skip(1).all(|byte| byte.is_ascii_alphanumeric());
    // A dot at the beginning hides a file, and begins no extension.
    let dot = key.rfind('.').filter(|dot| *dot > name && is_extension(&key[*dot..])).unwrap_or(key.len());
    let new = format!("{}-{}{}", &key[..dot], Ulid(id), &key[dot..]);
    let too_long = |must| {
        let must = format!("leave room for a suffix of 27 bytes: its new key would have to {must}");
        Error::Invalid(vec![Violation::new("key", must)])
    };
    ObjectKey::parse(new).map_err(too_long)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(key: &str, request_id: &str) -> Result<String, Error> {
        let ask = Ask { key: ObjectKey::parse(key).unwrap(), request_id: request_id.into() };
        new_key(&ask).map(|key| key.as_str().to_owned())
    }

    #[test]
    fn the_new_key_is_beside_the_old_one_and_always_the_same() {
        for (key, begin, end) in [
            ("dir/report.pdf", "dir/report-", ".pdf"),
            ("report", "report-", ""),
            ("a.b/report", "a.b/report-", ""),
            (".hidden", ".hidden-", ""),
            ("dir/.hidden", "dir/.hidden-", ""),
            ("v1. a report", "v1. a report-", ""),
            ("dots...", "dots...-", ""),
            ("dir/", "dir/-", ""),
            ("ünï/Ω.tar.gz", "ünï/Ω.tar-", ".gz"),
        ] {
            let one = new(key, "one").unwrap();
            assert!(one.starts_with(begin) && one.ends_with(end), "{one}");
            assert_eq!(one.len(), key.len() + 27);
            assert_eq!(one, new(key, "one").unwrap());
            assert_ne!(one, new(key, "two").unwrap());
        }
        // It must not change: a retry may come after an update.
        assert_eq!(new("dir/report.pdf", "one").unwrap(), "dir/report-22T9G17G135PG1F2398167FTG7.pdf");
        assert_ne!(new("ab", "c").unwrap()[3..], new("a", "bc").unwrap()[2..]);
    }

    #[test]
    fn what_has_no_room_is_refused() {
        assert!(new(&"k".repeat(1024 - 27), "one").is_ok());
        for (key, request_id, field) in [("k".repeat(1024 - 26), "one", "key"), ("k".into(), "", "request_id")] {
            let Err(Error::Invalid(violations)) = new(&key, request_id) else { panic!("it was taken") };
            assert_eq!(violations[0].field, field);
        }
    }
}
