//! Folders as keys, and keys as folders.

use std::fs::{self, ReadDir};
use std::path::{Path, PathBuf};

use super::files::shown;

/// A regular file in a folder, or a link to one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    /// Where it is below the folder, with `/` between the names.
    pub(super) key: String,
    pub(super) size: u64,
}

/// All files below a folder, in no order; or what is wrong with one that is
/// none. It holds one folder open, and knows of those that it has yet to read.
///
/// INVARIANT: it ends, for it follows no link to a folder.
pub(super) struct Walk {
    root: PathBuf,
    reading: Option<(ReadDir, String)>,
    ahead: Vec<String>,
}

impl Walk {
    pub(super) fn of(root: &Path) -> Self {
        Self { root: root.to_owned(), reading: None, ahead: vec![String::new()] }
    }
}

impl Iterator for Walk {
    type Item = Result<Found, String>;

    fn next(&mut self) -> Option<Self::Item> {
        let wrong = |path: &Path, why: &dyn std::fmt::Display| Some(Err(format!("`{}`: {why}", shown(path))));
        loop {
            let Some((entries, folder)) = &mut self.reading else {
                let folder = self.ahead.pop()?;
                let path = self.root.join(&folder);
                match fs::read_dir(&path) {
                    Ok(entries) => self.reading = Some((entries, folder)),
                    Err(error) => return wrong(&path, &error),
                }
                continue;
            };
            let entry = match entries.next() {
                Some(Ok(entry)) => entry,
                Some(Err(error)) => {
                    let path = self.root.join(folder);
                    self.reading = None;
                    return wrong(&path, &error);
                }
                None => {
                    self.reading = None;
                    continue;
                }
            };
            let path = entry.path();
            let Some(key) = entry.file_name().to_str().map(|name| format!("{folder}{name}")) else {
                return wrong(&path, &"its name is not UTF-8, as a key must be");
            };
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => {
                    self.ahead.push(key + "/");
                    continue;
                }
                Ok(_) => {}
                Err(error) => return wrong(&path, &error),
            }
            // Of what a link leads to.
            return match fs::metadata(&path) {
                Ok(facts) if facts.is_file() => Some(Ok(Found { path, key, size: facts.len() })),
                Ok(facts) if facts.is_dir() => wrong(&path, &"a link to a folder, which is not followed"),
                Ok(_) => wrong(&path, &"no regular file"),
                Err(error) => wrong(&path, &error),
            };
        }
    }
}

/// The path of a key below a folder.
///
/// # Errors
/// Why it can't be one.
pub(super) fn path(key: &str) -> Result<&Path, &'static str> {
    for segment in key.split('/') {
        match segment {
            "" => return Err("it has an empty segment, which no path keeps"),
            "." | ".." => return Err("it has a `.` or `..` segment, which may lead elsewhere"),
            _ if segment.contains('\0') => return Err("it has a zero byte, which no path can have"),
            _ => {}
        }
    }
    Ok(Path::new(key))
}

/// Finds keys that can't be files of one folder, when it sees all of them in
/// their order.
#[derive(Default)]
pub(super) struct Together {
    /// The last key, and those that it begins with, from the shortest.
    begun: Vec<String>,
}

impl Together {
    /// # Errors
    /// Why `key` can't be a file beside the others.
    pub(super) fn take(&mut self, key: &str) -> Result<(), String> {
        path(key)?;
        if self.begun.last().is_some_and(|last| last.as_str() >= key) {
            return Err("the listing is not in the order of keys".to_owned());
        }
        // What it does not begin with, no later key begins with.
        while self.begun.pop_if(|last| !key.starts_with(last.as_str())).is_some() {}
        let folder = self.begun.iter().find(|begun| key.as_bytes().get(begun.len()) == Some(&b'/'));
        if let Some(folder) = folder {
            return Err(format!("`{folder}` would be both a file and a folder"));
        }
        self.begun.push(key.to_owned());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_walk_finds_every_file_once_and_tells_of_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        for name in ["x", "a/x", "a/b/c/ü", ".hidden"] {
            fs::write(at(name), name).unwrap();
        }
        symlink(at("x"), at("a/link")).unwrap();
        symlink(folder.path(), at("a/loop")).unwrap();
        symlink(at("gone"), at("a/dangling")).unwrap();
        fs::write(folder.path().join(OsStr::from_bytes(b"z\xff")), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let (found, wrong): (Vec<_>, Vec<_>) = Walk::of(folder.path()).partition(Result::is_ok);
        let mut found: Vec<_> =
            found.into_iter().map(|found| found.map(|found| (found.key, found.size)).unwrap()).collect();
        found.sort();
        let expected = [(".hidden", 7), ("a/b/c/ü", 8), ("a/link", 1), ("a/x", 3), ("x", 1)];
        assert_eq!(found, expected.map(|(key, size)| (key.to_owned(), size)));
        let mut wrong: Vec<_> = wrong.into_iter().map(|wrong| wrong.unwrap_err()).collect();
        wrong.sort();
        let told = [
            ("a/dangling", "No such file"),
            ("a/loop", "a link to a folder"),
            ("socket", "no regular file"),
            ("z\u{fffd}", "its name is not UTF-8"),
        ];
        assert_eq!(wrong.len(), told.len(), "{wrong:?}");
        for (wrong, (name, why)) in wrong.iter().zip(told) {
            assert!(wrong.contains(&format!("{name}`: {why}")), "{wrong}");
        }
    }

    #[test]
    fn keys_that_are_no_paths_are_refused() {
        for key in ["", "/etc/passwd", "../x", "a/../x", "a/..", "./a", "a//b", "a/", "a\0b"] {
            assert!(path(key).is_err(), "{key:?}");
        }
        for key in ["a", "...", "..a/b..", "ü/ ", "a\\..\\b"] {
            assert_eq!(path(key), Ok(Path::new(key)));
        }
    }

    proptest! {
        #[test]
        fn a_file_that_is_a_folder_too_is_found_whatever_is_between(
            keys in proptest::collection::btree_set("[ab!.-]{1,2}(/[ab!-]{1,2}){0,2}", 0..12),
        ) {
            let keys: BTreeSet<String> = keys.into_iter().filter(|key| path(key).is_ok()).collect();
            let mut together = Together::default();
            let clashes = |key: &String| {
                keys.iter().any(|other| key.strip_prefix(other.as_str()).is_some_and(|rest| rest.starts_with('/')))
            };
            for key in &keys {
                prop_assert_eq!(together.take(key).is_err(), clashes(key), "{}", key);
            }
        }
    }
}
