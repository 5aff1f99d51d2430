//! `CompleteUpload`: make the object of its parts.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html>

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::upload::{Algorithm, Checksum};
use super::upload_plan::Plan;
use super::upload_token::{Session, UPLOAD_ID};
use crate::app::App;
use crate::error::Error;
use crate::object::ObjectKey;
use crate::policy::Permit;
use crate::store::multipart::{Completion, Made, Stored};

/// A part as its uploader knows it.
#[derive(Clone, Debug)]
pub struct Given {
    /// Its number.
    pub number: u32,
    /// The `ETag` that S3 answered.
    pub etag: String,
    /// Its checksum.
    pub checksum: Option<Checksum>,
}

/// The end of an upload, as it is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The upload.
    pub session: Arc<Session>,
    /// Its parts. Empty: those that S3 has.
    pub parts: Vec<Given>,
    /// Refuse to overwrite, also if that was not said at the start.
    pub create_only: bool,
    /// The checksum of the full object.
    pub checksum: Option<Checksum>,
}

impl Ask {
    /// What no single field can tell.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check(&self) -> Result<(), Error> {
        let Some(checksum) = &self.checksum else { return Ok(()) };
        let given = checksum.algorithm();
        match self.session.algorithm {
            Some(Algorithm::Sha1 | Algorithm::Sha256) => {
                Err(Error::invalid("checksum", "be absent: S3 makes a composite one of the parts' checksums"))
            }
            None => {
                Err(Error::invalid("checksum", "be absent, as the upload was started without a `checksum_algorithm`"))
            }
            Some(algorithm) if algorithm != given => Err(Error::invalid(
                "checksum",
                format!("have `{}`, as the upload was started with it", algorithm.name()),
            )),
            Some(_) => Ok(()),
        }
    }

    /// The same for the same ask, and for no other. `Debug` escapes what it
    /// prints.
    fn digest(&self) -> [u8; 32] {
        Sha256::digest(format!("{self:?}")).into()
    }
}

/// Makes the object that the permit allows, or finds that it was made. S3 may
/// take minutes for it: that goes on if the caller's time is up, and who asks
/// the same again meanwhile waits for the same.
///
/// # Errors
/// [`Error::UploadExpired`], [`Error::UploadNotFound`],
/// [`Error::UploadMismatch`], [`Error::ObjectExists`],
/// [`Error::UnknownBucket`], those of the store.
pub async fn complete(app: &Arc<App>, permit: Permit<Ask>, now: SystemTime) -> Result<(ObjectKey, Made), Error> {
    let ask = permit.into_ask();
    ask.session.live(now)?;
    let key = ask.session.key.clone();
    let (completing, _) = app.completions.join(ask.digest(), || {
        let app = Arc::clone(app);
        async move { finish(&app, ask).await }
    });
    Ok((key, completing.await?))
}

async fn finish(app: &App, ask: Ask) -> Result<Made, Error> {
    let Ask { session, parts: given, create_only, checksum } = ask;
    let store = &app.bucket(&session.bucket)?.store;
    let completed = async {
        let there = store.all_parts(&session.key, &session.upload_id).await?;
        let parts = reconcile(session.plan, there, given)?;
        let completion = Completion {
            parts,
            size: session.plan.size(),
            create_only: session.create_only || create_only,
            algorithm: session.algorithm,
            checksum: checksum.clone(),
        };
        store.complete_upload(&session.key, &session.upload_id, completion).await
    };
    let (version, refusal) = match completed.await {
        Ok(version) => (version, Error::UploadNotFound),
        // It may have been completed before, and its answer lost: then S3 knows no
        // such upload, or finds in the way what it has made itself.
        Err(refusal @ (Error::UploadNotFound | Error::ObjectExists)) => (None, refusal),
        Err(error) => return Err(error),
    };
    let made = match store.made(&session.key, version).await {
        Err(Error::ObjectNotFound) => return Err(refusal),
        made => made?,
    };
    if made.metadata.get(UPLOAD_ID) != Some(&session.id.to_string()) {
        // Without an upload, and with another's object, nobody can tell what became of it.
        return Err(refusal);
    }
    if made.size != session.plan.size() {
        return Err(Error::UploadMismatch(format!("the object has {} bytes, not {}", made.size, session.plan.size())));
    }
    match (&made.checksum, checksum) {
        (Some(has), Some(told)) if *has != told => {
            Err(Error::UploadMismatch("the object was made, and has another checksum than `checksum` says".into()))
        }
        _ => Ok(made),
    }
}

