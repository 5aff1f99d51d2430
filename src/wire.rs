//! `TryFrom<pb>` in, `From` out: the only file where protobuf meets the
//! domain. Past it nothing required is an `Option`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sdk_s3::types::StorageClass;
use prost_types::Timestamp;

use crate::config::RouteSettings;
use crate::error::{Error, Violation};
use crate::object::{BucketName, Lifetime, ObjectKey, Prefix};
use crate::ops::delete::Delete;
use crate::ops::download::Download;
use crate::ops::form_upload::{ContentType, FILENAME, FormUpload};
use crate::ops::head::Head;
use crate::ops::upload::{Algorithm, Checksum, Encryption, Upload};
use crate::ops::upload_plan::Plan;
use crate::ops::upload_token::{Session, UPLOAD_ID};
use crate::ops::{
    complete_upload, inspect, list, list_parts, presign, revoke, sign_parts, signers, start_upload, stat,
};
use crate::pb;
use crate::signer::Kind;
use crate::signer::url::SignedUrl;
use crate::signer::usage::UrlsOut;
use crate::store::multipart::{Made, Page, Stored};
use crate::store::{Entry, Facts};

/// How many items a batch may have.
pub const MAX_BATCH: usize = 1000;
/// How many entries a page may have: S3's own limit.
const MAX_PAGE: u16 = 1000;
/// How many entries a page has if nobody says.
const DEFAULT_PAGE: u16 = 100;
/// S3's limit on the body of one `PutObject`.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/upload-objects.html>
const MAX_UPLOAD: u64 = 5 << 30;
/// S3's limit on user metadata, names and values together.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingMetadata.html>
const MAX_METADATA: usize = 2048;
/// How long an upload in parts may take, if nobody says: also the least and, as
/// for a URL, the most.
const USUAL_DEADLINE: Duration = Duration::from_hours(24);
const MIN_DEADLINE: Duration = Duration::from_mins(1);
/// S3's limits on tags.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-tagging.html>
const MAX_TAGS: usize = 10;

/// Collects what is wrong, so that a caller hears of all of it at once.
#[derive(Default)]
struct Check(Vec<Violation>);

impl Check {
    fn wrong(&mut self, field: &str, must: impl AsRef<str>) {
        self.0.push(Violation::new(field, must));
    }

    fn take<T>(&mut self, field: &str, value: Result<T, &'static str>) -> Option<T> {
        value.map_err(|must| self.wrong(field, must)).ok()
    }

    fn bucket(&mut self, name: &str) -> Option<BucketName> {
        self.take("bucket", BucketName::parse(name).map_err(|_| "be the name of a bucket of the settings"))
    }

    fn lifetime(&mut self, field: &str, ttl: Option<prost_types::Duration>) -> Option<Lifetime> {
        let lifetime = Duration::try_from(ttl?).ok().and_then(Lifetime::new);
        if lifetime.is_none() {
            self.wrong(field, Lifetime::WANT);
        }
        lifetime
    }

    /// A value that becomes an HTTP header: it must come through unchanged.
    fn header(&mut self, field: &str, value: Option<String>) -> Option<String> {
        if value.as_deref().is_some_and(|v| !is_header_value(v)) {
            self.wrong(field, HEADER_VALUE);
        }
        value
    }

    /// A value that becomes a query parameter of the URL.
    fn text(&mut self, field: &str, value: Option<String>) -> Option<String> {
        if value.as_deref().is_some_and(|v| v.is_empty() || v.len() > 1024 || v.chars().any(char::is_control)) {
            self.wrong(field, "be 1 to 1,024 bytes without control characters");
        }
        value
    }

    fn done(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Invalid(self.0)) }
    }
}

const HEADER_VALUE: &str =
    "be printable ASCII, not empty, without spaces at its ends or two in a row: HTTP clients and signatures fold them";

fn is_header_value(value: &str) -> bool {
    !value.is_empty()
        && value.len() <= 1024
        && value.bytes().all(|b| (b' '..=b'~').contains(&b))
        && value.trim() == value
        && !value.contains("  ")
}

/// The characters of an HTTP token (RFC 9110), in lower case.
fn is_token(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&b))
}

impl TryFrom<pb::PresignRequest> for presign::Ask {
    type Error = Error;

