//! `Presign`, and each item of `BatchPresign`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use ulid::Ulid;

use super::delete::Delete;
use super::download::Download;
use super::form_upload::{FormTerms, FormUpload};
use super::head::Head;
use super::sign_parts::Part;
use super::upload::Upload;
use crate::app::App;
use crate::audit::Asked;
use crate::caller::Caller;
use crate::error::Error;
use crate::object::{BucketName, Lifetime, ObjectKey};
use crate::policy::Permit;
use crate::signer::fast::Plain;
use crate::signer::presign::{SignedRequest, Terms};
use crate::signer::{KeySnapshot, Presigner, Signer};

/// One presigned request, as it is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The bucket, by its name in the settings.
    pub bucket: BucketName,
    /// The object.
    pub key: ObjectKey,
    /// How long the URL is to live. `None`: the default of the settings.
    pub ttl: Option<Lifetime>,
    /// What the holder may do.
    pub operation: Operation,
}

/// What the holder of a URL may do.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Fetch the object.
    Download(Download),
    /// Store the object.
    Upload(Upload),
    /// Fetch its headers.
    Head(Head),
    /// Remove it.
    Delete(Delete),
    /// Store the object by a form. The key may be the beginning of one.
    FormUpload(FormUpload),
    /// Store one part of it.
    Part(Part),
}

impl Operation {
    /// Its name, as the audit trail has it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Download(_) => "download",
            Self::Upload(_) => "upload",
            Self::Head(_) => "head",
            Self::Delete(_) => "delete",
            Self::FormUpload(_) => "form_upload",
            Self::Part(_) => "upload_part",
        }
    }

    /// The request as the SDK would write it.
    fn plain(&self) -> Result<Plain, Error> {
        match self {
            Self::Download(download) => Ok(download.plain()),
            Self::Upload(upload) => Ok(upload.plain()),
            Self::Head(head) => Ok(head.plain()),
            Self::Delete(delete) => Ok(delete.plain()),
            Self::Part(part) => Ok(part.plain()),
            Self::FormUpload(_) => Err(no_url()),
        }
    }

    /// The SDK's own answer.
    async fn sdk(&self, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
        match self {
            Self::Download(download) => download.sdk(terms).await,
            Self::Upload(upload) => upload.sdk(terms).await,
            Self::Head(head) => head.sdk(terms).await,
            Self::Delete(delete) => delete.sdk(terms).await,
            Self::Part(part) => part.sdk(terms).await,
            Self::FormUpload(_) => Err(no_url()),
        }
    }
}

fn no_url() -> Error {
    Error::internal("it is the policy of a form that is signed, not its URL")
}

/// A presigned request, and all that its asker should know of it.
pub struct Presigned {
    /// What to send.
    pub request: SignedRequest,
    /// The fields of a form, in order, before the file.
    pub form_fields: Vec<(String, String)>,
    /// When S3 begins to refuse it.
    pub expires_at: SystemTime,
    /// The time until then, in whole seconds, rounded down.
    pub expires_in: Duration,
    /// Who signed it.
    pub signer: Arc<Signer>,
    /// With which key.
    pub key: Arc<KeySnapshot>,
    /// Its issue id, if the bucket has them.
    pub issue_id: Option<Ulid>,
}

/// Authorizes, signs, and writes down what came of it.
///
/// # Errors
/// [`Error::NotGranted`], [`Error::OverCeiling`], [`Error::RateLimited`],
/// [`Error::AuditFull`], and those of [`presign`].
pub async fn issue(app: &App, caller: Caller, ask: Ask, now: SystemTime) -> Result<Presigned, Error> {
    let asked = Asked::from(&ask);
    let judged = app.policy.authorize(caller.clone(), ask);
    issue_judged(app, caller, asked, judged, now).await
}

/// The same, for who has been judged already.
///
/// # Errors
/// As [`issue`].
pub async fn issue_judged(
    app: &App,
    caller: Caller,
    asked: Asked,
    judged: Result<Permit<Ask>, Error>,
    now: SystemTime,
) -> Result<Presigned, Error> {
    let mut entry = app.audit.open(caller.clone(), asked, now).await?;
    let ended = async {
        app.urls.take(&caller)?;
        presign(app, judged?, now).await
    };
    let ended = ended.await;
    if let Ok(presigned) = &ended {
        entry.issued(presigned);
    }
    entry.close(&ended);
    ended
}

