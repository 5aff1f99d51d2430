//! What one replica is made of: buckets, signers, routes and policy. Built
//! once from the settings; only the signers' keys change.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use aws_credential_types::provider::SharedCredentialsProvider;
use futures_util::future::{BoxFuture, join_all};
use percent_encoding::percent_decode_str;
use tokio::sync::watch;

use crate::audit::Audit;
use crate::config::{
    BucketSettings, IamSettings, Limits, RotationSettings, SecretSettings, Settings, SignerSettings, VaultSettings,
};
use crate::error::Error;
use crate::issuer::{Iam, KeyIssuer};
use crate::object::{BucketName, Lifetime, ObjectKey, PrefixMap};
use crate::ops::upload_token::TokenKey;
use crate::policy::Policy;
use crate::rotation::driver::{Driver, Pace};
use crate::rotation::flight::Flights;
use crate::rotation::keeper::Keeper;
use crate::rotation::object::ObjectRotation;
use crate::rotation::probe::Probe;
use crate::signer::{self, Kind, Signer, ambient};
use crate::store::Store;
use crate::store::multipart::Made;
use crate::throttle::Throttle;
use crate::vault::Vault;
use crate::vault::file::FileVault;
use crate::vault::secrets_manager::SecretsManager;

/// How many signatures a call may make before others get their turn.
const TURN: usize = 32;

/// One replica.
pub struct App {
    /// The signers, by name.
    pub signers: BTreeMap<String, Arc<Signer>>,
    /// The keepers of the `iam-user` signers, by the signer's name.
    pub keepers: BTreeMap<String, Arc<Keeper>>,
    /// Who may do what.
    pub policy: Policy,
    /// The life of a URL that nobody said more of.
    pub ttl_default: Lifetime,
    /// What this replica takes on.
    pub limits: Limits,
    /// How many calls a caller may make.
    pub calls: Throttle,
    /// How many URLs a caller may ask for.
    pub urls: Throttle,
    /// Where it is written down who was given what.
    pub audit: Audit,
    /// Authenticates the tokens of uploads.
    pub tokens: TokenKey,
    /// Hears of every change of a signer's key.
    pub changed: watch::Receiver<()>,
    /// The object rotations under way, by bucket, key and request id.
    pub rotations: Flights<(BucketName, ObjectKey, String), ObjectRotation>,
    /// The uploads that are being completed, by digests of the asks.
    pub completions: Flights<[u8; 32], Made>,
    buckets: BTreeMap<BucketName, Bucket>,
}

/// A bucket, with what it takes to serve it.
pub struct Bucket {
    /// Its settings.
    pub settings: BucketSettings,
    /// The service's own access to it.
    pub store: Store,
    name: BucketName,
    /// Its URL, to which an encoded key is appended.
    base: Option<String>,
    routes: PrefixMap<Arc<Signer>>,
}

/// Where the keys come from: the service's own, and each signer's.
pub struct Sources {
    /// The service's own identity.
    pub identity: SharedCredentialsProvider,
    /// The signers' keys, by the signer's name.
    pub signers: BTreeMap<String, KeySource>,
    /// What authenticates the tokens of uploads: the same on all replicas.
    pub tokens: TokenKey,
}

/// Where a signer's key comes from.
pub enum KeySource {
    /// It is there.
    Ambient(SharedCredentialsProvider),
    /// This service makes it.
    IamUser {
        /// The IAM user.
        user: String,
        /// Where replicas find it.
        vault: Arc<dyn Vault>,
        /// Who makes it.
        issuer: Arc<dyn KeyIssuer>,
    },
}

impl Sources {
    /// The sources that the settings name.
    pub async fn of(settings: &Settings) -> Self {
        let identity = ambient::provider(&settings.identity).await;
        let mut signers = BTreeMap::new();
        for (name, signer) in &settings.signers {
            let source = match signer {
                SignerSettings::Ambient { source } => KeySource::Ambient(ambient::provider(source).await),
                SignerSettings::IamUser { user, vault } => {
                    let vault: Arc<dyn Vault> = match vault {
                        VaultSettings::File(path) => Arc::new(FileVault::new(path)),
                        VaultSettings::SecretsManager(SecretSettings { secret, region, endpoint }) => {
                            Arc::new(SecretsManager::new(secret, region, endpoint.clone(), identity.clone()))
                        }
                    };
                    let IamSettings { region, endpoint } = &settings.iam;
                    let issuer = Arc::new(Iam::new(region, endpoint.clone(), identity.clone()));
                    KeySource::IamUser { user: user.clone(), vault, issuer }
                }
            };
            signers.insert(name.clone(), source);
        }
        // `Settings::load` has made sure that it is good.
        let tokens = settings.uploads.token_key.as_ref().and_then(|name| std::env::var(name).ok());
        let tokens = tokens.and_then(|key| TokenKey::parse(&key).ok()).unwrap_or_else(TokenKey::random);
        Self { identity, signers, tokens }
    }
}