    fn try_from(request: pb::PresignRequest) -> Result<Self, Error> {
        let mut check = Check::default();
        let bucket = check.bucket(&request.bucket);
        let key = check.take("key", ObjectKey::parse(request.key));
        let ttl = check.lifetime("ttl", request.ttl);
        let operation = match request.operation {
            Some(pb::presign_request::Operation::Download(download)) => {
                Some(presign::Operation::Download(parse_download(&mut check, download)))
            }
            Some(pb::presign_request::Operation::Upload(upload)) => {
                Some(presign::Operation::Upload(parse_upload(&mut check, upload)))
            }
            Some(pb::presign_request::Operation::Head(head)) => {
                Some(presign::Operation::Head(Head { version_id: check.text("head.version_id", head.version_id) }))
            }
            Some(pb::presign_request::Operation::Delete(delete)) => Some(presign::Operation::Delete(Delete {
                version_id: check.text("delete.version_id", delete.version_id),
            })),
            Some(pb::presign_request::Operation::FormUpload(form)) => {
                if key.as_ref().is_some_and(|key| key.as_str().contains(FILENAME)) {
                    check.wrong("key", format!("not have `{FILENAME}`, which S3 fills in, with `form_upload`"));
                }
                Some(presign::Operation::FormUpload(parse_form(&mut check, form)))
            }
            None => {
                check.wrong("operation", "be one of `download`, `upload`, `head`, `delete` and `form_upload`");
                None
            }
        };
        check.done()?;
        match (bucket, key, operation) {
            (Some(bucket), Some(key), Some(operation)) => Ok(Self { bucket, key, ttl, operation }),
            _ => Err(Error::internal("a field is missing that no violation names")),
        }
    }
}

fn parse_download(check: &mut Check, download: pb::Download) -> Download {
    let cache_window = download.cache_window.and_then(|window| {
        let window = Duration::try_from(window).ok().and_then(Lifetime::new).map(Duration::from);
        if window.is_none() {
            check.wrong("download.cache_window", "be at least 1 second and shorter than the ttl, in whole seconds");
        }
        window
    });
    Download {
        filename: check.text("download.filename", download.filename),
        inline: download.inline,
        content_type: check.header("download.content_type", download.content_type),
        cache_control: check.header("download.cache_control", download.cache_control),
        version_id: check.text("download.version_id", download.version_id),
        cache_window,
    }
}

fn parse_upload(check: &mut Check, upload: pb::Upload) -> Upload {
    let content_length = upload.content_length.and_then(|length| {
        let length = u64::try_from(length).ok().filter(|n| *n <= MAX_UPLOAD);
        if length.is_none() {
            check.wrong("upload.content_length", "be 0 to 5 GiB (5368709120): larger files take a multipart upload");
        }
        length
    });
    check_metadata(check, "upload.metadata", &upload.metadata, MAX_METADATA);
    if upload.tags.len() > MAX_TAGS {
        check.wrong("upload.tags", "be at most 10");
    }
    let of_tags = |c: char| c.is_alphanumeric() || " _.:/=+-@".contains(c);
    let fits = |text: &str, max| text.chars().count() <= max && text.chars().all(of_tags);
    if upload.tags.iter().any(|(name, value)| name.is_empty() || !fits(name, 128) || !fits(value, 256)) {
        let must = "have names of 1 to 128 and values of up to 256 characters: letters, digits, spaces and `_.:/=+-@`";
        check.wrong("upload.tags", must);
    }
    Upload {
        content_type: check.header("upload.content_type", upload.content_type),
        content_length,
        checksum: upload.checksum.and_then(|checksum| parse_checksum(check, "upload.checksum", checksum)),
        create_only: upload.create_only,
        metadata: upload.metadata,
        tags: upload.tags,
        cache_control: check.header("upload.cache_control", upload.cache_control),
        content_disposition: check.header("upload.content_disposition", upload.content_disposition),
        storage_class: parse_storage_class(check, upload.storage_class),
        encryption: upload.encryption.and_then(|encryption| parse_encryption(check, encryption)),
    }
}

fn check_metadata(check: &mut Check, field: &str, metadata: &BTreeMap<String, String>, max: usize) {
    for (name, value) in metadata {
        if !is_token(name) {
            check.wrong(field, format!("have names that are lower-case HTTP tokens, unlike `{}`", name.escape_debug()));
        }
        if name == UPLOAD_ID {
            check.wrong(field, format!("not have `{UPLOAD_ID}`, which is this service's own"));
        }
        if !is_header_value(value) {
            check.wrong(&format!("{field}[{}]", name.escape_debug()), HEADER_VALUE);
        }
    }
    if metadata.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > max {
        check.wrong(field, format!("be at most {max} bytes, names and values together"));
    }
}

