//! A client of the service: files in and out of S3 by presigned URLs. The
//! service signs, the bytes go between this process and S3.
//!
//! ```
//! # #[cfg(feature = "dev")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! # use fileaccess::{config::Listen, dev};
//! use fileaccess::client::{Client, Download, Server, Source, Upload};
//!
//! # let any = ([127, 0, 0, 1], 0).into();
//! # let options = dev::Options { data: None, listen: Listen::Tcp(any), s3_listen: any, web_listen: any };
//! # let dev = dev::Dev::start(&options).await?;
//! # let address = format!("http://{}", dev.address);
//! # let serving = tokio::spawn(dev.serve(std::future::pending()));
//! # let folder = tempfile::tempdir()?;
//! # let (recipe, copy) = (folder.path().join("recipe.txt"), folder.path().join("copy.txt"));
//! // `fileaccess dev` listens on http://127.0.0.1:50051, which is the default.
//! # let _ = Server::default();
//! let client = Client::connect(&Server { address, ..Server::default() })?;
//!
//! std::fs::write(&recipe, "be generous with the paprika")?;
//! let upload = Upload {
//!     content_type: Some("text/plain".to_owned()),
//!     metadata: [("cook".to_owned(), "anna".to_owned())].into(),
//!     create_only: true,
//!     ..Upload::to("demo", "recipe.txt")
//! };
//! let stored = client.upload(Source::open(&recipe)?, upload).await?;
//! assert_eq!(stored.size, 28);
//!
//! let download = Download::of("demo", "recipe.txt").on_progress(|so_far| println!("{} bytes", so_far.bytes));
//! client.download(&download, &copy).await?;
//! assert_eq!(std::fs::read_to_string(&copy)?, "be generous with the paprika");
//!
//! client.delete("demo", "recipe.txt").await?;
//! # serving.abort();
//! # Ok(())
//! # })
//! # }
//! # #[cfg(not(feature = "dev"))]
//! # fn main() {}
//! ```

mod download;
mod http;
mod source;
mod sum;
mod upload;

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use crate::object::Lifetime;
use crate::pb;
use crate::pb::file_access_client::FileAccessClient;
use crate::pb::presign_request::Operation;
use crate::signer::presign::chain;

pub use crate::ops::upload::Encryption;
pub use download::{Download, Downloaded};
pub use source::Source;
pub use upload::{OnStart, SINGLE_BYTES, Upload, Uploaded};

/// How many transfers run at once, unless told otherwise.
pub const PARALLEL: usize = 4;

/// How often a part, a range or a call is tried.
const ATTEMPTS: u32 = 8;
/// How long the second attempt waits at most; each further one up to twice as
/// long, and none longer than [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// How often a call is tried of a service that has never answered.
const FIRST_ATTEMPTS: u32 = 3;

/// Where the service is, and how it knows us.
#[derive(Clone, Debug)]
pub struct Server {
    /// `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`.
    pub address: String,
    /// With https: the PEM file of the authority that has signed the service's
    /// certificate.
    pub ca: Option<PathBuf>,
    /// With https: the PEM file of our own certificate, and that of its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// How long the service may give no sign of life while a call waits for its
    /// answer: at least 1 s. Half of that after its last one it is pinged (RFC
    /// 9113, section 6.7), so that a call may take as long as it needs to.
    pub patience: Duration,
}

