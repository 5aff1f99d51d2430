//! `fileaccess put`: files into S3, and what is left of an earlier attempt.

use std::fmt;
use std::fs::{OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use clap::Args;
use futures_util::{Stream, StreamExt as _, stream};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tonic::Code;

use super::files::{Meter, Parallel, is_folder, shown};
use super::folder::{Found, Walk};
use super::service::Server;
use super::stored::Stored;
use super::{Failure, shutdown_signal};
use crate::client::{Client, Error, OnProgress, Progress, Source, Upload, Uploaded, printable};

/// What `fileaccess put` is told.
#[derive(Args)]
pub(super) struct Put {
    /// The files, and where to: `BUCKET/PREFIX/` keeps their names, `BUCKET/KEY`
    /// is for one file. `-` is standard input, which is kept in a temporary file
    /// (TMPDIR says where) until its size is known. With --recursive: a folder.
    #[arg(value_names = ["FILE", "BUCKET/[PREFIX/]"], num_args = 2.., required = true)]
    files_and_target: Vec<PathBuf>,
    /// All files of a folder, and of those in it: their keys are `PREFIX/` and
    /// their paths below the folder, without its own name. Links to files are
    /// followed, links to folders are not.
    #[arg(long, short)]
    recursive: bool,
    /// Go on with what an earlier `put` of the same file to the same key has left,
    /// and send nothing of what is there already.
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    stored: Stored,
    /// Refuse to overwrite.
    #[arg(long)]
    create_only: bool,
    #[command(flatten)]
    parallel: Parallel,
    #[command(flatten)]
    server: Server,
}

/// What is sent.
enum Origin {
    /// Opened when it is its turn: there may be more files than can be open.
    Path(PathBuf),
    Input(Source),
}

/// One file of several.
struct File {
    from: Origin,
    /// When it was counted.
    size: u64,
    key: String,
}

/// What is the same for all files.
struct Work<'a> {
    ask: &'a Put,
    client: &'a Client,
    bucket: &'a str,
    /// To no key.
    upload: Upload,
    meter: Meter,
    open: &'a Open,
}

/// What is kept of an upload until it is done.
#[derive(Clone, Serialize, Deserialize)]
struct Kept {
    bucket: String,
    key: String,
    file: PathBuf,
    size: u64,
    modified: Option<Duration>,
    /// The digest of what else is stored.
    #[serde(default)]
    stored: String,
    upload_token: String,
}

/// Where it is kept: a file that is ours alone while it is open.
struct State {
    path: PathBuf,
    file: std::fs::File,
}

/// An upload in parts that is open, so that an interrupt can tell of it.
struct Opened {
    token: String,
    resumable: bool,
}

type Open = Arc<Mutex<Vec<Opened>>>;

impl State {
    /// The place for an upload of `file` to `key`. None without a folder to keep
    /// things in.
    fn path(server: &str, file: &Path, bucket: &str, key: &str) -> Option<PathBuf> {
        let folder = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
        let folder = folder.or_else(home)?.join("fileaccess/uploads");
        let file = file.canonicalize().ok()?;
        let file = file.as_os_str().as_encoded_bytes();
        let name = digest(&[server.as_bytes(), file, bucket.as_bytes(), key.as_bytes()]);
        Some(folder.join(name + ".json"))
    }

