//! Typed settings: defaults < TOML file < environment. Validates everything,
//! opens nothing, prints no secret (the file holds none: keys are named by
//! the variables that hold them).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};

use crate::object::{BucketName, Lifetime, Prefix};
use crate::ops::upload_token::TokenKey;
use crate::policy::grant::GrantSettings;
use crate::store::copy::CopyLimits;

/// Variables that begin with this override settings: `FILEACCESS_TTL__DEFAULT`
/// is `ttl.default`.
pub const ENV_PREFIX: &str = "FILEACCESS_";

/// Variables with the prefix that are no settings.
const ENV_OTHER: [&str; 5] =
    ["FILEACCESS_CA", "FILEACCESS_CERTIFICATE", "FILEACCESS_KEY", "FILEACCESS_LOG", "FILEACCESS_SERVER"];

/// What is wrong with the settings, each fault with its path in the file.
#[derive(Debug, PartialEq, Eq)]
pub struct SettingsError(Vec<Fault>);

#[derive(Debug, PartialEq, Eq)]
struct Fault {
    path: String,
    problem: String,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, Fault { path, problem }) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{path}: {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SettingsError {}

impl SettingsError {
    fn one(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self(vec![Fault { path: path.into(), problem: problem.into() }])
    }
}

/// Everything that `fileaccess serve` is told.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where the gRPC service listens.
    #[serde(default)]
    pub listen: Listen,
    /// Mutual TLS at the service itself.
    pub tls: Option<TlsSettings>,
    /// Whom to believe who calls.
    pub trusted_sidecar: Option<SidecarSettings>,
    /// The service's own identity: it lists and heads, and never signs a URL.
    #[serde(default)]
    pub identity: Source,
    /// The buckets, by the name that callers use.
    #[serde(deserialize_with = "named_buckets")]
    pub buckets: BTreeMap<BucketName, BucketSettings>,
    /// The signers, by name.
    pub signers: BTreeMap<String, SignerSettings>,
    /// Which signer signs for which keys.
    pub routes: Vec<RouteSettings>,
    /// Who may ask for what. None: nobody for anything.
    #[serde(default)]
    pub grants: Vec<GrantSettings>,
    /// How long URLs live.
    #[serde(default)]
    pub ttl: TtlSettings,
    /// How URLs are ended by rotation.
    #[serde(default)]
    pub rotation: RotationSettings,
    /// Where the keys of `iam-user` signers are made.
    #[serde(default)]
    pub iam: IamSettings,
    /// Where it is written down who was given what.
    #[serde(default)]
    pub audit: AuditSettings,
    /// Uploads in parts.
    #[serde(default)]
    pub uploads: UploadSettings,
    /// What one replica takes on.
    #[serde(default)]
    pub limits: Limits,
}

/// Uploads in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UploadSettings {
    /// The variable that holds the key of upload tokens, which all replicas
    /// must share: at least 32 random bytes, as Base64. Without it each process
    /// makes its own, and takes no other's tokens.
    pub token_key: Option<String>,
}

/// Where it is written down who was given what: JSON lines.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditSettings {
    /// To standard output.
    pub stdout: bool,
    /// To a file, at its end.
    pub file: Option<PathBuf>,
    /// How many records may wait to be written.
    pub queue: usize,
    /// What happens to a call for whose record there is no room.
    pub when_full: WhenFull,
}

/// What happens to a call for whose audit record there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// It is refused.
    Refuse,
    /// It waits.
    Block,
}

impl Default for AuditSettings {
    fn default() -> Self {
        Self { stdout: true, file: None, queue: 16_384, when_full: WhenFull::Refuse }
    }
}

/// A listening address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address. Without `[tls]`, loopback only.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Default for Listen {
    fn default() -> Self {
        Self::Tcp(([127, 0, 0, 1], 50051).into())
    }
}

impl Listen {
    /// Parses `ADDRESS:PORT` or `unix:/PATH`.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(format!("`{text}` needs an absolute path, like \"unix:/run/fileaccess.sock\""))
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            format!("`{text}` is no address; write it like \"127.0.0.1:50051\" or \"unix:/run/fileaccess.sock\"")
        })
    }

    /// Whether it can be reached from other machines.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().is_loopback())
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// The files of mutual TLS, as PEM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// The service's certificate, and those between it and its root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The roots of the clients' certificates.
    pub client_ca: PathBuf,
}

/// A sidecar that is believed when it says for whom it calls, in
/// `x-forwarded-client-cert`. There is one on the listener, and nobody else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SidecarSettings {
    /// On a Unix socket: the users that it may run as.
    pub uids: Vec<u32>,
    /// On a loopback address: believe any local process.
    pub loopback: bool,
    /// Whether it appends to a header that it was sent (Envoy's
    /// `APPEND_FORWARD`), rather than replacing it (`SANITIZE_SET`). A header of
    /// several elements is refused unless it does.
    pub appends: bool,
}