fn parse_form(check: &mut Check, form: pb::FormUpload) -> FormUpload {
    let size = |check: &mut Check, field: &str, size: i64| {
        let bytes = u64::try_from(size).ok().filter(|n| *n <= MAX_UPLOAD);
        bytes.unwrap_or_else(|| {
            check.wrong(field, "be 0 to 5 GiB (5368709120): larger files take a multipart upload");
            0
        })
    };
    let min_size = size(check, "form_upload.min_size", form.min_size);
    let max_size = size(check, "form_upload.max_size", form.max_size);
    let max_size = if max_size == 0 { MAX_UPLOAD } else { max_size };
    if min_size > max_size {
        check.wrong("form_upload.min_size", format!("be at most `max_size`, {max_size}"));
    }
    let some = |text: String| (!text.is_empty()).then_some(text);
    let content_type = check.header("form_upload.content_type", some(form.content_type));
    let prefix = check.header("form_upload.content_type_prefix", some(form.content_type_prefix));
    let content_type = match (content_type, prefix) {
        (Some(_), Some(_)) => {
            check.wrong("form_upload.content_type_prefix", "be empty where `content_type` is given");
            ContentType::Default
        }
        (Some(content_type), None) => ContentType::Exactly(content_type),
        (None, Some(prefix)) => ContentType::Prefix(prefix),
        (None, None) => ContentType::Default,
    };
    let success_status = match form.success_status {
        0 => 204,
        status => u16::try_from(status).ok().filter(|status| [200, 201, 204].contains(status)).unwrap_or_else(|| {
            check.wrong("form_upload.success_status", format!("be 200, 201, 204, or 0 for 204, not {status}"));
            204
        }),
    };
    let success_redirect = check.header("form_upload.success_redirect", some(form.success_redirect));
    if let Some(url) = &success_redirect {
        let http = reqwest::Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
        if !http {
            check.wrong("form_upload.success_redirect", "be an http or https URL");
        }
        if form.success_status != 0 {
            check.wrong("form_upload.success_status", "be 0 where `success_redirect` is given: S3 answers 303");
        }
    }
    check_metadata(check, "form_upload.metadata", &form.metadata, MAX_METADATA);
    let text = match &content_type {
        ContentType::Default => None,
        ContentType::Exactly(text) | ContentType::Prefix(text) => Some(text),
    };
    let texts = form.metadata.values().chain(text).chain(&success_redirect);
    if texts.into_iter().any(|text| text.contains(FILENAME)) {
        check.wrong("form_upload", format!("have no `{FILENAME}`, which S3 fills in"));
    }
    FormUpload {
        min_size,
        max_size,
        content_type,
        key_prefix_only: form.key_prefix_only,
        success_status,
        success_redirect,
        metadata: form.metadata,
    }
}

impl TryFrom<pb::StartUploadRequest> for start_upload::Ask {
    type Error = Error;

    fn try_from(request: pb::StartUploadRequest) -> Result<Self, Error> {
        let mut check = Check::default();
        let bucket = check.bucket(&request.bucket);
        let key = check.take("key", ObjectKey::parse(request.key));
        let ttl = check.lifetime("ttl", request.ttl);
        // What is negative is as wrong as what is too small.
        let size = u64::try_from(request.size).unwrap_or_default();
        let part_size = (request.part_size != 0).then(|| u64::try_from(request.part_size).unwrap_or(1));
        let plan = Plan::new(size, part_size).map_err(|(field, must)| check.wrong(field, must)).ok();
        let upload = request.upload.unwrap_or_default();
        if upload.content_length.is_some() {
            check.wrong("upload.content_length", "be absent: it is `size` here");
        }
        if upload.checksum.is_some() {
            check.wrong("upload.checksum", "be absent: each part has its own, see `checksum_algorithm`");
        }
        let upload = parse_upload(&mut check, pb::Upload { content_length: None, checksum: None, ..upload });
        // Room for what tells which upload made the object.
        let room = MAX_METADATA - UPLOAD_ID.len() - ulid::ULID_LEN;
        check_metadata(&mut check, "upload.metadata", &upload.metadata, room);
        let algorithm = pb::ChecksumAlgorithm::try_from(request.checksum_algorithm).unwrap_or_else(|_| {
            let must = format!("be a value of `ChecksumAlgorithm`, not {}", request.checksum_algorithm);
            check.wrong("checksum_algorithm", must);
            pb::ChecksumAlgorithm::Unspecified
        });
        let algorithm = parse_algorithm(algorithm);
        let deadline = request.deadline.map_or(Some(USUAL_DEADLINE), |deadline| Duration::try_from(deadline).ok());
        let deadline = deadline.filter(|deadline| (MIN_DEADLINE..=Lifetime::MAX.into()).contains(deadline));
        if deadline.is_none() {
            check.wrong("deadline", "be 1 minute to 7 days");
        }
        check.done()?;
        match (bucket, key, plan, deadline) {
            (Some(bucket), Some(key), Some(plan), Some(deadline)) => {
                Ok(Self { bucket, key, plan, upload, algorithm, ttl, deadline })
            }
            _ => Err(Error::internal("a field is missing that no violation names")),
        }
    }
}

fn parse_algorithm(algorithm: pb::ChecksumAlgorithm) -> Option<Algorithm> {
    match algorithm {
        pb::ChecksumAlgorithm::Unspecified => None,
        pb::ChecksumAlgorithm::Crc64nvme => Some(Algorithm::Crc64nvme),
        pb::ChecksumAlgorithm::Crc32 => Some(Algorithm::Crc32),
        pb::ChecksumAlgorithm::Crc32c => Some(Algorithm::Crc32c),
        pb::ChecksumAlgorithm::Sha1 => Some(Algorithm::Sha1),
        pb::ChecksumAlgorithm::Sha256 => Some(Algorithm::Sha256),
    }
}

