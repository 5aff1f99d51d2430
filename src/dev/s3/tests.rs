use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sdk_s3::config::{BehaviorVersion, Region, RequestChecksumCalculation};
use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
use reqwest::Method;

use base64::prelude::BASE64_STANDARD;
use s3s::crypto::{Checksum as _, Sha256};

use super::*;
use crate::issuer::Status;

/// An embedded S3 with one bucket, and a key for it.
struct Stage {
    root: tempfile::TempDir,
    endpoint: String,
    iam: MemoryIam,
    key: Credentials,
    s3: aws_sdk_s3::Client,
    http: reqwest::Client,
}

struct Answer {
    status: u16,
    code: String,
    headers: http::HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn is(&self) -> (u16, &str) {
        (self.status, &self.code)
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Stage {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("bucket")).unwrap();
        let iam = MemoryIam::default();
        iam.create_user("user").unwrap();
        let key = iam.create_access_key("user", SystemTime::now()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(serve(listener, service(root.path(), iam.clone()).unwrap(), std::future::pending()));
        let s3 = client(&endpoint, key.clone());
        Self { root, endpoint, iam, key, s3, http: crate::rotation::probe::Probe::http_client() }
    }

    fn put(&self, key: &str) -> aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder {
        self.s3.put_object().bucket("bucket").key(key)
    }

    fn get(&self, key: &str) -> aws_sdk_s3::operation::get_object::builders::GetObjectFluentBuilder {
        self.s3.get_object().bucket("bucket").key(key)
    }

    async fn send(&self, signed: &PresignedRequest, body: &str) -> Answer {
        let headers: Vec<_> = signed.headers().collect();
        self.raw(signed.method(), signed.uri(), &headers, body).await
    }

    async fn raw(&self, method: &str, url: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut request = self.http.request(method.parse().unwrap(), url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if method == Method::PUT {
            request = request.body(body.to_owned());
        }
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.bytes().await.unwrap().to_vec();
        let text = String::from_utf8_lossy(&body);
        let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
        Answer { status, code: code.map_or("", |(code, _)| code).to_owned(), headers, body }
    }

    async fn store(&self, key: &str, body: &str) {
        let answer = self.send(&self.put(key).presigned(minute()).await.unwrap(), body).await;
        assert_eq!(answer.is(), (200, ""), "{key}: {}", String::from_utf8_lossy(&answer.body));
    }

    async fn bytes(&self, key: &str) -> String {
        let answer = self.send(&self.get(key).presigned(minute()).await.unwrap(), "").await;
        assert_eq!(answer.status, 200, "{key}: {}", answer.code);
        String::from_utf8(answer.body).unwrap()
    }
}

fn client(endpoint: &str, key: Credentials) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .force_path_style(true)
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .credentials_provider(key)
        .http_client(crate::store::http_client());
    aws_sdk_s3::Client::from_conf(config.build())
}

/// A client that sends checksums unasked.
fn summing(stage: &Stage) -> aws_sdk_s3::Client {
    let config = stage.s3.config().to_builder().request_checksum_calculation(RequestChecksumCalculation::WhenSupported);
    aws_sdk_s3::Client::from_conf(config.build())
}

fn minute() -> PresigningConfig {
    PresigningConfig::expires_in(Duration::from_mins(1)).unwrap()
}

fn sha256(body: &str) -> String {
    BASE64_STANDARD.encode(Sha256::checksum(body.as_bytes()))
}

#[tokio::test]
async fn a_dead_key_kills_the_urls_it_signed() {
    let stage = Stage::new().await;
    stage.store("k", "v").await;
    let url = stage.get("k").presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&url, "").await.status, 200);
    let id = stage.key.access_key_id();
    stage.iam.set_status("user", id, Status::Inactive).unwrap();
    assert_eq!(stage.send(&url, "").await.is(), (403, "InvalidAccessKeyId"));
    stage.iam.set_status("user", id, Status::Active).unwrap();
    assert_eq!(stage.send(&url, "").await.status, 200);
    stage.iam.delete_access_key("user", id).unwrap();
    assert_eq!(stage.send(&url, "").await.is(), (403, "InvalidAccessKeyId"));
    let stranger = Credentials::new("AKIAAAAAAAAAAAAAAAAA", "secret", None, None, "test");
    let url = client(&stage.endpoint, stranger).get_object().bucket("bucket").key("k").presigned(minute());
    assert_eq!(stage.send(&url.await.unwrap(), "").await.is(), (403, "InvalidAccessKeyId"));
}

