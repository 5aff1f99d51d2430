//! This test binary as a replica whose IAM and vault are tampered with: it
//! kills itself right before or after a side effect, or its IAM is slow to be
//! heard of. What is under test comes from the library as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_credential_types::Credentials;
use fileaccess::app::{App, KeySource, Sources};
use fileaccess::config::Settings;
use fileaccess::issuer::{IssuerError, KeyFacts, KeyIssuer, Status};
use fileaccess::server::{self, Listener};
use fileaccess::telemetry;
use fileaccess::vault::{Held, Vault, VaultError};

/// Names the settings file. Set, this binary is a replica.
pub const CONFIG: &str = "IT_REPLICA";
/// Names the file that the secrets of all keys made go to.
pub const SECRETS: &str = "IT_SECRETS";
/// `before create`, `after promote`, …: where to die.
pub const DIE: &str = "IT_DIE";
/// Milliseconds until S3 hears of what IAM has done.
pub const LAG: &str = "IT_LAG";
/// The key to end at once on its own, rather than serve; empty: only finish.
pub const ROTATE: &str = "IT_ROTATE";
/// Whether that is urgent: `immediate`.
pub const URGENCY: &str = "IT_URGENCY";
/// The request id of that.
pub const REQUEST: &str = "IT_REQUEST";

/// A replica, for ever.
pub fn run(config: &OsString) {
    telemetry::init("debug");
    let env: BTreeMap<String, String> = std::env::vars().filter(|(name, _)| name.starts_with("IT_")).collect();
    let text = std::fs::read_to_string(config).expect("a settings file");
    let settings = Settings::load(&text, &env).expect("good settings");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(replica(&settings, &env));
}

async fn replica(settings: &Settings, env: &BTreeMap<String, String>) {
    let mut sources = Sources::of(settings).await;
    let fate = Fate(env.get(DIE).cloned().unwrap_or_default());
    let lag = env.get(LAG).map(|ms| Duration::from_millis(ms.parse().expect("milliseconds")));
    for source in sources.signers.values_mut() {
        let KeySource::IamUser { vault, issuer, .. } = source else { continue };
        if let Some(lag) = lag {
            let told = Arc::default();
            *issuer = Arc::new(Lagging { inner: Arc::clone(issuer), lag, told });
        }
        *issuer = Arc::new(Mortal { inner: Arc::clone(issuer), fate: fate.clone() });
        *vault = Arc::new(Mortal { inner: Arc::clone(vault), fate: fate.clone() });
    }
    let app = App::start(settings, sources).await.expect("a replica");
    let keeper = app.keepers.values().next().expect("a signer");
    match env.get(ROTATE).map(String::as_str) {
        None => {
            let listener = Listener::bind(&settings.listen).await.expect("a port");
            tracing::info!(address = listener.address().expect("an address"), "listening");
            server::run(listener, app, std::future::pending()).await.expect("a service");
        }
        Some("") => keeper.finish().await,
        Some(key) => {
            let immediate = env.get(URGENCY).is_some_and(|urgency| urgency == "immediate");
            keeper.rotate(key, immediate, &env[REQUEST]).await.expect("a rotation");
        }
    }
}

/// When to die.
#[derive(Clone, Debug)]
struct Fate(String);

impl Fate {
    async fn around<T>(&self, effect: &str, work: impl Future<Output = T>) -> T {
        self.die_if("before", effect).await;
        let done = work.await;
        self.die_if("after", effect).await;
        done
    }

    async fn die_if(&self, when: &str, effect: &str) {
        if self.0 == format!("{when} {effect}") {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            std::future::pending::<()>().await;
        }
    }
}

/// Dies around the first effect of a kind.
#[derive(Debug)]
struct Mortal<T: ?Sized> {
    inner: Arc<T>,
    fate: Fate,
}

#[tonic::async_trait]
impl KeyIssuer for Mortal<dyn KeyIssuer> {
    async fn list(&self, user: &str) -> Result<Vec<KeyFacts>, IssuerError> {
        self.inner.list(user).await
    }

