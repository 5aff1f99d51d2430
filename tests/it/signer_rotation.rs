//! The rotation of an `iam-user` signer's key, as a library: on the embedded
//! IAM with a vault in memory, and on LocalStack's IAM and Secrets Manager.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::config::BucketSettings;
use fileaccess::error::Error;
use fileaccess::issuer::{Iam, IssuerError, KeyFacts, KeyIssuer, Status};
use fileaccess::object::{Lifetime, ObjectKey};
use fileaccess::rotation::driver::{Done, Driver, Pace, SignerRotation};
use fileaccess::rotation::plan::Goal;
use fileaccess::rotation::probe::Probe;
use fileaccess::signer::Presigner;
use fileaccess::signer::presign::{SignedRequest, Terms};
use fileaccess::vault::memory::Memory;
use fileaccess::vault::secrets_manager::SecretsManager;
use fileaccess::vault::{Held, Vault, VaultError};
use tokio::sync::watch;

use crate::stage::{Backend, Stage};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        a_planned_rotation_never_leaves_a_gap,
        an_immediate_rotation_kills_first,
        whoever_looks_next_goes_on_after_a_crash,
        a_key_lost_between_iam_and_the_vault_is_cleaned_up,
        a_key_that_was_stored_while_iam_was_slow_is_no_orphan,
        keys_of_somebody_else_are_named_and_left_alone,
        what_is_urgent_ends_an_earlier_rotation_too,
        a_request_that_comes_again_later_is_another_rotation,
        replicas_that_start_at_once_make_one_key,
    ]
}

const PACE: Pace =
    Pace { lease: Duration::from_millis(300), orphan_age: Duration::from_secs(1), poll: Duration::from_millis(10) };

/// A signer's user, with its vault and the S3 that honours its keys.
struct Scene {
    stage: Stage,
    user: String,
    vault: Arc<dyn Vault>,
    issuer: Arc<dyn KeyIssuer>,
    bucket: BucketSettings,
}

impl Scene {
    async fn new(backend: Backend) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let user = format!("rotated-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let stage = Stage::new(backend).await;
        stage.put("any", "object").await;
        let (vault, issuer): (Arc<dyn Vault>, Arc<dyn KeyIssuer>) = match backend {
            Backend::Embedded => {
                stage.iam.create_user(&user).unwrap();
                (Arc::new(Memory::default()), Arc::new(stage.iam.clone()))
            }
            Backend::LocalStack => {
                crate::behaviours::iam(&stage.endpoint, "CreateUser", &[("UserName", &user)]).await;
                let root = || SharedCredentialsProvider::new(Credentials::new("test", "test", None, None, "test"));
                let endpoint = Some(stage.endpoint.clone());
                let vault = SecretsManager::new(&user, "us-east-1", endpoint.clone(), root());
                (Arc::new(vault), Arc::new(Iam::new("us-east-1", endpoint, root())))
            }
        };
        let bucket = BucketSettings {
            bucket: stage.bucket.clone(),
            region: "us-east-1".into(),
            endpoint: Some(stage.endpoint.clone()),
            path_style: true,
            plain_http: false,
            issue_id: true,
        };
        Self { stage, user, vault, issuer, bucket }
    }

    fn driver(&self) -> Driver {
        let key = ObjectKey::parse("any").unwrap();
        Driver {
            user: self.user.clone(),
            vault: Arc::clone(&self.vault),
            issuer: Arc::clone(&self.issuer),
            probe: Probe::new(self.stage.http.clone(), self.bucket.clone(), key),
            pace: PACE,
        }
    }

    /// Carries out `goal`, with a version id of its own.
    async fn drive(&self, goal: &Goal) -> Result<Option<SignerRotation>, Error> {
        self.drive_as(goal, &version()).await
    }

    async fn drive_as(&self, goal: &Goal, version: &str) -> Result<Option<SignerRotation>, Error> {
        self.driver().drive(goal, version, &watch::channel(Vec::new()).0).await
    }

    /// The key that signs, made if need be, and a URL that it has signed.
    async fn current(&self) -> (Credentials, String) {
        assert!(self.drive(&Goal::Finish).await.unwrap().is_none());
        let key = self.vault.read().await.unwrap().current.expect("a current key").key;
        let url = self.url(&key).await;
        assert_eq!(self.fetch(&url).await, 200);
        (key, url)
    }

