//! The versions of one object, and their end.

use std::time::SystemTime;

use aws_sdk_s3::types::{Delete, EncodingType, ObjectIdentifier};

use super::{Store, not_implemented, store_error, url_decode};
use crate::error::Error;
use crate::object::ObjectKey;

/// S3's limit on the keys of one `DeleteObjects`.
const MAX_DELETES: usize = 1_000;

/// One version of an object.
#[derive(Clone, Debug)]
pub struct Version {
    /// Its id. Empty if the bucket has no versions.
    pub id: String,
    /// Its `ETag`, quotation marks included.
    pub etag: String,
    /// When it was written.
    pub last_modified: Option<SystemTime>,
}

/// All that a bucket holds under one key.
#[derive(Clone, Debug, Default)]
pub struct Versions {
    /// The versions, the newest first.
    pub versions: Vec<Version>,
    /// The ids of the delete markers.
    pub markers: Vec<String>,
}

impl Store {
    /// All versions and delete markers of exactly this key. `None` if the
    /// store has no such call.
    ///
    /// # Errors
    /// [`Error::StoreUnavailable`], [`Error::StoreRefused`].
    pub async fn versions(&self, key: &ObjectKey) -> Result<Option<Versions>, Error> {
        let mut found = Versions::default();
        let mut from = None;
        loop {
            let page = self
                .client
                .list_object_versions()
                .bucket(&self.bucket)
                .prefix(key.as_str())
                .set_key_marker(from.as_ref().map(|_| key.as_str().to_owned()))
                .set_version_id_marker(from)
                // XML can't carry every key as it is.
                .encoding_type(EncodingType::Url)
                .send()
                .await;
            let page = match page {
                Err(e) if not_implemented(&e) => return Ok(None),
                page => page.map_err(|e| store_error(&e))?,
            };
            let encoded = page.encoding_type() == Some(&EncodingType::Url);
            let ours = |listed: Option<&str>| {
                listed.is_some_and(|k| if encoded { url_decode(k) == key.as_str() } else { k == key.as_str() })
            };
            for version in page.versions().iter().filter(|version| ours(version.key())) {
                found.versions.push(Version {
                    id: version.version_id().unwrap_or_default().to_owned(),
                    etag: version.e_tag().unwrap_or_default().to_owned(),
                    last_modified: version.last_modified().and_then(|time| (*time).try_into().ok()),
                });
            }
            for marker in page.delete_markers().iter().filter(|marker| ours(marker.key())) {
                found.markers.push(marker.version_id().unwrap_or_default().to_owned());
            }
            // The key sorts before all that it is a prefix of: what comes after is not ours.
            if !page.is_truncated().unwrap_or_default() || !ours(page.next_key_marker()) {
                return Ok(Some(found));
            }
            from = page.next_version_id_marker;
        }
    }

    /// Deletes these versions or delete markers, in no certain order.
    ///
    /// # Errors
    /// [`Error::StoreUnavailable`]; [`Error::StoreRefused`], also if it refuses
    /// one of them (an object lock).
    pub async fn delete_versions(&self, key: &ObjectKey, ids: &[String]) -> Result<(), Error> {
        for ids in ids.chunks(MAX_DELETES) {
            let identify = |id: &String| ObjectIdentifier::builder().key(key.as_str()).version_id(id).build();
            let objects = ids.iter().map(identify).collect::<Result<Vec<_>, _>>();
            let delete = objects.and_then(|objects| Delete::builder().set_objects(Some(objects)).quiet(true).build());
            let delete = delete.map_err(|e| Error::internal(e.to_string()))?;
            let answer = self
                .client
                .delete_objects()
                .bucket(&self.bucket)
                .delete(delete)
                .send()
                .await
                .map_err(|e| store_error(&e))?;
            // Someone else may have deleted it.
            if let Some(error) = answer.errors().iter().find(|error| error.code() != Some("NoSuchVersion")) {
                return Err(Error::StoreRefused { detail: format!("version not deleted: {error:?}") });
            }
        }
        Ok(())
    }

    /// Deletes this version, for good. Where a bucket has no versions: what is
    /// there, if it still is this.
    ///
    /// # Errors
    /// [`Error::SourceChanged`]: it no longer is. [`Error::StoreUnavailable`],
    /// [`Error::StoreRefused`].
    pub async fn delete_version(&self, key: &ObjectKey, version: &Version) -> Result<(), Error> {
        let call = self.client.delete_object().bucket(&self.bucket).key(key.as_str());
        let answer = if version.id.is_empty() {
            match call.clone().if_match(&version.etag).send().await {
                // A store that knows no such condition: it was looked at a moment ago.
                Err(e) if e.raw_response().is_some_and(|r| matches!(r.status().as_u16(), 400 | 501)) => {
                    call.send().await
                }
                answer => answer,
            }
        } else {
            call.version_id(&version.id).send().await
        };
        match answer.map_err(|e| store_error(&e)) {
            Ok(_) | Err(Error::ObjectNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
