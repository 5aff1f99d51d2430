//! The token that stands for an upload: all that any replica has to know of it,
//! authenticated, so that no replica has to keep anything.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use ulid::Ulid;
use zeroize::Zeroizing;

use super::upload::Algorithm;
use super::upload_plan::Plan;
use crate::caller::Caller;
use crate::error::Error;
use crate::object::{BucketName, ObjectKey};
use crate::policy::grant::{Load, LoadKind};

/// The user metadata that tells which upload an object was made by.
pub const UPLOAD_ID: &str = "fileaccess-upload";
/// The least that a token key may have, in bytes: as many as SHA-256 has.
const MIN_KEY: usize = 32;
/// What else is authenticated with the same key is no token.
const PURPOSE: &str = "fileaccess upload token 1";
/// The bytes of a MAC.
const MAC: usize = 32;

/// An upload that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The bucket, by its name in the settings.
    pub bucket: BucketName,
    /// The object.
    pub key: ObjectKey,
    /// S3's own id of the upload.
    pub upload_id: String,
    /// Our own id of it, which the object has in its metadata as [`UPLOAD_ID`].
    pub id: Ulid,
    /// Its parts.
    pub plan: Plan,
    /// The checksum that each part has. `None`: S3 makes its own, of the full
    /// object.
    pub algorithm: Option<Algorithm>,
    /// Refuse to overwrite.
    pub create_only: bool,
    /// The media type.
    pub content_type: Option<String>,
    /// When it can't be gone on with any more, in whole seconds.
    pub deadline: SystemTime,
}

impl Session {
    /// Whether it can be gone on with.
    ///
    /// # Errors
    /// [`Error::UploadExpired`].
    pub fn live(&self, now: SystemTime) -> Result<(), Error> {
        if now < self.deadline { Ok(()) } else { Err(Error::UploadExpired) }
    }

    /// What it uploads, as far as ceilings go.
    #[must_use]
    pub fn load(&self) -> Load<'_> {
        Load {
            kind: LoadKind::Parts,
            size: Some(self.plan.size()),
            content_type: self.content_type.as_deref(),
            create_only: self.create_only,
            checksum: self.algorithm.is_some(),
        }
    }
}

/// Authenticates tokens. All replicas must have the same.
#[derive(Clone)]
pub struct TokenKey(Hmac<Sha256>);

/// What a token has of its session. The caller is authenticated, and not in it.
type Parts = (String, String, String, String, Plan, Option<Algorithm>, bool, Option<String>, u64);

impl TokenKey {
    /// A key of this process's own: no other replica takes its tokens.
    #[must_use]
    pub fn random() -> Self {
        let key: Zeroizing<[u8; MIN_KEY]> = Zeroizing::new(rand::random());
        Self(mac_of(&*key))
    }

