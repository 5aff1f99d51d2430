//! `fileaccess put`, `get`, `ls`, `url` and `rm`, as they are typed.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::app::{App, KeySource, Sources};
use fileaccess::config::{AuditSettings, Listen, Settings};
use fileaccess::ops::upload_token::TokenKey;
use fileaccess::server::{self, Listener};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::binary::fileaccess;
use crate::relay::{Fate, Relay};
use crate::stage::{Backend, Stage};
use crate::{Case, cases};

const MIB: u64 = 1 << 20;

/// On both S3s.
pub fn cases() -> Vec<Case> {
    cases![
        files_of_any_size_come_back_as_they_went,
        several_files_go_at_once_are_listed_and_removed,
        standard_input_and_output_are_files_too,
        a_killed_put_goes_on_where_it_was,
        an_interrupted_put_says_how_to_go_on,
        an_interrupted_put_of_standard_input_leaves_nothing,
    ]
}

/// On the embedded one only: they are about the client.
pub fn embedded_cases() -> Vec<Case> {
    cases![
        a_part_that_fails_thrice_is_sent_a_fourth_time,
        a_url_that_is_refused_is_signed_anew,
        a_source_replaced_while_it_is_fetched_is_noticed,
        a_range_that_breaks_off_is_gone_on_with,
        an_interrupted_get_leaves_nothing,
        a_file_changed_while_it_is_sent_is_noticed,
        what_goes_wrong_is_told_and_nothing_is_overwritten,
        memory_does_not_grow_with_the_file,
    ]
}

/// A stage whose bucket is reached through a relay, and a folder to work in.
struct Desk {
    stage: Stage,
    relay: Relay,
    server: String,
    folder: tempfile::TempDir,
    credentials: Credentials,
}

impl Desk {
    async fn new(backend: Backend) -> Self {
        let stage = Stage::new(backend).await;
        let relay = Relay::start(&stage.endpoint).await;
        let credentials = match backend {
            Backend::Embedded => {
                stage.iam.create_user("desk").unwrap();
                stage.iam.create_access_key("desk", SystemTime::now()).unwrap()
            }
            Backend::LocalStack => Credentials::new("test", "test", None, None, "test"),
        };
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "[buckets.files]\nbucket = '{}'\nregion = 'us-east-1'\nendpoint = '{}'\npath_style = true\n\
             [signers.main]\nkind = 'ambient'\n[[routes]]\nbucket = 'files'\nsigner = 'main'\n\
             [[grants]]\ncaller = 'loopback'\nbucket = 'files'\nprefix = ''\n\
             actions = ['download', 'upload', 'delete', 'list', 'stat']\n\
             [limits]\nworkers = 1\ndrain = '0s'\n",
            stage.bucket, relay.endpoint
        );
        let mut settings = Settings::load(&text, &BTreeMap::new()).unwrap();
        let audit = folder.path().join(".audit.jsonl");
        settings.audit = AuditSettings { stdout: false, file: Some(audit), ..settings.audit };
        let provider = SharedCredentialsProvider::new(credentials.clone());
        let signers = [("main".to_owned(), KeySource::Ambient(provider.clone()))].into();
        let app =
            App::start(&settings, Sources { identity: provider, signers, tokens: TokenKey::random() }).await.unwrap();
        let listener = Listener::bind(&Listen::Tcp("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let server = format!("http://{}", listener.address().unwrap());
        tokio::spawn(server::run(listener, app, std::future::pending()));
        Self { stage, relay, server, folder, credentials }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of `size` bytes that can't be guessed from one another.
    fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let mut left = std::fs::File::open("/dev/urandom").unwrap().take(size);
        std::io::copy(&mut left, &mut std::fs::File::create(&path).unwrap()).unwrap();
        path
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = fileaccess(arguments);
        command
            .env("FILEACCESS_SERVER", &self.server)
            .env("XDG_STATE_HOME", self.path("state"))
            .current_dir(self.folder.path());
        command
    }

    fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        end(self.start(arguments)).await
    }

