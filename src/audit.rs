//! The audit trail: one JSON line for each grant, refusal and revoke, which
//! leads from a leaked URL to whoever asked for it.
//!
//! INVARIANT: nothing is done without a place for its record. Records are
//! written off the request path, by a thread of their own; when it can't keep
//! up, or the disk is full, calls wait or are refused, and no record is dropped.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::caller::Caller;
use crate::config::{AuditSettings, WhenFull};
use crate::error::Error;
use crate::object::{BucketName, ObjectKey, Prefix};
use crate::ops::form_upload::ContentType;
use crate::ops::presign::{Ask, Operation, Presigned};
use crate::ops::revoke::{Outcome, Revoked, Target};
use crate::ops::upload::Algorithm;
use crate::ops::upload_token::Session;
use crate::ops::{list, revoke, start_upload, stat};
use crate::policy::grant::Action;
use crate::signer::url::SignedUrl;
use crate::signer::{KeySnapshot, Signer};

/// How long records are gathered before they are written.
const GATHER: Duration = Duration::from_millis(5);
/// How soon a write that failed is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// The trail of this replica.
pub struct Audit {
    queue: Arc<Queue>,
    when_full: WhenFull,
    writer: Option<std::thread::JoinHandle<()>>,
}

struct Queue {
    /// The places that are left.
    room: Semaphore,
    waiting: Mutex<Waiting>,
    /// Something waits, or the end has come.
    arrived: Condvar,
    /// All that waited is written.
    written: Condvar,
}

#[derive(Default)]
struct Waiting {
    records: Vec<Record>,
    writing: bool,
    closed: bool,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Every change is a single step, so that a panic leaves nothing half done.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A record with its place, which is written whatever happens: without a
/// [`Entry::close`], as one that ran out of time.
#[must_use]
pub struct Entry<'a> {
    queue: &'a Queue,
    open: Option<(SemaphorePermit<'a>, Record)>,
}

impl Entry<'_> {
    /// A URL was given.
    pub fn issued(&mut self, presigned: &Presigned) {
        if let Some((_, Record { asked: Asked::Presign(_, issued), .. })) = &mut self.open {
            *issued = Some(presigned.into());
        }
    }

    /// An upload was opened.
    pub fn started(&mut self, session: &Session) {
        if let Some((_, Record { asked: Asked::Upload(upload), .. })) = &mut self.open {
            upload.upload_id = Some(session.upload_id.clone());
        }
    }

    /// URLs were ended, or would be.
    pub fn revoked(&mut self, revoked: &Revoked) {
        let Some((_, Record { asked: Asked::Revoke(revoke), .. })) = &mut self.open else { return };
        match &revoked.outcome {
            Outcome::Object { new_key, rotation } => {
                revoke.new_key = Some(new_key.as_str().to_owned());
                revoke.confirmed_at = rotation.as_ref().map(|rotation| rotation.confirmed_at);
            }
            Outcome::Signer { signer, old_key, rotation, .. } => {
                revoke.signer = Some(signer.clone());
                revoke.old_key = Some(old_key.clone());
                revoke.new_key = rotation.as_ref().map(|rotation| rotation.new_key.clone());
                revoke.confirmed_at = rotation.as_ref().map(|rotation| rotation.confirmed_at);
            }
        }
    }

    /// How it ended.
    pub fn close<T>(mut self, ended: &Result<T, Error>) {
        self.write(ended.as_ref().err().map(Error::reason));
    }

    fn write(&mut self, refused: Option<&'static str>) {
        let Some((room, mut record)) = self.open.take() else { return };
        record.refused = refused;
        // Given back by the writer.
        room.forget();
        let mut waiting = self.queue.waiting();
        waiting.records.push(record);
        if waiting.records.len() == 1 {
            self.queue.arrived.notify_one();
        }
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.write(Some(Error::Deadline.reason()));
    }
}

/// Who asked for what, and what came of it.
#[derive(Debug)]
struct Record {
    time: SystemTime,
    caller: Caller,
    asked: Asked,
    /// The reason of the error that it ended with.
    refused: Option<&'static str>,
}

