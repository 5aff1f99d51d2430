//! `fileaccess get`, `ls`, `url` and `rm`.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::operate::time;
use super::service::Server;
use super::{Failure, shutdown_signal};
use crate::client::{Download, Downloaded, PARALLEL, Progress};
use crate::pb;
use crate::pb::presign_request::Operation;

/// How often lines tell how far it is where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// An object: `BUCKET/KEY`.
#[derive(Clone)]
pub(super) struct Object {
    pub(super) bucket: String,
    pub(super) key: String,
}

impl Object {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() => {
                Ok(Self { bucket: bucket.to_owned(), key: key.to_owned() })
            }
            _ => Err("must be a bucket, `/` and a key".to_owned()),
        }
    }
}

/// How many transfers run at once.
#[derive(Args)]
pub(super) struct Parallel {
    /// How many requests to S3 run at once: 1 to 64.
    #[arg(long, value_name = "N", default_value_t = PARALLEL, value_parser = parallel)]
    pub(super) parallel: usize,
}

fn parallel(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| "must be 1 to 64".to_owned())
}

/// What `fileaccess get` is told.
#[derive(Args)]
pub(super) struct Get {
    /// The object.
    #[arg(value_name = "BUCKET/KEY", value_parser = Object::parse)]
    object: Object,
    /// Where to: a file, a folder, or `-` for standard output. Without it: the
    /// last segment of the key, here.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Replace a file that is there.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    parallel: Parallel,
    #[command(flatten)]
    server: Server,
}

/// What `fileaccess ls` is told.
#[derive(Args)]
pub(super) struct Ls {
    /// The bucket, and the beginning of the keys.
    #[arg(value_name = "BUCKET/[PREFIX]")]
    prefix: String,
    /// All that is below, too.
    #[arg(long, short)]
    recursive: bool,
    #[command(flatten)]
    server: Server,
}

/// What `fileaccess url` is told.
#[derive(Args)]
pub(super) struct Url {
    /// The object, which need not exist.
    #[arg(value_name = "BUCKET/KEY", value_parser = Object::parse)]
    object: Object,
    /// A URL to upload with rather than to download from.
    #[arg(long)]
    upload: bool,
    /// How long it is to live. Without it: the service's default.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
    #[command(flatten)]
    server: Server,
}

/// What `fileaccess rm` is told.
#[derive(Args)]
pub(super) struct Rm {
    /// The objects.
    #[arg(value_name = "BUCKET/KEY", value_parser = Object::parse, required = true)]
    objects: Vec<Object>,
    #[command(flatten)]
    server: Server,
}

/// Shows how far it is, until it is dropped: a bar on a terminal, now and then a
/// line elsewhere.
pub(super) struct Meter(Shown);

#[derive(Clone)]
struct Shown {
    bar: ProgressBar,
    begun: Instant,
    /// When the next line is due, in milliseconds since then. 0: none is.
    due: Arc<AtomicU64>,
}

