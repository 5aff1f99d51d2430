//! Presign an upload: `PutObject`.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html>

use std::collections::BTreeMap;

use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::types::{ServerSideEncryption, StorageClass};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use crate::error::Error;
use crate::signer::fast::Plain;
use crate::signer::presign::{SignedRequest, Terms};

/// An upload in one request. All that is given here is signed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upload {
    /// The media type.
    pub content_type: Option<String>,
    /// The exact size, in bytes.
    pub content_length: Option<u64>,
    /// The checksum of the body.
    pub checksum: Option<Checksum>,
    /// Refuse to overwrite.
    pub create_only: bool,
    /// User metadata, without `x-amz-meta-`.
    pub metadata: BTreeMap<String, String>,
    /// Object tags.
    pub tags: BTreeMap<String, String>,
    /// Stored `Cache-Control`.
    pub cache_control: Option<String>,
    /// Stored `Content-Disposition`.
    pub content_disposition: Option<String>,
    /// Storage class.
    pub storage_class: Option<StorageClass>,
    /// Encryption at rest.
    pub encryption: Option<Encryption>,
}

/// A checksum of a whole object, as raw bytes.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html>
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// CRC-32.
    Crc32([u8; 4]),
    /// CRC-32C.
    Crc32c([u8; 4]),
    /// CRC-64/NVME.
    Crc64nvme([u8; 8]),
    /// SHA-1.
    Sha1([u8; 20]),
    /// SHA-256.
    Sha256([u8; 32]),
}

/// An algorithm of checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Algorithm {
    /// CRC-32.
    Crc32,
    /// CRC-32C.
    Crc32c,
    /// CRC-64/NVME.
    Crc64nvme,
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
}

impl Algorithm {
    /// Whether the checksum of an object uploaded in parts is one of the parts'
    /// checksums. CRCs are of the full object.
    #[must_use]
    pub fn is_composite(self) -> bool {
        matches!(self, Self::Sha1 | Self::Sha256)
    }

    /// Its name, as the API's fields and the audit trail have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Crc32 => "crc32",
            Self::Crc32c => "crc32c",
            Self::Crc64nvme => "crc64nvme",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
        }
    }
}

impl Checksum {
    /// Its algorithm.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        match self {
            Self::Crc32(_) => Algorithm::Crc32,
            Self::Crc32c(_) => Algorithm::Crc32c,
            Self::Crc64nvme(_) => Algorithm::Crc64nvme,
            Self::Sha1(_) => Algorithm::Sha1,
            Self::Sha256(_) => Algorithm::Sha256,
        }
    }

    /// As a header of `PutObject`: its name, and its value in Base64.
    #[must_use]
    pub fn header(&self) -> (&'static str, String) {
        let base64 = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
        match self {
            Self::Crc32(sum) => ("x-amz-checksum-crc32", base64(sum)),
            Self::Crc32c(sum) => ("x-amz-checksum-crc32c", base64(sum)),
            Self::Crc64nvme(sum) => ("x-amz-checksum-crc64nvme", base64(sum)),
            Self::Sha1(sum) => ("x-amz-checksum-sha1", base64(sum)),
            Self::Sha256(sum) => ("x-amz-checksum-sha256", base64(sum)),
        }
    }
}

/// Encryption at rest.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/serv-side-encryption.html>
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// SSE-S3.
    S3,
    /// SSE-KMS.
    Kms {
        /// The key's id or ARN; `None` is the account's `aws/s3` key.
        key_id: Option<String>,
        /// Use an S3 Bucket Key.
        bucket_key: bool,
    },
}

impl Upload {
    pub(super) fn plain(&self) -> Plain {
        let mut headers = BTreeMap::new();
        let mut with = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                headers.insert(name.to_owned(), value);
            }
        };
        with("content-type", self.content_type.clone());
        with("content-length", self.content_length.map(|length| length.to_string()));
        with("if-none-match", self.create_only.then(|| "*".to_owned()));
        with("cache-control", self.cache_control.clone());
        with("content-disposition", self.content_disposition.clone());
        with("x-amz-storage-class", self.storage_class.as_ref().map(|class| class.as_str().to_owned()));
        with("x-amz-tagging", (!self.tags.is_empty()).then(|| tagging(&self.tags)));
        if let Some(checksum) = &self.checksum {
            let (name, sum) = checksum.header();
            with(name, Some(sum));
        }
        match &self.encryption {
            None => {}
            Some(Encryption::S3) => with("x-amz-server-side-encryption", Some("AES256".to_owned())),
            Some(Encryption::Kms { key_id, bucket_key }) => {
                with("x-amz-server-side-encryption", Some("aws:kms".to_owned()));
                with("x-amz-server-side-encryption-aws-kms-key-id", key_id.clone());
                with("x-amz-server-side-encryption-bucket-key-enabled", bucket_key.then(|| "true".to_owned()));
            }
        }
        for (name, value) in &self.metadata {
            with(&format!("x-amz-meta-{name}"), Some(value.clone()));
        }
        Plain { method: "PUT", query: vec![("x-id", "PutObject".to_owned())], headers }
    }

    pub(super) async fn sdk(&self, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
        let length = self.content_length.map(i64::try_from).transpose();
        let length = length.map_err(|_| Error::internal("content_length was not checked"))?;
        let mut operation = terms
            .client
            .put_object()
            .bucket(terms.bucket)
            .key(terms.key.as_str())
            .set_content_type(self.content_type.clone())
            .set_content_length(length)
            .set_if_none_match(self.create_only.then(|| "*".to_owned()))
            .set_cache_control(self.cache_control.clone())
            .set_content_disposition(self.content_disposition.clone())
            .set_storage_class(self.storage_class.clone());
        for (name, value) in &self.metadata {
            operation = operation.metadata(name, value);
        }
        if !self.tags.is_empty() {
            operation = operation.tagging(tagging(&self.tags));
        }
        operation = self.with_checksum(operation);
        operation = self.with_encryption(operation);
        SignedRequest::from_sdk(operation.customize().map_request(terms.tag()).presigned(terms.config()?).await)
    }

    /// By value: an algorithm without a value would bind nothing.
    fn with_checksum(&self, operation: PutObjectFluentBuilder) -> PutObjectFluentBuilder {
        let Some(checksum) = &self.checksum else { return operation };
        let (_, sum) = checksum.header();
        match checksum {
            Checksum::Crc32(_) => operation.checksum_crc32(sum),
            Checksum::Crc32c(_) => operation.checksum_crc32_c(sum),
            Checksum::Crc64nvme(_) => operation.checksum_crc64_nvme(sum),
            Checksum::Sha1(_) => operation.checksum_sha1(sum),
            Checksum::Sha256(_) => operation.checksum_sha256(sum),
        }
    }

    fn with_encryption(&self, operation: PutObjectFluentBuilder) -> PutObjectFluentBuilder {
        match &self.encryption {
            None => operation,
            Some(Encryption::S3) => operation.server_side_encryption(ServerSideEncryption::Aes256),
            Some(Encryption::Kms { key_id, bucket_key }) => operation
                .server_side_encryption(ServerSideEncryption::AwsKms)
                .set_ssekms_key_id(key_id.clone())
                .set_bucket_key_enabled(bucket_key.then_some(true)),
        }
    }
}

/// Tags as `x-amz-tagging` has them: URL query parameters.
pub(crate) fn tagging(tags: &BTreeMap<String, String>) -> String {
    let encode = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
    let pairs: Vec<_> = tags.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
    pairs.join("&")
}