/// What was asked for.
#[derive(Debug)]
pub enum Asked {
    /// A URL, and what was given.
    Presign(Box<Ask>, Option<Issued>),
    /// A page.
    List(BucketName, Prefix),
    /// An object's facts.
    Stat(BucketName, ObjectKey),
    /// What a URL is.
    Inspect {
        /// The access key id that stands in it.
        access_key_id: String,
        /// The issue id that stands in it.
        issue_id: Option<ulid::Ulid>,
    },
    /// The signers.
    Signers,
    /// The end of URLs.
    Revoke(Box<Revoke>),
    /// Something about an upload in parts.
    Upload(Upload),
}

/// A URL that was given.
#[derive(Debug)]
pub struct Issued {
    /// Who signed it.
    pub signer: Arc<Signer>,
    /// With which key.
    pub key: Arc<KeySnapshot>,
    /// The issue id in it.
    pub issue_id: Option<ulid::Ulid>,
    /// When it ends.
    pub expires_at: SystemTime,
}

/// A revoke.
#[derive(Debug, Default)]
pub struct Revoke {
    /// The object whose downloads were to end.
    pub object: Option<(BucketName, ObjectKey)>,
    /// The signer.
    pub signer: Option<String>,
    /// The key whose URLs were to end.
    pub old_key: Option<String>,
    /// What has taken its place: an access key id, or an object's key.
    pub new_key: Option<String>,
    /// The id to ask again with.
    pub request_id: String,
    /// Why, as the caller has it.
    pub reason: String,
    /// Whether nothing was to be changed.
    pub dry_run: bool,
    /// Whether the old key was to go first.
    pub immediate: bool,
    /// When S3 had been seen to refuse the old ones.
    pub confirmed_at: Option<SystemTime>,
}

/// An upload in parts, and what was to be done to it.
#[derive(Debug)]
pub struct Upload {
    /// What was to be done.
    pub action: &'static str,
    /// The bucket.
    pub bucket: BucketName,
    /// The object.
    pub key: ObjectKey,
    /// S3's id of the upload, once there is one.
    pub upload_id: Option<String>,
    /// The size announced, in bytes.
    pub size: u64,
    /// The media type.
    pub content_type: Option<String>,
    /// The checksum that each part has.
    pub checksum: Option<&'static str>,
    /// Refuse to overwrite.
    pub create_only: bool,
}

impl From<&start_upload::Ask> for Asked {
    fn from(ask: &start_upload::Ask) -> Self {
        Self::Upload(Upload {
            action: "start_upload",
            bucket: ask.bucket.clone(),
            key: ask.key.clone(),
            upload_id: None,
            size: ask.plan.size(),
            content_type: ask.upload.content_type.clone(),
            checksum: ask.algorithm.map(Algorithm::name),
            create_only: ask.upload.create_only,
        })
    }
}

impl Asked {
    /// Something about an upload that is open.
    #[must_use]
    pub fn of_upload(action: &'static str, session: &Session) -> Self {
        Self::Upload(Upload {
            action,
            bucket: session.bucket.clone(),
            key: session.key.clone(),
            upload_id: Some(session.upload_id.clone()),
            size: session.plan.size(),
            content_type: session.content_type.clone(),
            checksum: session.algorithm.map(Algorithm::name),
            create_only: session.create_only,
        })
    }
}

impl From<&Ask> for Asked {
    fn from(ask: &Ask) -> Self {
        Self::Presign(Box::new(ask.clone()), None)
    }
}

impl From<&list::Ask> for Asked {
    fn from(ask: &list::Ask) -> Self {
        Self::List(ask.bucket.clone(), ask.prefix.clone())
    }
}

impl From<&stat::Ask> for Asked {
    fn from(ask: &stat::Ask) -> Self {
        Self::Stat(ask.bucket.clone(), ask.key.clone())
    }
}

impl From<&SignedUrl> for Asked {
    fn from(url: &SignedUrl) -> Self {
        Self::Inspect { access_key_id: url.access_key_id.clone(), issue_id: url.issue_id }
    }
}