impl App {
    /// A replica, its signers' keys looked up once, side by side. A signer whose
    /// key can't be had, or not within a lease, answers `UNAVAILABLE`, and is
    /// tried again in the background: no vault keeps a replica from starting.
    ///
    /// # Errors
    /// An audit trail that can't be begun.
    pub async fn start(settings: &Settings, sources: Sources) -> io::Result<Arc<Self>> {
        let (tell, changed) = watch::channel(());
        let mut signers = BTreeMap::new();
        let mut keepers = BTreeMap::new();
        let mut first_looks: Vec<BoxFuture<'static, ()>> = Vec::new();
        for (name, source) in sources.signers {
            let routes = settings.routes.iter().filter(|r| r.signer == name).cloned().collect();
            let new = |kind| Signer::new(&name, kind, routes, &settings.buckets, tell.clone());
            let signer = match source {
                KeySource::Ambient(provider) => {
                    let signer = Arc::new(new(Kind::Ambient));
                    let kept = Arc::clone(&signer);
                    first_looks.push(Box::pin(async move {
                        let next = ambient::refresh(&kept, &provider).await;
                        tokio::spawn(ambient::keep(kept, provider, next));
                    }));
                    signer
                }
                KeySource::IamUser { user, vault, issuer } => {
                    let signer = Arc::new(new(Kind::IamUser).with_lease(settings.rotation.lease));
                    if let Some(driver) = driver(settings, &name, user, vault, issuer) {
                        let RotationSettings { refresh, reconcile, .. } = settings.rotation;
                        let keeper = Keeper::new(Arc::clone(&signer), driver, refresh, reconcile);
                        keepers.insert(name.clone(), Arc::clone(&keeper));
                        first_looks.push(Box::pin(async move {
                            keeper.refresh_in_time().await;
                            tokio::spawn(keeper.keep());
                        }));
                    }
                    signer
                }
            };
            signers.insert(name, signer);
        }
        join_all(first_looks).await;
        let bucket = |(name, bucket): (&BucketName, &BucketSettings)| {
            let routes = settings.routes.iter().filter(|r| r.bucket == *name);
            let routes =
                routes.filter_map(|r| Some((r.prefix.as_str(), Arc::clone(signers.get(&r.signer)?)))).collect();
            let store = Store::new(bucket, sources.identity.clone()).with_copy_limits(settings.rotation.copy_limits());
            let base = signer::base(bucket);
            (name.clone(), Bucket { settings: bucket.clone(), store, name: name.clone(), base, routes })
        };
        Ok(Arc::new(Self {
            buckets: settings.buckets.iter().map(bucket).collect(),
            policy: Policy::new(settings),
            ttl_default: settings.ttl.default,
            calls: Throttle::new("calls", settings.limits.calls_per_second),
            urls: Throttle::new("URLs", settings.limits.urls_per_second),
            audit: Audit::start(&settings.audit)?,
            tokens: sources.tokens,
            limits: settings.limits.clone(),
            rotations: Flights::default(),
            completions: Flights::default(),
            changed,
            signers,
            keepers,
        }))
    }

    /// The bucket of that name.
    ///
    /// # Errors
    /// [`Error::UnknownBucket`].
    pub fn bucket(&self, name: &BucketName) -> Result<&Bucket, Error> {
        self.buckets.get(name).ok_or_else(|| Error::UnknownBucket(name.to_string()))
    }

    /// The object that a URL without its query is of, if it is in one of our
    /// buckets.
    #[must_use]
    pub fn locate(&self, location: &str) -> Option<(BucketName, ObjectKey)> {
        self.buckets.values().find_map(|bucket| {
            let encoded = location.strip_prefix(bucket.base.as_deref()?)?;
            let key = percent_decode_str(encoded).decode_utf8().ok()?;
            Some((bucket.name.clone(), ObjectKey::parse(key).ok()?))
        })
    }

    /// Whether any signer may sign.
    #[must_use]
    pub fn can_sign(&self, now: SystemTime) -> bool {
        self.signers.values().any(|signer| signer.key(now).is_ok())
    }

    /// Lets other calls of this thread go on, now and then, in the `n`th turn
    /// of a loop that signs.
    pub async fn give_way(&self, n: usize) {
        if n % TURN == TURN - 1 {
            tokio::task::yield_now().await;
        }
    }
}

/// What rotates the key of an `iam-user` signer. S3 is asked about its keys by
/// an object, which need not exist, under the first of its routes; `None` if it
/// has none.
#[must_use]
pub fn driver(
    settings: &Settings,
    signer: &str,
    user: String,
    vault: Arc<dyn Vault>,
    issuer: Arc<dyn KeyIssuer>,
) -> Option<Driver> {
    let route = settings.routes.iter().find(|route| route.signer == signer)?;
    let key = ObjectKey::parse(format!("{}.fileaccess-probe", route.prefix.as_str())).ok()?;
    let probe = Probe::new(Probe::http_client(), settings.buckets.get(&route.bucket)?.clone(), key);
    let RotationSettings { lease, orphan_age, poll, .. } = settings.rotation;
    Some(Driver { user, vault, issuer, probe, pace: Pace { lease, orphan_age, poll } })
}

impl Bucket {
    /// The signer that signs for `key`.
    ///
    /// # Errors
    /// [`Error::NoRoute`].
    pub fn route(&self, key: &ObjectKey) -> Result<&Arc<Signer>, Error> {
        self.routes.longest(key.as_str()).ok_or_else(|| Error::NoRoute(self.name.to_string()))
    }

    /// The signer that signs for every key that begins with `key`.
    ///
    /// # Errors
    /// [`Error::NoRoute`], and [`Error::Invalid`] if another one signs for some
    /// of them: what `key`'s signer signs for all would outlive a revoke of the
    /// other.
    pub fn route_all(&self, key: &ObjectKey, field: &str) -> Result<&Arc<Signer>, Error> {
        let signer = self.route(key)?;
        if self.routes.under(key.as_str()).any(|other| other.name != signer.name) {
            let must = "not be set for a `key` under which another signer's route begins; ask for a longer `key`";
            return Err(Error::invalid(field, must));
        }
        Ok(signer)
    }

    /// Its URL, to which forms are posted.
    ///
    /// # Errors
    /// [`Error::Internal`] if the SDK writes it in a way that we can't tell.
    pub fn url(&self) -> Result<&str, Error> {
        self.base.as_deref().ok_or_else(|| Error::internal(format!("the URL of bucket `{}` is not known", self.name)))
    }
}
