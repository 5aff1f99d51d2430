//! Replicas as processes, with what they share: LocalStack's S3, IAM and
//! Secrets Manager. All that they log is kept, and searched for secrets.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::issuer::{Iam, KeyFacts, KeyIssuer as _, Status};
use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use fileaccess::pb::revoke_request::Target;
use fileaccess::pb::revoke_response::Outcome;
use fileaccess::rotation::probe::Probe;
use fileaccess::vault::secrets_manager::SecretsManager;
use fileaccess::vault::{Held, Vault as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::localstack;
use crate::stage::{ask, download};

/// The service's own secret. LocalStack accepts any.
const SERVICE_SECRET: &str = "hush-hush-secret-of-the-service";
/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// What replicas share.
pub struct Fleet {
    pub endpoint: String,
    pub http: reqwest::Client,
    /// As settings have them; a signer's user and its secret are named alike.
    pub signers: BTreeMap<String, String>,
    pub issuer: Iam,
    bucket: String,
    folder: tempfile::TempDir,
    known: Mutex<Known>,
}

/// What must never be logged.
#[derive(Default)]
struct Known {
    secrets: HashSet<String>,
    signatures: HashSet<String>,
    errors: String,
    replicas: u32,
}

/// A URL that a replica has handed out.
#[derive(Clone, Debug)]
pub struct Issued {
    pub url: String,
    /// The access key id that signed it.
    pub key: String,
    /// Before it was asked for.
    pub asked: SystemTime,
}

/// What an orderly answer to a revoke of a signer tells.
#[derive(Debug)]
pub struct Revoked {
    pub old: String,
    pub new: String,
    pub confirmed: SystemTime,
    pub steps: Vec<(String, SystemTime)>,
    /// From the call to `confirmed`.
    pub took: Duration,
}

impl Revoked {
    pub fn at(&self, step: &str) -> Option<SystemTime> {
        self.steps.iter().find(|(name, _)| name == step).map(|(_, at)| *at)
    }
}

pub fn identity() -> SharedCredentialsProvider {
    SharedCredentialsProvider::new(Credentials::new("test", SERVICE_SECRET, None, None, "test"))
}

fn time(time: Option<&prost_types::Timestamp>) -> SystemTime {
    (*time.expect("a time")).try_into().expect("a time after 1970")
}

impl Fleet {
    /// With so many signers, `s0` and on, whose users have no keys yet.
    pub async fn new(signers: usize) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let endpoint = localstack::shared().expect("it is ignored where LocalStack can't be had").endpoint.clone();
        let bucket = format!("fleet-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let issuer = Iam::new("us-east-1", Some(endpoint.clone()), identity());
        let fleet = Self {
            http: Probe::http_client(),
            signers: (0..signers).map(|n| (format!("s{n}"), format!("{bucket}-s{n}"))).collect(),
            issuer,
            folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder"),
            known: Mutex::default(),
            bucket,
            endpoint,
        };
        fleet.known.lock().unwrap().secrets.insert(SERVICE_SECRET.into());
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(aws_sdk_s3::config::BehaviorVersion::latest())
            .region(aws_sdk_s3::config::Region::new("us-east-1"))
            .endpoint_url(&fleet.endpoint)
            .force_path_style(true)
            .credentials_provider(identity())
            .http_client(fileaccess::store::http_client());
        let s3 = aws_sdk_s3::Client::from_conf(config.build());
        s3.create_bucket().bucket(&fleet.bucket).send().await.expect("a new bucket");
        for (signer, user) in &fleet.signers {
            crate::behaviours::iam(&fleet.endpoint, "CreateUser", &[("UserName", user)]).await;
            let put = s3.put_object().bucket(&fleet.bucket).key(format!("{signer}/object"));
            put.body(b"bytes".to_vec().into()).send().await.expect("a new object");
        }
        fleet
    }

    /// The settings of a replica for some signers, with its `[rotation]` table.
    /// The vault and IAM may be reached by another endpoint.
    pub fn settings(&self, signers: &[&str], tempo: &str, vault: &str, iam: &str) -> String {
        let (bucket, endpoint) = (&self.bucket, &self.endpoint);
        let mut text = format!(
            "listen = '127.0.0.1:0'\n\
             identity = {{ environment = {{ access_key_id = 'IT_ID', secret_access_key = 'IT_SECRET' }} }}\n\
             [buckets.files]\nbucket = '{bucket}'\nregion = 'us-east-1'\nendpoint = '{endpoint}'\npath_style = true\n\
             [iam]\nendpoint = '{iam}'\n[limits]\nworkers = 1\ndrain = '0s'\n[rotation]\n{tempo}\n\
             [[grants]]\ncaller = 'loopback'\nbucket = 'files'\nprefix = ''\n\
             actions = ['download', 'revoke_signer', 'revoke_object']\n"
        );
        for signer in signers {
            let user = &self.signers[*signer];
            let secret = format!("secret = '{user}', region = 'us-east-1', endpoint = '{vault}'");
            let _ = write!(
                text,
                "[signers.{signer}]\nkind = 'iam-user'\nuser = '{user}'\n\
                 vault = {{ secrets_manager = {{ {secret} }} }}\n\
                 [[routes]]\nbucket = 'files'\nprefix = '{signer}/'\nsigner = '{signer}'\n"
            );
        }
        text
    }

    /// The same, with nothing in between.
    pub fn plain(&self, signers: &[&str], tempo: &str) -> String {
        self.settings(signers, tempo, &self.endpoint, &self.endpoint)
    }

    /// A replica: the real binary.
    pub async fn replica(&self, settings: &str) -> Replica {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fileaccess"));
        command.args(["serve", "--config"]).arg(self.write(settings));
        let replica = self.start(command).await;
        assert!(!replica.address.is_empty(), "it has ended");
        replica
    }

    /// A replica of this test's own making, which may have ended already: see
    /// [`crate::puppet`].
    pub async fn puppet(&self, settings: &str, strings: &[(&str, &str)]) -> Replica {
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command.env(crate::puppet::CONFIG, self.write(settings)).env(crate::puppet::SECRETS, self.secrets_file());
        command.envs(strings.iter().copied());
        self.start(command).await
    }

    fn write(&self, settings: &str) -> PathBuf {
        let n = {
            let mut known = self.known.lock().unwrap();
            known.replicas += 1;
            known.replicas
        };
        let path = self.folder.path().join(format!("{n}.toml"));
        std::fs::write(&path, settings).expect("a file");
        path
    }

    fn secrets_file(&self) -> PathBuf {
        self.folder.path().join("secrets")
    }

    /// Starts a process, and waits until it listens or ends.
    async fn start(&self, mut command: Command) -> Replica {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let log = self.folder.path().join(format!("{}.log", COUNT.fetch_add(1, Ordering::Relaxed)));
        command.envs([
            ("IT_ID", "test"),
            ("IT_SECRET", SERVICE_SECRET),
            ("FILEACCESS_LOG", "debug,hyper=info,h2=info"),
        ]);
        let audit = std::fs::File::create(log.with_extension("audit")).expect("a trail");
        let mut child = command.stdin(Stdio::null()).stdout(audit).stderr(Stdio::piped()).spawn().expect("run");
        let lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut file = std::fs::File::create(&log).expect("a log");
        let (listens, listening) = oneshot::channel();
        let reader = std::thread::spawn(move || {
            let mut listens = Some(listens);
            for line in lines.map_while(Result::ok) {
                writeln!(file, "{line}").expect("room for a log");
                if line.contains("\"listening\"")
                    && let Some(listens) = listens.take()
                {
                    let line: serde_json::Value = serde_json::from_str(&line).expect("a line of JSON");
                    let _ = listens.send(line["address"].as_str().expect("an address").to_owned());
                }
            }
        });
        let mut replica = Replica { child, reader: Some(reader), address: String::new(), channel: None };
        // The end of the process closes the channel.
        replica.address =
            tokio::time::timeout(PATIENCE, listening).await.expect("it listens or ends").unwrap_or_default();
        if !replica.address.is_empty() {
            let endpoint = Endpoint::from_shared(format!("http://{}", replica.address)).expect("a URL");
            replica.channel = Some(endpoint.connect_lazy());
        }
        replica
    }

    pub fn vault(&self, signer: &str) -> SecretsManager {
        SecretsManager::new(&self.signers[signer], "us-east-1", Some(self.endpoint.clone()), identity())
    }

    /// What the vault holds; its secrets are watched for from now on.
    pub async fn held(&self, signer: &str) -> Held {
        let held = self.vault(signer).read().await.expect("what the vault holds");
        let versions = [&held.current, &held.pending, &held.previous].into_iter().flatten();
        self.known.lock().unwrap().secrets.extend(versions.map(|v| v.key.secret_access_key().to_owned()));
        held
    }

    pub async fn keys(&self, signer: &str) -> Vec<KeyFacts> {
        self.issuer.list(&self.signers[signer]).await.expect("the keys")
    }

    /// A download URL of `signer`, or the error, which is kept.
    pub async fn presign(&self, replica: &Replica, signer: &str) -> Result<Issued, tonic::Status> {
        let asked = SystemTime::now();
        let presigned = replica.api().presign(ask(&format!("{signer}/object"), download())).await;
        let url = presigned.inspect_err(|status| self.keep(status))?.into_inner().url;
        let (_, signature) = url.split_once("X-Amz-Signature=").expect("a signature");
        self.known.lock().unwrap().signatures.insert(signature[..64].to_owned());
        let key = fileaccess::signer::url::SignedUrl::parse(&url).expect("a presigned URL").access_key_id;
        Ok(Issued { url, key, asked })
    }

    fn keep(&self, status: &tonic::Status) {
        let mut known = self.known.lock().unwrap();
        let _ = writeln!(known.errors, "{status:?}");
        known.errors.push_str(&String::from_utf8_lossy(status.details()));
    }

    /// As soon as the replica signs for `signer`.
    pub async fn ready(&self, replica: &Replica, signer: &str) -> Issued {
        let ready = async {
            loop {
                match self.presign(replica, signer).await {
                    Ok(issued) => return issued,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("a key")
    }

    pub async fn fetch(&self, url: &str) -> u16 {
        self.http.get(url).send().await.expect("an answer of S3").status().as_u16()
    }

    pub async fn revoke(
        &self,
        replica: &Replica,
        signer: &str,
        urgency: pb::Urgency,
        request_id: &str,
    ) -> Result<Revoked, tonic::Status> {
        self.revoke_target(replica, signer, Target::Signer(signer.into()), urgency, request_id).await
    }

    /// `signer` is the one that `target` leads to.
    pub async fn revoke_target(
        &self,
        replica: &Replica,
        signer: &str,
        target: Target,
        urgency: pb::Urgency,
        request_id: &str,
    ) -> Result<Revoked, tonic::Status> {
        let called = SystemTime::now();
        let request = pb::RevokeRequest {
            target: Some(target),
            urgency: urgency.into(),
            request_id: request_id.into(),
            ..pb::RevokeRequest::default()
        };
        let revoked = replica.api().revoke(request).await.inspect_err(|status| self.keep(status))?.into_inner();
        let Some(Outcome::SignerRotation(rotation)) = revoked.outcome else { panic!("no signer was rotated") };
        self.held(signer).await;
        let confirmed = time(rotation.confirmed_at.as_ref());
        Ok(Revoked {
            old: rotation.old_access_key_id,
            new: rotation.new_access_key_id,
            steps: rotation.steps.into_iter().map(|step| (step.name, time(step.at.as_ref()))).collect(),
            took: confirmed.duration_since(called).unwrap_or_default(),
            confirmed,
        })
    }

    /// Waits until nothing is half done: one key, active and current, and
    /// nothing pending. Checks all the while that there is never a third key.
    pub async fn at_rest(&self, signer: &str) -> String {
        let rest = async {
            loop {
                let (keys, held) = (self.keys(signer).await, self.held(signer).await);
                assert!(keys.len() <= 2, "a third key: {keys:?}");
                if let ([key], Held { current: Some(current), pending: None, .. }) = (&keys[..], &held)
                    && key.status == Status::Active
                    && key.id == current.key.access_key_id()
                {
                    return key.id.clone();
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let Ok(key) = tokio::time::timeout(PATIENCE, rest).await else {
            panic!("{signer} is never at rest: {:?} {:?}", self.keys(signer).await, self.held(signer).await)
        };
        key
    }

    /// Searches all logs of ended replicas, and all errors, for secrets and
    /// signatures.
    pub async fn nothing_leaked(&self) {
        for signer in self.signers.keys() {
            self.held(signer).await;
        }
        let known = self.known.lock().unwrap();
        let mut secrets = known.secrets.clone();
        let more = std::fs::read_to_string(self.secrets_file()).unwrap_or_default();
        secrets.extend(more.lines().map(str::to_owned));
        assert!(secrets.len() > 1 && !known.signatures.is_empty(), "there is nothing to search for");
        let leak = |text: &str| {
            secrets.iter().any(|secret| text.contains(secret.as_str()))
                || hex_windows(text).any(|window| known.signatures.contains(window))
        };
        let signature = known.signatures.iter().next().expect("a signature");
        assert!(leak(&format!("&X-Amz-Signature={signature}&")), "the search finds nothing");
        let mut size = 0;
        for path in logs(self.folder.path()) {
            let log = std::fs::read_to_string(&path).expect("a log");
            let is_log = path.extension().is_some_and(|extension| extension == "log");
            assert!(!is_log || log.contains("DEBUG"), "nothing of interest is logged");
            let leaky = log.lines().find(|line| leak(line));
            assert_eq!(leaky, None, "a secret or a whole signature is logged");
            size += log.len();
        }
        assert!(!leak(&known.errors), "{}", known.errors);
        eprintln!(
            "searched {} KiB of logs and {} KiB of errors for {} secrets and {} signatures",
            size >> 10,
            known.errors.len() >> 10,
            secrets.len(),
            known.signatures.len()
        );
    }
}

fn logs(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let files = std::fs::read_dir(folder).expect("a folder").map(|file| file.expect("a file").path());
    files.filter(|path| path.extension().is_some_and(|e| e == "log" || e == "audit"))
}

/// All stretches of 64 hexadecimal digits.
fn hex_windows(text: &str) -> impl Iterator<Item = &str> {
    let runs = text.split(|c: char| !c.is_ascii_hexdigit()).filter(|run| run.len() >= 64);
    runs.flat_map(|run| (0..=run.len() - 64).map(move |at| &run[at..at + 64]))
}

/// A process, ended with the test.
pub struct Replica {
    pub address: String,
    pub channel: Option<Channel>,
    child: Child,
    reader: Option<JoinHandle<()>>,
}

impl Replica {
    pub fn api(&self) -> FileAccessClient<Channel> {
        FileAccessClient::new(self.channel.clone().expect("it has listened"))
    }

    /// Waits for its end.
    pub async fn ended(mut self) -> ExitStatus {
        let waiting = tokio::task::spawn_blocking(move || self.child.wait().expect("a status"));
        tokio::time::timeout(PATIENCE, waiting).await.expect("an end in time").expect("a status")
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The log is complete then.
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Forwards one port to another. While it is held, it accepts connections and
/// bytes, and forwards nothing; what came meanwhile goes on after that.
pub struct Proxy {
    pub endpoint: String,
    hold: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Proxy {
    pub async fn start(to: &str) -> Self {
        Self::on("127.0.0.1:0", to).await
    }

    pub async fn on(address: &str, to: &str) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let to = to.trim_start_matches("http://").to_owned();
        let (hold, paused) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            // The connections end with this task.
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let (to, paused) = (to.clone(), paused.clone());
                connections.spawn(async move {
                    let far = TcpStream::connect(to).await.expect("a peer");
                    let (near, far) = (near.into_split(), far.into_split());
                    tokio::join!(forward(near.0, far.1, paused.clone()), forward(far.0, near.1, paused));
                });
            }
        });
        Self { endpoint, hold, tasks }
    }

    pub fn hold(&self, hold: bool) {
        self.hold.send_replace(hold);
    }

    /// Hangs up, and listens no more. Tells where it has listened.
    pub async fn stop(mut self) -> String {
        self.tasks.shutdown().await;
        self.endpoint.trim_start_matches("http://").to_owned()
    }
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut paused: watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut bytes = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut bytes).await {
        if paused.wait_for(|paused| !paused).await.is_err() || to.write_all(&bytes[..n]).await.is_err() {
            break;
        }
    }
}

/// A load of presigning and fetching on one signer of some replicas.
pub struct Load {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    seen: Arc<Mutex<Seen>>,
}

/// What became of it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// All URLs, by the replica's place.
    pub issued: Vec<(usize, Issued)>,
    pub fetched: usize,
    /// URLs that S3 refused.
    pub refused: Vec<(usize, Issued)>,
    /// How often there was no URL, and what was said.
    pub unavailable: BTreeMap<String, usize>,
}

impl Load {
    /// Each replica is asked again and again, after `pause`; each URL is
    /// fetched at some moment until `late`.
    pub fn start(
        fleet: &Arc<Fleet>,
        replicas: &Arc<Vec<Replica>>,
        signer: &str,
        pause: Duration,
        late: Duration,
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mut tasks = JoinSet::new();
        for place in 0..replicas.len() {
            let (fleet, replicas, signer) = (Arc::clone(fleet), Arc::clone(replicas), signer.to_owned());
            let (seen, stopped) = (Arc::clone(&seen), stopped.clone());
            tasks.spawn(async move {
                let mut fetches = JoinSet::new();
                while !*stopped.borrow() {
                    match fleet.presign(&replicas[place], &signer).await {
                        Ok(issued) => {
                            seen.lock().unwrap().issued.push((place, issued.clone()));
                            let (fleet, seen) = (Arc::clone(&fleet), Arc::clone(&seen));
                            fetches.spawn(async move {
                                tokio::time::sleep(late.mul_f64(rand::random())).await;
                                let status = fleet.fetch(&issued.url).await;
                                let mut seen = seen.lock().unwrap();
                                seen.fetched += 1;
                                if status != 200 {
                                    seen.refused.push((place, issued));
                                }
                            });
                        }
                        Err(status) => {
                            *seen.lock().unwrap().unavailable.entry(status.message().to_owned()).or_default() += 1;
                        }
                    }
                    tokio::time::sleep(pause).await;
                }
                while fetches.join_next().await.is_some() {}
            });
        }
        Self { tasks, stop, seen }
    }

    /// What has been seen so far.
    pub fn so_far(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    pub async fn stop(mut self) -> Seen {
        self.stop.send_replace(true);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no panic");
        }
        self.so_far()
    }
}
