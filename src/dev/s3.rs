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
//! encryption, storage classes and locks.
//! It makes no promise about a crash in the middle of an upload.

mod body;
mod joined;
mod multipart;
mod names;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::config::{S3Config, StaticConfigProvider};
use s3s::dto;
#[allow(clippy::wildcard_imports, reason = "fifty names of one vocabulary")]
use s3s::dto::*;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3, S3Error, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::sync::RwLock;

use body::{Body, Commit, Held, known_length, read, refusal};
use joined::Joined;
use multipart::Sums;
use names::{file_name, hide_key, take_key};

use super::cors::Cors;
use super::http1;
use super::iam::MemoryIam;

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
    /// By the upload's id.
    joined: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Joined>>>>,
}

/// An S3 over the folders of `root`, one a bucket, open to the active keys of
/// `iam`.
///
/// # Errors
/// A folder that can't be used.
pub fn service(root: &Path, iam: MemoryIam) -> io::Result<S3Service> {
    let root = root.canonicalize()?;
    let files = FileSystem::new(&root).map_err(|e| io::Error::other(format!("{}: {e:?}", root.display())))?;
    let mut builder = S3ServiceBuilder::new(Store {
        files,
        root: root.clone(),
        lock: Arc::default(),
        known: Mutex::default(),
        joined: Mutex::default(),
    });
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

use {no_extras, promised};

/// The one checksum that is there.
fn only(sums: &dto::Checksum) -> Option<&String> {
    let crcs = [&sums.checksum_crc32, &sums.checksum_crc32c, &sums.checksum_crc64nvme];
    crcs.into_iter().chain([&sums.checksum_sha1, &sums.checksum_sha256]).find_map(Option::as_ref)
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
        let file = std::fs::File::open(self.object(&input.bucket, &input.key)).map_err(|e| s3_error!(e, NoSuchKey))?;
        let size = file.metadata().map_err(S3Error::internal_error)?.len();
        if let Some(Range::Suffix { length }) = &mut input.range {
            // `s3s-fs` would seek to before the start.
            *length = size.min(*length);
        }
        let from = input.range.map_or(Ok(0..size), |range| range.check(size))?;
        let mut response = self.files.get_object(req).await?;
        conditions(if_match.as_ref(), if_none_match.as_ref(), response.output.e_tag.as_ref())?;
        take_key(&mut response.output.metadata);
        // `s3s-fs` reads 4 KiB at a time.
        response.output.body = Some(read(file, from));
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
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.open_upload(req).await
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.take_part(req).await
    }

    async fn upload_part_copy(
        &self,
        req: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        self.copy_part(req).await
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        self.page_of_parts(req).await
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.complete(req).await
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.give_up(req).await
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        self.open_uploads(req)
    }
}

#[cfg(test)]
mod tests;
