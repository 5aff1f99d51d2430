//! Peers that mean no good: the service stays up, well, and of one size.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use futures_util::{StreamExt as _, stream};
use http::Uri;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::Connect;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;
use tonic::body::Body;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::callers::{is_healthy, plain, presign};
use crate::outside::Service;
use crate::stage::{Backend, ask, download};
use crate::{Case, binary, cases};

pub fn cases() -> Vec<Case> {
    cases![
        malformed_frames_leave_the_service_as_it_was,
        refused_calls_leave_the_service_as_it_was,
        peers_that_do_not_begin_lose_their_place,
        peers_that_ask_nothing_lose_their_place,
        an_idle_connection_is_told_to_go_and_one_with_a_stream_is_not,
        old_connections_go_without_a_failed_call,
        a_call_may_last_longer_than_its_connection_is_good,
    ]
}

/// How much memory may come and go, in KiB. It is less than
/// what 10,000 peers would leave that left half a KiB each.
const SLACK: i64 = 4096;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame (RFC 9113, section 4.1) that claims to be `length` bytes long.
fn claimed(length: usize, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(length).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    claimed(payload.len(), kind, flags, stream, payload)
}

/// What no client may send after its preface, by turns.
fn malformed(n: usize) -> Vec<u8> {
    const END: u8 = 0x4;
    // A request line by the static table of HPACK: POST, http, and a path in a literal.
    let post = b"\x83\x86\x44\x02/x";
    let noise: Vec<u8> = (0..64).map(|i| u8::try_from((n * 31 + i * 17 + n / 256) % 256).unwrap()).collect();
    match n % 24 {
        0 => claimed(1 << 20, 0, 0, 1, &noise),   // DATA longer than the largest frame
        1 => frame(0, 0, 0, b"x"),                // DATA of no stream
        2 => frame(0, 0, 1, b"x"),                // DATA of a stream that was never opened
        3 => frame(1, END, 0, post),              // HEADERS of no stream
        4 => frame(1, END, 2, post),              // HEADERS of a stream that is the server's
        5 => frame(1, END, 1, &[0xff; 32]),       // HEADERS with an index beyond all tables
        6 => frame(1, END, 1, &noise),            // HEADERS with noise
        7 => frame(1, END | 0x8, 1, b"\xff\x83"), // HEADERS with more padding than there is
        8 => frame(1, END, 1, b"\x83\x86"),       // HEADERS without a path
        9 => frame(1, END, 1, b"\x00\x01A\x01b"), // HEADERS with a name in upper case
        10 => frame(1, 0, 1, post),               // HEADERS that never end
        11 => [frame(1, 0, 1, post), frame(6, 0, 0, &[0; 8])].concat(), // and a PING amid them
        12 => frame(9, END, 1, post),             // CONTINUATION of nothing
        13 => frame(2, 0, 1, &[0; 4]),            // PRIORITY too short
        14 => frame(3, 0, 1, &[0; 4]),            // RST_STREAM of a stream that was never opened
        15 => frame(3, 0, 1, &[0; 3]),            // RST_STREAM too short
        16 => frame(4, 0, 0, &[0; 5]),            // SETTINGS of no whole setting
        17 => frame(4, 1, 0, &[0; 6]),            // SETTINGS acknowledged with a setting
        18 => frame(4, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff]), // SETTINGS with too large a window
        19 => frame(5, END, 1, post),             // PUSH_PROMISE of a client
        20 => frame(6, 0, 0, &[0; 7]),            // PING too short
        21 => frame(8, 0, 0, &[0; 4]),            // WINDOW_UPDATE by nothing
        22 => frame(8, 0, 0, &[0x7f, 0xff, 0xff, 0xff]), // WINDOW_UPDATE beyond all windows
        _ => noise,
    }
}

