//! Copies of an object within its bucket, with everything that it carries.

use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::ProvideErrorMetadata as _;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart, ServerSideEncryption, Tag,
};
use futures_util::{StreamExt as _, TryStreamExt as _};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{Facts, Store, not_implemented, store_error};
use crate::error::Error;
use crate::object::ObjectKey;
use crate::ops::upload::tagging;

/// S3's limit on the parts of one upload.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html>
const MAX_PARTS: i64 = 10_000;

/// How many parts are copied at a time.
const PARALLEL: usize = 8;

/// How long S3 may take to copy one object or part; some seconds a gigabyte.
const PATIENCE: Duration = Duration::from_mins(10);

/// A key in `x-amz-copy-source`: encoded, but for what leaves its form alone.
const SOURCE: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// How an object is copied.
#[derive(Clone, Copy, Debug)]
pub struct CopyLimits {
    /// The largest size, in bytes, that is copied in one request.
    pub threshold: i64,
    /// The least size of the parts of what is larger. They grow with the
    /// object, so that 10,000 do.
    pub part_size: i64,
}

impl Default for CopyLimits {
    /// 5 GiB, which is as much as `CopyObject` takes, and 128 MiB.
    fn default() -> Self {
        Self { threshold: 5 << 30, part_size: 128 << 20 }
    }
}

/// The current version of an object, with everything that a copy has to keep.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its key.
    pub key: ObjectKey,
    /// Its facts.
    pub facts: Facts,
    head: HeadObjectOutput,
}

impl Source {
    /// Whether the `ETag` is the MD5 of the bytes.
    #[must_use]
    pub fn etag_is_md5(&self) -> bool {
        let plain = matches!(self.head.server_side_encryption(), None | Some(ServerSideEncryption::Aes256));
        plain && !self.facts.etag.contains('-')
    }

    /// The checksum that a copy in parts can have, to be compared if possible:
    /// a SHA covers the whole only if it was sent in one request.
    fn checksum(&self) -> Option<(ChecksumAlgorithm, ChecksumType)> {
        let head = &self.head;
        let whole = match head.checksum_type() {
            Some(ChecksumType::Composite) => ChecksumType::Composite,
            _ => ChecksumType::FullObject,
        };
        if head.checksum_sha256().is_some() {
            Some((ChecksumAlgorithm::Sha256, ChecksumType::Composite))
        } else if head.checksum_sha1().is_some() {
            Some((ChecksumAlgorithm::Sha1, ChecksumType::Composite))
        } else if head.checksum_crc64_nvme().is_some() {
            Some((ChecksumAlgorithm::Crc64Nvme, whole))
        } else if head.checksum_crc32_c().is_some() {
            Some((ChecksumAlgorithm::Crc32C, whole))
        } else if head.checksum_crc32().is_some() {
            Some((ChecksumAlgorithm::Crc32, whole))
        } else {
            None
        }
    }
}

impl Store {
    /// The current version of an object, to be copied.
    ///
    /// # Errors
    /// [`Error::ObjectNotFound`], [`Error::StoreUnavailable`],
    /// [`Error::StoreRefused`].
    pub async fn source(&self, key: &ObjectKey) -> Result<Source, Error> {
        let head = self.look(key, None).await?;
        let facts = Facts::of(&head);
        if facts.etag.is_empty() {
            // Nothing would tell it from what overwrites it.
            return Err(Error::StoreRefused { detail: "the store gives objects no ETag".into() });
        }
        Ok(Source { key: key.clone(), facts, head })
    }

    /// Copies exactly `source` to `to`, unless there is something: with type,
    /// metadata, tags, encryption and storage class. ACLs are not kept: the
    /// copy is as private as the bucket makes it.
    ///
    /// # Errors
    /// [`Error::SourceChanged`]: the source is another by now, or `to` exists.
    /// [`Error::ObjectNotFound`]: the source is gone, or someone ended the
    /// copy. [`Error::StoreUnavailable`], [`Error::StoreRefused`].
    pub async fn copy(&self, source: &Source, to: &ObjectKey) -> Result<(), Error> {
        if source.facts.size <= self.copy_limits.threshold {
            return self.copy_whole(source, to).await;
        }
        let upload = self.start_copy(source, to).await?;
        let copied = self.copy_parts(source, to, &upload).await;
        if copied.is_err()
            && let Err(error) = self.abandon(to, &upload).await
        {
            // The next copy to this key cleans up.
            tracing::warn!(%error, "upload of a failed copy not aborted");
        }
        copied
    }

