//! The S3 of `dev`: `s3s` speaks the protocol and verifies signatures,
//! `s3s-fs` keeps the files, the keys are those of [`MemoryIam`], and
//! `Store` stands between: it makes right what `s3s-fs` gets wrong, and
//! refuses aloud what neither can do.
//!
//! Any key of up to 1,024 bytes is held. A short one of lowercase letters,
//! digits, `.`, `-` and `_` is the name of its file, and such a file put into
//! the folder by hand is an object. For any other, the name is the readable
//! start of the key and a digest, since no file system tells `a//b` from `a/b`,
//! has a file `a` next to a file `a/b`, or, on some machines, `A` next to `a`.
//! Its key is among its metadata.
//!
//! What it can't do, S3 can, and the answer says so: versions, tags,
//! encryption, storage classes, locks, and parts with gaps in their numbers.
//! It makes no promise about a crash in the middle of an upload.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::checksum::ChecksumHasher;
use s3s::config::{S3Config, StaticConfigProvider};
use s3s::crypto::{Checksum as _, Md5, Sha256};
use s3s::dto;
#[allow(clippy::wildcard_imports, reason = "fifty names of one vocabulary")]
use s3s::dto::*;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, TrailingHeaders, s3_error};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};

use super::cors::Cors;
use super::http1;
use super::iam::MemoryIam;

/// Where an object's metadata has its key: no header has such a name.
const KEY: &str = "the key";
/// And an upload's, until it is an object, the checksum that its parts have:
/// algorithm and type.
const SUMS: &str = "the checksum";
/// With this, the names that `s3s-fs` makes of a file's name and a bucket's, in
/// Base64, stay below the 255 bytes that file systems take.
const MAX_NAME_BYTES: usize = 65;
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html>
const MIN_PART_BYTES: i64 = 5 << 20;
/// The longest life of a presigned URL, in seconds.
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html>
const MAX_EXPIRES: u64 = 604_800;
/// How far a signing time may be off, in seconds: as long as a form may live.
const MAX_SKEW: u32 = 604_800;
/// What a listing with `encoding-type=url` leaves as it is.
const LISTED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');

struct Keys(MemoryIam);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        let key = self.0.active_key(access_key).ok_or_else(|| s3_error!(InvalidAccessKeyId))?;
        Ok(SecretKey::from(key.secret_access_key()))
    }
}

/// What S3 refuses before it looks at the operation, and `s3s` does not.
struct Rules {
    root: PathBuf,
}

#[async_trait::async_trait]
impl S3Access for Rules {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        if context.credentials().is_none() {
            return Err(s3_error!(AccessDenied, "a signature is required"));
        }
        let query = |name: &str| {
            let mut pairs =
                context.uri().query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == name).map(|(_, value)| percent_decode_str(value).decode_utf8_lossy())
        };
        if query("X-Amz-Expires").and_then(|expires| expires.parse().ok()).is_some_and(|n: u64| n > MAX_EXPIRES) {
            return Err(s3_error!(AuthorizationQueryParametersError, "`X-Amz-Expires` must be at most {MAX_EXPIRES}"));
        }
        if let Some(signed) = query("X-Amz-SignedHeaders") {
            // Otherwise the holder of an upload URL could add metadata, tags or an ACL.
            let mut names = context.headers().keys().map(http::HeaderName::as_str);
            let unsigned = names.find(|name| {
                name.starts_with("x-amz-") && *name != "x-amz-content-sha256" && !signed.split(';').any(|s| s == *name)
            });
            if let Some(name) = unsigned {
                return Err(s3_error!(AccessDenied, "the header `{name}` was not signed"));
            }
        }
        match context.s3_path().get_bucket_name() {
            Some(bucket) if context.s3_op().name() != "CreateBucket" && !self.root.join(bucket).is_dir() => {
                Err(s3_error!(NoSuchBucket))
            }
            _ => Ok(()),
        }
    }
}

/// `s3s-fs`, made to tell the truth.
struct Store {
    files: FileSystem,
    /// As `files` has it.
    root: PathBuf,
    /// INVARIANT: an object's bytes and metadata change only while this is
    /// held for writing, and are opened while it is held for reading.
    lock: Arc<RwLock<()>>,
    /// What is known of the files of parts, so that no file is read again. Each
    /// is as good as the time of the last change and the length that come with
    /// it.
    known: Mutex<HashMap<PathBuf, (SystemTime, u64, Sums)>>,
}

/// The MD5 of a file in hexadecimal, which is the `ETag` of a part, and its
/// checksum.
#[derive(Clone, Debug, Default)]
struct Sums {
    md5: String,
    checksum: dto::Checksum,
}

/// The checksum of an upload.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kind {
    algorithm: String,
    composite: bool,
}

impl Kind {
    /// As S3 has it: CRC-64/NVME is of the full object unless otherwise said,
    /// SHAs can't be.
    fn parse(algorithm: Option<&str>, kind: Option<&str>) -> S3Result<Option<Self>> {
        let Some(algorithm) = algorithm else {
            let refused = s3_error!(InvalidRequest, "a checksum type needs a checksum algorithm");
            return if kind.is_some() { Err(refused) } else { Ok(None) };
        };
        let crc64 = algorithm == ChecksumAlgorithm::CRC64NVME;
        let composite = kind.map_or(!crc64, |kind| kind == ChecksumType::COMPOSITE);
        if (crc64 && composite) || (algorithm.starts_with("SHA") && !composite) {
            return Err(s3_error!(InvalidRequest, "{algorithm} has no such checksum type"));
        }
        Ok(Some(Self { algorithm: algorithm.to_owned(), composite }))
    }

    /// Whether this is what is verified there.
    fn is_in(&self, hasher: &ChecksumHasher) -> bool {
        match self.algorithm.as_str() {
            ChecksumAlgorithm::CRC32 => hasher.crc32.is_some(),
            ChecksumAlgorithm::CRC32C => hasher.crc32c.is_some(),
            ChecksumAlgorithm::CRC64NVME => hasher.crc64nvme.is_some(),
            ChecksumAlgorithm::SHA1 => hasher.sha1.is_some(),
            _ => hasher.sha256.is_some(),
        }
    }

    fn hasher(&self) -> ChecksumHasher {
        let is = |name| self.algorithm == name;
        ChecksumHasher {
            crc32: is(ChecksumAlgorithm::CRC32).then(Default::default),
            crc32c: is(ChecksumAlgorithm::CRC32C).then(Default::default),
            crc64nvme: is(ChecksumAlgorithm::CRC64NVME).then(Default::default),
            sha1: is(ChecksumAlgorithm::SHA1).then(Default::default),
            sha256: is(ChecksumAlgorithm::SHA256).then(Default::default),
        }
    }
}

/// The one checksum that is there.
fn only(sums: &dto::Checksum) -> Option<&String> {
    let crcs = [&sums.checksum_crc32, &sums.checksum_crc32c, &sums.checksum_crc64nvme];
    crcs.into_iter().chain([&sums.checksum_sha1, &sums.checksum_sha256]).find_map(Option::as_ref)
}

/// An S3 over the folders of `root`, one a bucket, open to the active keys of
/// `iam`.
///
/// # Errors
/// A folder that can't be used.
pub fn service(root: &Path, iam: MemoryIam) -> io::Result<S3Service> {
    let root = root.canonicalize()?;
    let files = FileSystem::new(&root).map_err(|e| io::Error::other(format!("{}: {e:?}", root.display())))?;
    let mut builder =
        S3ServiceBuilder::new(Store { files, root: root.clone(), lock: Arc::default(), known: Mutex::default() });
    builder.set_auth(Keys(iam));
    builder.set_access(Rules { root });
    // `s3s` refuses forms that were signed longer ago than this, S3 those whose
    // policy has expired.
    let mut config = S3Config::default();
    config.presigned_url_max_skew_time_secs = MAX_SKEW;
    builder.set_config(Arc::new(StaticConfigProvider::new(Arc::new(config))));
    Ok(builder.build())
}

/// Serves HTTP/1.1 until `until`, and finishes what runs then.
///
/// # Errors
/// `listener` is not on loopback.
pub async fn serve(listener: TcpListener, service: impl Into<Cors>, until: impl Future<Output = ()>) -> io::Result<()> {
    http1::serve(listener, service.into(), until).await
}

/// What the embedded S3 can't do.
fn cannot(what: &str) -> S3Error {
    s3_error!(NotImplemented, "the embedded S3 of `fileaccess dev` {what}")
}

