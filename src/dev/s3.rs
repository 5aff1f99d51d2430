//! The S3 of `dev`: `s3s` speaks the protocol and verifies signatures,
//! `s3s-fs` keeps the files, and the keys are those of [`MemoryIam`].
//!
//! What it can't do, S3 can: keys with empty segments or of more than 128
//! bytes (refused), versions, tags and storage classes (ignored). It finds out
//! about a wrong checksum only when it has stored the body, and then says so.

use std::future::Future;
use std::io;
use std::path::Path;

use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::ListObjectsV2Input;
use s3s::path::S3Path;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Request, S3Result, s3_error};
use tokio::net::TcpListener;

use super::iam::MemoryIam;

/// `s3s-fs` puts a key, Base64-encoded, into a file's name.
const MAX_KEY_BYTES: usize = 128;

struct Keys(MemoryIam);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        let key = self.0.active_key(access_key).ok_or_else(|| s3_error!(InvalidAccessKeyId))?;
        Ok(SecretKey::from(key.secret_access_key()))
    }
}

/// Refuses what `s3s-fs` would get wrong.
struct Rules;

#[async_trait::async_trait]
impl S3Access for Rules {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        if context.credentials().is_none() {
            return Err(s3_error!(AccessDenied, "signature is required"));
        }
        if let S3Path::Object { key, .. } = context.s3_path() {
            if key.len() > MAX_KEY_BYTES {
                return Err(s3_error!(KeyTooLongError, "the S3 of `fileaccess dev` holds keys of up to 128 bytes"));
            }
            // Files can't tell such keys apart: `a//b` and `a/b` would be one.
            if key.starts_with('/') || key.contains("//") {
                return Err(s3_error!(InvalidArgument, "the S3 of `fileaccess dev` holds no keys with empty segments"));
            }
        }
        Ok(())
    }

    async fn list_objects_v2(&self, request: &mut S3Request<ListObjectsV2Input>) -> S3Result<()> {
        // `s3s-fs` would say that it has encoded the keys, and does not.
        request.input.encoding_type = None;
        Ok(())
    }
}

/// An S3 over the folders of `root`, one a bucket, open to the active keys of
/// `iam`.
///
/// # Errors
/// A folder that can't be used.
pub fn service(root: &Path, iam: MemoryIam) -> io::Result<S3Service> {
    let files = s3s_fs::FileSystem::new(root).map_err(|e| io::Error::other(format!("{}: {e:?}", root.display())))?;
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(Keys(iam));
    builder.set_access(Rules);
    Ok(builder.build())
}

/// Serves HTTP/1.1 until `until`, and finishes what runs then.
pub async fn serve(listener: TcpListener, service: S3Service, until: impl Future<Output = ()>) {
    let graceful = GracefulShutdown::new();
    let mut until = std::pin::pin!(until);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut until => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service.clone());
                tokio::spawn(graceful.watch(connection));
            }
            Err(error) => tracing::warn!(%error, "connection to the embedded S3 not accepted"),
        }
    }
    graceful.shutdown().await;
}
