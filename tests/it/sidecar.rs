//! Behind a real Envoy, with the settings of `tests/tools/envoy.yaml`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use rcgen::{CertificateParams, DnType};
use tokio::net::TcpListener;
use tonic::transport::Channel;

use crate::callers::{BILLING, ORDERS, XFCC, own_uid, presign, tls_settings};
use crate::certificates::{self, Authority, Identity, SERVER};
use crate::outside::Service;
use crate::service::{output, reason};
use crate::stage::Backend;
use crate::{Case, binary, cases, tools};
use fileaccess::pb;

pub fn cases() -> Vec<Case> {
    cases![
        a_certificate_is_the_same_caller_directly_and_through_envoy,
        grpcurl_comes_through_envoy,
        request_ids_deadlines_and_retries_come_through_envoy,
        envoy_turns_away_from_a_service_that_drains,
        envoy_lets_go_of_old_connections_without_a_failed_call,
    ]
}

/// Envoy, if it can be had here.
pub fn envoy() -> Result<PathBuf, &'static str> {
    let program = tools::program("envoy")?;
    if program.exists() { Ok(program) } else { Err("there is no Envoy for this system") }
}

/// A running Envoy, ended with the test.
struct Envoy {
    process: Child,
    admin: String,
    /// Where it takes calls.
    address: String,
    http: reqwest::Client,
}

impl Envoy {
    /// Starts it in front of the Unix socket `socket`, with its files in
    /// `folder`, and waits until it finds the service healthy.
    async fn start(folder: &Path, server: &Identity, client_ca: &str, socket: &str) -> Self {
        tls_settings(folder, server, client_ca);
        let text = std::fs::read_to_string(tools::sources().join("envoy.yaml")).unwrap();
        let mut filled = text.clone();
        for (theirs, ours) in [
            ("/etc/envoy", &*folder.to_string_lossy()),
            ("/run/fileaccess/grpc.sock", socket.strip_prefix("unix:").unwrap()),
            ("port_value: 8443", "port_value: 0"),
        ] {
            assert!(filled.contains(theirs), "envoy.yaml has no `{theirs}`");
            filled = filled.replace(theirs, ours);
        }
        let (config, admin_file) = (folder.join("envoy.yaml"), folder.join("admin"));
        std::fs::write(&config, filled).unwrap();
        let admin = "admin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }";
        let process = Command::new(envoy().expect("it is ignored where Envoy can't be had"))
            .args(["--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"])
            .args(["--config-yaml", admin, "--config-path"])
            .arg(&config)
            .arg("--admin-address-path")
            .arg(&admin_file)
            .stdin(Stdio::null())
            .spawn()
            .expect("an Envoy that runs");
        let http = fileaccess::rotation::probe::Probe::http_client();
        let mut envoy = Self { process, admin: String::new(), address: String::new(), http };
        envoy.admin = until(async || std::fs::read_to_string(&admin_file).ok().filter(|text| text.contains(':'))).await;
        envoy.address = until(async || {
            let listeners: serde_json::Value = serde_json::from_str(&envoy.ask("listeners?format=json").await?).ok()?;
            let at = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
            Some(format!("127.0.0.1:{}", at["port_value"].as_u64().filter(|port| *port > 0)?))
        })
        .await;
        envoy.finds("health_flags::healthy").await;
        envoy
    }

    async fn ask(&self, what: &str) -> Option<String> {
        self.http.get(format!("http://{}/{what}", self.admin)).send().await.ok()?.text().await.ok()
    }

    /// Waits until it says `what` of the service.
    async fn finds(&self, what: &str) {
        until(async || self.ask("clusters").await.filter(|said| said.contains(what))).await;
    }