    /// What is kept at `path`, for us alone. If nothing is, it is made, or with
    /// `make` unset there is none.
    ///
    /// # Errors
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) while another process has it, and
    /// those of the file system.
    fn open(path: PathBuf, make: bool) -> io::Result<Option<Self>> {
        if make {
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        }
        loop {
            // Only we may read it: the token is good for the upload.
            let opened = OpenOptions::new().read(true).write(true).create(make).truncate(false).mode(0o600).open(&path);
            let file = match opened {
                Err(error) if !make && error.kind() == io::ErrorKind::NotFound => return Ok(None),
                opened => opened?,
            };
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::WouldBlock.into()),
                // Some network file systems have no locks: then nobody is kept out.
                Ok(()) | Err(TryLockError::Error(_)) => {}
            }
            // Who had it before may have removed it meanwhile.
            let same = |there: std::fs::Metadata| file.metadata().is_ok_and(|ours| ours.ino() == there.ino());
            if path.metadata().is_ok_and(same) {
                return Ok(Some(Self { path, file }));
            }
        }
    }

    fn read(&self) -> Option<Kept> {
        let (mut text, mut file) = (Vec::new(), &self.file);
        file.rewind().ok()?;
        file.read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn write(&self, kept: &Kept) -> io::Result<()> {
        let text = serde_json::to_vec(kept)?;
        self.file.write_all_at(&text, 0)?;
        self.file.set_len(text.len() as u64)
    }

    /// There is nothing to be gone on with any more.
    fn clear(&self) {
        // What can't be cleared is found to be over when it is gone on with.
        let _ = self.file.set_len(0);
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if self.file.metadata().is_ok_and(|facts| facts.len() == 0) {
            // An empty one does no harm.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn digest(parts: &[&[u8]]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    digest.finalize()[..16].iter().fold(String::new(), |name, byte| format!("{name}{byte:02x}"))
}

fn since_epoch(time: Option<SystemTime>) -> Option<Duration> {
    time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
}

/// `fileaccess put`.
///
/// # Errors
/// What the service or S3 answers, for each file that fails.
pub(super) async fn run(ask: Put) -> Result<(), Failure> {
    let interrupted = shutdown_signal().map_err(Failure::running)?;
    let client = ask.server.connect()?.with_parallel(ask.parallel.parallel);
    let open = Open::default();
    let (result, is_cut) = tokio::select! {
        result = work(&ask, &client, &open) => (result, false),
        () = interrupted => (Err(Failure::running("interrupted")), true),
    };
    // What was not finished can be gone on with, or is given up.
    let left = std::mem::take(&mut *open.lock().unwrap_or_else(PoisonError::into_inner));
    let resumable = left.iter().any(|opened| opened.resumable);
    let give_up = async {
        for Opened { token, .. } in left.iter().filter(|opened| !opened.resumable) {
            if let Err(error) = client.abort(token).await {
                eprintln!("fileaccess: an upload can't be given up, S3 keeps its parts: {error}");
            }
        }
    };
    let impatient = shutdown_signal().map_err(Failure::running)?;
    tokio::select! {
        () = give_up => {}
        () = impatient => eprintln!("fileaccess: interrupted again, S3 may keep parts of an upload"),
    }
    result.map_err(|mut failure| {
        // Of a folder, what is there already is left alone.
        if resumable || is_cut && ask.recursive {
            failure.message.push_str("; the same command with --resume goes on with it");
        }
        failure
    })
}

async fn work(ask: &Put, client: &Client, open: &Open) -> Result<(), Failure> {
    let (target, files) = ask.files_and_target.split_last().ok_or_else(|| Failure::usage("no files"))?;
    let target = target.to_str().ok_or_else(|| Failure::usage("the target must be UTF-8"))?;
    let (bucket, prefix) = target.split_once('/').unwrap_or((target, ""));
    if !is_folder(prefix) && (ask.recursive || files.len() > 1) {
        return Err(Failure::usage(format!("`{target}` is one key: end it in `/` for several files")));
    }
    let upload = ask.stored.upload()?;
    let work = |meter| Work { ask, client, bucket, upload, meter, open };
    if ask.recursive {
        let [folder] = files else { return Err(Failure::usage("--recursive takes one folder")) };
        if !folder.is_dir() {
            return Err(Failure::usage(format!("`{}` is no folder, as --recursive wants it", shown(folder))));
        }
        let root = folder.clone();
        let counted = tokio::task::spawn_blocking(move || {
            // What can't be sent counts too: it is told in its turn.
            let size = |found: &Result<Found, String>| found.as_ref().map_or(0, |found| found.size);
            Walk::of(&root).fold((0, 0), |(count, bytes), found| (count + 1, bytes + size(&found)))
        });
        let (count, bytes) = counted.await.map_err(Failure::running)?;
        if count == 0 {
            return Err(Failure::running(format!("there are no files in `{}`", shown(folder))));
        }
        let work = work(Meter::of_files(count, bytes));
        let put = |found: Result<Found, String>| async {
            let Found { path, key, size } = found.map_err(Failure::running)?;
            work.put(File { from: Origin::Path(path), size, key: format!("{prefix}{key}") }).await
        };
        work.meter.see(walk(folder).map(put).buffer_unordered(ask.parallel.parallel), true).await
    } else {
        let files = named(files, prefix).await?;
        let (several, bytes) = (files.len() > 1, files.iter().map(|file| file.size).sum());
        let work = work(match &files[..] {
            [file] => Meter::new(&file.from.to_string(), bytes),
            files => Meter::of_files(files.len() as u64, bytes),
        });
        let put = stream::iter(files).map(|file| work.put(file)).buffer_unordered(ask.parallel.parallel);
        work.meter.see(put, several).await
    }
}

/// What is found in a folder, as far ahead as there is something to do.
fn walk(folder: &Path) -> impl Stream<Item = Result<Found, String>> + use<> {
    let (found, mut ahead) = tokio::sync::mpsc::channel(64);
    let walk = Walk::of(folder);
    tokio::task::spawn_blocking(move || {
        for file in walk {
            if found.blocking_send(file).is_err() {
                // Nobody wants it any more.
                return;
            }
        }
    });
    stream::poll_fn(move |cx| ahead.poll_recv(cx))
}

/// Looks at all that was named before the first byte goes out.
async fn named(paths: &[PathBuf], prefix: &str) -> Result<Vec<File>, Failure> {
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        let is_stdin = path.as_os_str() == "-";
        let name = path.file_name().and_then(|name| name.to_str()).filter(|_| !is_stdin);
        let key = match name {
            _ if !is_folder(prefix) => prefix.to_owned(),
            Some(name) => format!("{prefix}{name}"),
            None if is_stdin => return Err(Failure::usage("standard input has no name: the target must be a key")),
            None => return Err(Failure::usage(format!("`{}` has no name in UTF-8", shown(path)))),
        };
        let file = if is_stdin {
            let source = spool().await?;
            File { size: source.size(), from: Origin::Input(source), key }
        } else {
            if path.is_dir() {
                return Err(Failure::usage(format!("`{}` is a folder, which needs --recursive", shown(path))));
            }
            File { size: Source::open(path)?.size(), from: Origin::Path(path.clone()), key }
        };
        files.push(file);
    }
    let mut keys: Vec<_> = files.iter().map(|file| &file.key).collect();
    keys.sort();
    if let Some([twice, _]) = keys.array_windows().find(|[a, b]| a == b) {
        return Err(Failure::usage(format!("two files would be `{}`", printable(twice))));
    }
    Ok(files)
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => f.write_str(&shown(path)),
            Self::Input(source) => source.fmt(f),
        }
    }
}

