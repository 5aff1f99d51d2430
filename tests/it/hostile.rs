//! Peers that mean no good: the service stays up, well, and of one size.

use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

use crate::callers::{is_healthy, plain, presign};
use crate::outside::Service;
use crate::stage::Backend;
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![malformed_frames_leave_the_service_as_it_was, refused_calls_leave_the_service_as_it_was]
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