/// Signs what the permit allows.
///
/// # Errors
/// [`Error::UnknownBucket`], [`Error::NoRoute`], [`Error::SignerUnavailable`],
/// and [`Error::Invalid`] for what only the routes can tell.
pub async fn presign(app: &App, permit: Permit<Ask>, now: SystemTime) -> Result<Presigned, Error> {
    let ask = permit.ask();
    let bucket = app.bucket(&ask.bucket)?;
    let signer = match &ask.operation {
        Operation::FormUpload(form) if form.key_prefix_only => {
            bucket.route_all(&ask.key, "form_upload.key_prefix_only")?
        }
        _ => bucket.route(&ask.key)?,
    };
    let key = signer.key(now)?;
    let presigner = key
        .presigner(&ask.bucket)
        .ok_or_else(|| Error::internal(format!("signer `{}` does not presign for `{}`", signer.name, ask.bucket)))?;

    let window = match &ask.operation {
        Operation::Download(Download { cache_window, .. }) => *cache_window,
        _ => None,
    };
    let ttl = ask.ttl.unwrap_or(app.ttl_default).min(permit.ceiling());
    if window.is_some_and(|window| window >= Duration::from(ttl)) {
        let must = format!("be shorter than the URL's life, {} s", ttl.seconds());
        return Err(Error::invalid("download.cache_window", must));
    }
    let start = floor(now, window.unwrap_or(Duration::from_secs(1)));
    let mut expires = lifetime(start, ttl, key.credentials.expiry()).ok_or_else(|| Error::SignerUnavailable {
        signer: signer.name.clone(),
        detail: "its key ends within a second".into(),
    })?;
    if let Operation::Part(part) = &ask.operation {
        part.session.live(now)?;
        expires = lifetime(start, expires, Some(part.session.deadline)).ok_or(Error::UploadExpired)?;
    }
    let expires_at = start + Duration::from(expires);
    let issue_id = bucket.settings.issue_id.then(|| match window {
        // The same ask in the same window must give the same URL, id included.
        Some(_) => derived_id(&permit, start),
        None => Ulid::from_parts(millis(now), rand::random()),
    });

    let s3_name = bucket.settings.bucket.as_str();
    let (request, form_fields) = if let Operation::FormUpload(form) = &ask.operation {
        let (credentials, region) = (&key.credentials, bucket.settings.region.as_str());
        let terms = FormTerms { credentials, region, bucket: s3_name, key: &ask.key, start, end: expires_at, issue_id };
        let request = SignedRequest { method: "POST".into(), url: bucket.url()?.into(), headers: BTreeMap::new() };
        (request, form.fields(&terms))
    } else {
        let client = &presigner.client;
        let terms = Terms { client, bucket: s3_name, key: &ask.key, start, expires, issue_id };
        (sign(presigner, &ask.operation, &terms).await?, Vec::new())
    };
    key.usage.record(permit.caller(), expires_at, now);
    let left = expires_at.duration_since(now).unwrap_or_default();
    let expires_in = Duration::from_secs(left.as_secs());
    Ok(Presigned { request, form_fields, expires_at, expires_in, signer: Arc::clone(signer), key, issue_id })
}

/// Signs a URL: the fast way, if the SDK agrees with it.
async fn sign(presigner: &Presigner, operation: &Operation, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
    match &presigner.fast {
        Some(fast) if fast.trusted() => {
            let request = fast.sign(operation.plain()?, terms)?;
            Ok(if fast.due() { fast.reconcile(request, operation.sdk(terms).await?) } else { request })
        }
        _ => operation.sdk(terms).await,
    }
}

