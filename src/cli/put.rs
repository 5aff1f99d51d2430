//! `fileaccess put`: files into S3, and what is left of an earlier attempt.

use std::io::{self, Seek as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use clap::Args;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tonic::Code;

use super::files::{Meter, Parallel};
use super::service::Server;
use super::{Failure, shutdown_signal};
use crate::client::{Client, Error, Source, Upload, Uploaded};

/// What `fileaccess put` is told.
#[derive(Args)]
pub(super) struct Put {
    /// The files, and where to: `BUCKET/PREFIX/` keeps their names, `BUCKET/KEY`
    /// is for one file. `-` is standard input, which is kept in a temporary file
    /// (TMPDIR says where) until its size is known.
    #[arg(value_names = ["FILE", "BUCKET/[PREFIX/]"], num_args = 2.., required = true)]
    files_and_target: Vec<PathBuf>,
    /// Go on with what an earlier `put` of the same file to the same key has left.
    #[arg(long)]
    resume: bool,
    /// The media type of all of them.
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// Refuse to overwrite.
    #[arg(long)]
    create_only: bool,
    #[command(flatten)]
    parallel: Parallel,
    #[command(flatten)]
    server: Server,
}

/// One file of several.
struct File {
    source: Source,
    /// `None` is standard input.
    path: Option<PathBuf>,
    bucket: String,
    key: String,
}

/// What is kept of an upload until it is done.
#[derive(Serialize, Deserialize)]
struct Kept {
    bucket: String,
    key: String,
    file: PathBuf,
    size: u64,
    modified: Option<Duration>,
    upload_token: String,
}

/// Where it is kept.
struct State {
    path: PathBuf,
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
    fn of(server: &str, file: &Path, bucket: &str, key: &str) -> Option<Self> {
        let folder = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
        let folder = folder.or_else(home)?.join("fileaccess/uploads");
        let file = file.canonicalize().ok()?;
        let mut digest = Sha256::new();
        for part in [server.as_bytes(), file.as_os_str().as_encoded_bytes(), bucket.as_bytes(), key.as_bytes()] {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        let name = digest.finalize()[..16].iter().fold(String::new(), |name, byte| format!("{name}{byte:02x}"));
        Some(Self { path: folder.join(name + ".json") })
    }

    fn read(&self) -> Option<Kept> {
        serde_json::from_slice(&std::fs::read(&self.path).ok()?).ok()
    }

    /// Only we may read it: the token is good for the upload.
    fn write(&self, kept: &Kept) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&file, kept)?;
        file.persist(&self.path).map_err(|e| e.error)?;
        Ok(())
    }

    fn remove(&self) {
        // It may have been there never.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn since_epoch(time: Option<SystemTime>) -> Option<Duration> {
    time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
}

/// `fileaccess put`.
///
/// # Errors
/// What the service or S3 answers, for the first file that fails.
pub(super) async fn run(ask: Put) -> Result<(), Failure> {
    let interrupted = shutdown_signal().map_err(Failure::running)?;
    let client = ask.server.connect()?.with_parallel(ask.parallel.parallel);
    let open = Open::default();
    let result = tokio::select! {
        result = work(&ask, &client, &open) => result,
        () = interrupted => Err(Failure::running("interrupted")),
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
        if resumable {
            failure.message.push_str("; the same command with --resume goes on with it");
        }
        failure
    })
}

async fn work(ask: &Put, client: &Client, open: &Open) -> Result<(), Failure> {
    let files = files(ask).await?;
    let what = match &files[..] {
        [file] => file.source.to_string(),
        files => format!("{} files", files.len()),
    };
    let meter = Meter::new(&what, files.iter().map(|file| file.source.size()).sum());
    stream::iter(files)
        .map(|file| put(ask, client, open, file, &meter))
        .buffer_unordered(ask.parallel.parallel)
        .try_collect()
        .await
}

