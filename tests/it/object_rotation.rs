//! The URLs of one object end, and no byte of it is lost.

use std::sync::Arc;
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::types::{
    BucketVersioningStatus, ChecksumAlgorithm, ChecksumMode, ObjectLockConfiguration, ObjectLockEnabled,
    ObjectLockLegalHold, ObjectLockLegalHoldStatus, ServerSideEncryption, StorageClass, VersioningConfiguration,
};
use fileaccess::error::Error;
use fileaccess::object::{BucketName, ObjectKey};
use fileaccess::pb;
use fileaccess::pb::presign_request::Operation;
use fileaccess::rotation::object::{Ask, ObjectRotation, Step, copy, finish, new_key, rotate};
use fileaccess::store::Store;
use fileaccess::store::copy::CopyLimits;
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};

use crate::stage::{Backend, Stage, download};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        the_urls_end_and_the_bytes_move,
        what_the_object_carries_is_kept,
        a_large_object_is_copied_in_parts,
        a_retry_goes_on_from_every_half_way_state,
        a_retry_in_parts_goes_on_from_every_half_way_state,
        an_overwritten_source_is_noticed,
        an_overwritten_source_is_noticed_by_a_retry,
        two_calls_at_once_are_one_rotation,
        an_upload_after_the_end_is_left_alone,
        what_is_not_there_is_not_found,
    ]
}

pub fn localstack_cases() -> Vec<Case> {
    cases![
        tags_class_and_encryption_are_kept,
        tags_class_and_encryption_are_kept_in_parts,
        every_version_dies,
        many_versions_die,
        a_retry_finds_a_half_deleted_history,
        an_overwritten_version_is_noticed,
        a_stale_source_is_not_copied,
        what_refuses_to_die_leaves_the_current_version_alone,
        versioning_switched_on_and_off_is_no_matter,
        hard_keys_move,
        an_upload_left_by_a_crash_is_ended,
    ]
}

/// The least that S3 takes for a part.
const PARTS: CopyLimits = CopyLimits { threshold: 5 << 20, part_size: 5 << 20 };

/// A stage, with the service's own access to its bucket.
struct Play {
    stage: Stage,
    store: Store,
    s3: Client,
}

impl Play {
    async fn new(backend: Backend) -> Self {
        let stage = Stage::new(backend).await;
        let key = match backend {
            Backend::Embedded => stage.app.signers["main"].key(SystemTime::now()).unwrap().credentials.clone(),
            Backend::LocalStack => Credentials::new("test", "test", None, None, "test"),
        };
        let settings = &stage.app.bucket(&BucketName::parse("files").unwrap()).unwrap().settings;
        let store = Store::new(settings, SharedCredentialsProvider::new(key.clone())).with_copy_limits(PARTS);
        let s3 = stage.s3(key);
        Self { stage, store, s3 }
    }

    async fn versioned() -> Self {
        let play = Self::new(Backend::LocalStack).await;
        play.versioning(BucketVersioningStatus::Enabled).await;
        play
    }

    async fn versioning(&self, status: BucketVersioningStatus) {
        let versioning = VersioningConfiguration::builder().status(status).build();
        let call = self.s3.put_bucket_versioning().bucket(&self.stage.bucket).versioning_configuration(versioning);
        call.send().await.unwrap();
    }

    /// Writes an object, and says which version it is.
    async fn put(&self, key: &str, body: &[u8]) -> Option<String> {
        let call = self.s3.put_object().bucket(&self.stage.bucket).key(key).body(body.to_vec().into());
        call.send().await.unwrap().version_id
    }

    async fn get(&self, key: &str) -> Option<Vec<u8>> {
        let object = self.s3.get_object().bucket(&self.stage.bucket).key(key).send().await.ok()?;
        Some(object.body.collect().await.unwrap().to_vec())
    }

    async fn head(&self, key: &str) -> HeadObjectOutput {
        let call = self.s3.head_object().bucket(&self.stage.bucket).key(key).checksum_mode(ChecksumMode::Enabled);
        call.send().await.unwrap()
    }

    async fn delete(&self, key: &str) {
        self.s3.delete_object().bucket(&self.stage.bucket).key(key).send().await.unwrap();
    }

