//! Multipart uploads, opened and ended with the service's own identity. Their
//! bytes come from others.

use std::collections::BTreeMap;
use std::time::SystemTime;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart, ServerSideEncryption,
};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use super::copy::patient;
use super::{Store, decode_sum, not_implemented, store_error};
use crate::error::Error;
use crate::object::ObjectKey;
use crate::ops::upload::{Algorithm, Checksum, Encryption, Upload, tagging};
use crate::signer::presign::chain;

/// How many parts a page may have: S3's own limit.
const MAX_PAGE: u16 = 1000;

/// A part that S3 has.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its number.
    pub number: u32,
    /// Its size in bytes.
    pub size: u64,
    /// Its `ETag`, quotation marks included.
    pub etag: String,
    /// Its checksum, if S3 tells one.
    pub checksum: Option<Checksum>,
    /// When S3 got it.
    pub last_modified: Option<SystemTime>,
}

/// One page of parts.
pub struct Page {
    /// The parts, by number.
    pub parts: Vec<Stored>,
    /// The number after which the next page begins.
    pub next: Option<u32>,
}

/// How an upload is to be completed.
pub struct Completion {
    /// All its parts, in order.
    pub parts: Vec<Stored>,
    /// The size of the object, in bytes.
    pub size: u64,
    /// Refuse to overwrite.
    pub create_only: bool,
    /// The checksum that it was created with.
    pub algorithm: Option<Algorithm>,
    /// The checksum of the full object.
    pub checksum: Option<Checksum>,
}

/// An object that was made of parts.
#[derive(Clone, Debug)]
pub struct Made {
    /// Its `ETag`, quotation marks included.
    pub etag: String,
    /// Its version.
    pub version_id: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Its checksum, if S3 keeps one.
    pub checksum: Option<Checksum>,
    /// Whether that is one of the parts' checksums.
    pub composite: bool,
    /// Its user metadata.
    pub metadata: BTreeMap<String, String>,
}

impl Store {
    /// Opens an upload, and says S3's id of it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the store has no such thing,
    /// [`Error::StoreUnavailable`], [`Error::StoreRefused`].
    pub async fn create_upload(
        &self,
        key: &ObjectKey,
        upload: &Upload,
        algorithm: Option<Algorithm>,
    ) -> Result<String, Error> {
        let (encryption, kms_key, bucket_key) = match &upload.encryption {
            None => (None, None, None),
            Some(Encryption::S3) => (Some(ServerSideEncryption::Aes256), None, None),
            Some(Encryption::Kms { key_id, bucket_key }) => {
                (Some(ServerSideEncryption::AwsKms), key_id.clone(), bucket_key.then_some(true))
            }
        };
        let created = self
            .client
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(key.as_str())
            .set_content_type(upload.content_type.clone())
            .set_cache_control(upload.cache_control.clone())
            .set_content_disposition(upload.content_disposition.clone())
            .set_storage_class(upload.storage_class.clone())
            .set_metadata(Some(upload.metadata.clone().into_iter().collect()))
            .set_tagging((!upload.tags.is_empty()).then(|| tagging(&upload.tags)))
            .set_server_side_encryption(encryption)
            .set_ssekms_key_id(kms_key)
            .set_bucket_key_enabled(bucket_key)
            .set_checksum_algorithm(algorithm.map(of_sdk))
            .set_checksum_type(algorithm.map(type_of))
            .send()
            .await
            .map_err(|e| {
                if not_implemented(&e) {
                    return Error::invalid("upload", "ask only for what the bucket's S3 has: it answers 501 to this");
                }
                store_error(&e)
            })?;
        created.upload_id.ok_or_else(|| Error::internal("S3 opened an upload without an id"))
    }

