//! The service as such: errors, deadlines, limits, health, reflection.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::app::{App, KeySource, Sources};
use fileaccess::config::Settings;
use fileaccess::dev::iam::MemoryIam;
use fileaccess::ops::upload_token::TokenKey;
use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use fileaccess::vault::{Held, Vault, VaultError};
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;
use tokio::sync::Barrier;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

use crate::stage::{Backend, Stage, ask, download, seconds};
use crate::tools;
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        errors_have_stable_reasons,
        a_ttl_is_clamped_by_the_ceiling_and_refused_beyond_a_week,
        the_longest_route_signs,
        a_store_that_is_down_is_unavailable_and_comes_back,
        deadlines_are_honoured,
        a_message_that_is_none_or_too_large_is_refused_with_a_reason,
        signers_are_listed,
        health_tells_that_no_signer_can_sign,
        no_vault_keeps_a_replica_from_starting,
        vaults_are_read_side_by_side_at_the_start,
    ]
}

pub fn grpcurl_cases() -> Vec<Case> {
    cases![health_and_reflection_through_grpcurl, reflection_v1_through_buf]
}

/// The code and the `ErrorInfo` reason.
pub fn reason(status: &tonic::Status) -> (tonic::Code, String) {
    let details = status.get_error_details();
    let info = details.error_info().expect("every error has an ErrorInfo");
    assert_eq!(info.domain, "fileaccess");
    (status.code(), info.reason.clone())
}

/// The fields that `BadRequest` names.
pub fn fields(status: &tonic::Status) -> Vec<String> {
    let details = status.get_error_details();
    details.bad_request().expect("a BadRequest").field_violations.iter().map(|v| v.field.clone()).collect()
}

async fn errors_have_stable_reasons(backend: Backend) {
    let stage = Stage::new(backend).await;
    let unknown = pb::PresignRequest { bucket: "nobody".into(), ..ask("k", download()) };
    let status = stage.try_presign(unknown).await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::PermissionDenied, "NOT_GRANTED".into()));
    let status = stage.try_presign(pb::PresignRequest::default()).await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::InvalidArgument, "INVALID_FIELD".into()));
    assert_eq!(fields(&status), ["bucket", "key", "operation"]);
    let request = pb::StatRequest { bucket: "files".into(), key: "none".into(), version_id: None };
    let status = stage.api.clone().stat(request).await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::NotFound, "OBJECT_NOT_FOUND".into()));
}

async fn a_ttl_is_clamped_by_the_ceiling_and_refused_beyond_a_week(backend: Backend) {
    let stage = Stage::with(backend, "[ttl]\ndefault = '2m'\nceiling = '10m'", None).await;
    for (ttl, expect) in [(None, 120), (seconds(1), 1), (seconds(600), 600), (seconds(604_800), 600)] {
        let before = SystemTime::now();
        let presigned = stage.try_presign(pb::PresignRequest { ttl, ..ask("k", download()) }).await.unwrap();
        let expires_at = SystemTime::try_from(presigned.expires_at.unwrap()).unwrap();
        let life = Duration::from_secs(expect);
        // Never more than promised: the signing time is the last full second.
        assert!(expires_at <= SystemTime::now() + life && expires_at + Duration::from_secs(1) > before + life);
        assert!(presigned.url.contains(&format!("X-Amz-Expires={expect}&")), "{}", presigned.url);
        let told = presigned.expires_in.unwrap();
        assert!(told.nanos == 0 && told.seconds <= i64::try_from(expect).unwrap());
    }
    let odd = Some(prost_types::Duration { seconds: 5, nanos: 1 });
    for ttl in [seconds(0), seconds(-1), seconds(604_801), odd] {
        let status = stage.try_presign(pb::PresignRequest { ttl, ..ask("k", download()) }).await.unwrap_err();
        assert_eq!(fields(&status), ["ttl"]);
    }
}

