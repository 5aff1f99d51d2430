//! CORS of the embedded S3: what a bucket's rule says to browsers.
//! <https://docs.aws.amazon.com/AmazonS3/latest/userguide/ManageCorsUsing.html>

use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::Service;
use s3s::service::S3Service;
use s3s::{Body, HttpError, HttpResponse};

use super::forms::Forms;
use crate::store::cors::{EXPOSED, MAX_AGE, METHODS};

/// The answer depends on these headers of the request.
const VARIES: HeaderValue =
    HeaderValue::from_static("origin, access-control-request-headers, access-control-request-method");

/// An S3 that pages of certain origins may use.
#[derive(Clone)]
pub struct Cors {
    inner: Forms,
    origins: Arc<[String]>,
}

impl Cors {
    /// `inner`, for the pages of `origins` too.
    #[must_use]
    pub fn new(inner: S3Service, origins: &[String]) -> Self {
        Self { inner: inner.into(), origins: origins.into() }
    }

    /// The request's origin, if its pages may send `method`.
    fn allowed(&self, headers: &HeaderMap, method: &[u8]) -> Option<HeaderValue> {
        let origin = headers.get(ORIGIN)?;
        let allowed = self.origins.iter().any(|allowed| origin == allowed.as_str());
        (allowed && METHODS.iter().any(|known| known.as_bytes() == method)).then(|| origin.clone())
    }

    /// What a browser is told that asks before it sends.
    fn preflight(&self, headers: &HeaderMap) -> HttpResponse {
        let method = headers.get(ACCESS_CONTROL_REQUEST_METHOD).map_or(&b""[..], HeaderValue::as_bytes);
        let mut response = HttpResponse::new(Body::empty());
        let Some(origin) = self.allowed(headers, method) else {
            *response.status_mut() = StatusCode::FORBIDDEN;
            return response;
        };
        let told = response.headers_mut();
        allow(told, origin);
        if let Ok(methods) = METHODS.join(", ").try_into() {
            told.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        // All headers are allowed, and told as they were asked for.
        if let Some(asked) = headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
            told.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        told.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE.into());
        response
    }
}

/// What every answer to an allowed origin has.
fn allow(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(VARY, VARIES);
    if let Ok(exposed) = EXPOSED.join(", ").try_into() {
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
}

impl From<S3Service> for Cors {
    /// For no page.
    fn from(inner: S3Service) -> Self {
        Self::new(inner, &[])
    }
}

impl Service<Request<Incoming>> for Cors {
    type Response = HttpResponse;
    type Error = HttpError;
    type Future = BoxFuture<'static, Result<HttpResponse, HttpError>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        if request.method() == Method::OPTIONS {
            return ready(Ok(self.preflight(request.headers()))).boxed();
        }
        let origin = self.allowed(request.headers(), request.method().as_str().as_bytes());
        let answer = Service::call(&self.inner, request);
        async move {
            let mut response = answer.await?;
            if let Some(origin) = origin {
                allow(response.headers_mut(), origin);
            }
            Ok(response)
        }
        .boxed()
    }
}
