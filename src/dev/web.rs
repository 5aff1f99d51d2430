//! The page of `fileaccess dev`, and the API behind it as gRPC-Web.
//!
//! Any page that a browser of this machine has open can send requests to
//! loopback. So the page's own are told from theirs: the `Host` must be this
//! listener's own name (else a foreign name that resolves to loopback would be
//! of the same origin as its page), and a call must come from this origin.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, ORIGIN, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use tokio::net::TcpListener;
use tonic::Status;
use tonic::body::Body;
use tonic_web::GrpcWebLayer;
use tower::{Layer as _, Service as _};

use super::http1;
use crate::api::Api;
use crate::app::App;
use crate::caller::Caller;
use crate::error::Error;
use crate::pb::file_access_server::FileAccessServer;

/// Scripts and styles from here only; nothing embeds the page, and it sends
/// forms nowhere. S3 may be anywhere.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; \
                      connect-src 'self' http: https:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The origins of the page at `address`: by its address, and by `localhost`.
#[must_use]
pub fn origins(address: SocketAddr) -> [String; 2] {
    // Browsers leave the scheme's own port out.
    let [by_address, by_name] = match address {
        SocketAddr::V4(address) if address.port() == 80 => [address.ip().to_string(), "localhost".into()],
        SocketAddr::V6(address) if address.port() == 80 => [format!("[{}]", address.ip()), "localhost".into()],
        _ => [address.to_string(), format!("localhost:{}", address.port())],
    };
    [format!("http://{by_address}"), format!("http://{by_name}")]
}

/// Serves the page, and `app` to it, until `until`.
///
/// # Errors
/// `listener` is not on loopback.
pub async fn serve(listener: TcpListener, app: Arc<App>, until: impl Future<Output = ()>) -> io::Result<()> {
    let address = listener.local_addr()?;
    let origins: Arc<[String]> = origins(address).into();
    // Who reaches a loopback address is on loopback too.
    let caller = Caller::loopback(address).ok_or(Error::NoCaller);
    let deadline = app.limits.deadline;
    let api = FileAccessServer::new(Api(Arc::clone(&app)))
        .max_decoding_message_size(app.limits.request_bytes)
        .max_encoding_message_size(app.limits.response_bytes);
    let api = tower::service_fn(move |mut request: Request<Body>| {
        let mut api = api.clone();
        Caller::put(caller.clone(), request.extensions_mut());
        async move {
            match tokio::time::timeout(deadline, api.call(request)).await {
                Ok(answer) => answer,
                Err(_) => Ok(Status::from(Error::Deadline).into_http()),
            }
        }
    });
    let api = GrpcWebLayer::new().layer(api);
    let service = service_fn(move |request: Request<Incoming>| {
        let (mut api, origins) = (api.clone(), Arc::clone(&origins));
        async move {
            match refusal(&origins, request.method(), request.headers()) {
                Some(refusal) => Ok::<_, Infallible>(refusal),
                None if request.method() == Method::POST => api.call(request).await,
                None => Ok(page(request.uri().path())),
            }
        }
    });
    http1::serve(listener, service, until).await
}

/// Why a request is refused, unless it is of the page, or of somebody who wants
/// to see it.
fn refusal(origins: &[String], method: &Method, headers: &HeaderMap) -> Option<Response<Body>> {
    let ours = |value: &HeaderValue, scheme: &str| {
        origins.iter().any(|origin| origin.strip_prefix(scheme).is_some_and(|own| own.as_bytes() == value.as_bytes()))
    };
    if !headers.get(HOST).is_some_and(|host| ours(host, "http://")) {
        return Some(text(StatusCode::MISDIRECTED_REQUEST, "`host` must be the address that `fileaccess dev` printed"));
    }
    match *method {
        Method::GET | Method::HEAD => None,
        Method::POST if headers.get(ORIGIN).is_some_and(|origin| ours(origin, "")) => None,
        Method::POST => Some(text(StatusCode::FORBIDDEN, "`origin` must be this page's own")),
        _ => {
            let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "only GET, HEAD and POST are served");
            refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
            Some(refused)
        }
    }
}

/// A file of the page.
fn page(path: &str) -> Response<Body> {
    let (kind, body) = match path {
        "/" => ("text/html; charset=utf-8", include_str!("page.html")),
        "/page.js" => ("text/javascript; charset=utf-8", include_str!("page.js")),
        "/page.css" => ("text/css; charset=utf-8", include_str!("page.css")),
        _ => return text(StatusCode::NOT_FOUND, "there is only `/`"),
    };
    let mut response = text(StatusCode::OK, body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::new(text.to_owned()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_of_its_address_and_of_localhost() {
        let of = |address: &str| origins(address.parse().unwrap());
        assert_eq!(of("127.0.0.1:8080"), ["http://127.0.0.1:8080", "http://localhost:8080"]);
        assert_eq!(of("[::1]:8080"), ["http://[::1]:8080", "http://localhost:8080"]);
        assert_eq!(of("127.0.0.1:80"), ["http://127.0.0.1", "http://localhost"]);
        assert_eq!(of("[::1]:80"), ["http://[::1]", "http://localhost"]);
    }

    #[test]
    fn only_the_page_may_call() {
        let origins = origins("127.0.0.1:8080".parse().unwrap());
        let admitted = |method: Method, host: &str, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(ORIGIN, origin.parse().unwrap());
            }
            refusal(&origins, &method, &headers).map_or(200, |refused| refused.status().as_u16())
        };
        assert_eq!(admitted(Method::GET, "localhost:8080", None), 200);
        assert_eq!(admitted(Method::POST, "127.0.0.1:8080", Some("http://127.0.0.1:8080")), 200);
        for host in ["rebound.test:8080", "127.0.0.1", "127.0.0.1:81", "127.0.0.1:8080.test", ""] {
            assert_eq!(admitted(Method::GET, host, None), 421, "{host}");
            assert_eq!(admitted(Method::POST, host, Some("http://127.0.0.1:8080")), 421, "{host}");
        }
        for origin in [None, Some("null"), Some("http://127.0.0.1:81"), Some("https://127.0.0.1:8080"), Some("*")] {
            assert_eq!(admitted(Method::POST, "127.0.0.1:8080", origin), 403, "{origin:?}");
        }
        assert_eq!(admitted(Method::OPTIONS, "127.0.0.1:8080", Some("http://evil.test")), 405);
        assert_eq!(refusal(&origins, &Method::GET, &HeaderMap::new()).unwrap().status(), 421);
    }
}
