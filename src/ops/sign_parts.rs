//! `SignParts`: URLs for parts, on demand: `UploadPart`.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_UploadPart.html>

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::presign::{self, Operation, Presigned};
use super::upload::{Algorithm, Checksum};
use super::upload_token::Session;
use crate::app::App;
use crate::caller::Caller;
use crate::error::Error;
use crate::object::Lifetime;
use crate::policy::Permit;
use crate::signer::fast::Plain;
use crate::signer::presign::{SignedRequest, Terms};

/// One part of an upload. Its exact length is signed.
#[derive(Clone, Debug)]
pub struct Part {
    /// The upload.
    pub session: Arc<Session>,
    /// Its number, from 1.
    pub number: u32,
    /// The checksum of its bytes.
    pub checksum: Option<Checksum>,
}

impl Part {
    /// A part of `session`.
    ///
    /// # Errors
    /// [`Error::Invalid`]: there is no such part, or the checksum is not what
    /// the upload asks for.
    pub fn new(session: &Arc<Session>, number: i32, checksum: Option<Checksum>) -> Result<Self, Error> {
        let part = u32::try_from(number).ok().filter(|number| session.plan.length(*number).is_some());
        let count = session.plan.count();
        let number =
            part.ok_or_else(|| Error::invalid("parts.part_number", format!("be 1 to {count}, not {number}")))?;
        let must = match (session.algorithm, checksum.as_ref().map(Checksum::algorithm)) {
            (Some(asked), given) if given != Some(asked) => {
                format!("have `{}`, as the upload was started with it", asked.name())
            }
            // What S3 makes by itself.
            (None, Some(given)) if given != Algorithm::Crc64nvme => {
                "have `crc64nvme`, or be absent: the upload was started without a `checksum_algorithm`".to_owned()
            }
            _ => return Ok(Self { session: Arc::clone(session), number, checksum }),
        };
        Err(Error::invalid("parts.checksum", must))
    }

    fn length(&self) -> u64 {
        // INVARIANT: whoever makes a part has looked that there is such a one.
        self.session.plan.length(self.number).unwrap_or_default()
    }

    pub(super) fn plain(&self) -> Plain {
        let query = vec![
            ("x-id", "UploadPart".to_owned()),
            ("partNumber", self.number.to_string()),
            ("uploadId", self.session.upload_id.clone()),
        ];
        let mut headers = BTreeMap::from([("content-length".to_owned(), self.length().to_string())]);
        if let Some(checksum) = &self.checksum {
            let (name, sum) = checksum.header();
            headers.insert(name.to_owned(), sum);
        }
        Plain { method: "PUT", query, headers }
    }

    pub(super) async fn sdk(&self, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
        let length = i64::try_from(self.length()).map_err(|_| Error::internal("a part's length was not checked"))?;
        let operation = terms
            .client
            .upload_part()
            .bucket(terms.bucket)
            .key(terms.key.as_str())
            .upload_id(&self.session.upload_id)
            .part_number(self.number.cast_signed())
            .content_length(length);
        let operation = match self.checksum.as_ref().map(|checksum| (checksum, checksum.header().1)) {
            None => operation,
            Some((Checksum::Crc32(_), sum)) => operation.checksum_crc32(sum),
            Some((Checksum::Crc32c(_), sum)) => operation.checksum_crc32_c(sum),
            Some((Checksum::Crc64nvme(_), sum)) => operation.checksum_crc64_nvme(sum),
            Some((Checksum::Sha1(_), sum)) => operation.checksum_sha1(sum),
            Some((Checksum::Sha256(_), sum)) => operation.checksum_sha256(sum),
        };
        SignedRequest::from_sdk(operation.customize().map_request(terms.tag()).presigned(terms.config()?).await)
    }
}

/// Parts, as they are asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The upload.
    pub session: Arc<Session>,
    /// The parts by the numbers asked for, each good or refused on its own.
    pub parts: Vec<(i32, Result<Part, Error>)>,
    /// How long the URLs are to live. `None`: the default of the settings.
    pub ttl: Option<Lifetime>,
}

/// Signs the parts that the permit allows, each good or refused on its own.
///
/// # Errors
/// [`Error::UploadExpired`].
pub async fn sign(
    app: &App,
    permit: Permit<Ask>,
    now: SystemTime,
) -> Result<Vec<(i32, Result<Presigned, Error>)>, Error> {
    permit.ask().session.live(now)?;
    let caller = permit.caller().clone();
    let Ask { parts, ttl, .. } = permit.into_ask();
    Ok(issue_all(app, &caller, parts.into_iter(), ttl, now).await)
}

/// Issues a URL for each part.
pub(super) async fn issue_all(
    app: &App,
    caller: &Caller,
    parts: impl Iterator<Item = (i32, Result<Part, Error>)>,
    ttl: Option<Lifetime>,
    now: SystemTime,
) -> Vec<(i32, Result<Presigned, Error>)> {
    let mut issued = Vec::new();
    for (n, (number, part)) in parts.enumerate() {
        app.give_way(n).await;
        let result = match part {
            Ok(part) => {
                let (bucket, key) = (part.session.bucket.clone(), part.session.key.clone());
                let ask = presign::Ask { bucket, key, ttl, operation: Operation::Part(part) };
                presign::issue(app, caller.clone(), ask, now).await
            }
            Err(error) => Err(error),
        };
        issued.push((number, result));
    }
    issued
}