    async fn url(&self, key: &Credentials) -> String {
        let presigner = Presigner::new(&self.bucket, key.clone(), SystemTime::now());
        let object = ObjectKey::parse("any").unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let terms = Terms {
            client: &presigner.client,
            bucket: &self.bucket.bucket,
            key: &object,
            start: SystemTime::UNIX_EPOCH + Duration::from_secs(now),
            expires: Lifetime::new(Duration::from_hours(1)).unwrap(),
            issue_id: None,
        };
        let get = terms.client.get_object().bucket(terms.bucket).key("any");
        SignedRequest::from_sdk(get.presigned(terms.config().unwrap()).await).unwrap().url
    }

    async fn fetch(&self, url: &str) -> u16 {
        self.stage.http.get(url).send().await.unwrap().status().as_u16()
    }

    /// What must hold whenever a rotation has come to its end.
    async fn is_clean(&self, old: &Credentials, old_url: &str) {
        let held = self.vault.read().await.unwrap();
        let current = held.current.expect("a current key").key;
        assert_ne!(current.access_key_id(), old.access_key_id());
        assert!(held.pending.is_none());
        let keys = self.issuer.list(&self.user).await.unwrap();
        let keys: Vec<_> = keys.iter().map(|key| (key.id.as_str(), key.status)).collect();
        assert_eq!(keys, [(current.access_key_id(), Status::Active)]);
        assert_eq!(self.fetch(old_url).await, 403);
        assert_eq!(self.fetch(&self.url(&current).await).await, 200);
    }
}

/// An id that the vault accepts: 32 characters.
fn version() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn replace(key: &Credentials, immediate: bool) -> Goal {
    Goal::Replace { key: key.access_key_id().to_owned(), immediate }
}

fn names(steps: &[Done]) -> Vec<&'static str> {
    steps.iter().map(|done| done.step).collect()
}

async fn a_planned_rotation_never_leaves_a_gap(backend: Backend) {
    let scene = Scene::new(backend).await;
    let (old, url) = scene.current().await;
    let (tell, mut told) = watch::channel(Vec::new());
    let (goal, driver, id) = (replace(&old, false), scene.driver(), version());
    let rotating = tokio::spawn(async move { driver.drive(&goal, &id, &tell).await });
    // Until it is deactivated, the old URL works; the new key is current long before.
    let promoted = told.wait_for(|steps: &Vec<Done>| names(steps).contains(&"promoted")).await.unwrap().clone();
    assert_eq!(names(&promoted), ["created", "accepted", "promoted"]);
    assert_eq!(scene.fetch(&url).await, 200);
    let rotation = rotating.await.unwrap().unwrap().expect("a rotation");
    assert_eq!(names(&rotation.steps), ["created", "accepted", "promoted", "deactivated", "refused", "deleted"]);
    let at = |step| rotation.steps.iter().find(|done| done.step == step).unwrap().at;
    assert!(at("deactivated").duration_since(at("promoted")).unwrap() >= PACE.lease);
    assert!(rotation.confirmed_at >= at("deactivated") && rotation.confirmed_at <= at("deleted"));
    assert_eq!(rotation.old_key, old.access_key_id());
    scene.is_clean(&old, &url).await;
    // The same again is done at once, and proven again.
    let again = scene.drive(&replace(&old, false)).await.unwrap().expect("a proof");
    assert_eq!((again.new_key, again.steps), (rotation.new_key, Vec::new()));
}

async fn an_immediate_rotation_kills_first(backend: Backend) {
    let scene = Scene::new(backend).await;
    let (old, url) = scene.current().await;
    let rotation = scene.drive(&replace(&old, true)).await.unwrap().expect("a rotation");
    assert_eq!(names(&rotation.steps), ["deactivated", "created", "accepted", "promoted", "refused", "deleted"]);
    scene.is_clean(&old, &url).await;
}

async fn whoever_looks_next_goes_on_after_a_crash(backend: Backend) {
    for immediate in [false, true] {
        for boundary in 1..=6 {
            let scene = Scene::new(backend).await;
            let (old, url) = scene.current().await;
            let (tell, mut told) = watch::channel(Vec::new());
            let (goal, driver, id) = (replace(&old, immediate), scene.driver(), version());
            let crashing = tokio::spawn(async move { driver.drive(&goal, &id, &tell).await });
            // It may have gone on a little by the time it is gone: a crash has no manners.
            told.wait_for(|steps: &Vec<Done>| steps.len() >= boundary).await.unwrap();
            crashing.abort();
            let _ = crashing.await;
            // Another replica knows of no goal, and only leaves nothing half done.
            scene.drive(&Goal::Finish).await.unwrap();
            scene.is_clean(&old, &url).await;
        }
    }
}