/// Sends it, and waits until the service has hung up.
async fn attack(address: &str, n: usize) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // Now and then not even a preface.
    let mut sent = if n % 100 == 99 { Vec::new() } else { [PREFACE, &frame(4, 0, 0, &[])].concat() };
    sent.extend(malformed(n));
    // It may hang up before it has read all of it.
    let _ = stream.write_all(&sent).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let hung_up = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    assert!(hung_up.is_ok(), "not hung up on after {n}");
    assert!(answer.len() < 1024, "{} bytes of answer to {n}", answer.len());
}

async fn malformed_frames_leave_the_service_as_it_was(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), "127.0.0.1:0", "").await;
    let address = service.address.clone();
    let channel = plain(&address).await;
    presign(&channel, &[]).await.unwrap();
    let attacks = async |range: std::ops::Range<usize>| {
        stream::iter(range).for_each_concurrent(32, |n| attack(&address, n)).await;
    };
    attacks(0..1_000).await;
    let before = service.resident();
    attacks(1_000..11_000).await;
    let grown = service.resident() - before;
    assert!(grown < SLACK, "{grown} KiB more than {before} KiB");
    // The connection that was there all the time, and a new one.
    for channel in [&channel, &plain(&address).await] {
        presign(channel, &[]).await.unwrap();
        assert!(is_healthy(channel).await);
    }
}

async fn refused_calls_leave_the_service_as_it_was(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), "127.0.0.1:0", "[trusted_sidecar]\nloopback = true\n").await;
    let channel = plain(&service.address).await;
    let calls = async |count: usize| {
        let call = async |n: usize| {
            // Nobody, something unreadable, and a name of its own each time.
            let name = format!("URI=spiffe://mesh.test/{n}/");
            let headers = [("x-forwarded-client-cert", &*name)];
            let headers = if n.is_multiple_of(2) { &headers[..] } else { &[] };
            assert_eq!(presign(&channel, headers).await.unwrap_err().code(), Code::Unauthenticated);
        };
        stream::iter(0..count).for_each_concurrent(64, call).await;
    };
    calls(1_000).await;
    let before = service.resident();
    calls(10_000).await;
    let grown = service.resident() - before;
    assert!(grown < SLACK, "{grown} KiB more than {before} KiB");
    let known = [("x-forwarded-client-cert", "URI=spiffe://mesh.test/orders")];
    presign(&channel, &known).await.unwrap();
    assert!(is_healthy(&channel).await);
}

/// Room for a call, once somebody has lost theirs.
async fn there_is_room(address: &str) {
    let call = async { presign(&plain(address).await, &[]).await };
    tokio::time::timeout(Duration::from_secs(20), call).await.expect("there is room").unwrap();
}

async fn peers_that_do_not_begin_lose_their_place(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let limits = "connections = 2\nhandshake_timeout = '1s'";
    let mut service = Service::start_limited(folder.path(), limits, "").await;
    let mut silent = TcpStream::connect(&service.address).await.unwrap();
    let mut slow = TcpStream::connect(&service.address).await.unwrap();
    let dripping = tokio::spawn(async move {
        for byte in PREFACE {
            // Until it is hung up on.
            if slow.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        slow.read(&mut [0]).await.unwrap_or_default()
    });
    there_is_room(&service.address).await;
    for _ in 0..2 {
        service.logged(&["connection without http/2", "not done within 1s"]).await;
    }
    assert_eq!(silent.read(&mut [0]).await.unwrap_or_default(), 0);
    assert_eq!(dripping.await.unwrap(), 0);
}

async fn peers_that_ask_nothing_lose_their_place(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let limits = "connections = 1\nmax_connection_idle = '500ms'\ndeadline = '1s'\nkeepalive_timeout = '500ms'";
    let mut service = Service::start_limited(folder.path(), limits, "").await;
    let mut idle = TcpStream::connect(&service.address).await.unwrap();
    idle.write_all(&[PREFACE, &frame(4, 0, 0, &[])].concat()).await.unwrap();
    // It does not even answer the GOAWAY.
    there_is_room(&service.address).await;
    service.logged(&["connection told to go", "\"why\":\"Idle\""]).await;
    service.logged(&["connection cut"]).await;
    let mut told = Vec::new();
    let _ = idle.read_to_end(&mut told).await;
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0]; // (RFC 9113, section 6.8)
    assert!(told.windows(goaway.len()).any(|frame| frame == goaway), "{told:?}");
}

