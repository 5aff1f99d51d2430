//! The S3 calls that are not presigning, made with the service's own identity.

pub mod copy;
pub mod cors;
pub mod multipart;
pub mod versions;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::types::{ChecksumMode, ChecksumType, EncodingType};
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::percent_decode_str;

use self::copy::CopyLimits;
use crate::config::BucketSettings;
use crate::error::Error;
use crate::object::{ObjectKey, Prefix};
use crate::ops::upload::Checksum;
use crate::signer::client_config;
use crate::signer::presign::chain;

/// The HTTPS client of all calls to AWS.
#[must_use]
pub fn http_client() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new().tls_provider(Provider::rustls(CryptoMode::Ring)).build_https()
}

/// One bucket, seen with the service's own identity.
pub struct Store {
    client: aws_sdk_s3::Client,
    bucket: String,
    copy_limits: CopyLimits,
}

/// One object of a listing.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its key, which may be one that this API would refuse.
    pub key: String,
    /// Its size in bytes.
    pub size: i64,
    /// Its `ETag`, quotation marks included.
    pub etag: String,
    /// When it was last written.
    pub last_modified: Option<SystemTime>,
    /// Its storage class.
    pub storage_class: String,
}

/// One page of a listing, as S3 gives it.
pub struct Listed {
    /// The objects.
    pub objects: Vec<Entry>,
    /// The common prefixes.
    pub common_prefixes: Vec<String>,
    /// S3's continuation token.
    pub next: Option<String>,
}

/// The facts of one object.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its size in bytes.
    pub size: i64,
    /// Its `ETag`, quotation marks included.
    pub etag: String,
    /// When it was last written.
    pub last_modified: Option<SystemTime>,
    /// Its media type.
    pub content_type: String,
    /// The checksum of the whole object, if S3 keeps one.
    pub checksum: Option<Checksum>,
    /// Its version.
    pub version_id: String,
    /// Its user metadata.
    pub metadata: BTreeMap<String, String>,
    /// Its storage class.
    pub storage_class: String,
}

impl Store {
    /// Access to `bucket` with the service's own identity. Opens nothing yet.
    #[must_use]
    pub fn new(bucket: &BucketSettings, identity: SharedCredentialsProvider) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(2))
            .operation_attempt_timeout(Duration::from_secs(10))
            .build();
        let config = client_config(bucket)
            .credentials_provider(identity)
            .http_client(http_client())
            .retry_config(RetryConfig::standard().with_max_attempts(3))
            .timeout_config(timeouts)
            .build();
        Self {
            client: aws_sdk_s3::Client::from_conf(config),
            bucket: bucket.bucket.clone(),
            copy_limits: CopyLimits::default(),
        }
    }

    /// The same access, with other limits for its copies.
    #[must_use]
    pub fn with_copy_limits(self, copy_limits: CopyLimits) -> Self {
        Self { copy_limits, ..self }
    }

    /// One page under `prefix`, from S3's continuation token `from` on.
    ///
    /// # Errors
    /// [`Error::StoreUnavailable`], [`Error::StoreRefused`].
    pub async fn list(
        &self,
        prefix: &Prefix,
        delimiter: &str,
        page_size: u16,
        from: Option<String>,
    ) -> Result<Listed, Error> {
        let page = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(prefix.as_str())
            .set_delimiter((!delimiter.is_empty()).then(|| delimiter.to_owned()))
            .max_keys(page_size.into())
            .set_continuation_token(from)
            // XML can't carry every key as it is.
            .encoding_type(EncodingType::Url)
            .send()
            .await
            .map_err(|e| store_error(&e))?;
        let encoded = page.encoding_type() == Some(&EncodingType::Url);
        let decode = |text: &str| if encoded { url_decode(text) } else { text.to_owned() };
        let objects = page
            .contents()
            .iter()
            .map(|object| Entry {
                key: decode(object.key().unwrap_or_default()),
                size: object.size().unwrap_or_default(),
                etag: object.e_tag().unwrap_or_default().to_owned(),
                last_modified: object.last_modified().and_then(|time| (*time).try_into().ok()),
                storage_class: object.storage_class().map(|class| class.as_str().to_owned()).unwrap_or_default(),
            })
            .collect();
        let common_prefixes = page.common_prefixes().iter().filter_map(|p| p.prefix().map(decode)).collect();
        let next = page.is_truncated().unwrap_or_default().then_some(page.next_continuation_token).flatten();
        Ok(Listed { objects, common_prefixes, next })
    }

    /// The facts of one object.
    ///
    /// # Errors
    /// [`Error::ObjectNotFound`], [`Error::StoreUnavailable`],
    /// [`Error::StoreRefused`].
    pub async fn head(&self, key: &ObjectKey, version_id: Option<String>) -> Result<Facts, Error> {
        Ok(Facts::of(&self.look(key, version_id).await?))
    }

    async fn look(&self, key: &ObjectKey, version_id: Option<String>) -> Result<HeadObjectOutput, Error> {
        self.client
            .head_object()
            .bucket(&self.bucket)
            .key(key.as_str())
            .set_version_id(version_id)
            .checksum_mode(ChecksumMode::Enabled)
            .send()
            .await
            .map_err(|e| store_error(&e))
    }
}

