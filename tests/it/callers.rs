//! Who calls: by the connection, by a sidecar's header, by certificate.

use std::path::Path;
use std::time::{Duration, SystemTime};

use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::certificates::{self, Authority, Identity, SERVER};
use crate::outside::Service;
use crate::service::reason;
use crate::stage::{Backend, ask, download};
use crate::{Case, binary, cases};

pub fn cases() -> Vec<Case> {
    cases![
        the_header_is_refused_where_nobody_vouches_for_it,
        a_sidecar_on_loopback_names_the_caller,
        a_sidecar_behind_a_unix_socket_is_known_by_its_user,
        what_came_along_is_logged_within_bounds,
        certificates_name_the_caller,
        the_command_line_shows_a_certificate_or_uses_a_socket,
        who_has_no_good_certificate_gets_no_connection,
        silent_peers_hold_up_nobody,
        a_connection_ends_with_its_certificate,
        tls_files_are_taken_up_under_load_without_a_failed_call,
        serve_refuses_tls_files_that_it_cannot_use,
    ]
}

pub const XFCC: &str = "x-forwarded-client-cert";
pub const ORDERS: &str = "spiffe://mesh.test/ns/shop/sa/orders";
pub const BILLING: &str = "spiffe://mesh.test/ns/shop/sa/billing";

/// A channel to where `address` says, without TLS.
pub async fn plain(address: &str) -> Channel {
    match address.strip_prefix("unix:") {
        None => Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap(),
        Some(path) => {
            let path = path.to_owned();
            let dial = move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            };
            let endpoint = Endpoint::from_static("http://localhost");
            endpoint.connect_with_connector(tower::service_fn(dial)).await.unwrap()
        }
    }
}

