//! Files out of S3: in ranges, several at once, or one after the other.

use std::fmt;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, IF_MATCH, RANGE};
use tokio::sync::Mutex;

use super::sum::{Algorithm, Sum, text};
use super::{Client, Error, Meter, OnProgress, Progress, http, unsigned};
use crate::pb;
use crate::pb::checksum::Value;
use crate::pb::presign_request::Operation;

/// How much is asked for at once.
const RANGE_BYTES: u64 = 16 << 20;
/// How much is written at once.
const WRITE_BYTES: usize = 512 << 10;

/// What is asked of a download.
#[derive(Clone, Default)]
pub struct Download {
    /// The bucket's name in the service's settings.
    pub bucket: String,
    /// The key.
    pub key: String,
    /// Whether a regular file that is there may be replaced, by one of the same
    /// mode. Nothing else is.
    pub overwrite: bool,
    /// See [`Download::on_progress`].
    pub progress: Option<OnProgress>,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download").field("bucket", &self.bucket).field("key", &self.key).finish_non_exhaustive()
    }
}

impl Download {
    /// A download of `key` of `bucket`.
    #[must_use]
    pub fn of(bucket: impl Into<String>, key: impl Into<String>) -> Self {
        Self { bucket: bucket.into(), key: key.into(), ..Self::default() }
    }

    /// Has `tell` told how far it is.
    #[must_use]
    pub fn on_progress(self, tell: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self { progress: Some(Arc::new(tell)), ..self }
    }
}

/// What has come of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Downloaded {
    /// The object's `ETag`, in quotes.
    pub etag: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its checksum, which was verified: the algorithm, `:`, and hexadecimal
    /// digits. None: S3 has none of the whole object, but of its parts at most (a
    /// composite one, as SHA-256 of uploads in parts is), and only the size was
    /// verified.
    pub checksum: Option<String>,
}

/// An object that is fetched.
struct Object<'a> {
    ask: &'a Download,
    /// What the bytes are written to, for messages.
    out: String,
    size: u64,
    etag: String,
    /// As S3 has it.
    checksum: Option<Value>,
    algorithm: Option<Algorithm>,
    /// The URL, until S3 refuses it.
    signed: Mutex<Option<Arc<pb::PresignResponse>>>,
    meter: Meter,
}

/// Where bytes go.
trait Sink: Clone + Send + 'static {
    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;
}

#[derive(Clone)]
struct At(Arc<File>);

impl Sink for At {
    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }
}

struct InOrder<W>(Arc<std::sync::Mutex<W>>);

impl<W> Clone for InOrder<W> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<W: Write + Send + 'static> Sink for InOrder<W> {
    fn write(&mut self, _: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().map_err(|_| io::Error::other("another write has failed"))?.write_all(bytes)
    }
}

impl Client {
    /// Downloads an object into the file `target`: in ranges, several at once,
    /// into a temporary file beside it that takes its name when size and checksum
    /// are right. Dropped or failed, it leaves nothing behind.
    ///
    /// # Errors
    /// What the service or S3 answers; [`Error::File`] if there is such a file
    /// and it may not be replaced ([`AlreadyExists`](io::ErrorKind::AlreadyExists)),
    /// or something that is no regular file
    /// ([`InvalidInput`](io::ErrorKind::InvalidInput)); [`Error::Changed`] if the
    /// object was replaced meanwhile; [`Error::Corrupt`].
    pub async fn download(&self, ask: &Download, target: &Path) -> Result<Downloaded, Error> {
        let failed = |e| Error::file(target.display(), e);
        let before = replaceable(target, ask.overwrite).map_err(failed)?;
        let object = self.look(ask, target.display()).await?;
        let name = target.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?.to_string_lossy();
        // A name that is long already may have no room for more.
        let name: String = name.chars().take(40).collect();
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .suffix(".part")
            // A new one is as the umask has it.
            .permissions(before.clone().unwrap_or(Permissions::from_mode(0o666)))
            .tempfile_in(folder)
            .map_err(failed)?;
        if let Some(before) = before {
            file.as_file().set_permissions(before).map_err(failed)?;
        }
        let sink = At(Arc::new(file.as_file().try_clone().map_err(failed)?));
        let range = |from| {
            let (object, sink) = (&object, sink.clone());
            async move {
                let _slot = self.slot().await?;
                let end = object.size.min(from + RANGE_BYTES);
                let sum = self.fetch(object, from, end, sink, Sum::new(object.in_ranges())).await?;
                Ok::<_, Error>((from, sum))
            }
        };
        let sums: Vec<(u64, Sum)> = stream::iter((0..object.size.div_ceil(RANGE_BYTES)).map(|n| n * RANGE_BYTES))
            .map(range)
            .buffer_unordered(self.parallel)
            .try_collect()
            .await?;
        let sum = object.whole(sums, &sink.0).await.map_err(failed)?;
        let done = object.verified(sum)?;
        // Once more: it took its time.
        replaceable(target, ask.overwrite).map_err(failed)?;
        let kept = if ask.overwrite { file.persist(target) } else { file.persist_noclobber(target) };
        kept.map_err(|e| failed(e.error))?;
        Ok(done)
    }