    /// What it prints when all goes well.
    async fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it says when it fails with exit code 1.
    async fn fails(&self, arguments: &[&str]) -> String {
        said(self.run(arguments).await, 1)
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        let mut arguments = arguments.to_vec();
        arguments.push("--json");
        serde_json::from_str(&self.ok(&arguments).await).unwrap()
    }

    /// Uploads that are open at S3.
    async fn open_uploads(&self) -> usize {
        let s3 = self.stage.s3(self.credentials.clone());
        s3.list_multipart_uploads().bucket(&self.stage.bucket).send().await.unwrap().uploads().len()
    }

    fn kept(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.path("state/fileaccess/uploads")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Lets two parts pass, and holds the others until it is told to go on.
    fn hold_after_two_parts(&self) -> watch::Sender<bool> {
        let (release, held) = watch::channel(false);
        self.relay.judge(move |seen| {
            let mut held = held.clone();
            async move {
                if seen.part().is_some_and(|part| part > 2) {
                    // A test that has ended releases nothing.
                    let _ = held.wait_for(|go| *go).await;
                }
                Fate::Pass
            }
        });
        release
    }

    async fn two_parts(&self) {
        self.relay.until(|done| done.iter().filter(|seen| seen.part().is_some()).count() == 2).await;
    }
}

async fn end(child: Child) -> Output {
    tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap()
}

fn said(output: Output, code: i32) -> String {
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(!said.contains("X-Amz-"), "a URL was printed: {said}");
    said
}

fn kill(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

fn sha256(path: &Path) -> Vec<u8> {
    let mut digest = Sha256::new();
    let mut file = std::fs::File::open(path).unwrap();
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read(&mut bytes).unwrap() {
            0 => return digest.finalize().to_vec(),
            len => digest.update(&bytes[..len]),
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn files_of_any_size_come_back_as_they_went(backend: Backend) {
    let desk = Desk::new(backend).await;
    for size in [0, 1, 5 * MIB - 1, 5 * MIB, 100 * MIB + 1] {
        let file = desk.file("there", size);
        let put = desk.json(&["put", "there", "files/dir/ü +%&=#?.bin", "--content-type", "text/x-it"]).await;
        assert_eq!((put["size"].as_u64(), put["parts_found"].as_u64()), (Some(size), Some(0)));
        assert_eq!(put["parts_sent"].as_u64().unwrap() > 1, size > 16 * MIB, "{put}");
        let got = desk.json(&["get", "files/dir/ü +%&=#?.bin", "back", "--force"]).await;
        assert_eq!(got["size"].as_u64(), Some(size));
        assert_eq!(got["checksum"], put["checksum"], "S3 has the checksum of the whole, and it was verified");
        assert_eq!(sha256(&desk.path("back")), sha256(&file), "{size}");
        let facts = desk.stage.s3(desk.credentials.clone());
        let facts = facts.head_object().bucket(&desk.stage.bucket).key("dir/ü +%&=#?.bin").send().await.unwrap();
        assert_eq!(facts.content_type(), Some("text/x-it"), "{size}");
    }
    assert!(desk.kept().is_empty(), "nothing is kept of what is done");
    assert_eq!(desk.open_uploads().await, 0);
}

async fn several_files_go_at_once_are_listed_and_removed(backend: Backend) {
    let desk = Desk::new(backend).await;
    for n in 0..10_u64 {
        desk.file(&format!("f{n}"), n * 1000);
    }
    let big = desk.file("big", 17 * MIB);
    let mut put = vec!["put"];
    let files: Vec<_> = (0..10).map(|n| format!("f{n}")).collect();
    put.extend(files.iter().map(String::as_str).chain(["big", "files/in/"]));
    let told = desk.ok(&put).await;
    assert_eq!(told.lines().count(), 11, "{told}");
    let listed = desk.ok(&["ls", "files/in/"]).await;
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 11);
    assert_eq!((lines[0][0], lines[0][2]), ("17825792", "in/big"), "{listed}");
    assert_eq!((lines[9][0], lines[9][2]), ("8000", "in/f8"), "{listed}");
    assert_eq!(desk.ok(&["ls", "files"]).await.split_whitespace().collect::<Vec<_>>(), ["-", "in/"]);
    assert_eq!(desk.ok(&["ls", "files", "-r"]).await, listed);

    std::fs::create_dir(desk.path("out")).unwrap();
    desk.ok(&["get", "files/in/big", "out"]).await;
    assert_eq!(sha256(&desk.path("out/big")), sha256(&big));
    assert_eq!(names(&desk.path("out")), ["big"]);
    desk.ok(&["rm", "files/in/big", "files/in/f0"]).await;
    assert_eq!(desk.ok(&["ls", "files", "-r"]).await.lines().count(), 9);

    let url = desk.ok(&["url", "files/in/f9", "--ttl", "1m"]).await;
    let url = url.trim();
    assert_eq!(desk.stage.http.get(url).send().await.unwrap().bytes().await.unwrap().len(), 9000);
    let up = desk.json(&["url", "files/in/new", "--upload"]).await;
    let answer = desk.stage.http.put(up["url"].as_str().unwrap()).body("new").send().await.unwrap();
    assert_eq!((answer.status().as_u16(), up["method"].as_str()), (200, Some("PUT")));
    assert_eq!(desk.ok(&["get", "files/in/new", "-"]).await, "new");
}

async fn standard_input_and_output_are_files_too(backend: Backend) {
    let desk = Desk::new(backend).await;
    for size in [0, 5, 17 * MIB + 3] {
        let file = desk.file("there", size);
        let mut put = desk.command(&["put", "-", "files/piped", "--json"]);
        put.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut put = put.spawn().unwrap();
        let mut pipe = put.stdin.take().unwrap();
        let bytes = std::fs::read(&file).unwrap();
        let written = bytes.clone();
        let writing = tokio::task::spawn_blocking(move || pipe.write_all(&written).unwrap());
        let output = end(put).await;
        writing.await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let output = desk.run(&["get", "files/piped", "-"]).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == bytes, "{size}");
    }
    assert!(desk.kept().is_empty(), "nothing could be gone on with");
}

async fn a_killed_put_goes_on_where_it_was(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 40 * MIB + 7);
    let release = desk.hold_after_two_parts();
    let mut put = desk.start(&["put", "big", "files/big"]);
    desk.two_parts().await;
    put.kill().unwrap();
    put.wait().unwrap();
    let kept = desk.kept();
    assert_eq!(kept.len(), 1);
    assert_eq!(std::fs::metadata(&kept[0]).unwrap().permissions().mode() & 0o777, 0o600);
    release.send_replace(true);

    let done = desk.json(&["put", "big", "files/big", "--resume"]).await;
    let parts: Vec<_> = desk.relay.done().iter().filter_map(crate::relay::Seen::part).collect();
    let sent = done["parts_sent"].as_u64().unwrap();
    assert_eq!(done["parts_found"], 2, "{done}");
    assert!(sent > 0 && parts.len() as u64 == sent + 2, "only what was missing was sent: {parts:?}");
    assert_eq!(done["size"], 40 * MIB + 7);
    assert!(desk.kept().is_empty());
    desk.ok(&["get", "files/big", "back"]).await;
    assert_eq!(sha256(&desk.path("back")), sha256(&file));

    // What was changed since is begun anew, and the old parts are given up.
    let _held = desk.hold_after_two_parts();
    let before = desk.relay.done().len();
    let mut put = desk.start(&["put", "big", "files/big"]);
    let sent = |done: &Vec<crate::relay::Seen>| done[before..].iter().filter(|seen| seen.part().is_some()).count();
    desk.relay.until(|done| sent(done) == 2).await;
    put.kill().unwrap();
    put.wait().unwrap();
    desk.relay.judge(|_| async { Fate::Pass });
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().write_all_at(b"other", 0).unwrap();
    let output = desk.run(&["put", "big", "files/big", "--resume", "--json"]).await;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("given up, because the file was changed since"), "{told}");
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["parts_found"], 0);
    desk.ok(&["get", "files/big", "back", "--force"]).await;
    assert_eq!(sha256(&desk.path("back")), sha256(&file));
    assert_eq!(desk.open_uploads().await, 0);
}