impl Meter {
    /// One for `what`, of `total` bytes.
    pub(super) fn new(what: &str, total: u64) -> Self {
        let is_bar = std::io::stderr().is_terminal();
        let target = if is_bar { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let what: String = printable(what).chars().take(24).collect();
        let bar = ProgressBar::with_draw_target(Some(total), target).with_message(what);
        let style = "{msg} [{wide_bar}] {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
        // The template is ours, and good.
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        let due = if is_bar { 0 } else { millis(LINE_EVERY) };
        Self(Shown { bar, begun: Instant::now(), due: Arc::new(AtomicU64::new(due)) })
    }

    /// One that shows nothing.
    pub(super) fn hidden() -> Self {
        Self(Shown { bar: ProgressBar::hidden(), begun: Instant::now(), due: Arc::default() })
    }

    /// What one transfer of several is to tell.
    pub(super) fn share(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let (shown, before) = (self.0.clone(), AtomicU64::new(0));
        move |progress| {
            let before = before.swap(progress.bytes, Ordering::Relaxed);
            if progress.bytes >= before {
                shown.bar.inc(progress.bytes - before);
            } else {
                shown.bar.dec(before - progress.bytes);
            }
            shown.line();
        }
    }

    /// What the only transfer is to tell, of which nobody knows the size before.
    fn all(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let (bar, share) = (self.0.bar.clone(), self.share());
        move |progress| {
            bar.set_length(progress.total);
            share(progress);
        }
    }

    /// Does `print` where no bar is in its way.
    pub(super) fn aside(&self, print: impl FnOnce()) {
        self.0.bar.suspend(print);
    }
}

impl Shown {
    fn line(&self) {
        let (now, due) = (millis(self.begun.elapsed()), self.due.load(Ordering::Relaxed));
        let next = now + millis(LINE_EVERY);
        if due == 0 || now < due || self.due.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        let (done, all) = (self.bar.position(), self.bar.length().unwrap_or_default());
        let rate = done.saturating_mul(1000) / now.max(1);
        let left = Duration::from_secs(all.saturating_sub(done) / rate.max(1));
        eprintln!(
            "{}: {done} of {all} bytes, {} MB/s, {} left",
            self.bar.message(),
            rate / 1_000_000,
            humantime::format_duration(left)
        );
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.0.bar.finish_and_clear();
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// `fileaccess get`.
///
/// # Errors
/// What the service or S3 answers, and a file that is there already.
pub(super) async fn get(ask: Get) -> Result<(), Failure> {
    let interrupted = shutdown_signal().map_err(Failure::running)?;
    let client = ask.server.connect()?.with_parallel(ask.parallel.parallel);
    let Object { bucket, key } = &ask.object;
    let target = target(&ask)?;
    // What is shown on the same terminal would get into it.
    let is_shown = target.is_some() || !std::io::stdout().is_terminal();
    let meter = if is_shown { Meter::new(key, 0) } else { Meter::hidden() };
    let download = Download { overwrite: ask.force, ..Download::of(bucket, key) }.on_progress(meter.all());
    let work = async {
        match &target {
            None => client.download_to(&download, std::io::stdout()).await,
            Some(target) => client.download(&download, target).await,
        }
    };
    let done = tokio::select! {
        done = work => done,
        () = interrupted => return Err(Failure::running("interrupted; nothing is left of the download")),
    };
    drop(meter);
    let Downloaded { size, checksum, etag } = done.map_err(|error| refused(error, target.as_deref()))?;
    if let Some(target) = target {
        let verified = checksum.clone().unwrap_or_else(|| "S3 has no checksum of it".to_owned());
        ask.server.print(
            || json!({ "file": target, "size": size, "etag": etag, "checksum": checksum }),
            || format!("{}  {size} bytes  {verified}", target.display()),
        );
    }
    Ok(())
}

fn refused(error: crate::client::Error, target: Option<&Path>) -> Failure {
    match (&error, target) {
        (crate::client::Error::File { error, .. }, Some(target))
            if error.kind() == std::io::ErrorKind::AlreadyExists =>
        {
            Failure::running(format!("`{}` exists; --force replaces it", target.display()))
        }
        _ => error.into(),
    }
}

/// The file; none is standard output.
fn target(ask: &Get) -> Result<Option<PathBuf>, Failure> {
    let key = &ask.object.key;
    let name = || match key.rsplit('/').next() {
        Some(name) if !matches!(name, "" | "." | "..") => Ok(name),
        _ => Err(Failure::usage(format!("`{key}` does not end in a file's name: name the file"))),
    };
    match &ask.file {
        None => Ok(Some(PathBuf::from(name()?))),
        Some(file) if file.as_os_str() == "-" => Ok(None),
        Some(folder) if folder.is_dir() => Ok(Some(folder.join(name()?))),
        Some(file) => Ok(Some(file.clone())),
    }
}

/// `fileaccess ls`.
///
/// # Errors
/// What the service answers.
pub(super) async fn ls(ask: Ls) -> Result<(), Failure> {
    let client = ask.server.connect()?;
    let (bucket, prefix) = ask.prefix.split_once('/').unwrap_or((&ask.prefix, ""));
    let delimiter = if ask.recursive { "" } else { "/" };
    let mut token = String::new();
    let mut out = std::io::stdout().lock();
    loop {
        let page = client.list(bucket, prefix, delimiter, &token).await?;
        let mut lines: Vec<(String, String)> = Vec::new();
        for folder in page.common_prefixes {
            let line = if ask.server.json {
                json!({ "prefix": folder }).to_string()
            } else {
                format!("{:>14}  {:<24}  {}", "-", "", printable(&folder))
            };
            lines.push((folder, line));
        }
        for object in page.objects {
            let at = time(object.last_modified);
            let line = if ask.server.json {
                json!({ "key": object.key, "size": object.size, "last_modified": at, "etag": object.etag }).to_string()
            } else {
                format!("{:>14}  {at:<24}  {}", object.size, printable(&object.key))
            };
            lines.push((object.key, line));
        }
        // As S3 has them in one order.
        lines.sort();
        for (_, line) in lines {
            match writeln!(out, "{line}") {
                // `ls | head`
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                written => written.map_err(Failure::running)?,
            }
        }
        if page.next_page_token.is_empty() {
            return Ok(());
        }
        token = page.next_page_token;
    }
}

/// A key, without what would move a terminal's cursor.
fn printable(key: &str) -> String {
    key.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// `fileaccess url`.
///
/// # Errors
/// What the service answers.
pub(super) async fn url(ask: Url) -> Result<(), Failure> {
    let operation = if ask.upload {
        Operation::Upload(pb::Upload::default())
    } else {
        Operation::Download(pb::Download::default())
    };
    let signed = ask.server.connect()?.presign(&ask.object.bucket, &ask.object.key, ask.ttl, operation).await?;
    ask.server.print(
        || {
            json!({
                "method": signed.method,
                "url": signed.url,
                "headers": signed.headers,
                "expires_at": time(signed.expires_at),
                "issue_id": signed.issue_id,
            })
        },
        || signed.url.clone(),
    );
    Ok(())
}

/// `fileaccess rm`.
///
/// # Errors
/// What the service or S3 answers, for the first object that is not removed.
pub(super) async fn rm(ask: Rm) -> Result<(), Failure> {
    let client = ask.server.connect()?;
    for Object { bucket, key } in &ask.objects {
        client.delete(bucket, key).await.map_err(|e| Failure::running(format!("`{bucket}/{key}`: {e}")))?;
        ask.server.print(|| json!({ "removed": format!("{bucket}/{key}") }), || format!("removed {bucket}/{key}"));
    }
    Ok(())
}
