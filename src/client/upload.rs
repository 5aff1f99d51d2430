//! Files into S3: in one request, or in parts.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use tonic::Code;

use super::source::{FileBody, Source};
use super::sum::{Algorithm, Sum, text};
use super::{Client, Error, Meter, OnProgress, Progress, http, signed, unsigned};
use crate::ops::upload::Encryption;
use crate::pb;
use crate::pb::checksum::Value;
use crate::pb::encryption::Method;
use crate::pb::part_result::Result as PartAnswer;
use crate::pb::presign_request::Operation;

/// Files of up to this size go in one request, and so do those of one part
/// ([`Upload::part_size`]): 16 MiB.
pub const SINGLE_BYTES: u64 = 16 << 20;

/// Told the token of an upload in parts, when there is one.
pub type OnStart = Arc<dyn Fn(&str) + Send + Sync>;

/// What is asked of an upload.
#[derive(Clone, Default)]
pub struct Upload {
    /// The bucket's name in the service's settings.
    pub bucket: String,
    /// The key.
    pub key: String,
    /// The media type.
    pub content_type: Option<String>,
    /// Whether to refuse to overwrite.
    pub create_only: bool,
    /// User metadata, without the `x-amz-meta-`.
    pub metadata: BTreeMap<String, String>,
    /// Object tags.
    pub tags: BTreeMap<String, String>,
    /// Stored as the object's `Cache-Control`.
    pub cache_control: Option<String>,
    /// Stored as the object's `Content-Disposition`.
    pub content_disposition: Option<String>,
    /// The storage class. None: the bucket's default.
    pub storage_class: Option<pb::StorageClass>,
    /// Encryption at rest. None: the bucket's default.
    pub encryption: Option<Encryption>,
    /// The size of each part but the last, in bytes: 5 MiB to 5 GiB, and such
    /// that there are at most 10,000. A file of one part goes in one request.
    /// None: the service chooses.
    pub part_size: Option<u64>,
    /// Goes on with the upload in parts that has this token.
    pub resume: Option<String>,
    /// See [`Upload::on_progress`].
    pub progress: Option<OnProgress>,
    /// See [`Upload::on_start`].
    pub started: Option<OnStart>,
}

impl fmt::Debug for Upload {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upload").field("bucket", &self.bucket).field("key", &self.key).finish_non_exhaustive()
    }
}

impl Upload {
    /// An upload to `key` of `bucket`.
    #[must_use]
    pub fn to(bucket: impl Into<String>, key: impl Into<String>) -> Self {
        Self { bucket: bucket.into(), key: key.into(), ..Self::default() }
    }

    /// Has `tell` told how far it is.
    #[must_use]
    pub fn on_progress(self, tell: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self { progress: Some(Arc::new(tell)), ..self }
    }

    /// Has `tell` told the token of an upload in parts, before the first is sent:
    /// with it the upload can be gone on with ([`Upload::resume`]) or given up
    /// ([`Client::abort`]). Who does not ask for it leaves it to
    /// [`Client::upload`] to give up what has failed; if that is dropped, S3
    /// keeps the parts until the upload's deadline or a lifecycle rule ends it.
    #[must_use]
    pub fn on_start(self, tell: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { started: Some(Arc::new(tell)), ..self }
    }

    /// As the API has it: without length and checksum, which are a body's.
    pub(crate) fn constraints(&self) -> pb::Upload {
        let method = self.encryption.as_ref().map(|encryption| match encryption {
            Encryption::S3 => Method::SseS3(pb::SseS3 {}),
            Encryption::Kms { key_id, bucket_key } => {
                let key_id = key_id.clone().unwrap_or_default();
                Method::SseKms(pb::SseKms { key_id, bucket_key: *bucket_key })
            }
        });
        pb::Upload {
            content_type: self.content_type.clone(),
            content_length: None,
            checksum: None,
            create_only: self.create_only,
            metadata: self.metadata.clone(),
            tags: self.tags.clone(),
            cache_control: self.cache_control.clone(),
            content_disposition: self.content_disposition.clone(),
            storage_class: self.storage_class.unwrap_or_default().into(),
            encryption: method.map(|method| pb::Encryption { method: Some(method) }),
        }
    }

    /// Up to which size it is one request.
    pub(crate) fn single_bytes(&self) -> u64 {
        self.part_size.unwrap_or_default().max(SINGLE_BYTES)
    }
}

