//! Uploads in parts. `s3s-fs` takes in the parts; what becomes of them is
//! decided here.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use crc_fast::CrcAlgorithm;
use percent_encoding::utf8_percent_encode;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Md5};
use s3s::dto;
#[allow(clippy::wildcard_imports, reason = "fifty names of one vocabulary")]
use s3s::dto::*;
use s3s::{S3, S3Error, S3Request, S3Response, S3Result, s3_error};

use super::body::{Body, known_length, refusal};
use super::joined::{Joined, PartFile};
use super::names::{KEY, SUMS, file_name, hide_key};
use super::{LISTED, Store, ask, cannot, create_only, no_extras, no_match, only, promised, remove_if_there, source};

/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html>
const MIN_PART_BYTES: i64 = 5 << 20;

/// The MD5 of a file in hexadecimal, which is the `ETag` of a part, and its
/// checksum.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums {
    md5: String,
    checksum: dto::Checksum,
}

/// The checksum of an upload.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kind {
    algorithm: String,
    composite: bool,
}

impl Kind {
    /// As S3 has it: CRC-64/NVME is of the full object unless otherwise said,
    /// SHAs can't be.
    fn parse(algorithm: Option<&str>, kind: Option<&str>) -> S3Result<Option<Self>> {
        let Some(algorithm) = algorithm else {
            let refused = s3_error!(InvalidRequest, "a checksum type needs a checksum algorithm");
            return if kind.is_some() { Err(refused) } else { Ok(None) };
        };
        let crc64 = algorithm == ChecksumAlgorithm::CRC64NVME;
        let composite = kind.map_or(!crc64, |kind| kind == ChecksumType::COMPOSITE);
        if (crc64 && composite) || (algorithm.starts_with("SHA") && !composite) {
            return Err(s3_error!(InvalidRequest, "{algorithm} has no such checksum type"));
        }
        Ok(Some(Self { algorithm: algorithm.to_owned(), composite }))
    }

    /// Whether this is what is verified there.
    fn is_in(&self, hasher: &ChecksumHasher) -> bool {
        match self.algorithm.as_str() {
            ChecksumAlgorithm::CRC32 => hasher.crc32.is_some(),
            ChecksumAlgorithm::CRC32C => hasher.crc32c.is_some(),
            ChecksumAlgorithm::CRC64NVME => hasher.crc64nvme.is_some(),
            ChecksumAlgorithm::SHA1 => hasher.sha1.is_some(),
            _ => hasher.sha256.is_some(),
        }
    }

    /// Where `sums` has it.
    fn slot<'a>(&self, sums: &'a mut dto::Checksum) -> &'a mut Option<String> {
        match self.algorithm.as_str() {
            ChecksumAlgorithm::CRC32 => &mut sums.checksum_crc32,
            ChecksumAlgorithm::CRC32C => &mut sums.checksum_crc32c,
            ChecksumAlgorithm::CRC64NVME => &mut sums.checksum_crc64nvme,
            ChecksumAlgorithm::SHA1 => &mut sums.checksum_sha1,
            _ => &mut sums.checksum_sha256,
        }
    }

    /// The checksum of the object that `parts` become: of all its bytes, or, a
    /// composite one, of the parts' checksums, with their number.
    /// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html>
    fn whole(&self, parts: &[&Part]) -> S3Result<dto::Checksum> {
        let mut hasher = self.hasher();
        let mut crc: Option<u64> = None;
        let mut len = 0;
        for part in parts {
            let sum = self.slot(&mut promised!(part)).take().and_then(|sum| BASE64_STANDARD.decode(sum).ok());
            let sum = sum.ok_or_else(|| s3_error!(InternalError, "a part without its checksum"))?;
            hasher.update(&sum);
            if let Some(of) = self.crc() {
                len = sum.len();
                let sum = sum.iter().fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
                let size = part.size.and_then(|size| size.try_into().ok()).unwrap_or_default();
                crc = Some(crc.map_or(sum, |crc| crc_fast::checksum_combine(of, crc, sum, size)));
            }
        }
        let mut sums = hasher.finalize();
        let slot = self.slot(&mut sums);
        let name = if self.composite {
            *slot = slot.take().map(|sum| format!("{sum}-{}", parts.len()));
            ChecksumType::COMPOSITE
        } else {
            *slot = crc.map(|crc| BASE64_STANDARD.encode(&crc.to_be_bytes()[8 - len..]));
            ChecksumType::FULL_OBJECT
        };
        sums.checksum_type = Some(ChecksumType::from_static(name));
        Ok(sums)
    }

    fn crc(&self) -> Option<CrcAlgorithm> {
        match self.algorithm.as_str() {
            ChecksumAlgorithm::CRC32 => Some(CrcAlgorithm::Crc32IsoHdlc),
            ChecksumAlgorithm::CRC32C => Some(CrcAlgorithm::Crc32Iscsi),
            ChecksumAlgorithm::CRC64NVME => Some(CrcAlgorithm::Crc64Nvme),
            _ => None,
        }
    }

    fn hasher(&self) -> ChecksumHasher {
        let is = |name| self.algorithm == name;
        ChecksumHasher {
            crc32: is(ChecksumAlgorithm::CRC32).then(Default::default),
            crc32c: is(ChecksumAlgorithm::CRC32C).then(Default::default),
            crc64nvme: is(ChecksumAlgorithm::CRC64NVME).then(Default::default),
            sha1: is(ChecksumAlgorithm::SHA1).then(Default::default),
            sha256: is(ChecksumAlgorithm::SHA256).then(Default::default),
        }
    }
}

