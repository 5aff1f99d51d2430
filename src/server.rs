//! `run(listener, app, shutdown)`: connections, limits, deadlines, health,
//! reflection, drain. It serves production and tests alike.

mod connection;

use std::convert::Infallible;
use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use connection::{Calls, Greeted, Term};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::Service as _;
use tower::util::BoxCloneSyncService;
use tracing::Instrument as _;

use crate::api::Api;
use crate::app::App;
use crate::caller::{Caller, Peer};
use crate::config::{Limits, Listen, SidecarSettings};
use crate::error::Error;
use crate::pb;
use crate::pb::file_access_server::FileAccessServer;
use crate::tls::{Shaken, Tls};

/// A bound address. Nothing is accepted before [`run`].
pub struct Listener {
    socket: Socket,
    trust: Trust,
}

enum Socket {
    Tcp(TcpListener),
    /// Removed at the end.
    Unix(UnixListener, PathBuf),
}

/// How callers are known.
enum Trust {
    /// By their connection: loopback, or the user id.
    Connection,
    /// By what a sidecar says, on loopback or as one of its users.
    Sidecar(SidecarSettings),
    /// By their certificate.
    Tls(Arc<Tls>),
}

impl Listener {
    /// Binds `listen`. A Unix socket that a dead process left is replaced; one
    /// that answers is not. Callers are known as `loopback` or `uid:N`, unless
    /// [`Self::with_tls`] or [`Self::behind`] follows.
    ///
    /// # Errors
    /// Those of the system.
    pub async fn bind(listen: &Listen) -> io::Result<Self> {
        let socket = match listen {
            Listen::Tcp(address) => Socket::Tcp(TcpListener::bind(address).await?),
            Listen::Unix(path) => {
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
                if is_socket && tokio::net::UnixStream::connect(path).await.is_err() {
                    std::fs::remove_file(path)?;
                }
                Socket::Unix(UnixListener::bind(path)?, path.clone())
            }
        };
        Ok(Self { socket, trust: Trust::Connection })
    }

    /// Callers are known by their certificates.
    #[must_use]
    pub fn with_tls(mut self, tls: Arc<Tls>) -> Self {
        self.trust = Trust::Tls(tls);
        self
    }

    /// Callers are known by what a sidecar says. On a Unix socket only the
    /// processes of its users are believed; anybody may connect to it, since
    /// those are other users than ours.
    ///
    /// # Errors
    /// Those of changing the socket's mode.
    pub fn behind(mut self, sidecar: &SidecarSettings) -> io::Result<Self> {
        if let Socket::Unix(_, path) = &self.socket {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        }
        self.trust = Trust::Sidecar(sidecar.clone());
        Ok(self)
    }

