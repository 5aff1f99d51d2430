//! Uploads in parts, from the first call to the object, and all that comes
//! between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::api::Api;
use fileaccess::app::{App, KeySource, Sources};
use fileaccess::caller::Caller;
use fileaccess::config::{AuditSettings, Settings};
use fileaccess::ops::upload_token::{Session, TokenKey};
use fileaccess::pb;
use fileaccess::pb::file_access_server::FileAccess as _;
use fileaccess::pb::part_result::Result as Item;
use fileaccess::pb::presign_request::Operation;
use s3s::crypto::Checksum as _;
use sha2::{Digest as _, Sha256};
use tonic::{Code, Request, Status};

use crate::service::{fields, reason};
use crate::stage::{Answer, Backend, Stage, seconds};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        small_files_are_told_to_use_presign,
        parts_arrive_in_any_order,
        a_large_upload_goes_through_its_troubles,
        a_composite_checksum_is_of_the_parts,
        an_upload_is_given_up_and_nothing_is_left,
        another_replica_goes_on,
        a_token_is_good_for_its_caller_only,
        nothing_is_overwritten_if_so_asked,
        past_its_deadline_an_upload_can_only_be_given_up,
        ceilings_hold_for_uploads_in_parts,
        each_step_has_its_record,
        parts_outlive_the_key_that_signed_them,
        a_completion_goes_on_when_nobody_waits,
    ]
}

pub fn localstack_cases() -> Vec<Case> {
    cases![what_is_stored_with_the_object]
}

const MIB: usize = 1 << 20;

/// Bytes that are the same in no two parts.
fn bytes(size: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..size.div_ceil(4)).flat_map(|n| u32::try_from(n).unwrap().to_le_bytes()).collect();
    bytes.truncate(size);
    bytes
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

#[allow(clippy::unnecessary_wraps, reason = "it is a field's value as it stands in a request")]
fn crc64(bytes: &[u8]) -> Option<pb::Checksum> {
    let sum = s3s::crypto::Crc64Nvme::checksum(bytes).to_vec();
    Some(pb::Checksum { value: Some(pb::checksum::Value::Crc64nvme(sum)) })
}

fn start(key: &str, size: usize, part_size: usize) -> pb::StartUploadRequest {
    pb::StartUploadRequest {
        bucket: "files".into(),
        key: key.into(),
        size: size.try_into().unwrap(),
        part_size: part_size.try_into().unwrap(),
        ..pb::StartUploadRequest::default()
    }
}

/// The bytes of a part.
fn slice<'a>(started: &pb::StartUploadResponse, body: &'a [u8], number: i32) -> &'a [u8] {
    let part = usize::try_from(started.part_size).unwrap();
    let from = part * usize::try_from(number - 1).unwrap();
    &body[from..body.len().min(from + part)]
}

fn response(item: &pb::PartResult) -> &pb::PresignResponse {
    match &item.result {
        Some(Item::Response(response)) => response,
        other => panic!("{other:?}"),
    }
}

fn error(item: &pb::PartResult) -> (Code, String) {
    match &item.result {
        Some(Item::Error(status)) => (Code::from(status.code), status.message.clone()),
        other => panic!("{other:?}"),
    }
}

fn given(number: i32, answer: &Answer) -> pb::CompletedPart {
    assert_eq!(answer.status, 200, "{}", answer.text());
    pb::CompletedPart { part_number: number, etag: answer.header("etag").into(), checksum: None }
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    reason(&result.unwrap_err())
}

struct Play {
    stage: Stage,
}

impl Play {
    async fn new(backend: Backend) -> Self {
        Self { stage: Stage::new(backend).await }
    }

    async fn start(&self, request: pb::StartUploadRequest) -> pb::StartUploadResponse {
        self.stage.api.clone().start_upload(request).await.unwrap().into_inner()
    }

    async fn sign(&self, token: &str, parts: Vec<pb::PartRequest>, ttl: Option<i64>) -> Vec<pb::PartResult> {
        let request = pb::SignPartsRequest { upload_token: token.into(), parts, ttl: ttl.and_then(seconds) };
        self.stage.api.clone().sign_parts(request).await.unwrap().into_inner().parts
    }

    async fn sign_one(&self, token: &str, number: i32, checksum: Option<pb::Checksum>) -> pb::PresignResponse {
        let part = pb::PartRequest { part_number: number, checksum };
        response(&self.sign(token, vec![part], None).await[0]).clone()
    }

    async fn send(&self, presigned: &pb::PresignResponse, bytes: &[u8]) -> Answer {
        self.stage.send(presigned, bytes.to_vec()).await
    }