/// The `ETag` of the object that `parts` become: the MD5 of their MD5s, and how
/// many they are.
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html>
fn etag_of(parts: &[&Part]) -> S3Result<String> {
    let mut md5 = Md5::new();
    for part in parts {
        let etag = part.e_tag.as_ref().map(ETag::value).unwrap_or_default();
        let sum = u128::from_str_radix(etag, 16).map_err(S3Error::internal_error)?;
        md5.update(&sum.to_be_bytes());
    }
    Ok(format!("{}-{}", hex(&md5.finalize()), parts.len()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}

/// The parts that are `asked` for, as they are `there`.
fn chosen<'a>(
    asked: Option<&CompletedMultipartUpload>,
    there: &'a BTreeMap<i32, Part>,
    kind: Option<&Kind>,
) -> S3Result<Vec<&'a Part>> {
    let asked = asked.and_then(|upload| upload.parts.as_deref()).unwrap_or_default();
    if asked.is_empty() {
        return Err(s3_error!(MalformedXML, "there must be at least one part"));
    }
    if !asked.is_sorted_by(|a, b| a.part_number < b.part_number) {
        return Err(s3_error!(InvalidPartOrder));
    }
    let mut parts = Vec::with_capacity(asked.len());
    for (n, part) in (1..).zip(asked) {
        let number = part.part_number.unwrap_or_default();
        let found = there.get(&number).filter(|found| part.e_tag.is_some() && found.e_tag == part.e_tag);
        let found = found.ok_or_else(|| s3_error!(InvalidPart, "there is no part {number} with this ETag"))?;
        if parts.len() + 1 < asked.len() && found.size < Some(MIN_PART_BYTES) {
            return Err(s3_error!(EntityTooSmall));
        }
        let (told, has) = (promised!(part), promised!(found));
        match (only(&told), kind) {
            (Some(_), _) if told != has => {
                return Err(s3_error!(InvalidPart, "there is no part {number} with this checksum"));
            }
            (None, Some(kind)) if kind.composite => {
                return Err(s3_error!(InvalidRequest, "the checksum of part {number} is missing"));
            }
            // S3 says so, too, where it is no better.
            // <https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html>
            (_, Some(_)) if number != n => {
                return Err(s3_error!(InternalError, "parts with checksums are numbered from 1 without a gap"));
            }
            _ => {}
        }
        parts.push(found);
    }
    Ok(parts)
}

/// Shows all that is in a file.
fn read_all(path: &Path, mut show: impl FnMut(&[u8])) -> io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => show(&buffer[..n]),
        }
    }
}

fn sums_of(path: &Path, kind: Option<&Kind>) -> io::Result<Sums> {
    let (mut md5, mut hasher) = (Md5::new(), kind.map(Kind::hasher).unwrap_or_default());
    read_all(path, |bytes| {
        md5.update(bytes);
        hasher.update(bytes);
    })?;
    Ok(Sums { md5: hex(&md5.finalize()), checksum: hasher.finalize() })
}

