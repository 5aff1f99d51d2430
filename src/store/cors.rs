//! What a browser needs before a page of another origin may use URLs of this
//! service: a CORS rule of the bucket.
//! <https://docs.aws.amazon.com/AmazonS3/latest/userguide/ManageCorsUsing.html>

use std::fmt;
use std::str::FromStr;

use aws_sdk_s3::error::ProvideErrorMetadata as _;
use aws_sdk_s3::types::{CorsConfiguration, CorsRule};

use super::{Store, store_error};
use crate::error::Error;

/// The methods that URLs are signed for.
pub const METHODS: [&str; 5] = ["GET", "PUT", "POST", "HEAD", "DELETE"];
/// The headers of an answer that a page may read: an upload in parts is
/// completed with their `ETag`s.
pub const EXPOSED: [&str; 7] = [
    "ETag",
    "x-amz-version-id",
    "x-amz-checksum-crc32",
    "x-amz-checksum-crc32c",
    "x-amz-checksum-crc64nvme",
    "x-amz-checksum-sha1",
    "x-amz-checksum-sha256",
];
/// How long a browser may remember what it was told, in seconds.
pub const MAX_AGE: i32 = 3000;
/// The id of this service's rule among those of a bucket.
pub const RULE: &str = "fileaccess";

/// The origin of a page: `https://HOST[:PORT]`, where one `*` stands for any
/// text, as S3 has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(String);

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        let fits = host.is_some_and(|host| {
            let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.:[]*".contains(&b);
            !host.is_empty() && host.bytes().all(allowed) && host.matches('*').count() <= 1 && host != "*"
        });
        if fits {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "`{text}` is no origin; write it like `https://app.example.com`, in lower case and without a path; \
             one `*` may stand for a part of the host"
        ))
    }
}

impl Origin {
    /// The text, as browsers send it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Store {
    /// Lets pages of these origins use the bucket's URLs: puts a rule of this
    /// service's own in front of those that the bucket has, or replaces it.
    /// Says whether anything was changed.
    ///
    /// # Errors
    /// [`Error::StoreUnavailable`], [`Error::StoreRefused`].
    pub async fn allow_origins(&self, origins: &[Origin]) -> Result<bool, Error> {
        let had = match self.client.get_bucket_cors().bucket(&self.bucket).send().await {
            Ok(had) => had.cors_rules.unwrap_or_default(),
            Err(e) if e.code() == Some("NoSuchCORSConfiguration") => Vec::new(),
            Err(e) => return Err(store_error(&e)),
        };
        let mut rules = vec![rule(origins)?];
        rules.extend(had.iter().filter(|rule| rule.id() != Some(RULE)).cloned());
        if rules == had {
            return Ok(false);
        }
        let rules = CorsConfiguration::builder().set_cors_rules(Some(rules)).build().map_err(refused)?;
        let put = self.client.put_bucket_cors().bucket(&self.bucket).cors_configuration(rules);
        put.send().await.map_err(|e| store_error(&e))?;
        Ok(true)
    }
}

fn rule(origins: &[Origin]) -> Result<CorsRule, Error> {
    let texts = |texts: &[&str]| Some(texts.iter().map(|&text| text.to_owned()).collect());
    CorsRule::builder()
        .id(RULE)
        .set_allowed_origins(Some(origins.iter().map(Origin::to_string).collect()))
        .set_allowed_methods(texts(&METHODS))
        .allowed_headers("*")
        .set_expose_headers(texts(&EXPOSED))
        .max_age_seconds(MAX_AGE)
        .build()
        .map_err(refused)
}

fn refused(error: impl fmt::Display) -> Error {
    Error::StoreRefused { detail: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_what_a_browser_sends() {
        for good in ["https://app.example.com", "http://127.0.0.1:8080", "http://[::1]:1", "https://*.example.com"] {
            assert_eq!(good.parse::<Origin>().unwrap().as_str(), good);
        }
        for wrong in ["*", "https://*", "https://", "app.example.com", "https://a.test/", "https://A.test", "null", ""]
        {
            let said = wrong.parse::<Origin>().unwrap_err();
            assert!(said.starts_with(&format!("`{wrong}` is no origin")), "{said}");
        }
        assert!("https://*.*.test".parse::<Origin>().is_err());
    }
}
