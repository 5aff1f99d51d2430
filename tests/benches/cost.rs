//! What a call costs: `cargo bench`. Prints the numbers of the README's "Cost",
//! and fails if our own overhead is more than it may be.
//!
//! The service is the real binary with one worker, loaded from this process
//! with 128 calls in flight on one connection. CPU is what the kernel has
//! counted for the serving threads, so that the load's own cost is left out.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    missing_docs,
    reason = "bench"
)]

use std::convert::Infallible;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use aws_sdk_s3::config::{BehaviorVersion, IdentityCache, Region, RequestChecksumCalculation};
use aws_sdk_s3::presigning::PresigningConfig;
use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use fileaccess::pb::file_access_server::{FileAccess, FileAccessServer};
use fileaccess::pb::presign_request::Operation;
use futures_util::StreamExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};
use tower::Service as _;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const IN_FLIGHT: usize = 128;
const CALLS: usize = 100_000;
const BATCHES: usize = 100;
const BATCH: usize = 1000;
/// Of the floor and the SDK together.
const ALLOWED: f64 = 1.15;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run());
}

async fn run() {
    let sdk = sdk_alone().await;
    println!("SDK's presigned() alone              {sdk:6.1} µs of CPU a URL");
    let (floor, constant) = transport_floor().await;
    println!("transport floor (constant answer)    {floor:6.1} µs of server CPU a call");

    let binary = env!("CARGO_BIN_EXE_fileaccess");
    println!(
        "binary                               {:6.1} MiB",
        fs::metadata(binary).unwrap().len() as f64 / 1_048_576.0
    );
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(binary, folder.path()).await;
    let mut api = FileAccessClient::new(service.channel.clone()).max_decoding_message_size(64 << 20);
    let first = api.presign(ask(0)).await.unwrap().into_inner();
    assert_eq!(first.headers, constant.headers);
    load(&api, 10_000).await;
    let early = service.resident();
    let (cpu, begun) = (service.cpu(), Instant::now());
    load(&api, CALLS).await;
    let (cpu, wall) = ((service.cpu() - cpu) / CALLS as f64, begun.elapsed());
    let late = service.resident();
    println!(
        "Presign                              {cpu:6.1} µs of server CPU a call, {:.0} a second on one core",
        CALLS as f64 / wall.as_secs_f64()
    );
    println!(
        "resident memory                      {early:6.1} MiB after 10,000 calls, {late:.1} MiB after {}",
        10_000 + CALLS
    );

    let requests: Vec<_> = (0..BATCH).map(ask).collect();
    let (cpu_before, begun) = (service.cpu(), Instant::now());
    for _ in 0..BATCHES {
        let results = api
            .batch_presign(pb::BatchPresignRequest { requests: requests.clone() })
            .await
            .unwrap()
            .into_inner()
            .results;
        assert!(results.iter().all(|r| matches!(r.result, Some(pb::presign_result::Result::Response(_)))));
    }
    let urls = (BATCHES * BATCH) as f64;
    let (each, wall) = ((service.cpu() - cpu_before) / urls, begun.elapsed());
    println!(
        "BatchPresign of {BATCH}                 {each:6.1} µs of server CPU a URL, {:.0} URLs a second on one core",
        urls / wall.as_secs_f64()
    );

    // Past saturation, what is too much is refused at once, so that the rest is served in time.
    let mut slowest = Vec::new();
    for in_flight in [64, 256, 2048] {
        let (median, late, refused) = latency(&api, in_flight).await;
        println!(
            "{in_flight:5} calls in flight                {median:6.1} ms in the median, {late:.1} ms at the 99th percentile, {refused:.0} % refused"
        );
        slowest.push(late);
    }
    assert!(slowest[2] < slowest[1] * 10.0, "latency must stay flat past saturation");

    let ratio = cpu / (floor + sdk);
    println!("overhead                             {ratio:6.2} × (floor + SDK), allowed {ALLOWED}");
    assert!(late <= 32.0 && late - early < 2.0, "memory must be at most 32 MiB and flat");
    assert!(ratio <= ALLOWED, "our own overhead is too much");
}