async fn an_interrupted_put_says_how_to_go_on(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("big", 40 * MIB);
    let release = desk.hold_after_two_parts();
    let put = desk.start(&["put", "big", "files/big"]);
    desk.two_parts().await;
    kill(&put, "-INT");
    let told = said(end(put).await, 1);
    assert!(told.contains("interrupted; the same command with --resume goes on with it"), "{told}");
    release.send_replace(true);
    let done = desk.json(&["put", "big", "files/big", "--resume"]).await;
    assert_eq!(done["parts_found"], 2, "{done}");

    // Begun anew without the option, which leaves nothing of the first attempt.
    let _held = desk.hold_after_two_parts();
    let before = desk.relay.done().len();
    let put = desk.start(&["put", "big", "files/big"]);
    let sent = |done: &Vec<crate::relay::Seen>| done[before..].iter().filter(|seen| seen.part().is_some()).count();
    desk.relay.until(|done| sent(done) == 2).await;
    kill(&put, "-TERM");
    said(end(put).await, 1);
    desk.relay.judge(|_| async { Fate::Pass });
    let output = desk.run(&["put", "big", "files/big"]).await;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("--resume would have gone on with it"), "{told}");
    assert_eq!(desk.open_uploads().await, 0);
}

async fn an_interrupted_put_of_standard_input_leaves_nothing(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 40 * MIB);
    let _release = desk.hold_after_two_parts();
    let mut put = desk.command(&["put", "-", "files/big"]);
    put.stdin(std::fs::File::open(file).unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let put = put.spawn().unwrap();
    desk.two_parts().await;
    assert_eq!(desk.open_uploads().await, 1);
    kill(&put, "-INT");
    let told = said(end(put).await, 1);
    assert!(told.contains("interrupted") && !told.contains("--resume"), "{told}");
    assert_eq!(desk.open_uploads().await, 0, "the upload is given up");
    assert!(desk.kept().is_empty());
}

