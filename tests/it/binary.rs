//! The binary, as a user runs it.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use fileaccess::pb;
use fileaccess::pb::file_access_client::FileAccessClient;
use futures_util::StreamExt as _;
use tokio::net::TcpListener;
use tonic::transport::Endpoint;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::service::{grpcurl, output};
use crate::stage::{Backend, ask, download};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        the_demo_goes_as_told,
        what_dev_prints_can_be_pasted,
        serve_refuses_what_is_wrong_by_its_path,
        serve_drains_on_sigterm_and_keeps_secrets_out_of_its_log,
        serve_sheds_what_is_too_much_and_stays_healthy,
        serve_listens_on_a_unix_socket,
        serve_takes_keys_from_the_chain_and_from_a_profile,
        serve_takes_up_new_grants_and_keeps_the_old_if_they_are_wrong,
    ]
}

pub fn fileaccess(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fileaccess"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// A running binary, ended with the test.
pub struct Running(Child);

impl Running {
    pub fn start(mut command: Command) -> Self {
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary"))
    }

    /// Reads standard error until a line has `text`, and gives that line.
    pub fn logged(&mut self, text: &str) -> String {
        let mut log = BufReader::new(self.0.stderr.as_mut().expect("a pipe"));
        let mut line = String::new();
        // Byte by byte would be slow, and what is buffered past the line is lost: fine here.
        while log.read_line(&mut line).expect("a line") > 0 {
            if line.contains(text) {
                return line;
            }
            line.clear();
        }
        panic!("the log ended without `{text}`");
    }

    /// Reads standard output until a line begins with `text`, and gives that line.
    pub fn printed(&mut self, text: &str) -> String {
        let out = BufReader::new(self.0.stdout.as_mut().expect("a pipe"));
        let line = out.lines().map_while(Result::ok).find(|line| line.starts_with(text));
        line.unwrap_or_else(|| panic!("nothing printed begins with `{text}`"))
    }

    fn terminate(&self) {
        let killed = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().expect("kill");
        assert!(killed.success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn the_demo_goes_as_told(_: Backend) {
    let told = output(fileaccess(&["demo"])).await.unwrap();
    assert!(told.ends_with("All of it went as told.\n"), "{told}");
    for status in
        ["200 OK", "412 Precondition Failed", "403 Forbidden SignatureDoesNotMatch", "403 Forbidden AccessDenied"]
    {
        assert!(told.contains(status), "{told}");
    }
}

async fn what_dev_prints_can_be_pasted(_: Backend) {
    let data = tempfile::tempdir().unwrap();
    let port = free_port().await;
    let arguments = ["dev", "--listen", &port, "--data", data.path().to_str().unwrap()];
    let mut dev = Running::start(fileaccess(&arguments));
    dev.logged("listening");
    let mut said = String::new();
    let mut out = BufReader::new(dev.0.stdout.as_mut().unwrap());
    while !said.contains("/List") {
        assert!(out.read_line(&mut said).unwrap() > 0, "{said}");
    }
    let lines: Vec<_> = said.lines().filter(|line| line.trim_start().starts_with("grpcurl ")).collect();
    assert_eq!(lines.len(), 3);
    let bin = grpcurl(&[]).get_program().to_owned();
    let bin = Path::new(&bin).parent().unwrap().to_owned();
    let mut answers = Vec::new();
    for line in lines {
        let mut shell = Command::new("sh");
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        shell.args(["-c", line]).env("PATH", path);
        answers.push(output(shell).await.unwrap());
        if answers.len() == 1 {
            let url =
                answers[0].split("\"url\": \"").nth(1).unwrap().split('"').next().unwrap().replace("\\u0026", "&");
            let put = fileaccess::rotation::probe::Probe::http_client()
                .put(url)
                .header("content-type", "text/plain")
                .body("paprika");
            assert_eq!(put.send().await.unwrap().status(), 200);
        }
    }
    assert!(answers[2].contains("\"key\": \"secret-recipe.txt\""), "{}", answers[2]);
    assert_eq!(std::fs::read_to_string(data.path().join("demo/secret-recipe.txt")).unwrap(), "paprika");
    dev.terminate();
    assert!(dev.0.wait().unwrap().success());
}

pub async fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
}

pub fn settings(listen: &str, endpoint: &str) -> String {
    format!(
        "listen = '{listen}'\nidentity = {{ environment = {{ access_key_id = 'IT_ID', secret_access_key = 'IT_SECRET' }} }}\n\
         [buckets.files]\nbucket = 'files'\nregion = 'us-east-1'\nendpoint = '{endpoint}'\npath_style = true\n\
         [signers.main]\nkind = 'ambient'\n\
         source = {{ environment = {{ access_key_id = 'IT_ID', secret_access_key = 'IT_SECRET' }} }}\n\
         [[routes]]\nbucket = 'files'\nsigner = 'main'\n[limits]\ndrain = '1s'\n{}",
        [
            "loopback",
            &format!("uid:{}", rustix::process::getuid().as_raw()),
            "spiffe://mesh.test/*",
            "spiffe://mesh.test/ns/shop/sa/*",
            "dns:orders.shop.test",
            "dns:orders.test",
        ]
        .map(|caller| grant(caller, ""))
        .concat(),
    )
}

fn grant(caller: &str, prefix: &str) -> String {
    format!(
        "[[grants]]\ncaller = '{caller}'\nbucket = 'files'\nprefix = '{prefix}'\n\
         actions = ['download', 'head', 'list', 'signers']\n"
    )
}

pub fn serve(folder: &Path, settings: &str, more: &[&str]) -> Command {
    let file = folder.join("settings.toml");
    std::fs::write(&file, settings).unwrap();
    let mut command = fileaccess(&["serve", "--config", file.to_str().unwrap()]);
    command.args(more).env("IT_ID", "AKIAITSKEY").env("IT_SECRET", "hush-hush-secret");
    command
}

async fn serve_refuses_what_is_wrong_by_its_path(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let code = |mut command: Command| {
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let good = settings("127.0.0.1:0", "http://127.0.0.1:9");
    assert_eq!(code(serve(folder.path(), &good, &["--check"])).0, Some(0));
    let (status, said) = code(serve(folder.path(), &good.replace("'1s'", "'soon'"), &["--check"]));
    assert_eq!(status, Some(64));
    assert!(said.contains("limits.drain: `soon` is no duration; write it like \"15m\""), "{said}");
    let (status, said) = code(serve(folder.path(), &good.replace("127.0.0.1:0", "0.0.0.0:1"), &[]));
    assert!(status == Some(64) && said.contains("listen: `0.0.0.0:1` is not loopback"), "{said}");
    let (status, said) = code(fileaccess(&["dev", "--listen", "0.0.0.0:1"]));
    assert!(status == Some(64) && said.contains("--listen: `0.0.0.0:1` is not loopback"), "{said}");
    assert_eq!(code(fileaccess(&["serve", "--config", "/nowhere.toml"])).0, Some(64));
    assert_eq!(code(fileaccess(&["serve"])).0, Some(64));
    assert_eq!(code(fileaccess(&["--help"])).0, Some(0));

    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = settings(&taken.local_addr().unwrap().to_string(), "http://127.0.0.1:9");
    let (status, said) = code(serve(folder.path(), &taken, &[]));
    assert!(status == Some(1) && said.contains("can't listen on"), "{said}");
}

async fn serve_drains_on_sigterm_and_keeps_secrets_out_of_its_log(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let address = free_port().await;
    // A store that answers when we say so.
    let slow = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let text = settings(&address, &format!("http://{}", slow.local_addr().unwrap()));
    let mut command = serve(folder.path(), &text, &[]);
    command.env("FILEACCESS_LOG", "debug,hyper=info,h2=info");
    let mut service = Running::start(command);
    service.logged("listening");
    let mut stderr = service.0.stderr.take().unwrap();
    let log = std::thread::spawn(move || {
        let mut log = String::new();
        stderr.read_to_string(&mut log).map(|_| log)
    });

    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    let mut api = FileAccessClient::new(channel);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let presigned = api.presign(ask("k", download())).await.unwrap().into_inner();

    let mut lister = api.clone();
    let list = pb::ListRequest { bucket: "files".into(), ..pb::ListRequest::default() };
    let running = tokio::spawn(async move { lister.list(list).await });
    let (mut store, _) = slow.accept().await.unwrap();
    service.terminate();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    // Draining: whoever comes is still served.
    api.presign(ask("k", download())).await.unwrap();
    // After the drain the watch ends; only then does the store answer, and the call still ends well.
    assert!(watch.message().await.is_ok_and(|m| m.is_none()));
    let body = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    tokio::io::AsyncWriteExt::write_all(&mut store, answer.as_bytes()).await.unwrap();
    assert!(running.await.unwrap().is_ok());
    drop((api, health));
    let status = tokio::task::spawn_blocking(move || service.0.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status:?}");

    let log = log.join().unwrap().unwrap();
    let signature = presigned.url.split("X-Amz-Signature=").nth(1).unwrap();
    assert!(log.lines().any(|line| line.contains("\"method\":\"Presign\"")), "spans are logged: {log}");
    assert!(log.contains("\"code\":\"Ok\"") && log.contains("duration_us"), "{log}");
    for secret in [signature, "hush-hush-secret"] {
        assert!(!log.contains(secret), "a secret is in the log: {log}");
    }
}

async fn serve_sheds_what_is_too_much_and_stays_healthy(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let address = free_port().await;
    // A store that accepts, and does not answer.
    let slow = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let text = settings(&address, &format!("http://{}", slow.local_addr().unwrap()));
    let text = text.replace("drain = '1s'", "drain = '0s'\ngrace = '0s'\ncalls = 2\nstreams = 5000");
    let mut service = Running::start(serve(folder.path(), &text, &[]));
    service.logged("listening");
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let api = FileAccessClient::new(channel.clone());
    let list = || {
        let mut api = api.clone();
        let request = pb::ListRequest { bucket: "files".into(), ..pb::ListRequest::default() };
        tokio::spawn(async move { api.list(request).await })
    };
    let waiting = [list(), list()];
    // Each has come as far as the store.
    let _held = [slow.accept().await.unwrap(), slow.accept().await.unwrap()];
    let begun = std::time::Instant::now();
    let status = list().await.unwrap().unwrap_err();
    assert_eq!(crate::service::reason(&status), (tonic::Code::ResourceExhausted, "OVERLOADED".into()));
    assert!(tonic_types::StatusExt::get_error_details(&status).retry_info().is_some());
    assert!(begun.elapsed() < std::time::Duration::from_secs(1), "at once");
    // However many: each hears why, and the connection is kept.
    let refused = futures_util::stream::iter(0..20_000)
        .map(|_| {
            let mut api = api.clone();
            async move { api.presign(ask(&"k".repeat(1000), download())).await.unwrap_err().code() }
        })
        .buffer_unordered(2_000)
        .all(async |code| code == tonic::Code::ResourceExhausted);
    assert!(refused.await);
    let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);
    // Who gives up makes room.
    for call in waiting {
        call.abort();
        let _ = call.await;
    }
    let served = async { while api.clone().presign(ask("k", download())).await.is_err() {} };
    tokio::time::timeout(std::time::Duration::from_secs(5), served).await.expect("there is room again");
}

async fn serve_listens_on_a_unix_socket(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("fa.sock");
    // One that a dead process left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let address = format!("unix:{}", socket.display());
    let mut service = Running::start(serve(folder.path(), &settings(&address, "http://127.0.0.1:9"), &[]));
    service.logged("listening");
    let request = r#"{"bucket":"files","key":"k","head":{}}"#;
    let call = grpcurl(&[
        "-authority",
        "localhost",
        "-unix",
        "-d",
        request,
        socket.to_str().unwrap(),
        "fileaccess.v1.FileAccess/Presign",
    ]);
    let answer = output(call).await.unwrap();
    assert!(answer.contains("\"method\": \"HEAD\""), "{answer}");
    service.terminate();
    assert!(service.0.wait().unwrap().success());
    assert!(!socket.exists());
}

async fn serve_takes_keys_from_the_chain_and_from_a_profile(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let credentials = folder.path().join("credentials");
    std::fs::write(&credentials, "[prod]\naws_access_key_id = AKIAFROMPROFILE\naws_secret_access_key = s\n").unwrap();
    let socket = folder.path().join("fa.sock");
    let text = settings(&format!("unix:{}", socket.display()), "http://127.0.0.1:9");
    let fixed = "source = { environment = { access_key_id = 'IT_ID', secret_access_key = 'IT_SECRET' } }";
    for (source, expect) in [
        (fixed, "AKIAITSKEY"),
        ("source = 'chain'", "AKIAFROMCHAIN"),
        ("source = { profile = 'prod' }", "AKIAFROMPROFILE"),
    ] {
        let mut command = serve(folder.path(), &text.replace(fixed, source).replace("'1s'", "'0s'"), &[]);
        command.env("AWS_ACCESS_KEY_ID", "AKIAFROMCHAIN").env("AWS_SECRET_ACCESS_KEY", "s");
        command.env("AWS_SHARED_CREDENTIALS_FILE", &credentials).env("AWS_CONFIG_FILE", "/nowhere");
        let mut service = Running::start(command);
        service.logged("listening");
        let call = grpcurl(&[
            "-authority",
            "localhost",
            "-unix",
            socket.to_str().unwrap(),
            "fileaccess.v1.FileAccess/ListSigners",
        ]);
        let listed = output(call).await.unwrap();
        assert!(listed.contains(&format!("\"accessKeyId\": \"{expect}\"")), "{source}: {listed}");
        service.terminate();
        assert!(service.0.wait().unwrap().success());
    }
}

async fn serve_takes_up_new_grants_and_keeps_the_old_if_they_are_wrong(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    let address = free_port().await;
    let good = settings(&address, "http://127.0.0.1:9");
    let none = good.split("[[grants]]").next().unwrap();
    let mut service = Running::start(serve(folder.path(), none, &[]));
    let mut log = BufReader::new(service.0.stderr.take().unwrap()).lines();
    let mut logged = |text: &str| {
        let found = log.find_map(|line| line.ok().filter(|line| line.contains(text)));
        found.unwrap_or_else(|| panic!("the log ended without `{text}`"))
    };
    // Nothing is open by accident, and it is said.
    assert!(logged("there are no grants").contains("ERROR"));
    logged("listening");
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let api = FileAccessClient::new(channel);
    let may = |key: &str| {
        let (mut api, ask) = (api.clone(), ask(key, download()));
        async move { api.presign(ask).await.map_err(|status| crate::service::reason(&status).1) }
    };
    assert_eq!(may("a/x").await.unwrap_err(), "NOT_GRANTED");

    let replace = |text: &str| {
        let new = folder.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    let taken = "grants taken from the changed settings";
    let granted = format!("{none}{}", grant("loopback", "a/"));
    replace(&granted);
    assert!(logged(taken).contains("\"grants\":1"));
    may("a/x").await.unwrap();
    assert_eq!(may("b/x").await.unwrap_err(), "NOT_GRANTED");

    // Whatever is wrong with it, what was granted stays so, no more and no less.
    let kept = "the grants stay as they were";
    let truncated = &granted[..granted.rfind("'list'").unwrap()];
    for wrong in [truncated, "", &granted.replace("'a/'", "'{caller.sa}/'"), &granted.replace("'files'", "'none'")] {
        replace(wrong);
        let line = logged(kept);
        assert!(line.contains("ERROR") && line.contains("\"grants\":1"), "{line}");
        may("a/x").await.unwrap();
        assert_eq!(may("b/x").await.unwrap_err(), "NOT_GRANTED");
    }
    std::fs::remove_file(&file).unwrap();
    assert!(logged(kept).contains("No such file"));
    may("a/x").await.unwrap();

    // What was granted ends at once too. Other sections wait for a restart, and SIGHUP does not.
    replace(&format!("{none}{}[ttl]\ndefault = '1m'\n", grant("loopback", "b/")));
    let hangup = Command::new("kill").args(["-HUP", &service.0.id().to_string()]).status().unwrap();
    assert!(hangup.success());
    logged(taken);
    assert!(logged("they need a restart").contains("\"sections\":\"ttl\""));
    assert_eq!(may("a/x").await.unwrap_err(), "NOT_GRANTED");
    assert!(may("b/x").await.unwrap().into_inner().url.contains("X-Amz-Expires=900&"));
    drop(api);
    service.terminate();
    // The connection has to be closed meanwhile, by this thread.
    let status = tokio::task::spawn_blocking(move || service.0.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status:?}");
}