fn algorithm(algorithm: Option<Algorithm>) -> i32 {
    let algorithm = match algorithm {
        None => pb::ChecksumAlgorithm::Unspecified,
        Some(Algorithm::Crc64nvme) => pb::ChecksumAlgorithm::Crc64nvme,
        Some(Algorithm::Crc32) => pb::ChecksumAlgorithm::Crc32,
        Some(Algorithm::Crc32c) => pb::ChecksumAlgorithm::Crc32c,
        Some(Algorithm::Sha1) => pb::ChecksumAlgorithm::Sha1,
        Some(Algorithm::Sha256) => pb::ChecksumAlgorithm::Sha256,
    };
    algorithm.into()
}

impl From<start_upload::Started> for pb::StartUploadResponse {
    fn from(started: start_upload::Started) -> Self {
        let start_upload::Started { token, session, parts } = started;
        Self {
            upload_token: token,
            upload_id: session.upload_id.clone(),
            part_size: session.plan.part_size().cast_signed(),
            part_count: session.plan.count().cast_signed(),
            parts: parts.into_iter().map(Into::into).collect(),
            deadline: Some(timestamp(session.deadline)),
            checksum_algorithm: algorithm(session.algorithm),
        }
    }
}

impl From<(i32, Result<presign::Presigned, Error>)> for pb::PartResult {
    fn from((part_number, result): (i32, Result<presign::Presigned, Error>)) -> Self {
        let result = match result {
            Ok(presigned) => pb::part_result::Result::Response(presigned.into()),
            Err(error) => pb::part_result::Result::Error(error.into()),
        };
        Self { part_number, result: Some(result) }
    }
}

/// The parts asked for, each parsed or refused on its own.
///
/// # Errors
/// [`Error::Invalid`].
pub fn parse_sign_parts(request: pb::SignPartsRequest, session: &Arc<Session>) -> Result<sign_parts::Ask, Error> {
    let mut check = Check::default();
    let ttl = check.lifetime("ttl", request.ttl);
    let got = request.parts.len();
    if !(1..=MAX_BATCH).contains(&got) {
        check.wrong("parts", format!("have 1 to 1,000 items, not {got}"));
    }
    check.done()?;
    let part = |pb::PartRequest { part_number, checksum }| {
        let mut check = Check::default();
        let checksum = checksum.and_then(|checksum| parse_checksum(&mut check, "parts.checksum", checksum));
        let part = check.done().and_then(|()| sign_parts::Part::new(session, part_number, checksum));
        (part_number, part)
    };
    let parts = request.parts.into_iter().map(part).collect();
    Ok(sign_parts::Ask { session: Arc::clone(session), parts, ttl })
}

impl From<Vec<(i32, Result<presign::Presigned, Error>)>> for pb::SignPartsResponse {
    fn from(parts: Vec<(i32, Result<presign::Presigned, Error>)>) -> Self {
        Self { parts: parts.into_iter().map(Into::into).collect() }
    }
}

/// A page of the parts of an upload.
///
/// # Errors
/// [`Error::Invalid`].
pub fn parse_list_parts(request: &pb::ListPartsRequest, session: &Arc<Session>) -> Result<list_parts::Ask, Error> {
    let mut check = Check::default();
    let page_size = match u32::try_from(request.page_size) {
        Ok(0) => MAX_PAGE,
        Ok(size) => u16::try_from(size).unwrap_or(MAX_PAGE).min(MAX_PAGE),
        Err(_) => {
            check.wrong("page_size", "be 0 (for 1,000) to 1,000");
            MAX_PAGE
        }
    };
    let after = if request.page_token.is_empty() { Some(0) } else { request.page_token.parse().ok() };
    let after = after.filter(|after| *after <= session.plan.count());
    if after.is_none() {
        check.wrong("page_token", "be the `next_page_token` of a page of the same upload");
    }
    check.done()?;
    Ok(list_parts::Ask { session: Arc::clone(session), page_size, after: after.unwrap_or_default() })
}

impl From<(Arc<Session>, Page)> for pb::ListPartsResponse {
    fn from((session, page): (Arc<Session>, Page)) -> Self {
        let part = |part: Stored| pb::Part {
            part_number: part.number.cast_signed(),
            size: part.size.cast_signed(),
            etag: part.etag,
            checksum: part.checksum.map(Into::into),
            last_modified: part.last_modified.map(timestamp),
        };
        Self {
            parts: page.parts.into_iter().map(part).collect(),
            next_page_token: page.next.map(|next| next.to_string()).unwrap_or_default(),
            part_size: session.plan.part_size().cast_signed(),
            part_count: session.plan.count().cast_signed(),
            size: session.plan.size().cast_signed(),
            deadline: Some(timestamp(session.deadline)),
            checksum_algorithm: algorithm(session.algorithm),
        }
    }
}