async fn a_part_that_fails_thrice_is_sent_a_fourth_time(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 20 * MIB);
    let failed = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&failed);
    desk.relay.judge(move |seen| {
        let fate = match seen.part() {
            Some(2) => match count.fetch_add(1, Ordering::Relaxed) {
                0 => Fate::Status(503),
                1 => Fate::Cut,
                2 => Fate::Status(500),
                _ => Fate::Pass,
            },
            _ => Fate::Pass,
        };
        async move { fate }
    });
    let done = desk.json(&["put", "big", "files/big"]).await;
    assert_eq!(failed.load(Ordering::Relaxed), 4, "{done}");
    desk.ok(&["get", "files/big", "back"]).await;
    assert_eq!(sha256(&desk.path("back")), sha256(&file));

    // One that always fails ends it, with what S3 has said; the rest is kept.
    desk.relay.judge(|seen| async move { if seen.part() == Some(2) { Fate::Status(400) } else { Fate::Pass } });
    let told = desk.fails(&["put", "big", "files/big"]).await;
    assert!(told.contains("`big`: S3 answers 400 OfTheRelay: as told; the same command with --resume"), "{told}");
    assert_eq!(desk.kept().len(), 1);
}

async fn a_url_that_is_refused_is_signed_anew(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 40 * MIB);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    desk.relay.judge(move |seen| {
        let mut log = log.lock().unwrap();
        let is_first = match seen.part() {
            Some(part) => !log.iter().any(|(n, _)| *n == part),
            None => seen.is_fetch() && log.is_empty(),
        };
        if seen.part().is_some() || seen.is_fetch() {
            log.push((seen.part().unwrap_or_default(), seen.target.clone()));
        }
        // As S3 does with one that has expired.
        async move { if is_first { Fate::Status(403) } else { Fate::Pass } }
    });
    desk.ok(&["put", "big", "files/big"]).await;
    let sent = std::mem::take(&mut *seen.lock().unwrap());
    let parts = sent.iter().map(|(part, _)| *part).max().unwrap();
    assert_eq!(sent.len(), 2 * parts, "each part twice");
    for (part, target) in &sent {
        let same = sent.iter().filter(|(n, other)| n == part && other == target).count();
        assert_eq!(same, 1, "part {part} was tried with one URL twice");
    }
    desk.ok(&["get", "files/big", "back"]).await;
    assert_eq!(sha256(&desk.path("back")), sha256(&file));
    let urls: std::collections::BTreeSet<_> = seen.lock().unwrap().iter().map(|(_, target)| target.clone()).collect();
    assert_eq!(urls.len(), 2, "one URL for all ranges, and another when it was refused");
}