    async fn complete(&self, token: &str, parts: Vec<pb::CompletedPart>) -> Result<pb::CompleteUploadResponse, Status> {
        let request = pb::CompleteUploadRequest { upload_token: token.into(), parts, ..Default::default() };
        self.stage.api.clone().complete_upload(request).await.map(tonic::Response::into_inner)
    }

    async fn list(&self, token: &str, page_size: i32, page_token: &str) -> Result<pb::ListPartsResponse, Status> {
        let request = pb::ListPartsRequest { upload_token: token.into(), page_size, page_token: page_token.into() };
        self.stage.api.clone().list_parts(request).await.map(tonic::Response::into_inner)
    }

    async fn abort(&self, token: &str) -> Result<pb::AbortUploadResponse, Status> {
        let request = pb::AbortUploadRequest { upload_token: token.into() };
        self.stage.api.clone().abort_upload(request).await.map(tonic::Response::into_inner)
    }

    fn key(&self) -> Credentials {
        self.stage.app.signers["main"].key(SystemTime::now()).unwrap().credentials.clone()
    }

    /// How many uploads S3 has open.
    async fn open(&self) -> usize {
        let list = self.stage.s3(self.key()).list_multipart_uploads().bucket(&self.stage.bucket).send();
        list.await.unwrap().uploads().len()
    }
}

async fn small_files_are_told_to_use_presign(backend: Backend) {
    let play = Play::new(backend).await;
    for size in [0, 1, 5 * MIB - 1, 5 * MIB] {
        let status = play.stage.api.clone().start_upload(start("k", size, 0)).await.unwrap_err();
        assert_eq!(reason(&status), (Code::InvalidArgument, "INVALID_FIELD".into()));
        assert_eq!(fields(&status), ["size"]);
        assert!(status.message().contains("use Presign with `upload`"), "{}", status.message());
    }
    for size in [0, 1, 5 * MIB - 1, 5 * MIB] {
        let body = bytes(size);
        let length = i64::try_from(size).unwrap();
        let upload = Operation::Upload(pb::Upload { content_length: Some(length), ..pb::Upload::default() });
        let upload = play.stage.presign("small", upload).await;
        assert_eq!(play.send(&upload, &body).await.status, 200);
        assert_eq!(sha256(&play.stage.get("small").await.body), sha256(&body), "{size}");
    }
    assert_eq!(play.open().await, 0);
}

async fn parts_arrive_in_any_order(backend: Backend) {
    let play = Play::new(backend).await;
    let body = bytes(15 * MIB + 1);
    let upload = pb::Upload {
        content_type: Some("video/mp4".into()),
        metadata: [("owner".into(), "ann".into())].into(),
        ..pb::Upload::default()
    };
    let request = pb::StartUploadRequest { upload: Some(upload), ..start("a b/é+", body.len(), 5 * MIB) };
    let started = play.start(request).await;
    assert_eq!((started.part_size, started.part_count, started.parts.len()), (5 << 20, 4, 4));
    assert_eq!(started.checksum_algorithm, i32::from(pb::ChecksumAlgorithm::Unspecified));
    for number in [3, 1, 4, 2] {
        let presigned = response(&started.parts[usize::try_from(number).unwrap() - 1]);
        let part = slice(&started, &body, number);
        assert_eq!(presigned.method, "PUT");
        assert_eq!(presigned.headers, [("content-length".into(), part.len().to_string())].into());
        // Neither longer nor shorter than signed.
        let mut headers = presigned.headers.clone();
        headers.insert("content-length".into(), (part.len() - 1).to_string());
        let short = play.stage.send_as("PUT", &presigned.url, &headers, part[1..].to_vec()).await;
        assert_eq!(short.status, 403, "{}", short.text());
        assert_eq!(play.send(presigned, part).await.status, 200);
    }
    // A part's checksum may be signed all the same, if it is the one that S3 makes itself.
    let (ask, sum) = (|checksum| pb::PartRequest { part_number: 4, checksum }, slice(&started, &body, 4));
    let other = pb::Checksum { value: Some(pb::checksum::Value::Sha256(sha256(sum))) };
    let again = play.sign(&started.upload_token, vec![ask(crc64(sum)), ask(Some(other))], None).await;
    assert_eq!(play.send(response(&again[0]), &[9]).await.status, 400);
    assert_eq!(play.send(response(&again[0]), sum).await.status, 200);
    assert!(error(&again[1]).1.contains("have `crc64nvme`, or be absent"));
    let made = play.complete(&started.upload_token, Vec::new()).await.unwrap();
    assert_eq!((made.key.as_str(), made.size), ("a b/é+", 15 * (1 << 20) + 1));
    let stored = play.stage.get("a b/é+").await;
    assert_eq!(sha256(&stored.body), sha256(&body));
    assert_eq!(stored.header("etag"), made.etag);
    assert_eq!((stored.header("content-type"), stored.header("x-amz-meta-owner")), ("video/mp4", "ann"));
    assert_eq!(play.open().await, 0);
    let again = play.complete(&started.upload_token, Vec::new()).await.unwrap();
    assert_eq!(again, made);
}

