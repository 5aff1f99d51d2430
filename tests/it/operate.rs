//! The operator's subcommands, as they are typed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fileaccess::pb::file_access_client::FileAccessClient;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Endpoint;

use crate::binary::{Running, fileaccess, free_port};
use crate::service::output;
use crate::stage::{Backend, ask, download};
use crate::{Case, cases, localstack};

pub fn cases() -> Vec<Case> {
    cases![
        a_leak_is_ended_from_the_command_line,
        what_goes_wrong_is_told_with_an_exit_code,
        what_is_done_counts_also_if_nobody_hears_of_it,
        a_connection_that_breaks_is_made_again_where_that_is_safe,
    ]
}

pub fn localstack_cases() -> Vec<Case> {
    cases![bootstrap_makes_all_that_a_signer_needs_and_again_does_no_harm, bootstrap_prints_policies_and_makes_nothing]
}

/// A running `dev`, and a download URL of it.
async fn dev() -> (Running, String, String) {
    let address = free_port().await;
    let mut dev = Running::start(fileaccess(&["dev", "--listen", &address]));
    dev.logged("listening");
    let server = format!("http://{address}");
    let channel = Endpoint::from_shared(server.clone()).unwrap().connect().await.unwrap();
    let mut api = FileAccessClient::new(channel);
    let mut request = ask("secret-recipe.txt", download());
    request.bucket = "demo".into();
    let url = api.presign(request).await.unwrap().into_inner().url;
    (dev, server, url)
}

async fn run(server: &str, arguments: &[&str]) -> String {
    output(operator(server, arguments)).await.unwrap()
}

fn operator(server: &str, arguments: &[&str]) -> Command {
    let mut command = fileaccess(arguments);
    command.env("FILEACCESS_SERVER", server);
    command
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

async fn a_leak_is_ended_from_the_command_line(_: Backend) {
    let (_dev, server, url) = dev().await;
    let told = run(&server, &["inspect", &url]).await;
    for part in ["state         LIVE", "key           secret-recipe.txt", "signer        main", "method        GET"] {
        assert!(told.contains(part), "{told}");
    }
    let signers = lines(&run(&server, &["signers", "--json"]).await);
    assert_eq!((&signers[0]["signer"], &signers[0]["urls_out"]), (&"main".into(), &"1".into()));

    let dry = lines(&run(&server, &["revoke", &url, "--dry-run", "--json"]).await);
    assert_eq!(dry.len(), 1);
    assert_eq!(dry[0]["blast_radius"]["urls_out"][0]["urls"], 1);
    assert_eq!(dry[0]["blast_radius"]["routes"], serde_json::json!(["demo/"]));

    // From standard input, as nobody's shell history should have it.
    let folder = tempfile::tempdir().unwrap();
    let leaked = folder.path().join("leaked");
    std::fs::write(&leaked, &url).unwrap();
    let mut command = operator(&server, &["revoke", "-", "--immediate", "--reason", "posted in a chat", "--json"]);
    command.stdin(std::fs::File::open(leaked).unwrap());
    let told = lines(&String::from_utf8(command.output().unwrap().stdout).unwrap());
    let steps: Vec<_> = told.iter().filter_map(|line| line["step"].as_str()).collect();
    assert_eq!(steps, ["deactivated", "created", "accepted", "promoted", "refused", "deleted"]);
    let end = told.last().unwrap();
    assert!(end["confirmed_at"].as_str().unwrap().ends_with('Z') && end["already_dead"] == false, "{end}");

    let told = run(&server, &["inspect", &url]).await;
    assert!(told.contains("state         REVOKED"), "{told}");
    let again = run(&server, &["revoke", &url]).await;
    assert!(again.contains("dead already") && again.contains("proven dead, after "), "{again}");
}

async fn what_goes_wrong_is_told_with_an_exit_code(_: Backend) {
    let (_dev, server, url) = dev().await;
    let code = |arguments: &[&str]| {
        let output = operator(&server, arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, said) = code(&["revoke", "--signer", "nobody"]);
    assert!(status == Some(1) && said.contains("NotFound (UNKNOWN_SIGNER): "), "{said}");
    let (status, said) = code(&["revoke", "--object", "demo/not-there", "--dry-run"]);
    assert!(status == Some(1) && said.contains("NotFound (OBJECT_NOT_FOUND): "), "{said}");
    let (status, said) = code(&["inspect", "https://example.com/"]);
    assert!(status == Some(1) && said.contains("InvalidArgument (INVALID_FIELD): `url` must be"), "{said}");
    for usage in [&["revoke"][..], &["revoke", "--object", "no-slash"], &["revoke", &url, "--signer", "main"]] {
        assert_eq!(code(usage).0, Some(64), "{usage:?}");
    }
    let (status, said) = code(&["signers", "--server", "http://127.0.0.1:9"]);
    assert!(status == Some(1) && said.contains("can't be reached"), "{said}");
}

/// Passes connections on to a service, and cuts some of them.
struct Wire {
    server: String,
    /// How many there have been.
    connections: Arc<AtomicUsize>,
}

impl Wire {
    /// To the service at `to`. `cut` says at which call the connection of that
    /// number is cut, both from 1.
    async fn start(to: &str, cut: fn(usize) -> Option<usize>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let (to, connections) = (to.trim_start_matches("http://").to_owned(), Arc::<AtomicUsize>::default());
        let count = Arc::clone(&connections);
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let cut = cut(count.fetch_add(1, Ordering::Relaxed) + 1);
                let service = TcpStream::connect(&to).await.unwrap();
                tokio::spawn(async move {
                    let (mut asked, mut told) = client.into_split();
                    let (mut answered, mut passed) = service.into_split();
                    tokio::select! {
                        // They fail when either side has gone.
                        _ = pass_on(&mut asked, &mut passed, cut) => {}
                        _ = tokio::io::copy(&mut answered, &mut told) => {}
                    }
                });
            }
        });
        Self { server, connections }
    }
}