    /// Downloads an object into `out`, from its first byte to its last. The
    /// checksum is known at the end only: what was written before an error may be
    /// wrong.
    ///
    /// # Errors
    /// As [`Client::download`].
    pub async fn download_to<W: Write + Send + 'static>(&self, ask: &Download, out: W) -> Result<Downloaded, Error> {
        let object = self.look(ask, "output").await?;
        let out = Arc::new(std::sync::Mutex::new(out));
        let sum = Sum::new(object.algorithm.unwrap_or(Algorithm::Crc64Nvme));
        let sum = if object.size == 0 {
            sum
        } else {
            self.fetch(&object, 0, object.size, InOrder(Arc::clone(&out)), sum).await?
        };
        out.lock()
            .map_err(|_| io::Error::other("a write has failed"))
            .and_then(|mut out| out.flush())
            .map_err(|e| Error::file(&object.out, e))?;
        object.verified(object.algorithm.map(|_| sum))
    }

    async fn look<'a>(&self, ask: &'a Download, out: impl fmt::Display) -> Result<Object<'a>, Error> {
        let facts = self.persist(|| self.stat(&ask.bucket, &ask.key)).await?;
        let size = unsigned(facts.size)?;
        let checksum = facts.checksum.and_then(|checksum| checksum.value);
        let algorithm = checksum.as_ref().map(Algorithm::of);
        let meter = Meter::new(size, ask.progress.clone());
        let (out, etag, signed) = (out.to_string(), facts.etag, Mutex::default());
        Ok(Object { ask, out, size, etag, checksum, algorithm, signed, meter })
    }

    /// Fetches the bytes from `from` to before `end`; after a broken connection it
    /// goes on where that was.
    async fn fetch<S: Sink>(&self, object: &Object<'_>, from: u64, end: u64, sink: S, sum: Sum) -> Result<Sum, Error> {
        let so_far = Mutex::new((from, sum));
        let attempt = || async {
            let mut so_far = so_far.lock().await;
            self.fetch_on(object, &mut so_far, end, &sink).await
        };
        // A connection that breaks after it brought something is none that fails again and again.
        loop {
            let before = so_far.lock().await.0;
            match self.persist(&attempt).await {
                Ok(()) => return Ok(so_far.into_inner().1),
                Err(Error::Connection(_)) if so_far.lock().await.0 > before => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn fetch_on<S: Sink>(
        &self,
        object: &Object<'_>,
        (at, sum): &mut (u64, Sum),
        end: u64,
        sink: &S,
    ) -> Result<(), Error> {
        let signed = self.url(object).await?;
        let request = http::request(&self.http, &signed)?
            .header(RANGE, format!("bytes={at}-{}", end - 1))
            .header(IF_MATCH, object.etag.as_str());
        let mut response = match http::send(request, None).await {
            Ok(response) => response,
            Err(Error::S3 { status: 412 | 404, .. }) => return Err(Error::Changed(object.name())),
            Err(error) => {
                if matches!(error, Error::S3 { status: 401 | 403, .. }) {
                    let mut kept = object.signed.lock().await;
                    // Unless somebody else has got a new one already.
                    kept.take_if(|kept| Arc::ptr_eq(kept, &signed));
                }
                return Err(error);
            }
        };
        let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let asked = format!("bytes {at}-{}/{}", end - 1, object.size);
        if response.status() != StatusCode::PARTIAL_CONTENT || range != Some(&asked) {
            let status = response.status();
            return Err(Error::Answer(format!(
                "`{asked}` was asked for, S3 answers {status} `{}`",
                range.unwrap_or("")
            )));
        }
        let mut bytes = Vec::with_capacity(WRITE_BYTES);
        loop {
            let more = http::next(&mut response).await;
            if let Ok(Some(more)) = &more {
                bytes.extend_from_slice(more);
            }
            let is_last = !matches!(more, Ok(Some(_)));
            if bytes.len() >= WRITE_BYTES || is_last && !bytes.is_empty() {
                let len = bytes.len() as u64;
                if *at + len > end {
                    return Err(Error::Answer(format!("more than `{asked}`")));
                }
                let (mut sink, mut summed, from) = (sink.clone(), sum.clone(), *at);
                let write = tokio::task::spawn_blocking(move || {
                    summed.update(&bytes);
                    sink.write(from, &bytes)?;
                    bytes.clear();
                    Ok((summed, bytes))
                });
                let written = write.await.map_err(io::Error::other).flatten();
                (*sum, bytes) = written.map_err(|e| Error::file(&object.out, e))?;
                *at += len;
                object.meter.add(len);
            }
            if is_last {
                more?;
                break;
            }
        }
        if *at < end {
            return Err(Error::Connection("the answer ended early".to_owned()));
        }
        Ok(())
    }

    async fn url(&self, object: &Object<'_>) -> Result<Arc<pb::PresignResponse>, Error> {
        let mut kept = object.signed.lock().await;
        if let Some(signed) = &*kept {
            return Ok(Arc::clone(signed));
        }
        let download = Operation::Download(pb::Download::default());
        let signed = Arc::new(self.presign(&object.ask.bucket, &object.ask.key, None, download).await?);
        *kept = Some(Arc::clone(&signed));
        Ok(signed)
    }
}

/// Whether what is at `target`, if anything, may be replaced; and the permissions
/// that it has.
fn replaceable(target: &Path, overwrite: bool) -> io::Result<Option<Permissions>> {
    match target.metadata() {
        // To rename over a device would be the end of it.
        Ok(facts) if !facts.is_file() => Err(io::Error::new(io::ErrorKind::InvalidInput, "no regular file")),
        Ok(_) if !overwrite => Err(io::ErrorKind::AlreadyExists.into()),
        Ok(facts) => Ok(Some(Permissions::from_mode(facts.permissions().mode() & 0o777))),
        // A link to nothing.
        Err(_) if !overwrite && target.symlink_metadata().is_ok() => Err(io::ErrorKind::AlreadyExists.into()),
        // What can't be looked at can't be written beside either.
        Err(_) => Ok(None),
    }
}

impl Object<'_> {
    fn name(&self) -> String {
        format!("{}/{}", self.ask.bucket, self.ask.key)
    }

    /// What ranges are summed with: with what makes the sum of the whole, if
    /// there is such a thing.
    fn in_ranges(&self) -> Algorithm {
        self.algorithm.filter(|algorithm| algorithm.combines()).unwrap_or(Algorithm::Crc64Nvme)
    }

    /// The checksum of the whole, if S3 has one to compare it with.
    async fn whole(&self, mut sums: Vec<(u64, Sum)>, file: &Arc<File>) -> io::Result<Option<Sum>> {
        let Some(algorithm) = self.algorithm else { return Ok(None) };
        let mut sum = Sum::new(algorithm);
        if algorithm.combines() {
            sums.sort_by_key(|(from, _)| *from);
            for (_, range) in &sums {
                sum.append(range);
            }
            return Ok(Some(sum));
        }
        let file = Arc::clone(file);
        let read = tokio::task::spawn_blocking(move || {
            let (mut at, mut bytes) = (0, vec![0; WRITE_BYTES]);
            loop {
                let len = file.read_at(&mut bytes, at)?;
                if len == 0 {
                    return Ok(Some(sum));
                }
                sum.update(&bytes[..len]);
                at += len as u64;
            }
        });
        read.await.map_err(io::Error::other)?
    }

    fn verified(&self, sum: Option<Sum>) -> Result<Downloaded, Error> {
        let found = sum.map(|sum| sum.value());
        if let (Some(found), Some(expected)) = (&found, &self.checksum)
            && found != expected
        {
            return Err(Error::Corrupt { what: self.name(), found: text(found), expected: text(expected) });
        }
        Ok(Downloaded { etag: self.etag.clone(), size: self.size, checksum: found.as_ref().map(text) })
    }
}