/// Standard input as a file, for its size must be known.
async fn spool() -> Result<Source, Failure> {
    let (done, spooled) = tokio::sync::oneshot::channel();
    // A thread of its own, that the end of the process does not wait for.
    std::thread::spawn(move || {
        let spool = || {
            let mut file = tempfile::tempfile()?;
            io::copy(&mut io::stdin().lock(), &mut file)?;
            file.rewind()?;
            Ok(file)
        };
        // Nobody waits after an interrupt.
        let _ = done.send(spool());
    });
    let failed = |e: io::Error| Failure::running(format!("standard input can't be kept in a temporary file: {e}"));
    let file = spooled.await.map_err(Failure::running)?.map_err(failed)?;
    Ok(Source::new(file, "standard input")?)
}

impl Work<'_> {
    async fn put(&self, file: File) -> Result<(), Failure> {
        let (name, size) = (file.from.to_string(), file.size);
        let tell = Arc::new(self.meter.share());
        let done = self.send(file, tell.clone()).await;
        done.map_err(|failure| {
            // What it had of the whole does not count any more.
            tell(Progress { bytes: 0, total: 0 });
            self.meter.less(size);
            failure.of(&name)
        })
    }

    async fn send(&self, file: File, progress: OnProgress) -> Result<(), Failure> {
        let File { from, key, .. } = file;
        let (source, path) = match from {
            Origin::Path(path) => (Source::open(&path).map_err(unnamed)?, Some(path)),
            Origin::Input(source) => (source, None),
        };
        let (source, bucket) = (Arc::new(source), self.bucket);
        let mut upload = Upload {
            bucket: bucket.to_owned(),
            content_type: self.ask.stored.media_type(path.as_deref().unwrap_or(Path::new(&key))),
            create_only: self.ask.create_only,
            progress: Some(progress),
            key,
            ..self.upload.clone()
        };
        let state = self.state(&source, path.as_deref(), &upload)?;
        let stored = digest(&[&upload.constraints().encode_to_vec()]);
        upload.resume = self.earlier(&source, &stored, state.as_deref()).await;
        if self.ask.resume
            && upload.resume.is_none()
            && let Some(there) = self.client.is_there(Arc::clone(&source), &upload).await?
        {
            self.print(&upload.key, &there);
            return Ok(());
        }
        let token = Arc::new(Mutex::new(upload.resume.clone()));
        let kept = state.as_ref().zip(path.and_then(|path| path.canonicalize().ok())).map(|(state, file)| {
            let (size, modified) = (source.size(), since_epoch(source.modified()));
            let (bucket, key, upload_token) = (upload.bucket.clone(), upload.key.clone(), String::new());
            (Arc::clone(state), Kept { bucket, key, file, size, modified, stored, upload_token })
        });
        let upload = upload.on_start(self.started(kept, Arc::clone(&token)));
        let mut done = self.client.upload(Arc::clone(&source), upload.clone()).await;
        if upload.resume.is_some()
            && let Err(error) = &done
            && error.is_final()
            && error.code().is_some_and(|code| code != Code::AlreadyExists)
        {
            let told = format!("fileaccess: `{source}`: the earlier upload can't be gone on with: {error}");
            self.meter.aside(|| eprintln!("{told}"));
            // Whatever is open of it is given up in the end.
            self.opened()
                .iter_mut()
                .for_each(|opened| opened.resumable &= Some(&opened.token) != upload.resume.as_ref());
            done = self.client.upload(source, Upload { resume: None, ..upload.clone() }).await;
        }
        let token = token.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(token) = token
            && done.as_ref().err().is_none_or(Error::is_final)
        {
            if let Some(state) = &state {
                state.clear();
            }
            self.opened().retain_mut(|opened| {
                // What can't be gone on with is given up by whoever clears up.
                opened.resumable &= opened.token != token;
                done.is_err() || opened.token != token
            });
        }
        self.print(&upload.key, &done?);
        Ok(())
    }

    /// What is kept of an upload of this file, and will be if it goes in parts.
    fn state(&self, source: &Source, path: Option<&Path>, upload: &Upload) -> Result<Option<Arc<State>>, Failure> {
        let of = |path| State::path(&self.ask.server.server, path, self.bucket, &upload.key);
        let Some(path) = path.and_then(of) else { return Ok(None) };
        let in_parts = source.size() > upload.single_bytes();
        match State::open(path, in_parts) {
            Ok(state) => Ok(state.map(Arc::new)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let key = printable(&upload.key);
                Err(Failure::running(format!("another `put` is sending it to `{}/{key}`; wait for that", self.bucket)))
            }
            Err(error) => {
                if in_parts {
                    let why = format!("fileaccess: `{source}`: the upload can't be resumed later: {error}");
                    self.meter.aside(|| eprintln!("{why}"));
                }
                Ok(None)
            }
        }
    }

    fn opened(&self) -> MutexGuard<'_, Vec<Opened>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the token of an upload in parts, and keeps it for `--resume`.
    fn started(&self, kept: Option<(Arc<State>, Kept)>, token: Arc<Mutex<Option<String>>>) -> impl Fn(&str) + use<> {
        let open = Arc::clone(self.open);
        move |upload_token: &str| {
            let kept = kept
                .as_ref()
                .map(|(state, kept)| state.write(&Kept { upload_token: upload_token.to_owned(), ..kept.clone() }));
            if let Some(Err(error)) = &kept {
                eprintln!("fileaccess: the upload can't be resumed later: {error}");
            }
            *token.lock().unwrap_or_else(PoisonError::into_inner) = Some(upload_token.to_owned());
            let resumable = matches!(kept, Some(Ok(())));
            let opened = Opened { token: upload_token.to_owned(), resumable };
            open.lock().unwrap_or_else(PoisonError::into_inner).push(opened);
        }
    }

    fn print(&self, key: &str, done: &Uploaded) {
        self.meter.aside(|| print(&self.ask.server, self.bucket, key, done));
    }

    /// The token of an earlier upload that is to be gone on with. Without
    /// `--resume`, or of a file that was changed since, or if other things are to be
    /// stored with it, it is given up: what is left of it would cost storage for
    /// nothing.
    async fn earlier(&self, source: &Source, stored: &str, state: Option<&State>) -> Option<String> {
        let state = state?;
        let kept = state.read()?;
        let why = if kept.size != source.size() || kept.modified != since_epoch(source.modified()) {
            ", because the file was changed since"
        } else if kept.stored != stored {
            ", because other things are to be stored with it now"
        } else if !self.ask.resume {
            "; --resume would have gone on with it"
        } else {
            return Some(kept.upload_token);
        };
        let tell = |text: String| self.meter.aside(|| eprintln!("fileaccess: `{source}`: {text}"));
        tell(format!("an earlier upload is given up{why}"));
        if let Err(error) = self.client.abort(&kept.upload_token).await {
            tell(format!("it could not be: {error}"));
        }
        state.clear();
        None
    }
}

/// Without the path, which the caller tells.
fn unnamed(error: Error) -> Failure {
    match error {
        Error::File { error, .. } => Failure::running(error),
        error => error.into(),
    }
}

fn print(server: &Server, bucket: &str, key: &str, done: &Uploaded) {
    let Uploaded { etag, size, checksum, parts_sent, parts_found, was_there } = done;
    server.print(
        || {
            json!({
                "bucket": bucket,
                "key": key,
                "size": size,
                "etag": etag,
                "checksum": checksum,
                "parts_sent": parts_sent,
                "parts_found": parts_found,
                "was_there": was_there,
            })
        },
        || {
            let parts = match (parts_sent, parts_found) {
                _ if *was_there => "  was there".to_owned(),
                (0, 0) => String::new(),
                (sent, 0) => format!("  {sent} parts"),
                (sent, found) => format!("  {sent} parts, {found} were there"),
            };
            format!("{bucket}/{}  {size} bytes  {checksum}{parts}", printable(key))
        },
    );
}
