//! Forms as plain pages send them: S3 puts the file's own name in place of
//! `${filename}` in each field. `s3s` does not, and does not tell the name.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-HTTPPOSTForms.html>

use std::io;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method, Request};
use hyper::body::Incoming;
use hyper::service::Service;
use s3s::dto::StreamingBlob;
use s3s::service::S3Service;
use s3s::{Body, HttpError, HttpResponse};

use crate::ops::form_upload::FILENAME;

/// How much may come before the file. S3 takes 20 KB.
const MAX_HEAD: usize = 1 << 20;

/// An S3 that fills forms in.
#[derive(Clone)]
pub struct Forms(S3Service);

impl From<S3Service> for Forms {
    fn from(inner: S3Service) -> Self {
        Self(inner)
    }
}

impl Service<Request<Incoming>> for Forms {
    type Response = HttpResponse;
    type Error = HttpError;
    type Future = BoxFuture<'static, Result<HttpResponse, HttpError>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let form = (request.method() == Method::POST).then(|| delimiter(request.headers())).flatten();
        let Some(delimiter) = form else { return Service::call(&self.0, request) };
        let service = self.0.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = fill_in(Body::from(body), &delimiter).await;
            service.call(Request::from_parts(parts, body)).await
        }
        .boxed()
    }
}

/// What stands before each field of a form.
fn delimiter(headers: &HeaderMap) -> Option<Vec<u8>> {
    let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let (kind, rest) = content_type.split_once(';')?;
    let boundary = rest.split(';').find_map(|parameter| parameter.trim().strip_prefix("boundary="))?;
    let form = kind.trim().eq_ignore_ascii_case("multipart/form-data");
    form.then(|| format!("--{}", boundary.trim_matches('"')).into_bytes())
}

/// The same body, with the file's name where it is asked for. What is no form
/// stays as it is: `s3s` says what is wrong with it.
async fn fill_in(mut body: Body, delimiter: &[u8]) -> Body {
    let (mut head, mut failed) = (Vec::new(), None);
    while head.len() < MAX_HEAD {
        if let Some((at, name)) = file(&head, delimiter) {
            let filled = replace(&head[..at], FILENAME.as_bytes(), &name);
            head.splice(..at, filled);
            break;
        }
        match body.next().await {
            Some(Ok(bytes)) => head.extend_from_slice(&bytes),
            Some(Err(error)) => {
                failed = Some(Err(io::Error::other(error)));
                break;
            }
            None => break,
        }
    }
    let rest = body.map_err(io::Error::other);
    StreamingBlob::wrap(stream::iter([Ok(Bytes::from(head))].into_iter().chain(failed)).chain(rest)).into()
}

/// Where the file's part begins, and the file's name without its folders.
/// `None`: that has not come yet.
fn file(head: &[u8], delimiter: &[u8]) -> Option<(usize, Vec<u8>)> {
    let mut at = 0;
    loop {
        let begins = at + find(&head[at..], delimiter)?;
        let fields = begins + delimiter.len();
        let ends = fields + find(&head[fields..], b"\r\n\r\n")?;
        // Names of fields are ASCII; a file's name comes through as it is.
        let lines = &head[fields..ends];
        let lower = lines.to_ascii_lowercase();
        if find(&lower, b"; name=\"file\"").is_some() {
            const NAME: &[u8] = b"; filename=\"";
            let name = find(&lower, NAME).map(|at| &lines[at + NAME.len()..]).unwrap_or_default();
            let name = name.split(|byte| *byte == b'"').next().unwrap_or_default();
            return Some((begins, name.rsplit(|byte| b"/\\".contains(byte)).next().unwrap_or_default().to_vec()));
        }
        at = ends;
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

fn replace(text: &[u8], what: &[u8], with: &[u8]) -> Vec<u8> {
    let (mut replaced, mut rest) = (Vec::with_capacity(text.len()), text);
    while let Some(at) = find(rest, what) {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(with);
        rest = &rest[at + what.len()..];
    }
    replaced.extend_from_slice(rest);
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: &str = "--b\r\nContent-Disposition: form-data; name=\"key\"\r\n\r\nu/${filename}/${filename}\r\n\
                        --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"C:\\d\\my cat.png\"\r\n\r\n${filename}\r\n--b--\r\n";

    #[tokio::test]
    async fn the_name_is_filled_in_before_the_file_however_the_body_comes() {
        let expect = FORM.replacen(FILENAME, "my cat.png", 2);
        for piece in [1, 7, 1000] {
            let pieces: Vec<_> = FORM.as_bytes().chunks(piece).map(Bytes::copy_from_slice).collect();
            let body = StreamingBlob::wrap(stream::iter(pieces.into_iter().map(io::Result::Ok))).into();
            let filled: Vec<Bytes> = fill_in(body, b"--b").await.try_collect().await.unwrap();
            assert_eq!(String::from_utf8(filled.concat()).unwrap(), expect);
        }
        let other: Vec<Bytes> = fill_in(Body::from("no form".to_owned()), b"--b").await.try_collect().await.unwrap();
        assert_eq!(other.concat(), b"no form");
    }

    #[test]
    fn only_forms_have_a_delimiter() {
        let of = |value: &'static str| {
            delimiter(&[(CONTENT_TYPE, http::HeaderValue::from_static(value))].into_iter().collect())
        };
        assert_eq!(of("multipart/form-data; boundary=x").unwrap(), b"--x");
        assert_eq!(of("Multipart/Form-Data; charset=utf-8; boundary=\"x y\"").unwrap(), b"--x y");
        assert_eq!((of("text/plain; boundary=x"), of("multipart/form-data")), (None, None));
    }
}
