//! How fast `fileaccess put` and `get` move a sparse file to and from the S3 of
//! `fileaccess dev`, next to curl with one presigned URL, and next to what
//! presigning makes needless: a service that takes the same bytes in a gRPC
//! stream and passes them on to S3. With memory, and with CPU of the client, of
//! the service, and of S3. Fails above [`MAX_KIB`], or where the bytes are not
//! the same.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, missing_docs, reason = "a benchmark")]

use std::convert::Infallible;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sha2::{Digest as _, Sha256};
use tonic::server::ClientStreamingService;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The most memory that `put` and `get` may take.
const MAX_KIB: u64 = 96 << 10;
/// How much of a file is in one message of a stream.
const CHUNK: usize = 256 << 10;

fn main() {
    // This program is also the other service, and its client.
    let told = |name| std::env::var(name).ok();
    match (told("THROUGHPUT_PROXY_TO"), told("THROUGHPUT_PROXY_AT")) {
        (Some(url), _) => return block_on(proxy(url)),
        (None, Some(address)) => return block_on(stream(address, told("THROUGHPUT_FILE").expect("a file"))),
        (None, None) => {}
    }
    let mib: u64 = told("THROUGHPUT_MIB").map_or(2048, |mib| mib.parse().expect("THROUGHPUT_MIB: MiB"));
    let folder = folder(mib << 20);
    let file = folder.path().join("sparse");
    std::fs::File::create(&file).expect("a file").set_len(mib << 20).expect("a file of that size");
    let back = folder.path().join("back");
    let sum = sha256(&file);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    drop(listener);
    let dev = Dev::start(folder.path(), &address);
    let (file, back) = (file.to_str().expect("UTF-8"), back.to_str().expect("UTF-8"));
    println!("{mib} MiB, S3 of `fileaccess dev` on the same machine, files in {}", folder.path().display());
    println!("                    time       rate  client's memory, CPU  service's CPU  S3's CPU");
    // Takes away what it has looked at: files may be in memory.
    let same = |key: &str| {
        assert!(sha256(Path::new(back)) == sum, "other bytes have come back");
        std::fs::remove_file(back).expect("a file");
        output(fileaccess(&address, &["rm", key]));
    };

    if Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_ok() {
        let url = output(fileaccess(&address, &["url", "--upload", "demo/curl"]));
        dev.measure("curl -T, one PUT", mib, curl(&["-T", file, url.trim()]), dev.0.id());
        let url = output(fileaccess(&address, &["url", "demo/curl"]));
        dev.measure("curl -o, one GET", mib, curl(&["-o", back, url.trim()]), dev.0.id());
        same("demo/curl");
    } else {
        eprintln!("SKIPPED for want of curl: the comparison with it");
    }
    let url = output(fileaccess(&address, &["url", "--upload", "demo/streamed"]));
    let proxy = Proxy::start(url.trim());
    dev.measure("gRPC stream", mib, proxy.client(file), proxy.process.id());
    drop(proxy);
    output(fileaccess(&address, &["get", "demo/streamed", back]));
    same("demo/streamed");
    let put = dev.measure("fileaccess put", mib, fileaccess(&address, &["put", file, "demo/put"]), dev.0.id());
    let get = dev.measure("fileaccess get", mib, fileaccess(&address, &["get", "demo/put", back]), dev.0.id());
    same("demo/put");
    assert!(put <= MAX_KIB && get <= MAX_KIB, "more than {MAX_KIB} KiB");
}

/// In memory if there is room for all that is there at once, so that it is not
/// the disk that is measured.
fn folder(bytes: u64) -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let has_room = rustix::fs::statvfs(memory).is_ok_and(|there| there.f_bavail * there.f_frsize > 4 * bytes);
    if has_room { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a temporary folder")
}

fn block_on(task: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(task);
}

struct Dev(Child);

impl Dev {
    fn start(folder: &Path, address: &str) -> Self {
        let mut command = fileaccess(address, &["dev", "--listen", address, "--data"]);
        command.arg(folder.join("data")).stderr(Stdio::piped());
        let mut dev = Self(command.spawn().expect("the binary"));
        let mut log = BufReader::new(dev.0.stderr.take().expect("a pipe")).lines();
        assert!(log.any(|line| line.expect("a line").contains("listening")), "dev did not start");
        // Read to its end, so that the pipe never fills up.
        std::thread::spawn(move || log.for_each(drop));
        dev
    }

