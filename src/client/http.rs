//! Presigned requests, carried out. No URL gets into an error.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response};

use super::Error;
use crate::pb;
use crate::signer::presign::chain;

/// How long no byte may move.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);
/// How much of an error's body is read.
const ERROR_BYTES: usize = 64 << 10;

/// It follows no redirect: what is signed is signed for one place.
pub(super) fn client() -> reqwest::Result<reqwest::Client> {
    // A second time changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_secs(10))
        .build()
}

/// The request that was signed.
pub(super) fn request(http: &reqwest::Client, signed: &pb::PresignResponse) -> Result<RequestBuilder, Error> {
    let method = Method::from_bytes(signed.method.as_bytes())
        .map_err(|_| Error::Answer(format!("a method `{}`", signed.method)))?;
    let mut request = http.request(method, &signed.url);
    for (name, value) in &signed.headers {
        request = request.header(name, value);
    }
    Ok(request)
}

/// Sends it, and gives the answer if it is a good one. `sent` counts the bytes
/// of the body that have gone out.
pub(super) async fn send(request: RequestBuilder, sent: Option<&AtomicU64>) -> Result<Response, Error> {
    let response = tokio::select! {
        response = request.send() => response.map_err(broken)?,
        () = stalled(sent) => return Err(still()),
    };
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = body(response).await.unwrap_or_default();
    Err(Error::S3 {
        status: status.as_u16(),
        code: element(&body, "Code").unwrap_or_else(|| status.canonical_reason().unwrap_or_default().to_owned()),
        message: element(&body, "Message").unwrap_or_else(|| "no reason given".to_owned()),
    })
}

/// The next bytes of an answer.
pub(super) async fn next(response: &mut Response) -> Result<Option<bytes::Bytes>, Error> {
    tokio::time::timeout(PATIENCE, response.chunk()).await.map_err(|_| still())?.map_err(broken)
}

async fn body(mut response: Response) -> Result<String, Error> {
    let mut body = Vec::new();
    while let Some(bytes) = next(&mut response).await? {
        body.extend_from_slice(&bytes);
        if body.len() > ERROR_BYTES {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&body).into_owned())
}

fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once("</")?;
    Some(text.chars().filter(|c| !c.is_control()).take(300).collect())
}

fn broken(error: reqwest::Error) -> Error {
    Error::Connection(chain(&error.without_url()))
}

fn still() -> Error {
    Error::Connection(format!("no byte moved for {} s", PATIENCE.as_secs()))
}

/// Ends when `sent` has not changed for [`PATIENCE`].
async fn stalled(sent: Option<&AtomicU64>) {
    let now = || sent.map(|sent| sent.load(Ordering::Relaxed));
    let mut before = now();
    loop {
        tokio::time::sleep(PATIENCE).await;
        if now() == before {
            return;
        }
        before = now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_s3_is_read() {
        let xml = "<?xml?><Error><Code>AccessDenied</Code><Message>Request has\n expired</Message></Error>";
        assert_eq!(element(xml, "Code").as_deref(), Some("AccessDenied"));
        assert_eq!(element(xml, "Message").as_deref(), Some("Request has expired"));
        assert_eq!(element("<html>", "Code"), None);
    }
}
