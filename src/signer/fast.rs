//! The SDK's own signature without the SDK's machinery around it.
//!
//! Most of the time of `presigned()` goes into what a presigned URL has no use
//! for: retries, endpoint rules, interceptors. Here a request is written down
//! as the SDK would, and signed by the SDK's own `aws-sigv4`.
//!
//! INVARIANT: byte for byte the SDK's answer. Property tests hold it to that,
//! and so does every replica while it runs: when a key is taken up, and again
//! for one call in 1,024. A difference is logged as an error, answered
//! with what the SDK says, and ends the use of this path for that key.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use aws_credential_types::Credentials;
use aws_sigv4::http_request::{
    PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings, UriPathNormalizationMode,
    sign,
};
use aws_sigv4::sign::v4;
use aws_smithy_http::label::{self, EncodingStrategy};
use aws_smithy_http::query;
use aws_smithy_runtime_api::client::identity::Identity;
use futures_util::FutureExt as _;

use super::presign::{ISSUE_ID, SignedRequest, Terms, chain};
use crate::error::Error;
use crate::object::ObjectKey;

/// How often a running replica compares with the SDK.
const CHECK_EVERY: u32 = 1024;

/// A request as the SDK would write it, apart from bucket, key and signature.
#[derive(Clone, Debug)]
pub struct Plain {
    /// The HTTP method.
    pub method: &'static str,
    /// The query parameters, in the SDK's order.
    pub query: Vec<(&'static str, String)>,
    /// The headers, all of which are signed.
    pub headers: BTreeMap<String, String>,
}

/// Signs for one bucket with one key.
#[derive(Debug)]
pub struct Fast {
    /// The URL up to the object's key, as the SDK's endpoint rules have it.
    base: String,
    region: String,
    identity: Identity,
    trusted: AtomicBool,
    calls: AtomicU32,
}

impl Fast {
    /// Learns the bucket's URL from the SDK. `None` if the SDK's answer can't be
    /// matched: then it has to be asked each time.
    pub fn learn(region: &str, credentials: Credentials, terms: &Terms<'_>) -> Option<Self> {
        let head = terms.client.head_object().bucket(terms.bucket).key(terms.key.as_str());
        // It does no I/O, so that it is ready at once.
        let presigned = head.presigned(terms.config().ok()?).now_or_never()?;
        let sdk = SignedRequest::from_sdk(presigned).ok()?;
        let path = format!("/{}?", terms.key.as_str());
        let (base, _) = sdk.url.split_once(&path)?;
        let fast = Self {
            base: format!("{base}/"),
            region: region.to_owned(),
            identity: credentials.into(),
            trusted: AtomicBool::new(true),
            calls: AtomicU32::new(0),
        };
        let plain = Plain { method: "HEAD", query: Vec::new(), headers: BTreeMap::new() };
        let same = fast.sign(plain, terms).is_ok_and(|signed| signed == sdk);
        if !same {
            tracing::error!(bucket = terms.bucket, "the SDK signs differently; it will be asked each time");
        }
        same.then_some(fast)
    }

    /// The bucket's URL, to which an encoded key is appended.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Whether this may be used.
    #[must_use]
    pub fn trusted(&self) -> bool {
        self.trusted.load(Ordering::Relaxed)
    }

    /// Whether this call is one to compare with the SDK.
    #[must_use]
    pub fn due(&self) -> bool {
        self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECK_EVERY)
    }

    /// Takes the SDK's word where the two differ, and asks it from then on.
    #[must_use]
    pub fn reconcile(&self, fast: SignedRequest, sdk: SignedRequest) -> SignedRequest {
        if fast == sdk {
            return fast;
        }
        tracing::error!(base = self.base, "the SDK signs differently; it will be asked each time");
        self.trusted.store(false, Ordering::Relaxed);
        sdk
    }

    /// Signs `plain`.
    ///
    /// # Errors
    /// [`Error::Internal`] if `aws-sigv4` refuses.
    pub fn sign(&self, plain: Plain, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
        let internal = |e: &dyn std::error::Error| Error::internal(format!("signing: {}", chain(e)));
        let Plain { method, query, headers } = plain;
        let mut url = String::with_capacity(self.base.len() + terms.key.as_str().len() + 640);
        url.push_str(&self.base);
        url.push_str(&encode(terms.key));
        let mut writer = query::Writer::new(&mut url);
        let mut any = false;
        for (name, value) in &query {
            writer.push_kv(name, &query::fmt_string(value));
            any = true;
        }
        if let Some(id) = terms.issue_id {
            writer.push_kv(ISSUE_ID, id.array_to_str(&mut [0; ulid::ULID_LEN]));
            any = true;
        }

        let mut settings = SigningSettings::default();
        settings.percent_encoding_mode = PercentEncodingMode::Single;
        settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
        settings.signature_location = SignatureLocation::QueryParams;
        settings.expires_in = Some(terms.expires.into());
        let params = v4::SigningParams::builder()
            .identity(&self.identity)
            .region(&self.region)
            .name("s3")
            .time(terms.start)
            .settings(settings)
            .build()
            .map_err(|e| internal(&e))?
            .into();
        let signable = SignableRequest::new(
            method,
            url.as_str(),
            headers.iter().map(|(name, value)| (name.as_str(), value.as_str())),
            SignableBody::UnsignedPayload,
        )
        .map_err(|e| internal(&e))?;
        let (instructions, _) = sign(signable, &params).map_err(|e| internal(&e))?.into_parts();
        for (name, value) in instructions.params() {
            url.push(if any { '&' } else { '?' });
            any = true;
            url.push_str(name);
            url.push('=');
            url.push_str(&query::fmt_string(value));
        }
        Ok(SignedRequest { method: method.to_owned(), url, headers })
    }
}

/// A key as it stands in the path of a URL.
fn encode(key: &ObjectKey) -> String {
    label::fmt_string(key.as_str(), EncodingStrategy::Greedy)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::object::Lifetime;
    use crate::signer::client_config;

    /// The example that AWS publishes.
    /// <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html>
    #[test]
    fn it_signs_as_in_the_example_of_aws() {
        let secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
        let fast = Fast {
            base: "https://examplebucket.s3.amazonaws.com/".into(),
            region: "us-east-1".into(),
            identity: Credentials::new("AKIAIOSFODNN7EXAMPLE", secret, None, None, "example").into(),
            trusted: AtomicBool::new(true),
            calls: AtomicU32::new(0),
        };
        let key = ObjectKey::parse("test.txt").unwrap();
        let settings = toml::from_str("bucket = 'examplebucket'\nregion = 'us-east-1'").unwrap();
        let terms = Terms {
            client: &aws_sdk_s3::Client::from_conf(client_config(&settings).build()),
            bucket: "examplebucket",
            key: &key,
            // 2013-05-24T00:00:00Z.
            start: SystemTime::UNIX_EPOCH + Duration::from_hours(380_376),
            expires: Lifetime::new(Duration::from_hours(24)).unwrap(),
            issue_id: None,
        };
        let plain = Plain { method: "GET", query: Vec::new(), headers: BTreeMap::new() };
        let signed = fast.sign(plain, &terms).unwrap();
        let signature = "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404";
        assert!(signed.url.ends_with(&format!("&X-Amz-Signature={signature}")), "{}", signed.url);
    }
}