impl Default for Server {
    /// Where `fileaccess dev` listens, with a patience of 20 s.
    fn default() -> Self {
        let address = "http://127.0.0.1:50051".to_owned();
        Self { address, ca: None, identity: None, patience: Duration::from_secs(20) }
    }
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A wrong setting of the client: an address, a certificate.
    #[error("{0}")]
    Settings(String),
    /// The service refuses, or can't be reached.
    #[error("{}", told(.0))]
    Service(Box<Status>),
    /// S3 refuses.
    #[error("S3 answers {status} {code}: {message}")]
    S3 {
        /// The HTTP status.
        status: u16,
        /// S3's own code for the error.
        code: String,
        /// What S3 says about it.
        message: String,
    },
    /// S3 can't be reached, or the connection broke.
    #[error("the connection to S3 failed: {0}")]
    Connection(String),
    /// A file can't be read or written.
    #[error("`{}`: {error}", printable(.path))]
    File {
        /// Which.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// The source was written to meanwhile, so that what was sent or fetched may
    /// be a mixture.
    #[error("`{}` was changed meanwhile", printable(.0))]
    Changed(String),
    /// What arrived is not what was sent.
    #[error("`{}`: the checksum is {found}, and should be {expected}", printable(.what))]
    Corrupt {
        /// The file or object.
        what: String,
        /// Of the bytes that are there.
        found: String,
        /// Of the bytes that should be.
        expected: String,
    },
    /// An answer that no such service gives.
    #[error("unexpected answer: {0}")]
    Answer(String),
}

/// A status as one line: the code, the reason, and what it says.
fn told(status: &Status) -> String {
    let details = status.get_error_details();
    if details.error_info().is_none()
        && let Some(source) = std::error::Error::source(status)
    {
        // Not the service's own answer.
        return format!("the service can't be reached: {}", chain(source));
    }
    let reason = details.error_info().map(|info| format!(" ({})", info.reason)).unwrap_or_default();
    format!("{:?}{reason}: {}", status.code(), printable(status.message()))
}

/// A name, without what would move a terminal's cursor or end the line.
pub(crate) fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Service(Box::new(status))
    }
}

impl Error {
    fn file(path: impl fmt::Display, error: std::io::Error) -> Self {
        Self::File { path: path.to_string(), error }
    }

    /// What the service answered, if it did.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Service(status) if status.get_error_details().error_info().is_some() => Some(status.code()),
            _ => None,
        }
    }

    /// The stable reason that the service gives: the name of an `ErrorReason`
    /// without its prefix.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Service(status) => status.get_error_details().error_info().map(|info| info.reason.clone()),
            _ => None,
        }
    }

    /// Whether an upload that has failed so can't be gone on with.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Changed(_) | Self::Corrupt { .. })
            || matches!(self, Self::S3 { code, .. } if code == "NoSuchUpload")
            || matches!(
                self.reason().as_deref(),
                Some(
                    "OBJECT_EXISTS"
                        | "UPLOAD_NOT_FOUND"
                        | "UPLOAD_MISMATCH"
                        | "UPLOAD_EXPIRED"
                        | "INVALID_UPLOAD_TOKEN"
                )
            )
    }

    /// Whether the service was there, and the connection to it broke.
    fn is_broken(&self) -> bool {
        let Self::Service(status) = self else { return false };
        let of = |error: &(dyn std::error::Error + 'static)| {
            // One that gives no sign of life has had its time.
            error.downcast_ref::<hyper::Error>().is_some_and(|error| !error.is_timeout())
        };
        std::iter::successors(std::error::Error::source(status.as_ref()), |error| error.source()).any(of)
    }

    /// How often this may be tried in all, and the least wait before the next time.
    fn again(&self) -> Option<(u32, Duration)> {
        match self {
            // A fresh URL may do: this one has expired, or its key was rotated.
            Self::S3 { status: 401 | 403, .. } => Some((3, Duration::ZERO)),
            // It has no such thing, and won't have it soon.
            Self::S3 { status: 501, .. } => None,
            Self::Connection(_) | Self::S3 { status: 408 | 429 | 500.., .. } => Some((ATTEMPTS, Duration::ZERO)),
            Self::S3 { code, .. } if matches!(code.as_str(), "RequestTimeout" | "IncompleteBody" | "BadDigest") => {
                Some((ATTEMPTS, Duration::ZERO))
            }
            Self::Service(status) => match status.code() {
                Code::ResourceExhausted => {
                    let wait = status.get_details_retry_info().and_then(|info| info.retry_delay);
                    wait.map(|wait| (ATTEMPTS, wait))
                }
                // What took too long may have been done meanwhile, and then asking again tells.
                Code::Unavailable | Code::DeadlineExceeded => Some((ATTEMPTS, Duration::ZERO)),
                // The connection broke in the middle of a call.
                _ if self.code().is_none() && std::error::Error::source(status.as_ref()).is_some() => {
                    Some((ATTEMPTS, Duration::ZERO))
                }
                _ => None,
            },
            _ => None,
        }
    }
}