/// The life of a URL signed at `start`: no longer than `ttl`, and no longer
/// than its key. `None` if nothing is left of the key.
fn lifetime(start: SystemTime, ttl: Lifetime, key_end: Option<SystemTime>) -> Option<Lifetime> {
    let Some(end) = key_end else { return Some(ttl) };
    let left = end.duration_since(start).ok()?.as_secs();
    Lifetime::new(Duration::from_secs(left.min(ttl.seconds().into())))
}

/// `time` rounded down to a multiple of `window`, which is in whole seconds.
fn floor(time: SystemTime, window: Duration) -> SystemTime {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds - seconds % window.as_secs().max(1))
}

/// Since the Unix epoch, as ULIDs count.
pub(crate) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// An id made of caller, ask and window. `Debug` escapes what it prints, so
/// that no two asks look the same.
fn derived_id(permit: &Permit<Ask>, window_start: SystemTime) -> Ulid {
    let text = format!("{:?}\n{:?}", permit.caller(), permit.ask());
    let hash: [u8; 32] = Sha256::digest(text).into();
    let random = hash.iter().take(10).fold(0, |sum: u128, byte| (sum << 8) | u128::from(*byte));
    Ulid::from_parts(millis(window_start), random)
}

#[cfg(test)]
mod tests {
    use aws_credential_types::Credentials;
    use aws_sdk_s3::types::StorageClass;
    use futures_util::FutureExt as _;
    use proptest::option::of;
    use proptest::prelude::*;

    use super::*;
    use crate::config::BucketSettings;
    use crate::ops::upload::{Checksum, Encryption};
    use crate::ops::upload_plan::Plan;
    use crate::ops::upload_token::Session;

    /// What `wire` lets through as a header.
    fn header() -> impl Strategy<Value = String> {
        "[!-~]{1,8}( [!-~]{1,8}){0,2}"
    }

    fn checksum() -> impl Strategy<Value = Checksum> {
        prop_oneof![
            any::<[u8; 4]>().prop_map(Checksum::Crc32),
            any::<[u8; 4]>().prop_map(Checksum::Crc32c),
            any::<[u8; 8]>().prop_map(Checksum::Crc64nvme),
            any::<[u8; 20]>().prop_map(Checksum::Sha1),
            any::<[u8; 32]>().prop_map(Checksum::Sha256),
        ]
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let version = || of("[A-Za-z0-9._~+/= -]{1,12}");
        let download = (of("[^\\pC]{1,12}"), any::<bool>(), of(header()), of(header()), version());
        let download = download.prop_map(|(filename, inline, content_type, cache_control, version_id)| {
            Operation::Download(Download {
                filename,
                inline,
                content_type,
                cache_control,
                version_id,
                cache_window: None,
            })
        });
        let encryption = prop_oneof![
            Just(Encryption::S3),
            (of("[a-z0-9:/-]{1,30}"), any::<bool>())
                .prop_map(|(key_id, bucket_key)| Encryption::Kms { key_id, bucket_key }),
        ];
        let map = |names: &'static str, values: &'static str| proptest::collection::btree_map(names, values, 0..4);
        let upload = (
            (of(header()), of(0..5_u64 << 30), of(checksum()), any::<bool>()),
            (map("[a-z0-9-]{1,8}", "[!-~]{1,8}( [!-~]{1,8}){0,2}"), map("[a-zé+=@ ]{1,8}", "[a-zé+=@ ]{0,8}")),
            (of(header()), of(header()), of(Just(StorageClass::GlacierIr)), of(encryption)),
        );
        let upload = upload.prop_map(|(what, (metadata, tags), how)| {
            let (content_type, content_length, checksum, create_only) = what;
            let (cache_control, content_disposition, storage_class, encryption) = how;
            Operation::Upload(Upload {
                content_type,
                content_length,
                checksum,
                create_only,
                metadata,
                tags,
                cache_control,
                content_disposition,
                storage_class,
                encryption,
            })
        });
        let part = ("[A-Za-z0-9._~+/= -]{1,130}", 6_u64 << 20..5 << 40, any::<u32>(), of(checksum()));
        let part = part.prop_map(|(upload_id, size, number, checksum)| {
            let plan = Plan::new(size, None).unwrap();
            let session = Session {
                bucket: BucketName::parse("photos").unwrap(),
                key: ObjectKey::parse("any").unwrap(),
                upload_id,
                id: Ulid::nil(),
                plan,
                algorithm: None,
                create_only: false,
                content_type: None,
                deadline: at(0),
            };
            let number = 1 + number % plan.count();
            Operation::Part(Part { session: Arc::new(session), number, checksum })
        });
        prop_oneof![
            download,
            upload,
            version().prop_map(|version_id| Operation::Head(Head { version_id })),
            version().prop_map(|version_id| Operation::Delete(Delete { version_id })),
            part,
        ]
    }