    /// Prints what it took, and gives its peak of memory in KiB.
    fn measure(&self, name: &str, mib: u64, mut command: Command, service: u32) -> u64 {
        let both = |process: u32| {
            let service = if process == self.0.id() { cpu_but_s3(process) } else { cpu(process) };
            (service, cpu(self.0.id()) - cpu_but_s3(self.0.id()))
        };
        let before = both(service);
        let begun = Instant::now();
        let mut child = command.stdout(Stdio::null()).spawn().expect("a program");
        let (mut peak, mut own) = (0, 0.0);
        let status = loop {
            if let Some(now) = memory(child.id()) {
                (peak, own) = (now, cpu(child.id()));
            }
            match child.try_wait().expect("a child") {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let took = begun.elapsed().as_secs_f64();
        assert!(status.success(), "{name}: {status}");
        let (service, s3) = {
            let after = both(service);
            (after.0 - before.0, after.1 - before.1)
        };
        let rate = f64::from(u32::try_from(mib).expect("MiB")) * 1.048_576 / took;
        let memory = f64::from(u32::try_from(peak).expect("KiB")) / 1024.0;
        println!(
            "{name:<16} {took:6.2} s  {rate:5.0} MB/s  {memory:8.1} MiB {own:6.2} s  {service:11.2} s  {s3:6.2} s"
        );
        peak
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The service that passes bytes on.
struct Proxy {
    process: Child,
    address: String,
}

impl Proxy {
    fn start(url: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.env("THROUGHPUT_PROXY_TO", url).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("this program");
        let mut address = String::new();
        BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut address).expect("an address");
        Self { process, address: address.trim().to_owned() }
    }

    fn client(&self, file: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.env("THROUGHPUT_PROXY_AT", &self.address).env("THROUGHPUT_FILE", file).stdin(Stdio::null());
        command
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Takes one stream of bytes on one connection, and puts it to `url`.
async fn proxy(url: String) {
    rustls::crypto::ring::default_provider().install_default().expect("the first one");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    println!("http://{}", listener.local_addr().expect("an address"));
    let (stream, _) = listener.accept().await.expect("a connection");
    stream.set_nodelay(true).expect("a socket");
    let forward = Forward { http: reqwest::Client::new(), url };
    let service = hyper::service::service_fn(|request: http::Request<Incoming>| {
        let forward = forward.clone();
        async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<(), Bytes>::default());
            Ok::<_, Infallible>(grpc.client_streaming(forward, request).await)
        }
    });
    let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    http.initial_stream_window_size(4 << 20).initial_connection_window_size(4 << 20);
    http.serve_connection(TokioIo::new(stream), service).await.expect("a good end");
}

#[derive(Clone)]
struct Forward {
    http: reqwest::Client,
    url: String,
}

impl ClientStreamingService<Bytes> for Forward {
    type Response = ();
    type Future = Pin<Box<dyn Future<Output = Result<Response<()>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let size = request.metadata().get("size").and_then(|size| size.to_str().ok()?.parse().ok());
        let body = Passed { bytes: request.into_inner(), left: size.expect("a size") };
        let put = self.http.put(&self.url).body(reqwest::Body::wrap(body));
        Box::pin(async {
            let answer = put.send().await.and_then(reqwest::Response::error_for_status);
            answer.map(|_| Response::new(())).map_err(|e| Status::internal(e.without_url().to_string()))
        })
    }
}

/// A stream's bytes on their way to S3.
struct Passed {
    bytes: Streaming<Bytes>,
    left: u64,
}

impl Body for Passed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let next = std::task::ready!(futures_util::Stream::poll_next(Pin::new(&mut self.bytes), cx));
        if let Some(Ok(bytes)) = &next {
            self.left -= bytes.len() as u64;
        }
        Poll::Ready(next.map(|bytes| bytes.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Sends a file in a gRPC stream.
async fn stream(address: String, file: String) {
    let (give, chunks) = read_ahead(file.clone());
    let size = std::fs::metadata(&file).expect("a file").len();
    let mut request = Request::new(chunks);
    request.metadata_mut().insert("size", size.into());
    let channel = tonic::transport::Endpoint::from_shared(address).expect("an address");
    let channel = channel.initial_stream_window_size(4 << 20).connect().await.expect("a connection");
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("a connection");
    let path = PathAndQuery::from_static("/bench.Proxy/Put");
    let _: Response<()> =
        grpc.client_streaming(request, path, ProstCodec::<Bytes, ()>::default()).await.expect("a good end");
    give.join().expect("a thread");
}

/// Reads a file while it is sent, some chunks ahead.
fn read_ahead(file: String) -> (std::thread::JoinHandle<()>, impl futures_util::Stream<Item = Bytes> + Send + 'static) {
    let (give, mut take) = tokio::sync::mpsc::channel(4);
    let reading = std::thread::spawn(move || {
        let mut file = std::fs::File::open(file).expect("a file");
        loop {
            let mut chunk = vec![0; CHUNK];
            match file.read(&mut chunk).expect("bytes") {
                0 => break,
                len => chunk.truncate(len),
            }
            give.blocking_send(Bytes::from(chunk)).expect("a reader");
        }
    });
    (reading, futures_util::stream::poll_fn(move |cx| take.poll_recv(cx)))
}

fn fileaccess(address: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fileaccess"));
    command.args(arguments).env("FILEACCESS_SERVER", format!("http://{address}")).stdin(Stdio::null());
    command.stdout(Stdio::null());
    command
}

fn curl(arguments: &[&str]) -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail"]).args(arguments);
    command
}

fn output(mut command: Command) -> String {
    let output = command.stdout(Stdio::piped()).output().expect("a program");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The peak of resident memory, in KiB.
fn memory(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// User and system time of a process, in seconds, at the kernel's 100 ticks a
/// second.
fn cpu(process: u32) -> f64 {
    cpu_of(&format!("/proc/{process}")).1
}

/// That of the threads that are not the S3's.
fn cpu_but_s3(process: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("a process");
    let tasks = tasks.map(|task| cpu_of(task.expect("a thread").path().to_str().expect("UTF-8")));
    tasks.filter(|(name, _)| name != "s3").map(|(_, cpu)| cpu).sum()
}

/// The name of a process or thread, and its time.
fn cpu_of(path: &str) -> (String, f64) {
    let stat = std::fs::read_to_string(format!("{path}/stat")).unwrap_or_default();
    let (name, rest) = stat.split_once('(').and_then(|(_, stat)| stat.rsplit_once(')')).unwrap_or_default();
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next().and_then(|ticks| ticks.parse::<u32>().ok()).unwrap_or_default();
    (name.to_owned(), f64::from(ticks() + ticks()) / 100.0)
}

fn sha256(path: &Path) -> Vec<u8> {
    let mut digest = Sha256::new();
    let mut file = std::fs::File::open(path).expect("a file");
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read(&mut bytes).expect("bytes") {
            0 => return digest.finalize().to_vec(),
            len => digest.update(&bytes[..len]),
        }
    }
}