impl From<&revoke::Ask> for Asked {
    fn from(ask: &revoke::Ask) -> Self {
        let mut revoke = Revoke {
            request_id: ask.request_id.clone(),
            reason: ask.reason.clone(),
            dry_run: ask.dry_run,
            immediate: ask.immediate,
            ..Revoke::default()
        };
        match &ask.target {
            Target::Signer(name) => revoke.signer = Some(name.clone()),
            Target::Object(bucket, key) => revoke.object = Some((bucket.clone(), key.clone())),
            Target::KeyOfUrl(id) => revoke.old_key = Some(id.clone()),
        }
        Self::Revoke(Box::new(revoke))
    }
}

impl From<&Presigned> for Issued {
    fn from(presigned: &Presigned) -> Self {
        Self {
            signer: Arc::clone(&presigned.signer),
            key: Arc::clone(&presigned.key),
            issue_id: presigned.issue_id,
            expires_at: presigned.expires_at,
        }
    }
}

impl Audit {
    /// Begins the trail that the settings describe.
    ///
    /// # Errors
    /// A file that can't be written to, a thread that can't be made.
    pub fn start(settings: &AuditSettings) -> io::Result<Self> {
        let mut sinks = Vec::new();
        if settings.stdout {
            sinks.push(Sink::Stdout);
        }
        if let Some(path) = &settings.file {
            let sink = Sink::File(path.clone());
            // Better known now than with the first call.
            sink.open()?;
            sinks.push(sink);
        }
        let queue = Arc::new(Queue {
            room: Semaphore::new(settings.queue),
            waiting: Mutex::default(),
            arrived: Condvar::new(),
            written: Condvar::new(),
        });
        let writing = Arc::clone(&queue);
        let writer = std::thread::Builder::new().name("audit".into()).spawn(move || write_all(&writing, &sinks))?;
        Ok(Self { queue, when_full: settings.when_full, writer: Some(writer) })
    }

    /// A record of what `caller` asks for, to be had before anything is done.
    ///
    /// # Errors
    /// [`Error::AuditFull`], if the settings say so.
    pub async fn open(&self, caller: Caller, asked: Asked, time: SystemTime) -> Result<Entry<'_>, Error> {
        let queue = &*self.queue;
        let room = match (queue.room.try_acquire(), self.when_full) {
            (Ok(room), _) => room,
            (Err(_), WhenFull::Refuse) => return Err(Error::AuditFull),
            (Err(_), WhenFull::Block) => queue.room.acquire().await.map_err(|_| Error::AuditFull)?,
        };
        Ok(Entry { queue, open: Some((room, Record { time, caller, asked, refused: None })) })
    }

    /// Waits until all that was handed over is written, but no longer than
    /// `patience`. Says whether it is.
    #[must_use]
    pub fn flush(&self, patience: Duration) -> bool {
        let waiting = self.queue.waiting();
        let busy = |waiting: &mut Waiting| waiting.writing || !waiting.records.is_empty();
        let (waiting, _) =
            self.queue.written.wait_timeout_while(waiting, patience, busy).unwrap_or_else(PoisonError::into_inner);
        !waiting.writing && waiting.records.is_empty()
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.queue.waiting().closed = true;
        self.queue.arrived.notify_one();
        if let Some(writer) = self.writer.take() {
            // It has nothing to tell that its own log has not.
            let _ = writer.join();
        }
    }
}

enum Sink {
    Stdout,
    File(PathBuf),
}

impl Sink {
    /// Opened for each batch, so that a file may be moved away by others.
    fn open(&self) -> io::Result<Box<dyn io::Write>> {
        match self {
            Self::Stdout => Ok(Box::new(io::stdout())),
            Self::File(path) => Ok(Box::new(OpenOptions::new().append(true).create(true).mode(0o600).open(path)?)),
        }
    }