    /// Versions and delete markers of all keys with this prefix.
    async fn history(&self, prefix: &str) -> usize {
        let (mut key, mut version, mut count) = (None, None, 0);
        loop {
            let list = self.s3.list_object_versions().bucket(&self.stage.bucket).prefix(prefix);
            let page = list.set_key_marker(key).set_version_id_marker(version).send().await.unwrap();
            count += page.versions().len() + page.delete_markers().len();
            if !page.is_truncated().unwrap_or_default() {
                return count;
            }
            (key, version) = (page.next_key_marker, page.next_version_id_marker);
        }
    }

    async fn rotate(&self, ask: &Ask) -> ObjectRotation {
        rotate(&self.store, ask).await.unwrap()
    }
}

fn ask(key: &str, request_id: &str) -> Ask {
    Ask { key: ObjectKey::parse(key).unwrap(), request_id: request_id.into() }
}

fn steps(rotation: &ObjectRotation) -> Vec<Step> {
    rotation.steps.iter().map(|(step, _)| *step).collect()
}

/// Bytes that are the same in no two parts.
fn large(size: u32) -> Vec<u8> {
    (0..size / 4).flat_map(u32::to_le_bytes).collect()
}

async fn the_urls_end_and_the_bytes_move(backend: Backend) {
    let play = Play::new(backend).await;
    play.put("dir/report.pdf", b"a leak").await;
    play.put("dir/report.pdf-x", b"a neighbour").await;
    let leaked = play.stage.presign("dir/report.pdf", download()).await;
    let head = play.stage.presign("dir/report.pdf", Operation::Head(pb::Head::default())).await;
    assert_eq!(play.stage.send(&leaked, "").await.text(), "a leak");

    let before = SystemTime::now();
    let rotation = play.rotate(&ask("dir/report.pdf", "one")).await;
    let new_key = rotation.new_key.as_str();
    assert!(new_key.starts_with("dir/report-") && new_key.rsplit_once('.').unwrap().1 == "pdf", "{new_key}");
    assert_eq!((rotation.size, rotation.versions_deleted), (6, 1));
    assert_eq!(steps(&rotation), [Step::Copied, Step::Verified, Step::Deleted, Step::Confirmed]);
    assert!(rotation.steps.is_sorted_by_key(|(_, at)| *at));
    assert!((before..=SystemTime::now()).contains(&rotation.confirmed_at));

    assert_eq!(play.stage.send(&leaked, "").await.status, 404);
    assert_eq!(play.stage.send(&head, "").await.status, 404);
    assert_eq!(play.stage.get(new_key).await.text(), "a leak");
    assert_eq!(play.stage.get("dir/report.pdf-x").await.text(), "a neighbour");

    // The answer was lost: it is given again. Another request is another rotation.
    let again = play.rotate(&ask("dir/report.pdf", "one")).await;
    assert_eq!((again.new_key.as_str(), again.size, again.versions_deleted), (new_key, 6, 0));
    play.put("dir/report.pdf", b"next").await;
    let other = play.rotate(&ask("dir/report.pdf", "two")).await;
    assert_ne!(other.new_key, rotation.new_key);
    assert_eq!(play.get(other.new_key.as_str()).await.unwrap(), b"next");
    assert_eq!(play.get(new_key).await.unwrap(), b"a leak");
}

async fn what_the_object_carries_is_kept(backend: Backend) {
    let play = Play::new(backend).await;
    for (name, body) in [("small.csv", b"a;b".to_vec()), ("large.csv", large(6 << 20))] {
        let call = play.s3.put_object().bucket(&play.stage.bucket).key(name).body(body.clone().into());
        let call =
            call.content_type("text/csv").cache_control("private, max-age=60").metadata("owner", "j\u{f6}rg & co");
        let call = call.content_disposition("attachment; filename=\"x.csv\"").content_language("de");
        let call = call.checksum_algorithm(ChecksumAlgorithm::Crc32C);
        call.send().await.unwrap();
        let old = play.head(name).await;
        let rotation = play.rotate(&ask(name, "one")).await;
        let new = play.head(rotation.new_key.as_str()).await;
        assert_eq!(new.content_type(), Some("text/csv"));
        assert_eq!(new.cache_control(), Some("private, max-age=60"));
        assert_eq!(new.content_disposition(), Some("attachment; filename=\"x.csv\""));
        assert_eq!(new.content_language(), Some("de"));
        assert_eq!(new.metadata(), old.metadata(), "{name}");
        assert!(old.metadata().unwrap().contains_key("owner"));
        if (backend, name) != (Backend::Embedded, "large.csv") {
            assert!(old.checksum_crc32_c().is_some(), "{name}");
            assert_eq!(new.checksum_crc32_c(), old.checksum_crc32_c(), "{name}");
        }
        assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), body);
    }
}

