//! `List`: one page under a prefix.

use std::time::SystemTime;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

use super::download::Download;
use super::presign::{self, Operation, Presigned};
use crate::app::App;
use crate::caller::Caller;
use crate::error::Error;
use crate::object::{BucketName, Lifetime, ObjectKey, Prefix};
use crate::policy::Permit;
use crate::store::Entry;

/// A page, as it is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The bucket, by its name in the settings.
    pub bucket: BucketName,
    /// Only keys that begin with this.
    pub prefix: Prefix,
    /// Rolls keys up into common prefixes. Empty: none.
    pub delimiter: String,
    /// How many entries at most, 1 to 1,000.
    pub page_size: u16,
    /// Where the page begins. Empty: at the beginning.
    pub page_token: String,
    /// Presign a download of each object, for this long.
    pub download_ttl: Option<Lifetime>,
}

/// One page.
pub struct Page {
    /// The objects, each with its presigned download if that was asked for.
    pub objects: Vec<(Entry, Option<Presigned>)>,
    /// The common prefixes.
    pub common_prefixes: Vec<String>,
    /// Where the next page begins. Empty: there is none.
    pub next_page_token: String,
}

/// How many bytes of a token bind it to its listing.
const BINDING: usize = 16;

/// Fetches the page that the permit allows.
///
/// # Errors
/// [`Error::PageToken`], [`Error::UnknownBucket`], those of the store, and
/// with `download_ttl` those of [`presign::issue`].
pub async fn list(app: &App, permit: Permit<Ask>, now: SystemTime) -> Result<Page, Error> {
    let ask = permit.ask();
    let bucket = app.bucket(&ask.bucket)?;
    let from = read_token(permit.caller(), ask)?;
    let page = bucket.store.list(&ask.prefix, &ask.delimiter, ask.page_size, from).await?;
    let mut objects = Vec::with_capacity(page.objects.len());
    for (n, entry) in page.objects.into_iter().enumerate() {
        app.give_way(n).await;
        // A key that this API would refuse is listed all the same: it is there.
        let download = match (ask.download_ttl, ObjectKey::parse(entry.key.as_str())) {
            (Some(ttl), Ok(key)) => {
                let operation = Operation::Download(Download::default());
                let item = presign::Ask { bucket: ask.bucket.clone(), key, ttl: Some(ttl), operation };
                // Listed, but not granted to be downloaded: without a URL.
                let asked = (&item).into();
                let judged = app.policy.authorize(permit.caller().clone(), item);
                match judged {
                    Ok(_) => Some(presign::issue_judged(app, permit.caller().clone(), asked, judged, now).await?),
                    Err(_) => None,
                }
            }
            _ => None,
        };
        objects.push((entry, download));
    }
    let next_page_token = page.next.map(|next| make_token(permit.caller(), ask, &next)).unwrap_or_default();
    Ok(Page { objects, common_prefixes: page.common_prefixes, next_page_token })
}

/// Ties S3's continuation token to the listing that it goes on with, and to
/// whom it was given.
fn make_token(caller: &Caller, ask: &Ask, continuation: &str) -> String {
    let mut bytes = binding(caller, ask).to_vec();
    bytes.extend_from_slice(continuation.as_bytes());
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

/// S3's continuation token, if the ask's token belongs to this listing.
fn read_token(caller: &Caller, ask: &Ask) -> Result<Option<String>, Error> {
    let token = &ask.page_token;
    if token.is_empty() {
        return Ok(None);
    }
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).map_err(|_| Error::PageToken)?;
    let (bound, continuation) = bytes.split_at_checked(BINDING).ok_or(Error::PageToken)?;
    if bound != binding(caller, ask) {
        return Err(Error::PageToken);
    }
    String::from_utf8(continuation.to_vec()).map(Some).map_err(|_| Error::PageToken)
}

fn binding(caller: &Caller, ask: &Ask) -> [u8; BINDING] {
    let mut hash = Sha256::new();
    for part in [caller.as_str(), ask.bucket.as_str(), ask.prefix.as_str(), &ask.delimiter] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let hash: [u8; 32] = hash.finalize().into();
    std::array::from_fn(|n| hash[n])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_belongs_to_its_listing() {
        let ask = |bucket: &str, prefix: &str, delimiter: &str| Ask {
            bucket: BucketName::parse(bucket).unwrap(),
            prefix: Prefix::parse(prefix).unwrap(),
            delimiter: delimiter.into(),
            page_size: 9,
            page_token: String::new(),
            download_ttl: None,
        };
        let (ann, bob) = (Caller::user(1), Caller::user(2));
        let token = make_token(&ann, &ask("a", "b/", "/"), "next");
        let read = |caller, token: &str, ask: Ask| read_token(caller, &Ask { page_token: token.into(), ..ask });
        assert_eq!(read(&ann, &token, ask("a", "b/", "/")).unwrap().as_deref(), Some("next"));
        for other in [ask("c", "b/", "/"), ask("a", "b", "/"), ask("a", "b/", ""), ask("a", "b", "//")] {
            assert!(matches!(read(&ann, &token, other), Err(Error::PageToken)));
        }
        assert!(matches!(read(&bob, &token, ask("a", "b/", "/")), Err(Error::PageToken)));
        for wrong in ["x", "not base64!", "AAAA"] {
            assert!(matches!(read(&ann, wrong, ask("a", "b/", "/")), Err(Error::PageToken)));
        }
    }
}