async fn a_source_replaced_while_it_is_fetched_is_noticed(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("one", 40 * MIB);
    desk.file("two", 40 * MIB);
    desk.ok(&["put", "one", "files/big"]).await;
    let (release, held) = watch::channel(false);
    let passed = Arc::new(AtomicUsize::new(0));
    desk.relay.judge(move |seen| {
        let (mut held, passed) = (held.clone(), Arc::clone(&passed));
        async move {
            if seen.is_fetch() && passed.fetch_add(1, Ordering::Relaxed) > 0 {
                let _ = held.wait_for(|go| *go).await;
            }
            Fate::Pass
        }
    });
    let before = desk.relay.done().len();
    let get = desk.start(&["get", "files/big", "back"]);
    desk.relay.until(|done| done[before..].iter().any(crate::relay::Seen::is_fetch)).await;
    desk.ok(&["put", "two", "files/big"]).await;
    release.send_replace(true);
    let told = said(end(get).await, 1);
    assert!(told.contains("`files/big` was changed meanwhile"), "{told}");
    assert!(!names(desk.folder.path()).iter().any(|name| name.contains("back")), "nothing is left");
}

async fn a_range_that_breaks_off_is_gone_on_with(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 33 * MIB);
    desk.ok(&["put", "big", "files/big"]).await;
    let ranges = Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = Arc::clone(&ranges);
    desk.relay.judge(move |seen| {
        let fate = if seen.is_fetch() {
            let mut log = log.lock().unwrap();
            log.push(seen.range.clone());
            [Fate::Short, Fate::Cut, Fate::Pass][log.len() % 3]
        } else {
            Fate::Pass
        };
        async move { fate }
    });
    desk.ok(&["get", "files/big", "back"]).await;
    assert_eq!(sha256(&desk.path("back")), sha256(&file));
    let ranges = std::mem::take(&mut *ranges.lock().unwrap());
    let starts: std::collections::BTreeSet<u64> =
        ranges.iter().map(|range| range[6..].split('-').next().unwrap().parse().unwrap()).collect();
    assert!(starts.iter().any(|start| start % (16 * MIB) != 0), "none goes on in the middle: {ranges:?}");
    let piped = desk.run(&["get", "files/big", "-"]).await;
    assert!(piped.stdout == std::fs::read(&file).unwrap(), "{}", String::from_utf8_lossy(&piped.stderr));
}

async fn an_interrupted_get_leaves_nothing(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("big", 40 * MIB);
    desk.ok(&["put", "big", "files/big"]).await;
    std::fs::create_dir(desk.path("out")).unwrap();
    desk.relay.judge(|seen| async move {
        if seen.range.starts_with("bytes=0-") || !seen.is_fetch() { Fate::Pass } else { std::future::pending().await }
    });
    let before = desk.relay.done().len();
    let get = desk.start(&["get", "files/big", "out"]);
    desk.relay.until(|done| done[before..].iter().any(crate::relay::Seen::is_fetch)).await;
    assert_eq!(names(&desk.path("out")).len(), 1, "the temporary file");
    kill(&get, "-INT");
    let told = said(end(get).await, 1);
    assert!(told.contains("interrupted; nothing is left of the download"), "{told}");
    assert!(names(&desk.path("out")).is_empty());
}