/// The end of an upload.
///
/// # Errors
/// [`Error::Invalid`].
pub fn parse_complete_upload(
    request: pb::CompleteUploadRequest,
    session: &Arc<Session>,
) -> Result<complete_upload::Ask, Error> {
    let mut check = Check::default();
    let mut parts = Vec::with_capacity(request.parts.len());
    for pb::CompletedPart { part_number, etag, checksum } in request.parts {
        let checksum = checksum.and_then(|checksum| parse_checksum(&mut check, "parts.checksum", checksum));
        // Those that are out of the plan are told of later, with all that is wrong with the parts.
        match u32::try_from(part_number) {
            Ok(number) if number > 0 => parts.push(complete_upload::Given { number, etag, checksum }),
            _ => check.wrong("parts.part_number", format!("be 1 or more, not {part_number}")),
        }
    }
    if !parts.is_sorted_by(|one, two| one.number < two.number) {
        check.wrong("parts", "be in the order of their numbers, each once");
    }
    let checksum = request.checksum.and_then(|checksum| parse_checksum(&mut check, "checksum", checksum));
    check.done()?;
    let session = Arc::clone(session);
    let ask = complete_upload::Ask { session, parts, create_only: request.create_only, checksum };
    ask.check()?;
    Ok(ask)
}

impl From<(ObjectKey, Made)> for pb::CompleteUploadResponse {
    fn from((key, made): (ObjectKey, Made)) -> Self {
        Self {
            key: key.as_str().to_owned(),
            etag: made.etag,
            version_id: made.version_id,
            size: made.size.cast_signed(),
            checksum: made.checksum.map(Into::into),
            composite: made.composite,
        }
    }
}

fn parse_checksum(check: &mut Check, path: &str, checksum: pb::Checksum) -> Option<Checksum> {
    fn exactly<const N: usize>(check: &mut Check, path: &str, field: &str, bytes: Vec<u8>) -> Option<[u8; N]> {
        let got = bytes.len();
        let sum = bytes.try_into().ok();
        if sum.is_none() {
            check.wrong(
                &format!("{path}.{field}"),
                format!("be {N} raw bytes (neither hex nor Base64 text), not {got}"),
            );
        }
        sum
    }
    match checksum.value {
        Some(pb::checksum::Value::Crc32(sum)) => exactly(check, path, "crc32", sum).map(Checksum::Crc32),
        Some(pb::checksum::Value::Crc32c(sum)) => exactly(check, path, "crc32c", sum).map(Checksum::Crc32c),
        Some(pb::checksum::Value::Crc64nvme(sum)) => exactly(check, path, "crc64nvme", sum).map(Checksum::Crc64nvme),
        Some(pb::checksum::Value::Sha1(sum)) => exactly(check, path, "sha1", sum).map(Checksum::Sha1),
        Some(pb::checksum::Value::Sha256(sum)) => exactly(check, path, "sha256", sum).map(Checksum::Sha256),
        None => {
            check.wrong(path, "have one of `crc32`, `crc32c`, `crc64nvme`, `sha1` and `sha256`");
            None
        }
    }
}

fn parse_storage_class(check: &mut Check, class: i32) -> Option<StorageClass> {
    match pb::StorageClass::try_from(class) {
        Ok(pb::StorageClass::Unspecified) => None,
        Ok(pb::StorageClass::Standard) => Some(StorageClass::Standard),
        Ok(pb::StorageClass::StandardIa) => Some(StorageClass::StandardIa),
        Ok(pb::StorageClass::OnezoneIa) => Some(StorageClass::OnezoneIa),
        Ok(pb::StorageClass::IntelligentTiering) => Some(StorageClass::IntelligentTiering),
        Ok(pb::StorageClass::GlacierIr) => Some(StorageClass::GlacierIr),
        Ok(pb::StorageClass::Glacier) => Some(StorageClass::Glacier),
        Ok(pb::StorageClass::DeepArchive) => Some(StorageClass::DeepArchive),
        Ok(pb::StorageClass::ReducedRedundancy) => Some(StorageClass::ReducedRedundancy),
        Err(_) => {
            check.wrong("upload.storage_class", format!("be a value of `StorageClass`, not {class}"));
            None
        }
    }
}

fn parse_encryption(check: &mut Check, encryption: pb::Encryption) -> Option<Encryption> {
    match encryption.method {
        Some(pb::encryption::Method::SseS3(pb::SseS3 {})) => Some(Encryption::S3),
        Some(pb::encryption::Method::SseKms(pb::SseKms { key_id, bucket_key })) => {
            let key_id = check.header("upload.encryption.sse_kms.key_id", (!key_id.is_empty()).then_some(key_id));
            Some(Encryption::Kms { key_id, bucket_key })
        }
        None => {
            check.wrong("upload.encryption", "have one of `sse_s3` and `sse_kms`");
            None
        }
    }
}

