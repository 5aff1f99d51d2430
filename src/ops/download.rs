//! Presign a download: `GetObject`.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html>

use std::collections::BTreeMap;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::error::Error;
use crate::signer::fast::Plain;
use crate::signer::presign::{SignedRequest, Terms};

/// A download, and how a browser is to treat the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Download {
    /// The name under which a browser saves the file.
    pub filename: Option<String>,
    /// Show the file rather than save it.
    pub inline: bool,
    /// Overrides `Content-Type`.
    pub content_type: Option<String>,
    /// Overrides `Cache-Control`.
    pub cache_control: Option<String>,
    /// The version to fetch.
    pub version_id: Option<String>,
    /// Rounds the signing time down, so that the same ask gives the same URL.
    pub cache_window: Option<Duration>,
}

/// What RFC 8187 lets stand in an extended value: `attr-char`.
const EXT_VALUE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'!')
    .remove(b'#')
    .remove(b'$')
    .remove(b'&')
    .remove(b'+')
    .remove(b'-')
    .remove(b'.')
    .remove(b'^')
    .remove(b'_')
    .remove(b'`')
    .remove(b'|')
    .remove(b'~');

impl Download {
    /// The `Content-Disposition` of the answer, as RFC 6266 has it: a plain
    /// name for all clients, and the exact one for those that know RFC 8187.
    #[must_use]
    pub fn disposition(&self) -> Option<String> {
        let kind = if self.inline { "inline" } else { "attachment" };
        match &self.filename {
            None => self.inline.then(|| kind.to_owned()),
            Some(name) => {
                let plain: String = name
                    .chars()
                    .map(|c| if c.is_ascii() && !matches!(c, '"' | '\\' | '%') { c } else { '_' })
                    .collect();
                let exact = utf8_percent_encode(name, EXT_VALUE);
                Some(if plain == *name {
                    format!("{kind}; filename=\"{plain}\"")
                } else {
                    format!("{kind}; filename=\"{plain}\"; filename*=UTF-8''{exact}")
                })
            }
        }
    }

    pub(super) fn plain(&self) -> Plain {
        let mut query = vec![("x-id", "GetObject".to_owned())];
        let mut with = |name, value: &Option<String>| query.extend(value.clone().map(|value| (name, value)));
        with("response-cache-control", &self.cache_control);
        with("response-content-disposition", &self.disposition());
        with("response-content-type", &self.content_type);
        with("versionId", &self.version_id);
        Plain { method: "GET", query, headers: BTreeMap::new() }
    }

    pub(super) async fn sdk(&self, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
        let operation = terms
            .client
            .get_object()
            .bucket(terms.bucket)
            .key(terms.key.as_str())
            .set_response_content_disposition(self.disposition())
            .set_response_content_type(self.content_type.clone())
            .set_response_cache_control(self.cache_control.clone())
            .set_version_id(self.version_id.clone());
        SignedRequest::from_sdk(operation.customize().map_request(terms.tag()).presigned(terms.config()?).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dispositions_are_what_rfc_6266_has() {
        let named = |name: &str, inline| Download { filename: Some(name.into()), inline, ..Download::default() };
        for (download, expect) in [
            (Download::default(), None),
            (Download { inline: true, ..Download::default() }, Some("inline")),
            (named("plan.txt", false), Some("attachment; filename=\"plan.txt\"")),
            (named("plan.txt", true), Some("inline; filename=\"plan.txt\"")),
            (
                named("€ \"x\".txt", false),
                Some("attachment; filename=\"_ _x_.txt\"; filename*=UTF-8''%E2%82%AC%20%22x%22.txt"),
            ),
        ] {
            assert_eq!(download.disposition().as_deref(), expect);
        }
    }
}