async fn a_file_changed_while_it_is_sent_is_noticed(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 40 * MIB);
    let release = desk.hold_after_two_parts();
    let put = desk.start(&["put", "big", "files/big"]);
    desk.two_parts().await;
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().write_all_at(b"other", 0).unwrap();
    release.send_replace(true);
    let told = said(end(put).await, 1);
    assert!(told.contains("`big` was changed meanwhile") && !told.contains("--resume"), "{told}");
    assert_eq!(desk.open_uploads().await, 0, "it can't be gone on with, and is given up");
    assert!(desk.kept().is_empty());
    assert!(desk.fails(&["get", "files/big", "-"]).await.contains("OBJECT_NOT_FOUND"));
}

async fn what_goes_wrong_is_told_and_nothing_is_overwritten(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("small", 100);
    let big = desk.file("big", 20 * MIB);
    desk.ok(&["put", "small", "big", "files/"]).await;
    assert!(desk.fails(&["put", "small", "files/", "--create-only"]).await.contains("412 PreconditionFailed"));
    let told = desk.fails(&["put", "big", "files/", "--create-only"]).await;
    assert!(told.contains("AlreadyExists") && !told.contains("--resume"), "{told}");
    assert_eq!(desk.open_uploads().await, 0);

    std::fs::write(desk.path("mine"), "mine").unwrap();
    assert!(desk.fails(&["get", "files/big", "mine"]).await.contains("`mine` exists; --force replaces it"));
    assert_eq!(std::fs::read(desk.path("mine")).unwrap(), b"mine");
    desk.ok(&["get", "files/big", "mine", "--force"]).await;
    assert_eq!(sha256(&desk.path("mine")), sha256(&big));
    assert!(desk.fails(&["get", "files/none"]).await.contains("OBJECT_NOT_FOUND"));
    assert!(desk.fails(&["put", "not-there", "files/"]).await.contains("`not-there`: No such file"));
    assert!(desk.fails(&["put", "/dev/null", "files/"]).await.contains("no regular file"));
    assert!(desk.fails(&["ls", "other/"]).await.contains("NOT_GRANTED"));
    let nowhere = desk.fails(&["put", "small", "files/", "--server", "http://127.0.0.1:9"]).await;
    assert!(nowhere.contains("the service can't be reached"), "{nowhere}");
    for usage in [
        &["put", "small"][..],
        &["put", "small", "big", "files/one"],
        &["put", "small", "small", "files/"],
        &["put", "-", "files/"],
        &["get", "files"],
        &["get", "files/dir/"],
        &["put", "small", "files/", "--parallel", "0"],
        &["ls", "files", "--server", "https://127.0.0.1:9"],
    ] {
        said(desk.run(usage).await, 64);
    }
}

/// The most memory that a process had, in KiB, looked at until its end.
async fn peak(mut child: Child) -> u64 {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        if let Some(line) = text.lines().find_map(|line| line.strip_prefix("VmHWM:")) {
            peak = line.trim().trim_end_matches(" kB").parse().unwrap();
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return peak;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn memory_does_not_grow_with_the_file(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = std::fs::File::create(desk.path("sparse")).unwrap();
    file.set_len(512 * MIB).unwrap();
    let put = peak(desk.start(&["put", "sparse", "files/sparse"])).await;
    let get = peak(desk.start(&["get", "files/sparse", "back"])).await;
    eprintln!("512 MiB, unoptimized: put had at most {put} KiB, get {get} KiB");
    assert_eq!(std::fs::metadata(desk.path("back")).unwrap().len(), 512 * MIB);
    assert!(put > 0 && put < 96 << 10, "put: {put} KiB");
    assert!(get > 0 && get < 96 << 10, "get: {get} KiB");
}