/// The items of a batch, each parsed or refused on its own.
///
/// # Errors
/// [`Error::BatchSize`].
pub fn parse_batch(request: pb::BatchPresignRequest) -> Result<Vec<Result<presign::Ask, Error>>, Error> {
    let got = request.requests.len();
    if !(1..=MAX_BATCH).contains(&got) {
        return Err(Error::BatchSize { got, max: MAX_BATCH });
    }
    Ok(request.requests.into_iter().map(presign::Ask::try_from).collect())
}

impl TryFrom<pb::ListRequest> for list::Ask {
    type Error = Error;

    fn try_from(request: pb::ListRequest) -> Result<Self, Error> {
        let mut check = Check::default();
        let bucket = check.bucket(&request.bucket);
        let prefix = check.take("prefix", Prefix::parse(request.prefix));
        if request.delimiter.chars().count() > 16 || request.delimiter.chars().any(char::is_control) {
            check.wrong("delimiter", "be at most 16 characters, none of them a control character");
        }
        let page_size = match u32::try_from(request.page_size) {
            Ok(0) => DEFAULT_PAGE,
            Ok(size) => u16::try_from(size).unwrap_or(MAX_PAGE).min(MAX_PAGE),
            Err(_) => {
                check.wrong("page_size", "be 0 (for the default) to 1,000");
                DEFAULT_PAGE
            }
        };
        let download_ttl = check.lifetime("download_ttl", request.download_ttl);
        check.done()?;
        match (bucket, prefix) {
            (Some(bucket), Some(prefix)) => Ok(Self {
                bucket,
                prefix,
                delimiter: request.delimiter,
                page_size,
                page_token: request.page_token,
                download_ttl,
            }),
            _ => Err(Error::internal("a field is missing that no violation names")),
        }
    }
}

impl TryFrom<pb::StatRequest> for stat::Ask {
    type Error = Error;

    fn try_from(request: pb::StatRequest) -> Result<Self, Error> {
        let mut check = Check::default();
        let bucket = check.bucket(&request.bucket);
        let key = check.take("key", ObjectKey::parse(request.key));
        let version_id = check.text("version_id", request.version_id);
        check.done()?;
        match (bucket, key) {
            (Some(bucket), Some(key)) => Ok(Self { bucket, key, version_id }),
            _ => Err(Error::internal("a field is missing that no violation names")),
        }
    }
}

impl TryFrom<pb::RevokeRequest> for revoke::Ask {
    type Error = Error;

    fn try_from(request: pb::RevokeRequest) -> Result<Self, Error> {
        use pb::revoke_request::Target;
        let mut check = Check::default();
        let target = match request.target {
            Some(Target::Signer(name)) => Some(revoke::Target::Signer(name)),
            Some(Target::Object(pb::ObjectRef { bucket, key })) => {
                let want = BucketName::parse(&bucket).map_err(|_| "be the name of a bucket of the settings");
                let bucket = check.take("object.bucket", want);
                let key = check.take("object.key", ObjectKey::parse(key));
                bucket.zip(key).map(|(bucket, key)| revoke::Target::Object(bucket, key))
            }
            Some(Target::Url(url)) => {
                check.take("url", SignedUrl::parse(&url)).map(|url| revoke::Target::KeyOfUrl(url.access_key_id))
            }
            None => {
                check.wrong("target", "be one of `signer`, `object` and `url`");
                None
            }
        };
        if pb::Urgency::try_from(request.urgency).is_err() {
            check.wrong("urgency", format!("be a value of `Urgency`, not {}", request.urgency));
        }
        if request.reason.len() > 1024 || request.reason.chars().any(char::is_control) {
            check.wrong("reason", "be at most 1,024 bytes without control characters");
        }
        let printable = request.request_id.bytes().all(|b| (b'!'..=b'~').contains(&b));
        if request.request_id.len() > 128 || !printable {
            check.wrong("request_id", "be at most 128 characters of printable ASCII without spaces");
        }
        check.done()?;
        let target = target.ok_or_else(|| Error::internal("a field is missing that no violation names"))?;
        let request_id = if request.request_id.is_empty() {
            ulid::Ulid::from_parts(presign::millis(SystemTime::now()), rand::random()).to_string()
        } else {
            request.request_id
        };
        let immediate = request.urgency == i32::from(pb::Urgency::Immediate);
        Ok(Self { target, immediate, reason: request.reason, request_id, dry_run: request.dry_run })
    }
}

fn step(name: &str, at: SystemTime) -> pb::RotationStep {
    pb::RotationStep { name: name.to_owned(), at: Some(timestamp(at)) }
}