    /// Writes what is left of `text`, and says how far it came.
    fn write(&self, text: &[u8], done: &mut usize) -> io::Result<()> {
        let mut out = self.open()?;
        while let Some(rest) = text.get(*done..).filter(|rest| !rest.is_empty()) {
            match out.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => *done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        out.flush()
    }
}

/// The writer: until the end, which comes when all is written or, with a sink
/// that fails, at once.
fn write_all(queue: &Queue, sinks: &[Sink]) {
    let mut text = Vec::with_capacity(64 << 10);
    loop {
        let closed = {
            let waiting = queue.waiting();
            let idle = |waiting: &mut Waiting| waiting.records.is_empty() && !waiting.closed;
            let waiting = queue.arrived.wait_while(waiting, idle).unwrap_or_else(PoisonError::into_inner);
            waiting.closed
        };
        if !closed {
            // A wake-up costs the caller more than all the rest of its record.
            std::thread::sleep(GATHER);
        }
        let records = {
            let mut waiting = queue.waiting();
            waiting.writing = true;
            std::mem::take(&mut waiting.records)
        };
        text.clear();
        for record in &records {
            // Only a broken writer could fail, and memory is none.
            let _ = serde_json::to_writer(&mut text, &Line::of(record));
            text.push(b'\n');
        }
        for sink in sinks {
            if !persist(queue, sink, &text) {
                return;
            }
        }
        queue.room.add_permits(records.len());
        let mut waiting = queue.waiting();
        waiting.writing = false;
        if waiting.records.is_empty() {
            queue.written.notify_all();
            if waiting.closed {
                return;
            }
        }
    }
}

/// Tries until it is written. Gives up, and says so, only at the end.
fn persist(queue: &Queue, sink: &Sink, text: &[u8]) -> bool {
    let (mut done, mut failed) = (0, false);
    loop {
        match sink.write(text, &mut done) {
            Ok(()) => {
                if failed {
                    tracing::info!("audit records are written again");
                }
                return true;
            }
            Err(error) => {
                if !failed {
                    tracing::error!(%error, "audit records can't be written; calls will be held up");
                }
                failed = true;
                if queue.waiting().closed {
                    tracing::error!(%error, bytes = text.len() - done, "audit records lost at the end");
                    return false;
                }
                std::thread::sleep(RETRY);
            }
        }
    }
}

/// A record, as it stands in the trail.
#[derive(Default, Serialize)]
struct Line<'a> {
    time: String,
    caller: &'a str,
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bucket: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    constraints: Option<Constraints<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signer: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    access_key_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    issue_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upload_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revoke: Option<RevokeLine<'a>>,
    outcome: &'a str,
}

/// What was signed besides bucket, key and time.
#[derive(Default, PartialEq, Eq, Serialize)]
struct Constraints<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<&'static str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    create_only: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    version_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_window: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part_number: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_range: Option<[u64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type_prefix: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    key_prefix_only: bool,
}

#[derive(Serialize)]
struct RevokeLine<'a> {
    request_id: &'a str,
    reason: &'a str,
    dry_run: bool,
    immediate: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    new_key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    confirmed_at: Option<String>,
}