    fn channel(&self, roots: &Authority, identity: &Identity) -> Channel {
        certificates::channel(&self.address, certificates::client(&roots.pem(), Some(identity), &["h2"]))
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Asks again until there is an answer: Envoy tells nobody by itself.
async fn until<T>(mut answer: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..400 {
        if let Some(answer) = answer().await {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("Envoy was not as expected within 20 s");
}

/// The listener behind Envoy.
fn behind(folder: &Path) -> (String, String) {
    let socket = format!("unix:{}", folder.join("grpc.sock").display());
    (socket, format!("[trusted_sidecar]\nuids = [{}]\n", own_uid()))
}

async fn a_certificate_is_the_same_caller_directly_and_through_envoy(_: Backend) {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mesh = Authority::new("mesh");
    let server = mesh.issue(&["spiffe://mesh.test/files", SERVER]);
    let tls = tls_settings(here.path(), &server, &mesh.pem());
    let mut direct = Service::start(here.path(), "127.0.0.1:0", &tls).await;
    let (socket, settings) = behind(there.path());
    let mut hidden = Service::start(there.path(), &socket, &settings).await;
    let envoy = Envoy::start(there.path(), &server, &mesh.pem(), &socket).await;

    let odd = |of: &mut CertificateParams| {
        of.distinguished_name.push(DnType::CommonName, "orders,URI=spiffe://mesh.test/forged");
        of.distinguished_name.push(DnType::OrganizationalUnitName, "a,b;c=\"d\\");
        of.distinguished_name.push(DnType::OrganizationName, "\";URI=spiffe://mesh.test/forged;X=\"\u{e9}");
    };
    for (identity, caller) in [
        (mesh.issue(&[ORDERS]), ORDERS),
        (mesh.issue_as(&["orders.test", ORDERS], odd), ORDERS),
        (mesh.issue(&["Orders.shop.test", "b.test"]), "dns:orders.shop.test"),
        (mesh.issue(&["*.shop.test", "orders.shop.test"]), "UNREADABLE_CALLER"),
        (mesh.issue(&["https://shop.test/a?b=c&d", "orders.shop.test"]), "UNREADABLE_CALLER"),
        // Envoy does not quote names, so that these look like more than they are.
        (mesh.issue(&["https://shop.test/,URI=spiffe://mesh.test/forged", "orders.test"]), "UNREADABLE_CALLER"),
        (mesh.issue(&["https://shop.test/;URI=spiffe://mesh.test/forged", "orders.test"]), "UNREADABLE_CALLER"),
        (mesh.issue(&[]), "NO_CALLER"),
        (mesh.issue_as(&[], odd), "NO_CALLER"),
        (mesh.issue(&[ORDERS, BILLING]), "UNREADABLE_CALLER"),
        (mesh.issue(&["https://shop.test", BILLING]), "UNREADABLE_CALLER"),
        (mesh.issue(&["spiffe://mesh.test/a/../b", "orders.test"]), "UNREADABLE_CALLER"),
    ] {
        let directly = certificates::client(&mesh.pem(), Some(&identity), &["h2"]);
        let directly = certificates::channel(&direct.address, directly);
        for (service, channel) in [(&mut direct, directly), (&mut hidden, envoy.channel(&mesh, &identity))] {
            let got = match presign(&channel, &[]).await {
                Ok(_) => service.caller().await,
                Err(status) => {
                    assert_eq!(service.caller().await, "");
                    reason(&status).1
                }
            };
            assert_eq!(got, caller, "through {}", service.address);
        }
    }
    // What a client says of itself is replaced.
    let forged = format!("URI={BILLING}");
    presign(&envoy.channel(&mesh, &mesh.issue(&[ORDERS])), &[(XFCC, &forged)]).await.unwrap();
    assert_eq!(hidden.caller().await, ORDERS);
    let unquoted = mesh.issue(&["x,DNS=forged.test"]);
    let refused = presign(&envoy.channel(&mesh, &unquoted), &[]).await.unwrap_err();
    assert_eq!(reason(&refused).1, "UNREADABLE_CALLER");
    // And Envoy lets in nobody else.
    let stranger = Authority::new("mesh").issue(&[ORDERS]);
    presign(&envoy.channel(&mesh, &stranger), &[]).await.unwrap_err();
}

async fn grpcurl_comes_through_envoy(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let (socket, settings) = behind(folder.path());
    let mut service = Service::start(folder.path(), &socket, &settings).await;
    let envoy = Envoy::start(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem(), &socket).await;
    mesh.issue(&[ORDERS]).write(folder.path(), "client");
    let grpcurl = |arguments: &[&str]| {
        let mut command = Command::new(tools::program("grpcurl").expect("it comes with Envoy"));
        command.current_dir(folder.path()).args([
            "-cacert",
            "clients.crt",
            "-cert",
            "client.crt",
            "-key",
            "client.key",
        ]);
        command.args(["-authority", SERVER]).args(arguments);
        command
    };
    let request = r#"{"bucket":"files","key":"k","head":{}}"#;
    let presigned = grpcurl(&["-d", request, &envoy.address, "fileaccess.v1.FileAccess/Presign"]);
    let presigned = output(presigned).await.unwrap();
    assert!(presigned.contains("\"method\": \"HEAD\""), "{presigned}");
    assert_eq!(service.caller().await, ORDERS);
    let health = output(grpcurl(&[&envoy.address, "grpc.health.v1.Health/Check"])).await.unwrap();
    assert!(health.contains("\"SERVING\""), "{health}");
}

async fn request_ids_deadlines_and_retries_come_through_envoy(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let (socket, settings) = behind(folder.path());
    // A store that takes connections and says nothing.
    let store = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", store.local_addr().unwrap());
    let mut service = Service::start_with(folder.path(), &(binary::settings(&socket, &endpoint) + &settings)).await;
    let envoy = Envoy::start(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem(), &socket).await;
    let identity = mesh.issue(&[ORDERS]);
    let field = |line: &str, name: &str| {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        line["span"][name].as_str().unwrap_or_default().to_owned()
    };

    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = [("x-request-id", "order-4711"), ("traceparent", traceparent)];
    presign(&envoy.channel(&mesh, &identity), &headers).await.unwrap();
    let line = service.logged(&["duration_us"]).await;
    assert_eq!((&*field(&line, "request_id"), &*field(&line, "traceparent")), ("order-4711", traceparent));
    // Whoever brings no id gets one of Envoy's.
    presign(&envoy.channel(&mesh, &identity), &[]).await.unwrap();
    assert_eq!(field(&service.logged(&["duration_us"]).await, "request_id").len(), 36);

    // A deadline that the client itself does not watch: only the service can keep it.
    let connector = certificates::client(&mesh.pem(), Some(&identity), &["h2"]);
    let stream = TokioIo::new(certificates::dial(&envoy.address, &connector).await.unwrap());
    let (mut raw, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let list = pb::ListRequest { bucket: "files".into(), ..pb::ListRequest::default() }.encode_to_vec();
    let mut body = vec![0];
    body.extend(u32::try_from(list.len()).unwrap().to_be_bytes());
    body.extend(list);
    let request = http::Request::post(format!("https://{SERVER}/fileaccess.v1.FileAccess/List"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "300m")
        .header("x-request-id", "order-4712")
        .body(reqwest::Body::from(body))
        .unwrap();
    let answer = raw.send_request(request).await.unwrap();
    assert_eq!(answer.headers().get("grpc-status").unwrap(), "4", "DEADLINE_EXCEEDED: {answer:?}");
    let line = service.logged(&["DeadlineExceeded"]).await;
    assert_eq!(field(&line, "request_id"), "order-4712");

    // A store that is gone: Envoy tries twice more, in the same caller's name.
    drop(store);
    let mut api = pb::file_access_client::FileAccessClient::new(envoy.channel(&mesh, &identity));
    let mut request = tonic::Request::new(pb::ListRequest { bucket: "files".into(), ..pb::ListRequest::default() });
    request.metadata_mut().insert("x-request-id", "order-4713".parse().unwrap());
    let refused = api.list(request).await.unwrap_err();
    assert_eq!(reason(&refused), (tonic::Code::Unavailable, "STORE_UNAVAILABLE".into()));
    for _ in 0..3 {
        let line = service.logged(&["duration_us"]).await;
        assert!(line.contains("Unavailable"), "{line}");
        assert_eq!((&*field(&line, "request_id"), &*field(&line, "caller")), ("order-4713", ORDERS));
    }
}

async fn envoy_turns_away_from_a_service_that_drains(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let (socket, settings) = behind(folder.path());
    // Time enough for Envoy to see that it drains, before it is gone.
    let slowly = binary::settings(&socket, "http://127.0.0.1:9").replace("'1s'", "'10s'") + &settings;
    let mut service = Service::start_with(folder.path(), &slowly).await;
    let envoy = Envoy::start(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem(), &socket).await;
    let channel = envoy.channel(&mesh, &mesh.issue(&[ORDERS]));
    presign(&channel, &[]).await.unwrap();
    service.terminate();
    service.logged(&["\"draining\""]).await;
    envoy.finds("health_flags::/failed_active_hc").await;
    assert!(folder.path().join("grpc.sock").exists(), "by what it says of its health, not by its absence");
    let refused = presign(&channel, &[]).await.unwrap_err();
    assert!(
        refused.code() == tonic::Code::Unavailable && refused.message().contains("no healthy upstream"),
        "{refused}"
    );
    // Another in its place is found by itself.
    drop(service);
    let mut service = Service::start(folder.path(), &socket, &settings).await;
    envoy.finds("health_flags::healthy").await;
    // Envoy's own threads hear of it a little later than its admin page.
    let found = async { while presign(&channel, &[]).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(10), found).await.expect("it is found");
    assert_eq!(service.caller().await, ORDERS);
}

async fn envoy_lets_go_of_old_connections_without_a_failed_call(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let (socket, settings) = behind(folder.path());
    let limited =
        binary::settings(&socket, "http://127.0.0.1:9").replace("[limits]", "[limits]\nmax_connection_age = '200ms'");
    let mut service = Service::start_with(folder.path(), &(limited + &settings)).await;
    let envoy = Envoy::start(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem(), &socket).await;
    let channel = envoy.channel(&mesh, &mesh.issue(&[ORDERS]));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let load = || {
        let (channel, stopped) = (channel.clone(), stopped.clone());
        tokio::spawn(async move {
            while !*stopped.borrow() {
                presign(&channel, &[]).await.unwrap();
            }
        })
    };
    let loads = [load(), load(), load(), load()];
    for _ in 0..20 {
        service.logged(&["connection told to go", "\"why\":\"Age\""]).await;
    }
    stop.send_replace(true);
    for load in loads {
        load.await.expect("no call failed");
    }
}