    /// The parts that S3 has of an upload, from the one after `after` on.
    ///
    /// # Errors
    /// [`Error::UploadNotFound`], [`Error::StoreUnavailable`],
    /// [`Error::StoreRefused`].
    pub async fn list_parts(&self, key: &ObjectKey, upload: &str, after: u32, page_size: u16) -> Result<Page, Error> {
        let page = self
            .client
            .list_parts()
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload)
            .max_parts(page_size.into())
            .set_part_number_marker((after > 0).then(|| after.to_string()))
            .send()
            .await
            .map_err(|e| upload_error(&e))?;
        let parts = page.parts.unwrap_or_default().into_iter().map(|part| Stored {
            number: part.part_number.and_then(|number| u32::try_from(number).ok()).unwrap_or_default(),
            size: part.size.and_then(|size| u64::try_from(size).ok()).unwrap_or_default(),
            checksum: first_sum(
                [part.checksum_sha256.as_ref(), part.checksum_sha1.as_ref()],
                [part.checksum_crc64_nvme.as_ref(), part.checksum_crc32_c.as_ref(), part.checksum_crc32.as_ref()],
            ),
            etag: part.e_tag.unwrap_or_default(),
            last_modified: part.last_modified.and_then(|time| time.try_into().ok()),
        });
        let parts: Vec<_> = parts.collect();
        let more = page.is_truncated.unwrap_or_default();
        let next = parts.last().filter(|_| more).map(|part| part.number);
        Ok(Page { parts, next })
    }

    /// All parts that S3 has of an upload, by number.
    ///
    /// # Errors
    /// Those of [`Store::list_parts`].
    pub async fn all_parts(&self, key: &ObjectKey, upload: &str) -> Result<BTreeMap<u32, Stored>, Error> {
        let (mut all, mut after) = (BTreeMap::new(), 0);
        loop {
            let page = self.list_parts(key, upload, after, MAX_PAGE).await?;
            all.extend(page.parts.into_iter().map(|part| (part.number, part)));
            match page.next {
                Some(next) if next > after => after = next,
                _ => return Ok(all),
            }
        }
    }

    /// Makes the object of its parts, and says its version.
    ///
    /// # Errors
    /// [`Error::UploadNotFound`], [`Error::UploadMismatch`],
    /// [`Error::ObjectExists`], [`Error::StoreUnavailable`],
    /// [`Error::StoreRefused`].
    pub async fn complete_upload(
        &self,
        key: &ObjectKey,
        upload: &str,
        completion: Completion,
    ) -> Result<Option<String>, Error> {
        let Completion { parts, size, create_only, algorithm, checksum } = completion;
        // S3 takes checksums only for an upload that was created with them.
        let completed = |part: Stored| {
            let sum = |of| of_algorithm(part.checksum.as_ref().filter(|_| algorithm == Some(of)), of);
            CompletedPart::builder()
                .part_number(part.number.cast_signed())
                .set_checksum_crc32(sum(Algorithm::Crc32))
                .set_checksum_crc32_c(sum(Algorithm::Crc32c))
                .set_checksum_crc64_nvme(sum(Algorithm::Crc64nvme))
                .set_checksum_sha1(sum(Algorithm::Sha1))
                .set_checksum_sha256(sum(Algorithm::Sha256))
                .e_tag(part.etag)
                .build()
        };
        let parts: Vec<_> = parts.into_iter().map(completed).collect();
        let whole = |of| of_algorithm(checksum.as_ref(), of);
        let done = self
            .client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload)
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build())
            // S3 itself makes sure of the size.
            .mpu_object_size(i64::try_from(size).unwrap_or(i64::MAX))
            .set_if_none_match(create_only.then(|| "*".to_owned()))
            .set_checksum_type(algorithm.map(type_of))
            .set_checksum_crc32(whole(Algorithm::Crc32))
            .set_checksum_crc32_c(whole(Algorithm::Crc32c))
            .set_checksum_crc64_nvme(whole(Algorithm::Crc64nvme))
            .customize()
            .config_override(patient())
            .send()
            .await
            .map_err(|e| upload_error(&e))?;
        Ok(done.version_id.filter(|id| !id.is_empty()))
    }

    /// Gives an upload up. One that is not there is one that is given up.
    ///
    /// # Errors
    /// [`Error::StoreUnavailable`], [`Error::StoreRefused`].
    pub async fn abort_upload(&self, key: &ObjectKey, upload: &str) -> Result<(), Error> {
        let call = self.client.abort_multipart_upload().bucket(&self.bucket).key(key.as_str()).upload_id(upload);
        match call.send().await.map_err(|e| upload_error(&e)) {
            Ok(_) | Err(Error::UploadNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What was made under `key`.
    ///
    /// # Errors
    /// [`Error::ObjectNotFound`], [`Error::StoreUnavailable`],
    /// [`Error::StoreRefused`].
    pub async fn made(&self, key: &ObjectKey, version: Option<String>) -> Result<Made, Error> {
        let head = self.look(key, version).await?;
        let shas = [head.checksum_sha256.as_ref(), head.checksum_sha1.as_ref()];
        let crcs = [head.checksum_crc64_nvme.as_ref(), head.checksum_crc32_c.as_ref(), head.checksum_crc32.as_ref()];
        Ok(Made {
            size: head.content_length.and_then(|size| u64::try_from(size).ok()).unwrap_or_default(),
            checksum: first_sum(shas, crcs),
            // Only a composite one tells how many parts it is of.
            composite: shas.iter().chain(&crcs).flatten().any(|sum| sum.contains('-')),
            etag: head.e_tag.unwrap_or_default(),
            version_id: head.version_id.filter(|id| !id.is_empty()),
            metadata: head.metadata.unwrap_or_default().into_iter().collect(),
        })
    }
}

/// The checksum that is there, of the parts or of the whole.
fn first_sum(
    [sha256, sha1]: [Option<&String>; 2],
    [crc64nvme, crc32c, crc32]: [Option<&String>; 3],
) -> Option<Checksum> {
    // A composite checksum ends in the number of its parts.
    fn sum<const N: usize>(text: Option<&String>) -> Option<[u8; N]> {
        decode_sum(text.map(|text| text.split('-').next().unwrap_or_default()))
    }
    sum(sha256)
        .map(Checksum::Sha256)
        .or_else(|| sum(sha1).map(Checksum::Sha1))
        .or_else(|| sum(crc64nvme).map(Checksum::Crc64nvme))
        .or_else(|| sum(crc32c).map(Checksum::Crc32c))
        .or_else(|| sum(crc32).map(Checksum::Crc32))
}

/// The checksum in Base64, if it is of this algorithm.
fn of_algorithm(checksum: Option<&Checksum>, algorithm: Algorithm) -> Option<String> {
    checksum.filter(|checksum| checksum.algorithm() == algorithm).map(|checksum| checksum.header().1)
}

fn of_sdk(algorithm: Algorithm) -> ChecksumAlgorithm {
    match algorithm {
        Algorithm::Crc32 => ChecksumAlgorithm::Crc32,
        Algorithm::Crc32c => ChecksumAlgorithm::Crc32C,
        Algorithm::Crc64nvme => ChecksumAlgorithm::Crc64Nvme,
        Algorithm::Sha1 => ChecksumAlgorithm::Sha1,
        Algorithm::Sha256 => ChecksumAlgorithm::Sha256,
    }
}

fn type_of(algorithm: Algorithm) -> ChecksumType {
    if algorithm.is_composite() { ChecksumType::Composite } else { ChecksumType::FullObject }
}

/// What a failed call about an upload means to the caller of this service.
fn upload_error<E>(error: &SdkError<E, HttpResponse>) -> Error
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    let why = || error.message().unwrap_or("S3 does not say why").to_owned();
    match error.code() {
        Some("NoSuchUpload") => Error::UploadNotFound,
        Some("PreconditionFailed") => Error::ObjectExists,
        Some("ConditionalRequestConflict") => {
            Error::UploadMismatch("somebody wrote to the key or deleted it meanwhile; start another upload".into())
        }
        // The parts were looked at before: these come of a race, or of a checksum.
        Some("BadDigest" | "InvalidPart" | "InvalidPartOrder" | "EntityTooSmall") => Error::UploadMismatch(why()),
        Some("InvalidRequest") => {
            tracing::warn!(detail = chain(error), "upload refused");
            Error::UploadMismatch(why())
        }
        _ => store_error(error),
    }
}