#[tokio::test]
async fn what_was_not_signed_is_refused() {
    let stage = Stage::new().await;
    stage.store("k", "v").await;
    let get = stage.get("k").presigned(minute()).await.unwrap();
    let denied = (403, "SignatureDoesNotMatch");
    assert_eq!(stage.raw("GET", &get.uri().replace("/k?", "/l?"), &[], "").await.is(), denied);
    assert_eq!(stage.raw("GET", &format!("{}&x-more=1", get.uri()), &[], "").await.is(), denied);
    assert_eq!(stage.raw("PUT", get.uri(), &[], "poison").await.is(), denied);
    assert_eq!(stage.raw("DELETE", get.uri(), &[], "").await.is(), denied);
    let (bare, _) = get.uri().split_once('?').unwrap();
    assert_eq!(stage.raw("GET", bare, &[], "").await.is(), (403, "AccessDenied"));

    let brief = PresigningConfig::expires_in(Duration::from_secs(1)).unwrap();
    let brief = stage.get("k").presigned(brief).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(stage.send(&brief, "").await.is(), (403, "AccessDenied"));

    let put = stage.put("new").content_type("text/plain").content_length(4).metadata("a", "b");
    let put = put.if_none_match("*").presigned(minute()).await.unwrap();
    let all: Vec<_> = put.headers().collect();
    for name in ["content-type", "content-length", "x-amz-meta-a", "if-none-match"] {
        let but: Vec<_> = all.iter().copied().filter(|(n, _)| *n != name).collect();
        assert_eq!(but.len() + 1, all.len());
        let body = if name == "content-length" { "other" } else { "1234" };
        assert_eq!(stage.raw("PUT", put.uri(), &but, body).await.is(), denied, "{name}");
    }
    let with = |more| all.iter().copied().chain([more]).collect::<Vec<_>>();
    for more in [("x-amz-tagging", "a=b"), ("x-amz-meta-more", "1"), ("x-amz-acl", "public-read")] {
        assert_eq!(stage.raw("PUT", put.uri(), &with(more), "1234").await.is(), (403, "AccessDenied"));
    }
    assert_eq!(stage.send(&put, "1234").await.status, 200);
    assert_eq!(stage.send(&put, "5678").await.is(), (412, "PreconditionFailed"));
    assert_eq!(stage.bytes("new").await, "1234");
}

#[tokio::test]
async fn a_wrong_body_leaves_what_was_there() {
    let stage = Stage::new().await;
    stage.store("k", "old").await;
    let etag = stage.s3.head_object().bucket("bucket").key("k").send().await.unwrap().e_tag;
    let signed = [
        stage.put("k").checksum_sha256(sha256("new")),
        stage.put("k").checksum_sha1("AAAAAAAAAAAAAAAAAAAAAAAAAAA="),
        stage.put("k").checksum_crc32("AAAAAA=="),
        stage.put("k").checksum_crc32_c("AAAAAA=="),
        stage.put("k").checksum_crc64_nvme("AAAAAAAAAAA="),
        stage.put("k").content_md5("AAAAAAAAAAAAAAAAAAAAAA=="),
    ];
    for put in signed {
        let put = put.presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&put, "bad").await.is(), (400, "BadDigest"));
    }
    let put = stage.put("k").presigned(minute()).await.unwrap();
    let zero = [("x-amz-content-sha256", &*"0".repeat(64))];
    assert_eq!(stage.raw("PUT", put.uri(), &zero, "bad").await.is(), (400, "BadDigest"));
    assert_eq!(stage.bytes("k").await, "old");
    let head = stage.s3.head_object().bucket("bucket").key("k").send().await.unwrap();
    assert_eq!((head.e_tag, head.checksum_sha256), (etag, None));
    // And nothing is left of them.
    let left = std::fs::read_dir(stage.root.path()).unwrap().map(|file| file.unwrap().file_name());
    assert!(!left.into_iter().any(|name| name.to_str().unwrap().starts_with(".tmp")));

    let put = stage.put("k").checksum_sha256(sha256("new")).presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&put, "new").await.status, 200);
    assert_eq!(stage.bytes("k").await, "new");
}