/// Refuses a version: there is only the one, which S3 calls `null`.
fn no_version(version_id: Option<&str>) -> S3Result<()> {
    if version_id.is_some_and(|id| id != "null") { Err(cannot("keeps no versions")) } else { Ok(()) }
}

/// Refuses what a new object asks for and would not get.
macro_rules! no_extras {
    ($input:expr) => {{
        let input = &$input;
        if input.tagging.is_some() {
            return Err(cannot("keeps no tags"));
        }
        if input.server_side_encryption.is_some() || input.sse_customer_algorithm.is_some() {
            return Err(cannot("does not encrypt"));
        }
        if input.storage_class.as_ref().is_some_and(|class| class.as_str() != StorageClass::STANDARD) {
            return Err(cannot("has one storage class, `STANDARD`"));
        }
        if input.object_lock_mode.is_some() || input.object_lock_legal_hold_status.is_some() {
            return Err(cannot("locks no objects"));
        }
        if input.acl.is_some() || input.grant_read.is_some() || input.grant_full_control.is_some() {
            return Err(cannot("has no access control lists"));
        }
    }};
}

/// The checksums that came with the request.
macro_rules! promised {
    ($input:expr) => {
        dto::Checksum {
            checksum_crc32: $input.checksum_crc32.clone(),
            checksum_crc32c: $input.checksum_crc32c.clone(),
            checksum_crc64nvme: $input.checksum_crc64nvme.clone(),
            checksum_sha1: $input.checksum_sha1.clone(),
            checksum_sha256: $input.checksum_sha256.clone(),
            checksum_type: None,
        }
    };
}

/// The file name of a key: at most [`MAX_NAME_BYTES`].
/// INVARIANT: no two keys have the same, and there is no `/` in it.
fn file_name(key: &str) -> String {
    let made = |(_, end): (&str, &str)| end.len() == 32 && end.bytes().all(|b| b.is_ascii_hexdigit());
    let plain = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_');
    let own = key.len() <= MAX_NAME_BYTES && key.chars().all(plain) && !matches!(key, "." | "..");
    if own && !key.rsplit_once('.').is_some_and(made) {
        return key.to_owned();
    }
    let readable = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' };
    let start: String = key.chars().take(32).map(readable).collect();
    let digest = Sha256::checksum(key.as_bytes());
    digest[..16].iter().fold(start + ".", |name, byte| format!("{name}{byte:02x}"))
}

/// Replaces `key` by its file name and leaves it in `metadata`.
fn hide_key(key: &mut String, metadata: &mut Option<Metadata>) {
    let name = file_name(key);
    let key = std::mem::replace(key, name);
    metadata.get_or_insert_default().insert(KEY.to_owned(), key);
}

/// Takes the key out of `metadata` again.
fn take_key(metadata: &mut Option<Metadata>) -> Option<String> {
    let key = metadata.as_mut()?.remove(KEY);
    metadata.as_mut()?.remove(SUMS);
    metadata.take_if(|metadata| metadata.is_empty());
    key
}

/// A request of our own to `s3s-fs`.
fn ask<T>(input: T) -> S3Request<T> {
    S3Request {
        input,
        method: http::Method::GET,
        uri: http::Uri::default(),
        headers: http::HeaderMap::new(),
        extensions: http::Extensions::new(),
        credentials: None,
        region: None,
        service: None,
        trailing_headers: None,
    }
}

/// The refusal that a [`Body`] ended with, which `s3s-fs` takes for a failure
/// of its own.
fn refusal(error: S3Error) -> S3Error {
    match error.source().and_then(|source| source.downcast_ref::<S3Error>()) {
        Some(inner) => S3Error::with_message(inner.code().clone(), inner.message().unwrap_or_default().to_owned()),
        None => error,
    }
}

/// A body that ends with an error unless it is what was promised. `s3s-fs`
/// moves a file into place only after a good end.
struct Body {
    bytes: StreamingBlob,
    hasher: ChecksumHasher,
    md5: Md5,
    promised: dto::Checksum,
    promised_md5: Option<String>,
    trailers: Option<TrailingHeaders>,
    commit: Option<Commit>,
}

/// What happens between the last byte and the file's move into place.
struct Commit {
    lock: Arc<RwLock<()>>,
    /// Where there must be no file, if it is to be a new one.
    absent: Option<PathBuf>,
    held: Held,
}

/// The lock, from a body's good end until all of the object is there.
type Held = Arc<Mutex<Option<OwnedRwLockWriteGuard<()>>>>;

impl Body {
    fn new(
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
        Ok(Self { bytes, hasher, md5: Md5::new(), promised, promised_md5, trailers, commit: None })
    }

    fn into_blob(self) -> StreamingBlob {
        StreamingBlob::wrap(stream::try_unfold(Some(self), |body| async {
            let Some(mut body) = body else { return Ok(None) };
            match body.bytes.next().await {
                Some(Ok(bytes)) => {
                    body.hasher.update(&bytes);
                    body.md5.update(&bytes);
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
        if self.promised_md5.is_some_and(|promised| promised != BASE64_STANDARD.encode(self.md5.finalize())) {
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
fn known_length(headers: &http::HeaderMap) -> S3Result<()> {
    if headers.contains_key("content-length") || headers.contains_key("x-amz-decoded-content-length") {
        return Ok(());
    }
    Err(s3_error!(MissingContentLength))
}

/// Whether the object must be a new one.
fn create_only(if_none_match: Option<&ETagCondition>) -> S3Result<bool> {
    match if_none_match {
        None => Ok(false),
        Some(ETagCondition::Any) => Ok(true),
        Some(ETagCondition::ETag(_)) => Err(s3_error!(NotImplemented, "`if-none-match` must be `*`, here as in S3")),
    }
}

/// Refuses what `s3s-fs` ignores or looks at too early.
fn no_match(if_match: Option<&ETagCondition>) -> S3Result<()> {
    if if_match.is_some() { Err(cannot("knows no `if-match` when it writes")) } else { Ok(()) }
}

/// Looks at a download's conditions on the `ETag`. One on the date it was
/// changed may be ignored: the answer is the whole object then.
/// <https://www.rfc-editor.org/rfc/rfc9110#section-13.2.2>
fn conditions(
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
    etag: Option<&ETag>,
) -> S3Result<()> {
    let Some(etag) = etag else { return Ok(()) };
    if if_match.and_then(ETagCondition::as_etag).is_some_and(|wanted| !wanted.strong_cmp(etag)) {
        return Err(s3_error!(PreconditionFailed));
    }
    if if_none_match.is_some_and(|known| known.as_etag().is_none_or(|known| known.weak_cmp(etag))) {
        let mut error = s3_error!(NotModified);
        error.set_headers(etag.to_http_header().into_iter().map(|etag| (http::header::ETAG, etag)).collect());
        return Err(error);
    }
    Ok(())
}

/// The bucket of a copy's source, and its key, to be replaced by its file name.
fn source(source: &mut CopySource) -> S3Result<(String, &mut Box<str>)> {
    match source {
        CopySource::Bucket { bucket, key, version_id } => {
            no_version(version_id.as_deref())?;
            Ok((bucket.to_string(), key))
        }
        CopySource::AccessPoint { .. } | CopySource::Outpost { .. } => Err(cannot("has buckets only")),
    }
}

/// Shows all that is in a file.
fn read_all(path: &Path, mut show: impl FnMut(&[u8])) -> io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => show(&buffer[..n]),
        }
    }
}

fn sums_of(path: &Path, kind: Option<&Kind>) -> io::Result<Sums> {
    let (mut md5, mut hasher) = (Md5::new(), kind.map(Kind::hasher).unwrap_or_default());
    read_all(path, |bytes| {
        md5.update(bytes);
        hasher.update(bytes);
    })?;
    let md5 = md5.finalize().iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
    Ok(Sums { md5, checksum: hasher.finalize() })
}

/// The metadata that `s3s-fs` keeps of an upload that is open.
fn user_metadata(path: &Path) -> S3Result<Metadata> {
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(s3_error!(NoSuchUpload)),
        text => text.map_err(S3Error::internal_error)?,
    };
    let mut kept: serde_json::Value = serde_json::from_slice(&text).map_err(S3Error::internal_error)?;
    serde_json::from_value(kept["user_metadata"].take()).map_err(S3Error::internal_error)
}

fn remove_if_there(path: &Path) -> S3Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(S3Error::internal_error(e)),
        _ => Ok(()),
    }
}

impl Store {
    fn object(&self, bucket: &str, name: &str) -> PathBuf {
        self.root.join(bucket).join(name)
    }

    /// A file that `s3s-fs` keeps about an object: `.metadata.json` or
    /// `.internal.json`.
    fn sidecar(&self, bucket: &str, name: &str, kind: &str) -> PathBuf {
        let encode = |text| BASE64_URL_SAFE_NO_PAD.encode(text);
        self.root.join(format!(".bucket-{}.object-{}{kind}", encode(bucket), encode(name)))
    }

    /// The caller holds the lock.
    fn remove(&self, bucket: &str, key: &str) -> S3Result<()> {
        let name = file_name(key);
        remove_if_there(&self.object(bucket, &name))?;
        remove_if_there(&self.sidecar(bucket, &name, ".metadata.json"))?;
        remove_if_there(&self.sidecar(bucket, &name, ".internal.json"))
    }

    /// Refuses an upload id that is not of this object. `s3s-fs` would take
    /// it for any object, but only from the key that made it: a signer's
    /// could never send a part to an upload that the service opened.
    ///
    /// Says what checksum its parts have.
    fn upload(&self, bucket: &str, name: &str, id: &str) -> S3Result<Option<Kind>> {
        if !id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
            return Err(s3_error!(NoSuchUpload));
        }
        let kept = user_metadata(&self.sidecar(bucket, name, &format!(".upload-{id}.metadata.json")))?;
        let kind = kept.get(SUMS).and_then(|kind| kind.split_once(' '));
        Kind::parse(kind.map(|(algorithm, _)| algorithm), kind.map(|(_, kind)| kind))
    }

    /// What there is in the file of a part, read only if nobody knows.
    async fn sums(&self, path: PathBuf, kind: Option<&Kind>) -> S3Result<Sums> {
        let file = std::fs::metadata(&path).map_err(S3Error::internal_error)?;
        let state = (file.modified().map_err(S3Error::internal_error)?, file.len());
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&path).cloned();
        if let Some((changed, length, sums)) = known
            && (changed, length) == state
        {
            return Ok(sums);
        }
        let (read, kind) = (path.clone(), kind.cloned());
        let sums = tokio::task::spawn_blocking(move || sums_of(&read, kind.as_ref())).await;
        let sums = sums.map_err(S3Error::internal_error)?.map_err(S3Error::internal_error)?;
        self.know(path, state, sums.clone());
        Ok(sums)
    }

