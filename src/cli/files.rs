//! `fileaccess get`, `ls`, `url` and `rm`.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, future, stream};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::folder::Together;
use super::operate::time;
use super::service::Server;
use super::{Failure, folder, shutdown_signal};
use crate::client::{Client, Download, Downloaded, Error, PARALLEL, Progress, printable};
use crate::object::Lifetime;
use crate::pb;
use crate::pb::presign_request::Operation;

/// How often lines tell how far it is where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

const MUST_OBJECT: &str = "must be a bucket, `/` and a key";

/// An object: `BUCKET/KEY`.
#[derive(Clone)]
pub(super) struct Object {
    pub(super) bucket: String,
    pub(super) key: String,
}

impl Object {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        Self::or_prefix(text).ok().filter(|object| !object.key.is_empty()).ok_or_else(|| MUST_OBJECT.to_owned())
    }

    /// It may be a prefix, and an empty one.
    fn or_prefix(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((bucket, key)) if !bucket.is_empty() => Ok(Self { bucket: bucket.to_owned(), key: key.to_owned() }),
            _ => Err(MUST_OBJECT.to_owned()),
        }
    }

    /// Whether it is what the command asks for: one object, or all below a prefix.
    fn is_for(&self, recursive: bool) -> Result<(), Failure> {
        let name = printable(&self.to_string());
        match &*self.key {
            "" if !recursive => Err(Failure::usage(format!("`{name}` {MUST_OBJECT}"))),
            key if recursive && !is_folder(key) => {
                Err(Failure::usage(format!("`{name}` is one key: with --recursive it must end in `/`")))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.bucket, self.key)
    }
}

/// Whether keys can be put below it.
pub(super) fn is_folder(prefix: &str) -> bool {
    prefix.is_empty() || prefix.ends_with('/')
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
    /// The object, or with --recursive what all keys begin with.
    #[arg(value_name = "BUCKET/KEY", value_parser = Object::or_prefix)]
    object: Object,
    /// Where to: a file, a folder, or `-` for standard output. Without it: the
    /// last segment of the key, here. With --recursive: a folder, which is made.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// All that is below `BUCKET/PREFIX/`, as files of the same paths below the
    /// folder. Nothing is written if a key is no path below it.
    #[arg(long, short)]
    recursive: bool,
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
    /// How long it is to live, as `90s` or `1h`: 1 second to 7 days. Without it:
    /// the service's default.
    #[arg(long, value_name = "DURATION", value_parser = ttl)]
    ttl: Option<Lifetime>,
    #[command(flatten)]
    server: Server,
}

fn ttl(text: &str) -> Result<Lifetime, String> {
    let must = || format!("must {}", Lifetime::WANT);
    humantime::parse_duration(text).ok().and_then(Lifetime::new).ok_or_else(must)
}

/// What `fileaccess rm` is told.
#[derive(Args)]
pub(super) struct Rm {
    /// The objects, or with --recursive what all keys begin with.
    #[arg(value_name = "BUCKET/KEY", value_parser = Object::or_prefix, required = true)]
    objects: Vec<Object>,
    /// All that is below `BUCKET/PREFIX/`.
    #[arg(long, short)]
    recursive: bool,
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
    /// How many files there are, if there are several.
    files: Option<u64>,
    /// How many of them are done with.
    files_done: Arc<AtomicU64>,
}