async fn a_large_upload_goes_through_its_troubles(backend: Backend) {
    let play = Play::new(backend).await;
    let body = bytes(100 * MIB + 1);
    let algorithm = pb::ChecksumAlgorithm::Crc64nvme.into();
    let started =
        play.start(pb::StartUploadRequest { checksum_algorithm: algorithm, ..start("big", body.len(), 0) }).await;
    assert_eq!((started.part_size, started.part_count), (8 << 20, 13));
    assert_eq!((started.checksum_algorithm, started.parts.len()), (algorithm, 0), "no part without its checksum");
    let token = &started.upload_token;

    // Each part asked for is answered on its own.
    let sum = crc64(slice(&started, &body, 1));
    let ask = |number, checksum| pb::PartRequest { part_number: number, checksum };
    let wrong = pb::Checksum { value: Some(pb::checksum::Value::Sha256(vec![0; 32])) };
    let items = vec![ask(0, sum.clone()), ask(1, sum.clone()), ask(14, sum.clone()), ask(2, None), ask(3, Some(wrong))];
    let items = play.sign(token, items, None).await;
    assert_eq!(items.iter().map(|item| item.part_number).collect::<Vec<_>>(), [0, 1, 14, 2, 3]);
    for (n, must) in [(0, "be 1 to 13, not 0"), (2, "not 14"), (3, "have `crc64nvme`"), (4, "have `crc64nvme`")] {
        let (code, message) = error(&items[n]);
        assert!(code == Code::InvalidArgument && message.contains(must), "{message}");
    }
    assert_eq!(response(&items[1]).headers.keys().collect::<Vec<_>>(), ["content-length", "x-amz-checksum-crc64nvme"]);

    let brief = play.sign(token, vec![ask(5, crc64(slice(&started, &body, 5)))], Some(1)).await;
    let brief = response(&brief[0]).clone();
    let mut parts = BTreeMap::new();
    for number in [7, 2, 13, 11, 1, 4, 9, 3, 12, 8, 6, 10] {
        let part = slice(&started, &body, number);
        let presigned = play.sign_one(token, number, crc64(part)).await;
        if number == 9 {
            for _ in 0..3 {
                let answer = play.send(&presigned, &vec![1; part.len()]).await;
                assert_eq!(answer.status, 400, "{}", answer.text());
            }
        }
        parts.insert(number, given(number, &play.send(&presigned, part).await));
    }
    // Time itself is what this is about. S3 counts whole seconds.
    let end = SystemTime::try_from(brief.expires_at.unwrap()).unwrap() + Duration::from_millis(1100);
    tokio::time::sleep(end.duration_since(SystemTime::now()).unwrap_or_default()).await;
    let late = play.send(&brief, slice(&started, &body, 5)).await;
    assert_eq!(late.status, 403, "{}", late.text());

    // Part 5 is missing, for who says nothing as for who claims it.
    let status = play.complete(token, Vec::new()).await.unwrap_err();
    assert_eq!(reason(&status), (Code::FailedPrecondition, "UPLOAD_MISMATCH".into()));
    assert!(status.message().ends_with("S3 has no part 5"), "{}", status.message());
    let again = play.sign_one(token, 5, crc64(slice(&started, &body, 5))).await;
    parts.insert(5, given(5, &play.send(&again, slice(&started, &body, 5)).await));

    let parts: Vec<_> = parts.into_values().collect();
    let mut other = parts.clone();
    other.swap(2, 3);
    (other[2].part_number, other[3].part_number) = (3, 4);
    let status = play.complete(token, other).await.unwrap_err();
    assert_eq!(reason(&status).1, "UPLOAD_MISMATCH");
    assert!(status.message().contains("part 3 is another"), "{}", status.message());
    let status = play.complete(token, parts[..12].to_vec()).await.unwrap_err();
    assert!(status.message().ends_with("part 13 is not among those given"), "{}", status.message());
    let mut api = play.stage.api.clone();
    let mut complete = pb::CompleteUploadRequest {
        upload_token: token.clone(),
        parts: parts.clone(),
        checksum: crc64(b"something else"),
        create_only: false,
    };
    let status = api.complete_upload(complete.clone()).await.unwrap_err();
    assert_eq!(reason(&status), (Code::FailedPrecondition, "UPLOAD_MISMATCH".into()), "{status:?}");
    assert_eq!(play.stage.get("big").await.status, 404, "nothing that is wrong was left");

    complete.checksum = crc64(&body);
    let made = api.complete_upload(complete.clone()).await.unwrap().into_inner();
    assert_eq!((made.size, made.composite, &made.checksum), (100 * (1 << 20) + 1, false, &crc64(&body)));
    assert_eq!(sha256(&play.stage.get("big").await.body), sha256(&body));
    assert_eq!(api.complete_upload(complete.clone()).await.unwrap().into_inner(), made);
    assert_eq!(play.complete(token, Vec::new()).await.unwrap(), made);
    let wrong = pb::CompleteUploadRequest { checksum: crc64(b"something else"), ..complete };
    assert_eq!(refused(api.complete_upload(wrong).await).1, "UPLOAD_MISMATCH", "as it was, made or not");

    // Overwritten by somebody else, it is not what was uploaded any more.
    play.stage.put("big", "other").await;
    assert_eq!(refused(play.complete(token, parts).await), (Code::NotFound, "UPLOAD_NOT_FOUND".into()));
}

