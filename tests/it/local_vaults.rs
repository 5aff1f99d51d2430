//! The vaults and the issuer that need nothing but this machine.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use fileaccess::dev::iam::MemoryIam;
use fileaccess::vault::file::FileVault;
use fileaccess::vault::memory::Memory;
use fileaccess::vault::{Held, Vault, VaultError};

use crate::contract::{self, hides_secrets, id, key};
use crate::stage::Backend;
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        memory_keeps_the_contract,
        memory_issues_by_the_contract,
        a_file_keeps_the_contract,
        a_file_that_others_could_read_or_swap_is_refused,
        a_broken_file_is_corrupt_at_every_length_and_stays_as_it_is,
        a_crash_before_the_rename_is_harmless_and_a_missing_folder_is_no_new_vault,
    ]
}

async fn memory_keeps_the_contract(_: Backend) {
    let pair = || {
        let vault = Memory::default();
        [Box::new(vault.clone()) as Box<dyn Vault>, Box::new(vault)]
    };
    contract::vault(pair).await;
    contract::one_of_two_rotations_wins(pair).await;
}

async fn memory_issues_by_the_contract(_: Backend) {
    let iam = MemoryIam::default();
    iam.create_user("u").unwrap();
    contract::issuer(&iam, "u").await;
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

async fn a_file_keeps_the_contract(_: Backend) {
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

async fn a_file_that_others_could_read_or_swap_is_refused(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vault.json");
    let vault = FileVault::new(&path);
    vault.stage(&id('a'), &key('a')).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(folder.path().join("vault.json.lock")).unwrap().mode() & 0o7777, 0o600);

    for mode in [0o640, 0o604, 0o620, 0o700] {
        set_mode(&path, mode);
        assert!(matches!(vault.read().await, Err(VaultError::Refused(_))), "{mode:o}");
        assert!(matches!(vault.unstage(&id('a')).await, Err(VaultError::Refused(_))), "{mode:o}");
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

async fn a_broken_file_is_corrupt_at_every_length_and_stays_as_it_is(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vault.json");
    let vault = FileVault::new(&path);
    vault.stage(&id('a'), &key('a')).await.unwrap();
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = vault.read().await.unwrap_err();
        assert!(matches!(error, VaultError::Corrupt(_)), "{length}: {error}");
        hides_secrets(&error);
    }
    let secret_in_a_wrong_place = format!("{{\"current\": \"{}\"}}", key('a').secret_access_key());
    fs::write(&path, &secret_in_a_wrong_place).unwrap();
    let error = vault.stage(&id('b'), &key('b')).await.unwrap_err();
    assert!(matches!(error, VaultError::Corrupt(_)), "{error}");
    hides_secrets(&error);
    assert_eq!(fs::read_to_string(&path).unwrap(), secret_in_a_wrong_place);
}

async fn a_crash_before_the_rename_is_harmless_and_a_missing_folder_is_no_new_vault(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vault.json");
    let vault = FileVault::new(&path);
    let new = folder.path().join("vault.json.new");
    fs::write(&new, "half of").unwrap();
    assert_eq!(vault.read().await, Ok(Held::default()));
    vault.stage(&id('a'), &key('a')).await.unwrap();
    assert!(!new.exists());

    let vault = FileVault::new(folder.path().join("missing/vault.json"));
    assert!(matches!(vault.read().await, Err(VaultError::Unavailable(_))));
    let staged = vault.stage(&id('a'), &key('a')).await;
    assert!(matches!(staged, Err(VaultError::Unavailable(_))), "{staged:?}");
}