    /// Where it listens: `ADDRESS:PORT` or `unix:/PATH`.
    ///
    /// # Errors
    /// Those of the system.
    pub fn address(&self) -> io::Result<String> {
        match &self.socket {
            Socket::Tcp(listener) => Ok(listener.local_addr()?.to_string()),
            Socket::Unix(_, path) => Ok(format!("unix:{}", path.display())),
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Else small answers wait for the peer's delayed acknowledgement, some 40 ms.
                stream.set_nodelay(true)?;
                let loopback = Caller::loopback(address);
                let peer = match (&self.trust, loopback) {
                    (Trust::Sidecar(sidecar), Some(_)) => Peer::Sidecar { appends: sidecar.appends },
                    (_, loopback) => Peer::One(loopback.ok_or(Error::NoCaller)),
                };
                Ok(Accepted { stream: Stream::Tcp(stream.into_std()?), peer })
            }
            Socket::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred().ok().map(|credentials| credentials.uid());
                let peer = match (&self.trust, uid) {
                    (Trust::Sidecar(sidecar), Some(uid)) if sidecar.uids.contains(&uid) => {
                        Peer::Sidecar { appends: sidecar.appends }
                    }
                    (Trust::Sidecar(sidecar), uid) => {
                        tracing::warn!(?uid, uids = ?sidecar.uids, "connection of another user than the sidecar's");
                        Peer::One(Err(Error::NoCaller))
                    }
                    (_, uid) => Peer::One(uid.map(Caller::user).ok_or(Error::NoCaller)),
                };
                Ok(Accepted { stream: Stream::Unix(stream.into_std()?), peer })
            }
        }
    }

    fn tls(&self) -> Option<Arc<Tls>> {
        match &self.trust {
            Trust::Tls(tls) => Some(Arc::clone(tls)),
            Trust::Connection | Trust::Sidecar(_) => None,
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Gone already is as good.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A connection, not yet tied to a runtime, and who is at its other end.
struct Accepted {
    stream: Stream,
    peer: Peer,
}

enum Stream {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

/// Serves until `shutdown`, then drains: health says `NOT_SERVING`, new calls
/// are taken for `limits.drain`, running ones may finish for `limits.grace`.
///
/// # Errors
/// Those of starting threads. A connection's own failures end that connection.
pub async fn run(listener: Listener, app: Arc<App>, shutdown: impl Future<Output = ()>) -> io::Result<()> {
    let health = HealthReporter::new();
    let services = Arc::new(Services::new(&app, &health)?);
    // Before anybody can ask: what is not set yet would be taken for good.
    set_health(&app, &health, false).await;
    let (draining, drain) = watch::channel(false);
    let report = tokio::spawn(report_health(Arc::clone(&app), health.clone(), drain));
    let tls = listener.tls();
    let keep_tls = tls.as_ref().map(|tls| tokio::spawn(Arc::clone(tls).keep()));
    let workers = Workers::start(&app, &services, tls.as_ref())?;
    let limits = &app.limits;

    // Each connection holds a receiver for as long as it lasts.
    let closing = watch::Sender::new(false);
    let room = Arc::new(Semaphore::new(limits.connections));
    {
        let mut accepting = pin!(accept(&listener, &workers, &closing, &room));
        let mut shutdown = pin!(shutdown);
        tokio::select! {
            () = &mut accepting => {}
            () = &mut shutdown => {}
        }
        tracing::info!(drain = ?limits.drain, "draining");
        draining.send_replace(true);
        // Balancers need time to see that; whoever comes meanwhile is served.
        let _ = tokio::time::timeout(limits.drain, &mut accepting).await;
    }
    drop(listener);
    if let Some(keep_tls) = keep_tls {
        keep_tls.abort();
    }
    // Watchers of health would hold their connections for ever.
    let _ = report.await;
    closing.send_replace(true);
    if tokio::time::timeout(limits.grace, closing.closed()).await.is_err() {
        tracing::warn!(grace = ?limits.grace, "connections cut that did not finish");
    }
    workers.stop();
    tracing::info!("drained");
    Ok(())
}

/// Hands out connections, for ever.
async fn accept(listener: &Listener, workers: &Workers, closing: &watch::Sender<bool>, room: &Arc<Semaphore>) {
    for n in 0.. {
        let Ok(permit) = Arc::clone(room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(accepted) => workers.hand(n, Connection { accepted, closing: closing.subscribe(), room: permit }),
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                // Out of descriptors, most likely: give them time to come back.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// A connection on its way to the thread that serves it.
struct Connection {
    accepted: Accepted,
    /// Says when the service ends.
    closing: watch::Receiver<bool>,
    /// Given back when the connection ends.
    room: OwnedSemaphorePermit,
}

/// Threads that serve connections, each with a runtime of its own: cheaper
/// than one runtime on many threads, since nothing moves between cores.
struct Workers {
    lanes: Vec<mpsc::UnboundedSender<Connection>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Workers {
    /// With one worker, the calling runtime does the work itself.
    fn start(app: &Arc<App>, services: &Arc<Services>, tls: Option<&Arc<Tls>>) -> io::Result<Self> {
        let count = match app.limits.workers {
            0 => std::thread::available_parallelism()?.get(),
            workers => workers,
        };
        let mut started = Self { lanes: Vec::new(), threads: Vec::new() };
        // SDK clients are shared, and a connection to S3 lives on the runtime that
        // opened it: no runtime may end before all have finished.
        let finish = Arc::new(std::sync::Barrier::new(count));
        for n in 0..count {
            let (sender, connections) = mpsc::unbounded_channel();
            started.lanes.push(sender);
            let lane = Lane::new(app, services, tls);
            if count == 1 {
                tokio::spawn(lane.serve(connections));
                break;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let finish = Arc::clone(&finish);
            let thread = std::thread::Builder::new().name(format!("serve-{n}")).spawn(move || {
                runtime.block_on(lane.serve(connections));
                finish.wait();
            })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    fn hand(&self, n: usize, connection: Connection) {
        if let Some(lane) = self.lanes.get(n % self.lanes.len()) {
            // A lane is open for as long as `self` is.
            let _ = lane.send(connection);
        }
    }

    fn stop(self) {
        drop(self.lanes);
        for thread in self.threads {
            // It has nothing to tell that its own log has not.
            let _ = thread.join();
        }
    }
}

/// What one thread serves its connections with.
#[derive(Clone)]
struct Lane {
    http: http2::Builder<TokioExecutor>,
    services: Arc<Services>,
    tls: Option<Arc<Tls>>,
    app: Arc<App>,
}

impl Lane {
    fn new(app: &Arc<App>, services: &Arc<Services>, tls: Option<&Arc<Tls>>) -> Self {
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(app.limits.keepalive)
            .keep_alive_timeout(app.limits.keepalive_timeout)
            .max_concurrent_streams(app.limits.streams)
            .max_header_list_size(16 << 10);
        Self { http, services: Arc::clone(services), tls: tls.cloned(), app: Arc::clone(app) }
    }

    fn limits(&self) -> &Limits {
        &self.app.limits
    }

    /// Serves connections until their sender is gone.
    async fn serve(self, mut connections: mpsc::UnboundedReceiver<Connection>) {
        while let Some(Connection { accepted: Accepted { stream, peer }, closing, room }) = connections.recv().await {
            let lane = self.clone();
            tokio::spawn(async move {
                let _room = room;
                match stream {
                    Stream::Tcp(stream) => match tokio::net::TcpStream::from_std(stream) {
                        Ok(stream) => lane.secure(stream, peer, closing).await,
                        Err(error) => tracing::warn!(%error, "connection lost"),
                    },
                    Stream::Unix(stream) => match tokio::net::UnixStream::from_std(stream) {
                        Ok(stream) => lane.secure(stream, peer, closing).await,
                        Err(error) => tracing::warn!(%error, "connection lost"),
                    },
                }
            });
        }
    }

    /// Serves one connection, by TLS if the listener has it.
    async fn secure<S>(self, stream: S, peer: Peer, closing: watch::Receiver<bool>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let begun = tokio::time::Instant::now();
        match &self.tls {
            None => match self.in_time(begun, Greeted::new(stream)).await {
                Ok(stream) => self.converse(stream, peer, None, closing).await,
                Err(error) => tracing::debug!(%error, "connection without http/2"),
            },
            Some(tls) => match self.in_time(begun, tls.accept(stream)).await {
                Ok(Shaken { stream, caller, not_after }) => match self.in_time(begun, Greeted::new(stream)).await {
                    Ok(stream) => self.converse(stream, Peer::One(caller), Some(not_after), closing).await,
                    Err(error) => tracing::debug!(%error, "connection without http/2"),
                },
                Err(error) => tracing::info!(%error, "tls handshake failed"),
            },
        }
    }

    /// A step of the handshake of a connection that was `begun` then.
    async fn in_time<T>(
        &self,
        begun: tokio::time::Instant,
        step: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let within = self.limits().handshake_timeout;
        match tokio::time::timeout_at(begun + within, step).await {
            Ok(done) => done,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done within {within:?}"))),
        }
    }

    /// Serves one connection, until it has to go.
    async fn converse<S>(
        &self,
        stream: S,
        peer: Peer,
        not_after: Option<SystemTime>,
        mut closing: watch::Receiver<bool>,
    ) where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let term = Term::new(self.limits(), not_after);
        let calls = Calls::new(peer);
        let service = hyper::service::service_fn(|request: Request<Incoming>| {
            let (services, call) = (Arc::clone(&self.services), calls.begin());
            // Here and not below: calls that wait for their first turn are calls too.
            let room = services.room(&request);
            async move {
                Ok::<_, Infallible>(match room {
                    Ok(Some(_room)) => services.call(call.peer(), request).await,
                    // It may stream for as long as somebody listens, and runs until then.
                    Ok(None) => services.call(call.peer(), request).await.map(|body| {
                        Body::new(body.map_frame(move |frame| {
                            let _ = &call;
                            frame
                        }))
                    }),
                    Err(overloaded) => {
                        services.read_out(request.into_body()).await;
                        Status::from(overloaded).into_http()
                    }
                })
            }
        });
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            ended = &mut connection => Ok(ended),
            why = term.over(&calls, &mut closing) => {
                tracing::debug!(?why, "connection told to go");
                connection.as_mut().graceful_shutdown();
                tokio::time::timeout(term.grace(why), &mut connection).await
            }
        };
        match ended {
            Ok(Ok(())) => tracing::debug!("connection ended"),
            Ok(Err(error)) => tracing::debug!(%error, "connection ended"),
            Err(_) => tracing::info!("connection cut whose calls did not finish in time"),
        }
    }
}

/// A service whose type tonic keeps to itself.
type Boxed = BoxCloneSyncService<Request<Incoming>, Response<Body>, Infallible>;

/// All that one port serves, by the path's first segment.
struct Services {
    api: FileAccessServer<Api>,
    health: HealthServer<HealthService>,
    reflection: Boxed,
    reflection_alpha: Boxed,
    /// Room for calls of the API, on all connections.
    room: Arc<Semaphore>,
    deadline: Duration,
    request_bytes: usize,
}

impl Services {
    fn new(app: &Arc<App>, health: &HealthReporter) -> io::Result<Self> {
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // Lets clients print the details of errors.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        let api = FileAccessServer::new(Api(Arc::clone(app)))
            .max_decoding_message_size(app.limits.request_bytes)
            .max_encoding_message_size(app.limits.response_bytes);
        Ok(Self {
            api,
            health: HealthServer::new(HealthService::from_health_reporter(health.clone())),
            reflection: Boxed::new(reflection().build_v1().map_err(io::Error::other)?),
            reflection_alpha: Boxed::new(reflection().build_v1alpha().map_err(io::Error::other)?),
            room: Arc::new(Semaphore::new(app.limits.calls)),
            deadline: app.limits.deadline,
            request_bytes: app.limits.request_bytes,
        })
    }

    /// Room for a call, so that those that are served are served in time. Health
    /// is always answered.
    fn room(&self, request: &Request<Incoming>) -> Result<Option<OwnedSemaphorePermit>, Error> {
        if service_of(request) != Some(<FileAccessServer<Api> as NamedService>::NAME) {
            return Ok(None);
        }
        Arc::clone(&self.room).try_acquire_owned().map(Some).map_err(|_| Error::Overloaded)
    }

    /// Reads what is refused: what is left unread has to be reset, of which HTTP/2
    /// allows a connection only so much, and who hears of that may not hear why.
    /// No more than a request may have, nor for longer.
    async fn read_out(&self, body: Incoming) {
        let mut body = pin!(body);
        let mut left = self.request_bytes;
        let read = async {
            while let Some(Ok(frame)) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
                let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, bytes::Bytes::len)) else { return };
                left = rest;
            }
        };
        // Who takes longer is reset.
        let _ = tokio::time::timeout(self.deadline, read).await;
    }

    async fn call(&self, peer: &Peer, request: Request<Incoming>) -> Response<Body> {
        fn get<T>(answer: Result<Response<T>, Infallible>) -> Response<T> {
            match answer {
                Ok(response) => response,
            }
        }
        match service_of(&request) {
            Some(<FileAccessServer<Api> as NamedService>::NAME) => self.call_api(peer, request).await,
            Some(<HealthServer<HealthService> as NamedService>::NAME) => get(self.health.clone().call(request).await),
            Some(REFLECTION) => get(self.reflection.clone().call(request).await),
            Some(REFLECTION_ALPHA) => get(self.reflection_alpha.clone().call(request).await),
            _ => Status::unimplemented("there is no such service here").into_http(),
        }
    }

    /// One RPC: its caller, its span, its deadline, and a line of log when it
    /// fails.
    async fn call_api(&self, peer: &Peer, mut request: Request<Incoming>) -> Response<Body> {
        let begun = Instant::now();
        let caller = peer.caller(request.headers());
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let told = |name| request.headers().get(name).map(Told).map(tracing::field::display);
        let span = tracing::info_span!(
            "rpc",
            method,
            caller = caller.as_ref().ok().map(Caller::as_str),
            request_id = told("x-request-id"),
            traceparent = told("traceparent"),
        );
        Caller::put(caller, request.extensions_mut());
        let deadline = grpc_timeout(request.headers()).map_or(self.deadline, |asked| asked.min(self.deadline));
        let answer = tokio::time::timeout(deadline, self.api.clone().call(request)).instrument(span.clone()).await;
        let response = match answer {
            Ok(Ok(response)) => self.explain(response),
            // Tonic's own timeout would say CANCELLED.
            Err(_) => Status::from(Error::Deadline).into_http(),
        };
        let code = code(&response);
        let _entered = span.enter();
        let duration_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        match code {
            Code::Ok => tracing::debug!(code = ?code, duration_us, "served"),
            Code::Internal | Code::Unknown | Code::DataLoss => tracing::error!(code = ?code, duration_us, "failed"),
            _ => tracing::info!(code = ?code, duration_us, "refused"),
        }
        response
    }

    /// Tonic refuses what it can't decode by itself, without our details.
    fn explain(&self, response: Response<Body>) -> Response<Body> {
        match code(&response) {
            Code::OutOfRange | Code::Internal if !response.headers().contains_key("grpc-status-details-bin") => {
                let detail = Status::from_header_map(response.headers()).map(|s| s.message().to_owned());
                let error = Error::Message { max: self.request_bytes, detail: detail.unwrap_or_default() };
                Status::from(error).into_http()
            }
            _ => response,
        }
    }
}

/// A header that somebody else has written, as it may stand in the log: cut
/// off at 128 bytes, and without what is not printable ASCII.
struct Told<'a>(&'a HeaderValue);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut printable = self.0.as_bytes().iter().take(128).filter(|b| b.is_ascii_graphic());
        printable.try_for_each(|b| f.write_char(char::from(*b)))
    }
}

fn service_of(request: &Request<Incoming>) -> Option<&str> {
    request.uri().path().split('/').nth(1)
}

const REFLECTION: &str = "grpc.reflection.v1.ServerReflection";
const REFLECTION_ALPHA: &str = "grpc.reflection.v1alpha.ServerReflection";

/// The code of a unary answer: errors are told in the headers alone.
fn code(response: &Response<Body>) -> Code {
    response.headers().get("grpc-status").map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()))
}