async fn tags_class_and_encryption_are_kept(_: Backend) {
    Box::pin(tags_class_and_encryption(b"v".to_vec())).await;
}

async fn tags_class_and_encryption_are_kept_in_parts(_: Backend) {
    Box::pin(tags_class_and_encryption(large(11 << 20))).await;
}

async fn tags_class_and_encryption(body: Vec<u8>) {
    let play = Play::new(Backend::LocalStack).await;
    let call = play.s3.put_object().bucket(&play.stage.bucket).key("k").body(body.clone().into());
    let call = call.tagging("team=a%20%40%20b&cost%3Dcenter=7%2B8").storage_class(StorageClass::StandardIa);
    let kms = "arn:aws:kms:us-east-1:000000000000:key/00000000-0000-0000-0000-000000000001";
    let call = call.server_side_encryption(ServerSideEncryption::AwsKms).ssekms_key_id(kms).bucket_key_enabled(true);
    call.send().await.unwrap();
    let rotation = play.rotate(&ask("k", "one")).await;
    let new_key = rotation.new_key.as_str();
    let new = play.head(new_key).await;
    assert_eq!(new.storage_class(), Some(&StorageClass::StandardIa));
    assert_eq!(new.server_side_encryption(), Some(&ServerSideEncryption::AwsKms));
    assert_eq!((new.ssekms_key_id(), new.bucket_key_enabled()), (Some(kms), Some(true)));
    let tags = play.s3.get_object_tagging().bucket(&play.stage.bucket).key(new_key).send().await.unwrap();
    let mut tags: Vec<_> = tags.tag_set().iter().map(|tag| (tag.key(), tag.value())).collect();
    tags.sort_unstable();
    assert_eq!(tags, [("cost=center", "7+8"), ("team", "a @ b")]);
    assert_eq!(play.get(new_key).await.unwrap(), body);
}

async fn a_large_object_is_copied_in_parts(backend: Backend) {
    let play = Play::new(backend).await;
    let body = large(64 << 20);
    let sum = Sha256::digest(&body);
    play.put("large.bin", &body).await;
    drop(body);
    let leaked = play.stage.presign("large.bin", download()).await;
    let rotation = play.rotate(&ask("large.bin", "one")).await;
    assert_eq!(rotation.size, 64 << 20);
    let new_key = rotation.new_key.as_str();
    assert!(play.head(new_key).await.e_tag().unwrap().ends_with("-13\""), "it was not copied in parts");
    assert_eq!(Sha256::digest(play.get(new_key).await.unwrap()), sum);
    assert_eq!(play.stage.send(&leaked, "").await.status, 404);
}

async fn a_retry_goes_on_from_every_half_way_state(backend: Backend) {
    Box::pin(half_way(backend, b"precious".to_vec())).await;
}

async fn a_retry_in_parts_goes_on_from_every_half_way_state(backend: Backend) {
    Box::pin(half_way(backend, large(11 << 20))).await;
}

async fn half_way(backend: Backend, body: Vec<u8>) {
    let play = Play::new(backend).await;
    let ask = ask("k", "one");
    let wanted = new_key(&ask).unwrap();
    let call = play.s3.put_object().bucket(&play.stage.bucket).key("k").body(body.clone().into());
    call.checksum_algorithm(ChecksumAlgorithm::Crc32).send().await.unwrap();
    if backend == Backend::Embedded {
        // Its copies in parts have no checksum, and S3's clock has whole seconds.
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    }
    // The crash came after the copy, the second time too.
    for _ in 0..2 {
        drop(copy(&play.store, &ask).await.unwrap());
        assert_eq!(play.get("k").await.unwrap(), body);
        assert_eq!(play.get(wanted.as_str()).await.unwrap(), body);
    }
    let copied = copy(&play.store, &ask).await.unwrap();
    // Another replica is faster.
    let rotation = play.rotate(&ask).await;
    assert_eq!((&rotation.new_key, rotation.size), (&wanted, i64::try_from(body.len()).unwrap()));
    assert_eq!(steps(&rotation), [Step::Verified, Step::Deleted, Step::Confirmed]);
    // And once more, after all deletes.
    for late in [finish(&play.store, copied).await.unwrap(), play.rotate(&ask).await] {
        assert_eq!((late.new_key, late.size, late.versions_deleted), (wanted.clone(), rotation.size, 0));
    }
    assert_eq!(play.get("k").await, None);
    assert_eq!(play.get(wanted.as_str()).await.unwrap(), body);
}