/// Where a key comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Source {
    /// The AWS default chain: environment, profile, web identity, ECS, EC2.
    #[default]
    Chain,
    /// A named profile of the shared AWS files.
    Profile(String),
    /// A fixed key from the environment.
    Environment(KeyVariables),
}

/// The names of the variables that hold a fixed key.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyVariables {
    /// Holds the access key id.
    pub access_key_id: String,
    /// Holds the secret access key.
    pub secret_access_key: String,
    /// Holds the session token, if there is one.
    pub session_token: Option<String>,
}

/// A bucket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketSettings {
    /// Its name in S3.
    pub bucket: String,
    /// Its region, which is part of every signature's credential scope.
    pub region: String,
    /// The endpoint, for stores other than AWS's: `https://HOST[:PORT]`.
    pub endpoint: Option<String>,
    /// Put the bucket into the path rather than into the host name.
    #[serde(default)]
    pub path_style: bool,
    /// Accept an endpoint without TLS that is not on loopback.
    #[serde(default)]
    pub plain_http: bool,
    /// Sign `x-issue-id` into each URL. Off for stores that dislike it.
    #[serde(default = "yes")]
    pub issue_id: bool,
}

fn yes() -> bool {
    true
}

/// A signer, by kind.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum SignerSettings {
    /// A key that this service does not manage, and therefore can't revoke.
    Ambient {
        /// Where its key comes from.
        #[serde(default)]
        source: Source,
    },
    /// The key of an IAM user that is used for nothing else. This service makes
    /// its keys, and ends their URLs by making another.
    IamUser {
        /// The user's name.
        user: String,
        /// Where replicas find the key.
        vault: VaultSettings,
    },
}

/// Where the keys of an `iam-user` signer are kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum VaultSettings {
    /// A secret in AWS Secrets Manager, for any number of replicas.
    SecretsManager(SecretSettings),
    /// A file of mode 0600, for one machine.
    File(PathBuf),
}

/// A secret in AWS Secrets Manager.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretSettings {
    /// The secret's name.
    pub secret: String,
    /// Its region.
    pub region: String,
    /// The endpoint, if it is not AWS's own.
    pub endpoint: Option<String>,
}

/// Where IAM is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IamSettings {
    /// The region that requests are signed for: `us-east-1` in AWS's main
    /// partition.
    pub region: String,
    /// The endpoint, if it is not AWS's own.
    pub endpoint: Option<String>,
}

impl Default for IamSettings {
    fn default() -> Self {
        Self { region: "us-east-1".to_owned(), endpoint: None }
    }
}

/// Maps a bucket and a prefix to a signer. The longest prefix wins.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSettings {
    /// The bucket's name in the settings.
    #[serde(deserialize_with = "bucket_name")]
    pub bucket: BucketName,
    /// The beginning of the keys. Empty: all of the bucket.
    #[serde(default, deserialize_with = "prefix")]
    pub prefix: Prefix,
    /// The signer's name.
    pub signer: String,
}

/// How long URLs live.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TtlSettings {
    /// For a request without a ttl.
    #[serde(deserialize_with = "lifetime")]
    pub default: Lifetime,
    /// No URL lives longer: a longer ttl is clamped.
    #[serde(deserialize_with = "lifetime")]
    pub ceiling: Lifetime,
}

impl Default for TtlSettings {
    fn default() -> Self {
        let minutes = |m: u64| Lifetime::new(Duration::from_secs(m * 60)).unwrap_or(Lifetime::MAX);
        Self { default: minutes(15), ceiling: minutes(12 * 60) }
    }
}

/// How URLs are ended by rotation.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RotationSettings {
    /// The largest object, in bytes, that is copied in one request.
    pub copy_threshold: i64,
    /// The least size of the parts of what is larger, in bytes.
    pub copy_part_size: i64,
    /// How often a replica reads its signers' vaults.
    #[serde(deserialize_with = "duration")]
    pub refresh: Duration,
    /// How long it may sign after its last good read. A planned rotation takes
    /// a little longer than this.
    #[serde(deserialize_with = "duration")]
    pub lease: Duration,
    /// How often a replica looks for rotations that somebody has left.
    #[serde(deserialize_with = "duration")]
    pub reconcile: Duration,
    /// How old a key is that no vault knows, for it to be deleted.
    #[serde(deserialize_with = "duration")]
    pub orphan_age: Duration,
    /// How soon a step that waits is looked at again.
    #[serde(deserialize_with = "duration")]
    pub poll: Duration,
}