#[tokio::test]
async fn one_of_many_creates() {
    let stage = Stage::new().await;
    let bodies: Vec<_> = (0..16).map(|n| n.to_string()).collect();
    for round in 0..20 {
        let key = format!("once/{round}");
        let put = stage.put(&key).if_none_match("*").presigned(minute()).await.unwrap();
        let answers = futures_util::future::join_all(bodies.iter().map(|body| stage.send(&put, body))).await;
        assert!(answers.iter().all(|answer| matches!(answer.is(), (200, "") | (412, "PreconditionFailed"))));
        let made: Vec<_> = answers.iter().zip(&bodies).filter(|(answer, _)| answer.status == 200).collect();
        assert_eq!(made.len(), 1);
        assert_eq!(&stage.bytes(&key).await, made[0].1);
    }
}

#[tokio::test]
async fn any_key_is_held_and_listed() {
    let stage = Stage::new().await;
    // One has the name of another's file.
    let (long, wide, like) = ("k".repeat(1024), "é".repeat(512), file_name("//"));
    let mut keys = [
        "a",
        "a/b",
        "a//b",
        "a/",
        "/a",
        "//",
        "/",
        "a b",
        "a+b",
        "a%2Fb",
        "%",
        "ünïcödé/Ω",
        "🦀",
        "back\\slash",
        "...",
        ".a/..b",
        "que?ry#x&y=z;",
        "quote\"'<>",
        "A",
        "plain.txt",
        &like,
        &long,
        &wide,
    ];
    for key in keys {
        stage.store(key, &format!("of {key}")).await;
    }
    keys.sort_unstable();
    for key in keys {
        assert_eq!(stage.bytes(key).await, format!("of {key}"));
    }
    let folder = stage.root.path().join("bucket");
    assert_eq!(std::fs::read_to_string(folder.join("plain.txt")).unwrap(), "of plain.txt");
    std::fs::create_dir(folder.join("folder")).unwrap();
    std::fs::write(folder.join("By Hand"), "not an object").unwrap();
    let list = stage.s3.list_objects_v2().bucket("bucket").send().await.unwrap();
    let listed: Vec<_> = list.contents().iter().map(|object| object.key().unwrap()).collect();
    assert_eq!(listed, keys);
    let head = stage.s3.head_object().bucket("bucket").key("a//b").send().await.unwrap();
    assert_eq!(head.metadata().map(HashMap::len).unwrap_or_default(), 0);
    assert_eq!(head.content_type(), Some("binary/octet-stream"));
    let same = list.contents().iter().find(|object| object.key() == Some("a//b")).unwrap();
    assert_eq!((same.e_tag(), same.size()), (head.e_tag(), Some(7)));

    let page = stage.s3.list_objects_v2().bucket("bucket").prefix("a").delimiter("/").max_keys(2);
    let (mut items, mut token) = (Vec::new(), None);
    loop {
        let page = page.clone().set_continuation_token(token).send().await.unwrap();
        items.extend(page.contents().iter().map(|object| object.key().unwrap().to_owned()));
        items.extend(page.common_prefixes().iter().map(|prefix| prefix.prefix().unwrap().to_owned()));
        token = page.next_continuation_token;
        if token.is_none() {
            break;
        }
    }
    assert_eq!(items, ["a", "a b", "a%2Fb", "a+b", "a/"]);

    let url = stage.s3.list_objects_v2().bucket("bucket").prefix("a b").encoding_type("url".into());
    let url = url.send().await.unwrap();
    assert_eq!((url.contents()[0].key(), url.prefix()), (Some("a%20b"), Some("a%20b")));

    std::fs::write(folder.join("by-hand.txt"), "an object").unwrap();
    assert_eq!(stage.bytes("by-hand.txt").await, "an object");
    let list = stage.s3.list_objects_v2().bucket("bucket").prefix("by-").send().await.unwrap();
    assert_eq!(list.contents()[0].key(), Some("by-hand.txt"));

    let delete = stage.s3.delete_object().bucket("bucket").key("a//b").presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&delete, "").await.status, 204);
    assert_eq!(stage.send(&delete, "").await.status, 204);
    let gone = stage.get("a//b").presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&gone, "").await.is(), (404, "NoSuchKey"));
    assert_eq!(stage.bytes("a/b").await, "of a/b");
}