async fn the_longest_route_signs(backend: Backend) {
    let settings = "[signers.tenant]\nkind = 'ambient'\n[signers.deep]\nkind = 'ambient'\n\
        [buckets.partly]\nbucket = 'partly'\nregion = 'eu-central-1'\n\
        [[routes]]\nbucket = 'files'\nprefix = 'tenant-a/'\nsigner = 'tenant'\n\
        [[routes]]\nbucket = 'partly'\nprefix = 'in/'\nsigner = 'deep'";
    let stage = Stage::with(backend, settings, None).await;
    for (key, signer) in [("tenant-a/x", "tenant"), ("tenant-ab/x", "main"), ("tenant-a", "main"), ("z", "main")] {
        assert_eq!(stage.presign(key, download()).await.signer, signer, "{key}");
    }
    let outside = pb::PresignRequest { bucket: "partly".into(), ..ask("out/x", download()) };
    let status = stage.try_presign(outside).await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::FailedPrecondition, "NO_ROUTE".into()));
}

async fn a_store_that_is_down_is_unavailable_and_comes_back(backend: Backend) {
    let stage = Stage::new(backend).await;
    // A bucket whose store is not up yet, on a port that is ours to open later.
    let held = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = held.local_addr().unwrap();
    drop(held);
    let settings = format!(
        "[buckets.away]\nbucket = '{}'\nregion = 'us-east-1'\nendpoint = 'http://{port}'\npath_style = true\n\
         [[routes]]\nbucket = 'away'\nsigner = 'main'",
        stage.bucket
    );
    let down = Stage::with(
        backend,
        &settings,
        Some(stage.app.signers["main"].key(SystemTime::now()).unwrap().credentials.clone()),
    )
    .await;
    let list = || {
        let request = pb::ListRequest { bucket: "away".into(), ..pb::ListRequest::default() };
        let mut api = down.api.clone();
        async move { api.list(request).await }
    };
    let status = list().await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::Unavailable, "STORE_UNAVAILABLE".into()));
    assert!(!status.message().contains("127.0.0.1"), "{}", status.message());
    // Presigning needs no store.
    let request = pb::PresignRequest { bucket: "away".into(), ..ask("k", download()) };
    down.try_presign(request).await.unwrap();

    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join(&stage.bucket)).unwrap();
    std::fs::write(root.path().join(&stage.bucket).join("back"), "again").unwrap();
    let listener = TcpListener::bind(port).await.unwrap();
    let service = fileaccess::dev::s3::service(root.path(), down.iam.clone()).unwrap();
    tokio::spawn(fileaccess::dev::s3::serve(listener, service, std::future::pending()));
    let page = list().await.unwrap().into_inner();
    assert_eq!(page.objects[0].key, "back");
}

async fn deadlines_are_honoured(backend: Backend) {
    // A store that takes connections and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = format!(
        "[limits]\ndeadline = '2s'\n[buckets.silent]\nbucket = 'silent'\nregion = 'us-east-1'\nendpoint = 'http://{}'\npath_style = true\n\
         [[routes]]\nbucket = 'silent'\nsigner = 'main'",
        silent.local_addr().unwrap()
    );
    let stage = Stage::with(backend, &settings, None).await;
    // Tonic's client would time out by itself; this one only passes the header on.
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let origin = format!("http://{}", stage.address).parse().unwrap();
    let mut api = FileAccessClient::with_origin(http, origin);
    for (header, at_least, at_most) in [(Some("300m"), 300, 1500), (None, 2000, 5000), (Some("1H"), 2000, 5000)] {
        let mut request =
            tonic::Request::new(pb::ListRequest { bucket: "silent".into(), ..pb::ListRequest::default() });
        if let Some(header) = header {
            request.metadata_mut().insert("grpc-timeout", header.parse().unwrap());
        }
        let begun = Instant::now();
        let status = api.list(request).await.unwrap_err();
        assert_eq!(reason(&status), (tonic::Code::DeadlineExceeded, "DEADLINE".into()));
        let took = begun.elapsed().as_millis();
        assert!((at_least..at_most).contains(&took), "{header:?}: {took} ms");
    }
}

