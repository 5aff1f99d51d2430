//! Asks S3 what it thinks of a key: signs a URL with it, and fetches that.

use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;

use crate::config::BucketSettings;
use crate::object::{Lifetime, ObjectKey};
use crate::signer::presign::{SignedRequest, Terms, chain};
use crate::signer::{Presigner, whole_seconds};

/// How long S3 may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What S3 thinks of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It verifies signatures with it. Whether the object is there, or may be
    /// read, is another question.
    Honoured,
    /// It does not know it, or not any more.
    Refused,
}

/// A way to ask.
#[derive(Clone, Debug)]
pub struct Probe {
    http: reqwest::Client,
    bucket: BucketSettings,
    key: ObjectKey,
}

impl Probe {
    /// The HTTPS client to ask with. It follows no redirect: S3's own answer counts.
    #[must_use]
    pub fn http_client() -> reqwest::Client {
        // A second time, as in tests, changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none());
        // It can only fail for want of TLS roots, and then each question says so.
        builder.build().unwrap_or_default()
    }

    /// Asks by a URL of `key`, which need not exist, in `bucket`.
    #[must_use]
    pub fn new(http: reqwest::Client, bucket: BucketSettings, key: ObjectKey) -> Self {
        Self { http, bucket, key }
    }

    /// Asks S3 once.
    ///
    /// # Errors
    /// Why there is no verdict, for the log; no URL is in it.
    pub async fn ask(&self, key: &Credentials) -> Result<Verdict, String> {
        match self.refusal(key).await?.as_deref() {
            Some("InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken") => {
                Ok(Verdict::Refused)
            }
            // It has verified the signature before it looked at what may be read.
            Some(_) | None => Ok(Verdict::Honoured),
        }
    }

    /// Whether S3 says that there is no such key. That takes no secret.
    ///
    /// # Errors
    /// As [`Probe::ask`].
    pub async fn is_unknown(&self, id: &str) -> Result<bool, String> {
        let key = Credentials::new(id, "unknown", None, None, "probe");
        Ok(self.refusal(&key).await?.as_deref() == Some("InvalidAccessKeyId"))
    }

    /// S3's error code, if it refuses a URL signed with `key`.
    async fn refusal(&self, key: &Credentials) -> Result<Option<String>, String> {
        let now = SystemTime::now();
        let Presigner { client, .. } = Presigner::new(&self.bucket, key.clone(), now);
        let start = whole_seconds(now);
        let expires = Lifetime::new(Duration::from_mins(1)).unwrap_or(Lifetime::MAX);
        let terms =
            Terms { client: &client, bucket: &self.bucket.bucket, key: &self.key, start, expires, issue_id: None };
        let get = client.get_object().bucket(terms.bucket).key(terms.key.as_str()).range("bytes=0-0");
        let config = terms.config().map_err(|e| e.to_string())?;
        let signed = SignedRequest::from_sdk(get.presigned(config).await).map_err(|e| e.to_string())?;
        let mut request = self.http.get(&signed.url).timeout(PATIENCE);
        for (name, value) in &signed.headers {
            request = request.header(name, value);
        }
        let response = request.send().await.map_err(|e| chain(&e.without_url()))?;
        let status = response.status().as_u16();
        if status >= 500 || status == 429 {
            return Err(format!("S3 answers {status}"));
        }
        if status != 403 && status != 400 {
            return Ok(None);
        }
        let body = response.text().await.map_err(|e| chain(&e.without_url()))?;
        let code = body.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>")).map(|(code, _)| code);
        Ok(Some(code.unwrap_or_default().to_owned()))
    }
}
