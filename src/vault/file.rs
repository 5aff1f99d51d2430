//! A vault in a file: for one machine. The file is replaced as a whole, and
//! only its owner may read it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use aws_credential_types::Credentials;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Held, KeyJson, Vault, VaultError, Version, to_json, unreadable};

/// A vault in a file of its own, with its lock beside it (`FILE.lock`).
#[derive(Clone, Debug)]
pub struct FileVault {
    path: PathBuf,
}

impl FileVault {
    /// The vault in `path`, which is made when the first key is staged. Its
    /// folder must be there. Opens nothing yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Runs `change` on what the file holds, as the only one at a time among
    /// all processes, and writes down what became of it.
    async fn update<F>(&self, change: F) -> Result<(), VaultError>
    where
        F: FnOnce(&mut Held) -> Result<(), VaultError> + Send + 'static,
    {
        let path = self.path.clone();
        blocking(move || {
            let lock = open(OpenOptions::new().create(true).truncate(false).write(true), &with_suffix(&path, ".lock"))
                .map_err(|e| failed(&path, &e))?;
            lock.lock().map_err(|e| failed(&path, &e))?;
            let had = load(&path)?;
            let mut held = had.clone();
            change(&mut held)?;
            if held == had { Ok(()) } else { save(&path, held) }
        })
        .await
    }
}

#[tonic::async_trait]
impl Vault for FileVault {
    async fn read(&self) -> Result<Held, VaultError> {
        let path = self.path.clone();
        blocking(move || load(&path)).await
    }

    async fn stage(&self, id: &str, key: &Credentials) -> Result<(), VaultError> {
        let (id, key) = (id.to_owned(), key.clone());
        self.update(move |held| held.stage(&id, &key)).await
    }

    async fn promote(&self, from: Option<&str>, to: &str) -> Result<(), VaultError> {
        let (from, to) = (from.map(str::to_owned), to.to_owned());
        self.update(move |held| held.promote(from.as_deref(), &to)).await
    }

    async fn unstage(&self, id: &str) -> Result<(), VaultError> {
        let id = id.to_owned();
        self.update(move |held| {
            held.unstage(&id);
            Ok(())
        })
        .await
    }
}

async fn blocking<T, F>(work: F) -> Result<T, VaultError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, VaultError> + Send + 'static,
{
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|_| Err(VaultError::Unavailable("the work on the file was broken off".into())))
}

/// The file's content.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    current: Option<VersionJson>,
    pending: Option<VersionJson>,
    previous: Option<VersionJson>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionJson {
    id: String,
    key: KeyJson,
}

impl From<VersionJson> for Version {
    fn from(json: VersionJson) -> Self {
        json.key.into_version(json.id)
    }
}

impl From<Version> for VersionJson {
    fn from(version: Version) -> Self {
        Self { key: KeyJson::new(&version.key, version.retired), id: version.id }
    }
}

/// What the file holds. Needs no lock: the file is only ever replaced.
fn load(path: &Path) -> Result<Held, VaultError> {
    let mut file = match open(OpenOptions::new().read(true), path) {
        // A missing folder is one that isn't mounted, rather than a new vault.
        Err(e) if e.kind() == io::ErrorKind::NotFound && folder(path).is_dir() => return Ok(Held::default()),
        opened => opened.map_err(|e| failed(path, &e))?,
    };
    let facts = file.metadata().map_err(|e| failed(path, &e))?;
    check(path, &facts)?;
    // One byte more than there is to read: reading must not move the buffer
    // and leave copies of secrets.
    let size = usize::try_from(facts.len()).unwrap_or_default() + 1;
    let mut text = Zeroizing::new(Vec::with_capacity(size));
    file.read_to_end(&mut text).map_err(|e| failed(path, &e))?;
    let content: Content = serde_json::from_slice(&text).map_err(|e| unreadable(&e))?;
    Ok(Held {
        current: content.current.map(Version::from),
        pending: content.pending.map(Version::from),
        previous: content.previous.map(Version::from),
    })
}

/// Refuses a file that others can read, or can have written.
fn check(path: &Path, facts: &fs::Metadata) -> Result<(), VaultError> {
    let refused = |why: String| Err(VaultError::Refused(format!("`{}` {why}", path.display())));
    if !facts.is_file() {
        return refused("is no regular file".into());
    }
    if facts.uid() != rustix::process::geteuid().as_raw() {
        return refused(format!("belongs to the user {}, not to this process's", facts.uid()));
    }
    if facts.mode() & 0o177 != 0 {
        return refused(format!("has the mode {:04o}; only 0600 keeps it secret", facts.mode() & 0o7777));
    }
    Ok(())
}

/// Replaces the file.
///
/// INVARIANT: the caller holds the lock. At every moment, a crash included, the
/// path names a whole file, the old one or the new.
fn save(path: &Path, held: Held) -> Result<(), VaultError> {
    let content = Content {
        current: held.current.map(VersionJson::from),
        pending: held.pending.map(VersionJson::from),
        previous: held.previous.map(VersionJson::from),
    };
    let json = to_json(&content)?;
    let new = with_suffix(path, ".new");
    let replace = || -> io::Result<()> {
        match fs::remove_file(&new) {
            // Left by a crash.
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        let mut file = open(OpenOptions::new().create_new(true).write(true), &new)?;
        file.write_all(&json)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        // Else the rename itself could be lost with the power.
        File::open(folder(path))?.sync_all()
    };
    replace().map_err(|e| failed(path, &e))
}

/// Opens `path`, for its owner alone if it is new, and never through a link.
/// Does not wait for the other end of a pipe.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    options.mode(0o600).custom_flags(flags.cast_signed()).open(path)
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn failed(path: &Path, error: &io::Error) -> VaultError {
    let detail = format!("`{}`: {error}", path.display());
    let is_link = Errno::from_io_error(error) == Some(Errno::LOOP);
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => VaultError::Refused(detail),
        _ if is_link => VaultError::Refused(detail),
        _ => VaultError::Unavailable(detail),
    }
}
