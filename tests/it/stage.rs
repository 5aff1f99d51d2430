//! What a test stands on: an S3, the service in this process on a port of its
//! own, and a plain HTTP client that knows nothing of AWS.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::app::{App, KeySource, Sources};
use fileaccess::config::{AuditSettings, Settings, SignerSettings, VaultSettings};
use fileaccess::dev;
use fileaccess::dev::iam::MemoryIam;
use fileaccess::issuer::Iam;
use fileaccess::object::BucketName;
use fileaccess::ops::upload_token::TokenKey;
use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use fileaccess::pb::presign_request::Operation;
use fileaccess::policy::grant::{Action, CallerPattern, GrantSettings, PrefixTemplate};
use fileaccess::server::{self, Listener};
use fileaccess::vault::memory::Memory;
use fileaccess::vault::secrets_manager::SecretsManager;
use reqwest::Method;
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint};

use crate::localstack;

/// The S3 behind a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Embedded,
    LocalStack,
}

/// Everything up and running, torn down when dropped.
pub struct Stage {
    pub endpoint: String,
    /// The bucket's name in S3; in the settings it is `files`.
    pub bucket: String,
    pub api: FileAccessClient<Channel>,
    pub channel: Channel,
    pub address: String,
    pub http: reqwest::Client,
    pub app: Arc<App>,
    /// Only with the embedded S3.
    pub iam: MemoryIam,
    _stop: Vec<oneshot::Sender<()>>,
    /// The audit trail.
    pub audit: std::path::PathBuf,
    _folders: (Option<tempfile::TempDir>, tempfile::TempDir),
}

/// The answer of S3.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }
}

/// A user of the embedded IAM, with one key.
pub const SIGNER_USER: &str = "signer";

impl Stage {
    pub async fn new(backend: Backend) -> Self {
        Self::with(backend, "", None).await
    }