async fn an_overwritten_source_is_noticed(backend: Backend) {
    let play = Play::new(backend).await;
    for (key, size) in [("small", 5), ("large", 6 << 20)] {
        let ask = ask(key, "one");
        play.put(key, &vec![1; size]).await;
        let copied = copy(&play.store, &ask).await.unwrap();
        play.put(key, &vec![2; size]).await;
        let error = finish(&play.store, copied).await.unwrap_err();
        assert!(matches!(error, Error::SourceChanged { kept: None }), "{error}");
        assert_eq!(error.code().0, tonic::Code::Aborted);
        assert_eq!(play.get(key).await.unwrap(), vec![2; size]);
        assert_eq!(play.get(new_key(&ask).unwrap().as_str()).await, None);
        // The same request rotates what is there now.
        let rotation = play.rotate(&ask).await;
        assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), vec![2; size]);
    }
}

async fn an_overwritten_source_is_noticed_by_a_retry(backend: Backend) {
    let play = Play::new(backend).await;
    for (key, size) in [("small", 5), ("large", 6 << 20)] {
        let ask = ask(key, "one");
        play.put(key, &vec![1; size]).await;
        drop(copy(&play.store, &ask).await.unwrap());
        play.put(key, &vec![2; size]).await;
        let kept = new_key(&ask).unwrap();
        let error = rotate(&play.store, &ask).await.unwrap_err();
        assert!(matches!(&error, Error::SourceChanged { kept: Some(key) } if *key == kept), "{error}");
        assert!(error.to_string().contains(kept.as_str()));
        assert_eq!(play.get(key).await.unwrap(), vec![2; size]);
        assert_eq!(play.get(kept.as_str()).await.unwrap(), vec![1; size]);
    }
}

async fn two_calls_at_once_are_one_rotation(backend: Backend) {
    let play = Play::new(backend).await;
    let (store, ask) = (Arc::new(play.store), ask("k", "one"));
    for round in 0..5_u8 {
        let put = play.s3.put_object().bucket(&play.stage.bucket).key("k").body(vec![round; 9].into());
        put.send().await.unwrap();
        let ask = Ask { request_id: format!("request {round}"), ..ask.clone() };
        let call = || {
            let (store, ask) = (Arc::clone(&store), ask.clone());
            tokio::spawn(async move { rotate(&store, &ask).await.unwrap() })
        };
        let (one, two) = (call(), call());
        let (one, two) = (one.await.unwrap(), two.await.unwrap());
        assert_eq!((&one.new_key, one.size), (&two.new_key, two.size));
        let object = play.s3.get_object().bucket(&play.stage.bucket).key(one.new_key.as_str()).send().await.unwrap();
        assert_eq!(object.body.collect().await.unwrap().to_vec(), [round; 9]);
    }
}

async fn a_stale_source_is_not_copied(_: Backend) {
    let play = Play::new(Backend::LocalStack).await;
    let to = ObjectKey::parse("copy").unwrap();
    for (key, size) in [("small", 5), ("large", 11 << 20)] {
        play.put(key, &vec![1; size]).await;
        let source = play.store.source(&ObjectKey::parse(key).unwrap()).await.unwrap();
        play.put(key, &vec![2; size]).await;
        let error = play.store.copy(&source, &to).await.unwrap_err();
        assert!(matches!(error, Error::SourceChanged { kept: None }), "{error}");
        assert_eq!(play.get("copy").await, None);
        let uploads = play.s3.list_multipart_uploads().bucket(&play.stage.bucket).send().await.unwrap();
        assert_eq!(uploads.uploads().len(), 0);
    }
}