impl From<revoke::Revoked> for pb::RevokeResponse {
    fn from(revoked: revoke::Revoked) -> Self {
        use pb::revoke_response::Outcome;
        let mut blast_radius = None;
        let outcome = match revoked.outcome {
            revoke::Outcome::Object { new_key, rotation } => {
                let mut pb = pb::ObjectRotation { new_key: new_key.as_str().to_owned(), ..Default::default() };
                if let Some(rotation) = rotation {
                    pb.confirmed_at = Some(timestamp(rotation.confirmed_at));
                    pb.versions_deleted = rotation.versions_deleted;
                    pb.size = rotation.size;
                    pb.steps = rotation.steps.into_iter().map(|(name, at)| step(name.as_str(), at)).collect();
                }
                Outcome::ObjectRotation(pb)
            }
            revoke::Outcome::Signer { signer, old_key, radius, rotation } => {
                blast_radius = Some(radius.into());
                let mut pb = pb::SignerRotation { signer, old_access_key_id: old_key, ..Default::default() };
                if let Some(rotation) = rotation {
                    pb.new_access_key_id = rotation.new_key;
                    pb.confirmed_at = Some(timestamp(rotation.confirmed_at));
                    pb.steps = rotation.steps.iter().map(|done| step(done.step, done.at)).collect();
                }
                Outcome::SignerRotation(pb)
            }
        };
        let revoke::Revoked { request_id, already_dead, .. } = revoked;
        Self { outcome: Some(outcome), request_id, already_dead, blast_radius }
    }
}

impl From<UrlsOut> for pb::UrlsOut {
    fn from(out: UrlsOut) -> Self {
        let caller = out.caller.map(|caller| caller.to_string()).unwrap_or_default();
        Self { caller, urls: out.urls, latest_expiry: Some(timestamp(out.latest_expiry)) }
    }
}

impl From<revoke::BlastRadius> for pb::BlastRadius {
    fn from(radius: revoke::BlastRadius) -> Self {
        Self {
            signer: radius.signer.name.clone(),
            generation: radius.generation,
            routes: radius.signer.routes.iter().map(route).collect(),
            latest_expiry: radius.urls_out.iter().map(|out| out.latest_expiry).max().map(timestamp),
            urls_out: radius.urls_out.into_iter().map(Into::into).collect(),
        }
    }
}

fn route(route: &RouteSettings) -> pb::Route {
    pb::Route { bucket: route.bucket.to_string(), prefix: route.prefix.as_str().to_owned() }
}

impl TryFrom<pb::InspectRequest> for SignedUrl {
    type Error = Error;

    fn try_from(request: pb::InspectRequest) -> Result<Self, Error> {
        Self::parse(&request.url).map_err(|must| Error::invalid("url", must))
    }
}

impl From<inspect::Inspected> for pb::InspectResponse {
    fn from(inspected: inspect::Inspected) -> Self {
        let inspect::Inspected { state, object, signer, url } = inspected;
        let state = match state {
            inspect::State::Live => pb::State::Live,
            inspect::State::Expired => pb::State::Expired,
            inspect::State::Revoked => pb::State::Revoked,
            inspect::State::Foreign => pb::State::Foreign,
        };
        let (bucket, key) = object.map(|(bucket, key)| (bucket.to_string(), key.as_str().to_owned())).unzip();
        Self {
            state: state.into(),
            method: url.method.to_owned(),
            bucket: bucket.unwrap_or_default(),
            key: key.unwrap_or_default(),
            version_id: url.version_id,
            signer: signer.unwrap_or_default(),
            access_key_id: url.access_key_id,
            issue_id: url.issue_id.map(|id| id.to_string()).unwrap_or_default(),
            signed_at: Some(timestamp(url.signed_at)),
            expires_at: Some(timestamp(url.expires_at)),
        }
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

impl From<presign::Presigned> for pb::PresignResponse {
    fn from(presigned: presign::Presigned) -> Self {
        Self {
            method: presigned.request.method,
            url: presigned.request.url,
            headers: presigned.request.headers,
            form_fields: presigned.form_fields.into_iter().map(|(name, value)| pb::FormField { name, value }).collect(),
            expires_at: Some(timestamp(presigned.expires_at)),
            // Seven days at the most, so that it always fits.
            expires_in: presigned.expires_in.try_into().ok(),
            signer: presigned.signer.name.clone(),
            issue_id: presigned.issue_id.map(|id| id.to_string()).unwrap_or_default(),
        }
    }
}

impl From<Result<presign::Presigned, Error>> for pb::PresignResult {
    fn from(result: Result<presign::Presigned, Error>) -> Self {
        let result = match result {
            Ok(presigned) => pb::presign_result::Result::Response(presigned.into()),
            Err(error) => pb::presign_result::Result::Error(error.into()),
        };
        Self { result: Some(result) }
    }
}

impl From<(Entry, Option<presign::Presigned>)> for pb::ObjectEntry {
    fn from((entry, download): (Entry, Option<presign::Presigned>)) -> Self {
        Self {
            key: entry.key,
            size: entry.size,
            etag: entry.etag,
            last_modified: entry.last_modified.map(timestamp),
            storage_class: entry.storage_class,
            download: download.map(Into::into),
        }
    }
}

impl From<list::Page> for pb::ListResponse {
    fn from(page: list::Page) -> Self {
        Self {
            objects: page.objects.into_iter().map(Into::into).collect(),
            common_prefixes: page.common_prefixes,
            next_page_token: page.next_page_token,
        }
    }
}

impl From<Checksum> for pb::Checksum {
    fn from(checksum: Checksum) -> Self {
        let value = match checksum {
            Checksum::Crc32(sum) => pb::checksum::Value::Crc32(sum.into()),
            Checksum::Crc32c(sum) => pb::checksum::Value::Crc32c(sum.into()),
            Checksum::Crc64nvme(sum) => pb::checksum::Value::Crc64nvme(sum.into()),
            Checksum::Sha1(sum) => pb::checksum::Value::Sha1(sum.into()),
            Checksum::Sha256(sum) => pb::checksum::Value::Sha256(sum.into()),
        };
        Self { value: Some(value) }
    }
}

impl From<(ObjectKey, Facts)> for pb::StatResponse {
    fn from((key, facts): (ObjectKey, Facts)) -> Self {
        Self {
            key: key.as_str().to_owned(),
            size: facts.size,
            etag: facts.etag,
            last_modified: facts.last_modified.map(timestamp),
            content_type: facts.content_type,
            checksum: facts.checksum.map(Into::into),
            version_id: facts.version_id,
            metadata: facts.metadata,
            storage_class: facts.storage_class,
        }
    }
}

impl From<Kind> for pb::SignerKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Ambient => Self::Ambient,
            Kind::IamUser => Self::IamUser,
        }
    }
}