/// How far a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How many bytes have gone over, or were there already. Fewer than before
    /// when a part has to be sent again.
    pub bytes: u64,
    /// How many there are in all.
    pub total: u64,
}

/// Told of each step of a transfer, from any thread; it must not block.
pub type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// Counts what has gone over.
#[derive(Clone)]
struct Meter {
    done: Arc<AtomicU64>,
    total: u64,
    tell: Option<OnProgress>,
}

impl Meter {
    fn new(total: u64, tell: Option<OnProgress>) -> Self {
        Self { done: Arc::default(), total, tell }
    }

    fn add(&self, bytes: u64) {
        self.told(self.done.fetch_add(bytes, Ordering::Relaxed) + bytes);
    }

    /// What was counted goes over again.
    fn take_back(&self, bytes: u64) {
        self.told(self.done.fetch_sub(bytes, Ordering::Relaxed).saturating_sub(bytes));
    }

    fn told(&self, bytes: u64) {
        if let Some(tell) = &self.tell {
            tell(Progress { bytes, total: self.total });
        }
    }
}

/// A client. Clones share its connections, and how many transfers may run at
/// once.
#[derive(Clone)]
pub struct Client {
    api: FileAccessClient<Channel>,
    http: reqwest::Client,
    slots: Arc<tokio::sync::Semaphore>,
    parallel: usize,
    /// Whether the service has ever answered.
    reached: Arc<AtomicBool>,
}

impl Client {
    /// A client of the service at `server`, with [`PARALLEL`] transfers at once.
    /// It connects when it is first asked for something. Must be called within a
    /// Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Settings`]: what can't be an address, a certificate that can't be
    /// read.
    pub fn connect(server: &Server) -> Result<Self, Error> {
        let address = match server.address.strip_prefix("unix:") {
            // As gRPC's naming has it, with or without slashes before the path.
            Some(path) => format!("unix:///{}", path.trim_start_matches('/')),
            None => server.address.clone(),
        };
        let wrong = |e: &dyn fmt::Display| Error::Settings(format!("server `{}`: {e}", server.address));
        let mut endpoint = Endpoint::from_shared(address.clone()).map_err(|e| wrong(&e))?;
        let half = server.patience.max(Duration::from_secs(1)) / 2;
        endpoint =
            endpoint.connect_timeout(Duration::from_secs(5)).http2_keep_alive_interval(half).keep_alive_timeout(half);
        if address.starts_with("https:") {
            let read =
                |path: &PathBuf| std::fs::read(path).map_err(|e| Error::Settings(format!("`{}`: {e}", path.display())));
            let ca = server.ca.as_ref().ok_or_else(|| wrong(&"https needs the certificate of a CA"))?;
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
            if let Some((certificate, key)) = &server.identity {
                tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            endpoint = endpoint.tls_config(tls).map_err(|e| wrong(&e))?;
        }
        // Thousand URLs of a page can be more than the 4 MiB that are tonic's default.
        let api = FileAccessClient::new(endpoint.connect_lazy()).max_decoding_message_size(16 << 20);
        let http = http::client().map_err(|e| Error::Settings(format!("HTTPS can't be used: {e}")))?;
        let slots = Arc::new(tokio::sync::Semaphore::new(PARALLEL));
        Ok(Self { api, http, slots, parallel: PARALLEL, reached: Arc::default() })
    }

    /// The same with `parallel` transfers at once, at least one.
    #[must_use]
    pub fn with_parallel(self, parallel: usize) -> Self {
        let parallel = parallel.clamp(1, 64);
        Self { slots: Arc::new(tokio::sync::Semaphore::new(parallel)), parallel, ..self }
    }

    /// The API itself.
    #[must_use]
    pub fn api(&self) -> FileAccessClient<Channel> {
        self.api.clone()
    }

    /// One presigned request, that lives for `ttl`: 1 second to 7 days, in whole
    /// seconds. None: the service's default.
    ///
    /// # Errors
    /// What the service answers.
    pub async fn presign(
        &self,
        bucket: &str,
        key: &str,
        ttl: Option<Duration>,
        operation: Operation,
    ) -> Result<pb::PresignResponse, Error> {
        // What is no whole number of seconds is the service's to refuse.
        let ttl = ttl.map(prost_types::Duration::try_from).transpose();
        let ttl = ttl.map_err(|_| Error::Settings(format!("ttl must {}", Lifetime::WANT)))?;
        let (bucket, key) = (bucket.to_owned(), key.to_owned());
        let request = pb::PresignRequest { bucket, key, ttl, operation: Some(operation) };
        self.call(request, |mut api, request| async move { api.presign(request).await }).await
    }

    /// The facts of one object.
    ///
    /// # Errors
    /// What the service answers: [`Code::NotFound`] if there is none.
    pub async fn stat(&self, bucket: &str, key: &str) -> Result<pb::StatResponse, Error> {
        let request = pb::StatRequest { bucket: bucket.to_owned(), key: key.to_owned(), version_id: None };
        self.call(request, |mut api, request| async move { api.stat(request).await }).await
    }

    /// One page of what is under `prefix`, from `page_token` on (empty: the
    /// first), with what is between two `delimiter`s rolled up (empty: nothing).
    ///
    /// # Errors
    /// What the service answers.
    pub async fn list(
        &self,
        bucket: &str,
        prefix: &str,
        delimiter: &str,
        page_token: &str,
    ) -> Result<pb::ListResponse, Error> {
        let request = pb::ListRequest {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            delimiter: delimiter.to_owned(),
            page_size: 1000,
            page_token: page_token.to_owned(),
            download_ttl: None,
        };
        let list = || self.call(request.clone(), |mut api, request| async move { api.list(request).await });
        self.persist(list).await
    }

    /// Removes an object. S3 does not tell whether there was one.
    ///
    /// # Errors
    /// What the service or S3 answers.
    pub async fn delete(&self, bucket: &str, key: &str) -> Result<(), Error> {
        self.persist(|| async move {
            let signed = self.presign(bucket, key, None, Operation::Delete(pb::Delete { version_id: None })).await?;
            http::send(http::request(&self.http, &signed)?, None).await.map(drop)
        })
        .await
    }

    /// Asks what may be asked twice.
    pub(crate) async fn ask<Q, T, F>(
        &self,
        request: &Q,
        ask: impl Fn(FileAccessClient<Channel>, Q) -> F,
    ) -> Result<T, Error>
    where
        Q: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.persist(|| self.call(request.clone(), &ask)).await
    }