fn ask(n: usize) -> pb::PresignRequest {
    pb::PresignRequest {
        bucket: "photos".into(),
        key: format!("users/4f6c1a/albums/summer/IMG_{n:06}.jpg"),
        ttl: None,
        operation: Some(Operation::Download(pb::Download::default())),
    }
}

/// The SDK, set up as the service sets it up, with nothing around it, while the
/// other core is as busy as the load will make it: where two cores share one
/// core's units, as on most cloud machines, code is slower then.
async fn sdk_alone() -> f64 {
    let over = Arc::new(AtomicBool::new(false));
    let busy = std::thread::spawn({
        let over = Arc::clone(&over);
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            while !over.load(Ordering::Relaxed) {
                runtime.block_on(presign_many(100));
            }
        }
    });
    presign_many(10_000).await;
    let begun = cpu_of(Path::new("/proc/thread-self"));
    presign_many(CALLS).await;
    let took = cpu_of(Path::new("/proc/thread-self")) - begun;
    over.store(true, Ordering::Relaxed);
    busy.join().unwrap();
    took / CALLS as f64
}

async fn presign_many(count: usize) {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-central-1"))
        .credentials_provider(Credentials::new("AKIDEXAMPLE", "secret", None, None, "bench"))
        .identity_cache(IdentityCache::no_cache())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .build();
    let client = aws_sdk_s3::Client::from_conf(config);
    let terms =
        PresigningConfig::builder().start_time(SystemTime::now()).expires_in(Duration::from_mins(15)).build().unwrap();
    for n in 0..count {
        let key = format!("users/4f6c1a/albums/summer/IMG_{n:06}.jpg");
        let url = client.get_object().bucket("photos-prod").key(key).presigned(terms.clone()).await.unwrap();
        std::hint::black_box(url.uri().to_owned());
    }
}

/// CPU time in µs, as the scheduler has counted it for a task.
fn cpu_of(task: &Path) -> f64 {
    let text = fs::read_to_string(task.join("schedstat")).expect("a kernel that counts (CONFIG_SCHED_INFO)");
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1000.0
}

async fn load(api: &FileAccessClient<Channel>, calls: usize) {
    // Tonic's client looks at grpc-status: an error ends the bench.
    let done = futures_util::stream::iter(0..calls)
        .map(|n| {
            let mut api = api.clone();
            async move { api.presign(ask(n)).await.expect("a presigned request").into_inner().url.len() }
        })
        .buffer_unordered(IN_FLIGHT)
        .count()
        .await;
    assert_eq!(done, calls);
}

/// How long the calls take that are served, in ms: the median and the 99th
/// percentile; and the share that is refused, in percent.
async fn latency(api: &FileAccessClient<Channel>, in_flight: usize) -> (f64, f64, f64) {
    let calls = in_flight * 20;
    let ended: Vec<_> = futures_util::stream::iter(0..calls)
        .map(|n| {
            let mut api = api.clone();
            async move {
                let begun = Instant::now();
                match api.presign(ask(n)).await {
                    Ok(_) => Some(begun.elapsed().as_secs_f64() * 1000.0),
                    Err(status) if status.code() == tonic::Code::ResourceExhausted => None,
                    Err(status) => panic!("{status}"),
                }
            }
        })
        .buffer_unordered(in_flight)
        .collect()
        .await;
    let mut served: Vec<_> = ended.into_iter().flatten().collect();
    served.sort_by(f64::total_cmp);
    let at = |share: usize| served[(served.len() - 1) * share / 100];
    (at(50), at(99), 100.0 - 100.0 * served.len() as f64 / calls as f64)
}