impl<'a> Line<'a> {
    fn of(record: &'a Record) -> Self {
        let mut line = Line {
            time: time(record.time),
            caller: record.caller.as_str(),
            outcome: record.refused.unwrap_or("granted"),
            ..Line::default()
        };
        match &record.asked {
            Asked::Presign(ask, issued) => {
                line.action = ask.operation.name();
                (line.bucket, line.key) = (Some(ask.bucket.as_str()), Some(ask.key.as_str()));
                line.ttl = ask.ttl.map(crate::object::Lifetime::seconds);
                line.constraints = Some(constraints(&ask.operation)).filter(|c| *c != Constraints::default());
                if let Operation::Part(part) = &ask.operation {
                    line.upload_id = Some(&part.session.upload_id);
                }
                if let Some(issued) = issued {
                    // What was given, which the grant or the key may have cut short.
                    let granted = issued.expires_at.duration_since(record.time).unwrap_or_default();
                    line.ttl = u32::try_from(granted.as_millis().div_ceil(1000)).ok();
                    line.signer = Some(&issued.signer.name);
                    line.generation = Some(issued.key.generation);
                    line.access_key_id = Some(issued.key.credentials.access_key_id());
                    line.issue_id = issued.issue_id.map(|id| id.to_string());
                    line.expires_at = Some(time(issued.expires_at));
                }
            }
            Asked::List(bucket, prefix) => {
                line.action = Action::List.as_str();
                (line.bucket, line.key) = (Some(bucket.as_str()), Some(prefix.as_str()));
            }
            Asked::Stat(bucket, key) => {
                line.action = Action::Stat.as_str();
                (line.bucket, line.key) = (Some(bucket.as_str()), Some(key.as_str()));
            }
            Asked::Inspect { access_key_id, issue_id } => {
                line.action = Action::Inspect.as_str();
                line.access_key_id = Some(access_key_id);
                line.issue_id = issue_id.map(|id| id.to_string());
            }
            Asked::Signers => line.action = Action::Signers.as_str(),
            Asked::Upload(upload) => {
                line.action = upload.action;
                (line.bucket, line.key) = (Some(upload.bucket.as_str()), Some(upload.key.as_str()));
                line.upload_id = upload.upload_id.as_deref();
                line.constraints = Some(Constraints {
                    content_type: upload.content_type.as_deref(),
                    content_length: Some(upload.size),
                    checksum: upload.checksum,
                    create_only: upload.create_only,
                    ..Constraints::default()
                });
            }
            Asked::Revoke(revoke) => {
                let ends = if revoke.object.is_some() { Action::RevokeObject } else { Action::RevokeSigner };
                line.action = ends.as_str();
                if let Some((bucket, key)) = &revoke.object {
                    (line.bucket, line.key) = (Some(bucket.as_str()), Some(key.as_str()));
                }
                (line.signer, line.access_key_id) = (revoke.signer.as_deref(), revoke.old_key.as_deref());
                line.revoke = Some(RevokeLine {
                    request_id: &revoke.request_id,
                    reason: &revoke.reason,
                    dry_run: revoke.dry_run,
                    immediate: revoke.immediate,
                    new_key: revoke.new_key.as_deref(),
                    confirmed_at: revoke.confirmed_at.map(time),
                });
            }
        }
        line
    }
}