async fn a_message_that_is_none_or_too_large_is_refused_with_a_reason(backend: Backend) {
    let stage = Stage::with(backend, "[limits]\nrequest_bytes = 4096", None).await;
    let request =
        pb::ListRequest { bucket: "files".into(), page_token: "x".repeat(5000), ..pb::ListRequest::default() };
    let status = stage.api.clone().list(request).await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::InvalidArgument, "INVALID_MESSAGE".into()));
    assert!(status.message().contains("4096 bytes"), "{}", status.message());
    // A message of another kind: field 1 is a number there, and a text here.
    let number = prost_types::Duration { seconds: 5, nanos: 0 };
    let mut grpc = tonic::client::Grpc::new(stage.channel.clone());
    grpc.ready().await.unwrap();
    let path = "/fileaccess.v1.FileAccess/Presign".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<prost_types::Duration, pb::PresignResponse>::default();
    let status = grpc.unary(tonic::Request::new(number), path, codec).await.unwrap_err();
    assert_eq!(reason(&status), (tonic::Code::InvalidArgument, "INVALID_MESSAGE".into()));
}

async fn signers_are_listed(backend: Backend) {
    let stage = Stage::new(backend).await;
    let signers = stage.api.clone().list_signers(pb::ListSignersRequest {}).await.unwrap().into_inner().signers;
    assert_eq!(signers.len(), 1);
    let signer = &signers[0];
    assert_eq!((signer.name.as_str(), signer.kind(), signer.generation), ("main", pb::SignerKind::Ambient, 1));
    assert_eq!(signer.routes, [pb::Route { bucket: "files".into(), prefix: String::new() }]);
    assert!(signer.access_key_id.starts_with("AKIA") && signer.since.is_some() && signer.unavailable.is_empty());
}

async fn health_tells_that_no_signer_can_sign(backend: Backend) {
    let ended = Credentials::new("ASIAENDED", "secret", Some("token".into()), Some(SystemTime::now()), "test");
    for (key, expect) in [(None, ServingStatus::Serving), (Some(ended), ServingStatus::NotServing)] {
        let stage = Stage::with(backend, "", key).await;
        let mut health = HealthClient::new(stage.channel.clone());
        for service in ["", "fileaccess.v1.FileAccess"] {
            let request = HealthCheckRequest { service: service.into() };
            assert_eq!(health.check(request).await.unwrap().into_inner().status(), expect);
        }
    }
}

/// A vault whose reads wait for `others`, and show nothing then.
#[derive(Debug)]
struct Waiting {
    others: Arc<Barrier>,
}

#[tonic::async_trait]
impl Vault for Waiting {
    async fn read(&self) -> Result<Held, VaultError> {
        self.others.wait().await;
        Ok(Held::default())
    }

    async fn stage(&self, _: &str, _: &Credentials) -> Result<(), VaultError> {
        Err(VaultError::Conflict)
    }

    async fn promote(&self, _: Option<&str>, _: &str) -> Result<(), VaultError> {
        Err(VaultError::Conflict)
    }

    async fn unstage(&self, _: &str) -> Result<(), VaultError> {
        Err(VaultError::Conflict)
    }
}

/// A replica with a good signer, and two whose vaults wait for so many reads
/// at once.
async fn start_with_waiting(at_once: usize, lease: &str) -> Arc<App> {
    let (folder, iam, others) = (tempfile::tempdir().unwrap(), MemoryIam::default(), Arc::new(Barrier::new(at_once)));
    let signer = |name: &str| {
        let vault = format!("vault = {{ file = '{}/{name}.json' }}", folder.path().display());
        let route = format!("[[routes]]\nbucket = 'files'\nprefix = '{name}/'\nsigner = '{name}'");
        format!("[signers.{name}]\nkind = 'iam-user'\nuser = '{name}'\n{vault}\n{route}\n")
    };
    let text = "[buckets.files]\nbucket = 'files'\nregion = 'us-east-1'\n\
                [signers.main]\nkind = 'ambient'\n[[routes]]\nbucket = 'files'\nsigner = 'main'\n"
        .to_owned()
        + &signer("one")
        + &signer("two")
        + &format!("[rotation]\nrefresh = '100ms'\nlease = '{lease}'\n");
    let settings = Settings::load(&text, &BTreeMap::new()).unwrap();
    let key = SharedCredentialsProvider::new(Credentials::new("AKIAGOOD", "secret", None, None, "test"));
    let waiting = |user: &str| KeySource::IamUser {
        user: user.into(),
        vault: Arc::new(Waiting { others: Arc::clone(&others) }),
        issuer: Arc::new(iam.clone()),
    };
    let signers = [("one", waiting("one")), ("two", waiting("two")), ("main", KeySource::Ambient(key.clone()))];
    let signers = signers.into_iter().map(|(name, source)| (name.to_owned(), source)).collect();
    let sources = Sources { identity: key, signers, tokens: TokenKey::random() };
    tokio::time::timeout(Duration::from_secs(20), App::start(&settings, sources)).await.expect("started").unwrap()
}