/// What has become of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// The object's `ETag`, in quotes.
    pub etag: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its CRC-64/NVME, which S3 has verified: as `crc64nvme:` and hexadecimal
    /// digits.
    pub checksum: String,
    /// How many parts were sent. 0: it went in one request, or was there.
    pub parts_sent: usize,
    /// How many parts were there already.
    pub parts_found: usize,
    /// Whether the whole object was there already, and nothing was sent.
    pub was_there: bool,
}

/// An upload in parts that is open.
struct Open {
    token: String,
    part_size: u64,
    part_count: i32,
    /// What S3 has already.
    found: BTreeMap<i32, pb::Part>,
}

/// A part that S3 has.
struct Sent {
    number: i32,
    etag: String,
    sum: Sum,
    found: bool,
}

impl Client {
    /// Uploads a file: in one request, or, if it has more than [`SINGLE_BYTES`]
    /// and than one part, in parts, several at once. Every request is signed for its exact length
    /// and checksum; parts are tried again with fresh URLs. No more than a chunk
    /// of each part is in memory.
    ///
    /// # Errors
    /// What the service or S3 answers; [`Error::Changed`] if the file was written
    /// to meanwhile.
    pub async fn upload(&self, source: impl Into<Arc<Source>>, ask: Upload) -> Result<Uploaded, Error> {
        let source = source.into();
        let meter = Meter::new(source.size(), ask.progress.clone());
        if ask.resume.is_none() && source.size() <= ask.single_bytes() {
            return self.upload_at_once(&source, &ask, &meter).await;
        }
        let open = match &ask.resume {
            None => self.start(&source, &ask).await?,
            Some(token) => match self.found(&source, token).await {
                // It may have been completed, by one who did not live to hear of it.
                Err(error) if error.code() == Some(Code::NotFound) => {
                    return self.completed(&source, token, &meter).await.map_err(|_| error);
                }
                open => open?,
            },
        };
        if let Some(started) = &ask.started {
            started(&open.token);
        }
        let done = self.upload_parts(&source, &ask, &open, &meter).await;
        if done.is_err() && ask.started.is_none() {
            // Nobody else knows of it. That it could not be given up is the lesser news.
            let _ = self.abort(&open.token).await;
        }
        done
    }

    /// Whether what would be uploaded is there already: the same bytes by size and
    /// CRC-64/NVME, and the media type, metadata and storage class that are asked
    /// for. No if that can't be told, as with tags, encryption and headers that
    /// [`Client::stat`] does not show.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Changed`]: the file can't be read.
    pub async fn is_there(&self, source: impl Into<Arc<Source>>, ask: &Upload) -> Result<Option<Uploaded>, Error> {
        let source = source.into();
        let untold = [&ask.cache_control, &ask.content_disposition].into_iter().any(Option::is_some);
        if untold || !ask.tags.is_empty() || ask.encryption.is_some() {
            return Ok(None);
        }
        let Ok(facts) = self.persist(|| self.stat(&ask.bucket, &ask.key)).await else { return Ok(None) };
        // S3 leaves its standard class out.
        let class = if facts.storage_class.is_empty() { "STANDARD" } else { &facts.storage_class };
        let same = u64::try_from(facts.size) == Ok(source.size())
            && ask.content_type.as_ref().is_none_or(|media| *media == facts.content_type)
            && ask.metadata.iter().all(|(name, value)| facts.metadata.get(name) == Some(value))
            && ask.storage_class.is_none_or(|asked| asked.as_str_name().strip_prefix("STORAGE_CLASS_") == Some(class));
        let Some(checksum @ Value::Crc64nvme(_)) = facts.checksum.and_then(|sum| sum.value).filter(|_| same) else {
            return Ok(None);
        };
        let _slot = self.slot().await?;
        let sum = source.sum(0, source.size()).await?;
        source.unchanged()?;
        if checksum != sum.value() {
            return Ok(None);
        }
        Meter::new(source.size(), ask.progress.clone()).add(source.size());
        let (size, checksum) = (source.size(), text(&checksum));
        Ok(Some(Uploaded { etag: facts.etag, size, checksum, parts_sent: 0, parts_found: 0, was_there: true }))
    }

    /// Gives an upload in parts up.
    ///
    /// # Errors
    /// What the service answers.
    pub async fn abort(&self, token: &str) -> Result<(), Error> {
        let request = pb::AbortUploadRequest { upload_token: token.to_owned() };
        let abort = || self.call(request.clone(), |mut api, request| async move { api.abort_upload(request).await });
        self.persist(abort).await.map(drop)
    }