/// The metadata that `s3s-fs` keeps of an upload that is open.
fn user_metadata(path: &Path) -> S3Result<Metadata> {
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(s3_error!(NoSuchUpload)),
        text => text.map_err(S3Error::internal_error)?,
    };
    let mut kept: serde_json::Value = serde_json::from_slice(&text).map_err(S3Error::internal_error)?;
    serde_json::from_value(kept["user_metadata"].take()).map_err(S3Error::internal_error)
}

impl Store {
    /// Refuses an upload id that is not of this object. `s3s-fs` would take
    /// it for any object, but only from the key that made it: a signer's
    /// could never send a part to an upload that the service opened.
    ///
    /// Says what checksum its parts have.
    fn upload(&self, bucket: &str, name: &str, id: &str) -> S3Result<Option<Kind>> {
        if !id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
            return Err(s3_error!(NoSuchUpload));
        }
        let kept = user_metadata(&self.sidecar(bucket, name, &format!(".upload-{id}.metadata.json")))?;
        let kind = kept.get(SUMS).and_then(|kind| kind.split_once(' '));
        Kind::parse(kind.map(|(algorithm, _)| algorithm), kind.map(|(_, kind)| kind))
    }

    /// What there is in the file of a part, read only if nobody knows.
    async fn sums(&self, path: PathBuf, kind: Option<&Kind>) -> S3Result<Sums> {
        let file = std::fs::metadata(&path).map_err(S3Error::internal_error)?;
        let state = (file.modified().map_err(S3Error::internal_error)?, file.len());
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&path).cloned();
        if let Some((changed, length, sums)) = known
            && (changed, length) == state
        {
            return Ok(sums);
        }
        let (read, kind) = (path.clone(), kind.cloned());
        let sums = tokio::task::spawn_blocking(move || sums_of(&read, kind.as_ref())).await;
        let sums = sums.map_err(S3Error::internal_error)?.map_err(S3Error::internal_error)?;
        self.know(path, state, sums.clone());
        Ok(sums)
    }

    fn know(&self, path: PathBuf, (changed, length): (SystemTime, u64), sums: Sums) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(path, (changed, length, sums));
    }

    /// Takes what is left of a part away.
    fn forget(&self, id: &str, number: i32) -> S3Result<()> {
        let path = self.part(id, number);
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
        remove_if_there(&path)
    }

    /// Takes what is left of an upload away. Nobody waits for the files: where
    /// they are still being written to the disk, that may take seconds.
    fn forget_all(&self, id: &str, numbers: Vec<i32>) {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let paths: Vec<_> = numbers.into_iter().map(|number| self.part(id, number)).collect();
        for path in &paths {
            known.remove(path);
        }
        drop(known);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = paths.iter().try_for_each(|path| remove_if_there(path)) {
                tracing::warn!(%error, "parts are left");
            }
        });
    }

    fn joined(&self, id: &str) -> Arc<tokio::sync::Mutex<Joined>> {
        let mut joined = self.joined.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(joined.entry(id.to_owned()).or_default())
    }

    fn joined_file(&self, id: &str) -> PathBuf {
        self.root.join(format!(".upload_id-{id}.joined"))
    }

    fn part_file(&self, id: &str, number: i32) -> Option<PartFile> {
        let path = self.part(id, number);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (changed, _, sums) = known.get(&path)?;
        let (changed, etag) = (*changed, sums.md5.clone());
        drop(known);
        Some(PartFile { path, changed, etag })
    }

    /// Joins the parts that are next, unless somebody does so already.
    async fn join_ahead(&self, id: &str) {
        let Ok(mut joined) = self.joined(id).try_lock_owned() else { return };
        while let Some(part) = i32::try_from(joined.len() + 1).ok().and_then(|next| self.part_file(id, next)) {
            let to = self.joined_file(id);
            let join = tokio::task::spawn_blocking(move || joined.append(&to, &part).map(|()| joined));
            // What can't be joined now is tried again at the end.
            let Ok(Ok(more)) = join.await else { return };
            joined = more;
        }
    }

    fn part(&self, id: &str, number: i32) -> PathBuf {
        self.root.join(format!(".upload_id-{id}.part-{number}"))
    }

    /// The parts of an upload, in order, with what `s3s-fs` does not keep of
    /// them.
    async fn parts(&self, bucket: &str, name: &str, id: &str) -> S3Result<BTreeMap<i32, Part>> {
        let kind = self.upload(bucket, name, id)?;
        let input = ListPartsInput::builder().bucket(bucket.into()).key(name.into()).upload_id(id.into()).build();
        let input = input.map_err(S3Error::internal_error)?;
        let mut parts = BTreeMap::new();
        for mut part in self.files.list_parts(ask(input)).await?.output.parts.unwrap_or_default() {
            let number = part.part_number.unwrap_or_default();
            let Sums { md5, checksum } = self.sums(self.part(id, number), kind.as_ref()).await?;
            part.e_tag = Some(ETag::Strong(md5));
            if kind.is_some() {
                part.checksum_crc32 = checksum.checksum_crc32;
                part.checksum_crc32c = checksum.checksum_crc32c;
                part.checksum_crc64nvme = checksum.checksum_crc64nvme;
                part.checksum_sha1 = checksum.checksum_sha1;
                part.checksum_sha256 = checksum.checksum_sha256;
            }
            parts.insert(number, part);
        }
        Ok(parts)
    }

    pub(super) async fn open_upload(
        &self,
        mut req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        no_extras!(req.input);
        req.credentials = None;
        let input = &mut req.input;
        let key = input.key.clone();
        hide_key(&mut input.key, &mut input.metadata);
        input.content_type.get_or_insert_with(|| "binary/octet-stream".to_owned());
        let (algorithm, kind) = (input.checksum_algorithm.clone(), input.checksum_type.clone());
        let kind =
            Kind::parse(algorithm.as_ref().map(ChecksumAlgorithm::as_str), kind.as_ref().map(ChecksumType::as_str))?;
        let kind = kind.map(|Kind { algorithm, composite }| {
            let kind = if composite { ChecksumType::COMPOSITE } else { ChecksumType::FULL_OBJECT };
            input.metadata.get_or_insert_default().insert(SUMS.to_owned(), format!("{algorithm} {kind}"));
            ChecksumType::from_static(kind)
        });
        let mut response = self.files.create_multipart_upload(req).await?;
        response.output.key = Some(key);
        response.output.checksum_algorithm = algorithm;
        response.output.checksum_type = kind;
        Ok(response)
    }

    pub(super) async fn take_part(
        &self,
        mut req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        known_length(&req.headers)?;
        req.credentials = None;
        let input = &mut req.input;
        input.key = file_name(&input.key);
        let kind = self.upload(&input.bucket, &input.key, &input.upload_id)?;
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "`partNumber` must be 1 to 10000"));
        }
        let (bucket, name, id) = (input.bucket.clone(), input.key.clone(), input.upload_id.clone());
        let number = input.part_number;
        let body = Body::new(
            input.body.take(),
            promised!(input),
            input.checksum_algorithm.as_ref(),
            input.content_md5.take(),
            req.trailing_headers.clone(),
        )?;
        let promised = body.promised.clone();
        if let Some(kind) = kind.as_ref().filter(|kind| !kind.is_in(&body.hasher)) {
            return Err(s3_error!(InvalidRequest, "each part must come with its {} checksum", kind.algorithm));
        }
        input.body = Some(body.into_blob());
        let mut response = self.files.upload_part(req).await.map_err(refusal)?;
        if let Err(error) = self.upload(&bucket, &name, &id) {
            // The upload was given up or completed meanwhile.
            self.forget(&id, number)?;
            return Err(error);
        }
        let path = self.part(&id, number);
        if let Ok(file) = std::fs::metadata(&path)
            && let (Ok(changed), Some(etag)) = (file.modified(), &response.output.e_tag)
            && (kind.is_none() || only(&promised).is_some())
        {
            let sums = Sums { md5: etag.value().to_owned(), checksum: promised.clone() };
            self.know(path, (changed, file.len()), sums);
        }
        self.join_ahead(&id).await;
        // Kept promises, by now.
        response.output.checksum_crc32 = promised.checksum_crc32;
        response.output.checksum_crc32c = promised.checksum_crc32c;
        response.output.checksum_crc64nvme = promised.checksum_crc64nvme;
        response.output.checksum_sha1 = promised.checksum_sha1;
        response.output.checksum_sha256 = promised.checksum_sha256;
        Ok(response)
    }

    pub(super) async fn copy_part(
        &self,
        mut req: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        req.credentials = None;
        let input = &mut req.input;
        input.key = file_name(&input.key);
        self.upload(&input.bucket, &input.key, &input.upload_id)?;
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "`partNumber` must be 1 to 10000"));
        }
        let (_, name) = source(&mut input.copy_source)?;
        *name = file_name(name).into();
        let _unchanged = self.lock.read().await;
        self.files.upload_part_copy(req).await
    }

    pub(super) async fn page_of_parts(&self, req: S3Request<ListPartsInput>) -> S3Result<S3Response<ListPartsOutput>> {
        let input = req.input;
        let after = input.part_number_marker.as_ref().map_or(0, |marker| *marker);
        let limit = input.max_parts.unwrap_or(1000).clamp(0, 1000);
        let parts = self.parts(&input.bucket, &file_name(&input.key), &input.upload_id).await?;
        let mut parts: Vec<_> = parts.into_values().filter(|part| part.part_number > Some(after)).collect();
        let page = usize::try_from(limit).unwrap_or_default();
        let more = parts.len() > page;
        parts.truncate(page);
        let output = ListPartsOutput {
            next_part_number_marker: parts.last().filter(|_| more).and_then(|part| part.part_number),
            is_truncated: Some(more),
            parts: Some(parts),
            max_parts: Some(limit),
            part_number_marker: input.part_number_marker,
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            storage_class: Some(StorageClass::from_static(StorageClass::STANDARD)),
            ..ListPartsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    pub(super) async fn complete(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        let promised = promised!(input);
        no_match(input.if_match.as_ref())?;
        let new = create_only(input.if_none_match.as_ref())?;
        let (bucket, name, id) = (input.bucket, file_name(&input.key), input.upload_id);
        let _alone = self.lock.write().await;
        let kind = self.upload(&bucket, &name, &id)?;
        let there = self.parts(&bucket, &name, &id).await?;
        let parts = chosen(input.multipart_upload.as_ref(), &there, kind.as_ref())?;
        let size: i64 = parts.iter().filter_map(|part| part.size).sum();
        if input.mpu_object_size.is_some_and(|announced| announced != size) {
            return Err(s3_error!(InvalidRequest, "the parts have {size} bytes together"));
        }
        if new && self.object(&bucket, &name).exists() {
            return Err(s3_error!(PreconditionFailed, "there is such an object already"));
        }
        let sums = kind.as_ref().map(|kind| kind.whole(&parts)).transpose()?.unwrap_or_default();
        if only(&promised).is_some() && promised!(sums) != promised {
            return Err(s3_error!(BadDigest, "the object does not have the checksum given"));
        }
        let etag = etag_of(&parts)?;
        let files = parts.iter().map(|part| self.part_file(&id, part.part_number.unwrap_or_default()));
        let files: Vec<_> = files.collect::<Option<_>>().ok_or_else(|| s3_error!(InternalError, "a part is gone"))?;
        let mut joined = self.joined(&id).lock_owned().await;
        let file = self.joined_file(&id);
        let to = file.clone();
        let join = tokio::task::spawn_blocking(move || joined.finish(&to, &files).map(|()| joined)).await;
        let _joined = join.map_err(S3Error::internal_error)?.map_err(S3Error::internal_error)?;
        self.publish(&file, &bucket, &name, &id, &etag, &sums).map_err(S3Error::internal_error)?;
        self.forget_all(&id, there.into_keys().collect());
        let output = CompleteMultipartUploadOutput {
            bucket: Some(bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(etag)),
            checksum_crc32: sums.checksum_crc32,
            checksum_crc32c: sums.checksum_crc32c,
            checksum_crc64nvme: sums.checksum_crc64nvme,
            checksum_sha1: sums.checksum_sha1,
            checksum_sha256: sums.checksum_sha256,
            checksum_type: sums.checksum_type,
            ..CompleteMultipartUploadOutput::default()
        };
        Ok(S3Response::new(output))
    }

    /// Makes the file `joined` the object, with what `s3s-fs` is to know of it.
    /// The caller holds the lock.
    fn publish(
        &self,
        joined: &Path,
        bucket: &str,
        name: &str,
        id: &str,
        etag: &str,
        sums: &dto::Checksum,
    ) -> io::Result<()> {
        let mut known = serde_json::Map::from_iter([("e_tag".to_owned(), etag.into())]);
        for (name, sum) in [
            ("checksum_crc32", &sums.checksum_crc32),
            ("checksum_crc32c", &sums.checksum_crc32c),
            ("checksum_crc64nvme", &sums.checksum_crc64nvme),
            ("checksum_sha1", &sums.checksum_sha1),
            ("checksum_sha256", &sums.checksum_sha256),
        ] {
            known.extend(sum.as_ref().map(|sum| (name.to_owned(), sum.as_str().into())));
        }
        std::fs::write(self.sidecar(bucket, name, ".internal.json"), serde_json::to_vec(&known)?)?;
        let metadata = self.sidecar(bucket, name, &format!(".upload-{id}.metadata.json"));
        std::fs::rename(metadata, self.sidecar(bucket, name, ".metadata.json"))?;
        std::fs::rename(joined, self.object(bucket, name))?;
        std::fs::remove_file(self.root.join(format!(".upload-{id}.json")))
    }

    pub(super) async fn give_up(
        &self,
        mut req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        req.credentials = None;
        req.input.key = file_name(&req.input.key);
        let (bucket, name, id) = (req.input.bucket.clone(), req.input.key.clone(), req.input.upload_id.clone());
        let there = self.parts(&bucket, &name, &id).await?;
        // Nobody joins what is given up.
        let _joined = self.joined(&id).lock_owned().await;
        let aborted = self.files.abort_multipart_upload(req).await?;
        self.forget_all(&id, there.into_keys().collect());
        Ok(aborted)
    }

    pub(super) fn open_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let ListMultipartUploadsInput { bucket, prefix, delimiter, max_uploads, key_marker, encoding_type, .. } =
            req.input;
        if delimiter.is_some() || max_uploads.is_some() || key_marker.is_some() {
            return Err(cannot("lists uploads in progress all at once"));
        }
        let of_bucket = format!(".bucket-{}.object-", BASE64_URL_SAFE_NO_PAD.encode(&bucket));
        let mut uploads = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(S3Error::internal_error)? {
            let entry = entry.map_err(S3Error::internal_error)?;
            let Some(file) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let id = file.strip_prefix(&of_bucket).and_then(|file| file.split_once(".upload-"));
            let Some(id) = id.and_then(|(_, file)| file.strip_suffix(".metadata.json")) else { continue };
            // It may have ended since.
            let Ok(mut kept) = user_metadata(&entry.path()) else { continue };
            let Some(key) = kept.remove(KEY).filter(|key| key.starts_with(prefix.as_deref().unwrap_or_default()))
            else {
                continue;
            };
            let initiated = entry.metadata().and_then(|file| file.modified()).map_err(S3Error::internal_error)?;
            uploads.push(MultipartUpload {
                key: Some(key),
                upload_id: Some(id.to_owned()),
                initiated: Some(initiated.into()),
                storage_class: Some(StorageClass::from_static(StorageClass::STANDARD)),
                ..MultipartUpload::default()
            });
        }
        uploads.sort_by(|one, two| (&one.key, &one.upload_id).cmp(&(&two.key, &two.upload_id)));
        let url = encoding_type.as_ref().is_some_and(|encoding| encoding.as_str() == EncodingType::URL);
        for upload in uploads.iter_mut().filter(|_| url) {
            upload.key = upload.key.take().map(|key| utf8_percent_encode(&key, LISTED).to_string());
        }
        let output = ListMultipartUploadsOutput {
            uploads: Some(uploads),
            is_truncated: Some(false),
            bucket: Some(bucket),
            prefix,
            encoding_type,
            ..ListMultipartUploadsOutput::default()
        };
        Ok(S3Response::new(output))
    }
}
