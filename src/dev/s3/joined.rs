//! The file that an upload's parts become, put together while they arrive: what
//! is left to do at the end is little.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A part's file.
pub(super) struct PartFile {
    pub(super) path: PathBuf,
    /// When it was changed last.
    pub(super) changed: SystemTime,
    pub(super) etag: String,
}

/// What has been joined so far.
#[derive(Default)]
pub(super) struct Joined {
    /// The `ETag` of each part, in order, and where it ends.
    parts: Vec<(String, u64)>,
}

impl Joined {
    /// How many parts there are.
    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    fn end(&self) -> u64 {
        self.parts.last().map_or(0, |(_, end)| *end)
    }

    /// Appends a part. Where the system can, it copies by itself.
    pub(super) fn append(&mut self, to: &Path, part: &PartFile) -> io::Result<()> {
        let mut from = File::open(&part.path)?;
        if from.metadata()?.modified()? != part.changed {
            return Err(io::Error::other("the part was replaced meanwhile"));
        }
        let mut file = self.open(to)?;
        let count = io::copy(&mut from, &mut file)?;
        self.parts.push((part.etag.clone(), self.end() + count));
        Ok(())
    }

    /// Makes it those `parts`: what is joined already is kept as far as it is
    /// the same.
    pub(super) fn finish(&mut self, to: &Path, parts: &[PartFile]) -> io::Result<()> {
        let same = self.parts.iter().zip(parts).take_while(|((etag, _), part)| *etag == part.etag).count();
        self.parts.truncate(same);
        for part in parts.iter().skip(same) {
            self.append(to, part)?;
        }
        self.open(to).map(drop)
    }

    /// The file, at its end. A copy that has failed may have left more there.
    fn open(&self, to: &Path) -> io::Result<File> {
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(to)?;
        file.set_len(self.end())?;
        file.seek(SeekFrom::Start(self.end()))?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_joined_is_kept_as_far_as_it_is_what_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("joined");
        let part = |etag: &str, bytes: &str| {
            let path = folder.path().join(etag);
            std::fs::write(&path, bytes).unwrap();
            let changed = path.metadata().unwrap().modified().unwrap();
            PartFile { path, changed, etag: etag.to_owned() }
        };
        let (a, b, c) = (part("a", "one,"), part("b", "two,"), part("c", "three"));
        let mut joined = Joined::default();
        joined.append(&to, &a).unwrap();
        joined.append(&to, &b).unwrap();
        assert_eq!((joined.len(), std::fs::read_to_string(&to).unwrap()), (2, "one,two,".to_owned()));

        // What is kept is not read again.
        std::fs::remove_file(&a.path).unwrap();
        let other = part("d", "another,");
        joined.finish(&to, &[a, other, c]).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "one,another,three");
        let a = part("a", "one,");
        joined.finish(&to, &[a]).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "one,");

        // What was replaced is not taken for what it was, and a failure leaves nothing behind.
        let replaced = PartFile { changed: SystemTime::UNIX_EPOCH, ..b };
        assert!(joined.append(&to, &replaced).is_err());
        std::fs::write(&to, "one,and half of ano").unwrap();
        joined.append(&to, &part("e", "four")).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "one,four");
    }
}