/// Opens all before the first byte goes out.
async fn files(ask: &Put) -> Result<Vec<File>, Failure> {
    let (target, files) = ask.files_and_target.split_last().ok_or_else(|| Failure::usage("no files"))?;
    let target = target.to_str().ok_or_else(|| Failure::usage("the target must be UTF-8"))?;
    let (bucket, prefix) = target.split_once('/').unwrap_or((target, ""));
    let is_folder = prefix.is_empty() || prefix.ends_with('/');
    if !is_folder && files.len() > 1 {
        return Err(Failure::usage(format!("`{target}` is one key: end it in `/` for several files")));
    }
    let mut opened = Vec::with_capacity(files.len());
    for path in files {
        let is_stdin = path.as_os_str() == "-";
        let name = path.file_name().and_then(|name| name.to_str()).filter(|_| !is_stdin);
        let key = match name {
            _ if !is_folder => prefix.to_owned(),
            Some(name) => format!("{prefix}{name}"),
            None if is_stdin => return Err(Failure::usage("standard input has no name: the target must be a key")),
            None => return Err(Failure::usage(format!("`{}` has no name in UTF-8", path.display()))),
        };
        let (source, path) = if is_stdin { (spool().await?, None) } else { (Source::open(path)?, Some(path.clone())) };
        opened.push(File { source, path, bucket: bucket.to_owned(), key });
    }
    let mut keys: Vec<_> = opened.iter().map(|file| &file.key).collect();
    keys.sort();
    if let Some([twice, _]) = keys.array_windows().find(|[a, b]| a == b) {
        return Err(Failure::usage(format!("two files would be `{twice}`")));
    }
    Ok(opened)
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

async fn put(ask: &Put, client: &Client, open: &Open, file: File, meter: &Meter) -> Result<(), Failure> {
    let File { source, path, bucket, key } = file;
    let source = Arc::new(source);
    let name = source.to_string();
    let state = path.as_ref().and_then(|path| State::of(&ask.server.server, path, &bucket, &key)).map(Arc::new);
    let resume = earlier(ask, client, &source, state.as_deref()).await;
    let token = Arc::new(Mutex::new(resume.clone()));
    let started = {
        let (open, token, state) = (Arc::clone(open), Arc::clone(&token), state.clone());
        let (size, modified) = (source.size(), since_epoch(source.modified()));
        let kept = path.as_ref().and_then(|path| path.canonicalize().ok());
        let (bucket, key) = (bucket.clone(), key.clone());
        move |upload_token: &str| {
            let kept = kept.clone().zip(state.as_ref()).map(|(file, state)| {
                let (bucket, key, upload_token) = (bucket.clone(), key.clone(), upload_token.to_owned());
                state.write(&Kept { bucket, key, file, size, modified, upload_token })
            });
            if let Some(Err(error)) = &kept {
                eprintln!("fileaccess: the upload can't be resumed later: {error}");
            }
            *token.lock().unwrap_or_else(PoisonError::into_inner) = Some(upload_token.to_owned());
            let resumable = matches!(kept, Some(Ok(())));
            let opened = Opened { token: upload_token.to_owned(), resumable };
            open.lock().unwrap_or_else(PoisonError::into_inner).push(opened);
        }
    };
    let upload = Upload {
        content_type: ask.content_type.clone(),
        create_only: ask.create_only,
        resume,
        ..Upload::to(&bucket, &key)
    };
    let upload = upload.on_progress(meter.share()).on_start(started);
    let mut done = client.upload(Arc::clone(&source), upload.clone()).await;
    if upload.resume.is_some()
        && let Err(error) = &done
        && error.is_final()
        && error.code().is_some_and(|code| code != Code::AlreadyExists)
    {
        eprintln!("fileaccess: `{name}`: the earlier upload can't be gone on with: {error}");
        // Whatever is open of it is given up in the end.
        open.lock().unwrap_or_else(PoisonError::into_inner).iter_mut().for_each(|opened| {
            opened.resumable &= Some(&opened.token) != upload.resume.as_ref();
        });
        done = client.upload(source, Upload { resume: None, ..upload }).await;
    }
    let token = token.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(token) = token
        && done.as_ref().err().is_none_or(Error::is_final)
    {
        if let Some(state) = &state {
            state.remove();
        }
        open.lock().unwrap_or_else(PoisonError::into_inner).retain_mut(|opened| {
            // What can't be gone on with is given up by whoever clears up.
            opened.resumable &= opened.token != token;
            done.is_err() || opened.token != token
        });
    }
    let done = done.map_err(|error| Failure { message: format!("`{name}`: {error}"), ..Failure::from(error) })?;
    meter.aside(|| print(&ask.server, &bucket, &key, &done));
    Ok(())
}

fn print(server: &Server, bucket: &str, key: &str, done: &Uploaded) {
    let Uploaded { etag, size, checksum, parts_sent, parts_found } = done;
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
            })
        },
        || {
            let parts = match (parts_sent, parts_found) {
                (0, 0) => String::new(),
                (sent, 0) => format!("  {sent} parts"),
                (sent, found) => format!("  {sent} parts, {found} were there"),
            };
            format!("{bucket}/{key}  {size} bytes  {checksum}{parts}")
        },
    );
}

/// The token of an earlier upload that is to be gone on with. Without
/// `--resume`, or of a file that was changed since, it is given up: what is left
/// of it would cost storage for nothing.
async fn earlier(ask: &Put, client: &Client, source: &Source, state: Option<&State>) -> Option<String> {
    let state = state?;
    let kept = state.read()?;
    let is_same = kept.size == source.size() && kept.modified == since_epoch(source.modified());
    if ask.resume && is_same {
        return Some(kept.upload_token);
    }
    let why = if is_same { "; --resume would have gone on with it" } else { ", because the file was changed since" };
    eprintln!("fileaccess: `{source}`: an earlier upload is given up{why}");
    if let Err(error) = client.abort(&kept.upload_token).await {
        eprintln!("fileaccess: `{source}`: it could not be: {error}");
    }
    state.remove();
    None
}
