//! Signers: identities whose keys sign URLs. Keys in, URL out; time is passed
//! in, and nothing here but [`ambient`] does I/O.

pub mod ambient;
pub mod fast;
pub mod presign;
pub mod url;
pub mod usage;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use aws_credential_types::Credentials;
use aws_sdk_s3::config::{BehaviorVersion, IdentityCache, Region, RequestChecksumCalculation};
use tokio::sync::watch;

use crate::config::{BucketSettings, RouteSettings};
use crate::error::Error;
use crate::object::{BucketName, Lifetime, ObjectKey};
use fast::Fast;
use presign::Terms;
use usage::Usage;

/// Where a signer's key comes from, and thereby how its URLs are revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A key that this service does not manage.
    Ambient,
    /// The key of an IAM user, kept in a vault and rotated by this service.
    IamUser,
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
    /// What it has signed on this replica that is still out.
    pub usage: Arc<Usage>,
    presigners: BTreeMap<BucketName, Presigner>,
}

impl KeySnapshot {
    /// What presigns for `bucket`.
    #[must_use]
    pub fn presigner(&self, bucket: &BucketName) -> Option<&Presigner> {
        self.presigners.get(bucket)
    }
}

/// Presigns for one bucket with one key.
#[derive(Debug)]
pub struct Presigner {
    /// The SDK's client. It is never used to send.
    pub client: aws_sdk_s3::Client,
    /// The same signatures in a fraction of the time, if the two agree.
    pub fast: Option<Fast>,
}

impl Presigner {
    /// A presigner of `bucket` with this key, from `now` on.
    #[must_use]
    pub fn new(bucket: &BucketSettings, credentials: Credentials, now: SystemTime) -> Self {
        let config = client_config(bucket)
            .credentials_provider(credentials.clone())
            // The snapshot is the cache, and it knows better when its key ends.
            .identity_cache(IdentityCache::no_cache())
            .build();
        let client = aws_sdk_s3::Client::from_conf(config);
        let fast = ObjectKey::parse("any").ok().and_then(|key| {
            let (start, bucket_name) = (whole_seconds(now), bucket.bucket.as_str());
            let terms = Terms {
                client: &client,
                bucket: bucket_name,
                key: &key,
                start,
                expires: Lifetime::MAX,
                issue_id: None,
            };
            Fast::learn(&bucket.region, credentials, &terms)
        });
        Self { client, fast }
    }
}

/// The URL of a bucket, to which an encoded key is appended. `None` if the SDK
/// writes it in a way that we can't tell.
#[must_use]
pub fn base(bucket: &BucketSettings) -> Option<String> {
    let nobody = Credentials::new("nobody", "nothing", None, None, "none");
    let presigner = Presigner::new(bucket, nobody, SystemTime::now());
    presigner.fast.map(|fast| fast.base().to_owned())
}

/// `time` rounded down, as signatures have it.
pub(crate) fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
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
    lease: Option<Lease>,
    /// The last keys that it has had on this replica, by access key id.
    usages: Mutex<Vec<(String, Arc<Usage>)>>,
}

/// Of how many keys of a signer a replica remembers what they have signed.
const REMEMBERED: usize = 8;

/// How long a key may be used without another look at where it comes from.
#[derive(Debug)]
struct Lease {
    length: Duration,
    /// When this replica came up: what the next is counted from.
    epoch: Instant,
    /// When the last good look was begun, in ms.
    renewed: AtomicU64,
}

impl Lease {
    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX)
    }

    fn age(&self) -> Duration {
        Duration::from_millis(self.millis(Instant::now()).saturating_sub(self.renewed.load(Ordering::Relaxed)))
    }

    fn has_run_out(&self) -> bool {
        self.age() >= self.length
    }
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
        let usages = Mutex::default();
        Self { name: name.to_owned(), kind, routes, buckets, state, changed, lease: None, usages }
    }

    /// The same, but its key may be used only for so long after each
    /// [`Signer::renew`].
    #[must_use]
    pub fn with_lease(self, length: Duration) -> Self {
        Self { lease: Some(Lease { length, epoch: Instant::now(), renewed: AtomicU64::new(0) }), ..self }
    }

    /// The key at hand was the current one at `asked`.
    pub fn renew(&self, asked: Instant) {
        if let Some(lease) = &self.lease {
            let before = lease.has_run_out();
            lease.renewed.store(lease.millis(asked), Ordering::Relaxed);
            if before {
                self.look_again();
            }
        }
    }

    /// How long its key may be used without another [`Signer::renew`]. Zero: no
    /// more.
    #[must_use]
    pub fn lease_left(&self) -> Duration {
        self.lease.as_ref().map_or(Duration::MAX, |lease| lease.length.saturating_sub(lease.age()))
    }

    /// Has whoever watches look at this signer again: time may have changed it.
    pub fn look_again(&self) {
        self.changed.send_replace(());
    }

    /// The key that signs at `now`.
    ///
    /// # Errors
    /// [`Error::SignerUnavailable`] if there is none, or if it has ended.
    pub fn key(&self, now: SystemTime) -> Result<Arc<KeySnapshot>, Error> {
        let unavailable = |detail: &str| Error::SignerUnavailable { signer: self.name.clone(), detail: detail.into() };
        if self.lease.as_ref().is_some_and(Lease::has_run_out) {
            return Err(unavailable("its lease has run out: the vault was not read in time"));
        }
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
        let presigners = self
            .buckets
            .iter()
            .map(|(name, bucket)| (name.clone(), Presigner::new(bucket, credentials.clone(), now)))
            .collect();
        tracing::info!(signer = self.name, generation, access_key_id = credentials.access_key_id(), "key adopted");
        let usage = self.usage(credentials.access_key_id()).unwrap_or_else(|| self.new_usage(&credentials));
        let key = KeySnapshot { generation, credentials, since: now, usage, presigners };
        self.publish(State::Ready(Arc::new(key)));
    }

    /// What the key with this id has signed, if this replica has had it of late.
    #[must_use]
    pub fn usage(&self, access_key_id: &str) -> Option<Arc<Usage>> {
        let usages = self.usages.lock().unwrap_or_else(PoisonError::into_inner);
        usages.iter().find(|(id, _)| id == access_key_id).map(|(_, usage)| Arc::clone(usage))
    }

    fn new_usage(&self, key: &Credentials) -> Arc<Usage> {
        let mut usages = self.usages.lock().unwrap_or_else(PoisonError::into_inner);
        if usages.len() >= REMEMBERED {
            usages.remove(0);
        }
        let usage = Arc::<Usage>::default();
        usages.push((key.access_key_id().to_owned(), Arc::clone(&usage)));
        usage
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
