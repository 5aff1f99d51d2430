//! What is uploaded: a file that must stay as it is.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::task::JoinHandle;

use super::sum::{Algorithm, Sum};
use super::{Error, Meter};

/// How much of a file is in memory at once, for each transfer.
pub(super) const CHUNK: usize = 256 << 10;

/// A file that is to be uploaded, as it was when it was opened.
pub struct Source {
    file: File,
    name: String,
    size: u64,
    modified: Option<SystemTime>,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Source {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::File`]: it can't be read, or is no regular file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let name = path.display();
        // To open a pipe waits for somebody to write to it.
        let file = match path.metadata() {
            Ok(facts) if !facts.is_file() => return Err(irregular(&name)),
            _ => File::open(path),
        };
        Self::new(file.map_err(|e| Error::file(&name, e))?, name.to_string())
    }

    /// A file that is open. `name` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::File`]: it is no regular file.
    pub fn new(file: File, name: impl Into<String>) -> Result<Self, Error> {
        let name = name.into();
        let facts = file.metadata().map_err(|e| Error::file(&name, e))?;
        if !facts.is_file() {
            return Err(irregular(name));
        }
        Ok(Self { file, size: facts.len(), modified: facts.modified().ok(), name })
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// When it was last written to, if the file system knows.
    #[must_use]
    pub fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    /// Fails if it was written to since it was opened.
    pub(super) fn unchanged(&self) -> Result<(), Error> {
        let facts = self.file.metadata().map_err(|e| Error::file(&self.name, e))?;
        if facts.len() == self.size && facts.modified().ok() == self.modified {
            return Ok(());
        }
        Err(Error::Changed(self.name.clone()))
    }

    /// Reads into memory that nobody has to clear first.
    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = from + bytes.len() as u64;
            match rustix::io::pread(&self.file, rustix::buffer::spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // The memory may be more than was asked for.
        bytes.truncate(len);
        Ok(bytes)
    }

    /// The checksum of `len` bytes.
    pub(super) async fn sum(self: &Arc<Self>, from: u64, len: u64) -> Result<Sum, Error> {
        let source = Arc::clone(self);
        let summed = tokio::task::spawn_blocking(move || {
            let mut sum = Sum::new(Algorithm::Crc64Nvme);
            let mut at = from;
            while at < from + len {
                let chunk = source.read(at, chunk(from + len - at))?;
                sum.update(&chunk);
                at += chunk.len() as u64;
            }
            Ok(sum)
        });
        summed.await.map_err(io::Error::other).flatten().map_err(|e| self.unreadable(e))
    }

    fn unreadable(&self, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Changed(self.name.clone()),
            _ => Error::file(&self.name, error),
        }
    }
}

fn irregular(name: impl fmt::Display) -> Error {
    Error::file(name, io::Error::new(io::ErrorKind::InvalidInput, "no regular file"))
}

fn chunk(left: u64) -> usize {
    usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)
}

/// A range of a file as the body of a request, read while it is sent.
pub(super) struct FileBody {
    source: Arc<Source>,
    at: u64,
    end: u64,
    reading: Option<JoinHandle<io::Result<Vec<u8>>>>,
    meter: Meter,
    sent: Arc<AtomicU64>,
}

impl FileBody {
    /// `len` bytes of `source`. `sent` counts those that were handed over.
    pub(super) fn new(source: &Arc<Source>, from: u64, len: u64, meter: &Meter, sent: &Arc<AtomicU64>) -> Self {
        Self {
            source: Arc::clone(source),
            at: from,
            end: from + len,
            reading: None,
            meter: meter.clone(),
            sent: Arc::clone(sent),
        }
    }
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.at == self.end {
            return Poll::Ready(None);
        }
        let (source, at, end) = (Arc::clone(&self.source), self.at, self.end);
        let reading =
            self.reading.get_or_insert_with(|| tokio::task::spawn_blocking(move || source.read(at, chunk(end - at))));
        let read = ready!(Pin::new(reading).poll(cx)).map_err(io::Error::other).flatten();
        self.reading = None;
        let bytes = Bytes::from(read?);
        let len = bytes.len() as u64;
        self.at += len;
        self.sent.fetch_add(len, Ordering::Relaxed);
        self.meter.add(len);
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.at == self.end
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.end - self.at)
    }
}