    async fn upload_at_once(&self, source: &Arc<Source>, ask: &Upload, meter: &Meter) -> Result<Uploaded, Error> {
        let _slot = self.slot().await?;
        let (size, sum) = (source.size(), source.sum(0, source.size()).await?);
        let upload =
            pb::Upload { content_length: Some(signed(size)?), checksum: Some(sum.checksum()), ..ask.constraints() };
        let etag = self
            .persist(|| {
                let upload = Operation::Upload(upload.clone());
                async {
                    let signed = self.presign(&ask.bucket, &ask.key, None, upload).await?;
                    self.put(&signed, source, 0, size, &sum, meter).await
                }
            })
            .await?;
        Ok(Uploaded { etag, size, checksum: text(&sum.value()), parts_sent: 0, parts_found: 0, was_there: false })
    }

    /// Sends `len` bytes, and gives the `ETag`.
    async fn put(
        &self,
        signed: &pb::PresignResponse,
        source: &Arc<Source>,
        from: u64,
        len: u64,
        sum: &Sum,
        meter: &Meter,
    ) -> Result<String, Error> {
        let sent = Arc::new(AtomicU64::new(0));
        let body = reqwest::Body::wrap(FileBody::new(source, from, len, meter, &sent));
        let answer = http::send(http::request(&self.http, signed)?.body(body), Some(&sent)).await;
        // Checked here too, because to read past the end of a file that was cut off
        // looks like a broken connection.
        let answer = source.unchanged().and(answer);
        let header = |response: &reqwest::Response, name| {
            response
                .headers()
                .get(name)
                .and_then(|value: &reqwest::header::HeaderValue| value.to_str().ok())
                .map(str::to_owned)
        };
        let etag = answer.and_then(|response| {
            if let Some(found) = header(&response, "x-amz-checksum-crc64nvme")
                && let Value::Crc64nvme(expected) = sum.value()
                && found != BASE64_STANDARD.encode(&expected)
            {
                return Err(Error::Connection(format!("S3 has got other bytes, with the checksum `{found}`")));
            }
            header(&response, "etag").ok_or_else(|| Error::Answer("S3 gives no ETag".to_owned()))
        });
        if etag.is_err() {
            meter.take_back(sent.load(Ordering::Relaxed));
        }
        etag
    }

    async fn start(&self, source: &Source, ask: &Upload) -> Result<Open, Error> {
        let request = pb::StartUploadRequest {
            bucket: ask.bucket.clone(),
            key: ask.key.clone(),
            size: signed(source.size())?,
            upload: Some(ask.constraints()),
            checksum_algorithm: pb::ChecksumAlgorithm::Crc64nvme.into(),
            part_size: signed(ask.part_size.unwrap_or_default())?,
            ..pb::StartUploadRequest::default()
        };
        // Not tried again after a broken connection: an upload that nobody knows of would be left.
        let open = self.call(request, |mut api, request| async move { api.start_upload(request).await }).await?;
        Ok(Open {
            token: open.upload_token,
            part_size: unsigned(open.part_size)?,
            part_count: open.part_count,
            found: BTreeMap::new(),
        })
    }

    /// What there is of an upload that was begun earlier.
    async fn found(&self, source: &Source, token: &str) -> Result<Open, Error> {
        let mut open = Open { token: token.to_owned(), part_size: 0, part_count: 0, found: BTreeMap::new() };
        let mut page_token = String::new();
        loop {
            let request =
                pb::ListPartsRequest { upload_token: token.to_owned(), page_size: 0, page_token: page_token.clone() };
            let ask = || self.call(request.clone(), |mut api, request| async move { api.list_parts(request).await });
            let page = self.persist(ask).await?;
            if unsigned(page.size)? != source.size() {
                return Err(Error::Changed(source.to_string()));
            }
            open.part_size = unsigned(page.part_size)?;
            open.part_count = page.part_count;
            open.found.extend(page.parts.into_iter().map(|part| (part.part_number, part)));
            if page.next_page_token.is_empty() {
                return Ok(open);
            }
            page_token = page.next_page_token;
        }
    }