/// Presigns a download, with these headers.
pub async fn presign(
    channel: &Channel,
    headers: &[(&'static str, &str)],
) -> Result<Response<pb::PresignResponse>, Status> {
    let mut request = Request::new(ask("k", download()));
    for (name, value) in headers {
        let value = MetadataValue::try_from(value.as_bytes()).expect("a header's value");
        request.metadata_mut().append(*name, value);
    }
    FileAccessClient::new(channel.clone()).presign(request).await
}

async fn refusal(channel: &Channel, headers: &[(&'static str, &str)]) -> (Code, String) {
    reason(&presign(channel, headers).await.unwrap_err())
}

fn unauthenticated(reason: &str) -> (Code, String) {
    (Code::Unauthenticated, reason.to_owned())
}

pub async fn is_healthy(channel: &Channel) -> bool {
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.is_ok()
}

pub fn own_uid() -> u32 {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap())
}

async fn the_header_is_refused_where_nobody_vouches_for_it(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", folder.path().join("fa.sock").display());
    let by_uid = format!("uid:{}", own_uid());
    for (listen, caller) in [("127.0.0.1:0", "loopback"), (&*socket, &*by_uid)] {
        let mut service = Service::start(folder.path(), listen, "").await;
        let channel = plain(&service.address).await;
        let forged = format!("URI={ORDERS}");
        assert_eq!(refusal(&channel, &[(XFCC, &forged)]).await, unauthenticated("UNREADABLE_CALLER"));
        assert_eq!(service.caller().await, "", "{listen}");
        assert_eq!(refusal(&channel, &[(XFCC, "")]).await, unauthenticated("UNREADABLE_CALLER"));
        assert_eq!(service.caller().await, "", "{listen}");
        presign(&channel, &[]).await.unwrap();
        assert_eq!(service.caller().await, caller);
    }
}

async fn a_sidecar_on_loopback_names_the_caller(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mut service = Service::start(folder.path(), "127.0.0.1:0", "[trusted_sidecar]\nloopback = true\n").await;
    let channel = plain(&service.address).await;
    for (header, caller) in [
        (format!("By=spiffe://mesh.test/own;Hash=00;Subject=\"CN=a\\,b\\\";URI=x\";URI={ORDERS}"), ORDERS),
        ("URI=;DNS=orders.shop.test".to_owned(), "dns:orders.shop.test"),
    ] {
        presign(&channel, &[(XFCC, &header)]).await.unwrap();
        assert_eq!(service.caller().await, caller, "{header}");
    }
    let own = "By=spiffe://mesh.test/own;Hash=00".to_owned();
    let two_elements = format!("By=spiffe://mesh.test/own;URI={BILLING},By=spiffe://mesh.test/own;URI={ORDERS}");
    let over_long = format!("Subject=\"{}\";URI={ORDERS}", "x".repeat(9 << 10));
    for (header, why) in [
        (own, "NO_CALLER"),
        (format!("Subject=\"URI={ORDERS}\""), "NO_CALLER"),
        (format!("URI={ORDERS};URI={BILLING}"), "UNREADABLE_CALLER"),
        (two_elements.clone(), "UNREADABLE_CALLER"),
        (format!("URI={ORDERS}/../billing"), "UNREADABLE_CALLER"),
        (format!("Subject=\"CN=x;URI={ORDERS}"), "UNREADABLE_CALLER"),
        (over_long, "UNREADABLE_CALLER"),
    ] {
        assert_eq!(refusal(&channel, &[(XFCC, &header)]).await, unauthenticated(why), "{header}");
        assert_eq!(service.caller().await, "", "{header}");
    }
    let (one, other) = (format!("URI={ORDERS}"), format!("URI={BILLING}"));
    assert_eq!(refusal(&channel, &[(XFCC, &one), (XFCC, &other)]).await, unauthenticated("UNREADABLE_CALLER"));
    // Nobody is not whoever shares the loopback.
    assert_eq!(refusal(&channel, &[]).await, unauthenticated("NO_CALLER"));
    // Beyond HTTP's own limit no call comes about.
    let beyond = format!("Subject=\"{}\";URI={ORDERS}", "x".repeat(20 << 10));
    assert!(presign(&channel, &[(XFCC, &beyond)]).await.is_err());
    assert!(is_healthy(&channel).await, "health asks nobody who they are");

    let mut service =
        Service::start(folder.path(), "127.0.0.1:0", "[trusted_sidecar]\nloopback = true\nappends = true\n").await;
    presign(&plain(&service.address).await, &[(XFCC, &two_elements)]).await.unwrap();
    assert_eq!(service.caller().await, ORDERS, "the last counts");
}

async fn a_sidecar_behind_a_unix_socket_is_known_by_its_user(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", folder.path().join("fa.sock").display());
    let header = format!("URI={ORDERS}");
    let believed = format!("[trusted_sidecar]\nuids = [4242, {}]\n", own_uid());
    let mut service = Service::start(folder.path(), &socket, &believed).await;
    let channel = plain(&socket).await;
    presign(&channel, &[(XFCC, &header)]).await.unwrap();
    assert_eq!(service.caller().await, ORDERS);
    assert_eq!(refusal(&channel, &[]).await, unauthenticated("NO_CALLER"));
    drop(service);

    let other = format!("[trusted_sidecar]\nuids = [{}]\n", own_uid() + 1);
    let mut service = Service::start(folder.path(), &socket, &other).await;
    let channel = plain(&socket).await;
    assert_eq!(refusal(&channel, &[(XFCC, &header)]).await, unauthenticated("UNREADABLE_CALLER"));
    assert_eq!(refusal(&channel, &[]).await, unauthenticated("NO_CALLER"));
    assert_eq!(service.caller().await, "");
    assert!(is_healthy(&channel).await);
}

async fn what_came_along_is_logged_within_bounds(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mut service = Service::start(folder.path(), "127.0.0.1:0", "").await;
    let channel = plain(&service.address).await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let long = format!("\u{fc}\t{}", "r".repeat(1000));
    let answer = presign(&channel, &[("x-request-id", &long), ("traceparent", traceparent)]).await.unwrap();
    assert!(answer.metadata().get("x-request-id").is_none() && answer.metadata().get("traceparent").is_none());
    let line: serde_json::Value = serde_json::from_str(&service.logged(&["duration_us"]).await).unwrap();
    assert_eq!(line["span"]["traceparent"], traceparent);
    // Of the first 128 bytes, three are not printable.
    assert_eq!(line["span"]["request_id"], "r".repeat(125));
}

/// Writes the service's files, and gives the settings that name them.
pub fn tls_settings(folder: &Path, server: &Identity, client_ca: &str) -> String {
    server.write(folder, "tls");
    certificates::replace(&folder.join("clients.crt"), client_ca);
    let folder = folder.display();
    format!("[tls]\ncertificate = '{folder}/tls.crt'\nkey = '{folder}/tls.key'\nclient_ca = '{folder}/clients.crt'\n")
}

async fn certificates_name_the_caller(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let settings = tls_settings(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem());
    let mut service = Service::start(folder.path(), "127.0.0.1:0", &settings).await;
    let show = |identity: &Identity| {
        certificates::channel(&service.address, certificates::client(&mesh.pem(), Some(identity), &["h2"]))
    };
    let (orders, named) = (show(&mesh.issue(&[ORDERS, "orders.test"])), show(&mesh.issue(&["orders.test", "b.test"])));
    let nobody = [(show(&mesh.issue(&[])), "NO_CALLER"), (show(&mesh.issue(&[ORDERS, BILLING])), "UNREADABLE_CALLER")];
    for (channel, caller) in [(&orders, ORDERS), (&named, "dns:orders.test")] {
        presign(channel, &[]).await.unwrap();
        assert_eq!(service.caller().await, caller);
    }
    for (channel, why) in nobody {
        assert_eq!(refusal(&channel, &[]).await, unauthenticated(why));
        assert_eq!(service.caller().await, "");
    }
    let forged = format!("URI={BILLING}");
    assert_eq!(refusal(&orders, &[(XFCC, &forged)]).await, unauthenticated("UNREADABLE_CALLER"));
}

async fn the_command_line_shows_a_certificate_or_uses_a_socket(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let settings = tls_settings(folder.path(), &mesh.issue(&[SERVER, "localhost"]), &mesh.pem());
    let service = Service::start(folder.path(), "127.0.0.1:0", &settings).await;
    mesh.issue(&[ORDERS]).write(folder.path(), "orders");
    let file = |name: &str| folder.path().join(name).display().to_string();
    let server = format!("https://localhost:{}", service.address.rsplit(':').next().unwrap());
    let (ca, certificate, key) = (file("clients.crt"), file("orders.crt"), file("orders.key"));
    let signers = |more: &[&str]| {
        let output = binary::fileaccess(&[&["signers", "--server"], more].concat()).output().unwrap();
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (code, said) = signers(&[&server, "--ca", &ca, "--certificate", &certificate, "--key", &key]);
    assert!(code == Some(0) && said.contains("signer          main"), "{said}");
    let (code, said) = signers(&[&server, "--ca", &ca]);
    assert!(code == Some(1) && said.contains("can't be reached"), "{said}");
    assert_eq!(signers(&[&server]).0, Some(64), "nobody to trust");

    let there = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}/fa.sock", there.path().display());
    let _service = Service::start(there.path(), &socket, "").await;
    let (code, said) = signers(&[&socket]);
    assert!(code == Some(0) && said.contains("signer          main"), "{said}");
}

async fn who_has_no_good_certificate_gets_no_connection(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let (mesh, stranger) = (Authority::new("mesh"), Authority::new("mesh"));
    let settings = tls_settings(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem());
    let mut service = Service::start(folder.path(), "127.0.0.1:0", &settings).await;
    let address = service.address.clone();
    let orders = mesh.issue(&[ORDERS]);
    for (identity, alpn, logged) in [
        (None, "h2", "peer sent no certificates"),
        (Some(stranger.issue(&[ORDERS])), "h2", "invalid peer certificate: BadSignature"),
        (Some(mesh.expired(&[ORDERS])), "h2", "invalid peer certificate: certificate expired"),
        (Some(orders.clone()), "http/1.1", "peer doesn't support any known protocol"),
        (Some(orders.clone()), "", "does not offer HTTP/2"),
    ] {
        let alpn: &[&str] = if alpn.is_empty() { &[] } else { &[alpn] };
        let channel = certificates::channel(&address, certificates::client(&mesh.pem(), identity.as_ref(), alpn));
        presign(&channel, &[]).await.unwrap_err();
        service.logged(&["tls handshake failed", logged]).await;
    }
    assert!(!is_healthy(&Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy()).await);
    service.logged(&["tls handshake failed", "corrupt message"]).await;
    let channel = certificates::channel(&address, certificates::client(&mesh.pem(), Some(&orders), &["h2"]));
    presign(&channel, &[]).await.unwrap();
    assert_eq!(service.caller().await, ORDERS);
}

async fn silent_peers_hold_up_nobody(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let settings = tls_settings(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem());
    let mut service = Service::start_limited(folder.path(), "handshake_timeout = '3s'", &settings).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(&service.address).await.unwrap());
    }
    let identity = mesh.issue(&[ORDERS]);
    let connector = certificates::client(&mesh.pem(), Some(&identity), &["h2"]);
    presign(&certificates::channel(&service.address, connector), &[]).await.unwrap();
    assert_eq!(service.caller().await, ORDERS, "served while a hundred others say nothing");
    // They are hung up on in the end,
    for _ in 0..100 {
        service.logged(&["tls handshake failed", "not done within 3s"]).await;
    }
    // and so is who has shaken hands and says nothing then.
    let connector = certificates::client(&mesh.pem(), Some(&identity), &["h2"]);
    let mut silent = certificates::dial(&service.address, &connector).await.unwrap();
    service.logged(&["connection without http/2", "not done within 3s"]).await;
    assert_eq!(silent.read(&mut [0]).await.unwrap_or_default(), 0);
}

async fn a_connection_ends_with_its_certificate(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let settings = tls_settings(folder.path(), &mesh.issue(&[SERVER]), &mesh.pem());
    let mut service = Service::start(folder.path(), "127.0.0.1:0", &settings).await;
    let end = SystemTime::now() + Duration::from_secs(5);
    let brief = mesh.issue_as(&[ORDERS], |of| of.not_after = end.into());
    let channel =
        |identity| certificates::channel(&service.address, certificates::client(&mesh.pem(), Some(identity), &["h2"]));
    let (brief, lasting) = (channel(&brief), channel(&mesh.issue(&[ORDERS])));
    let (mut ends, mut lasts) = (HealthClient::new(brief.clone()), HealthClient::new(lasting.clone()));
    // Streams, which a connection that was only told to go would wait for.
    let mut ends = ends.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let mut lasts = lasts.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    ends.message().await.unwrap().expect("its health");
    lasts.message().await.unwrap().expect("its health");
    presign(&brief, &[]).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), ends.message()).await.expect("cut");
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
    // Certificates count whole seconds.
    let at = SystemTime::now();
    assert!(at + Duration::from_secs(1) > end && at < end + Duration::from_secs(3), "{at:?} is not {end:?}");
    service.logged(&["connection told to go", "\"why\":\"Age\""]).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    presign(&brief, &[]).await.unwrap_err();
    service.logged(&["tls handshake failed", "certificate expired"]).await;
    presign(&lasting, &[]).await.unwrap();
    assert!(futures_util::FutureExt::now_or_never(lasts.message()).is_none(), "the other one goes on");
}