impl Default for RotationSettings {
    fn default() -> Self {
        let CopyLimits { threshold, part_size } = CopyLimits::default();
        Self {
            copy_threshold: threshold,
            copy_part_size: part_size,
            refresh: Duration::from_secs(5),
            lease: Duration::from_secs(15),
            reconcile: Duration::from_mins(1),
            orphan_age: Duration::from_mins(1),
            poll: Duration::from_secs(1),
        }
    }
}

impl RotationSettings {
    /// As the store has them.
    #[must_use]
    pub fn copy_limits(&self) -> CopyLimits {
        CopyLimits { threshold: self.copy_threshold, part_size: self.copy_part_size }
    }
}

/// What one replica takes on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Threads that serve calls, each with a runtime of its own. 0: one a core.
    pub workers: usize,
    /// Connections at once. Further ones wait in the kernel's queue.
    pub connections: usize,
    /// Calls at once on one connection (HTTP/2 streams).
    pub streams: u32,
    /// Calls at once, on all connections. Further ones are refused.
    pub calls: usize,
    /// Calls a second that one caller may make, and as many at once. 0: any.
    pub calls_per_second: u32,
    /// URLs a second that one caller may ask for, and as many at once. 0: any.
    pub urls_per_second: u32,
    /// The largest request, in bytes.
    pub request_bytes: usize,
    /// The largest response, in bytes.
    pub response_bytes: usize,
    /// The deadline of a call that brings none, and the most that one may bring.
    #[serde(deserialize_with = "duration")]
    pub deadline: Duration,
    /// How long a new connection may take until it speaks HTTP/2, TLS included.
    #[serde(deserialize_with = "duration")]
    pub handshake_timeout: Duration,
    /// How long a connection may have no call before it is told to go (GOAWAY).
    /// 0: for ever. gRPC's `MAX_CONNECTION_IDLE`.
    #[serde(deserialize_with = "duration")]
    pub max_connection_idle: Duration,
    /// How old a connection may be before it is told to go, more or less by a
    /// tenth. 0: any. gRPC's `MAX_CONNECTION_AGE`. The grace is what calls may
    /// take: [`Self::keepalive_timeout`] and [`Self::deadline`].
    #[serde(deserialize_with = "duration")]
    pub max_connection_age: Duration,
    /// How often a silent connection is asked whether it is alive.
    #[serde(deserialize_with = "duration")]
    pub keepalive: Duration,
    /// How long it may take to answer that.
    #[serde(deserialize_with = "duration")]
    pub keepalive_timeout: Duration,
    /// After SIGTERM: how long to go on serving, health saying `NOT_SERVING`,
    /// so that balancers move away.
    #[serde(deserialize_with = "duration")]
    pub drain: Duration,
    /// After that: how long running calls may take to finish.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: 0,
            connections: 1024,
            streams: 256,
            calls: 1024,
            calls_per_second: 0,
            urls_per_second: 0,
            request_bytes: 4 << 20,
            response_bytes: 16 << 20,
            deadline: Duration::from_secs(30),
            handshake_timeout: Duration::from_secs(10),
            max_connection_idle: Duration::from_mins(30),
            max_connection_age: Duration::from_hours(1),
            keepalive: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            drain: Duration::from_secs(5),
            grace: Duration::from_secs(30),
        }
    }
}

