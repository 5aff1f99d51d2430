//! Bodies: one that comes is verified while it is stored.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Md5};
use s3s::dto;
use s3s::dto::{ChecksumAlgorithm, StreamingBlob};
use s3s::{S3Error, S3ErrorCode, S3Result, TrailingHeaders, s3_error};
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};

/// How much of a file is read at once.
const CHUNK: usize = 256 << 10;

/// The refusal that a [`Body`] ended with, which `s3s-fs` takes for a failure
/// of its own.
pub(super) fn refusal(error: S3Error) -> S3Error {
    match error.source().and_then(|source| source.downcast_ref::<S3Error>()) {
        Some(inner) => S3Error::with_message(inner.code().clone(), inner.message().unwrap_or_default().to_owned()),
        None => error,
    }
}

/// A body that ends with an error unless it is what was promised. `s3s-fs`
/// moves a file into place only after a good end.
pub(super) struct Body {
    bytes: StreamingBlob,
    pub(super) hasher: ChecksumHasher,
    pub(super) promised: dto::Checksum,
    /// If it is promised, in Base64, and what has come so far.
    md5: Option<(String, Md5)>,
    trailers: Option<TrailingHeaders>,
    pub(super) commit: Option<Commit>,
}

/// What happens between the last byte and the file's move into place.
pub(super) struct Commit {
    pub(super) lock: Arc<RwLock<()>>,
    /// Where there must be no file, if it is to be a new one.
    pub(super) absent: Option<PathBuf>,
    pub(super) held: Held,
}

/// The lock, from a body's good end until all of the object is there.
pub(super) type Held = Arc<Mutex<Option<OwnedRwLockWriteGuard<()>>>>;

impl Body {
    pub(super) fn new(
        bytes: Option<StreamingBlob>,
        promised: dto::Checksum,
        algorithm: Option<&ChecksumAlgorithm>,
        promised_md5: Option<String>,
        trailers: Option<TrailingHeaders>,
    ) -> S3Result<Self> {
        let bytes = bytes.ok_or_else(|| s3_error!(IncompleteBody))?;
        let is = |name| algorithm.is_some_and(|algorithm| algorithm.as_str() == name);
        let hasher = ChecksumHasher {
            crc32: (promised.checksum_crc32.is_some() || is(ChecksumAlgorithm::CRC32)).then(Default::default),
            crc32c: (promised.checksum_crc32c.is_some() || is(ChecksumAlgorithm::CRC32C)).then(Default::default),
            crc64nvme: (promised.checksum_crc64nvme.is_some() || is(ChecksumAlgorithm::CRC64NVME))
                .then(Default::default),
            sha1: (promised.checksum_sha1.is_some() || is(ChecksumAlgorithm::SHA1)).then(Default::default),
            sha256: (promised.checksum_sha256.is_some() || is(ChecksumAlgorithm::SHA256)).then(Default::default),
        };
        let md5 = promised_md5.map(|promised| (promised, Md5::new()));
        Ok(Self { bytes, hasher, promised, md5, trailers, commit: None })
    }

    pub(super) fn into_blob(self) -> StreamingBlob {
        StreamingBlob::wrap(stream::try_unfold(Some(self), |body| async {
            let Some(mut body) = body else { return Ok(None) };
            match body.bytes.next().await {
                Some(Ok(bytes)) => {
                    body.hasher.update(&bytes);
                    if let Some((_, md5)) = &mut body.md5 {
                        md5.update(&bytes);
                    }
                    Ok(Some((bytes, Some(body))))
                }
                // `s3s` verifies `x-amz-content-sha256` in there.
                Some(Err(e)) if e.to_string().contains("Sha256Mismatch") => {
                    Err(s3_error!(BadDigest, "the body is not what `x-amz-content-sha256` says"))
                }
                Some(Err(e)) => Err(S3Error::with_source(S3ErrorCode::IncompleteBody, e)),
                None => body.end().await.map(|()| None::<(Bytes, _)>),
            }
        }))
    }

    async fn end(self) -> S3Result<()> {
        let Self { hasher, promised, trailers, .. } = self;
        let trailer = |name: &str| {
            let value = |headers: &http::HeaderMap| headers.get(name)?.to_str().ok().map(str::to_owned);
            trailers.as_ref()?.read(value).flatten()
        };
        let sums = hasher.finalize();
        for (name, sum, promised) in [
            ("x-amz-checksum-crc32", sums.checksum_crc32, promised.checksum_crc32),
            ("x-amz-checksum-crc32c", sums.checksum_crc32c, promised.checksum_crc32c),
            ("x-amz-checksum-crc64nvme", sums.checksum_crc64nvme, promised.checksum_crc64nvme),
            ("x-amz-checksum-sha1", sums.checksum_sha1, promised.checksum_sha1),
            ("x-amz-checksum-sha256", sums.checksum_sha256, promised.checksum_sha256),
        ] {
            match (sum, promised.or_else(|| trailer(name))) {
                (Some(_), None) => {
                    return Err(s3_error!(InvalidRequest, "a checksum was announced, but no `{name}` came"));
                }
                (sum, promised) if sum != promised => {
                    return Err(s3_error!(BadDigest, "the body is not what `{name}` says"));
                }
                _ => {}
            }
        }
        if self.md5.is_some_and(|(promised, md5)| promised != BASE64_STANDARD.encode(md5.finalize())) {
            return Err(s3_error!(BadDigest, "the body is not what `content-md5` says"));
        }
        if let Some(commit) = self.commit {
            let guard = commit.lock.write_owned().await;
            if commit.absent.is_some_and(|path| path.exists()) {
                return Err(s3_error!(PreconditionFailed, "there is such an object already"));
            }
            *commit.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(guard);
        }
        Ok(())
    }
}

/// Refuses a body of unknown length, as S3 does.
pub(super) fn known_length(headers: &http::HeaderMap) -> S3Result<()> {
    if headers.contains_key("content-length") || headers.contains_key("x-amz-decoded-content-length") {
        return Ok(());
    }
    Err(s3_error!(MissingContentLength))
}

/// A body of what is in that range of a file.
pub(super) fn read(file: File, range: Range<u64>) -> StreamingBlob {
    let file = Arc::new(file);
    StreamingBlob::wrap(stream::try_unfold(range, move |Range { start, end }| {
        let file = Arc::clone(&file);
        async move {
            let len = usize::try_from(end - start).unwrap_or(CHUNK).min(CHUNK);
            if len == 0 {
                return Ok(None);
            }
            let read = tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; len];
                file.read_exact_at(&mut bytes, start).map(|()| Bytes::from(bytes))
            });
            let bytes = read.await.map_err(io::Error::other)??;
            let start = start + bytes.len() as u64;
            io::Result::Ok(Some((bytes, start..end)))
        }
    }))
}