/// A vault that never answers when it is to store.
#[derive(Debug)]
struct Stuck(Arc<dyn Vault>);

#[tonic::async_trait]
impl Vault for Stuck {
    async fn read(&self) -> Result<Held, VaultError> {
        self.0.read().await
    }
    async fn stage(&self, _: &str, _: &Credentials) -> Result<(), VaultError> {
        std::future::pending().await
    }
    async fn promote(&self, from: Option<&str>, to: &str) -> Result<(), VaultError> {
        self.0.promote(from, to).await
    }
    async fn unstage(&self, id: &str) -> Result<(), VaultError> {
        self.0.unstage(id).await
    }
}

async fn a_key_lost_between_iam_and_the_vault_is_cleaned_up(backend: Backend) {
    let scene = Scene::new(backend).await;
    let (old, url) = scene.current().await;
    let stuck = Driver { vault: Arc::new(Stuck(Arc::clone(&scene.vault))), ..scene.driver() };
    let goal = replace(&old, false);
    let crashing = tokio::spawn(async move { stuck.drive(&goal, &version(), &watch::channel(Vec::new()).0).await });
    while scene.issuer.list(&scene.user).await.unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    crashing.abort();
    let _ = crashing.await;
    // The orphan is waited for while it is young, then deleted; the rotation goes on.
    scene.drive(&replace(&old, false)).await.unwrap().expect("a rotation");
    scene.is_clean(&old, &url).await;
}

async fn keys_of_somebody_else_are_named_and_left_alone(backend: Backend) {
    let scene = Scene::new(backend).await;
    let mut theirs = Vec::new();
    for _ in 0..2 {
        theirs.push(scene.issuer.create(&scene.user).await.unwrap().access_key_id().to_owned());
    }
    let Err(Error::KeySlotsTaken { user, mut keys }) = scene.drive(&Goal::Finish).await else { panic!("not blocked") };
    keys.sort();
    theirs.sort();
    assert_eq!((user, keys), (scene.user.clone(), theirs));
    assert_eq!(scene.issuer.list(&scene.user).await.unwrap().len(), 2);
}

async fn what_is_urgent_ends_an_earlier_rotation_too(backend: Backend) {
    let scene = Scene::new(backend).await;
    let (first, first_url) = scene.current().await;
    let (tell, mut told) = watch::channel(Vec::new());
    let (goal, driver, id) = (replace(&first, false), scene.driver(), version());
    let rotating = tokio::spawn(async move { driver.drive(&goal, &id, &tell).await });
    told.wait_for(|steps: &Vec<Done>| names(steps).contains(&"promoted")).await.unwrap();
    rotating.abort();
    let _ = rotating.await;
    // The first key waits for its lease when the second one is to end at once.
    let second = scene.vault.read().await.unwrap().current.unwrap().key;
    let second_url = scene.url(&second).await;
    assert_eq!((scene.fetch(&first_url).await, scene.fetch(&second_url).await), (200, 200));
    let rotation = scene.drive(&replace(&second, true)).await.unwrap().expect("a rotation");
    let steps: Vec<_> = rotation.steps.iter().map(|done| (done.step, done.key.as_str())).collect();
    let (one, two, three) = (first.access_key_id(), second.access_key_id(), rotation.new_key.as_str());
    assert_eq!(steps[..4], [("deactivated", two), ("deactivated", one), ("refused", one), ("deleted", one)]);
    assert_eq!(steps[4..7], [("created", three), ("accepted", three), ("promoted", three)]);
    assert_eq!(steps[7..], [("refused", two), ("deleted", two)]);
    assert!(rotation.confirmed_at > rotation.steps[6].at, "confirmed by the refusal of another key");
    scene.is_clean(&first, &first_url).await;
    scene.is_clean(&second, &second_url).await;
}

async fn a_request_that_comes_again_later_is_another_rotation(backend: Backend) {
    let scene = Scene::new(backend).await;
    let (again, other) = (version(), version());
    for id in [&again, &other, &again] {
        let (old, url) = scene.current().await;
        let goal = replace(&old, true);
        let rotating = scene.drive_as(&goal, id);
        let rotated = tokio::time::timeout(Duration::from_secs(30), rotating).await.expect("it ends");
        rotated.unwrap().expect("a rotation");
        scene.is_clean(&old, &url).await;
    }
}