impl Settings {
    /// Reads the text of a settings file and lays the variables of `env` over
    /// it.
    ///
    /// # Errors
    /// Each fault with its path in the file, the value, and what would be
    /// right.
    pub fn load(text: &str, env: &BTreeMap<String, String>) -> Result<Self, SettingsError> {
        let mut table: toml::Table =
            toml::from_str(text).map_err(|e| SettingsError::one("settings", e.to_string().trim_end()))?;
        for (name, value) in env {
            let Some(path) = name.strip_prefix(ENV_PREFIX) else { continue };
            if !ENV_OTHER.contains(&name.as_str()) {
                overlay(&mut table, &path.to_lowercase(), value)
                    .map_err(|problem| SettingsError::one(name, problem))?;
            }
        }
        let settings: Self = serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|e| {
            let path = e.path().to_string();
            SettingsError::one(if path == "." { "settings".into() } else { path }, e.inner().to_string().trim_end())
        })?;
        settings.check(env)?;
        Ok(settings)
    }

    /// What no single field can tell.
    fn check(&self, env: &BTreeMap<String, String>) -> Result<(), SettingsError> {
        let mut faults = Faults::default();
        self.check_callers(&mut faults);
        self.check_buckets(&mut faults);
        self.check_signers(&mut faults, env);
        self.check_routes(&mut faults);
        self.check_grants(&mut faults);
        self.check_uploads(&mut faults, env);
        self.check_limits(&mut faults);
        if faults.0.is_empty() { Ok(()) } else { Err(SettingsError(faults.0)) }
    }

    /// Whether the listener can tell who calls, in one way only.
    fn check_callers(&self, faults: &mut Faults) {
        let listen = &self.listen;
        if listen.is_remote() && self.tls.is_none() {
            let problem = format!(
                "`{listen}` is not loopback, and callers can't be told apart there; \
                 add [tls], or listen on loopback or on a Unix socket, behind a sidecar"
            );
            faults.add("listen", problem);
        }
        if let Some(TlsSettings { certificate, key, client_ca }) = &self.tls {
            for (field, path) in [("certificate", certificate), ("key", key), ("client_ca", client_ca)] {
                if !path.is_absolute() {
                    faults.add(format!("tls.{field}"), format!("`{}` needs an absolute path", path.display()));
                }
            }
        }
        let Some(SidecarSettings { uids, loopback, .. }) = &self.trusted_sidecar else { return };
        if self.tls.is_some() {
            faults
                .add("trusted_sidecar", "with [tls], callers are told by their own certificates; keep one of the two");
        }
        match listen {
            Listen::Unix(_) => {
                if *loopback {
                    let problem = format!("`true` says nothing about `{listen}`; name the sidecar's `uids` instead");
                    faults.add("trusted_sidecar.loopback", problem);
                } else if uids.is_empty() {
                    faults.add("trusted_sidecar.uids", "is empty; name the users of the sidecar, like [1337]");
                }
            }
            Listen::Tcp(_) => {
                if !uids.is_empty() {
                    let problem = format!(
                        "`{uids:?}` can't be told on `{listen}`; listen on a Unix socket, like \"unix:/run/fileaccess.sock\""
                    );
                    faults.add("trusted_sidecar.uids", problem);
                }
                if *loopback && listen.is_remote() {
                    let problem =
                        format!("`true` contradicts `{listen}`; listen on loopback, like \"127.0.0.1:50051\"");
                    faults.add("trusted_sidecar.loopback", problem);
                } else if !*loopback && uids.is_empty() {
                    let problem = "`false`: any local process can forge the header on a TCP address; \
                                   accept that with loopback = true, or listen on a Unix socket and name the sidecar's `uids`";
                    faults.add("trusted_sidecar.loopback", problem);
                }
            }
        }
    }

    fn check_buckets(&self, faults: &mut Faults) {
        if self.buckets.is_empty() {
            faults.add("buckets", "there is none; add a table like [buckets.photos]");
        }
        for (name, BucketSettings { bucket, region, endpoint, plain_http, .. }) in &self.buckets {
            let path = format!("buckets.{name}");
            if !is_s3_name(bucket) {
                let problem = format!("`{bucket}` is no bucket name: 3 to 63 characters of a-z, 0-9, `-` and `.`");
                faults.add(format!("{path}.bucket"), problem);
            }
            if region.is_empty() || !region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
                let problem = format!("`{region}` is no region; write it like \"eu-central-1\"");
                faults.add(format!("{path}.region"), problem);
            }
            if let Some(Err(problem)) = endpoint.as_ref().map(|endpoint| check_endpoint(endpoint, *plain_http)) {
                faults.add(format!("{path}.endpoint"), problem);
            }
        }
    }

    fn check_signers(&self, faults: &mut Faults, env: &BTreeMap<String, String>) {
        if self.signers.is_empty() {
            faults.add("signers", "there is none; add a table like [signers.main]");
        }
        check_source(faults, "identity", &self.identity, env);
        for (name, signer) in &self.signers {
            match signer {
                SignerSettings::Ambient { source } => {
                    check_source(faults, &format!("signers.{name}.source"), source, env);
                }
                SignerSettings::IamUser { user, vault } => {
                    let of_iam = |b: u8| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b);
                    if !(1..=64).contains(&user.len()) || !user.bytes().all(of_iam) {
                        let problem = format!("`{user}` is no IAM user name: 1 to 64 of letters, digits and `+=,.@_-`");
                        faults.add(format!("signers.{name}.user"), problem);
                    }
                    if let VaultSettings::File(path) = vault
                        && !path.is_absolute()
                    {
                        let problem = format!("`{}` needs an absolute path", path.display());
                        faults.add(format!("signers.{name}.vault.file"), problem);
                    }
                    if !self.routes.iter().any(|route| route.signer == *name) {
                        faults.add(
                            format!("signers.{name}"),
                            "no route names it, so S3 can't be asked about its keys; add one",
                        );
                    }
                }
            }
        }
        let RotationSettings { refresh, lease, poll, .. } = &self.rotation;
        if refresh.is_zero() || poll.is_zero() || *lease < *refresh * 2 {
            let problem = "`refresh` and `poll` must be more than 0, and `lease` at least twice `refresh`";
            faults.add("rotation", problem);
        }
    }

    fn check_routes(&self, faults: &mut Faults) {
        if self.routes.is_empty() {
            faults.add("routes", "there is none; add [[routes]] with a bucket and a signer");
        }
        let mut seen = BTreeSet::new();
        for (n, RouteSettings { bucket, prefix, signer }) in self.routes.iter().enumerate() {
            if !self.buckets.contains_key(bucket) {
                let problem = format!("there is no bucket `{bucket}`; name one of [buckets]");
                faults.add(format!("routes[{n}].bucket"), problem);
            }
            if !self.signers.contains_key(signer) {
                let problem = format!("there is no signer `{signer}`; name one of [signers]");
                faults.add(format!("routes[{n}].signer"), problem);
            }
            if !seen.insert((bucket, prefix)) {
                let problem =
                    format!("bucket `{bucket}` with prefix `{}` has a route already; keep one", prefix.as_str());
                faults.add(format!("routes[{n}]"), problem);
            }
        }
    }

    fn check_grants(&self, faults: &mut Faults) {
        for (n, grant) in self.grants.iter().enumerate() {
            let bucket = &grant.bucket;
            if !self.buckets.contains_key(bucket) {
                let problem = format!("there is no bucket `{bucket}`; name one of [buckets]");
                faults.add(format!("grants[{n}].bucket"), problem);
            }
            for (field, problem) in grant.faults() {
                faults.add(format!("grants[{n}].{field}"), problem);
            }
        }
    }

    fn check_uploads(&self, faults: &mut Faults, env: &BTreeMap<String, String>) {
        let Some(variable) = &self.uploads.token_key else { return };
        let problem = match env.get(variable).map(|key| TokenKey::parse(key)) {
            Some(Ok(_)) => return,
            None => format!("the variable `{variable}` is not set; set it to the same key on all replicas"),
            // The value is a secret.
            Some(Err(want)) => format!("the variable `{variable}` must hold {want}"),
        };
        faults.add("uploads.token_key", problem);
    }

    fn check_limits(&self, faults: &mut Faults) {
        let (mib, gib) = (1 << 20, 1 << 30);
        for (field, bytes) in
            [("copy_threshold", self.rotation.copy_threshold), ("copy_part_size", self.rotation.copy_part_size)]
        {
            if !(5 * mib..=5 * gib).contains(&bytes) {
                let problem = format!("{bytes} must be 5 MiB to 5 GiB: 5242880 to 5368709120");
                faults.add(format!("rotation.{field}"), problem);
            }
        }
        let AuditSettings { stdout, file, queue, .. } = &self.audit;
        match file {
            None if !stdout => {
                faults.add("audit", "neither `stdout` nor `file` is set, so that nobody could be traced");
            }
            Some(path) if !path.is_absolute() => {
                faults.add("audit.file", format!("`{}` needs an absolute path", path.display()));
            }
            _ => {}
        }
        if !(1..=1_000_000).contains(queue) {
            faults.add("audit.queue", format!("{queue} must be 1 to 1000000"));
        }
        let TtlSettings { default, ceiling } = self.ttl;
        if default > ceiling {
            let (default, ceiling) = (default.seconds(), ceiling.seconds());
            let problem = format!("{default} s is above `ttl.ceiling`, {ceiling} s; lower it or raise the ceiling");
            faults.add("ttl.default", problem);
        }
        let mut within = |field: &str, value: usize, range: RangeInclusive<usize>| {
            if !range.contains(&value) {
                let problem = format!("{value} must be {} to {}", range.start(), range.end());
                faults.add(format!("limits.{field}"), problem);
            }
        };
        let limits = &self.limits;
        within("workers", limits.workers, 0..=256);
        within("connections", limits.connections, 1..=1_000_000);
        within("streams", limits.streams as usize, 1..=10_000);
        within("calls", limits.calls, 1..=1_000_000);
        within("request_bytes", limits.request_bytes, 1024..=64 << 20);
        within("response_bytes", limits.response_bytes, 64 << 10..=256 << 20);
        for (field, duration) in [
            ("deadline", limits.deadline),
            ("handshake_timeout", limits.handshake_timeout),
            ("keepalive", limits.keepalive),
            ("keepalive_timeout", limits.keepalive_timeout),
        ] {
            if duration.is_zero() {
                faults.add(format!("limits.{field}"), "must be more than 0; write it like \"30s\"");
            }
        }
    }
}