impl From<signers::Found> for pb::Signer {
    fn from(found: signers::Found) -> Self {
        let signers::Found { signer, key, urls_out, under_way, pending } = found;
        let unavailable = key.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let key = key.ok();
        let credentials = key.as_ref().map(|key| &key.credentials);
        Self {
            name: signer.name.clone(),
            kind: pb::SignerKind::from(signer.kind).into(),
            generation: key.as_ref().map(|key| key.generation).unwrap_or_default(),
            access_key_id: credentials.map(|c| c.access_key_id().to_owned()).unwrap_or_default(),
            since: key.as_ref().map(|key| timestamp(key.since)),
            key_expires_at: credentials.and_then(Credentials::expiry).map(timestamp),
            routes: signer.routes.iter().map(route).collect(),
            unavailable,
            rotation: (under_way.is_some() || pending.is_some()).then(|| pb::RotationUnderWay {
                old_access_key_id: under_way.as_ref().map(|r| r.old_key.clone()).unwrap_or_default(),
                new_access_key_id: pending.unwrap_or_default(),
                since: under_way.as_ref().map(|r| timestamp(r.since)),
                immediate: under_way.as_ref().is_some_and(|r| r.immediate),
                steps: under_way.iter().flat_map(|r| r.steps()).map(|done| step(done.step, done.at)).collect(),
            }),
            latest_expiry: urls_out.iter().map(|out| out.latest_expiry).max().map(timestamp),
            urls_out: urls_out.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Vec<signers::Found>> for pb::ListSignersResponse {
    fn from(found: Vec<signers::Found>) -> Self {
        Self { signers: found.into_iter().map(Into::into).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(request: pb::PresignRequest) -> Vec<String> {
        match presign::Ask::try_from(request) {
            Err(Error::Invalid(violations)) => violations.into_iter().map(|v| v.field).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once_by_field() {
        assert_eq!(violations(pb::PresignRequest::default()), ["bucket", "key", "operation"]);
        let upload = pb::Upload {
            content_length: Some(-1),
            content_type: Some("text/plain ".into()),
            checksum: Some(pb::Checksum { value: Some(pb::checksum::Value::Sha256(vec![0; 31])) }),
            metadata: [("Upper".into(), "é".into())].into(),
            tags: (0..11).map(|n| (n.to_string(), String::new())).collect(),
            storage_class: 99,
            encryption: Some(pb::Encryption::default()),
            ..pb::Upload::default()
        };
        let request = pb::PresignRequest {
            bucket: "b".into(),
            key: "a/../b".into(),
            ttl: Some(prost_types::Duration { seconds: 1, nanos: 5 }),
            operation: Some(pb::presign_request::Operation::Upload(upload)),
        };
        assert_eq!(
            violations(request),
            [
                "key",
                "ttl",
                "upload.content_length",
                "upload.metadata",
                "upload.metadata[Upper]",
                "upload.tags",
                "upload.content_type",
                "upload.checksum.sha256",
                "upload.storage_class",
                "upload.encryption",
            ]
        );
    }

    #[test]
    fn page_sizes_are_coerced_as_aip_158_has_it() {
        let size = |page_size| {
            let request = pb::ListRequest { bucket: "b".into(), page_size, ..pb::ListRequest::default() };
            list::Ask::try_from(request).map(|ask| ask.page_size).ok()
        };
        assert_eq!([size(0), size(7), size(5000), size(-1)], [Some(100), Some(7), Some(1000), None]);
    }
}