fn constraints(operation: &Operation) -> Constraints<'_> {
    match operation {
        Operation::Download(download) => Constraints {
            version_id: download.version_id.as_deref(),
            cache_window: download.cache_window.map(|window| window.as_secs()),
            ..Constraints::default()
        },
        Operation::Upload(upload) => Constraints {
            content_type: upload.content_type.as_deref(),
            content_length: upload.content_length,
            checksum: upload.checksum.as_ref().map(|checksum| checksum.header().0),
            create_only: upload.create_only,
            ..Constraints::default()
        },
        Operation::Part(part) => Constraints {
            content_length: part.session.plan.length(part.number),
            checksum: part.checksum.as_ref().map(|checksum| checksum.header().0),
            part_number: Some(part.number),
            ..Constraints::default()
        },
        Operation::FormUpload(form) => Constraints {
            content_type: match &form.content_type {
                ContentType::Exactly(content_type) => Some(content_type),
                ContentType::Default | ContentType::Prefix(_) => None,
            },
            content_type_prefix: match &form.content_type {
                ContentType::Prefix(prefix) => Some(prefix),
                ContentType::Default | ContentType::Exactly(_) => None,
            },
            size_range: Some([form.min_size, form.max_size]),
            key_prefix_only: form.key_prefix_only,
            ..Constraints::default()
        },
        Operation::Head(head) => Constraints { version_id: head.version_id.as_deref(), ..Constraints::default() },
        Operation::Delete(delete) => Constraints { version_id: delete.version_id.as_deref(), ..Constraints::default() },
    }
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_micros(time).to_string()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    fn settings(file: &Path, when_full: WhenFull) -> AuditSettings {
        AuditSettings { stdout: false, file: Some(file.to_owned()), queue: 3, when_full }
    }

    async fn open(audit: &Audit, uid: u32) -> Result<Entry<'_>, Error> {
        audit.open(Caller::user(uid), Asked::Signers, SystemTime::UNIX_EPOCH).await
    }

    async fn write(audit: &Audit, uid: u32) {
        open(audit, uid).await.unwrap().close(&Ok(()));
    }

    fn callers(file: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(file).unwrap();
        let line =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["caller"].as_str().unwrap().into();
        text.lines().map(line).collect()
    }

    #[tokio::test]
    async fn a_record_is_a_line_and_a_file_may_be_moved_away() {
        let folder = tempfile::tempdir().unwrap();
        let (file, moved) = (folder.path().join("audit"), folder.path().join("audit.1"));
        let audit = Audit::start(&settings(&file, WhenFull::Refuse)).unwrap();
        let revoke = Revoke {
            object: Some((BucketName::parse("photos").unwrap(), ObjectKey::parse("a \"b\"").unwrap())),
            request_id: "leak-1".into(),
            reason: "posted\u{2028}in a chat".into(),
            ..Revoke::default()
        };
        let entry = audit.open(Caller::user(1), Asked::Revoke(Box::new(revoke)), SystemTime::UNIX_EPOCH).await.unwrap();
        entry.close::<()>(&Err(Error::NoCaller));
        assert!(audit.flush(Duration::from_secs(5)));
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(
            text,
            "{\"time\":\"1970-01-01T00:00:00.000000Z\",\"caller\":\"uid:1\",\"action\":\"revoke_object\",\
             \"bucket\":\"photos\",\"key\":\"a \\\"b\\\"\",\"revoke\":{\"request_id\":\"leak-1\",\
             \"reason\":\"posted\u{2028}in a chat\",\"dry_run\":false,\"immediate\":false},\"outcome\":\"NO_CALLER\"}\n"
        );
        std::fs::rename(&file, &moved).unwrap();
        write(&audit, 2).await;
        // What was handed over is written before the end.
        drop(audit);
        assert_eq!((callers(&moved), callers(&file)), (vec!["uid:1".into()], vec!["uid:2".into()]));
    }

    #[tokio::test]
    async fn a_full_disk_refuses_calls_and_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (link, file) = (folder.path().join("link"), folder.path().join("audit"));
        symlink("/dev/full", &link).unwrap();
        let audit = Audit::start(&settings(&link, WhenFull::Refuse)).unwrap();
        // Whoever gives up in the middle is written down too.
        drop(open(&audit, 0).await.unwrap());
        for n in 1..3 {
            write(&audit, n).await;
        }
        assert!(matches!(open(&audit, 9).await, Err(Error::AuditFull)));
        assert!(!audit.flush(Duration::from_millis(50)));
        // There is room again.
        std::fs::remove_file(&link).unwrap();
        symlink(&file, &link).unwrap();
        assert!(audit.flush(Duration::from_secs(5)));
        write(&audit, 3).await;
        drop(audit);
        assert_eq!(callers(&file), ["uid:0", "uid:1", "uid:2", "uid:3"]);
    }

    #[tokio::test]
    async fn calls_wait_if_the_settings_say_so() {
        let folder = tempfile::tempdir().unwrap();
        let (link, file) = (folder.path().join("link"), folder.path().join("audit"));
        symlink("/dev/full", &link).unwrap();
        let audit = Arc::new(Audit::start(&settings(&link, WhenFull::Block)).unwrap());
        for n in 0..3 {
            write(&audit, n).await;
        }
        let waiting = Arc::clone(&audit);
        let fourth = tokio::spawn(async move { write(&waiting, 3).await });
        tokio::task::yield_now().await;
        assert!(!fourth.is_finished());
        std::fs::remove_file(&link).unwrap();
        symlink(&file, &link).unwrap();
        fourth.await.unwrap();
        drop(audit);
        assert_eq!(callers(&file), ["uid:0", "uid:1", "uid:2", "uid:3"]);
    }
}