#[tokio::test]
async fn downloads_obey_overrides_and_ranges() {
    let stage = Stage::new().await;
    let put = stage.put("k").content_type("text/plain").metadata("owner", "ann");
    assert_eq!(stage.send(&put.presigned(minute()).await.unwrap(), "0123456789").await.status, 200);
    let get = stage.get("k").response_content_type("a/b").response_cache_control("no-store");
    let get = get.response_content_disposition("attachment; filename*=UTF-8''%C3%BC.txt");
    // As the signer does: a query parameter that S3 does not know.
    let get = get.customize().mutate_request(|request| {
        let uri = format!("{}&x-issue-id=01J0000000000000000000TEST", request.uri());
        request.set_uri(uri).unwrap();
    });
    let get = get.presigned(minute()).await.unwrap();
    assert!(get.uri().contains("x-issue-id=01J") && get.uri().contains("x-id=GetObject"));
    let answer = stage.send(&get, "").await;
    assert_eq!((answer.status, answer.body.as_slice()), (200, &b"0123456789"[..]));
    assert_eq!(answer.header("content-type"), "a/b");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(answer.header("x-amz-meta-owner"), "ann");
    assert_eq!(answer.header("content-disposition"), "attachment; filename*=UTF-8''%C3%BC.txt");
    let tampered = get.uri().replace("01J", "01K");
    assert_eq!(stage.raw("GET", &tampered, &[], "").await.status, 403);

    let get = stage.get("k").presigned(minute()).await.unwrap();
    for (range, status, body) in [
        ("bytes=2-4", 206, "234"),
        ("bytes=7-", 206, "789"),
        ("bytes=-3", 206, "789"),
        ("bytes=-99", 206, "0123456789"),
        ("bytes=5-99", 206, "56789"),
    ] {
        let answer = stage.raw("GET", get.uri(), &[("range", range)], "").await;
        assert_eq!((answer.status, answer.body.as_slice()), (status, body.as_bytes()), "{range}");
    }
    let etag = stage.raw("GET", get.uri(), &[], "").await.header("etag").to_owned();
    for (name, value, status) in [
        ("if-none-match", etag.as_str(), 304),
        ("if-none-match", "\"other\"", 200),
        ("if-match", &etag, 200),
        ("if-match", "\"other\"", 412),
    ] {
        let answer = stage.raw("GET", get.uri(), &[(name, value)], "").await;
        assert_eq!(answer.status, status, "{name}: {value}");
        assert!(status == 412 || answer.header("etag") == etag);
    }
    assert_eq!(stage.raw("GET", get.uri(), &[("range", "bytes=10-")], "").await.is(), (416, "InvalidRange"));
}

#[tokio::test]
async fn what_it_cannot_do_it_refuses() {
    let stage = Stage::new().await;
    stage.store("k", "v").await;
    let refused = (501, "NotImplemented");
    for put in [
        stage.put("k").tagging("a=b"),
        stage.put("k").server_side_encryption("AES256".into()),
        stage.put("k").storage_class("STANDARD_IA".into()),
        stage.put("k").if_match("\"0\""),
    ] {
        assert_eq!(stage.send(&put.presigned(minute()).await.unwrap(), "v").await.is(), refused);
    }
    let get = stage.get("k").version_id("other").presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&get, "").await.is(), refused);
    let elsewhere = stage.s3.put_object().bucket("nowhere").key("k").presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&elsewhere, "v").await.is(), (404, "NoSuchBucket"));
    assert!(!stage.root.path().join("nowhere").exists());
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let service = service(stage.root.path(), MemoryIam::default()).unwrap();
    assert!(serve(listener, service, std::future::pending()).await.is_err());
}

#[tokio::test]
async fn copies_keep_what_belongs_to_an_object() {
    let stage = Stage::new().await;
    let sum = sha256("v");
    let put = stage.put("a//b").content_type("text/plain").metadata("owner", "ann").checksum_sha256(&sum);
    assert_eq!(stage.send(&put.presigned(minute()).await.unwrap(), "v").await.status, 200);
    stage.store("c", "old").await;
    stage.s3.copy_object().bucket("bucket").key("c").copy_source("bucket/a//b").send().await.unwrap();
    assert_eq!(stage.bytes("c").await, "v");
    let head = stage.s3.head_object().bucket("bucket").key("c").checksum_mode("ENABLED".into());
    let head = head.send().await.unwrap();
    assert_eq!((head.content_type(), head.checksum_sha256()), (Some("text/plain"), Some(sum.as_str())));
    assert_eq!(head.metadata().unwrap()["owner"], "ann");
    assert_eq!(head.metadata().unwrap().len(), 1);
    let list = stage.s3.list_objects_v2().bucket("bucket").send().await.unwrap();
    let keys: Vec<_> = list.contents().iter().map(|object| object.key().unwrap()).collect();
    assert_eq!(keys, ["a//b", "c"]);
}

