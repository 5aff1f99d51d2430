//! `Inspect`: what a presigned URL is.

use std::time::SystemTime;

use crate::app::App;
use crate::error::Error;
use crate::object::{BucketName, ObjectKey};
use crate::policy::Permit;
use crate::policy::grant::Action;
use crate::rotation::keeper::Standing;
use crate::signer::url::SignedUrl;

/// The URL, without its signature.
#[derive(Clone, Debug)]
pub struct Ask {
    /// What stands in it.
    pub url: SignedUrl,
    /// The object that it is of, if it is in one of our buckets.
    pub object: Option<(BucketName, ObjectKey)>,
}

impl Ask {
    /// What stands in a URL, and where that is.
    #[must_use]
    pub fn new(app: &App, url: SignedUrl) -> Self {
        let object = app.locate(&url.location);
        Self { url, object }
    }
}

/// Whether a URL is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its key signs for us, and its time is not up.
    Live,
    /// Its time is up.
    Expired,
    /// Its key was taken out of use, and S3 was seen to refuse it.
    Revoked,
    /// Its key is none of ours.
    Foreign,
}

/// What a presigned URL is.
pub struct Inspected {
    /// Whether it is good.
    pub state: State,
    /// The object, if it is in one of our buckets.
    pub object: Option<(BucketName, ObjectKey)>,
    /// Whose key has signed it, if it is one of ours.
    pub signer: Option<String>,
    /// What stands in the URL.
    pub url: SignedUrl,
}

/// Tells what the URL is. Asks nobody: what is known of keys is as old as the
/// last look at the vault. The signature is not verified.
///
/// # Errors
/// [`Error::NotGranted`], if it is of no object of ours, and the caller is not
/// granted to inspect all that its signer signs for.
pub fn inspect(app: &App, permit: Permit<Ask>, now: SystemTime) -> Result<Inspected, Error> {
    let Ask { url, object } = permit.ask();
    let key = url.access_key_id.as_str();
    let owner = app.signers.values().find_map(|signer| {
        let standing = match app.keepers.get(&signer.name) {
            Some(keeper) => keeper.standing(key),
            // Nobody can end the URLs of these before their time.
            None => signer.usage(key).map(|_| Standing::Live),
        };
        Some((signer.name.clone(), standing?))
    });
    let sees = |signer: &str| permit.reaches(&app.policy, Action::Inspect, signer);
    let granted = match (object, &owner) {
        (Some(_), _) => true,
        (None, Some((signer, _))) => sees(signer),
        // Only who may see all of them may know that it is of none of them.
        (None, None) => app.signers.keys().all(|signer| sees(signer)),
    };
    if !granted {
        return Err(permit.refusal());
    }
    let state = match &owner {
        None => State::Foreign,
        Some((_, Standing::Dead)) => State::Revoked,
        Some((_, Standing::Live)) if url.expires_at <= now => State::Expired,
        Some((_, Standing::Live)) => State::Live,
    };
    let signer = owner.map(|(signer, _)| signer);
    let Ask { url, object } = permit.into_ask();
    Ok(Inspected { state, object, signer, url })
}