/// All faults that were found, so that they are told at once.
#[derive(Default)]
struct Faults(Vec<Fault>);

impl Faults {
    fn add(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        self.0.push(Fault { path: path.into(), problem: problem.into() });
    }
}

fn check_source(faults: &mut Faults, path: &str, source: &Source, env: &BTreeMap<String, String>) {
    match source {
        Source::Chain => {}
        Source::Profile(profile) => {
            if profile.is_empty() {
                faults.add(format!("{path}.profile"), "is empty; name a profile of the shared AWS files");
            }
        }
        Source::Environment(KeyVariables { access_key_id, secret_access_key, session_token }) => {
            let named = [
                ("access_key_id", Some(access_key_id)),
                ("secret_access_key", Some(secret_access_key)),
                ("session_token", session_token.as_ref()),
            ];
            for (field, variable) in named {
                let Some(variable) = variable else { continue };
                if env.get(variable).is_none_or(String::is_empty) {
                    let problem = format!("the variable `{variable}` is not set; set it to the key");
                    faults.add(format!("{path}.environment.{field}"), problem);
                }
            }
        }
    }
}

/// Sets the value at `path` (`a__b__c`), as TOML if it is that, else as text.
fn overlay(table: &mut toml::Table, path: &str, value: &str) -> Result<(), String> {
    let mut segments: Vec<&str> = path.split("__").collect();
    let last = segments.pop().unwrap_or_default();
    let mut at = table;
    for segment in segments {
        at = at
            .entry(segment)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| format!("`{segment}` is no table of the settings"))?;
    }
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}")).ok().filter(|t| t.len() == 1);
    let value = parsed.and_then(|mut t| t.remove("v")).unwrap_or_else(|| value.into());
    at.insert(last.to_owned(), value);
    Ok(())
}