async fn an_upload_after_the_end_is_left_alone(backend: Backend) {
    let play = Play::new(backend).await;
    let ask = ask("k", "one");
    play.put("k", b"old").await;
    drop(copy(&play.store, &ask).await.unwrap());
    let late = copy(&play.store, &ask).await.unwrap();
    let rotation = play.rotate(&ask).await;
    // An upload URL of the old key is still out.
    play.put("k", b"new").await;
    for error in [finish(&play.store, late).await.unwrap_err(), rotate(&play.store, &ask).await.unwrap_err()] {
        assert!(matches!(&error, Error::SourceChanged { kept: Some(key) } if *key == rotation.new_key), "{error}");
    }
    assert_eq!(play.get("k").await.unwrap(), b"new");
    assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), b"old");
}

async fn what_is_not_there_is_not_found(backend: Backend) {
    let play = Play::new(backend).await;
    play.put("k-x", b"a neighbour").await;
    let error = rotate(&play.store, &ask("k", "one")).await.unwrap_err();
    assert!(matches!(error, Error::ObjectNotFound), "{error}");
    let error = rotate(&play.store, &ask("k-x", "")).await.unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
}

async fn every_version_dies(_: Backend) {
    let play = Play::versioned().await;
    let oldest = play.put("k", b"oldest").await;
    play.put("k", b"older").await;
    play.delete("k").await;
    play.put("k", b"current").await;
    play.put("k-x", b"neighbour").await;
    play.put("k-x", b"neighbour too").await;
    play.put("k/x", b"neighbour").await;
    let pinned = Operation::Download(pb::Download { version_id: oldest, ..pb::Download::default() });
    let pinned = play.stage.presign("k", pinned).await;
    let leaked = play.stage.presign("k", download()).await;
    assert_eq!(play.stage.send(&pinned, "").await.text(), "oldest");
    assert_eq!(play.stage.send(&leaked, "").await.text(), "current");

    let rotation = play.rotate(&ask("k", "one")).await;
    assert_eq!(rotation.versions_deleted, 4);
    assert_eq!(play.stage.send(&pinned, "").await.status, 404);
    assert_eq!(play.stage.send(&leaked, "").await.status, 404);
    assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), b"current");
    assert_eq!(play.history("k").await, 4);
    assert_eq!((play.history("k-x").await, play.history("k/x").await), (2, 1));
    assert_eq!(play.get("k-x").await.unwrap(), b"neighbour too");
}

async fn many_versions_die(_: Backend) {
    let play = Play::versioned().await;
    let puts = (0..1_009).map(|_| play.put("many", b"older"));
    let puts: Vec<_> = futures_util::stream::iter(puts).buffer_unordered(16).collect().await;
    assert_eq!(puts.len(), 1_009);
    play.put("many", b"last").await;
    // At least: the SDK sends a put again whose answer was late, and that is another version.
    let versions = play.history("many").await;
    assert!(versions >= 1_010, "{versions}");
    let rotation = play.rotate(&ask("many", "one")).await;
    assert_eq!(rotation.versions_deleted, u64::try_from(versions).unwrap());
    assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), b"last");
    assert_eq!(play.history("many").await, 1);
}

async fn a_retry_finds_a_half_deleted_history(_: Backend) {
    let play = Play::versioned().await;
    let ask = ask("k", "one");
    for (left, marker) in [(2, false), (1, false), (0, true), (1, true)] {
        let mut ids = Vec::new();
        for body in ["1", "2", "current"] {
            ids.push(play.put("k", body.as_bytes()).await.unwrap());
        }
        drop(copy(&play.store, &ask).await.unwrap());
        if marker {
            play.delete("k").await;
        }
        for id in &ids[..3 - left] {
            play.s3.delete_object().bucket(&play.stage.bucket).key("k").version_id(id).send().await.unwrap();
        }
        let rotation = play.rotate(&ask).await;
        assert_eq!(rotation.versions_deleted, left as u64 + u64::from(marker));
        assert_eq!(play.history("k").await, 1);
        let id = play.head(rotation.new_key.as_str()).await.version_id.unwrap();
        assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), b"current");
        let call = play.s3.delete_object().bucket(&play.stage.bucket).key(rotation.new_key.as_str());
        call.version_id(id).send().await.unwrap();
    }
}