async fn a_composite_checksum_is_of_the_parts(backend: Backend) {
    let play = Play::new(backend).await;
    let body = bytes(5 * MIB + 1);
    let algorithm = pb::ChecksumAlgorithm::Sha256.into();
    let request = pb::StartUploadRequest { checksum_algorithm: algorithm, ..start("k", body.len(), 5 * MIB) };
    let started = play.start(request).await;
    let sum = |bytes: &[u8]| pb::Checksum { value: Some(pb::checksum::Value::Sha256(sha256(bytes))) };
    for number in [2, 1] {
        let part = slice(&started, &body, number);
        let presigned = play.sign_one(&started.upload_token, number, Some(sum(part))).await;
        assert_eq!(play.send(&presigned, &vec![9; part.len()]).await.status, 400);
        assert_eq!(play.send(&presigned, part).await.status, 200);
    }
    let sums = [1, 2].map(|number| sha256(slice(&started, &body, number)));
    let listed = play.list(&started.upload_token, 0, "").await.unwrap();
    let of_list: Vec<_> = listed.parts.iter().map(|part| part.checksum.clone()).collect();
    assert_eq!(of_list, [Some(sum(slice(&started, &body, 1))), Some(sum(slice(&started, &body, 2)))]);
    // The checksums come from S3 if nobody gives them.
    let made = play.complete(&started.upload_token, Vec::new()).await.unwrap();
    assert_eq!((made.checksum, made.composite), (Some(sum(&sums.concat())), true));
    assert_eq!(sha256(&play.stage.get("k").await.body), sha256(&body));
}

async fn an_upload_is_given_up_and_nothing_is_left(backend: Backend) {
    let play = Play::new(backend).await;
    let body = bytes(12 * MIB);
    let started = play.start(start("k", body.len(), 5 * MIB)).await;
    assert_eq!(play.send(response(&started.parts[0]), slice(&started, &body, 1)).await.status, 200);
    assert_eq!(play.open().await, 1);
    let token = &started.upload_token;
    for _ in 0..2 {
        play.abort(token).await.unwrap();
        assert_eq!(play.open().await, 0);
    }
    let late = play.send(response(&started.parts[1]), slice(&started, &body, 2)).await;
    assert_eq!(late.status, 404, "{}", late.text());
    let gone = (Code::NotFound, "UPLOAD_NOT_FOUND".into());
    assert_eq!(refused(play.list(token, 0, "").await), gone);
    assert_eq!(refused(play.complete(token, Vec::new()).await), gone);
    assert_eq!(play.stage.get("k").await.status, 404);
}