/// S3's rules for general purpose buckets, without the finer ones.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html>
fn is_s3_name(name: &str) -> bool {
    (3..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && !name.starts_with(['-', '.'])
        && !name.ends_with(['-', '.'])
        && !name.contains("..")
}

fn check_endpoint(endpoint: &str, plain_http: bool) -> Result<(), String> {
    let want = "write it like \"https://s3.example.com\"";
    let url = reqwest::Url::parse(endpoint).map_err(|e| format!("`{endpoint}` is no URL ({e}); {want}"))?;
    // The value may hold a password here, so it is not printed.
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!("has a user or password in it; {want}"));
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
        return Err(format!("`{endpoint}` has more than a host and a port; {want}"));
    }
    let Some(host) = url.host_str() else { return Err(format!("`{endpoint}` has no host; {want}")) };
    match url.scheme() {
        "https" => Ok(()),
        "http" => {
            let ip = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
            if plain_http || host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback()) {
                Ok(())
            } else {
                Err(format!(
                    "`{endpoint}` has no TLS, so that anybody on the way can take a URL and use it; use https, or accept it with plain_http = true"
                ))
            }
        }
        _ => Err(format!("`{endpoint}` is neither http nor https; {want}")),
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text)
        .map_err(|_| de::Error::custom(format!("`{text}` is no duration; write it like \"15m\" or \"1h 30m\"")))
}

pub(crate) fn lifetime<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Lifetime, D::Error> {
    let duration = duration(deserializer)?;
    Lifetime::new(duration)
        .ok_or_else(|| de::Error::custom(format!("`{}` must {}", humantime::format_duration(duration), Lifetime::WANT)))
}

pub(crate) fn bucket_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BucketName, D::Error> {
    let text = String::deserialize(deserializer)?;
    BucketName::parse(&text).map_err(|want| de::Error::custom(format!("`{text}` must be {want}")))
}

fn prefix<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Prefix, D::Error> {
    let text = String::deserialize(deserializer)?;
    Prefix::parse(text.as_str()).map_err(|want| de::Error::custom(format!("`{}` must {want}", text.escape_debug())))
}