/// Until the call of that number is asked for.
async fn pass_on(from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf, cut: Option<usize>) -> std::io::Result<()> {
    let mut said = Vec::new();
    let mut sent = 0;
    while from.read_buf(&mut said).await? > 0 {
        if cut.is_some_and(|cut| calls(&said) >= cut) {
            return Ok(());
        }
        to.write_all(&said[sent..]).await?;
        sent = said.len();
    }
    Ok(())
}

/// How many calls a client of HTTP/2 has begun: its HEADERS frames, after the
/// preface (RFC 9113, sections 3.4 and 4.1).
fn calls(said: &[u8]) -> usize {
    let (mut frames, mut calls) = (said.get(24..).unwrap_or_default(), 0);
    while let [a, b, c, kind, ..] = *frames {
        calls += usize::from(kind == 1);
        let len = u32::from_be_bytes([0, a, b, c]) as usize;
        frames = frames.get(9 + len..).unwrap_or_default();
    }
    calls
}

async fn a_connection_that_breaks_is_made_again_where_that_is_safe(_: Backend) {
    let (_dev, server, url) = dev().await;
    for arguments in [&["inspect", &url][..], &["signers"], &["url", "demo/secret-recipe.txt"]] {
        let wire = Wire::start(&server, |connection| (connection == 1).then_some(1)).await;
        run(&wire.server, arguments).await;
        assert_eq!(wire.connections.load(Ordering::Relaxed), 2, "{arguments:?}");
    }

    // Told what ends, asked for it, and looked at how it goes.
    let wire = Wire::start(&server, |connection| (connection == 1).then_some(4)).await;
    let told = lines(&run(&wire.server, &["revoke", &url, "--json"]).await);
    assert!(told.last().unwrap()["confirmed_at"].is_string(), "{told:?}");
    let steps: Vec<_> = told.iter().filter_map(|line| line["step"].as_str()).collect();
    assert_eq!(steps, ["created", "accepted", "promoted", "deactivated", "refused", "deleted"], "each once");
    assert!(wire.connections.load(Ordering::Relaxed) > 1);
    let signers = lines(&run(&server, &["signers", "--json"]).await);
    assert_eq!(signers[0]["generation"], "2", "it was one rotation");

    // The name may stand for another key by the second time.
    let wire = Wire::start(&server, |connection| Some(if connection == 1 { 2 } else { 1 })).await;
    let ended = output(operator(&wire.server, &["revoke", "--signer", "main", "--immediate"])).await;
    let said = ended.unwrap_err();
    assert!(said.contains("can't be reached") && said.contains("with a URL, not with the signer's name"), "{said}");
    assert!(wire.connections.load(Ordering::Relaxed) <= 3, "it was asked for again");
}

