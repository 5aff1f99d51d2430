//! What one replica is made of: buckets, signers, routes and policy. Built
//! once from the settings; only the signers' keys change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use aws_credential_types::provider::SharedCredentialsProvider;
use tokio::sync::watch;

use crate::config::{BucketSettings, Limits, Settings, SignerSettings};
use crate::error::Error;
use crate::object::{BucketName, Lifetime, ObjectKey, PrefixMap};
use crate::policy::Policy;
use crate::rotation::Rotations;
use crate::signer::{Kind, Signer, ambient};
use crate::store::Store;

/// How many signatures a call may make before others get their turn.
const TURN: usize = 32;

/// One replica.
pub struct App {
    /// The signers, by name.
    pub signers: BTreeMap<String, Arc<Signer>>,
    /// Who may do what.
    pub policy: Policy,
    /// The life of a URL that nobody said more of.
    pub ttl_default: Lifetime,
    /// What this replica takes on.
    pub limits: Limits,
    /// Hears of every change of a signer's key.
    pub changed: watch::Receiver<()>,
    /// The object rotations under way.
    pub rotations: Rotations,
    buckets: BTreeMap<BucketName, Bucket>,
}

/// A bucket, with what it takes to serve it.
pub struct Bucket {
    /// Its settings.
    pub settings: BucketSettings,
    /// The service's own access to it.
    pub store: Store,
    name: BucketName,
    routes: PrefixMap<Arc<Signer>>,
}

/// Where the keys come from: the service's own, and each signer's.
pub struct Sources {
    /// The service's own identity.
    pub identity: SharedCredentialsProvider,
    /// The signers' keys, by the signer's name.
    pub signers: BTreeMap<String, SharedCredentialsProvider>,
}

impl Sources {
    /// The sources that the settings name.
    pub async fn of(settings: &Settings) -> Self {
        let identity = ambient::provider(&settings.identity).await;
        let mut signers = BTreeMap::new();
        for (name, SignerSettings::Ambient { source }) in &settings.signers {
            signers.insert(name.clone(), ambient::provider(source).await);
        }
        Self { identity, signers }
    }
}

impl App {
    /// A replica, its signers' keys looked up once. A signer whose key can't
    /// be had yet answers `UNAVAILABLE`, and is tried again in the background.
    pub async fn start(settings: &Settings, sources: Sources) -> Arc<Self> {
        let (tell, changed) = watch::channel(());
        let mut signers = BTreeMap::new();
        for (name, provider) in sources.signers {
            let routes = settings.routes.iter().filter(|r| r.signer == name).cloned().collect();
            let signer = Arc::new(Signer::new(&name, Kind::Ambient, routes, &settings.buckets, tell.clone()));
            let next = ambient::refresh(&signer, &provider).await;
            tokio::spawn(ambient::keep(Arc::clone(&signer), provider, next));
            signers.insert(name, signer);
        }
        let bucket = |(name, bucket): (&BucketName, &BucketSettings)| {
            let mut routes = PrefixMap::default();
            for route in settings.routes.iter().filter(|r| r.bucket == *name) {
                if let Some(signer) = signers.get(&route.signer) {
                    routes.insert(route.prefix.clone(), Arc::clone(signer));
                }
            }
            let store = Store::new(bucket, sources.identity.clone()).with_copy_limits(settings.rotation.copy_limits());
            (name.clone(), Bucket { settings: bucket.clone(), store, name: name.clone(), routes })
        };
        Arc::new(Self {
            buckets: settings.buckets.iter().map(bucket).collect(),
            policy: Policy::new(settings.ttl.ceiling),
            ttl_default: settings.ttl.default,
            limits: settings.limits.clone(),
            rotations: Rotations::default(),
            changed,
            signers,
        })
    }

    /// The bucket of that name.
    ///
    /// # Errors
    /// [`Error::UnknownBucket`].
    pub fn bucket(&self, name: &BucketName) -> Result<&Bucket, Error> {
        self.buckets.get(name).ok_or_else(|| Error::UnknownBucket(name.to_string()))
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

impl Bucket {
    /// The signer that signs for `key`.
    ///
    /// # Errors
    /// [`Error::NoRoute`].
    pub fn route(&self, key: &ObjectKey) -> Result<&Arc<Signer>, Error> {
        self.routes.longest(key.as_str()).ok_or_else(|| Error::NoRoute(self.name.to_string()))
    }
}