fn named_buckets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<BucketName, BucketSettings>, D::Error> {
    BTreeMap::<String, BucketSettings>::deserialize(deserializer)?
        .into_iter()
        .map(|(name, bucket)| match BucketName::parse(&name) {
            Ok(name) => Ok((name, bucket)),
            Err(want) => Err(de::Error::custom(format!("the name `{}` must be {want}", name.escape_debug()))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = r#"
        listen = "unix:/run/fa.sock"
        [buckets.photos]
        bucket = "photos-prod"
        region = "eu-central-1"
        [signers.main]
        kind = "ambient"
        source = { environment = { access_key_id = "KEY_ID", secret_access_key = "SECRET" } }
        [[routes]]
        bucket = "photos"
        signer = "main"
        [[grants]]
        caller = "spiffe://mesh.test/ns/*/sa/web-*"
        bucket = "photos"
        prefix = "{caller.ns}/"
        actions = ["download", "upload"]
        max_ttl = "1h"
        max_size = 10
        content_types = ["image/*"]
        create_only = true
        checksum = true
        [ttl]
        default = "5m"
    "#;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        [("KEY_ID", "AKIA"), ("SECRET", "hush-hush")]
            .iter()
            .chain(pairs)
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn a_good_file_and_its_overrides() {
        let settings = Settings::load(GOOD, &env(&[])).unwrap();
        assert_eq!(settings.listen, Listen::Unix("/run/fa.sock".into()));
        assert_eq!(settings.ttl.default.seconds(), 300);

        let overrides = [
            ("FILEACCESS_LISTEN", "[::1]:7"),
            ("FILEACCESS_TTL__DEFAULT", "2m"),
            ("FILEACCESS_LIMITS__STREAMS", "9"),
            ("FILEACCESS_BUCKETS__PHOTOS__PATH_STYLE", "true"),
            ("FILEACCESS_SERVER", "not a setting"),
        ];
        let settings = Settings::load(GOOD, &env(&overrides)).unwrap();
        assert_eq!(settings.listen, Listen::Tcp("[::1]:7".parse().unwrap()));
        assert_eq!(settings.ttl.default.seconds(), 120);
        assert_eq!(settings.limits.streams, 9);
        assert!(settings.buckets.values().all(|b| b.path_style));
    }

    #[test]
    fn each_fault_names_its_path_the_value_and_what_would_be_right() {
        for (from, to, expect) in [
            ("\"5m\"", "\"5 parsecs\"", "ttl.default: `5 parsecs` is no duration"),
            ("\"5m\"", "\"8days\"", "ttl.default: `8days` must be 1 second to 7 days"),
            ("\"5m\"", "\"7days\"", "ttl.default: 604800 s is above `ttl.ceiling`"),
            ("\"5m\"", "5", "ttl.default: invalid type: integer `5`, expected a string"),
            ("[ttl]", "[tll]", "tll: unknown field `tll`, expected one of"),
            ("unix:/run/fa.sock", "0.0.0.0:50051", "listen: `0.0.0.0:50051` is not loopback"),
            ("unix:/run/fa.sock", "unix:fa.sock", "listen: `unix:fa.sock` needs an absolute path"),
            ("\"main\"", "\"mian\"", "routes[0].signer: there is no signer `mian`"),
            ("bucket = \"photos\"", "bucket = \"fotos\"", "routes[0].bucket: there is no bucket `fotos`"),
            (
                "bucket = \"photos\"\n        prefix",
                "bucket = \"x\"\n        prefix",
                "grants[0].bucket: there is no bucket `x`",
            ),
            ("ns/*/sa", "n*s/sa", "grants[0].caller: `spiffe://mesh.test/n*s/sa/web-*` has a path segment that"),
            (
                "{caller.ns}/",
                "{caller.team}/",
                "grants[0].prefix: `{caller.team}` is in no caller `spiffe://mesh.test/ns/*/sa/web-*`",
            ),
            ("{caller.ns}/", "{caller.ns}", "grants[0].prefix: `{caller.ns}` must have a `/` behind"),
            ("prefix = \"{caller.ns}/\"", "", "grants[0]: missing field `prefix`"),
            ("\"upload\"", "\"uplaod\"", "grants[0].actions[1]: unknown variant `uplaod`, expected one of `download`"),
            ("[\"download\", \"upload\"]", "[]", "grants[0].actions: is empty; name at least one"),
            ("\"1h\"", "\"0s\"", "grants[0].max_ttl: `0s` must be 1 second to 7 days"),
            ("max_size = 10", "max_size = -1", "grants[0].max_size: invalid value: integer `-1`"),
            ("[\"image/*\"]", "[\"image\"]", "grants[0].content_types[0]: `image` is no media type"),
            ("[\"image/*\"]", "[]", "grants[0].content_types: is empty"),
            ("max_ttl", "max_tll", "grants[0].max_tll: unknown field `max_tll`"),
            ("photos-prod", "Photos", "buckets.photos.bucket: `Photos` is no bucket name"),
            ("eu-central-1", "", "buckets.photos.region: `` is no region"),
            ("\"ambient\"", "\"iam\"", "signers.main.kind: unknown variant `iam`, expected"),
            (
                "\"SECRET\"",
                "\"SECRETS\"",
                "signers.main.source.environment.secret_access_key: the variable `SECRETS` is not set",
            ),
            ("[ttl]", "[ttl", "settings: "),
            (
                "[ttl]",
                "[uploads]\ntoken_key = \"NOWHERE\"\n[ttl]",
                "uploads.token_key: the variable `NOWHERE` is not set; set it to the same key on all replicas",
            ),
            (
                "[ttl]",
                "[uploads]\ntoken_key = \"SECRET\"\n[ttl]",
                "uploads.token_key: the variable `SECRET` must hold at least 32 random bytes as Base64",
            ),
            (
                "region = \"eu-central-1\"",
                "region = \"eu\"\nendpoint = \"http://minio:9000\"",
                "buckets.photos.endpoint: `http://minio:9000` has no TLS",
            ),
            (
                "region = \"eu-central-1\"",
                "region = \"eu\"\nendpoint = \"https://u:pw@x\"",
                "buckets.photos.endpoint: has a user or password",
            ),
        ] {
            let error = Settings::load(&GOOD.replace(from, to), &env(&[])).unwrap_err().to_string();
            assert!(error.starts_with(expect), "{to}: {error}");
            assert!(!error.contains("hush") && !error.contains("pw@"), "{error}");
        }
        let error = Settings::load(GOOD, &env(&[("FILEACCESS_LISTEN__X", "1")])).unwrap_err().to_string();
        assert_eq!(error, "FILEACCESS_LISTEN__X: `listen` is no table of the settings");
        let error = Settings::load("", &env(&[])).unwrap_err().to_string();
        assert!(error.contains("missing field `buckets`"), "{error}");
    }

    #[test]
    fn callers_must_be_told_apart_in_one_way() {
        const TLS: &str = "[tls]\ncertificate = '/t.crt'\nkey = '/t.key'\nclient_ca = '/c.crt'\n";
        let load = |listen: &str, more: &str| {
            let text = GOOD.replace("unix:/run/fa.sock", listen) + more;
            Settings::load(&text, &env(&[])).map_err(|error| error.to_string())
        };
        for (listen, more) in [
            ("0.0.0.0:50051", TLS),
            ("127.0.0.1:0", TLS),
            ("127.0.0.1:0", "[trusted_sidecar]\nloopback = true"),
            ("unix:/run/fa.sock", "[trusted_sidecar]\nuids = [1337, 0]"),
        ] {
            assert!(load(listen, more).is_ok(), "{listen} {more}");
        }
        let both = format!("{TLS}[trusted_sidecar]\nloopback = true");
        for (listen, more, expect) in [
            ("0.0.0.0:1", "", "listen: `0.0.0.0:1` is not loopback, and callers can't be told apart there; add [tls]"),
            ("[::]:1", "[trusted_sidecar]\nloopback = true", "listen: `[::]:1` is not loopback"),
            ("127.0.0.1:0", &both, "trusted_sidecar: with [tls]"),
            ("127.0.0.1:0", "[trusted_sidecar]", "trusted_sidecar.loopback: `false`"),
            (
                "127.0.0.1:0",
                "[trusted_sidecar]\nuids = [7]",
                "trusted_sidecar.uids: `[7]` can't be told on `127.0.0.1:0`",
            ),
            ("unix:/s", "[trusted_sidecar]", "trusted_sidecar.uids: is empty; name"),
            ("unix:/s", "[trusted_sidecar]\nuids = [7]\nloopback = true", "trusted_sidecar.loopback: `true`"),
            ("unix:/s", "[trusted_sidecar]\nuids = [-1]", "trusted_sidecar.uids[0]: invalid value"),
            ("unix:/s", "[tls]\ncertificate = '/c'\nkey = '/k'", "tls: missing field `client_ca`"),
            ("unix:/s", &TLS.replace("/t.key", "t.key"), "tls.key: `t.key` needs an absolute path"),
        ] {
            let error = load(listen, more).unwrap_err();
            assert!(error.starts_with(expect), "{listen} {more}: {error}");
        }
        let error = load("0.0.0.0:1", "[trusted_sidecar]\nloopback = true").unwrap_err();
        assert!(error.contains("\ntrusted_sidecar.loopback: `true` contradicts `0.0.0.0:1`"), "{error}");
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let text = GOOD.replace("\"main\"", "\"x\"").replace("photos-prod", "P");
        assert_eq!(Settings::load(&text, &env(&[])).unwrap_err().to_string().lines().count(), 2);
    }

    proptest! {
        #[test]
        fn any_text_parses_or_says_where_it_is_wrong(text in "\\PC*") {
            if let Err(e) = Settings::load(&text, &BTreeMap::new()) {
                prop_assert!(e.to_string().contains(": "));
            }
        }

        #[test]
        fn any_mutation_of_a_good_file_parses_or_says_where_it_is_wrong(
            cut in 0..GOOD.len(), len in 0..40usize, insert in "[\\PC\n]{0,12}", name in "[A-Z_]{0,20}", value in "\\PC{0,12}",
        ) {
            let end = (cut + len).min(GOOD.len());
            let text = format!("{}{insert}{}", &GOOD[..cut], &GOOD[end..]);
            if let Err(e) = Settings::load(&text, &env(&[(&format!("FILEACCESS_{name}"), &value)])) {
                prop_assert!(e.to_string().contains(": "));
            }
        }
    }
}