/// The same messages with a constant answer, on the same HTTP/2 server.
async fn transport_floor() -> (f64, pb::PresignResponse) {
    let constant = pb::PresignResponse {
        method: "GET".into(),
        url: format!(
            "https://photos-prod.s3.eu-central-1.amazonaws.com/users/4f6c1a/albums/summer/IMG_000000.jpg?{}",
            "x".repeat(360)
        ),
        expires_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        expires_in: Some(prost_types::Duration { seconds: 900, nanos: 0 }),
        signer: "main".into(),
        issue_id: "01ARZ3NDEKTSV4RRFFQ69G5FAV".into(),
        ..pb::PresignResponse::default()
    };
    let (tell, told) = tokio::sync::oneshot::channel();
    let answer = constant.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let task = fs::canonicalize("/proc/thread-self").unwrap();
            tell.send((listener.local_addr().unwrap(), task)).unwrap();
            let service = FileAccessServer::new(Constant(answer));
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let service = service.clone();
                let service = hyper::service::service_fn(move |request| {
                    let mut service = service.clone();
                    async move { Ok::<_, Infallible>(service.call(request).await.unwrap_or_else(|e| match e {})) }
                });
                tokio::spawn(
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
    });
    let (address, task) = told.await.unwrap();
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let api = FileAccessClient::new(channel);
    load(&api, 10_000).await;
    let before = cpu_of(&task);
    load(&api, CALLS).await;
    ((cpu_of(&task) - before) / CALLS as f64, constant)
}

#[derive(Clone)]
struct Constant(pb::PresignResponse);

#[tonic::async_trait]
impl FileAccess for Constant {
    async fn presign(&self, _: Request<pb::PresignRequest>) -> Result<Response<pb::PresignResponse>, Status> {
        Ok(Response::new(self.0.clone()))
    }
    async fn batch_presign(
        &self,
        _: Request<pb::BatchPresignRequest>,
    ) -> Result<Response<pb::BatchPresignResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn start_upload(
        &self,
        _: Request<pb::StartUploadRequest>,
    ) -> Result<Response<pb::StartUploadResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn sign_parts(&self, _: Request<pb::SignPartsRequest>) -> Result<Response<pb::SignPartsResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn list_parts(&self, _: Request<pb::ListPartsRequest>) -> Result<Response<pb::ListPartsResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn complete_upload(
        &self,
        _: Request<pb::CompleteUploadRequest>,
    ) -> Result<Response<pb::CompleteUploadResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn abort_upload(
        &self,
        _: Request<pb::AbortUploadRequest>,
    ) -> Result<Response<pb::AbortUploadResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn list(&self, _: Request<pb::ListRequest>) -> Result<Response<pb::ListResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn stat(&self, _: Request<pb::StatRequest>) -> Result<Response<pb::StatResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn revoke(&self, _: Request<pb::RevokeRequest>) -> Result<Response<pb::RevokeResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn inspect(&self, _: Request<pb::InspectRequest>) -> Result<Response<pb::InspectResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
    async fn list_signers(
        &self,
        _: Request<pb::ListSignersRequest>,
    ) -> Result<Response<pb::ListSignersResponse>, Status> {
        Err(Status::unimplemented("not part of the floor"))
    }
}

/// The real binary, ended with this.
struct Service {
    child: Child,
    channel: Channel,
}

impl Service {
    async fn start(binary: &str, folder: &Path) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let settings = format!(
            "listen = '{free}'\n[buckets.photos]\nbucket = 'photos-prod'\nregion = 'eu-central-1'\n\
             [signers.main]\nkind = 'ambient'\nsource = {{ environment = {{ access_key_id = 'B_ID', secret_access_key = 'B_KEY' }} }}\n\
             [[routes]]\nbucket = 'photos'\nsigner = 'main'\n\
             [[grants]]\ncaller = 'loopback'\nbucket = 'photos'\nprefix = 'users/'\nactions = ['download']\n[limits]\nworkers = 1\nstreams = 10000\ncalls = 256\n"
        );
        let file = folder.join("settings.toml");
        fs::write(&file, settings).unwrap();
        let child = Command::new(binary)
            .args(["serve", "--config", file.to_str().unwrap()])
            .env("B_ID", "AKIDEXAMPLE")
            .env("B_KEY", "secret")
            // The audit trail: written, and nobody reads it.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let endpoint = Endpoint::from_shared(format!("http://{free}")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match endpoint.connect().await {
                Ok(channel) => return Self { child, channel },
                Err(e) if Instant::now() > deadline => panic!("the service does not come up: {e}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn cpu(&self) -> f64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks.map(|task| cpu_of(&task.unwrap().path())).sum()
    }

    fn resident(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