fn why_not(app: &App, signer: &str) -> String {
    let error = app.signers[signer].key(SystemTime::now()).unwrap_err();
    error.detail().unwrap().to_owned()
}

async fn no_vault_keeps_a_replica_from_starting(_: Backend) {
    let app = start_with_waiting(usize::MAX, "500ms").await;
    assert!(app.can_sign(SystemTime::now()), "the good signer was looked up all the same");
    for name in ["one", "two"] {
        assert_eq!(why_not(&app, name), "its lease has run out: the vault was not read in time");
    }
}

async fn vaults_are_read_side_by_side_at_the_start(_: Backend) {
    let app = start_with_waiting(2, "1h").await;
    for name in ["one", "two"] {
        assert_eq!(why_not(&app, name), "its vault holds no key yet");
    }
}

/// What a program says to standard output, if it succeeds, and else all it says.
pub async fn output(mut command: Command) -> Result<String, String> {
    tokio::task::spawn_blocking(move || {
        let output = command.stdin(Stdio::null()).output().expect("a program that runs");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{out}{err}")) }
    })
    .await
    .expect("no panic")
}

pub fn grpcurl(arguments: &[&str]) -> Command {
    let mut command = Command::new(tools::program("grpcurl").expect("it is ignored where grpcurl can't be had"));
    command.arg("-plaintext").args(arguments);
    command
}

async fn health_and_reflection_through_grpcurl(backend: Backend) {
    let stage = Stage::new(backend).await;
    let address = stage.address.as_str();
    let listed = output(grpcurl(&[address, "list"])).await.unwrap();
    for service in ["fileaccess.v1.FileAccess", "grpc.health.v1.Health", "grpc.reflection.v1"] {
        assert!(listed.contains(service), "{listed}");
    }
    let described = output(grpcurl(&[address, "describe", "fileaccess.v1.PresignRequest"])).await.unwrap();
    assert!(described.contains("HTTP clients rewrite"), "comments come along: {described}");
    for service in ["", "fileaccess.v1.FileAccess"] {
        let request = format!("{{\"service\":\"{service}\"}}");
        let health = output(grpcurl(&["-d", &request, address, "grpc.health.v1.Health/Check"])).await.unwrap();
        assert!(health.contains("\"SERVING\""), "{health}");
    }
    let wrong = output(grpcurl(&["-d", "{\"bucket\":\"files\"}", address, "fileaccess.v1.FileAccess/Presign"]))
        .await
        .unwrap_err();
    assert!(wrong.contains("InvalidArgument") && wrong.contains("`key` must not be empty"), "{wrong}");
}

async fn reflection_v1_through_buf(backend: Backend) {
    let stage = Stage::new(backend).await;
    let mut buf = Command::new(tools::program("buf").expect("it is ignored where buf can't be had"));
    let url = format!("http://{}/fileaccess.v1.FileAccess/ListSigners", stage.address);
    buf.args([
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "--reflect-protocol",
        "grpc-v1",
        "-d",
        "{}",
        &url,
    ]);
    let listed = output(buf).await.unwrap();
    assert!(listed.contains("\"SIGNER_KIND_AMBIENT\""), "{listed}");
}