/// The certificate that the service shows.
async fn shown(address: &str, connector: &tokio_rustls::TlsConnector) -> Option<Vec<u8>> {
    let stream = certificates::dial(address, connector).await.ok()?;
    Some(stream.get_ref().1.peer_certificates()?.first()?.to_vec())
}

async fn tls_files_are_taken_up_under_load_without_a_failed_call(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let both = old.pem() + &new.pem();
    let settings = tls_settings(folder.path(), &old.issue(&[SERVER]), &old.pem());
    let mut service = Service::start(folder.path(), "127.0.0.1:0", &settings).await;
    let address = service.address.clone();

    // Each call on a connection of its own, and many on one that stays.
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let connector = certificates::client(&both, Some(&old.issue(&[ORDERS])), &["h2"]);
    let load = |stays: bool| {
        let (address, connector, stopped) = (address.clone(), connector.clone(), stopped.clone());
        tokio::spawn(async move {
            let mut channel = certificates::channel(&address, connector.clone());
            let mut calls = 0;
            while !*stopped.borrow() {
                if !stays {
                    channel = certificates::channel(&address, connector.clone());
                }
                presign(&channel, &[]).await.unwrap();
                calls += 1;
            }
            calls
        })
    };
    let loads = [load(false), load(false), load(true)];
    let before = shown(&address, &connector).await.unwrap();
    // A new certificate of the new authority, and clients of both.
    tls_settings(folder.path(), &new.issue(&[SERVER]), &both);
    service.logged(&["changed tls files taken up"]).await;
    let after = shown(&address, &connector).await.unwrap();
    assert_ne!(before, after);
    let of_new = certificates::client(&both, Some(&new.issue(&[BILLING])), &["h2"]);
    presign(&certificates::channel(&address, of_new.clone()), &[]).await.unwrap();

    // Wrong ones: cut off, of another key, gone. What was there goes on.
    let good = std::fs::read_to_string(folder.path().join("tls.crt")).unwrap();
    let half = good.get(..good.len() / 2).unwrap();
    certificates::replace(&folder.path().join("tls.crt"), half);
    service.logged(&["\"ERROR\"", "changed tls files are wrong", "tls.certificate: "]).await;
    certificates::replace(&folder.path().join("tls.crt"), &new.issue(&[SERVER]).certificate);
    service.logged(&["\"ERROR\"", "tls.key: ", "does not fit `tls.certificate`"]).await;
    std::fs::remove_file(folder.path().join("tls.crt")).unwrap();
    service.logged(&["\"ERROR\"", "tls.certificate: ", "No such file"]).await;
    assert_eq!(shown(&address, &connector).await.unwrap(), after);
    presign(&certificates::channel(&address, of_new.clone()), &[]).await.unwrap();
    assert!(!*stopped.borrow());

    stop.send_replace(true);
    for load in loads {
        let calls = load.await.expect("no call failed");
        assert!(calls > 10, "{calls} calls are no load");
    }

    // And clients of an authority that is gone are refused from then on.
    tls_settings(folder.path(), &new.issue(&[SERVER]), &new.pem());
    service.logged(&["changed tls files taken up"]).await;
    presign(&certificates::channel(&address, connector), &[]).await.unwrap_err();
    presign(&certificates::channel(&address, of_new), &[]).await.unwrap();
}

