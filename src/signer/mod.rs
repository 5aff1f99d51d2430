//! Signers: identities whose keys sign URLs. Keys in, URL out; time is passed
//! in, and nothing here but [`ambient`] does I/O.

pub mod ambient;
pub mod presign;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use aws_credential_types::Credentials;
use aws_sdk_s3::config::{BehaviorVersion, IdentityCache, Region, RequestChecksumCalculation};
use tokio::sync::watch;

use crate::config::{BucketSettings, RouteSettings};
use crate::error::Error;
use crate::object::BucketName;

/// Where a signer's key comes from, and thereby how its URLs are revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A key that this service does not manage.
    Ambient,
}

/// One key that a signer has had, with all that is needed to sign with it.
///
/// Immutable: a new key is a new snapshot.
#[derive(Debug)]
pub struct KeySnapshot {
    /// Counts the keys of this signer on this replica, from 1.
    pub generation: u64,
    /// The key. Its `Debug` hides the secret, and it is zeroized when dropped.
    pub credentials: Credentials,
    /// When this replica took it up.
    pub since: SystemTime,
    clients: BTreeMap<BucketName, aws_sdk_s3::Client>,
}

impl KeySnapshot {
    /// The SDK's client that presigns for `bucket`. It is never used to send.
    #[must_use]
    pub fn client(&self, bucket: &BucketName) -> Option<&aws_sdk_s3::Client> {
        self.clients.get(bucket)
    }
}

#[derive(Debug)]
enum State {
    Ready(Arc<KeySnapshot>),
    Unavailable(String),
}

/// An identity whose key signs URLs: the unit of revocation.
#[derive(Debug)]
pub struct Signer {
    /// Its name in the settings.
    pub name: String,
    /// How its URLs are revoked.
    pub kind: Kind,
    /// What it signs for.
    pub routes: Vec<RouteSettings>,
    buckets: BTreeMap<BucketName, BucketSettings>,
    state: ArcSwap<State>,
    changed: watch::Sender<()>,
}

impl Signer {
    /// A signer that has no key yet. `changed` hears of every new state.
    #[must_use]
    pub fn new(
        name: &str,
        kind: Kind,
        routes: Vec<RouteSettings>,
        buckets: &BTreeMap<BucketName, BucketSettings>,
        changed: watch::Sender<()>,
    ) -> Self {
        let buckets = buckets
            .iter()
            .filter(|(name, _)| routes.iter().any(|r| r.bucket == **name))
            .map(|(name, bucket)| (name.clone(), bucket.clone()))
            .collect();
        let state = ArcSwap::from_pointee(State::Unavailable("no key was looked for yet".into()));
        Self { name: name.to_owned(), kind, routes, buckets, state, changed }
    }

    /// The key that signs at `now`.
    ///
    /// # Errors
    /// [`Error::SignerUnavailable`] if there is none, or if it has ended.
    pub fn key(&self, now: SystemTime) -> Result<Arc<KeySnapshot>, Error> {
        let unavailable = |detail: &str| Error::SignerUnavailable { signer: self.name.clone(), detail: detail.into() };
        match &**self.state.load() {
            State::Ready(key) if key.credentials.expiry().is_some_and(|end| end <= now) => {
                Err(unavailable("its key has ended"))
            }
            State::Ready(key) => Ok(Arc::clone(key)),
            State::Unavailable(why) => Err(unavailable(why)),
        }
    }

    /// Takes up `credentials` from `now` on, unless it is the key at hand.
    pub fn adopt(&self, credentials: Credentials, now: SystemTime) {
        let generation = match &**self.state.load() {
            State::Ready(key) if key.credentials == credentials => return,
            State::Ready(key) => key.generation + 1,
            State::Unavailable(_) => 1,
        };
        let clients = self
            .buckets
            .iter()
            .map(|(name, bucket)| (name.clone(), presigning_client(bucket, credentials.clone())))
            .collect();
        tracing::info!(signer = self.name, generation, access_key_id = credentials.access_key_id(), "key adopted");
        let key = KeySnapshot { generation, credentials, since: now, clients };
        self.publish(State::Ready(Arc::new(key)));
    }

    /// Has no key any more, for this reason.
    pub fn withdraw(&self, why: &str) {
        tracing::warn!(signer = self.name, why, "signer has no usable key");
        self.publish(State::Unavailable(why.to_owned()));
    }

    fn publish(&self, state: State) {
        self.state.store(Arc::new(state));
        self.changed.send_replace(());
    }
}

/// What every S3 client of a bucket has in common.
pub(crate) fn client_config(bucket: &BucketSettings) -> aws_sdk_s3::config::Builder {
    let mut config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(bucket.region.clone()))
        .force_path_style(bucket.path_style)
        // Else the SDK adds a checksum that nobody asked for and that the holder
        // of a URL would have to send.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired);
    config.set_endpoint_url(bucket.endpoint.clone());
    config
}

fn presigning_client(bucket: &BucketSettings, credentials: Credentials) -> aws_sdk_s3::Client {
    let config = client_config(bucket)
        .credentials_provider(credentials)
        // The snapshot is the cache, and it knows better when its key ends.
        .identity_cache(IdentityCache::no_cache())
        .build();
    aws_sdk_s3::Client::from_conf(config)
}