    /// Asks once.
    pub(crate) async fn call<Q, T, F>(
        &self,
        request: Q,
        ask: impl FnOnce(FileAccessClient<Channel>, Q) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = ask(self.api.clone(), request).await.map(Response::into_inner).map_err(Error::from);
        if answer.is_ok() || answer.as_ref().is_err_and(|e| e.code().is_some()) {
            self.reached.store(true, Ordering::Relaxed);
        }
        answer
    }

    /// Tries again what may go well another time, with pauses that get longer and
    /// that chance makes unequal.
    pub(crate) async fn persist<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut tried = 0;
        loop {
            let error = match attempt().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            tried += 1;
            let Some((mut most, least)) = error.again() else { return Err(error) };
            if matches!(error, Error::Service(_)) && !self.reached.load(Ordering::Relaxed) {
                // It may be a wrong address rather than a broken connection.
                most = if error.is_broken() { FIRST_ATTEMPTS } else { 1 };
            }
            if tried >= most {
                return Err(error);
            }
            let pause = MAX_PAUSE.min(PAUSE * 2_u32.pow(tried - 1)).mul_f64(rand::random());
            tracing::debug!(tried, most, %error, "tried again");
            tokio::time::sleep(least + pause).await;
        }
    }
}

/// For the wire, which counts bytes in signed numbers.
fn signed(bytes: u64) -> Result<i64, Error> {
    i64::try_from(bytes).map_err(|_| Error::Answer(format!("{bytes} bytes are too many")))
}

/// From the wire.
fn unsigned(bytes: i64) -> Result<u64, Error> {
    u64::try_from(bytes).map_err(|_| Error::Answer(format!("a size of {bytes} bytes")))
}