/// The parts to complete with: exactly those of the plan, as S3 has them, and
/// as their uploader knows them if it says so.
///
/// # Errors
/// [`Error::UploadMismatch`], which names the first that is missing or wrong.
fn reconcile(plan: Plan, there: BTreeMap<u32, Stored>, given: Vec<Given>) -> Result<Vec<Stored>, Error> {
    let mismatch = |text: String| Err(Error::UploadMismatch(text));
    let told = !given.is_empty();
    let mut given: BTreeMap<u32, Given> = given.into_iter().map(|part| (part.number, part)).collect();
    let mut there = there;
    let mut parts = Vec::new();
    for number in 1..=plan.count() {
        let Some(mut part) = there.remove(&number) else {
            return mismatch(format!("S3 has no part {number}"));
        };
        let length = plan.length(number).unwrap_or_default();
        if part.size != length {
            return mismatch(format!("part {number} has {} bytes, not {length}", part.size));
        }
        if told {
            let Some(Given { etag, checksum, .. }) = given.remove(&number) else {
                return mismatch(format!("part {number} is not among those given"));
            };
            if etag.trim_matches('"') != part.etag.trim_matches('"') {
                return mismatch(format!("part {number} is another by now: its etag is not the one given"));
            }
            match (&part.checksum, checksum) {
                (Some(has), Some(given)) if has.algorithm() == given.algorithm() && *has != given => {
                    return mismatch(format!("part {number} has another checksum than the one given"));
                }
                (None, Some(given)) => part.checksum = Some(given),
                _ => {}
            }
        }
        parts.push(part);
    }
    match given.keys().next() {
        Some(number) => mismatch(format!("there is no part {number} in this upload, only {}", plan.count())),
        None => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_part_that_does_not_fit_is_named() {
        let plan = Plan::new(11 << 20, Some(5 << 20)).unwrap();
        let stored = |number: u32| Stored {
            number,
            size: plan.length(number).unwrap(),
            etag: format!("\"{number}\""),
            checksum: Some(Checksum::Crc32([1; 4])),
            last_modified: None,
        };
        let there: BTreeMap<_, _> = (1..=3).map(|number| (number, stored(number))).collect();
        let given = |number: u32| Given { number, etag: number.to_string(), checksum: None };
        let all = || (1..=3).map(given).collect::<Vec<_>>();
        let told = |there: &BTreeMap<u32, Stored>, given| match reconcile(plan, there.clone(), given) {
            Ok(parts) => parts.iter().map(|part| part.number.to_string()).collect::<Vec<_>>().join(" "),
            Err(Error::UploadMismatch(text)) => text,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(told(&there, all()), "1 2 3");
        assert_eq!(told(&there, Vec::new()), "1 2 3");
        assert_eq!(told(&there, all()[..2].to_vec()), "part 3 is not among those given");
        assert!(told(&there, [all(), vec![given(4)]].concat()).starts_with("there is no part 4"));
        let mut other = all();
        other[1].etag = "x".into();
        assert!(told(&there, other).starts_with("part 2 is another"));
        let mut other = all();
        other[0].checksum = Some(Checksum::Crc32([2; 4]));
        assert!(told(&there, other).starts_with("part 1 has another checksum"));
        let mut less = there.clone();
        less.remove(&2);
        assert_eq!(told(&less, all()), "S3 has no part 2");
        less.insert(2, Stored { size: 7, ..stored(2) });
        assert_eq!(told(&less, all()), "part 2 has 7 bytes, not 5242880");
    }
}