    fn know(&self, path: PathBuf, (changed, length): (SystemTime, u64), sums: Sums) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(path, (changed, length, sums));
    }

    /// Takes what is left of a part away.
    fn forget(&self, id: &str, number: i32) -> S3Result<()> {
        let path = self.part(id, number);
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
        remove_if_there(&path)
    }

    fn part(&self, id: &str, number: i32) -> PathBuf {
        self.root.join(format!(".upload_id-{id}.part-{number}"))
    }

    /// The parts of an upload, in order, with what `s3s-fs` does not keep of
    /// them.
    async fn parts(&self, bucket: &str, name: &str, id: &str) -> S3Result<BTreeMap<i32, Part>> {
        let kind = self.upload(bucket, name, id)?;
        let input = ListPartsInput::builder().bucket(bucket.into()).key(name.into()).upload_id(id.into()).build();
        let input = input.map_err(S3Error::internal_error)?;
        let mut parts = BTreeMap::new();
        for mut part in self.files.list_parts(ask(input)).await?.output.parts.unwrap_or_default() {
            let number = part.part_number.unwrap_or_default();
            let Sums { md5, checksum } = self.sums(self.part(id, number), kind.as_ref()).await?;
            part.e_tag = Some(ETag::Strong(md5));
            if kind.is_some() {
                part.checksum_crc32 = checksum.checksum_crc32;
                part.checksum_crc32c = checksum.checksum_crc32c;
                part.checksum_crc64nvme = checksum.checksum_crc64nvme;
                part.checksum_sha1 = checksum.checksum_sha1;
                part.checksum_sha256 = checksum.checksum_sha256;
            }
            parts.insert(number, part);
        }
        Ok(parts)
    }

    /// The checksum of the object that an upload becomes: a composite one is of
    /// the parts' checksums, and tells their number.
    async fn whole(&self, kind: &Kind, id: &str, parts: &BTreeMap<i32, Part>) -> S3Result<dto::Checksum> {
        let mut hasher = kind.hasher();
        let mut sums = if kind.composite {
            for part in parts.values() {
                let sum = only(&promised!(part)).and_then(|sum| BASE64_STANDARD.decode(sum).ok());
                hasher.update(&sum.ok_or_else(|| s3_error!(InternalError, "a part without its checksum"))?);
            }
            hasher.finalize()
        } else {
            let paths: Vec<_> = parts.keys().map(|number| self.part(id, *number)).collect();
            let read = tokio::task::spawn_blocking(move || {
                for path in paths {
                    read_all(&path, |bytes| hasher.update(bytes))?;
                }
                io::Result::Ok(hasher.finalize())
            });
            read.await.map_err(S3Error::internal_error)?.map_err(S3Error::internal_error)?
        };
        if kind.composite {
            let dto::Checksum {
                checksum_crc32,
                checksum_crc32c,
                checksum_crc64nvme,
                checksum_sha1,
                checksum_sha256,
                ..
            } = &mut sums;
            let all = [checksum_crc32, checksum_crc32c, checksum_crc64nvme, checksum_sha1, checksum_sha256];
            for sum in all.into_iter().flatten() {
                *sum = format!("{sum}-{}", parts.len());
            }
        }
        let name = if kind.composite { ChecksumType::COMPOSITE } else { ChecksumType::FULL_OBJECT };
        sums.checksum_type = Some(ChecksumType::from_static(name));
        Ok(sums)
    }

    /// Has `s3s-fs` know the checksum of an object that was made of parts.
    fn keep_sums(&self, bucket: &str, name: &str, sums: &dto::Checksum) -> S3Result<()> {
        let path = self.sidecar(bucket, name, ".internal.json");
        let text = std::fs::read(&path).map_err(S3Error::internal_error)?;
        let mut kept: serde_json::Value = serde_json::from_slice(&text).map_err(S3Error::internal_error)?;
        for (name, sum) in [
            ("checksum_crc32", &sums.checksum_crc32),
            ("checksum_crc32c", &sums.checksum_crc32c),
            ("checksum_crc64nvme", &sums.checksum_crc64nvme),
            ("checksum_sha1", &sums.checksum_sha1),
            ("checksum_sha256", &sums.checksum_sha256),
        ] {
            if let Some(sum) = sum {
                kept[name] = sum.as_str().into();
            }
        }
        std::fs::write(&path, kept.to_string()).map_err(S3Error::internal_error)
    }

    /// What `s3s-fs` knows about a file. The caller holds the lock.
    async fn facts(&self, bucket: &str, name: &str) -> S3Result<HeadObjectOutput> {
        let input = HeadObjectInput::builder().bucket(bucket.into()).key(name.into()).build();
        let input = input.map_err(S3Error::internal_error)?;
        Ok(self.files.head_object(ask(input)).await?.output)
    }

    /// All objects of a bucket under `prefix`, in order.
    async fn objects(&self, bucket: &str, prefix: &str) -> S3Result<Vec<(String, Object)>> {
        let _unchanged = self.lock.read().await;
        let mut objects = Vec::new();
        for entry in std::fs::read_dir(self.root.join(bucket)).map_err(S3Error::internal_error)? {
            let entry = entry.map_err(S3Error::internal_error)?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let own = file_name(&name) == name;
            if entry.path().is_dir() || !(own || self.sidecar(bucket, &name, ".metadata.json").exists()) {
                // Nothing of ours.
                continue;
            }
            let mut facts = self.facts(bucket, &name).await?;
            let key = take_key(&mut facts.metadata).or_else(|| own.then_some(name));
            let Some(key) = key.filter(|key| key.starts_with(prefix)) else { continue };
            let object = Object {
                e_tag: facts.e_tag,
                last_modified: facts.last_modified,
                size: facts.content_length,
                storage_class: Some(ObjectStorageClass::from_static(ObjectStorageClass::STANDARD)),
                ..Object::default()
            };
            objects.push((key, object));
        }
        objects.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(objects)
    }
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        self.files.create_bucket(req).await
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.files.head_bucket(req).await
    }

    async fn list_buckets(&self, req: S3Request<ListBucketsInput>) -> S3Result<S3Response<ListBucketsOutput>> {
        self.files.list_buckets(req).await
    }

    async fn put_object(&self, mut req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        known_length(&req.headers)?;
        no_extras!(req.input);
        let input = &mut req.input;
        no_match(input.if_match.as_ref())?;
        hide_key(&mut input.key, &mut input.metadata);
        input.content_type.get_or_insert_with(|| "binary/octet-stream".to_owned());
        let absent = create_only(input.if_none_match.take().as_ref())?.then(|| self.object(&input.bucket, &input.key));
        let mut body = Body::new(
            input.body.take(),
            promised!(input),
            input.checksum_algorithm.as_ref(),
            input.content_md5.take(),
            req.trailing_headers.clone(),
        )?;
        let held = Held::default();
        body.commit = Some(Commit { lock: Arc::clone(&self.lock), absent, held: Arc::clone(&held) });
        input.body = Some(body.into_blob());
        let put = self.files.put_object(req).await.map_err(refusal);
        drop(held);
        put
    }

    async fn get_object(&self, mut req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = &mut req.input;
        no_version(input.version_id.as_deref())?;
        if input.part_number.is_some() {
            return Err(cannot("keeps no parts of a finished object"));
        }
        if input.if_unmodified_since.is_some() {
            return Err(cannot("knows no `if-unmodified-since`"));
        }
        let (if_match, if_none_match) = (input.if_match.take(), input.if_none_match.take());
        input.key = file_name(&input.key);
        let _unchanged = self.lock.read().await;
        if let Some(Range::Suffix { length }) = &mut input.range {
            // `s3s-fs` would seek to before the start.
            let size = std::fs::metadata(self.object(&input.bucket, &input.key)).map_or(0, |file| file.len());
            *length = size.min(*length);
        }
        let mut response = self.files.get_object(req).await?;
        conditions(if_match.as_ref(), if_none_match.as_ref(), response.output.e_tag.as_ref())?;
        take_key(&mut response.output.metadata);
        Ok(response)
    }

    async fn head_object(&self, mut req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        no_version(req.input.version_id.as_deref())?;
        if req.input.if_unmodified_since.is_some() {
            return Err(cannot("knows no `if-unmodified-since`"));
        }
        let (if_match, if_none_match) = (req.input.if_match.take(), req.input.if_none_match.take());
        req.input.key = file_name(&req.input.key);
        let _unchanged = self.lock.read().await;
        let mut response = self.files.head_object(req).await?;
        conditions(if_match.as_ref(), if_none_match.as_ref(), response.output.e_tag.as_ref())?;
        take_key(&mut response.output.metadata);
        let output = &mut response.output;
        output.checksum_type = only(&promised!(output)).map(|sum| {
            let composite = sum.contains('-');
            ChecksumType::from_static(if composite { ChecksumType::COMPOSITE } else { ChecksumType::FULL_OBJECT })
        });
        Ok(response)
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = req.input;
        no_version(input.version_id.as_deref())?;
        no_match(input.if_match.as_ref())?;
        let _alone = self.lock.write().await;
        self.remove(&input.bucket, &input.key)?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let DeleteObjectsInput { bucket, delete, .. } = req.input;
        for object in &delete.objects {
            no_version(object.version_id.as_deref())?;
            if object.e_tag.is_some() {
                return Err(cannot("deletes without conditions"));
            }
        }
        let _alone = self.lock.write().await;
        let mut deleted = Vec::new();
        for object in delete.objects {
            self.remove(&bucket, &object.key)?;
            deleted.push(DeletedObject { key: Some(object.key), ..DeletedObject::default() });
        }
        let deleted = (!delete.quiet.unwrap_or_default()).then_some(deleted);
        Ok(S3Response::new(DeleteObjectsOutput { deleted, ..DeleteObjectsOutput::default() }))
    }

    async fn copy_object(&self, mut req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        no_extras!(req.input);
        let input = &mut req.input;
        let (bucket, name) = source(&mut input.copy_source)?;
        *name = file_name(name).into();
        let _alone = self.lock.write().await;
        let from = self.object(&bucket, name);
        let facts = self.facts(&bucket, name).await?;
        // `s3s-fs` copies all metadata or none, and the key is among it.
        if input.metadata_directive.as_ref().is_none_or(|directive| directive.as_str() == MetadataDirective::COPY) {
            input.metadata = facts.metadata;
            input.cache_control = facts.cache_control;
            input.content_disposition = facts.content_disposition;
            input.content_encoding = facts.content_encoding;
            input.content_language = facts.content_language;
            input.content_type = facts.content_type;
            input.expires = facts.expires;
            input.website_redirect_location = facts.website_redirect_location;
            input.metadata_directive = Some(MetadataDirective::from_static(MetadataDirective::REPLACE));
        }
        hide_key(&mut input.key, &mut input.metadata);
        let to = self.object(&input.bucket, &input.key);
        if to != from {
            // `s3s-fs` would write over the bytes of a download under way.
            remove_if_there(&to)?;
        }
        self.files.copy_object(req).await
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone().filter(|delimiter| !delimiter.is_empty());
        let limit = input.max_keys.unwrap_or(1000).clamp(0, 1000);
        // A token is what the page before ended with.
        let token = input.continuation_token.as_deref().unwrap_or_default();
        let start = if token.is_empty() { input.start_after.as_deref().unwrap_or_default() } else { "" };
        let (mut contents, mut prefixes, mut last, mut more) = (Vec::new(), Vec::<String>::new(), None, false);
        for (key, object) in self.objects(&input.bucket, &prefix).await? {
            let rest = &key[prefix.len()..];
            let common = delimiter.as_ref().and_then(|d| Some(&key[..prefix.len() + rest.find(d.as_str())? + d.len()]));
            let item = common.unwrap_or(&key);
            if key.as_str() <= start || item <= token || last.as_deref() == Some(item) {
                continue;
            }
            if i32::try_from(contents.len() + prefixes.len()).is_ok_and(|n| n >= limit) {
                more = limit > 0;
                break;
            }
            last = Some(item.to_owned());
            match common {
                Some(common) => prefixes.push(common.to_owned()),
                None => contents.push(Object { key: Some(key), ..object }),
            }
        }
        let url = input.encoding_type.as_ref().is_some_and(|encoding| encoding.as_str() == EncodingType::URL);
        let encode = |text: String| if url { utf8_percent_encode(&text, LISTED).to_string() } else { text };
        for object in &mut contents {
            object.key = object.key.take().map(encode);
        }
        let common_prefixes = prefixes.into_iter().map(|prefix| CommonPrefix { prefix: Some(encode(prefix)) });
        let common_prefixes: Vec<_> = common_prefixes.collect();
        let output = ListObjectsV2Output {
            key_count: i32::try_from(contents.len() + common_prefixes.len()).ok(),
            contents: Some(contents),
            common_prefixes: Some(common_prefixes),
            is_truncated: Some(more),
            next_continuation_token: last.filter(|_| more),
            max_keys: Some(limit),
            name: Some(input.bucket),
            prefix: Some(encode(prefix)),
            delimiter: delimiter.map(encode),
            start_after: input.start_after.map(encode),
            continuation_token: input.continuation_token,
            encoding_type: input.encoding_type,
            ..ListObjectsV2Output::default()
        };
        Ok(S3Response::new(output))
    }

    async fn create_multipart_upload(
        &self,
        mut req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        no_extras!(req.input);
        req.credentials = None;
        let input = &mut req.input;
        let key = input.key.clone();
        hide_key(&mut input.key, &mut input.metadata);
        input.content_type.get_or_insert_with(|| "binary/octet-stream".to_owned());
        let (algorithm, kind) = (input.checksum_algorithm.clone(), input.checksum_type.clone());
        let kind =
            Kind::parse(algorithm.as_ref().map(ChecksumAlgorithm::as_str), kind.as_ref().map(ChecksumType::as_str))?;
        let kind = kind.map(|Kind { algorithm, composite }| {
            let kind = if composite { ChecksumType::COMPOSITE } else { ChecksumType::FULL_OBJECT };
            input.metadata.get_or_insert_default().insert(SUMS.to_owned(), format!("{algorithm} {kind}"));
            ChecksumType::from_static(kind)
        });
        let mut response = self.files.create_multipart_upload(req).await?;
        response.output.key = Some(key);
        response.output.checksum_algorithm = algorithm;
        response.output.checksum_type = kind;
        Ok(response)
    }

    async fn upload_part(&self, mut req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        known_length(&req.headers)?;
        req.credentials = None;
        let input = &mut req.input;
        input.key = file_name(&input.key);
        let kind = self.upload(&input.bucket, &input.key, &input.upload_id)?;
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "`partNumber` must be 1 to 10000"));
        }
        let (bucket, name, id) = (input.bucket.clone(), input.key.clone(), input.upload_id.clone());
        let number = input.part_number;
        let body = Body::new(
            input.body.take(),
            promised!(input),
            input.checksum_algorithm.as_ref(),
            input.content_md5.take(),
            req.trailing_headers.clone(),
        )?;
        let promised = body.promised.clone();
        if let Some(kind) = kind.as_ref().filter(|kind| !kind.is_in(&body.hasher)) {
            return Err(s3_error!(InvalidRequest, "each part must come with its {} checksum", kind.algorithm));
        }
        input.body = Some(body.into_blob());
        let mut response = self.files.upload_part(req).await.map_err(refusal)?;
        if let Err(error) = self.upload(&bucket, &name, &id) {
            // The upload was given up or completed meanwhile.
            self.forget(&id, number)?;
            return Err(error);
        }
        let path = self.part(&id, number);
        if let Ok(file) = std::fs::metadata(&path)
            && let (Ok(changed), Some(etag)) = (file.modified(), &response.output.e_tag)
            && (kind.is_none() || only(&promised).is_some())
        {
            let sums = Sums { md5: etag.value().to_owned(), checksum: promised.clone() };
            self.know(path, (changed, file.len()), sums);
        }
        // Kept promises, by now.
        response.output.checksum_crc32 = promised.checksum_crc32;
        response.output.checksum_crc32c = promised.checksum_crc32c;
        response.output.checksum_crc64nvme = promised.checksum_crc64nvme;
        response.output.checksum_sha1 = promised.checksum_sha1;
        response.output.checksum_sha256 = promised.checksum_sha256;
        Ok(response)
    }

    async fn upload_part_copy(
        &self,
        mut req: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        req.credentials = None;
        let input = &mut req.input;
        input.key = file_name(&input.key);
        self.upload(&input.bucket, &input.key, &input.upload_id)?;
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "`partNumber` must be 1 to 10000"));
        }
        let (_, name) = source(&mut input.copy_source)?;
        *name = file_name(name).into();
        let _unchanged = self.lock.read().await;
        self.files.upload_part_copy(req).await
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        let input = req.input;
        let after = input.part_number_marker.as_ref().map_or(0, |marker| *marker);
        let limit = input.max_parts.unwrap_or(1000).clamp(0, 1000);
        let parts = self.parts(&input.bucket, &file_name(&input.key), &input.upload_id).await?;
        let mut parts: Vec<_> = parts.into_values().filter(|part| part.part_number > Some(after)).collect();
        let page = usize::try_from(limit).unwrap_or_default();
        let more = parts.len() > page;
        parts.truncate(page);
        let output = ListPartsOutput {
            next_part_number_marker: parts.last().filter(|_| more).and_then(|part| part.part_number),
            is_truncated: Some(more),
            parts: Some(parts),
            max_parts: Some(limit),
            part_number_marker: input.part_number_marker,
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            storage_class: Some(StorageClass::from_static(StorageClass::STANDARD)),
            ..ListPartsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn complete_multipart_upload(
        &self,
        mut req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        req.credentials = None;
        let input = &mut req.input;
        let promised = promised!(input);
        no_match(input.if_match.as_ref())?;
        let new = create_only(input.if_none_match.as_ref())?;
        let key = std::mem::take(&mut input.key);
        input.key = file_name(&key);
        let (bucket, name, id) = (input.bucket.clone(), input.key.clone(), input.upload_id.clone());
        let _alone = self.lock.write().await;
        let kind = self.upload(&bucket, &name, &id)?;
        let there = self.parts(&bucket, &name, &id).await?;
        // `s3s-fs` gives up the upload first and looks at the parts then.
        let asked: &[CompletedPart] =
            input.multipart_upload.as_ref().and_then(|upload| upload.parts.as_deref()).unwrap_or_default();
        let numbers: Vec<_> = asked.iter().map(|part| part.part_number.unwrap_or_default()).collect();
        if numbers.is_empty() {
            return Err(s3_error!(MalformedXML, "there must be at least one part"));
        }
        if !numbers.is_sorted_by(|a, b| a < b) {
            return Err(s3_error!(InvalidPartOrder));
        }
        for (n, part) in asked.iter().enumerate() {
            let found = there.get(&numbers[n]).filter(|found| part.e_tag.is_some() && found.e_tag == part.e_tag);
            let found =
                found.ok_or_else(|| s3_error!(InvalidPart, "there is no part {} with this ETag", numbers[n]))?;
            if n + 1 < asked.len() && found.size < Some(MIN_PART_BYTES) {
                return Err(s3_error!(EntityTooSmall));
            }
            let (told, has) = (promised!(part), promised!(found));
            match (only(&told), &kind) {
                (Some(_), _) if told != has => {
                    return Err(s3_error!(InvalidPart, "there is no part {} with this checksum", numbers[n]));
                }
                (None, Some(kind)) if kind.composite => {
                    return Err(s3_error!(InvalidRequest, "the checksum of part {} is missing", numbers[n]));
                }
                _ => {}
            }
        }
        let size: i64 = numbers.iter().filter_map(|number| there.get(number)?.size).sum();
        if input.mpu_object_size.is_some_and(|announced| announced != size) {
            return Err(s3_error!(InvalidRequest, "the parts have {size} bytes together"));
        }
        if numbers.iter().zip(1..).any(|(number, n)| *number != n) {
            return Err(cannot("completes only parts numbered from 1 without a gap"));
        }
        if new && self.object(&bucket, &name).exists() {
            return Err(s3_error!(PreconditionFailed, "there is such an object already"));
        }
        let sums = match &kind {
            Some(kind) => self.whole(kind, &id, &there).await?,
            None => dto::Checksum::default(),
        };
        if only(&promised).is_some() && promised!(sums) != promised {
            return Err(s3_error!(BadDigest, "the object does not have the checksum given"));
        }
        // `s3s-fs` would keep the checksum of the object that was there.
        remove_if_there(&self.sidecar(&bucket, &name, ".internal.json"))?;
        let mut response = self.files.complete_multipart_upload(req).await?;
        if let Some(output) = response.output.future.take() {
            response.output = output.await?;
        }
        response.output.key = Some(key);
        if kind.is_some() {
            self.keep_sums(&bucket, &name, &sums)?;
            let output = &mut response.output;
            output.checksum_crc32 = sums.checksum_crc32;
            output.checksum_crc32c = sums.checksum_crc32c;
            output.checksum_crc64nvme = sums.checksum_crc64nvme;
            output.checksum_sha1 = sums.checksum_sha1;
            output.checksum_sha256 = sums.checksum_sha256;
            output.checksum_type = sums.checksum_type;
        }
        for number in there.keys() {
            // Those that were not asked for; the others are gone.
            self.forget(&id, *number)?;
        }
        Ok(response)
    }

    async fn abort_multipart_upload(
        &self,
        mut req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        req.credentials = None;
        req.input.key = file_name(&req.input.key);
        let (bucket, name, id) = (req.input.bucket.clone(), req.input.key.clone(), req.input.upload_id.clone());
        let there = self.parts(&bucket, &name, &id).await?;
        let aborted = self.files.abort_multipart_upload(req).await?;
        for number in there.keys() {
            self.forget(&id, *number)?;
        }
        Ok(aborted)
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let ListMultipartUploadsInput { bucket, prefix, delimiter, max_uploads, key_marker, encoding_type, .. } =
            req.input;
        if delimiter.is_some() || max_uploads.is_some() || key_marker.is_some() {
            return Err(cannot("lists uploads in progress all at once"));
        }
        let of_bucket = format!(".bucket-{}.object-", BASE64_URL_SAFE_NO_PAD.encode(&bucket));
        let mut uploads = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(S3Error::internal_error)? {
            let entry = entry.map_err(S3Error::internal_error)?;
            let Some(file) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let id = file.strip_prefix(&of_bucket).and_then(|file| file.split_once(".upload-"));
            let Some(id) = id.and_then(|(_, file)| file.strip_suffix(".metadata.json")) else { continue };
            // It may have ended since.
            let Ok(mut kept) = user_metadata(&entry.path()) else { continue };
            let Some(key) = kept.remove(KEY).filter(|key| key.starts_with(prefix.as_deref().unwrap_or_default()))
            else {
                continue;
            };
            let initiated = entry.metadata().and_then(|file| file.modified()).map_err(S3Error::internal_error)?;
            uploads.push(MultipartUpload {
                key: Some(key),
                upload_id: Some(id.to_owned()),
                initiated: Some(initiated.into()),
                storage_class: Some(StorageClass::from_static(StorageClass::STANDARD)),
                ..MultipartUpload::default()
            });
        }
        uploads.sort_by(|one, two| (&one.key, &one.upload_id).cmp(&(&two.key, &two.upload_id)));
        let url = encoding_type.as_ref().is_some_and(|encoding| encoding.as_str() == EncodingType::URL);
        for upload in uploads.iter_mut().filter(|_| url) {
            upload.key = upload.key.take().map(|key| utf8_percent_encode(&key, LISTED).to_string());
        }
        let output = ListMultipartUploadsOutput {
            uploads: Some(uploads),
            is_truncated: Some(false),
            bucket: Some(bucket),
            prefix,
            encoding_type,
            ..ListMultipartUploadsOutput::default()
        };
        Ok(S3Response::new(output))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::{Duration, SystemTime};

    use aws_credential_types::Credentials;
    use aws_sdk_s3::config::{BehaviorVersion, Region, RequestChecksumCalculation};
    use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
    use reqwest::Method;

    use super::*;
    use crate::issuer::Status;

    /// An embedded S3 with one bucket, and a key for it.
    struct Stage {
        root: tempfile::TempDir,
        endpoint: String,
        iam: MemoryIam,
        key: Credentials,
        s3: aws_sdk_s3::Client,
        http: reqwest::Client,
    }

    struct Answer {
        status: u16,
        code: String,
        headers: http::HeaderMap,
        body: Vec<u8>,
    }

    impl Answer {
        fn is(&self) -> (u16, &str) {
            (self.status, &self.code)
        }

        fn header(&self, name: &str) -> &str {
            self.headers.get(name).map_or("", |value| value.to_str().unwrap())
        }
    }

    impl Stage {
        async fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            std::fs::create_dir(root.path().join("bucket")).unwrap();
            let iam = MemoryIam::default();
            iam.create_user("user").unwrap();
            let key = iam.create_access_key("user", SystemTime::now()).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            tokio::spawn(serve(listener, service(root.path(), iam.clone()).unwrap(), std::future::pending()));
            let s3 = client(&endpoint, key.clone());
            Self { root, endpoint, iam, key, s3, http: crate::rotation::probe::Probe::http_client() }
        }

        fn put(&self, key: &str) -> aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder {
            self.s3.put_object().bucket("bucket").key(key)
        }

        fn get(&self, key: &str) -> aws_sdk_s3::operation::get_object::builders::GetObjectFluentBuilder {
            self.s3.get_object().bucket("bucket").key(key)
        }

        async fn send(&self, signed: &PresignedRequest, body: &str) -> Answer {
            let headers: Vec<_> = signed.headers().collect();
            self.raw(signed.method(), signed.uri(), &headers, body).await
        }

        async fn raw(&self, method: &str, url: &str, headers: &[(&str, &str)], body: &str) -> Answer {
            let mut request = self.http.request(method.parse().unwrap(), url);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if method == Method::PUT {
                request = request.body(body.to_owned());
            }
            let response = request.send().await.unwrap();
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            let body = response.bytes().await.unwrap().to_vec();
            let text = String::from_utf8_lossy(&body);
            let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
            Answer { status, code: code.map_or("", |(code, _)| code).to_owned(), headers, body }
        }

        async fn store(&self, key: &str, body: &str) {
            let answer = self.send(&self.put(key).presigned(minute()).await.unwrap(), body).await;
            assert_eq!(answer.is(), (200, ""), "{key}: {}", String::from_utf8_lossy(&answer.body));
        }

        async fn bytes(&self, key: &str) -> String {
            let answer = self.send(&self.get(key).presigned(minute()).await.unwrap(), "").await;
            assert_eq!(answer.status, 200, "{key}: {}", answer.code);
            String::from_utf8(answer.body).unwrap()
        }
    }

    fn client(endpoint: &str, key: Credentials) -> aws_sdk_s3::Client {
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .endpoint_url(endpoint)
            .force_path_style(true)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .credentials_provider(key)
            .http_client(crate::store::http_client());
        aws_sdk_s3::Client::from_conf(config.build())
    }

    fn minute() -> PresigningConfig {
        PresigningConfig::expires_in(Duration::from_mins(1)).unwrap()
    }

    fn sha256(body: &str) -> String {
        BASE64_STANDARD.encode(Sha256::checksum(body.as_bytes()))
    }

    #[tokio::test]
    async fn a_dead_key_kills_the_urls_it_signed() {
        let stage = Stage::new().await;
        stage.store("k", "v").await;
        let url = stage.get("k").presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&url, "").await.status, 200);
        let id = stage.key.access_key_id();
        stage.iam.set_status("user", id, Status::Inactive).unwrap();
        assert_eq!(stage.send(&url, "").await.is(), (403, "InvalidAccessKeyId"));
        stage.iam.set_status("user", id, Status::Active).unwrap();
        assert_eq!(stage.send(&url, "").await.status, 200);
        stage.iam.delete_access_key("user", id).unwrap();
        assert_eq!(stage.send(&url, "").await.is(), (403, "InvalidAccessKeyId"));
        let stranger = Credentials::new("AKIAAAAAAAAAAAAAAAAA", "secret", None, None, "test");
        let url = client(&stage.endpoint, stranger).get_object().bucket("bucket").key("k").presigned(minute());
        assert_eq!(stage.send(&url.await.unwrap(), "").await.is(), (403, "InvalidAccessKeyId"));
    }

    #[tokio::test]
    async fn what_was_not_signed_is_refused() {
        let stage = Stage::new().await;
        stage.store("k", "v").await;
        let get = stage.get("k").presigned(minute()).await.unwrap();
        let denied = (403, "SignatureDoesNotMatch");
        assert_eq!(stage.raw("GET", &get.uri().replace("/k?", "/l?"), &[], "").await.is(), denied);
        assert_eq!(stage.raw("GET", &format!("{}&x-more=1", get.uri()), &[], "").await.is(), denied);
        assert_eq!(stage.raw("PUT", get.uri(), &[], "poison").await.is(), denied);
        assert_eq!(stage.raw("DELETE", get.uri(), &[], "").await.is(), denied);
        let (bare, _) = get.uri().split_once('?').unwrap();
        assert_eq!(stage.raw("GET", bare, &[], "").await.is(), (403, "AccessDenied"));

        let brief = PresigningConfig::expires_in(Duration::from_secs(1)).unwrap();
        let brief = stage.get("k").presigned(brief).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2100)).await;
        assert_eq!(stage.send(&brief, "").await.is(), (403, "AccessDenied"));

        let put = stage.put("new").content_type("text/plain").content_length(4).metadata("a", "b");
        let put = put.if_none_match("*").presigned(minute()).await.unwrap();
        let all: Vec<_> = put.headers().collect();
        for name in ["content-type", "content-length", "x-amz-meta-a", "if-none-match"] {
            let but: Vec<_> = all.iter().copied().filter(|(n, _)| *n != name).collect();
            assert_eq!(but.len() + 1, all.len());
            let body = if name == "content-length" { "other" } else { "1234" };
            assert_eq!(stage.raw("PUT", put.uri(), &but, body).await.is(), denied, "{name}");
        }
        let with = |more| all.iter().copied().chain([more]).collect::<Vec<_>>();
        for more in [("x-amz-tagging", "a=b"), ("x-amz-meta-more", "1"), ("x-amz-acl", "public-read")] {
            assert_eq!(stage.raw("PUT", put.uri(), &with(more), "1234").await.is(), (403, "AccessDenied"));
        }
        assert_eq!(stage.send(&put, "1234").await.status, 200);
        assert_eq!(stage.send(&put, "5678").await.is(), (412, "PreconditionFailed"));
        assert_eq!(stage.bytes("new").await, "1234");
    }

    #[tokio::test]
    async fn a_wrong_body_leaves_what_was_there() {
        let stage = Stage::new().await;
        stage.store("k", "old").await;
        let etag = stage.s3.head_object().bucket("bucket").key("k").send().await.unwrap().e_tag;
        let signed = [
            stage.put("k").checksum_sha256(sha256("new")),
            stage.put("k").checksum_sha1("AAAAAAAAAAAAAAAAAAAAAAAAAAA="),
            stage.put("k").checksum_crc32("AAAAAA=="),
            stage.put("k").checksum_crc32_c("AAAAAA=="),
            stage.put("k").checksum_crc64_nvme("AAAAAAAAAAA="),
            stage.put("k").content_md5("AAAAAAAAAAAAAAAAAAAAAA=="),
        ];
        for put in signed {
            let put = put.presigned(minute()).await.unwrap();
            assert_eq!(stage.send(&put, "bad").await.is(), (400, "BadDigest"));
        }
        let put = stage.put("k").presigned(minute()).await.unwrap();
        let zero = [("x-amz-content-sha256", &*"0".repeat(64))];
        assert_eq!(stage.raw("PUT", put.uri(), &zero, "bad").await.is(), (400, "BadDigest"));
        assert_eq!(stage.bytes("k").await, "old");
        let head = stage.s3.head_object().bucket("bucket").key("k").send().await.unwrap();
        assert_eq!((head.e_tag, head.checksum_sha256), (etag, None));
        // And nothing is left of them.
        let left = std::fs::read_dir(stage.root.path()).unwrap().map(|file| file.unwrap().file_name());
        assert!(!left.into_iter().any(|name| name.to_str().unwrap().starts_with(".tmp")));

        let put = stage.put("k").checksum_sha256(sha256("new")).presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&put, "new").await.status, 200);
        assert_eq!(stage.bytes("k").await, "new");
    }

    #[tokio::test]
    async fn one_of_many_creates() {
        let stage = Stage::new().await;
        let bodies: Vec<_> = (0..16).map(|n| n.to_string()).collect();
        for round in 0..20 {
            let key = format!("once/{round}");
            let put = stage.put(&key).if_none_match("*").presigned(minute()).await.unwrap();
            let answers = futures_util::future::join_all(bodies.iter().map(|body| stage.send(&put, body))).await;
            assert!(answers.iter().all(|answer| matches!(answer.is(), (200, "") | (412, "PreconditionFailed"))));
            let made: Vec<_> = answers.iter().zip(&bodies).filter(|(answer, _)| answer.status == 200).collect();
            assert_eq!(made.len(), 1);
            assert_eq!(&stage.bytes(&key).await, made[0].1);
        }
    }

    #[tokio::test]
    async fn any_key_is_held_and_listed() {
        let stage = Stage::new().await;
        // One has the name of another's file.
        let (long, wide, like) = ("k".repeat(1024), "é".repeat(512), file_name("//"));
        let mut keys = [
            "a",
            "a/b",
            "a//b",
            "a/",
            "/a",
            "//",
            "/",
            "a b",
            "a+b",
            "a%2Fb",
            "%",
            "ünïcödé/Ω",
            "🦀",
            "back\\slash",
            "...",
            ".a/..b",
            "que?ry#x&y=z;",
            "quote\"'<>",
            "A",
            "plain.txt",
            &like,
            &long,
            &wide,
        ];
        for key in keys {
            stage.store(key, &format!("of {key}")).await;
        }
        keys.sort_unstable();
        for key in keys {
            assert_eq!(stage.bytes(key).await, format!("of {key}"));
        }
        let folder = stage.root.path().join("bucket");
        assert_eq!(std::fs::read_to_string(folder.join("plain.txt")).unwrap(), "of plain.txt");
        std::fs::create_dir(folder.join("folder")).unwrap();
        std::fs::write(folder.join("By Hand"), "not an object").unwrap();
        let list = stage.s3.list_objects_v2().bucket("bucket").send().await.unwrap();
        let listed: Vec<_> = list.contents().iter().map(|object| object.key().unwrap()).collect();
        assert_eq!(listed, keys);
        let head = stage.s3.head_object().bucket("bucket").key("a//b").send().await.unwrap();
        assert_eq!(head.metadata().map(HashMap::len).unwrap_or_default(), 0);
        assert_eq!(head.content_type(), Some("binary/octet-stream"));
        let same = list.contents().iter().find(|object| object.key() == Some("a//b")).unwrap();
        assert_eq!((same.e_tag(), same.size()), (head.e_tag(), Some(7)));

        let page = stage.s3.list_objects_v2().bucket("bucket").prefix("a").delimiter("/").max_keys(2);
        let (mut items, mut token) = (Vec::new(), None);
        loop {
            let page = page.clone().set_continuation_token(token).send().await.unwrap();
            items.extend(page.contents().iter().map(|object| object.key().unwrap().to_owned()));
            items.extend(page.common_prefixes().iter().map(|prefix| prefix.prefix().unwrap().to_owned()));
            token = page.next_continuation_token;
            if token.is_none() {
                break;
            }
        }
        assert_eq!(items, ["a", "a b", "a%2Fb", "a+b", "a/"]);

        let url = stage.s3.list_objects_v2().bucket("bucket").prefix("a b").encoding_type("url".into());
        let url = url.send().await.unwrap();
        assert_eq!((url.contents()[0].key(), url.prefix()), (Some("a%20b"), Some("a%20b")));

        std::fs::write(folder.join("by-hand.txt"), "an object").unwrap();
        assert_eq!(stage.bytes("by-hand.txt").await, "an object");
        let list = stage.s3.list_objects_v2().bucket("bucket").prefix("by-").send().await.unwrap();
        assert_eq!(list.contents()[0].key(), Some("by-hand.txt"));

        let delete = stage.s3.delete_object().bucket("bucket").key("a//b").presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&delete, "").await.status, 204);
        assert_eq!(stage.send(&delete, "").await.status, 204);
        let gone = stage.get("a//b").presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&gone, "").await.is(), (404, "NoSuchKey"));
        assert_eq!(stage.bytes("a/b").await, "of a/b");
    }

    #[tokio::test]
    async fn downloads_obey_overrides_and_ranges() {
        let stage = Stage::new().await;
        let put = stage.put("k").content_type("text/plain").metadata("owner", "ann");
        assert_eq!(stage.send(&put.presigned(minute()).await.unwrap(), "0123456789").await.status, 200);
        let get = stage.get("k").response_content_type("a/b").response_cache_control("no-store");
        let get = get.response_content_disposition("attachment; filename*=UTF-8''%C3%BC.txt");
        // As the signer does: a query parameter that S3 does not know.
        let get = get.customize().mutate_request(|request| {
            let uri = format!("{}&x-issue-id=01J0000000000000000000TEST", request.uri());
            request.set_uri(uri).unwrap();
        });
        let get = get.presigned(minute()).await.unwrap();
        assert!(get.uri().contains("x-issue-id=01J") && get.uri().contains("x-id=GetObject"));
        let answer = stage.send(&get, "").await;
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"0123456789"[..]));
        assert_eq!(answer.header("content-type"), "a/b");
        assert_eq!(answer.header("cache-control"), "no-store");
        assert_eq!(answer.header("x-amz-meta-owner"), "ann");
        assert_eq!(answer.header("content-disposition"), "attachment; filename*=UTF-8''%C3%BC.txt");
        let tampered = get.uri().replace("01J", "01K");
        assert_eq!(stage.raw("GET", &tampered, &[], "").await.status, 403);

        let get = stage.get("k").presigned(minute()).await.unwrap();
        for (range, status, body) in [
            ("bytes=2-4", 206, "234"),
            ("bytes=7-", 206, "789"),
            ("bytes=-3", 206, "789"),
            ("bytes=-99", 206, "0123456789"),
            ("bytes=5-99", 206, "56789"),
        ] {
            let answer = stage.raw("GET", get.uri(), &[("range", range)], "").await;
            assert_eq!((answer.status, answer.body.as_slice()), (status, body.as_bytes()), "{range}");
        }
        let etag = stage.raw("GET", get.uri(), &[], "").await.header("etag").to_owned();
        for (name, value, status) in [
            ("if-none-match", etag.as_str(), 304),
            ("if-none-match", "\"other\"", 200),
            ("if-match", &etag, 200),
            ("if-match", "\"other\"", 412),
        ] {
            let answer = stage.raw("GET", get.uri(), &[(name, value)], "").await;
            assert_eq!(answer.status, status, "{name}: {value}");
            assert!(status == 412 || answer.header("etag") == etag);
        }
        assert_eq!(stage.raw("GET", get.uri(), &[("range", "bytes=10-")], "").await.is(), (416, "InvalidRange"));
    }

    #[tokio::test]
    async fn what_it_cannot_do_it_refuses() {
        let stage = Stage::new().await;
        stage.store("k", "v").await;
        let refused = (501, "NotImplemented");
        for put in [
            stage.put("k").tagging("a=b"),
            stage.put("k").server_side_encryption("AES256".into()),
            stage.put("k").storage_class("STANDARD_IA".into()),
            stage.put("k").if_match("\"0\""),
        ] {
            assert_eq!(stage.send(&put.presigned(minute()).await.unwrap(), "v").await.is(), refused);
        }
        let get = stage.get("k").version_id("other").presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&get, "").await.is(), refused);
        let elsewhere = stage.s3.put_object().bucket("nowhere").key("k").presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&elsewhere, "v").await.is(), (404, "NoSuchBucket"));
        assert!(!stage.root.path().join("nowhere").exists());
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let service = service(stage.root.path(), MemoryIam::default()).unwrap();
        assert!(serve(listener, service, std::future::pending()).await.is_err());
    }

    #[tokio::test]
    async fn copies_keep_what_belongs_to_an_object() {
        let stage = Stage::new().await;
        let sum = sha256("v");
        let put = stage.put("a//b").content_type("text/plain").metadata("owner", "ann").checksum_sha256(&sum);
        assert_eq!(stage.send(&put.presigned(minute()).await.unwrap(), "v").await.status, 200);
        stage.store("c", "old").await;
        stage.s3.copy_object().bucket("bucket").key("c").copy_source("bucket/a//b").send().await.unwrap();
        assert_eq!(stage.bytes("c").await, "v");
        let head = stage.s3.head_object().bucket("bucket").key("c").checksum_mode("ENABLED".into());
        let head = head.send().await.unwrap();
        assert_eq!((head.content_type(), head.checksum_sha256()), (Some("text/plain"), Some(sum.as_str())));
        assert_eq!(head.metadata().unwrap()["owner"], "ann");
        assert_eq!(head.metadata().unwrap().len(), 1);
        let list = stage.s3.list_objects_v2().bucket("bucket").send().await.unwrap();
        let keys: Vec<_> = list.contents().iter().map(|object| object.key().unwrap()).collect();
        assert_eq!(keys, ["a//b", "c"]);
    }

    #[tokio::test]
    async fn parts_are_verified_and_any_key_may_send_them() {
        use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
        let stage = Stage::new().await;
        // What is replaced has a checksum that must not outlive it.
        let put = stage.put("a//big").checksum_sha256(sha256("old")).presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&put, "old").await.status, 200);
        let started = stage.s3.create_multipart_upload().bucket("bucket").key("a//big").metadata("owner", "ann");
        let started = started.send().await.unwrap();
        assert_eq!(started.key(), Some("a//big"));
        let id = started.upload_id().unwrap();

        stage.iam.create_user("signer").unwrap();
        let signer = stage.iam.create_access_key("signer", SystemTime::now()).unwrap();
        let signer = client(&stage.endpoint, signer);
        let part = |n, key: &str| signer.upload_part().bucket("bucket").key(key).upload_id(id).part_number(n);
        let bodies = ["1".repeat(5 << 20), "2".to_owned()];
        let mut parts = Vec::new();
        for (n, body) in (1..).zip(&bodies) {
            let good = part(n, "a//big").checksum_sha256(sha256(body)).presigned(minute()).await.unwrap();
            assert_eq!(stage.send(&good, "bad").await.is(), (400, "BadDigest"));
            let answer = stage.send(&good, body).await;
            assert_eq!(answer.status, 200);
            parts.push(CompletedPart::builder().part_number(n).e_tag(answer.header("etag")).build());
        }
        let other = part(1, "other").presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&other, "x").await.is(), (404, "NoSuchUpload"));
        assert_eq!(stage.send(&part(7, "a//big").presigned(minute()).await.unwrap(), "extra").await.status, 200);

        let list = stage.s3.list_parts().bucket("bucket").key("a//big").upload_id(id).max_parts(2);
        let list = list.send().await.unwrap();
        let etags: Vec<_> = list.parts().iter().map(|part| (part.part_number(), part.e_tag())).collect();
        assert_eq!(etags, [(Some(1), parts[0].e_tag()), (Some(2), parts[1].e_tag())]);
        assert_eq!((list.is_truncated(), list.next_part_number_marker()), (Some(true), Some("2")));

        let complete = |parts: &[CompletedPart]| {
            let upload = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
            let complete = stage.s3.complete_multipart_upload().bucket("bucket").key("a//big").upload_id(id);
            complete.multipart_upload(upload)
        };
        let wrong = CompletedPart::builder().part_number(2).e_tag("\"0\"").build();
        let swapped = [parts[1].clone(), parts[0].clone()];
        for (parts, code) in [
            (&[parts[0].clone(), wrong][..], "InvalidPart"),
            (&swapped[..], "InvalidPartOrder"),
            (&parts[1..], "NotImplemented"),
        ] {
            let error = complete(parts).send().await.unwrap_err().into_service_error();
            assert_eq!(error.meta().code(), Some(code));
        }
        let error = complete(&parts).if_none_match("*").send().await.unwrap_err().into_service_error();
        assert_eq!(error.meta().code(), Some("PreconditionFailed"));
        assert_eq!(stage.bytes("a//big").await, "old");

        let done = complete(&parts).send().await.unwrap();
        assert_eq!(done.key(), Some("a//big"));
        assert!(stage.bytes("a//big").await == bodies.concat());
        let head = stage.s3.head_object().bucket("bucket").key("a//big").checksum_mode("ENABLED".into());
        let head = head.send().await.unwrap();
        assert_eq!((head.e_tag(), head.checksum_sha256()), (done.e_tag(), None));
        assert_eq!(head.metadata().unwrap()["owner"], "ann");
        let left: Vec<_> = std::fs::read_dir(stage.root.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_str().unwrap().contains("upload")), "{left:?}");

        let again = stage.s3.create_multipart_upload().bucket("bucket").key("b").send().await.unwrap();
        let abort = stage.s3.abort_multipart_upload().bucket("bucket").key("b").upload_id(again.upload_id().unwrap());
        abort.clone().send().await.unwrap();
        let error = abort.send().await.unwrap_err().into_service_error();
        assert_eq!(error.meta().code(), Some("NoSuchUpload"));
    }

    #[tokio::test]
    async fn a_part_that_comes_too_late_is_not_kept() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let stage = Stage::new().await;
        let started = stage.s3.create_multipart_upload().bucket("bucket").key("k").send().await.unwrap();
        let id = started.upload_id().unwrap();
        let put = stage.s3.upload_part().bucket("bucket").key("k").upload_id(id).part_number(1);
        let put = put.presigned(minute()).await.unwrap();
        let host = stage.endpoint.strip_prefix("http://").unwrap();
        let path = put.uri().strip_prefix(&stage.endpoint).unwrap();
        let mut socket = tokio::net::TcpStream::connect(host).await.unwrap();
        let head = format!("PUT {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: 4\r\n\r\nab");
        socket.write_all(head.as_bytes()).await.unwrap();
        let of_part = || {
            let files = std::fs::read_dir(stage.root.path()).unwrap().map(|file| file.unwrap().file_name());
            let names = files.map(|name| name.into_string().unwrap());
            names.filter(|name| name.starts_with(".tmp") || name.contains("upload")).collect::<Vec<_>>()
        };
        while !of_part().iter().any(|name| name.starts_with(".tmp")) {
            tokio::task::yield_now().await;
        }
        stage.s3.abort_multipart_upload().bucket("bucket").key("k").upload_id(id).send().await.unwrap();
        socket.write_all(b"cd").await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("NoSuchUpload"), "{answer}");
        assert_eq!(of_part(), [""; 0]);
    }

    #[tokio::test]
    async fn what_the_sdk_sends_by_default_is_taken() {
        let stage = Stage::new().await;
        let config =
            stage.s3.config().to_builder().request_checksum_calculation(RequestChecksumCalculation::WhenSupported);
        let s3 = aws_sdk_s3::Client::from_conf(config.build());
        let body = aws_sdk_s3::primitives::ByteStream::from_static(b"streamed");
        s3.put_object().bucket("bucket").key("k").body(body).send().await.unwrap();
        assert_eq!(stage.bytes("k").await, "streamed");
    }
}