/// What sends calls over a connection that it makes when it has to, and how
/// often it has. As all of gRPC's own clients, and unlike tonic's, it sends a
/// call once more that a connection on its way out has not taken.
fn counted(address: &str) -> (Client<impl Connect + Clone + Send + Sync + 'static, Body>, Arc<AtomicUsize>) {
    let (address, count) = (address.to_owned(), Arc::<AtomicUsize>::default());
    let counter = Arc::clone(&count);
    let dial = move |_: Uri| {
        counter.fetch_add(1, Ordering::Relaxed);
        let address = address.clone();
        Box::pin(async move { TcpStream::connect(address).await.map(TokioIo::new) })
    };
    (Client::builder(TokioExecutor::new()).http2_only(true).build(tower::service_fn(dial)), count)
}

async fn an_idle_connection_is_told_to_go_and_one_with_a_stream_is_not(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mut service = Service::start_limited(folder.path(), "max_connection_idle = '1s'", "").await;
    let (http, connected) = counted(&service.address);
    let (http_of_health, connected_for_health) = counted(&service.address);
    let mut api = FileAccessClient::with_origin(http, Uri::from_static("http://localhost"));
    let mut health = HealthClient::with_origin(http_of_health, Uri::from_static("http://localhost"));
    let watching = health.watch(HealthCheckRequest::default()).await.unwrap();
    for n in 1..=2 {
        // Nobody notices.
        api.presign(ask("k", download())).await.unwrap();
        assert_eq!(connected.load(Ordering::Relaxed), n);
        service.logged(&["connection told to go", "\"why\":\"Idle\""]).await;
        service.logged(&["connection ended"]).await;
    }
    health.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(connected_for_health.load(Ordering::Relaxed), 1, "its stream was there for twice as long");
    drop(watching);
    service.logged(&["connection told to go", "\"why\":\"Idle\""]).await;
}

async fn old_connections_go_without_a_failed_call(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    // If they stayed, there would be no room for others soon.
    let limits = "connections = 4\nmax_connection_age = '200ms'";
    let mut service = Service::start_limited(folder.path(), limits, "").await;
    let (http, connected) = counted(&service.address);
    let api = FileAccessClient::with_origin(http, Uri::from_static("http://localhost"));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let load = || {
        let (mut api, stopped) = (api.clone(), stopped.clone());
        tokio::spawn(async move {
            let mut calls = 0;
            while !*stopped.borrow() {
                api.presign(ask("k", download())).await.unwrap();
                calls += 1;
            }
            calls
        })
    };
    let loads = [load(), load(), load(), load()];
    for _ in 0..20 {
        service.logged(&["connection told to go", "\"why\":\"Age\""]).await;
    }
    stop.send_replace(true);
    for load in loads {
        let calls = load.await.expect("no call failed");
        assert!(calls > 20, "{calls} calls are no load");
    }
    assert!(connected.load(Ordering::Relaxed) >= 20);
}

async fn a_call_may_last_longer_than_its_connection_is_good(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let store = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = binary::settings("127.0.0.1:0", &format!("http://{}", store.local_addr().unwrap()));
    let settings = settings.replace("[limits]", "[limits]\nmax_connection_age = '1s'");
    let mut service = Service::start_with(folder.path(), &settings).await;
    let mut api = FileAccessClient::new(plain(&service.address).await);
    let list = pb::ListRequest { bucket: "files".into(), ..pb::ListRequest::default() };
    let listing = tokio::spawn(async move { api.list(list).await });
    let (mut asked, _) = store.accept().await.unwrap();
    service.logged(&["connection told to go", "\"why\":\"Age\""]).await;
    let body = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    asked.write_all(answer.as_bytes()).await.unwrap();
    listing.await.unwrap().unwrap();
    service.logged(&["connection ended"]).await;
}