#[tokio::test]
async fn parts_are_verified_and_any_key_may_send_them() {
    use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
    let stage = Stage::new().await;
    // What is replaced has a checksum that must not outlive it.
    let put = stage.put("a//big").checksum_sha256(sha256("old")).presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&put, "old").await.status, 200);
    let started = stage.s3.create_multipart_upload().bucket("bucket").key("a//big").metadata("owner", "ann");
    let started = started.send().await.unwrap();
    assert_eq!(started.key(), Some("a//big"));
    let id = started.upload_id().unwrap();

    stage.iam.create_user("signer").unwrap();
    let signer = stage.iam.create_access_key("signer", SystemTime::now()).unwrap();
    let signer = client(&stage.endpoint, signer);
    let part = |n, key: &str| signer.upload_part().bucket("bucket").key(key).upload_id(id).part_number(n);
    let bodies = ["1".repeat(5 << 20), "2".to_owned()];
    let mut parts = Vec::new();
    for (n, body) in (1..).zip(&bodies) {
        let good = part(n, "a//big").checksum_sha256(sha256(body)).presigned(minute()).await.unwrap();
        assert_eq!(stage.send(&good, "bad").await.is(), (400, "BadDigest"));
        let answer = stage.send(&good, body).await;
        assert_eq!(answer.status, 200);
        parts.push(CompletedPart::builder().part_number(n).e_tag(answer.header("etag")).build());
    }
    let other = part(1, "other").presigned(minute()).await.unwrap();
    assert_eq!(stage.send(&other, "x").await.is(), (404, "NoSuchUpload"));
    assert_eq!(stage.send(&part(7, "a//big").presigned(minute()).await.unwrap(), "extra").await.status, 200);

    let list = stage.s3.list_parts().bucket("bucket").key("a//big").upload_id(id).max_parts(2);
    let list = list.send().await.unwrap();
    let etags: Vec<_> = list.parts().iter().map(|part| (part.part_number(), part.e_tag())).collect();
    assert_eq!(etags, [(Some(1), parts[0].e_tag()), (Some(2), parts[1].e_tag())]);
    assert_eq!((list.is_truncated(), list.next_part_number_marker()), (Some(true), Some("2")));

    let complete = |parts: &[CompletedPart]| {
        let upload = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
        let complete = stage.s3.complete_multipart_upload().bucket("bucket").key("a//big").upload_id(id);
        complete.multipart_upload(upload)
    };
    let wrong = CompletedPart::builder().part_number(2).e_tag("\"0\"").build();
    let swapped = [parts[1].clone(), parts[0].clone()];
    for (parts, code) in
        [(&[parts[0].clone(), wrong][..], "InvalidPart"), (&swapped[..], "InvalidPartOrder"), (&[], "MalformedXML")]
    {
        let error = complete(parts).send().await.unwrap_err().into_service_error();
        assert_eq!(error.meta().code(), Some(code));
    }
    let error = complete(&parts).if_none_match("*").send().await.unwrap_err().into_service_error();
    assert_eq!(error.meta().code(), Some("PreconditionFailed"));
    assert_eq!(stage.bytes("a//big").await, "old");

    let done = complete(&parts).send().await.unwrap();
    assert_eq!(done.key(), Some("a//big"));
    assert!(stage.bytes("a//big").await == bodies.concat());
    let head = stage.s3.head_object().bucket("bucket").key("a//big").checksum_mode("ENABLED".into());
    let head = head.send().await.unwrap();
    assert_eq!((head.e_tag(), head.checksum_sha256()), (done.e_tag(), None));
    assert_eq!(head.metadata().unwrap()["owner"], "ann");
    let is_left = || {
        let mut files = std::fs::read_dir(stage.root.path()).unwrap();
        files.any(|file| file.unwrap().file_name().to_str().unwrap().contains("upload"))
    };
    let all_gone = async {
        while is_left() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all_gone).await.unwrap();

    let again = stage.s3.create_multipart_upload().bucket("bucket").key("b").send().await.unwrap();
    let abort = stage.s3.abort_multipart_upload().bucket("bucket").key("b").upload_id(again.upload_id().unwrap());
    abort.clone().send().await.unwrap();
    let error = abort.send().await.unwrap_err().into_service_error();
    assert_eq!(error.meta().code(), Some("NoSuchUpload"));
}