    /// What has become of an upload that has no parts any more.
    async fn completed(&self, source: &Arc<Source>, token: &str, meter: &Meter) -> Result<Uploaded, Error> {
        let sum = source.sum(0, source.size()).await?;
        let request = pb::CompleteUploadRequest {
            upload_token: token.to_owned(),
            checksum: Some(sum.checksum()),
            ..pb::CompleteUploadRequest::default()
        };
        let complete =
            || self.call(request.clone(), |mut api, request| async move { api.complete_upload(request).await });
        let done = self.persist(complete).await?;
        let same = done.checksum == Some(sum.checksum()) && unsigned(done.size)? == source.size();
        if done.composite || !same {
            return Err(Error::Changed(source.to_string()));
        }
        meter.add(source.size());
        let checksum = text(&sum.value());
        Ok(Uploaded { etag: done.etag, size: source.size(), checksum, parts_sent: 0, parts_found: 0, was_there: true })
    }

    async fn upload_parts(
        &self,
        source: &Arc<Source>,
        ask: &Upload,
        open: &Open,
        meter: &Meter,
    ) -> Result<Uploaded, Error> {
        let size = source.size();
        if open.part_size == 0 || u64::try_from(open.part_count).ok() != Some(size.div_ceil(open.part_size)) {
            let Open { part_size, part_count, .. } = open;
            return Err(Error::Answer(format!("{size} bytes as {part_count} parts of {part_size} bytes")));
        }
        let mut parts: Vec<Sent> = stream::iter(1..=open.part_count)
            .map(|number| self.part(source, open, number, meter))
            .buffer_unordered(self.parallel)
            .try_collect()
            .await?;
        parts.sort_by_key(|part| part.number);
        let mut sum = Sum::new(Algorithm::Crc64Nvme);
        for part in &parts {
            sum.append(&part.sum);
        }
        let request = pb::CompleteUploadRequest {
            upload_token: open.token.clone(),
            parts: parts
                .iter()
                .map(|part| pb::CompletedPart {
                    part_number: part.number,
                    etag: part.etag.clone(),
                    checksum: Some(part.sum.checksum()),
                })
                .collect(),
            create_only: ask.create_only,
            checksum: Some(sum.checksum()),
        };
        source.unchanged()?;
        let complete =
            || self.call(request.clone(), |mut api, request| async move { api.complete_upload(request).await });
        let done = self.persist(complete).await?;
        let expected = sum.value();
        match done.checksum.and_then(|sum| sum.value) {
            Some(found) if !done.composite && found != expected => {
                Err(Error::Corrupt { what: source.to_string(), found: text(&found), expected: text(&expected) })
            }
            _ => {
                let parts_found = parts.iter().filter(|part| part.found).count();
                let parts_sent = parts.len() - parts_found;
                Ok(Uploaded {
                    etag: done.etag,
                    size,
                    checksum: text(&expected),
                    parts_sent,
                    parts_found,
                    was_there: false,
                })
            }
        }
    }

    async fn part(&self, source: &Arc<Source>, open: &Open, number: i32, meter: &Meter) -> Result<Sent, Error> {
        let _slot = self.slot().await?;
        let from = (u64::try_from(number).unwrap_or(1) - 1) * open.part_size;
        let len = open.part_size.min(source.size() - from);
        let sum = source.sum(from, len).await?;
        if let Some(part) = open.found.get(&number)
            && u64::try_from(part.size) == Ok(len)
            && part.checksum == Some(sum.checksum())
        {
            meter.add(len);
            return Ok(Sent { number, etag: part.etag.clone(), sum, found: true });
        }
        let request = pb::SignPartsRequest {
            upload_token: open.token.clone(),
            parts: vec![pb::PartRequest { part_number: number, checksum: Some(sum.checksum()) }],
            ttl: None,
        };
        let attempt = || async {
            // Signed when it is its turn, and anew for each attempt: so no URL gets old.
            let signed =
                self.call(request.clone(), |mut api, request| async move { api.sign_parts(request).await }).await?;
            match signed.parts.into_iter().next().and_then(|part| part.result) {
                Some(PartAnswer::Response(signed)) => self.put(&signed, source, from, len, &sum, meter).await,
                Some(PartAnswer::Error(error)) => Err(item(error)),
                None => Err(Error::Answer("no URL for a part".to_owned())),
            }
        };
        let etag = self.persist(attempt).await?;
        Ok(Sent { number, etag, sum, found: false })
    }

    pub(super) async fn slot(&self) -> Result<tokio::sync::SemaphorePermit<'_>, Error> {
        self.slots.acquire().await.map_err(|e| Error::Answer(e.to_string()))
    }
}

/// The error of one item, as the call alone would have got it.
fn item(error: tonic_types::Status) -> Error {
    use prost::Message as _;
    let details = error.encode_to_vec().into();
    tonic::Status::with_details(error.code.into(), error.message, details).into()
}
