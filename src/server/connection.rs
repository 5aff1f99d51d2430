//! How long a connection may last: from its first bytes until it is idle, old,
//! or of a caller whose certificate has ended.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use crate::caller::Peer;
use crate::config::Limits;

/// What every HTTP/2 client says first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream whose peer has begun to speak HTTP/2. It is read from the
/// beginning again.
pub(super) struct Greeted<S> {
    stream: S,
    /// What is left to be read again.
    again: &'static [u8],
}

impl<S: AsyncRead + Unpin> Greeted<S> {
    /// Waits for the peer's preface.
    ///
    /// # Errors
    /// Those of `stream`, and anything else than HTTP/2.
    pub(super) async fn new(mut stream: S) -> io::Result<Self> {
        let mut said = [0; PREFACE.len()];
        let mut due = PREFACE;
        while !due.is_empty() {
            let said = said.get_mut(..due.len()).unwrap_or_default();
            let count = stream.read(said).await?;
            match said.get(..count) {
                Some([]) | None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(said) => due = due.strip_prefix(said).ok_or_else(|| io::Error::other("this is not HTTP/2"))?,
            }
        }
        Ok(Self { stream, again: PREFACE })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Greeted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.again.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let (now, later) = self.again.split_at(self.again.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.again = later;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Greeted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A connection, as its calls know it.
pub(super) struct Calls {
    /// Who is at its other end.
    pub(super) peer: Peer,
    begun: Instant,
    running: AtomicUsize,
    /// When the last one ended, in ms since it was begun.
    quiet_since: AtomicU64,
}

/// A call that is running, until it is dropped.
pub(super) struct Call(Arc<Calls>);

impl Calls {
    pub(super) fn new(peer: Peer) -> Arc<Self> {
        let (running, quiet_since) = (AtomicUsize::new(0), AtomicU64::new(0));
        Arc::new(Self { peer, begun: Instant::now(), running, quiet_since })
    }

    /// Counts a call.
    pub(super) fn begin(self: &Arc<Self>) -> Call {
        self.running.fetch_add(1, Ordering::Relaxed);
        Call(Arc::clone(self))
    }

    /// How long no call has been running.
    fn quiet(&self) -> Duration {
        if self.running.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        let since = Duration::from_millis(self.quiet_since.load(Ordering::Relaxed));
        self.begun.elapsed().saturating_sub(since)
    }

    /// Waits until no call has been running for `long`; for ever if that is 0.
    async fn idle(&self, long: Duration) {
        if long.is_zero() {
            return std::future::pending().await;
        }
        loop {
            let left = long.saturating_sub(self.quiet());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

impl Call {
    pub(super) fn peer(&self) -> &Peer {
        &self.0.peer
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let now = u64::try_from(self.0.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.quiet_since.store(now, Ordering::Relaxed);
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a connection is told to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// The service ends.
    Shutdown,
    /// It was idle for too long.
    Idle,
    /// It is old, or its caller's certificate is about to end.
    Age,
}

/// When a connection has to go.
pub(super) struct Term<'a> {
    limits: &'a Limits,
    /// When it is old: from its beginning.
    age: Duration,
    /// The end of its caller's certificate.
    not_after: Option<SystemTime>,
}

impl<'a> Term<'a> {
    /// That of a connection which begins now.
    pub(super) fn new(limits: &'a Limits, not_after: Option<SystemTime>) -> Self {
        let age = limits.max_connection_age;
        // As gRPC has it, so that those that came together do not come back together.
        let age = if age.is_zero() { Duration::MAX } else { age.mul_f64(rand::random_range(0.9..1.1)) };
        let term = Self { limits, age, not_after };
        let left = term.left();
        // Early, so that its calls have ended by then.
        let margin = term.patience().min(left / 10);
        Self { age: age.min(left.saturating_sub(margin)), ..term }
    }

    /// What is left of its caller's certificate.
    fn left(&self) -> Duration {
        self.not_after.map_or(Duration::MAX, |end| end.duration_since(SystemTime::now()).unwrap_or_default())
    }

    /// How long a connection may need that was told to go: until its peer knows,
    /// and then for the longest call that may have come meanwhile.
    fn patience(&self) -> Duration {
        self.limits.keepalive_timeout.saturating_add(self.limits.deadline)
    }

    /// Waits, from its beginning, until it is to be told to go.
    pub(super) async fn over(&self, calls: &Calls, closing: &mut watch::Receiver<bool>) -> Why {
        tokio::select! {
            // Nobody left to say so is as good.
            _ = closing.wait_for(|closing| *closing) => Why::Shutdown,
            () = calls.idle(self.limits.max_connection_idle) => Why::Idle,
            () = tokio::time::sleep(self.age) => Why::Age,
        }
    }

    /// How long its calls may take to finish once it was told to go.
    pub(super) fn grace(&self, why: Why) -> Duration {
        match why {
            // The shutdown has a grace of its own.
            Why::Shutdown => self.left(),
            Why::Idle | Why::Age => self.left().min(self.patience()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of an age in seconds, with a certificate that ends in so many.
    fn term(age: u64, not_after: Option<u64>) -> Term<'static> {
        let limits = Limits { max_connection_age: Duration::from_secs(age), ..Limits::default() };
        Term::new(Box::leak(limits.into()), not_after.map(|seconds| SystemTime::now() + Duration::from_secs(seconds)))
    }

    #[test]
    fn a_connection_grows_as_old_as_it_may_and_no_older_than_its_certificate() {
        let within = |got: Duration, least: u64, most: u64| {
            assert!((Duration::from_secs(least)..=Duration::from_secs(most)).contains(&got), "{got:?}");
        };
        assert!(term(0, None).age > Duration::from_secs(1 << 40), "never");
        let ages: Vec<_> = (0..20).map(|_| term(100, None).age).collect();
        for age in &ages {
            within(*age, 90, 110);
        }
        assert!(ages.iter().any(|age| *age != ages[0]), "not all at once");
        within(term(100, Some(3600)).age, 90, 110);
        // It is told 40 s before the end of the certificate, or a tenth of what is left.
        within(term(0, Some(3600)).age, 3559, 3560);
        within(term(100, Some(50)).age, 44, 45);
        assert_eq!(term(0, Some(0)).age, Duration::ZERO);
        // And cut at the end of it.
        within(term(0, Some(3600)).grace(Why::Age), 40, 40);
        within(term(0, Some(7)).grace(Why::Idle), 6, 7);
        within(term(0, Some(50)).grace(Why::Shutdown), 49, 50);
        assert_eq!(term(0, None).grace(Why::Shutdown), Duration::MAX);
    }

    #[tokio::test]
    async fn a_call_that_runs_is_not_idle() {
        let calls = Calls::new(Peer::Sidecar { appends: false });
        let call = calls.begin();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(calls.quiet(), Duration::ZERO);
        drop(calls.begin());
        assert_eq!(calls.quiet(), Duration::ZERO, "the other one still runs");
        drop(call);
        assert!(calls.quiet() < calls.begun.elapsed(), "it counts from the end of the last one");
        calls.idle(Duration::from_millis(5)).await;
        assert!(calls.quiet() >= Duration::from_millis(5));
    }

    #[tokio::test]
    async fn what_is_no_http_2_is_known_by_its_first_wrong_byte() {
        for (said, kind) in [
            (&b"PRI * HTTP/1"[..], io::ErrorKind::Other),
            (b"G", io::ErrorKind::Other),
            (b"PRI", io::ErrorKind::UnexpectedEof),
            (b"", io::ErrorKind::UnexpectedEof),
        ] {
            assert_eq!(Greeted::new(said).await.err().unwrap().kind(), kind);
        }
        let both = [PREFACE, b"more"].concat();
        let mut read = Vec::new();
        Greeted::new(&both[..]).await.unwrap().read_to_end(&mut read).await.unwrap();
        assert_eq!(read, both);
    }
}