/// An issuer whose first answer comes only when the other driver asks too.
#[derive(Debug)]
struct Together(Arc<dyn KeyIssuer>, Arc<tokio::sync::Barrier>, std::sync::Once);

#[tonic::async_trait]
impl KeyIssuer for Together {
    async fn list(&self, user: &str) -> Result<Vec<KeyFacts>, IssuerError> {
        let listed = self.0.list(user).await;
        let mut first = false;
        self.2.call_once(|| first = true);
        if first {
            self.1.wait().await;
        }
        listed
    }
    async fn create(&self, user: &str) -> Result<Credentials, IssuerError> {
        self.0.create(user).await
    }
    async fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IssuerError> {
        self.0.set_status(user, id, status).await
    }
    async fn delete(&self, user: &str, id: &str) -> Result<(), IssuerError> {
        self.0.delete(user, id).await
    }
}

async fn replicas_that_start_at_once_make_one_key(backend: Backend) {
    let scene = Scene::new(backend).await;
    let both = Arc::new(tokio::sync::Barrier::new(2));
    let driver = || Driver {
        issuer: Arc::new(Together(Arc::clone(&scene.issuer), Arc::clone(&both), std::sync::Once::new())),
        pace: Pace { orphan_age: Duration::from_hours(1), ..PACE },
        ..scene.driver()
    };
    let (one, two, progress) = (driver(), driver(), watch::channel(Vec::new()).0);
    let (of_one, of_two) = (version(), version());
    let (one, two) =
        tokio::join!(one.drive(&Goal::Finish, &of_one, &progress), two.drive(&Goal::Finish, &of_two, &progress));
    assert!(one.unwrap().is_none() && two.unwrap().is_none());
    let current = scene.vault.read().await.unwrap().current.expect("a current key").key;
    let keys = scene.issuer.list(&scene.user).await.unwrap();
    assert_eq!(keys.iter().map(|key| key.id.as_str()).collect::<Vec<_>>(), [current.access_key_id()]);
}

/// An IAM that takes its time for the first list: a whole rotation passes.
#[derive(Debug)]
struct Slow {
    issuer: Arc<dyn KeyIssuer>,
    other: Driver,
    old: Mutex<Option<String>>,
}

#[tonic::async_trait]
impl KeyIssuer for Slow {
    async fn list(&self, user: &str) -> Result<Vec<KeyFacts>, IssuerError> {
        let old = self.old.lock().unwrap().take();
        if let Some(key) = old {
            let goal = Goal::Replace { key, immediate: true };
            self.other.drive(&goal, &version(), &watch::channel(Vec::new()).0).await.unwrap().expect("a rotation");
        }
        self.issuer.list(user).await
    }
    async fn create(&self, user: &str) -> Result<Credentials, IssuerError> {
        self.issuer.create(user).await
    }
    async fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IssuerError> {
        self.issuer.set_status(user, id, status).await
    }
    async fn delete(&self, user: &str, id: &str) -> Result<(), IssuerError> {
        self.issuer.delete(user, id).await
    }
}

async fn a_key_that_was_stored_while_iam_was_slow_is_no_orphan(backend: Backend) {
    let scene = Scene::new(backend).await;
    let (old, _) = scene.current().await;
    let slow = Slow {
        issuer: Arc::clone(&scene.issuer),
        other: scene.driver(),
        old: Mutex::new(Some(old.access_key_id().to_owned())),
    };
    // As old as an orphan has to be is what the new key is at once.
    let pace = Pace { orphan_age: Duration::ZERO, ..PACE };
    let driver = Driver { issuer: Arc::new(slow), pace, ..scene.driver() };
    assert!(driver.drive(&Goal::Finish, &version(), &watch::channel(Vec::new()).0).await.unwrap().is_none());
    let (new, _) = scene.current().await;
    let keys = scene.issuer.list(&scene.user).await.unwrap();
    assert_ne!(new, old);
    assert_eq!(keys.iter().map(|key| key.id.as_str()).collect::<Vec<_>>(), [new.access_key_id()]);
    assert_eq!(driver.vault.read().await.unwrap().current.unwrap().retired.len(), 1, "one rotation, and no more");
}