    async fn create(&self, user: &str) -> Result<Credentials, IssuerError> {
        let create = async {
            let key = self.inner.create(user).await?;
            let path = std::env::var_os(SECRETS).expect("a file for secrets");
            let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).expect("a file");
            writeln!(file, "{}", key.secret_access_key()).expect("room");
            Ok(key)
        };
        self.fate.around("create", create).await
    }

    async fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IssuerError> {
        self.fate.around("set_status", self.inner.set_status(user, id, status)).await
    }

    async fn delete(&self, user: &str, id: &str) -> Result<(), IssuerError> {
        self.fate.around("delete", self.inner.delete(user, id)).await
    }
}

#[tonic::async_trait]
impl Vault for Mortal<dyn Vault> {
    async fn read(&self) -> Result<Held, VaultError> {
        self.inner.read().await
    }

    async fn stage(&self, id: &str, key: &Credentials) -> Result<(), VaultError> {
        self.fate.around("stage", self.inner.stage(id, key)).await
    }

    async fn promote(&self, from: Option<&str>, to: &str) -> Result<(), VaultError> {
        self.fate.around("promote", self.inner.promote(from, to)).await
    }

    async fn unstage(&self, id: &str) -> Result<(), VaultError> {
        self.fate.around("unstage", self.inner.unstage(id)).await
    }
}

/// An IAM that answers at once, and that S3 hears of later: what it shows is
/// what was asked of it, and what S3 goes by is the one behind it.
#[derive(Debug)]
struct Lagging {
    inner: Arc<dyn KeyIssuer>,
    lag: Duration,
    told: Arc<Mutex<Told>>,
}

#[derive(Debug, Default)]
struct Told {
    status: BTreeMap<String, Status>,
    deleted: BTreeSet<String>,
}

impl Lagging {
    fn later(&self, work: impl Future<Output = Result<(), IssuerError>> + Send + 'static) {
        let lag = self.lag;
        tokio::spawn(async move {
            tokio::time::sleep(lag).await;
            work.await.expect("IAM itself is well");
        });
    }

    fn set_later(&self, user: &str, id: &str) {
        let (inner, told, user, id) = (Arc::clone(&self.inner), Arc::clone(&self.told), user.to_owned(), id.to_owned());
        self.later(async move {
            let status = told.lock().unwrap().status.get(&id).copied();
            match status {
                Some(status) => inner.set_status(&user, &id, status).await,
                None => Ok(()),
            }
        });
    }
}

#[tonic::async_trait]
impl KeyIssuer for Lagging {
    async fn list(&self, user: &str) -> Result<Vec<KeyFacts>, IssuerError> {
        let mut keys = self.inner.list(user).await?;
        let told = self.told.lock().unwrap();
        keys.retain(|key| !told.deleted.contains(&key.id));
        for key in &mut keys {
            key.status = told.status.get(&key.id).copied().unwrap_or(key.status);
        }
        Ok(keys)
    }

    async fn create(&self, user: &str) -> Result<Credentials, IssuerError> {
        let key = self.inner.create(user).await?;
        let id = key.access_key_id();
        self.told.lock().unwrap().status.insert(id.to_owned(), Status::Active);
        self.inner.set_status(user, id, Status::Inactive).await?;
        self.set_later(user, id);
        Ok(key)
    }

    async fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IssuerError> {
        self.told.lock().unwrap().status.insert(id.to_owned(), status);
        self.set_later(user, id);
        Ok(())
    }

    async fn delete(&self, user: &str, id: &str) -> Result<(), IssuerError> {
        self.told.lock().unwrap().deleted.insert(id.to_owned());
        let (inner, user, id) = (Arc::clone(&self.inner), user.to_owned(), id.to_owned());
        self.later(async move { inner.delete(&user, &id).await });
        Ok(())
    }
}
