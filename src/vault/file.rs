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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::contract;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn a_file_keeps_the_contract() {
        let folder = tempfile::tempdir().unwrap();
        let count = std::cell::Cell::new(0);
        let pair = || {
            count.set(count.get() + 1);
            let path = folder.path().join(format!("{}.json", count.get()));
            [Box::new(FileVault::new(&path)) as Box<dyn Vault>, Box::new(FileVault::new(&path))]
        };
        contract::vault(pair).await;
        contract::one_of_two_rotations_wins(pair).await;
    }

    #[tokio::test]
    async fn a_file_that_others_could_read_or_swap_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vault.json");
        let vault = FileVault::new(&path);
        vault.stage(&contract::id('a'), &contract::key('a')).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(with_suffix(&path, ".lock")).unwrap().mode() & 0o7777, 0o600);

        for mode in [0o640, 0o604, 0o620, 0o700] {
            set_mode(&path, mode);
            assert!(matches!(vault.read().await, Err(VaultError::Refused(_))), "{mode:o}");
            assert!(matches!(vault.unstage(&contract::id('a')).await, Err(VaultError::Refused(_))), "{mode:o}");
        }
        set_mode(&path, 0o600);
        assert!(vault.read().await.unwrap().pending.is_some());

        let link = folder.path().join("link.json");
        symlink(&path, &link).unwrap();
        let read = FileVault::new(&link).read().await;
        assert!(matches!(read, Err(VaultError::Refused(_))), "{read:?}");
        let read = FileVault::new(folder.path()).read().await;
        assert!(matches!(read, Err(VaultError::Refused(_))), "{read:?}");
        // As root, anybody's file can be opened: its owner must still be us.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            assert!(matches!(vault.read().await, Err(VaultError::Refused(_))));
        }
    }

    #[tokio::test]
    async fn a_broken_file_is_corrupt_at_every_length_and_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vault.json");
        let vault = FileVault::new(&path);
        vault.stage(&contract::id('a'), &contract::key('a')).await.unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = vault.read().await.unwrap_err();
            assert!(matches!(error, VaultError::Corrupt(_)), "{length}: {error}");
            contract::hides_secrets(&error);
        }
        let secret_in_a_wrong_place = format!("{{\"current\": \"{}\"}}", contract::key('a').secret_access_key());
        fs::write(&path, &secret_in_a_wrong_place).unwrap();
        let error = vault.stage(&contract::id('b'), &contract::key('b')).await.unwrap_err();
        assert!(matches!(error, VaultError::Corrupt(_)), "{error}");
        contract::hides_secrets(&error);
        assert_eq!(fs::read_to_string(&path).unwrap(), secret_in_a_wrong_place);
    }

    #[tokio::test]
    async fn a_crash_before_the_rename_is_harmless_and_a_missing_folder_is_no_new_vault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vault.json");
        let vault = FileVault::new(&path);
        fs::write(with_suffix(&path, ".new"), "half of").unwrap();
        assert_eq!(vault.read().await, Ok(Held::default()));
        vault.stage(&contract::id('a'), &contract::key('a')).await.unwrap();
        assert!(!with_suffix(&path, ".new").exists());

        let vault = FileVault::new(folder.path().join("missing/vault.json"));
        assert!(matches!(vault.read().await, Err(VaultError::Unavailable(_))));
        let staged = vault.stage(&contract::id('a'), &contract::key('a')).await;
        assert!(matches!(staged, Err(VaultError::Unavailable(_))), "{staged:?}");
    }
}