    /// With more settings (TOML), and the signer's key if it is to be a
    /// certain one.
    #[allow(clippy::too_many_lines, reason = "one thing after the other")]
    pub async fn with(backend: Backend, settings: &str, key: Option<Credentials>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let bucket = format!("it-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let iam = MemoryIam::default();
        let mut stop = Vec::new();
        let mut folder = None;
        let (endpoint, identity) = match backend {
            Backend::Embedded => {
                let root = tempfile::tempdir().expect("a temporary folder");
                std::fs::create_dir(root.path().join(&bucket)).expect("a bucket");
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
                let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
                let (end, ended) = oneshot::channel::<()>();
                let service = dev::s3::service(root.path(), iam.clone()).expect("an S3");
                tokio::spawn(dev::s3::serve(listener, service, async {
                    let _ = ended.await;
                }));
                stop.push(end);
                folder = Some(root);
                iam.create_user("service").expect("a new user");
                (endpoint, iam.create_access_key("service", SystemTime::now()).expect("a first key"))
            }
            Backend::LocalStack => {
                let endpoint =
                    localstack::shared().expect("it is ignored where LocalStack can't be had").endpoint.clone();
                (endpoint, Credentials::new("test", "test", None, None, "test"))
            }
        };
        let key = key.unwrap_or_else(|| match backend {
            Backend::Embedded => {
                iam.create_user(SIGNER_USER).expect("a new user");
                iam.create_access_key(SIGNER_USER, SystemTime::now()).expect("a first key")
            }
            Backend::LocalStack => identity.clone(),
        });

        let settings = format!(
            "[buckets.files]\nbucket = '{bucket}'\nregion = 'us-east-1'\nendpoint = '{endpoint}'\npath_style = true\n\
             [signers.main]\nkind = 'ambient'\n[[routes]]\nbucket = 'files'\nsigner = 'main'\n{settings}"
        );
        let mut settings = Settings::load(&settings, &BTreeMap::new()).expect("good settings");
        if settings.grants.is_empty() {
            // Tests that are not about grants may do everything.
            settings.grants = settings.buckets.keys().map(everything).collect();
        }
        settings.limits.workers = 1;
        settings.limits.drain = std::time::Duration::ZERO;
        let mut signers = BTreeMap::new();
        for (name, signer) in &settings.signers {
            let source = match (signer, backend) {
                (SignerSettings::Ambient { .. }, _) => KeySource::Ambient(SharedCredentialsProvider::new(key.clone())),
                (SignerSettings::IamUser { user, .. }, Backend::Embedded) => {
                    iam.create_user(user).expect("a new user");
                    let (vault, issuer) = (Arc::new(Memory::default()), Arc::new(iam.clone()));
                    KeySource::IamUser { user: user.clone(), vault, issuer }
                }
                (SignerSettings::IamUser { user, vault }, Backend::LocalStack) => {
                    crate::behaviours::iam(&endpoint, "CreateUser", &[("UserName", user)]).await;
                    let root = || SharedCredentialsProvider::new(identity.clone());
                    let VaultSettings::SecretsManager(secret) = vault else { panic!("another vault") };
                    let at = secret.endpoint.clone().or_else(|| Some(endpoint.clone()));
                    let vault = Arc::new(SecretsManager::new(&secret.secret, "us-east-1", at, root()));
                    let issuer = Arc::new(Iam::new("us-east-1", Some(endpoint.clone()), root()));
                    KeySource::IamUser { user: user.clone(), vault, issuer }
                }
            };
            signers.insert(name.clone(), source);
        }
        let sources =
            Sources { identity: SharedCredentialsProvider::new(identity.clone()), signers, tokens: TokenKey::random() };
        let trail = tempfile::tempdir().expect("a temporary folder");
        let audit = trail.path().join("audit.jsonl");
        settings.audit = AuditSettings { stdout: false, file: Some(audit.clone()), ..settings.audit };
        let app = App::start(&settings, sources).await.expect("a replica");
        for keeper in app.keepers.values() {
            keeper.finish().await;
        }
        for keeper in app.keepers.values() {
            keeper.finish().await;
        }
        let any = "127.0.0.1:0".parse().expect("an address");
        let listener = Listener::bind(&fileaccess::config::Listen::Tcp(any)).await.expect("a port");
        let address = listener.address().expect("an address");
        let (end, ended) = oneshot::channel::<()>();
        tokio::spawn(server::run(listener, Arc::clone(&app), async {
            let _ = ended.await;
        }));
        stop.push(end);

        let channel = Endpoint::from_shared(format!("http://{address}")).expect("a URL").connect_lazy();
        let api = FileAccessClient::new(channel.clone()).max_decoding_message_size(64 << 20);
        let http = fileaccess::rotation::probe::Probe::http_client();
        let stage = Self {
            endpoint,
            bucket,
            api,
            channel,
            address,
            http,
            app,
            iam,
            audit,
            _stop: stop,
            _folders: (folder, trail),
        };
        if backend == Backend::LocalStack {
            stage.s3(identity).create_bucket().bucket(&stage.bucket).send().await.expect("a new bucket");
        }
        stage
    }

    /// The SDK's client, for what the tests arrange.
    pub fn s3(&self, credentials: Credentials) -> aws_sdk_s3::Client {
        s3(&self.endpoint, credentials)
    }

    pub async fn presign(&self, key: &str, operation: Operation) -> pb::PresignResponse {
        self.try_presign(ask(key, operation)).await.expect("a presigned request")
    }

    pub async fn try_presign(&self, ask: pb::PresignRequest) -> Result<pb::PresignResponse, tonic::Status> {
        self.api.clone().presign(ask).await.map(tonic::Response::into_inner)
    }

    /// Sends what was presigned, exactly as it was presigned.
    pub async fn send(&self, presigned: &pb::PresignResponse, body: impl Into<reqwest::Body>) -> Answer {
        self.send_as(&presigned.method, &presigned.url, &presigned.headers, body).await
    }

    pub async fn send_as(
        &self,
        method: &str,
        url: &str,
        headers: &BTreeMap<String, String>,
        body: impl Into<reqwest::Body>,
    ) -> Answer {
        let method: Method = method.parse().expect("a method");
        let mut request = self.http.request(method.clone(), url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if method == Method::PUT {
            request = request.body(body);
        }
        let response = request.send().await.expect("an answer");
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.bytes().await.map(|b| b.to_vec()).unwrap_or_default(),
        }
    }

    pub async fn put(&self, key: &str, body: &'static str) {
        let upload = self.presign(key, Operation::Upload(pb::Upload::default())).await;
        let answer = self.send(&upload, body).await;
        assert_eq!(answer.status, 200, "{key}: {}", answer.text());
    }

    pub async fn get(&self, key: &str) -> Answer {
        let download = self.presign(key, download()).await;
        self.send(&download, "").await
    }
}

/// All that there is to do in a bucket.
fn everything(bucket: &BucketName) -> GrantSettings {
    GrantSettings {
        caller: CallerPattern::parse("loopback").expect("a caller"),
        bucket: bucket.clone(),
        prefix: PrefixTemplate::parse("").expect("a prefix"),
        actions: Action::ALL.into(),
        max_ttl: None,
        max_size: None,
        content_types: None,
        create_only: false,
        checksum: false,
    }
}

/// The SDK's client of the S3 at `endpoint`.
pub fn s3(endpoint: &str, credentials: Credentials) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(aws_sdk_s3::config::BehaviorVersion::latest())
        .region(aws_sdk_s3::config::Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .credentials_provider(credentials)
        .http_client(fileaccess::store::http_client());
    aws_sdk_s3::Client::from_conf(config.build())
}

pub fn ask(key: &str, operation: Operation) -> pb::PresignRequest {
    pb::PresignRequest { bucket: "files".into(), key: key.into(), ttl: None, operation: Some(operation) }
}

pub fn download() -> Operation {
    Operation::Download(pb::Download::default())
}

#[allow(clippy::unnecessary_wraps, reason = "it is a field's value as it stands in a request")]
pub fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}