impl Facts {
    fn of(head: &HeadObjectOutput) -> Self {
        // S3 leaves the type out for checksums from before it had types: those
        // of a multipart object end in `-PARTS`, and don't decode.
        let whole = head.checksum_type() != Some(&ChecksumType::Composite);
        Self {
            size: head.content_length().unwrap_or_default(),
            etag: head.e_tag().unwrap_or_default().to_owned(),
            last_modified: head.last_modified().and_then(|time| (*time).try_into().ok()),
            content_type: head.content_type().unwrap_or_default().to_owned(),
            checksum: if whole {
                decode_sum(head.checksum_sha256())
                    .map(Checksum::Sha256)
                    .or_else(|| decode_sum(head.checksum_sha1()).map(Checksum::Sha1))
                    .or_else(|| decode_sum(head.checksum_crc64_nvme()).map(Checksum::Crc64nvme))
                    .or_else(|| decode_sum(head.checksum_crc32_c()).map(Checksum::Crc32c))
                    .or_else(|| decode_sum(head.checksum_crc32()).map(Checksum::Crc32))
            } else {
                None
            },
            // Objects from before versioning have the version `null`.
            version_id: head.version_id().unwrap_or_default().to_owned(),
            metadata: head.metadata().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect(),
            storage_class: head.storage_class().map(|class| class.as_str().to_owned()).unwrap_or_default(),
        }
    }
}

fn decode_sum<const N: usize>(sum: Option<&str>) -> Option<[u8; N]> {
    BASE64_STANDARD.decode(sum?).ok()?.try_into().ok()
}

/// What `encoding-type=url` does, undone: form encoding, where `+` is a space.
fn url_decode(text: &str) -> String {
    percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
}

/// Whether the store has no such call.
fn not_implemented<E>(error: &SdkError<E, HttpResponse>) -> bool {
    error.raw_response().is_some_and(|response| response.status().as_u16() == 501)
}

/// What a failed call to S3 means to the caller of this service.
fn store_error<E>(error: &SdkError<E, HttpResponse>) -> Error
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    let detail = chain(error);
    let Some(response) = error.raw_response() else { return Error::StoreUnavailable { detail } };
    match (response.status().as_u16(), error.code()) {
        // Wrong settings, not a missing object.
        (404, Some("NoSuchBucket")) => Error::StoreRefused { detail },
        (404, _) => Error::ObjectNotFound,
        // Only copies and their clean-up set conditions.
        (412, _) | (409, Some("ConditionalRequestConflict")) => Error::SourceChanged { kept: None },
        (429 | 500.., _) => Error::StoreUnavailable { detail },
        _ => Error::StoreRefused { detail },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_keys_are_decoded_as_forms_are() {
        assert_eq!(url_decode("a+b%2Bc%20d%25%F0%9F%A6%80"), "a b+c d%🦀");
    }
}