async fn an_overwritten_version_is_noticed(_: Backend) {
    let play = Play::versioned().await;
    let ask = ask("k", "one");
    play.put("k", b"old").await;
    let copied = copy(&play.store, &ask).await.unwrap();
    // Even with the same bytes: someone works with this object.
    play.put("k", b"old").await;
    let error = finish(&play.store, copied).await.unwrap_err();
    assert!(matches!(error, Error::SourceChanged { kept: None }), "{error}");
    assert_eq!(play.history("k").await, 2);

    // Overwritten and deleted: the version under the delete marker is kept.
    let copied = copy(&play.store, &ask).await.unwrap();
    play.put("k", b"new").await;
    play.delete("k").await;
    let error = finish(&play.store, copied).await.unwrap_err();
    assert!(matches!(error, Error::SourceChanged { kept: None }), "{error}");
    assert_eq!(play.history("k").await, 4);
}

async fn what_refuses_to_die_leaves_the_current_version_alone(_: Backend) {
    let play = Play::versioned().await;
    let locking = ObjectLockConfiguration::builder().object_lock_enabled(ObjectLockEnabled::Enabled).build();
    let call = play.s3.put_object_lock_configuration().bucket(&play.stage.bucket).object_lock_configuration(locking);
    call.send().await.unwrap();
    let old = play.put("k", b"old").await.unwrap();
    play.put("k", b"current").await;
    let hold = async |status| {
        let hold = ObjectLockLegalHold::builder().status(status).build();
        let call = play.s3.put_object_legal_hold().bucket(&play.stage.bucket).key("k").version_id(&old);
        call.legal_hold(hold).send().await.unwrap();
    };
    hold(ObjectLockLegalHoldStatus::On).await;
    let error = rotate(&play.store, &ask("k", "one")).await.unwrap_err();
    assert!(matches!(error, Error::StoreRefused { .. }), "{error}");
    // Else the old bytes would be what the URLs serve, and what a retry finds.
    assert_eq!(play.get("k").await.unwrap(), b"current");
    hold(ObjectLockLegalHoldStatus::Off).await;
    let rotation = play.rotate(&ask("k", "one")).await;
    assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), b"current");
    assert_eq!(play.history("k").await, 1);
}

async fn versioning_switched_on_and_off_is_no_matter(_: Backend) {
    let play = Play::new(Backend::LocalStack).await;
    for (key, states) in [
        ("before", vec![BucketVersioningStatus::Enabled]),
        ("after", vec![BucketVersioningStatus::Enabled, BucketVersioningStatus::Suspended]),
    ] {
        play.put(key, b"first").await;
        for state in states {
            play.versioning(state.clone()).await;
            if key == "after" {
                play.put(key, format!("{state}").as_bytes()).await;
            }
        }
        let bytes = play.get(key).await.unwrap();
        let rotation = play.rotate(&ask(key, "one")).await;
        assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), bytes);
        assert_eq!(play.history(key).await, 1, "{key}");
        assert_eq!(play.get(key).await, None);
    }
}

async fn hard_keys_move(_: Backend) {
    let play = Play::versioned().await;
    for key in ["/leading", "a//b+c d%20&=?#.t", "\u{fc}/\u{1f980}", "trailing/", "que?versionId=x"] {
        play.put(key, b"older").await;
        play.put(key, key.as_bytes()).await;
        let rotation = play.rotate(&ask(key, "one")).await;
        assert_eq!(rotation.versions_deleted, 2, "{key}");
        assert_eq!(play.get(rotation.new_key.as_str()).await.unwrap(), key.as_bytes());
        assert_eq!(play.get(key).await, None);
    }
}

async fn an_upload_left_by_a_crash_is_ended(_: Backend) {
    let play = Play::new(Backend::LocalStack).await;
    let ask = ask("k", "one");
    play.put("k", &large(6 << 20)).await;
    let key = new_key(&ask).unwrap();
    for key in [key.as_str(), "k"] {
        play.s3.create_multipart_upload().bucket(&play.stage.bucket).key(key).send().await.unwrap();
    }
    play.rotate(&ask).await;
    let uploads = play.s3.list_multipart_uploads().bucket(&play.stage.bucket).send().await.unwrap();
    assert_eq!(uploads.uploads().iter().map(|upload| upload.key().unwrap()).collect::<Vec<_>>(), ["k"]);
}