#[tokio::test]
async fn a_part_that_comes_too_late_is_not_kept() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let stage = Stage::new().await;
    let started = stage.s3.create_multipart_upload().bucket("bucket").key("k").send().await.unwrap();
    let id = started.upload_id().unwrap();
    let put = stage.s3.upload_part().bucket("bucket").key("k").upload_id(id).part_number(1);
    let put = put.presigned(minute()).await.unwrap();
    let host = stage.endpoint.strip_prefix("http://").unwrap();
    let path = put.uri().strip_prefix(&stage.endpoint).unwrap();
    let mut socket = tokio::net::TcpStream::connect(host).await.unwrap();
    let head = format!("PUT {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: 4\r\n\r\nab");
    socket.write_all(head.as_bytes()).await.unwrap();
    let of_part = || {
        let files = std::fs::read_dir(stage.root.path()).unwrap().map(|file| file.unwrap().file_name());
        let names = files.map(|name| name.into_string().unwrap());
        names.filter(|name| name.starts_with(".tmp") || name.contains("upload")).collect::<Vec<_>>()
    };
    while !of_part().iter().any(|name| name.starts_with(".tmp")) {
        tokio::task::yield_now().await;
    }
    stage.s3.abort_multipart_upload().bucket("bucket").key("k").upload_id(id).send().await.unwrap();
    socket.write_all(b"cd").await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("NoSuchUpload"), "{answer}");
    assert_eq!(of_part(), [""; 0]);
}

#[tokio::test]
async fn what_the_sdk_sends_by_default_is_taken() {
    let stage = Stage::new().await;
    let s3 = summing(&stage);
    let body = aws_sdk_s3::primitives::ByteStream::from_static(b"streamed");
    s3.put_object().bucket("bucket").key("k").body(body).send().await.unwrap();
    assert_eq!(stage.bytes("k").await, "streamed");
}

#[tokio::test]
async fn a_checksum_of_parts_is_that_of_the_whole() {
    use aws_sdk_s3::primitives::ByteStream;
    use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart};
    let stage = Stage::new().await;
    let s3 = summing(&stage);
    let bodies = ["1".repeat(5 << 20), "2".repeat((5 << 20) + 1), "3".to_owned()];
    for algorithm in [ChecksumAlgorithm::Crc32, ChecksumAlgorithm::Crc32C, ChecksumAlgorithm::Crc64Nvme] {
        let body = ByteStream::from(bodies.concat().into_bytes());
        let put = s3.put_object().bucket("bucket").key("whole").checksum_algorithm(algorithm.clone()).body(body);
        let whole = put.send().await.unwrap();
        let started = stage.s3.create_multipart_upload().bucket("bucket").key("parts");
        let started = started.checksum_algorithm(algorithm.clone()).checksum_type(ChecksumType::FullObject);
        let started = started.send().await.unwrap();
        let mut parts = Vec::new();
        // The last one is not asked for.
        for (n, body) in (1..).zip(bodies.iter().map(String::as_str).chain(["4"])) {
            let part = s3.upload_part().bucket("bucket").key("parts").upload_id(started.upload_id().unwrap());
            let part = part.checksum_algorithm(algorithm.clone()).part_number(n);
            let sent = part.body(ByteStream::from(body.as_bytes().to_vec())).send().await.unwrap();
            parts.push(CompletedPart::builder().part_number(n).e_tag(sent.e_tag().unwrap()).build());
        }
        parts.pop();
        let upload = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let complete = stage.s3.complete_multipart_upload().bucket("bucket").key("parts").multipart_upload(upload);
        let done = complete.upload_id(started.upload_id().unwrap()).send().await.unwrap();
        assert_eq!(done.checksum_type(), Some(&ChecksumType::FullObject));
        let of_parts = [done.checksum_crc32(), done.checksum_crc32_c(), done.checksum_crc64_nvme()];
        assert_eq!(of_parts, [whole.checksum_crc32(), whole.checksum_crc32_c(), whole.checksum_crc64_nvme()]);
        assert_eq!(of_parts.iter().flatten().count(), 1, "{algorithm}");
        assert!(stage.bytes("parts").await == bodies.concat());
        let head = stage.s3.head_object().bucket("bucket").key("parts").checksum_mode("ENABLED".into());
        let head = head.send().await.unwrap();
        assert_eq!([head.checksum_crc32(), head.checksum_crc32_c(), head.checksum_crc64_nvme()], of_parts);
        // By Python's `hashlib`.
        assert_eq!(done.e_tag(), Some("\"956ef1a630b25cd98df00f2e4b0d52bc-3\""));
    }
}