fn settings(folder: &Path, user: &str) -> Command {
    let endpoint = &localstack::shared().unwrap().endpoint;
    let file = folder.join("settings.toml");
    let key = "environment = { access_key_id = 'IT_ID', secret_access_key = 'IT_SECRET' }";
    let text = format!(
        "identity = {{ {key} }}\n[iam]\nendpoint = '{endpoint}'\n\
         [buckets.files]\nbucket = '{user}'\nregion = 'us-east-1'\nendpoint = '{endpoint}'\npath_style = true\n\
         [signers.tenant]\nkind = 'iam-user'\nuser = '{user}'\n\
         vault = {{ secrets_manager = {{ secret = '{user}', region = 'us-east-1', endpoint = '{endpoint}' }} }}\n\
         [[routes]]\nbucket = 'files'\nprefix = 'tenant/'\nsigner = 'tenant'\n[rotation]\npoll = '20ms'\n"
    );
    std::fs::write(&file, text).unwrap();
    let mut command = fileaccess(&["bootstrap", "--config", file.to_str().unwrap()]);
    command.env("IT_ID", "test").env("IT_SECRET", "test");
    command
}

async fn bootstrap_makes_all_that_a_signer_needs_and_again_does_no_harm(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let user = format!("bootstrapped-{}", std::process::id());
    let endpoint = &localstack::shared().unwrap().endpoint;
    let http = fileaccess::rotation::probe::Probe::http_client();
    let bucket = http.put(format!("{endpoint}/{user}")).send().await.unwrap();
    assert_eq!(bucket.status(), 200);
    let told = output(settings(folder.path(), &user)).await.unwrap();
    for part in ["made", "policy `fileaccess-signer` put", "created", "accepted", "promoted"] {
        assert!(told.contains(part), "{told}");
    }
    let keys = crate::behaviours::iam(endpoint, "ListAccessKeys", &[("UserName", &user)]).await;
    assert_eq!(keys.matches("<AccessKeyId>").count(), 1, "{keys}");
    let named = [("UserName", user.as_str()), ("PolicyName", "fileaccess-signer")];
    let policy = crate::behaviours::iam(endpoint, "GetUserPolicy", &named).await;
    assert!(policy.contains("tenant") && policy.contains("GetObject"), "{policy}");

    let again = output(settings(folder.path(), &user)).await.unwrap();
    assert!(again.contains("is there") && again.contains("is in the vault"), "{again}");
    assert_eq!(
        crate::behaviours::iam(endpoint, "ListAccessKeys", &[("UserName", &user)])
            .await
            .matches("<AccessKeyId>")
            .count(),
        1
    );
}

async fn bootstrap_prints_policies_and_makes_nothing(_: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let user = format!("printed-{}", std::process::id());
    let mut command = settings(folder.path(), &user);
    command.arg("--print-policies");
    let policies: Value = serde_json::from_str(&output(command).await.unwrap()).unwrap();
    let signer = &policies["signers"]["tenant"]["Statement"][0];
    assert_eq!(signer["Resource"], serde_json::json!([format!("arn:aws:s3:::{user}/tenant/*")]));
    assert!(policies["service"]["Statement"].as_array().unwrap().len() == 4, "{policies}");
    let users = crate::behaviours::iam(&localstack::shared().unwrap().endpoint, "ListUsers", &[]).await;
    assert!(!users.contains(&user), "{users}");
}

async fn what_is_done_counts_also_if_nobody_hears_of_it(_: Backend) {
    let (_dev, server, _) = dev().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("small");
    std::fs::write(&file, "small").unwrap();
    for arguments in [
        &["put", file.to_str().unwrap(), "demo/in/"][..],
        &["url", "demo/in/small"],
        &["get", "demo/in/small", folder.path().join("back").to_str().unwrap(), "--force"],
        &["rm", "demo/in/small", "demo/in/small"],
        &["signers"],
    ] {
        let end = |stdout: Stdio| {
            let mut command = operator(&server, arguments);
            let output = command.env("XDG_STATE_HOME", folder.path()).stdout(stdout).output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(end(writer.into()), (Some(0), String::new()), "{arguments:?}: as behind `| true`");
        let (code, told) = end(std::fs::File::create("/dev/full").unwrap().into());
        assert_eq!(code, Some(1), "{arguments:?}: {told}");
        assert!(told.starts_with("fileaccess: standard output: No space left"), "{arguments:?}: {told}");
    }
    assert_eq!(std::fs::read(folder.path().join("back")).unwrap(), b"small");
}