    async fn copy_whole(&self, source: &Source, to: &ObjectKey) -> Result<(), Error> {
        let head = &source.head;
        self.client
            .copy_object()
            .bucket(&self.bucket)
            .key(to.as_str())
            .copy_source(self.locate(source))
            .copy_source_if_match(&source.facts.etag)
            .if_none_match("*")
            // These are not copied by default, unlike metadata and tags.
            .set_storage_class(head.storage_class.clone())
            .set_server_side_encryption(head.server_side_encryption.clone())
            .set_ssekms_key_id(head.ssekms_key_id.clone())
            .set_bucket_key_enabled(head.bucket_key_enabled)
            .set_website_redirect_location(head.website_redirect_location.clone())
            .customize()
            .config_override(patient())
            .send()
            .await
            .map_err(|e| store_error(&e))?;
        Ok(())
    }

    async fn start_copy(&self, source: &Source, to: &ObjectKey) -> Result<String, Error> {
        let head = &source.head;
        let (algorithm, kind) = source.checksum().unzip();
        let expires = head.expires_string().and_then(|text| DateTime::from_str(text, DateTimeFormat::HttpDate).ok());
        let started = self
            .client
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(to.as_str())
            .set_content_type(head.content_type.clone())
            .set_content_encoding(head.content_encoding.clone())
            .set_content_language(head.content_language.clone())
            .set_content_disposition(head.content_disposition.clone())
            .set_cache_control(head.cache_control.clone())
            .set_expires(expires)
            .set_metadata(head.metadata.clone())
            .set_tagging(self.tags(source).await?)
            .set_storage_class(head.storage_class.clone())
            .set_server_side_encryption(head.server_side_encryption.clone())
            .set_ssekms_key_id(head.ssekms_key_id.clone())
            .set_bucket_key_enabled(head.bucket_key_enabled)
            .set_website_redirect_location(head.website_redirect_location.clone())
            .set_checksum_algorithm(algorithm)
            .set_checksum_type(kind)
            .send()
            .await
            .map_err(|e| store_error(&e))?;
        started.upload_id.ok_or_else(|| Error::internal("S3 started an upload without an id"))
    }

