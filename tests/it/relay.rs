//! A relay in front of an S3 that can be told to fail, to wait, or to cut a
//! request off.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use http::{Request, Response, StatusCode};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// Answered with this status.
    Status(u16),
    /// The connection is closed without an answer.
    Cut,
    /// The connection is closed in the middle of the answer.
    Short,
}

/// A request: its method, and its path and query.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub target: String,
    /// The `range` header.
    pub range: String,
}

impl Seen {
    /// The number of the part that is sent, if one is.
    pub fn part(&self) -> Option<usize> {
        let (_, rest) = self.target.split_once("partNumber=")?;
        rest.split('&').next()?.parse().ok().filter(|_| self.method == "PUT")
    }

    /// Whether it fetches a range of an object. The service's own calls never do.
    pub fn is_fetch(&self) -> bool {
        self.method == "GET" && !self.range.is_empty()
    }
}

type Judged = Pin<Box<dyn Future<Output = Fate> + Send>>;
type Judge = Arc<dyn Fn(Seen) -> Judged + Send + Sync>;

/// The relay; it ends with the test's runtime.
pub struct Relay {
    pub endpoint: String,
    judge: Arc<Mutex<Judge>>,
    /// Those that S3 has answered well.
    done: watch::Sender<Vec<Seen>>,
}

impl Relay {
    /// In front of `upstream`, and lets all pass.
    pub async fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let pass: Judge = Arc::new(|_| Box::pin(async { Fate::Pass }));
        let (judge, done) = (Arc::new(Mutex::new(pass)), watch::Sender::new(Vec::new()));
        let relay = Self { endpoint, judge: Arc::clone(&judge), done: done.clone() };
        let (upstream, http) = (upstream.to_owned(), fileaccess::rotation::probe::Probe::http_client());
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                let (upstream, http, judge, done) = (upstream.clone(), http.clone(), Arc::clone(&judge), done.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    let judge = Arc::clone(&judge.lock().unwrap());
                    pass_on(request, upstream.clone(), http.clone(), judge, done.clone())
                });
                // It fails when it is cut, and when a client has gone.
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        relay
    }

    /// From now on, `judge` is asked what becomes of each request. It may wait.
    pub fn judge<F: Future<Output = Fate> + Send + 'static>(&self, judge: impl Fn(Seen) -> F + Send + Sync + 'static) {
        *self.judge.lock().unwrap() = Arc::new(move |seen| Box::pin(judge(seen)));
    }

    /// What S3 has answered well so far.
    pub fn done(&self) -> Vec<Seen> {
        self.done.borrow().clone()
    }

    /// Waits until S3 has answered so many requests well that `enough` of them is
    /// true.
    pub async fn until(&self, enough: impl FnMut(&Vec<Seen>) -> bool) {
        let mut done = self.done.subscribe();
        let waiting = done.wait_for(enough);
        tokio::time::timeout(std::time::Duration::from_mins(1), waiting).await.expect("it comes").expect("a relay");
    }
}

async fn pass_on(
    request: Request<Incoming>,
    upstream: String,
    http: reqwest::Client,
    judge: Judge,
    done: watch::Sender<Vec<Seen>>,
) -> Result<Response<reqwest::Body>, std::io::Error> {
    let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let seen = Seen {
        method: request.method().to_string(),
        target: request.uri().path_and_query().expect("a path").to_string(),
        range: header("range"),
    };
    let fate = judge(seen.clone()).await;
    match fate {
        Fate::Pass | Fate::Short => {}
        Fate::Cut => return Err(std::io::Error::other("cut")),
        Fate::Status(status) => {
            let status = StatusCode::from_u16(status).expect("a status");
            let body = "<Error><Code>OfTheRelay</Code><Message>as told</Message></Error>";
            return Ok(Response::builder().status(status).body(body.into()).expect("a response"));
        }
    }
    let (parts, body) = request.into_parts();
    let answer = http
        .request(parts.method, format!("{upstream}{}", seen.target))
        // The host too: it is signed.
        .headers(parts.headers)
        .body(reqwest::Body::wrap(body))
        .send()
        .await
        .map_err(std::io::Error::other)?;
    if fate == Fate::Short {
        let status = answer.status();
        let mut short = Response::builder().status(status);
        for (name, value) in answer.headers() {
            short = short.header(name, value);
        }
        let mut bytes = answer.bytes().await.map_err(std::io::Error::other)?;
        bytes.truncate(bytes.len() / 2);
        return Ok(short.body(reqwest::Body::wrap(Half(Some(bytes)))).expect("a response"));
    }
    if answer.status().is_success() {
        done.send_modify(|done| done.push(seen));
    }
    Ok::<_, Infallible>(answer.into()).map_err(|never| match never {})
}

/// A body that ends in an error.
struct Half(Option<bytes::Bytes>);

impl Body for Half {
    type Data = bytes::Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, std::io::Error>>> {
        Poll::Ready(Some(self.0.take().map(Frame::data).ok_or_else(|| std::io::Error::other("cut"))))
    }
}
