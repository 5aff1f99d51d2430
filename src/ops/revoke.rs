//! `Revoke`: ends URLs that are already out.

use std::sync::Arc;
use std::time::SystemTime;

use crate::app::App;
use crate::error::Error;
use crate::object::{BucketName, ObjectKey};
use crate::policy::Permit;
use crate::policy::grant::Action;
use crate::rotation::driver::SignerRotation;
use crate::rotation::keeper::Keeper;
use crate::rotation::object::{self, ObjectRotation};
use crate::signer::Signer;
use crate::signer::usage::UrlsOut;

/// A revoke, as it is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Which URLs are to end.
    pub target: Target,
    /// The old key first, before there is another. Not for objects.
    pub immediate: bool,
    /// Why, for the log.
    pub reason: String,
    /// Who asks again with the same id goes on with the same rotation.
    pub request_id: String,
    /// Change nothing.
    pub dry_run: bool,
}

/// Which URLs are to end.
#[derive(Clone, Debug)]
pub enum Target {
    /// All that a signer has signed.
    Signer(String),
    /// The downloads of one object.
    Object(BucketName, ObjectKey),
    /// All that the signer of this URL has signed. Only the access key id of
    /// the URL is kept.
    KeyOfUrl(String),
}

/// What a revoke of a signer's key ends, as this replica sees it.
pub struct BlastRadius {
    /// The signer.
    pub signer: Arc<Signer>,
    /// Counts the keys of this signer on this replica; of the key that signs
    /// now. 0 if it has none.
    pub generation: u64,
    /// What the key has signed on this replica that is still out.
    pub urls_out: Vec<UrlsOut>,
}

/// What was done, or would be.
pub struct Revoked {
    /// The id to ask again with.
    pub request_id: String,
    /// S3 refused the URL's key before anything was done.
    pub already_dead: bool,
    /// By what.
    pub outcome: Outcome,
}

/// By what URLs were ended, or would be.
pub enum Outcome {
    /// An object's new key. Without a rotation: with `dry_run`.
    Object {
        /// Where the object is, or would be.
        new_key: ObjectKey,
        /// What was done.
        rotation: Option<ObjectRotation>,
    },
    /// A signer's new key. Without a rotation: with `dry_run`.
    Signer {
        /// The signer's name.
        signer: String,
        /// The key whose URLs have ended, or would.
        old_key: String,
        /// What that takes with it.
        radius: BlastRadius,
        /// What was done.
        rotation: Option<SignerRotation>,
    },
}

/// Ends the URLs that the permit allows to end, and waits for the proof. A
/// rotation that has begun goes on when nobody waits for it any more.
///
/// # Errors
/// [`Error::NotRevocable`], [`Error::ForeignUrl`], [`Error::UnknownSigner`],
/// [`Error::UnknownBucket`], [`Error::KeySlotsTaken`], and those of
/// [`object::rotate`].
pub async fn revoke(app: &Arc<App>, permit: Permit<Ask>, now: SystemTime) -> Result<Revoked, Error> {
    let Ask { target, reason, request_id, .. } = permit.ask();
    tracing::info!(caller = permit.caller().as_str(), ?target, reason, request_id, "revoke asked for");
    let (already_dead, outcome) = match target {
        Target::Object(bucket, key) => (false, revoke_object(app, permit.ask(), bucket, key).await?),
        Target::Signer(name) => {
            let signer = app.signers.get(name).ok_or_else(|| Error::UnknownSigner(name.clone()))?;
            let keeper = app.keepers.get(name).ok_or_else(|| not_revocable(signer))?;
            let key = keeper.doomed(request_id).await?;
            (false, revoke_signer(signer, keeper, permit.ask(), key, now).await?)
        }
        Target::KeyOfUrl(id) => {
            // No other signer is even looked at: what is the matter with those, the caller can't
            // tell from the answer, nor from how long it takes.
            let mine = |name: &str| permit.reaches(&app.policy, Action::RevokeSigner, name);
            let signs = |signer: &&Arc<Signer>| signer.key(now).is_ok_and(|key| key.credentials.access_key_id() == id);
            if let Some(ambient) =
                app.signers.values().find(|s| !app.keepers.contains_key(&s.name) && mine(&s.name) && signs(s))
            {
                return Err(not_revocable(ambient));
            }
            let mut found = None;
            for (name, keeper) in app.keepers.iter().filter(|(name, _)| mine(name)) {
                if let (Some(signer), Some(doomed)) = (app.signers.get(name), keeper.owns(id).await?) {
                    found = Some((signer, keeper, doomed));
                    break;
                }
            }
            let (signer, keeper, doomed) = found.ok_or_else(|| {
                // Only who may revoke all of them may know that it is of none of them.
                if app.signers.keys().all(|name| mine(name)) { Error::ForeignUrl } else { permit.refusal() }
            })?;
            (doomed.already_dead, revoke_signer(signer, keeper, permit.ask(), doomed.key, now).await?)
        }
    };
    Ok(Revoked { request_id: request_id.clone(), already_dead, outcome })
}

async fn revoke_signer(
    signer: &Arc<Signer>,
    keeper: &Arc<Keeper>,
    ask: &Ask,
    old_key: String,
    now: SystemTime,
) -> Result<Outcome, Error> {
    let radius = BlastRadius {
        signer: Arc::clone(signer),
        generation: signer.key(now).map(|key| key.generation).unwrap_or_default(),
        urls_out: signer.usage(&old_key).map(|usage| usage.out(now)).unwrap_or_default(),
    };
    let rotation =
        if ask.dry_run { None } else { Some(keeper.rotate(&old_key, ask.immediate, &ask.request_id).await?) };
    Ok(Outcome::Signer { signer: signer.name.clone(), old_key, radius, rotation })
}

async fn revoke_object(app: &Arc<App>, ask: &Ask, bucket: &BucketName, key: &ObjectKey) -> Result<Outcome, Error> {
    let rotation = object::Ask { key: key.clone(), request_id: ask.request_id.clone() };
    let new_key = object::new_key(&rotation)?;
    if ask.dry_run {
        app.bucket(bucket)?.store.head(key, None).await?;
        return Ok(Outcome::Object { new_key, rotation: None });
    }
    let name = (bucket.clone(), key.clone(), ask.request_id.clone());
    let (rotating, _) = app.rotations.join(name, || {
        let (app, bucket) = (Arc::clone(app), bucket.clone());
        async move { object::rotate(&app.bucket(&bucket)?.store, &rotation).await }
    });
    let rotation = rotating.await?;
    tracing::info!(%bucket, key = key.as_str(), new_key = new_key.as_str(), request_id = ask.request_id, "object revoked");
    Ok(Outcome::Object { new_key, rotation: Some(rotation) })
}

fn not_revocable(signer: &Signer) -> Error {
    Error::NotRevocable(signer.name.clone())
}