impl Meter {
    /// One for `what`, of `total` bytes.
    pub(super) fn new(what: &str, total: u64) -> Self {
        let is_bar = io::stderr().is_terminal();
        let target = if is_bar { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let what: String = printable(what).chars().take(24).collect();
        let bar = ProgressBar::with_draw_target(Some(total), target).with_message(what);
        let style = "{msg} [{wide_bar}] {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
        // The template is ours, and good.
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        let due = if is_bar { 0 } else { millis(LINE_EVERY) };
        let due = Arc::new(AtomicU64::new(due));
        Self(Shown { bar, begun: Instant::now(), due, files: None, files_done: Arc::default() })
    }

    /// One for so many files, of `total` bytes together.
    pub(super) fn of_files(files: u64, total: u64) -> Self {
        let mut meter = Self::new(&format!("0 of {files} files"), total);
        meter.0.files = Some(files);
        meter
    }

    /// One that shows nothing.
    pub(super) fn hidden() -> Self {
        let (bar, due) = (ProgressBar::hidden(), Arc::default());
        Self(Shown { bar, begun: Instant::now(), due, files: None, files_done: Arc::default() })
    }

    /// A file of several is done with.
    fn next_file(&self) {
        if let Some(files) = self.0.files {
            let done = self.0.files_done.fetch_add(1, Ordering::Relaxed) + 1;
            self.0.bar.set_message(format!("{done} of {files} files"));
        }
    }

    /// So many bytes will not come.
    pub(super) fn less(&self, bytes: u64) {
        let length = self.0.bar.length().unwrap_or_default();
        self.0.bar.set_length(length.saturating_sub(bytes).max(self.0.bar.position()));
    }

    /// Has all of `work` done, and tells each that fails, unless there is but one.
    /// The others go on, if they can.
    pub(super) async fn see(
        &self,
        work: impl Stream<Item = Result<(), Failure>>,
        several: bool,
    ) -> Result<(), Failure> {
        let mut work = pin!(work);
        let (mut all, mut failed) = (0_u64, 0_u64);
        while let Some(done) = work.next().await {
            all += 1;
            if let Err(failure) = done {
                if failure.is_last || !several {
                    return Err(failure);
                }
                failed += 1;
                self.aside(|| eprintln!("fileaccess: {failure}"));
            }
            self.next_file();
        }
        if failed > 0 { Err(Failure::running(format!("{failed} of {all} failed"))) } else { Ok(()) }
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
            // A file has grown since it was counted.
            if shown.bar.length().is_some_and(|length| length < shown.bar.position()) {
                shown.bar.set_length(shown.bar.position());
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
        eprintln!("{}", self.text(now));
    }

    /// How far it is after so many milliseconds.
    fn text(&self, now: u64) -> String {
        let (done, all) = (self.bar.position(), self.bar.length().unwrap_or_default());
        let so_far = format!("{}: {done} of {all} bytes", self.bar.message());
        let rate = done.saturating_mul(1000) / now.max(1);
        if rate == 0 {
            // Nobody knows.
            return so_far;
        }
        let left = humantime::format_duration(Duration::from_secs(all.saturating_sub(done) / rate));
        let rate = match rate {
            1_000_000.. => format!("{} MB/s", rate / 1_000_000),
            1000.. => format!("{} KB/s", rate / 1000),
            _ => format!("{rate} B/s"),
        };
        format!("{so_far}, {rate}, {left} left")
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
    ask.object.is_for(ask.recursive)?;
    let client = ask.server.connect()?.with_parallel(ask.parallel.parallel);
    if ask.recursive {
        let may_be = |folder: &PathBuf| folder.as_os_str() != "-" && (folder.is_dir() || !folder.exists());
        let folder = ask.file.as_ref().filter(|folder| may_be(folder));
        let folder = folder.ok_or_else(|| Failure::usage("--recursive needs a folder to write to"))?;
        return tokio::select! {
            done = get_all(&ask, &client, folder) => done,
            () = interrupted => {
                Err(Failure::running("interrupted; nothing is left of the files that were not complete"))
            }
        };
    }
    let Object { bucket, key } = &ask.object;
    let target = target(&ask)?;
    // What is shown on the same terminal would get into it.
    let is_shown = target.is_some() || !io::stdout().is_terminal();
    let meter = if is_shown { Meter::new(key, 0) } else { Meter::hidden() };
    let download = Download { overwrite: ask.force, ..Download::of(bucket, key) }.on_progress(meter.all());
    let work = async {
        match &target {
            None => client.download_to(&download, io::stdout()).await,
            Some(target) => client.download(&download, target).await,
        }
    };
    let done = tokio::select! {
        done = work => done,
        () = interrupted => return Err(Failure::running("interrupted; nothing is left of the download")),
    };
    drop(meter);
    let done = done.map_err(|error| refused(error, &ask.object, target.as_deref()))?;
    if let Some(target) = target {
        print(&ask.server, &target, &done);
    }
    Ok(())
}

fn print(server: &Server, target: &Path, done: &Downloaded) {
    let Downloaded { size, checksum, etag } = done;
    server.print(
        || json!({ "file": target, "size": size, "etag": etag, "checksum": checksum }),
        || {
            // It may have one of the parts' checksums, of parts that nobody here knows.
            let verified = checksum.as_deref().unwrap_or("only the size was verified: S3 has no checksum of the whole");
            format!("{}  {size} bytes  {verified}", shown(target))
        },
    );
}

/// All objects below a prefix, in the order of their keys.
fn below(client: &Client, at: &Object) -> impl Stream<Item = Result<pb::ObjectEntry, Failure>> {
    let pages = stream::try_unfold(Some(String::new()), move |token| async move {
        let Some(token) = token else { return Ok::<_, Failure>(None) };
        let page = client.list(&at.bucket, &at.key, "", &token).await?;
        let next = Some(page.next_page_token).filter(|token| !token.is_empty());
        Ok(Some((stream::iter(page.objects.into_iter().map(Ok)), next)))
    });
    pages.try_flatten()
}

/// What stands for a folder where there are none: consoles make them.
fn is_mark(object: &pb::ObjectEntry) -> bool {
    object.size == 0 && object.key.ends_with('/')
}

/// Looks at all keys before it writes anything, and then lists them again rather
/// than to keep them.
async fn get_all(ask: &Get, client: &Client, folder: &Path) -> Result<(), Failure> {
    let at = &ask.object;
    // What a listing gives begins with what it was asked for.
    let below_at = |key: &str| key.strip_prefix(&at.key).unwrap_or_default().to_owned();
    let (mut together, mut count, mut bytes, mut wrong) = (Together::default(), 0, 0, 0);
    let mut listed = pin!(below(client, at));
    while let Some(object) = listed.try_next().await? {
        if is_mark(&object) {
            continue;
        }
        count += 1;
        bytes += u64::try_from(object.size).unwrap_or_default();
        if let Err(why) = together.take(&below_at(&object.key)) {
            wrong += 1;
            let key = printable(&object.key);
            eprintln!("fileaccess: `{}/{key}` can't be a file in `{}`: {why}", at.bucket, shown(folder));
        }
    }
    if wrong > 0 {
        return Err(Failure::running(format!("{wrong} of {count} keys can't be files; nothing was written")));
    }
    if count == 0 {
        return Err(Failure::running(format!("there is nothing below `{at}`")));
    }
    let meter = Meter::of_files(count, bytes);
    let get = |object: Result<pb::ObjectEntry, Failure>| {
        let meter = &meter;
        async move {
            // Without the list there are no others.
            let object = object.map_err(|failure| Failure { is_last: true, ..failure })?;
            let key = below_at(&object.key);
            let name = format!("{}/{}", at.bucket, printable(&object.key));
            let failed = |why: &dyn fmt::Display| Failure::running(format!("`{name}`: {why}"));
            // Once more: it may have come in between.
            let target = folder.join(folder::path(&key).map_err(|why| failed(&why))?);
            let tell = Arc::new(meter.share());
            let download = Download::of(&at.bucket, &object.key);
            let download = Download { overwrite: ask.force, progress: Some(tell.clone()), ..download };
            let done = async {
                if let Some(folder) = target.parent() {
                    let failed = |e| Failure::running(format!("`{}`: {e}", shown(folder)));
                    std::fs::create_dir_all(folder).map_err(failed)?;
                }
                let done = client.download(&download, &target).await;
                let object = Object { bucket: at.bucket.clone(), key: object.key.clone() };
                done.map_err(|error| refused(error, &object, Some(&target)).of(&name))
            };
            match done.await {
                Ok(done) => meter.aside(|| print(&ask.server, &target, &done)),
                Err(failure) => {
                    tell(Progress { bytes: 0, total: 0 });
                    meter.less(u64::try_from(object.size).unwrap_or_default());
                    return Err(failure);
                }
            }
            Ok(())
        }
    };
    let objects = below(client, at).filter(|object| future::ready(!object.as_ref().is_ok_and(is_mark)));
    meter.see(objects.map(get).buffer_unordered(ask.parallel.parallel), true).await
}

/// What would be right instead, of what can't be written to.
fn refused(error: Error, object: &Object, target: Option<&Path>) -> Failure {
    let Error::File { error: why, .. } = &error else { return error.into() };
    let Some(target) = target else { return Failure::running(format!("standard output: {why}")) };
    let name = shown(target);
    match why.kind() {
        io::ErrorKind::AlreadyExists => Failure::running(format!("`{name}` exists; --force replaces it")),
        io::ErrorKind::InvalidInput if target.is_dir() => {
            Failure::running(format!("`{name}` is a folder: it must be a file, or not be there"))
        }
        io::ErrorKind::InvalidInput => {
            let object = printable(&object.to_string());
            Failure::running(format!(
                "`{name}` must be a regular file, or not be there: `get {object} - > {name}` writes to it"
            ))
        }
        _ => error.into(),
    }
}

/// A path, for people.
pub(super) fn shown(path: &Path) -> String {
    printable(&path.display().to_string())
}

/// The file; none is standard output.
fn target(ask: &Get) -> Result<Option<PathBuf>, Failure> {
    let key = &ask.object.key;
    let name = || match key.rsplit('/').next() {
        Some(name) if !matches!(name, "" | "." | "..") => Ok(name),
        _ => Err(Failure::usage(format!("`{}` does not end in a file's name: name the file", printable(key)))),
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
    let mut out = io::stdout().lock();
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
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                written => written.map_err(Failure::running)?,
            }
        }
        if page.next_page_token.is_empty() {
            return Ok(());
        }
        token = page.next_page_token;
    }
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
    let (client, Object { bucket, key }) = (ask.server.connect()?, &ask.object);
    let ttl = ask.ttl.map(Duration::from);
    let signed = client.persist(|| client.presign(bucket, key, ttl, operation.clone())).await?;
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
/// What the service or S3 answers, for each object that is not removed.
pub(super) async fn rm(ask: Rm) -> Result<(), Failure> {
    ask.objects.iter().try_for_each(|object| object.is_for(ask.recursive))?;
    let client = &ask.server.connect()?;
    let objects = stream::iter(&ask.objects).flat_map(|at| {
        if !ask.recursive {
            return stream::once(future::ready(Ok(at.clone()))).left_stream();
        }
        let object = |object: pb::ObjectEntry| Object { bucket: at.bucket.clone(), key: object.key };
        // What can't be listed is one failure, and the end of this prefix.
        below(client, at).map_ok(object).map_err(|failure| failure.of(&at.to_string())).right_stream()
    });
    let removed = objects.map(|object| async {
        let object = object?;
        let done = client.delete(&object.bucket, &object.key).await;
        done.map_err(|error| Failure::from(error).of(&object.to_string()))?;
        Ok(object)
    });
    let removed = removed.buffered(PARALLEL).map_ok(|object| {
        let name = object.to_string();
        ask.server.print(|| json!({ "removed": name }), || format!("removed {}", printable(&name)));
    });
    Meter::hidden().see(removed, ask.recursive || ask.objects.len() > 1).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_what_is_done_of_what_is_to_come() {
        let meter = Meter::hidden();
        let meter = Meter(Shown { files: Some(3), ..meter.0.clone() });
        meter.0.bar.set_length(30_000_000);
        meter.0.bar.set_message("0 of 3 files");
        let line = || meter.0.text(2000);
        assert_eq!(line(), "0 of 3 files: 0 of 30000000 bytes");
        let (one, two) = (meter.share(), meter.share());
        let at = |bytes| Progress { bytes, total: 0 };
        one(at(10_000_000));
        two(at(4_000_000));
        meter.next_file();
        assert_eq!(line(), "1 of 3 files: 14000000 of 30000000 bytes, 7 MB/s, 2s left");
        // It fails: what was sent of it is none of the rest.
        two(at(0));
        meter.less(10_000_000);
        meter.next_file();
        assert_eq!(line(), "2 of 3 files: 10000000 of 20000000 bytes, 5 MB/s, 2s left");
        // The third has grown.
        meter.share()(at(15_000_000));
        meter.next_file();
        assert_eq!(line(), "3 of 3 files: 25000000 of 25000000 bytes, 12 MB/s, 0s left");
        // A slow one.
        for (ms, rate) in [(25_100, "996 KB/s"), (25_000_000, "1 KB/s"), (25_100_000, "996 B/s")] {
            let line = meter.0.text(ms);
            assert!(line.ends_with(&format!(" bytes, {rate}, 0s left")), "{line}");
        }
    }
}
