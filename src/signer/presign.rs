//! One SDK operation to one presigned request.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html>

use std::collections::BTreeMap;
use std::time::SystemTime;

use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::http::HttpError;
use percent_encoding::percent_decode_str;
use ulid::Ulid;

use crate::error::Error;
use crate::object::{Lifetime, ObjectKey};

/// The signed query parameter that leads a URL back to whoever asked for it.
/// S3 ignores query parameters that begin with `x-` but logs them.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/LogFormat.html#LogFormatCustom>
pub const ISSUE_ID: &str = "x-issue-id";

/// What is signed, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// The SDK's client of the bucket, with the key.
    pub client: &'a aws_sdk_s3::Client,
    /// The bucket's name in S3.
    pub bucket: &'a str,
    /// The object's key.
    pub key: &'a ObjectKey,
    /// The signing time, in whole seconds.
    pub start: SystemTime,
    /// How long the URL is good from `start` on.
    pub expires: Lifetime,
    /// Goes into the URL as [`ISSUE_ID`].
    pub issue_id: Option<Ulid>,
}

/// A request that its holder may send.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedRequest {
    /// The HTTP method.
    pub method: String,
    /// The URL: a bearer secret.
    pub url: String,
    /// Headers that must be sent as they are. All are signed.
    pub headers: BTreeMap<String, String>,
}

impl Terms<'_> {
    /// The SDK's side of `start` and `expires`.
    ///
    /// # Errors
    /// None that a [`Lifetime`] can cause.
    pub fn config(&self) -> Result<PresigningConfig, Error> {
        PresigningConfig::builder()
            .start_time(self.start)
            .expires_in(self.expires.into())
            .build()
            .map_err(|e| Error::internal(format!("presigning config: {e}")))
    }

    /// Puts [`ISSUE_ID`] into a request before it is signed.
    pub fn tag(&self) -> impl Fn(HttpRequest) -> Result<HttpRequest, HttpError> + Send + Sync + 'static {
        let issue_id = self.issue_id;
        move |mut request| {
            if let Some(id) = issue_id {
                let uri = request.uri();
                let mut tagged = String::with_capacity(uri.len() + 40);
                tagged.push_str(uri);
                tagged.push(if uri.contains('?') { '&' } else { '?' });
                tagged.push_str(ISSUE_ID);
                tagged.push('=');
                tagged.push_str(id.array_to_str(&mut [0; ulid::ULID_LEN]));
                request.set_uri(tagged)?;
            }
            Ok(request)
        }
    }
}

impl SignedRequest {
    /// Takes over what the SDK has signed.
    ///
    /// INVARIANT: `headers` is exactly what is signed, `host` apart. A header
    /// that the SDK would send unsigned never gets here.
    ///
    /// # Errors
    /// [`Error::Internal`] if the SDK fails, or signs a header without giving it.
    pub fn from_sdk<E: std::error::Error>(presigned: Result<PresignedRequest, E>) -> Result<Self, Error> {
        let presigned = presigned.map_err(|e| Error::internal(format!("presigning: {}", chain(&e))))?;
        let url = presigned.uri();
        let signed = url
            .split_once('?')
            .and_then(|(_, query)| query.split('&').find_map(|pair| pair.strip_prefix("X-Amz-SignedHeaders=")))
            .ok_or_else(|| Error::internal("the SDK's URL has no X-Amz-SignedHeaders"))?;
        let mut headers = BTreeMap::new();
        for name in percent_decode_str(signed).decode_utf8_lossy().split(';').filter(|name| *name != "host") {
            let value = presigned.headers().find_map(|(n, value)| n.eq_ignore_ascii_case(name).then_some(value));
            let value = value.ok_or_else(|| Error::internal(format!("the SDK signed `{name}` without giving it")))?;
            headers.insert(name.to_owned(), value.to_owned());
        }
        Ok(Self { method: presigned.method().to_owned(), url: url.to_owned(), headers })
    }
}

/// An error with its sources, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text.push_str(": ");
        text.push_str(&e.to_string());
        source = e.source();
    }
    text
}
