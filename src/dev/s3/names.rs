//! Which file an object is in.

use s3s::crypto::{Checksum as _, Sha256};
use s3s::dto::Metadata;

/// Where an object's metadata has its key: no header has such a name.
pub(super) const KEY: &str = "the key";
/// And an upload's, until it is an object, the checksum that its parts have:
/// algorithm and type.
pub(super) const SUMS: &str = "the checksum";
/// With this, the names that `s3s-fs` makes of a file's name and a bucket's, in
/// Base64, stay below the 255 bytes that file systems take.
pub(super) const MAX_NAME_BYTES: usize = 65;

/// The file name of a key: at most [`MAX_NAME_BYTES`].
/// INVARIANT: no two keys have the same, and there is no `/` in it.
pub(super) fn file_name(key: &str) -> String {
    let made = |(_, end): (&str, &str)| end.len() == 32 && end.bytes().all(|b| b.is_ascii_hexdigit());
    let plain = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_');
    let own = key.len() <= MAX_NAME_BYTES && key.chars().all(plain) && !matches!(key, "." | "..");
    if own && !key.rsplit_once('.').is_some_and(made) {
        return key.to_owned();
    }
    let readable = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' };
    let start: String = key.chars().take(32).map(readable).collect();
    let digest = Sha256::checksum(key.as_bytes());
    digest[..16].iter().fold(start + ".", |name, byte| format!("{name}{byte:02x}"))
}

/// Replaces `key` by its file name and leaves it in `metadata`.
pub(super) fn hide_key(key: &mut String, metadata: &mut Option<Metadata>) {
    let name = file_name(key);
    let key = std::mem::replace(key, name);
    metadata.get_or_insert_default().insert(KEY.to_owned(), key);
}

/// Takes the key out of `metadata` again.
pub(super) fn take_key(metadata: &mut Option<Metadata>) -> Option<String> {
    let key = metadata.as_mut()?.remove(KEY);
    metadata.as_mut()?.remove(SUMS);
    metadata.take_if(|metadata| metadata.is_empty());
    key
}