/// The caller's deadline, as gRPC over HTTP/2 writes it: up to 8 digits and a
/// unit.
/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

/// Tells the truth: `SERVING` while any signer may sign and nothing drains.
/// Ends when the drain has begun and its time is up.
async fn report_health(app: Arc<App>, mut health: HealthReporter, mut draining: watch::Receiver<bool>) {
    let mut changed = app.changed.clone();
    loop {
        changed.mark_unchanged();
        let drains = *draining.borrow_and_update();
        set_health(&app, &health, drains).await;
        if drains {
            break;
        }
        tokio::select! {
            Ok(()) = changed.changed() => {}
            Ok(()) = draining.changed() => {}
            else => break,
        }
    }
    tokio::time::sleep(app.limits.drain).await;
    // Ends the streams of whoever watches.
    health.clear_service_status("").await;
    health.clear_service_status(<FileAccessServer<Api> as NamedService>::NAME).await;
}

async fn set_health(app: &App, health: &HealthReporter, drains: bool) {
    let serving = !drains && app.can_sign(SystemTime::now());
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    health.set_service_status("", status).await;
    health.set_service_status(<FileAccessServer<Api> as NamedService>::NAME, status).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_is_printed_within_bounds() {
        let told = |bytes: &[u8]| Told(&HeaderValue::from_bytes(bytes).unwrap()).to_string();
        assert_eq!(told(b"3f2c-\"x\" y\tz\xe4\xff"), "3f2c-\"x\"yz");
        assert_eq!(told(&[b'a'; 1000]).len(), 128);
    }

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            grpc_timeout(&headers)
        };
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("99999999H"), Some(Duration::from_hours(99_999_999)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        for wrong in ["", "S", "5", "5s", "-5S", "123456789S", "1.5S", "５S"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
