//! A presigned URL, read back: what can be told of it without asking anybody.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html>

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use percent_encoding::percent_decode_str;
use ulid::Ulid;

use super::presign::ISSUE_ID;

/// A presigned URL without its signature: what is kept of it opens nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedUrl {
    /// What stands before the query, as it stands there.
    pub location: String,
    /// The access key id: the first part of the credential scope.
    pub access_key_id: String,
    /// When it was signed.
    pub signed_at: SystemTime,
    /// When S3 begins to refuse it.
    pub expires_at: SystemTime,
    /// The HTTP method, as far as `x-id` tells it. The SDK gives it for each
    /// operation but HEAD.
    pub method: &'static str,
    /// Our own mark.
    pub issue_id: Option<Ulid>,
    /// The version of the object.
    pub version_id: Option<String>,
}

/// What a URL must be, to be read.
pub const WANT: &str = "be a presigned URL, with its `X-Amz-Credential`, `X-Amz-Date` and `X-Amz-Expires`";

impl SignedUrl {
    /// Reads `url`, whose signature may be cut off. What is repeated or not
    /// decodable is no URL that this service has made.
    ///
    /// # Errors
    /// [`WANT`]: what would be right.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        let (location, query) = url.split_once('?').ok_or(WANT)?;
        let get = |name: &str| -> Result<Option<Cow<'_, str>>, &'static str> {
            let mut values = query.split('&').filter_map(|pair| pair.split_once('=')).filter(|(n, _)| *n == name);
            let value = values.next().map(|(_, value)| percent_decode_str(value).decode_utf8());
            if values.next().is_some() { Err(WANT) } else { value.transpose().map_err(|_| WANT) }
        };
        let need = |name: &str| get(name)?.ok_or(WANT);
        let credential = need("X-Amz-Credential")?;
        let (access_key_id, _) = credential.split_once('/').ok_or(WANT)?;
        if access_key_id.is_empty() || !access_key_id.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(WANT);
        }
        let signed_at = parse_date(&need("X-Amz-Date")?).ok_or(WANT)?;
        let seconds = need("X-Amz-Expires")?.parse::<u32>().map_err(|_| WANT)?;
        let method = match get("x-id")?.as_deref() {
            Some("GetObject") => "GET",
            Some("PutObject" | "UploadPart") => "PUT",
            Some("DeleteObject") => "DELETE",
            None => "HEAD",
            Some(_) => "",
        };
        Ok(Self {
            location: location.to_owned(),
            access_key_id: access_key_id.to_owned(),
            signed_at,
            expires_at: signed_at + Duration::from_secs(seconds.into()),
            method,
            issue_id: get(ISSUE_ID)?.and_then(|id| Ulid::from_string(&id).ok()),
            version_id: get("versionId")?.map(Cow::into_owned),
        })
    }
}

/// `20261124T105752Z`, ISO 8601 as `SigV4` writes it.
fn parse_date(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    if bytes.len() != 16 || !text.is_ascii() {
        return None;
    }
    let part = |range| text.get(range).unwrap_or_default();
    let (date, time) = ([part(0..4), part(4..6), part(6..8)], [part(9..11), part(11..13), part(13..15)]);
    if part(8..9) != "T" || part(15..16) != "Z" {
        return None;
    }
    humantime::parse_rfc3339(&format!("{}T{}Z", date.join("-"), time.join(":"))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "https://b.s3.amazonaws.com/a%20b?versionId=v%2F1&x-id=GetObject&x-issue-id=01M86K8YRD4WKF7R0AMGDZYCGX\
        &X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA1%2F20261124%2Fus-east-1%2Fs3%2Faws4_request\
        &X-Amz-Date=20261124T105752Z&X-Amz-Expires=900&X-Amz-SignedHeaders=host";

    #[test]
    fn a_url_is_read_with_or_without_its_signature() {
        let read = SignedUrl::parse(URL).unwrap();
        assert_eq!(read.location, "https://b.s3.amazonaws.com/a%20b");
        assert_eq!((read.access_key_id.as_str(), read.method), ("AKIA1", "GET"));
        assert_eq!(humantime::format_rfc3339(read.signed_at).to_string(), "2026-11-24T10:57:52Z");
        assert_eq!(read.expires_at.duration_since(read.signed_at).unwrap(), Duration::from_mins(15));
        assert_eq!(read.issue_id.unwrap().to_string(), "01M86K8YRD4WKF7R0AMGDZYCGX");
        assert_eq!(read.version_id.as_deref(), Some("v/1"));
        let whole = SignedUrl::parse(&format!("{URL}&X-Amz-Signature=abc")).unwrap();
        assert_eq!(whole, read);
        assert!(!format!("{whole:?}").contains("abc"), "what is kept opens nothing");
    }

    #[test]
    fn what_is_no_such_url_is_refused() {
        let without = |name: &str| URL.split('&').filter(|pair| !pair.starts_with(name)).collect::<Vec<_>>().join("&");
        for wrong in [
            String::new(),
            "https://b/k".into(),
            "https://b/k?a=b".into(),
            without("X-Amz-Credential"),
            without("X-Amz-Date"),
            without("X-Amz-Expires"),
            URL.replace("AKIA1%2F", "%2F"),
            URL.replace("AKIA1%2F", "AKIA%20%2F"),
            URL.replace("20261124T105752Z", "20261324T105752Z"),
            URL.replace("20261124T105752Z", "2026-11-24T10:57"),
            URL.replace("Expires=900", "Expires=-1"),
            format!("{URL}&X-Amz-Credential=AKIA2%2Fx"),
        ] {
            assert_eq!(SignedUrl::parse(&wrong), Err(WANT), "{wrong}");
        }
    }
}