    proptest! {
        #[test]
        fn the_fast_path_is_the_sdk_byte_for_byte(
            operation in operation(),
            key in "\\PC{1,20}|[a-z/.%+ &]{1,20}",
            (bucket, endpoint, path_style) in prop_oneof![
                Just(("photos-prod", None, false)),
                Just(("photos.prod.eu", None, false)),
                Just(("photos-prod", None, true)),
                Just(("photos-prod", Some("http://127.0.0.1:9000"), true)),
                Just(("photos-prod", Some("https://s3.example.com"), false)),
            ],
            token in of("[A-Za-z0-9+/=]{20,60}"),
            seconds in 1..604_801_u64,
            id in of(any::<u128>()),
        ) {
            let Ok(key) = ObjectKey::parse(key) else { return Ok(()) };
            let settings = BucketSettings {
                bucket: bucket.to_owned(),
                region: "eu-central-1".to_owned(),
                endpoint: endpoint.map(str::to_owned),
                path_style,
                plain_http: false,
                issue_id: true,
            };
            let credentials = Credentials::new("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG", token, None, "test");
            let start = at(1_790_000_000_000);
            let presigner = Presigner::new(&settings, credentials, start);
            let expires = Lifetime::new(Duration::from_secs(seconds)).unwrap();
            let issue_id = id.map(|random| Ulid::from_parts(1_790_000_000_000, random));
            let terms = Terms { client: &presigner.client, bucket, key: &key, start, expires, issue_id };
            let sdk = operation.sdk(&terms).now_or_never().expect("no I/O")?;
            let fast = presigner.fast.as_ref().expect("the two agree").sign(operation.plain()?, &terms)?;
            prop_assert_eq!(fast.url, sdk.url);
            prop_assert_eq!(fast.headers, sdk.headers);
            prop_assert_eq!(fast.method, sdk.method);
        }
    }

    #[test]
    fn a_difference_from_the_sdk_ends_the_fast_path() {
        let settings = BucketSettings {
            bucket: "photos-prod".into(),
            region: "eu-central-1".into(),
            endpoint: None,
            path_style: false,
            plain_http: false,
            issue_id: true,
        };
        let key = Credentials::new("AKIDEXAMPLE", "secret", None, None, "test");
        let presigner = Presigner::new(&settings, key, at(0));
        let fast = presigner.fast.as_ref().unwrap();
        let one = SignedRequest { method: "GET".into(), url: "one".into(), headers: BTreeMap::new() };
        let other = SignedRequest { url: "other".into(), ..one.clone() };
        assert!(fast.due() && fast.trusted());
        assert!(fast.reconcile(one.clone(), one.clone()) == one && fast.trusted());
        assert!(fast.reconcile(one, other.clone()) == other && !fast.trusted());
    }

    fn at(millis: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
    }

    #[test]
    fn a_url_never_outlives_its_key() {
        let minute = Lifetime::new(Duration::from_mins(1)).unwrap();
        let life = |end| lifetime(at(10_000), minute, end).map(Lifetime::seconds);
        assert_eq!(life(None), Some(60));
        assert_eq!(life(Some(at(200_000))), Some(60));
        assert_eq!(life(Some(at(40_999))), Some(30));
        assert_eq!(life(Some(at(10_999))), None);
        assert_eq!(life(Some(at(9_000))), None);
    }

    #[test]
    fn signing_time_is_rounded_down() {
        assert_eq!(floor(at(61_999), Duration::from_secs(1)), at(61_000));
        assert_eq!(floor(at(61_999), Duration::from_mins(1)), at(60_000));
    }
}