async fn serve_refuses_tls_files_that_it_cannot_use(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let mesh = Authority::new("mesh");
    let server = mesh.issue(&[SERVER]);
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let tls = tls_settings(folder.path(), &server, &mesh.pem());
    let text = binary::settings(&taken.to_string(), "http://127.0.0.1:9") + &tls;
    // Opens nothing, so that it may be done elsewhere.
    std::fs::remove_file(folder.path().join("tls.key")).unwrap();
    let remote = text.replace(&taken.to_string(), "0.0.0.0:50051");
    assert_eq!(binary::serve(folder.path(), &remote, &["--check"]).output().unwrap().status.code(), Some(0));

    let wrong = [
        ("tls.key", None, "tls.key: ", "No such file"),
        ("tls.key", Some(server.certificate.clone()), "tls.key: ", "holds no private key as PEM"),
        ("tls.key", Some(mesh.issue(&[]).key), "tls.key: ", "does not fit `tls.certificate`"),
        ("tls.crt", Some(server.key.clone()), "tls.certificate: ", "holds no certificate as PEM"),
        ("clients.crt", Some(String::new()), "tls.client_ca: ", "holds no certificate as PEM"),
    ];
    for (file, contents, path, problem) in wrong {
        tls_settings(folder.path(), &server, &mesh.pem());
        let file = folder.path().join(file);
        match contents {
            None => std::fs::remove_file(&file).unwrap(),
            Some(contents) => std::fs::write(&file, contents).unwrap(),
        }
        let output = binary::serve(folder.path(), &text, &[]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{said}");
        assert!(said.contains(path) && said.contains(problem) && said.contains(&*file.to_string_lossy()), "{said}");
        assert!(!said.contains("PRIVATE KEY") && !said.contains("MIG"), "{said}");
    }
}