    async fn copy_parts(&self, source: &Source, to: &ObjectKey, upload: &str) -> Result<(), Error> {
        let parts = ranges(source.facts.size, self.copy_limits.part_size)
            .map(|(number, range)| self.copy_part(source, to, upload, number, range));
        let parts: Vec<_> = futures_util::stream::iter(parts).buffered(PARALLEL).try_collect().await?;
        self.client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(to.as_str())
            .upload_id(upload)
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build())
            .if_none_match("*")
            .customize()
            .config_override(patient())
            .send()
            .await
            .map_err(|e| store_error(&e))?;
        Ok(())
    }

    async fn copy_part(
        &self,
        source: &Source,
        to: &ObjectKey,
        upload: &str,
        number: i32,
        range: String,
    ) -> Result<CompletedPart, Error> {
        let part = self
            .client
            .upload_part_copy()
            .bucket(&self.bucket)
            .key(to.as_str())
            .upload_id(upload)
            .part_number(number)
            .copy_source(self.locate(source))
            .copy_source_if_match(&source.facts.etag)
            .copy_source_range(range)
            .customize()
            .config_override(patient())
            .send()
            .await
            .map_err(|e| store_error(&e))?;
        let part = part.copy_part_result.ok_or_else(|| Error::internal("S3 copied a part and does not say which"))?;
        Ok(CompletedPart::builder()
            .part_number(number)
            .set_e_tag(part.e_tag)
            .set_checksum_crc32(part.checksum_crc32)
            .set_checksum_crc32_c(part.checksum_crc32_c)
            .set_checksum_crc64_nvme(part.checksum_crc64_nvme)
            .set_checksum_sha1(part.checksum_sha1)
            .set_checksum_sha256(part.checksum_sha256)
            .build())
    }

    /// The source's tags, as `x-amz-tagging` has them. Their count in the facts
    /// won't do: who may not read tags is told of none.
    async fn tags(&self, source: &Source) -> Result<Option<String>, Error> {
        let tags = self
            .client
            .get_object_tagging()
            .bucket(&self.bucket)
            .key(source.key.as_str())
            .set_version_id(source.head.version_id.clone())
            .send()
            .await;
        let tags = match tags {
            Err(e) if not_implemented(&e) => return Ok(None),
            tags => tags.map_err(|e| store_error(&e))?.tag_set,
        };
        let tags = tags.into_iter().map(|Tag { key, value, .. }| (key, value)).collect();
        Ok(Some(tagging(&tags)).filter(|tags| !tags.is_empty()))
    }

    /// Ends the uploads to `key` that a crash left half done, if it was one of
    /// a size that is copied in parts.
    ///
    /// # Errors
    /// [`Error::StoreUnavailable`], [`Error::StoreRefused`].
    pub async fn abandon_copies(&self, key: &ObjectKey, size: i64) -> Result<(), Error> {
        if size <= self.copy_limits.threshold {
            return Ok(());
        }
        // One page does: each crash leaves one.
        let uploads = self.client.list_multipart_uploads().bucket(&self.bucket).prefix(key.as_str()).send().await;
        let uploads = match uploads {
            Err(e) if not_implemented(&e) => return Ok(()),
            uploads => uploads.map_err(|e| store_error(&e))?,
        };
        for upload in uploads.uploads().iter().filter(|upload| upload.key() == Some(key.as_str())) {
            self.abandon(key, upload.upload_id().unwrap_or_default()).await?;
        }
        Ok(())
    }

    async fn abandon(&self, key: &ObjectKey, upload: &str) -> Result<(), Error> {
        let call = self.client.abort_multipart_upload().bucket(&self.bucket).key(key.as_str()).upload_id(upload);
        match call.send().await {
            Err(e) if e.code() != Some("NoSuchUpload") => Err(store_error(&e)),
            _ => Ok(()),
        }
    }

    /// The source as `x-amz-copy-source` names it.
    fn locate(&self, source: &Source) -> String {
        let key = utf8_percent_encode(source.key.as_str(), SOURCE);
        let version = match source.facts.version_id.as_str() {
            "" => String::new(),
            id => format!("?versionId={}", utf8_percent_encode(id, NON_ALPHANUMERIC)),
        };
        format!("{}/{key}{version}", self.bucket)
    }
}

/// Settings for calls that take as long as the object is large.
pub(super) fn patient() -> aws_sdk_s3::config::Builder {
    let timeouts =
        TimeoutConfig::builder().connect_timeout(Duration::from_secs(2)).operation_attempt_timeout(PATIENCE).build();
    aws_sdk_s3::Config::builder().timeout_config(timeouts)
}

/// The parts of `size` bytes: numbers from 1 on, and ranges.
fn ranges(size: i64, part_size: i64) -> impl Iterator<Item = (i32, String)> {
    let part = part_size.max((size + MAX_PARTS - 1) / MAX_PARTS).max(1);
    let starts = std::iter::successors(Some(0), move |start| Some(start + part)).take_while(move |start| *start < size);
    (1..).zip(starts.map(move |start| format!("bytes={start}-{}", size.min(start + part) - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_byte_once_and_are_never_too_many() {
        let found: Vec<_> = ranges(11, 5).collect();
        assert_eq!(found, [(1, "bytes=0-4".into()), (2, "bytes=5-9".into()), (3, "bytes=10-10".into())]);
        assert_eq!(ranges(10, 5).count(), 2);
        assert_eq!(ranges(5 << 40, 5 << 20).count(), 10_000);
        assert_eq!(ranges(100_001, 5).last(), Some((9_091, "bytes=99990-100000".into())));
    }
}