/// Another replica of the same service, with this key for its tokens, where
/// these callers may upload.
async fn replica(play: &Play, tokens: TokenKey, callers: &[&str]) -> (Api, tempfile::TempDir) {
    let Stage { bucket, endpoint, .. } = &play.stage;
    let grant = |caller: &&str| {
        format!("[[grants]]\ncaller = '{caller}'\nbucket = 'files'\nprefix = ''\nactions = ['upload', 'download']\n")
    };
    let text = format!(
        "[buckets.files]\nbucket = '{bucket}'\nregion = 'us-east-1'\nendpoint = '{endpoint}'\npath_style = true\n\
         [signers.main]\nkind = 'ambient'\n[[routes]]\nbucket = 'files'\nsigner = 'main'\n{}",
        callers.iter().map(grant).collect::<String>()
    );
    let mut settings = Settings::load(&text, &BTreeMap::new()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    settings.audit =
        AuditSettings { stdout: false, file: Some(folder.path().join("audit.jsonl")), ..AuditSettings::default() };
    let provider = SharedCredentialsProvider::new(play.key());
    let signers = [("main".to_owned(), KeySource::Ambient(provider.clone()))].into();
    let app = App::start(&settings, Sources { identity: provider, signers, tokens }).await.unwrap();
    (Api(app), folder)
}

/// A call by a process of this user, or of this machine.
fn by<T>(caller: &Caller, message: T) -> Request<T> {
    let mut request = Request::new(message);
    Caller::put(Ok(caller.clone()), request.extensions_mut());
    request
}

fn loopback() -> Caller {
    Caller::loopback("127.0.0.1:1".parse().unwrap()).unwrap()
}

async fn another_replica_goes_on(backend: Backend) {
    let play = Play::new(backend).await;
    let body = bytes(22 * MIB);
    let started = play.start(start("k", body.len(), 5 * MIB)).await;
    let token = started.upload_token.clone();
    for number in [1, 4, 5] {
        let presigned = response(&started.parts[usize::try_from(number).unwrap() - 1]);
        assert_eq!(play.send(presigned, slice(&started, &body, number)).await.status, 200);
    }
    let (other, _folder) = replica(&play, play.stage.app.tokens.clone(), &["loopback"]).await;
    let (stranger, _folder2) = replica(&play, TokenKey::random(), &["loopback"]).await;
    let list = |page_token: &str| pb::ListPartsRequest {
        upload_token: token.clone(),
        page_size: 2,
        page_token: page_token.into(),
    };
    let status = stranger.list_parts(by(&loopback(), list(""))).await.unwrap_err();
    assert_eq!(reason(&status), (Code::InvalidArgument, "INVALID_UPLOAD_TOKEN".into()));

    let (mut page_token, mut there) = (String::new(), Vec::new());
    loop {
        let page = other.list_parts(by(&loopback(), list(&page_token))).await.unwrap().into_inner();
        assert!(page.parts.len() <= 2);
        assert_eq!((page.size, page.part_size, page.part_count), (22 << 20, 5 << 20, 5));
        assert_eq!(page.deadline, started.deadline);
        for part in page.parts {
            assert_eq!(usize::try_from(part.size).unwrap(), slice(&started, &body, part.part_number).len());
            there.push(part.part_number);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(there, [1, 4, 5]);
    let status = other.list_parts(by(&loopback(), list("x"))).await.unwrap_err();
    assert_eq!(fields(&status), ["page_token"]);
    let parts = [2, 3].map(|part_number| pb::PartRequest { part_number, checksum: None }).to_vec();
    let sign = pb::SignPartsRequest { upload_token: token.clone(), parts, ttl: None };
    for item in other.sign_parts(by(&loopback(), sign)).await.unwrap().into_inner().parts {
        assert_eq!(play.send(response(&item), slice(&started, &body, item.part_number)).await.status, 200);
    }
    let complete = pb::CompleteUploadRequest { upload_token: token.clone(), ..Default::default() };
    let made = other.complete_upload(by(&loopback(), complete)).await.unwrap().into_inner();
    assert_eq!(sha256(&play.stage.get("k").await.body), sha256(&body));
    // And the first replica gives the same answer.
    assert_eq!(play.complete(&token, Vec::new()).await.unwrap(), made);
}

async fn a_token_is_good_for_its_caller_only(backend: Backend) {
    let play = Play::new(backend).await;
    let (api, _folder) = replica(&play, TokenKey::random(), &["uid:1", "uid:2"]).await;
    let (ann, bob) = (Caller::user(1), Caller::user(2));
    let started = api.start_upload(by(&ann, start("k", 6 * MIB, 0))).await.unwrap().into_inner();
    let token = started.upload_token;
    let invalid = (Code::InvalidArgument, "INVALID_UPLOAD_TOKEN".to_owned());
    let flipped = |at: usize| {
        let mut bytes = token.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).unwrap()
    };
    let wrong = [flipped(0), flipped(60), token[..token.len() - 1].to_owned(), String::new(), "x".into()];
    let wrong = wrong.into_iter().map(|token| (&ann, token)).chain([(&bob, token.clone())]);
    for (caller, token) in wrong {
        let part = pb::PartRequest { part_number: 1, checksum: None };
        let sign = pb::SignPartsRequest { upload_token: token.clone(), parts: vec![part], ttl: None };
        assert_eq!(refused(api.sign_parts(by(caller, sign)).await), invalid, "{token}");
        let list = pb::ListPartsRequest { upload_token: token.clone(), ..Default::default() };
        assert_eq!(refused(api.list_parts(by(caller, list)).await), invalid);
        let complete = pb::CompleteUploadRequest { upload_token: token.clone(), ..Default::default() };
        assert_eq!(refused(api.complete_upload(by(caller, complete)).await), invalid);
        let abort = pb::AbortUploadRequest { upload_token: token };
        assert_eq!(refused(api.abort_upload(by(caller, abort)).await), invalid);
    }
    assert_eq!(play.open().await, 1);
    // The token is good, and nothing else is forgotten: without a grant there is nothing to do.
    api.0.policy.replace(fileaccess::policy::table::Grants::compile(&[]));
    let abort = || by(&ann, pb::AbortUploadRequest { upload_token: token.clone() });
    assert_eq!(refused(api.abort_upload(abort()).await), (Code::PermissionDenied, "NOT_GRANTED".into()));
}

async fn nothing_is_overwritten_if_so_asked(backend: Backend) {
    let play = Play::new(backend).await;
    let body = bytes(5 * MIB + 1);
    for (key, at_start) in [("a", true), ("b", false)] {
        let upload = Some(pb::Upload { create_only: at_start, ..pb::Upload::default() });
        let started = play.start(pb::StartUploadRequest { upload, ..start(key, body.len(), 0) }).await;
        assert_eq!(play.send(response(&started.parts[0]), &body).await.status, 200);
        play.stage.put(key, "first").await;
        let complete = pb::CompleteUploadRequest {
            upload_token: started.upload_token.clone(),
            create_only: !at_start,
            ..Default::default()
        };
        let exists = play.stage.api.clone().complete_upload(complete.clone()).await;
        assert_eq!(refused(exists), (Code::AlreadyExists, "OBJECT_EXISTS".into()));
        assert_eq!(play.stage.get(key).await.text(), "first");
        play.abort(&started.upload_token).await.unwrap();
    }
    let upload = Some(pb::Upload { create_only: true, ..pb::Upload::default() });
    let started = play.start(pb::StartUploadRequest { upload, ..start("c", body.len(), 0) }).await;
    assert_eq!(play.send(response(&started.parts[0]), &body).await.status, 200);
    let made = play.complete(&started.upload_token, Vec::new()).await.unwrap();
    // What it has made itself is no obstacle to the same answer.
    assert_eq!(play.complete(&started.upload_token, Vec::new()).await.unwrap(), made);

    // Nor is it where S3 still knows the upload, as while it is busy with a completion
    // whose answer was lost.
    let upload = Some(pb::Upload { create_only: true, ..pb::Upload::default() });
    let started = play.start(pb::StartUploadRequest { upload, ..start("d", body.len(), 0) }).await;
    assert_eq!(play.send(response(&started.parts[0]), &body).await.status, 200);
    let own = play.stage.s3(play.key()).put_object().bucket(&play.stage.bucket).key("d");
    let session = play.stage.app.tokens.open(&started.upload_token, &loopback()).unwrap();
    let own = own.metadata("fileaccess-upload", session.id.to_string());
    own.body(body.clone().into()).send().await.unwrap();
    let made = play.complete(&started.upload_token, Vec::new()).await.unwrap();
    assert_eq!((made.key.as_str(), made.size), ("d", i64::try_from(body.len()).unwrap()));
    play.abort(&started.upload_token).await.unwrap();
}

async fn past_its_deadline_an_upload_can_only_be_given_up(backend: Backend) {
    let play = Play::new(backend).await;
    let started = play.start(pb::StartUploadRequest { deadline: seconds(60), ..start("k", 6 * MIB, 0) }).await;
    // No URL outlives the upload, whatever its ttl is.
    let deadline = started.deadline.unwrap();
    let presigned = response(&started.parts[0]);
    assert!(presigned.expires_at.unwrap().seconds <= deadline.seconds, "{presigned:?}");
    for (wrong, field) in [(59, "deadline"), (604_801, "deadline")] {
        let request = pb::StartUploadRequest { deadline: seconds(wrong), ..start("k", 6 * MIB, 0) };
        assert_eq!(fields(&play.stage.api.clone().start_upload(request).await.unwrap_err()), [field]);
    }
    let app = &play.stage.app;
    let session = app.tokens.open(&started.upload_token, &loopback()).unwrap();
    let late = Session { deadline: SystemTime::now() - Duration::from_secs(1), ..(*session).clone() };
    let token = app.tokens.seal(&late, &loopback()).unwrap();
    let expired = (Code::FailedPrecondition, "UPLOAD_EXPIRED".to_owned());
    let part = pb::PartRequest { part_number: 1, checksum: None };
    let sign = pb::SignPartsRequest { upload_token: token.clone(), parts: vec![part], ttl: None };
    assert_eq!(refused(play.stage.api.clone().sign_parts(sign).await), expired);
    assert_eq!(refused(play.list(&token, 0, "").await), expired);
    assert_eq!(refused(play.complete(&token, Vec::new()).await), expired);
    assert_eq!(play.open().await, 1);
    play.abort(&token).await.unwrap();
    assert_eq!(play.open().await, 0);
}

async fn ceilings_hold_for_uploads_in_parts(backend: Backend) {
    let settings = "[[grants]]\ncaller = 'loopback'\nbucket = 'files'\nprefix = 'in/'\nactions = ['upload']\n\
                    max_size = 6291456\ncontent_types = ['image/*']\ncreate_only = true\nchecksum = true\n";
    let play = Play { stage: Stage::with(backend, settings, None).await };
    let upload = pb::Upload { content_type: Some("image/png".into()), create_only: true, ..pb::Upload::default() };
    let good = pb::StartUploadRequest {
        upload: Some(upload.clone()),
        checksum_algorithm: pb::ChecksumAlgorithm::Crc32c.into(),
        ..start("in/k", 6 * MIB, 0)
    };
    let told = |upload| pb::StartUploadRequest { upload: Some(upload), ..good.clone() };
    for (request, field) in [
        (pb::StartUploadRequest { size: (6 << 20) + 1, ..good.clone() }, "size"),
        (told(pb::Upload { content_type: None, ..upload.clone() }), "upload.content_type"),
        (told(pb::Upload { create_only: false, ..upload.clone() }), "upload.create_only"),
        (pb::StartUploadRequest { checksum_algorithm: 0, ..good.clone() }, "checksum_algorithm"),
    ] {
        let status = play.stage.api.clone().start_upload(request).await.unwrap_err();
        assert_eq!(reason(&status), (Code::PermissionDenied, "OVER_CEILING".into()));
        assert_eq!(fields(&status), [field]);
    }
    let elsewhere = pb::StartUploadRequest { key: "out/k".into(), ..good.clone() };
    let denied = play.stage.api.clone().start_upload(elsewhere).await;
    assert_eq!(refused(denied), (Code::PermissionDenied, "NOT_GRANTED".into()));
    let started = play.start(good).await;
    // Who may less by now goes on with less.
    let mut grants = Settings::load(
        &format!("{settings}[buckets.files]\nbucket = 'x-y'\nregion = 'r'\n[signers.s]\nkind = 'ambient'\n[[routes]]\nbucket = 'files'\nsigner = 's'\n"),
        &BTreeMap::new(),
    )
    .unwrap()
    .grants;
    grants[0].max_size = Some(1);
    play.stage.app.policy.replace(fileaccess::policy::table::Grants::compile(&grants));
    let denied = play.complete(&started.upload_token, Vec::new()).await;
    assert_eq!(refused(denied), (Code::PermissionDenied, "OVER_CEILING".into()));
    play.abort(&started.upload_token).await.unwrap();
}

async fn each_step_has_its_record(backend: Backend) {
    let play = Play::new(backend).await;
    let algorithm = pb::ChecksumAlgorithm::Crc64nvme.into();
    let started = play.start(pb::StartUploadRequest { checksum_algorithm: algorithm, ..start("k", 6 * MIB, 0) }).await;
    let body = bytes(6 * MIB);
    let signed = play.sign_one(&started.upload_token, 1, crc64(&body)).await;
    play.list(&started.upload_token, 0, "").await.unwrap();
    play.complete(&started.upload_token, Vec::new()).await.unwrap_err();
    play.abort(&started.upload_token).await.unwrap();
    let records = crate::audit::records(&play.stage);
    let brief: Vec<_> =
        records.iter().map(|r| (r["action"].as_str().unwrap(), r["outcome"].as_str().unwrap())).collect();
    // A part's record is closed before that of the call that asked for it.
    assert_eq!(
        brief,
        [
            ("start_upload", "granted"),
            ("upload_part", "granted"),
            ("sign_parts", "granted"),
            ("list_parts", "granted"),
            ("complete_upload", "UPLOAD_MISMATCH"),
            ("abort_upload", "granted"),
        ]
    );
    for record in &records {
        assert_eq!(
            (&record["key"], &record["upload_id"]),
            (&"k".into(), &started.upload_id.as_str().into()),
            "{record}"
        );
    }
    assert_eq!(records[1]["issue_id"], signed.issue_id);
    let part =
        serde_json::json!({ "content_length": 6 << 20, "checksum": "x-amz-checksum-crc64nvme", "part_number": 1 });
    assert_eq!(records[1]["constraints"], part);
    let whole = serde_json::json!({ "content_length": 6 << 20, "checksum": "crc64nvme" });
    assert_eq!(records[0]["constraints"], whole);
    let text = std::fs::read_to_string(&play.stage.audit).unwrap();
    assert!(!text.contains(&started.upload_token) && !text.contains("X-Amz-Signature"), "{text}");
}

/// A signer is rotated in the middle: its URLs die, and the upload goes on.
async fn parts_outlive_the_key_that_signed_them(backend: Backend) {
    // A lease that a busy machine can keep.
    let settings = crate::revoke::managed("").replace("lease = '1s'", "lease = '10s'");
    let play = Play { stage: Stage::with(backend, &settings, None).await };
    let body = bytes(11 * MIB);
    let started = play.start(start("tenant/k", body.len(), 5 * MIB)).await;
    assert_eq!(response(&started.parts[0]).signer, "tenant");
    assert_eq!(play.send(response(&started.parts[0]), slice(&started, &body, 1)).await.status, 200);
    let revoke = pb::RevokeRequest {
        target: Some(pb::revoke_request::Target::Signer("tenant".into())),
        urgency: pb::Urgency::Immediate.into(),
        ..pb::RevokeRequest::default()
    };
    play.stage.api.clone().revoke(revoke).await.unwrap();
    for number in [2, 3] {
        let dead = response(&started.parts[usize::try_from(number).unwrap() - 1]);
        assert_eq!(play.send(dead, slice(&started, &body, number)).await.status, 403);
        let again = play.sign_one(&started.upload_token, number, None).await;
        assert_eq!(play.send(&again, slice(&started, &body, number)).await.status, 200);
    }
    play.complete(&started.upload_token, Vec::new()).await.unwrap();
    assert_eq!(sha256(&play.stage.get("tenant/k").await.body), sha256(&body));
}

async fn what_is_stored_with_the_object(backend: Backend) {
    let play = Play::new(backend).await;
    let key_id = "arn:aws:kms:us-east-1:000000000000:key/1234abcd-12ab-34cd-56ef-1234567890ab".to_owned();
    let kms = pb::SseKms { key_id: key_id.clone(), bucket_key: true };
    let upload = pb::Upload {
        tags: [("team".into(), "a+b c".into())].into(),
        cache_control: Some("no-store".into()),
        content_disposition: Some("attachment".into()),
        storage_class: pb::StorageClass::StandardIa.into(),
        encryption: Some(pb::Encryption { method: Some(pb::encryption::Method::SseKms(kms)) }),
        ..pb::Upload::default()
    };
    let started = play.start(pb::StartUploadRequest { upload: Some(upload), ..start("k", 6 * MIB, 0) }).await;
    assert_eq!(play.send(response(&started.parts[0]), &bytes(6 * MIB)).await.status, 200);
    let made = play.complete(&started.upload_token, Vec::new()).await.unwrap();
    assert_eq!(play.complete(&started.upload_token, Vec::new()).await.unwrap(), made);
    let s3 = play.stage.s3(play.key());
    let head = s3.head_object().bucket(&play.stage.bucket).key("k").send().await.unwrap();
    assert_eq!((head.cache_control(), head.content_disposition()), (Some("no-store"), Some("attachment")));
    assert_eq!(head.storage_class().map(aws_sdk_s3::types::StorageClass::as_str), Some("STANDARD_IA"));
    assert_eq!(head.server_side_encryption().map(|kind| kind.as_str().to_owned()).as_deref(), Some("aws:kms"));
    assert_eq!((head.ssekms_key_id(), head.bucket_key_enabled()), (Some(key_id.as_str()), Some(true)));
    let tags = s3.get_object_tagging().bucket(&play.stage.bucket).key("k").send().await.unwrap();
    let tags: Vec<_> = tags.tag_set().iter().map(|tag| (tag.key(), tag.value())).collect();
    assert_eq!(tags, [("team", "a+b c")]);
}

async fn a_completion_goes_on_when_nobody_waits(backend: Backend) {
    let play = Play::new(backend).await;
    let body = bytes(11 * MIB);
    let started = play.start(start("k", body.len(), 5 * MIB)).await;
    for number in 1..=3 {
        let presigned = response(&started.parts[usize::try_from(number).unwrap() - 1]);
        assert_eq!(play.send(presigned, slice(&started, &body, number)).await.status, 200);
    }
    let api = Api(Arc::clone(&play.stage.app));
    let complete = pb::CompleteUploadRequest { upload_token: started.upload_token.clone(), ..Default::default() };
    // The caller's time is up as soon as it has begun.
    let cut = tokio::time::timeout(Duration::ZERO, api.complete_upload(by(&loopback(), complete))).await;
    assert!(cut.is_err(), "it has answered at once");
    assert!(!play.stage.app.completions.is_empty());
    let ended = async {
        while !play.stage.app.completions.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), ended).await.expect("it ends by itself");
    assert_eq!(sha256(&play.stage.get("k").await.body), sha256(&body));
    play.complete(&started.upload_token, Vec::new()).await.unwrap();
}