    /// The key that `text` has, as Base64.
    ///
    /// # Errors
    /// What it must be.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let key = Zeroizing::new(BASE64_STANDARD.decode(text.trim()).unwrap_or_default());
        if key.len() < MIN_KEY {
            return Err("at least 32 random bytes as Base64, as `openssl rand -base64 32` makes them");
        }
        Ok(Self(mac_of(&key)))
    }

    /// The token that stands for `session`, for `caller` alone.
    ///
    /// # Errors
    /// None that a session can cause.
    pub fn seal(&self, session: &Session, caller: &Caller) -> Result<String, Error> {
        let Session { bucket, key, upload_id, id, plan, algorithm, create_only, content_type, deadline } = session;
        let deadline = deadline.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let parts: Parts = (
            bucket.to_string(),
            key.as_str().to_owned(),
            upload_id.clone(),
            id.to_string(),
            *plan,
            *algorithm,
            *create_only,
            content_type.clone(),
            deadline,
        );
        let parts = serde_json::to_vec(&parts).map_err(|e| Error::internal(format!("upload token: {e}")))?;
        let mut token = self.mac(caller, &parts).finalize().into_bytes().to_vec();
        token.extend_from_slice(&parts);
        Ok(BASE64_URL_SAFE_NO_PAD.encode(token))
    }

    /// The session that `token` stands for, if it is one of `caller`'s.
    ///
    /// # Errors
    /// [`Error::UploadToken`].
    pub fn open(&self, token: &str, caller: &Caller) -> Result<Arc<Session>, Error> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).map_err(|_| Error::UploadToken)?;
        let (mac, parts) = bytes.split_at_checked(MAC).ok_or(Error::UploadToken)?;
        self.mac(caller, parts).verify_slice(mac).map_err(|_| Error::UploadToken)?;
        let parts: Parts = serde_json::from_slice(parts).map_err(|_| Error::UploadToken)?;
        let (bucket, key, upload_id, id, plan, algorithm, create_only, content_type, deadline) = parts;
        Ok(Arc::new(Session {
            bucket: BucketName::parse(&bucket).map_err(|_| Error::UploadToken)?,
            key: ObjectKey::parse(key).map_err(|_| Error::UploadToken)?,
            upload_id,
            id: Ulid::from_string(&id).map_err(|_| Error::UploadToken)?,
            plan,
            algorithm,
            create_only,
            content_type,
            deadline: SystemTime::UNIX_EPOCH + Duration::from_secs(deadline),
        }))
    }

    fn mac(&self, caller: &Caller, parts: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        for part in [PURPOSE.as_bytes(), caller.as_str().as_bytes(), parts] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac
    }
}

fn mac_of(key: &[u8]) -> Hmac<Sha256> {
    // Hashed first, a key of any length fits, and nothing can fail.
    let mut block = hmac::digest::Key::<Hmac<Sha256>>::default();
    block.iter_mut().zip(Sha256::digest(key)).for_each(|(to, from)| *to = from);
    Hmac::new(&block)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        Session {
            bucket: BucketName::parse("photos").unwrap(),
            key: ObjectKey::parse("a/é").unwrap(),
            upload_id: "up.load_ID".into(),
            id: Ulid::from_parts(1, 2),
            plan: Plan::new(6 << 20, None).unwrap(),
            algorithm: Some(Algorithm::Sha256),
            create_only: true,
            content_type: Some("text/plain".into()),
            deadline: SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000),
        }
    }

    #[test]
    fn a_token_is_its_callers_and_cannot_be_changed() {
        let secret = BASE64_STANDARD.encode([7; 32]);
        let (key, same) = (TokenKey::parse(&secret).unwrap(), TokenKey::parse(&format!("{secret}\n")).unwrap());
        let (ann, bob) = (Caller::user(1), Caller::user(2));
        let token = key.seal(&session(), &ann).unwrap();
        assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'), "{token}");
        assert_eq!(*same.open(&token, &ann).unwrap(), session());

        let refused = |key: &TokenKey, token: &str, caller| matches!(key.open(token, caller), Err(Error::UploadToken));
        assert!(refused(&key, &token, &bob));
        assert!(refused(&TokenKey::random(), &token, &ann));
        assert!(refused(&TokenKey::parse(&BASE64_STANDARD.encode([7; 33])).unwrap(), &token, &ann));
        for cut in 0..token.len() {
            assert!(refused(&key, &token[..cut], &ann), "{cut}");
        }
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            assert!(refused(&key, &String::from_utf8(bytes).unwrap(), &ann), "{at}");
        }
        assert!(refused(&key, "not base64!", &ann) && refused(&key, &format!("{token}AAAA"), &ann));
    }

    #[test]
    fn a_key_must_be_long_enough() {
        for wrong in [String::new(), "short".into(), "!".repeat(44), BASE64_STANDARD.encode([7; 31])] {
            assert!(TokenKey::parse(&wrong).is_err(), "{wrong}");
        }
        assert!(TokenKey::parse(&BASE64_STANDARD.encode([7; 200])).is_ok());
    }
}
