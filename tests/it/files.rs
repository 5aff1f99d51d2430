//! `fileaccess put`, `get`, `ls`, `url` and `rm`, as they are typed.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::app::{App, KeySource, Sources};
use fileaccess::client::{Client, Server};
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
        what_is_asked_for_is_stored_with_a_file,
        a_folder_goes_and_comes_back,
        a_file_that_fails_does_not_stop_the_others,
        a_put_killed_when_it_was_complete_sends_nothing_again,
        keys_that_are_no_files_of_one_folder_are_refused,
        an_upload_that_somebody_else_ended_is_over,
        a_checksum_of_parts_only_is_told,
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
        a_source_replaced_while_it_goes_to_standard_output_is_noticed,
        keys_that_lead_elsewhere_are_refused,
        more_files_than_can_be_open,
        an_interrupted_folder_is_gone_on_with,
        what_goes_wrong_is_told_and_nothing_is_overwritten,
        memory_does_not_grow_with_the_file,
        only_regular_files_are_replaced_and_keep_their_mode,
        a_file_that_can_not_be_written_is_named,
        names_do_not_move_the_cursor,
        two_puts_of_one_file_do_not_disturb_each_other,
        a_service_that_gives_no_sign_of_life_is_told,
        a_life_in_fractions_of_seconds_is_refused,
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

    /// Puts an object behind the service's back.
    async fn plant(&self, key: &str, body: &'static str) {
        let s3 = self.stage.s3(self.credentials.clone());
        let body = aws_sdk_s3::primitives::ByteStream::from_static(body.as_bytes());
        s3.put_object().bucket(&self.stage.bucket).key(key).body(body).send().await.unwrap();
    }

    async fn head(&self, key: &str) -> aws_sdk_s3::operation::head_object::HeadObjectOutput {
        let s3 = self.stage.s3(self.credentials.clone());
        s3.head_object().bucket(&self.stage.bucket).key(key).send().await.unwrap()
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        end(self.start(arguments)).await
    }

    /// After what a shell is told first.
    async fn limited(&self, limit: &str, arguments: &[&str]) -> Output {
        let plain = self.command(arguments);
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("{limit} && exec \"$@\""), "sh"]).arg(plain.get_program()).args(plain.get_args());
        limited.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        limited.current_dir(self.folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        end(limited.spawn().unwrap()).await
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
        &["put", "-r", "small", "files/"],
        &["put", "-r", "state", "files/one"],
        &["put", "-r", "state", "state", "files/"],
        &["put", "state", "files/"],
        &["get", "-r", "files/one", "out"],
        &["get", "-r", "files/"],
        &["get", "-r", "files/", "-"],
        &["get", "-r", "files/", "small"],
        &["rm", "-r", "files/one"],
        &["rm", "files/"],
        &["get", "-r", "files/", "/dev/null"],
        &["url", "files/small", "--ttl", "0s"],
        &["url", "files/small", "--ttl", "8d"],
    ] {
        said(desk.run(usage).await, 64);
    }
    let tags: Vec<_> = (0..11).map(|n| format!("--tag=t{n}=")).collect();
    for (wrong, told) in [
        (&["--metadata", "a"][..], "'a' for '--metadata <NAME=VALUE>': must be a name, `=` and a value"),
        (&["--metadata", "A=b"], "'A=b' for '--metadata <NAME=VALUE>': must have names that are lower-case"),
        (&["--metadata=a=1", "--metadata=a=2"], "--metadata `a` is given twice"),
        (&["--tag", "a=?"], "'a=?' for '--tag <NAME=VALUE>': must have names of 1 to 128"),
        (&tags.iter().map(String::as_str).collect::<Vec<_>>(), "--tag, given 11 times, must be at most 10"),
        (&["--content-type", "text"], "'text' for '--content-type <TYPE>': must be a media type, as `text/plain`"),
        (&["--cache-control", "ü"], "'ü' for '--cache-control <VALUE>': must be printable ASCII"),
        (&["--content-disposition", "a  b"], "for '--content-disposition <VALUE>': must be printable ASCII"),
        (&["--storage-class", "COLD"], "'COLD' for '--storage-class <CLASS>': must be one of STANDARD, STANDARD_IA"),
        (&["--sse", "aes"], "'aes' for '--sse <s3|kms|kms:KEY>': must be `s3`, `kms`, or `kms:`"),
        (&["--sse", "s3", "--sse-bucket-key"], "--sse-bucket-key needs `--sse kms`"),
        (&["--part-size", "4MiB"], "'4MiB' for '--part-size <SIZE>': must be `5MiB` to `5GiB`"),
    ] {
        let output = desk.run(&[&["put", "small", "files/wrong"], wrong].concat()).await;
        let said = said(output, 64);
        assert!(said.contains(told), "{said}");
    }
    assert!(desk.fails(&["get", "files/wrong", "-"]).await.contains("OBJECT_NOT_FOUND"));
    std::fs::create_dir(desk.path("hollow")).unwrap();
    assert!(desk.fails(&["put", "-r", "hollow", "files/"]).await.contains("there are no files in `hollow`"));
    // It is told once, not for each.
    let nowhere = desk.fails(&["put", "small", "big", "files/", "--server", "http://127.0.0.1:9"]).await;
    assert_eq!(nowhere.matches("can't be reached").count(), 1, "{nowhere}");
    // To open it would wait for ever.
    assert!(Command::new("mkfifo").arg(desk.path("pipe")).status().unwrap().success());
    assert!(desk.fails(&["put", "pipe", "files/"]).await.contains("`pipe`: no regular file"));
}

async fn what_is_asked_for_is_stored_with_a_file(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("small.png", 100);
    desk.file("big.tar", 17 * MIB);
    let metadata = ["--metadata", "from=it = here", "--metadata", "n="];
    assert!(said(desk.run(&["put", "small.png", "files/", "--metadata", "n="]).await, 64).contains("not empty"));
    let metadata = [metadata[0], metadata[1], "--metadata", "n=1"];
    for (name, media) in [("small.png", "image/png"), ("big.tar", "application/x-tar")] {
        let mut put = vec!["put", name, "files/", "--cache-control", "max-age=60", "--storage-class", "STANDARD"];
        put.extend(["--content-disposition", "attachment; filename=\"x\"", "--part-size", "5MiB"]);
        put.extend(metadata);
        let done = desk.json(&put).await;
        assert_eq!(done["parts_sent"], if name == "big.tar" { 4 } else { 0 }, "{done}");
        let facts = desk.head(name).await;
        assert_eq!(facts.content_type(), Some(media));
        assert_eq!(facts.cache_control(), Some("max-age=60"), "{name}");
        assert_eq!(facts.content_disposition(), Some("attachment; filename=\"x\""), "{name}");
        let stored = facts.metadata().unwrap();
        assert_eq!((stored["from"].as_str(), stored["n"].as_str()), ("it = here", "1"), "{name}");
    }
    // One part is one request.
    let done = desk.json(&["put", "big.tar", "files/once", "--part-size", "17MiB", "--content-type", ""]).await;
    assert_eq!(done["parts_sent"], 0, "{done}");
    assert!(!desk.head("once").await.content_type().unwrap_or_default().contains("tar"), "none was asked for");
    let mut put = desk.command(&["put", "-", "files/piped.json"]);
    put.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    assert!(end(put.spawn().unwrap()).await.status.success());
    assert_eq!(desk.head("piped.json").await.content_type(), Some("application/json"));

    // LocalStack's own KMS makes no key here.
    let key_id = "arn:aws:kms:us-east-1:000000000000:key/1234abcd-12ab-34cd-56ef-1234567890ab";
    let kms = format!("kms:{key_id}");
    for name in ["small.png", "big.tar"] {
        for (options, refusal) in [
            (&["--tag", "team=a b", "--tag", "n="][..], "keeps no tags"),
            (&["--storage-class", "STANDARD_IA"], "has one storage class"),
            (&["--sse", "s3"], "does not encrypt"),
            (&["--sse", &kms, "--sse-bucket-key"], "does not encrypt"),
        ] {
            let output = desk.run(&[&["put", name, "files/more/"], options].concat()).await;
            if backend == Backend::Embedded {
                let (told, of_parts) = (said(output, 1), "must ask only for what the bucket's S3 has: it answers 501");
                assert!(told.contains(if name == "big.tar" { of_parts } else { refusal }), "{told}");
                assert!(name == "big.tar" || told.contains("S3 answers 501 NotImplemented"), "{told}");
                continue;
            }
            said(output, 0);
            let (key, s3) = (format!("more/{name}"), desk.stage.s3(desk.credentials.clone()));
            let facts = desk.head(&key).await;
            let class = facts.storage_class().map_or("", |class| class.as_str());
            assert_eq!(class == "STANDARD_IA", options[0] == "--storage-class", "{class}");
            let encryption = facts.server_side_encryption().map_or("", |sse| sse.as_str());
            let of_kms = options.contains(&"--sse-bucket-key");
            assert_eq!(encryption == "aws:kms", of_kms, "{encryption}");
            assert_eq!(
                (facts.ssekms_key_id() == Some(key_id), facts.bucket_key_enabled() == Some(true)),
                (of_kms, of_kms)
            );
            let tags = s3.get_object_tagging().bucket(&desk.stage.bucket).key(&key).send().await.unwrap();
            let mut tags: Vec<_> = tags.tag_set().iter().map(|tag| (tag.key(), tag.value())).collect();
            tags.sort_unstable();
            assert_eq!(tags, if options[0] == "--tag" { vec![("n", ""), ("team", "a b")] } else { vec![] });
        }
    }
    assert_eq!(desk.open_uploads().await, 0);
}

/// Everything below a folder: paths, and what the files contain.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut tree = BTreeMap::new();
    let mut ahead = vec![folder.to_owned()];
    while let Some(at) = ahead.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                ahead.push(path);
            } else {
                tree.insert(path.strip_prefix(folder).unwrap().to_owned(), std::fs::read(path).unwrap());
            }
        }
    }
    tree
}

async fn a_folder_goes_and_comes_back(backend: Backend) {
    let desk = Desk::new(backend).await;
    std::fs::create_dir_all(desk.path("dir/a/ü b")).unwrap();
    std::fs::create_dir(desk.path("dir/none")).unwrap();
    for (name, size) in [("dir/big", 17 * MIB), ("dir/empty", 0), ("dir/a/x.txt", 3), ("dir/a/ü b/+%&#", 1000)] {
        desk.file(name, size);
    }
    std::os::unix::fs::symlink(desk.path("dir/a/x.txt"), desk.path("dir/link")).unwrap();
    let told = desk.ok(&["put", "--recursive", "dir", "files/in/"]).await;
    assert_eq!(told.lines().count(), 5, "{told}");
    let listed = desk.ok(&["ls", "files", "-r"]).await;
    let keys: Vec<_> = listed.lines().map(|line| line.rsplit("Z  ").next().unwrap()).collect();
    assert_eq!(keys, ["in/a/x.txt", "in/a/ü b/+%&#", "in/big", "in/empty", "in/link"], "{listed}");
    assert_eq!(desk.head("in/a/x.txt").await.content_type(), Some("text/plain"));

    // Again: all is there, and nothing is sent.
    let sent = |desk: &Desk| desk.relay.done().iter().filter(|seen| seen.method == "PUT").count();
    let before = sent(&desk);
    let told = desk.ok(&["put", "-r", "dir/", "files/in/", "--resume"]).await;
    assert_eq!(told.lines().filter(|line| line.ends_with("  was there")).count(), 5, "{told}");
    assert_eq!(sent(&desk), before);
    // Unless it is another.
    std::fs::write(desk.path("dir/a/x.txt"), "new").unwrap();
    let told = desk.ok(&["put", "-r", "dir", "files/in/", "--resume"]).await;
    assert_eq!(told.lines().filter(|line| line.ends_with("  was there")).count(), 3, "{told}");
    assert_eq!(sent(&desk), before + 2, "the file, and the link to it");

    // What consoles make for a folder is none.
    desk.plant("in/", "").await;
    desk.plant("in/sub/", "").await;
    let told = desk.ok(&["get", "--recursive", "files/in/", "deep/back"]).await;
    assert_eq!(told.lines().count(), 5, "{told}");
    assert_eq!(tree(&desk.path("deep/back")), tree(&desk.path("dir")));
    // Nothing is overwritten; what is missing comes.
    std::fs::write(desk.path("deep/back/empty"), "mine").unwrap();
    std::fs::remove_file(desk.path("deep/back/big")).unwrap();
    let output = desk.run(&["get", "-r", "files/in/", "deep/back"]).await;
    assert!(String::from_utf8_lossy(&output.stdout).contains("deep/back/big  17825792 bytes"));
    let told = said(output, 1);
    assert!(told.contains("deep/back/empty` exists; --force replaces it"), "{told}");
    assert!(told.ends_with("fileaccess: 4 of 5 failed\n"), "{told}");
    assert_eq!(std::fs::read(desk.path("deep/back/empty")).unwrap(), b"mine");
    desk.ok(&["get", "-r", "files/in/", "deep/back", "--force"]).await;
    assert_eq!(tree(&desk.path("deep/back")), tree(&desk.path("dir")));

    desk.plant("inside", "").await;
    let told = desk.ok(&["rm", "--recursive", "files/in/"]).await;
    assert_eq!(told.lines().count(), 7, "{told}");
    assert!(told.starts_with("removed files/in/\nremoved files/in/a/x.txt\n"), "{told}");
    assert_eq!(desk.ok(&["ls", "files", "-r"]).await.lines().count(), 1, "what only begins so stays");
    assert!(desk.fails(&["get", "-r", "files/in/", "deep/none"]).await.contains("there is nothing below `files/in/`"));
    assert!(!desk.path("deep/none").exists());
}

async fn a_file_that_fails_does_not_stop_the_others(backend: Backend) {
    let desk = Desk::new(backend).await;
    std::fs::create_dir(desk.path("dir")).unwrap();
    let files: Vec<_> = (0..6).map(|n| format!("dir/f{n}")).collect();
    for name in &files {
        desk.file(name, 1000);
    }
    desk.file("dir/big", 40 * MIB);
    std::os::unix::fs::symlink(desk.path("dir"), desk.path("dir/loop")).unwrap();
    desk.relay.judge(|seen| async move {
        let fails = seen.method == "PUT" && seen.target.contains("/f3?") || seen.part() == Some(5);
        if fails { Fate::Status(400) } else { Fate::Pass }
    });
    // One after the other, so that the last part fails when the others are there.
    let output = desk.run(&["put", "-r", "dir", "files/", "--parallel", "1"]).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 5);
    let told = said(output, 1);
    assert!(told.contains("fileaccess: `dir/f3`: S3 answers 400 OfTheRelay: as told\n"), "{told}");
    assert!(told.contains("fileaccess: `dir/big`: S3 answers 400 OfTheRelay: as told\n"), "{told}");
    assert!(told.contains("fileaccess: `dir/loop`: a link to a folder, which is not followed\n"), "{told}");
    assert!(told.ends_with("fileaccess: 3 of 8 failed; the same command with --resume goes on with it\n"), "{told}");
    // As often as need be.
    let told = desk.fails(&["put", "-r", "dir", "files/", "--resume"]).await;
    assert!(told.ends_with("fileaccess: 3 of 8 failed; the same command with --resume goes on with it\n"), "{told}");
    desk.relay.judge(|_| async { Fate::Pass });
    let output = desk.run(&["put", "-r", "dir", "files/", "--resume"]).await;
    let done = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(done.lines().filter(|line| line.ends_with("  was there")).count(), 5, "{done}");
    assert!(
        done.lines().any(|line| line.starts_with("files/big ") && line.ends_with("1 parts, 4 were there")),
        "{done}"
    );
    let told = said(output, 1);
    assert!(told.ends_with("fileaccess: 1 of 8 failed\n"), "{told}");
    assert_eq!(desk.open_uploads().await, 0);

    // What would be another object is begun anew.
    let _held = desk.hold_after_two_parts();
    let before = desk.relay.done().len();
    let mut put = desk.start(&["put", "dir/big", "files/big"]);
    let sent = |done: &Vec<crate::relay::Seen>| done[before..].iter().filter(|seen| seen.part().is_some()).count();
    desk.relay.until(|done| sent(done) == 2).await;
    put.kill().unwrap();
    put.wait().unwrap();
    desk.relay.judge(|_| async { Fate::Pass });
    let output = desk.run(&["put", "dir/big", "files/big", "--resume", "--metadata", "a=b"]).await;
    let told = said(output, 0);
    assert!(told.contains("given up, because other things are to be stored with it now"), "{told}");
    assert_eq!(desk.head("big").await.metadata().unwrap()["a"], "b");

    // The same way back, and out.
    desk.relay.judge(|seen| async move {
        if seen.is_fetch() && seen.target.contains("/f3?") || seen.method == "DELETE" && seen.target.contains("/f4?") {
            return Fate::Status(400);
        }
        Fate::Pass
    });
    let told = desk.fails(&["get", "-r", "files/", "back"]).await;
    assert!(told.contains("fileaccess: `files/f3`: S3 answers 400") && told.ends_with(": 1 of 7 failed\n"), "{told}");
    assert_eq!(names(&desk.path("back")), ["big", "f0", "f1", "f2", "f4", "f5"]);
    let told = desk.fails(&["rm", "-r", "files/"]).await;
    assert!(told.contains("fileaccess: `files/f4`: S3 answers 400") && told.ends_with(": 1 of 7 failed\n"), "{told}");
    assert_eq!(desk.ok(&["ls", "files", "-r"]).await.lines().count(), 1);
}

async fn a_put_killed_when_it_was_complete_sends_nothing_again(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 40 * MIB);
    let (release, held) = watch::channel(false);
    desk.relay.judge(move |seen| {
        let mut held = held.clone();
        async move {
            // By which the service looks at what was made, before it answers.
            if seen.method == "HEAD" {
                let _ = held.wait_for(|go| *go).await;
            }
            Fate::Pass
        }
    });
    let completes = |seen: &crate::relay::Seen| seen.method == "POST" && seen.target.contains("uploadId=");
    let mut put = desk.start(&["put", "big", "files/big"]);
    desk.relay.until(|done| done.iter().any(completes)).await;
    put.kill().unwrap();
    put.wait().unwrap();
    assert_eq!((desk.kept().len(), desk.open_uploads().await), (1, 0), "S3 has made the object, nobody knows");
    release.send_replace(true);
    let sent = |desk: &Desk| desk.relay.done().iter().filter(|seen| seen.method != "HEAD").count();
    let before = sent(&desk);
    let done = desk.json(&["put", "big", "files/big", "--resume"]).await;
    assert_eq!((done["parts_sent"].as_u64(), done["was_there"].as_bool()), (Some(0), Some(true)), "{done}");
    assert_eq!(sent(&desk), before, "neither a part nor a completion");
    assert!(desk.kept().is_empty());
    desk.ok(&["get", "files/big", "back"]).await;
    assert_eq!(sha256(&desk.path("back")), sha256(&file));
}

async fn a_source_replaced_while_it_goes_to_standard_output_is_noticed(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("one", 4 * MIB);
    desk.file("two", 4 * MIB);
    desk.ok(&["put", "one", "files/it"]).await;
    let (release, held) = watch::channel(false);
    let fetched = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&fetched);
    let (second, mut seconds) = watch::channel(false);
    let second = Arc::new(second);
    desk.relay.judge(move |seen| {
        let nth = if seen.is_fetch() { count.fetch_add(1, Ordering::Relaxed) } else { usize::MAX };
        let (mut held, second) = (held.clone(), Arc::clone(&second));
        async move {
            match nth {
                // Half of it comes.
                0 => Fate::Short,
                1 => {
                    second.send_replace(true);
                    let _ = held.wait_for(|go| *go).await;
                    Fate::Pass
                }
                _ => Fate::Pass,
            }
        }
    });
    let get = desk.start(&["get", "files/it", "-"]);
    let get = tokio::task::spawn_blocking(|| get.wait_with_output().unwrap());
    seconds.wait_for(|second| *second).await.unwrap();
    desk.ok(&["put", "two", "files/it"]).await;
    release.send_replace(true);
    let output = get.await.unwrap();
    let one = std::fs::read(desk.path("one")).unwrap();
    assert!(!output.stdout.is_empty() && one.starts_with(&output.stdout), "nothing of the other came through");
    let told = said(output, 1);
    assert!(told.contains("`files/it` was changed meanwhile"), "{told}");
    assert_eq!(fetched.load(Ordering::Relaxed), 2);
}

async fn keys_that_are_no_files_of_one_folder_are_refused(backend: Backend) {
    let desk = Desk::new(backend).await;
    for key in ["in/good", "in/both", "in/both-not", "in/both/x", "in/double//x"] {
        desk.plant(key, "x").await;
    }
    let told = desk.fails(&["get", "-r", "files/in/", "out", "--force"]).await;
    assert!(told.contains("`files/in/both/x` can't be a file in `out`: `both` would be both"), "{told}");
    assert!(told.contains("`files/in/double//x` can't be a file in `out`: it has an empty segment"), "{told}");
    assert!(told.ends_with("2 of 5 keys can't be files; nothing was written\n"), "{told}");
    assert!(!desk.path("out").exists());
    let told = desk.fails(&["get", "-r", "files/in/double/", "out"]).await;
    assert!(told.contains("empty segment") && !desk.path("out").exists(), "`/x` is absolute: {told}");
}

async fn keys_that_lead_elsewhere_are_refused(backend: Backend) {
    let desk = Desk::new(backend).await;
    for key in ["in/a", "in/../b", "in/..", "in/./c", "in/d/../../../e"] {
        desk.plant(key, "x").await;
    }
    std::fs::create_dir(desk.path("out")).unwrap();
    let told = desk.fails(&["get", "-r", "files/in/", "out", "--force"]).await;
    assert!(told.ends_with("4 of 5 keys can't be files; nothing was written\n"), "{told}");
    assert_eq!(told.matches("has a `.` or `..` segment").count(), 4, "{told}");
    assert!(names(&desk.path("out")).is_empty());
    // The service signs no such key, so that they stay; the others go.
    let told = desk.fails(&["rm", "-r", "files/in/"]).await;
    assert!(told.ends_with("4 of 5 failed\n"), "{told}");
    assert_eq!(desk.ok(&["ls", "files/in/", "-r"]).await.lines().count(), 4);
}

async fn more_files_than_can_be_open(backend: Backend) {
    let desk = Desk::new(backend).await;
    std::fs::create_dir(desk.path("dir")).unwrap();
    let files: Vec<_> = (0..100).map(|n| format!("dir/f{n}")).collect();
    for name in &files {
        std::fs::write(desk.path(name), name).unwrap();
    }
    let mut named = vec!["put"];
    named.extend(files.iter().map(String::as_str).chain(["files/named/"]));
    for arguments in [&named[..], &["put", "-r", "dir", "files/in/"], &["get", "-r", "files/in/", "back"]] {
        let output = desk.limited("ulimit -n 40", arguments).await;
        let lines = String::from_utf8_lossy(&output.stdout).lines().count();
        said(output, 0);
        assert_eq!(lines, 100, "{}", arguments.last().unwrap());
    }
    assert_eq!(tree(&desk.path("back")), tree(&desk.path("dir")));
}

async fn an_interrupted_folder_is_gone_on_with(backend: Backend) {
    let desk = Desk::new(backend).await;
    std::fs::create_dir(desk.path("dir")).unwrap();
    for n in 0..8 {
        desk.file(&format!("dir/f{n}"), 1000);
    }
    // Two go through, and the others wait for ever.
    let hold = |method: &'static str| {
        let count = AtomicUsize::new(0);
        desk.relay.judge(move |seen| {
            let counts = seen.method == method && (method != "GET" || seen.is_fetch());
            let passes = !counts || count.fetch_add(1, Ordering::Relaxed) < 2;
            async move { if passes { Fate::Pass } else { std::future::pending().await } }
        });
    };
    hold("PUT");
    let put = desk.start(&["put", "-r", "dir", "files/in/"]);
    desk.relay.until(|done| done.iter().filter(|seen| seen.method == "PUT").count() == 2).await;
    kill(&put, "-INT");
    let told = said(end(put).await, 1);
    assert!(told.contains("interrupted; the same command with --resume goes on with it"), "{told}");
    desk.relay.judge(|_| async { Fate::Pass });
    let told = desk.ok(&["put", "-r", "dir", "files/in/", "--resume"]).await;
    assert_eq!(told.lines().filter(|line| line.ends_with("  was there")).count(), 2, "{told}");

    hold("GET");
    let before = desk.relay.done().len();
    let get = desk.start(&["get", "-r", "files/in/", "back"]);
    desk.relay.until(|done| done[before..].iter().filter(|seen| seen.is_fetch()).count() == 2).await;
    kill(&get, "-TERM");
    let told = said(end(get).await, 1);
    assert!(told.contains("interrupted; nothing is left of the files that were not complete"), "{told}");
    for (path, bytes) in tree(&desk.path("back")) {
        assert!(bytes == std::fs::read(desk.path("dir").join(&path)).unwrap(), "{}", path.display());
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
        tokio::time::sleep(Duration::from_millis(5)).await;
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

async fn an_upload_that_somebody_else_ended_is_over(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("big", 40 * MIB);
    let release = desk.hold_after_two_parts();
    let put = desk.start(&["put", "big", "files/big"]);
    desk.two_parts().await;
    let s3 = desk.stage.s3(desk.credentials.clone());
    let open = s3.list_multipart_uploads().bucket(&desk.stage.bucket).send().await.unwrap();
    let id = open.uploads()[0].upload_id().unwrap();
    s3.abort_multipart_upload().bucket(&desk.stage.bucket).key("big").upload_id(id).send().await.unwrap();
    release.send_replace(true);
    let told = said(end(put).await, 1);
    assert!(told.contains("`big`: S3 answers 404 NoSuchUpload"), "{told}");
    assert!(!told.contains("--resume") && !told.contains("S3 keeps"), "there is nothing left: {told}");
    assert!(desk.kept().is_empty());
}

async fn a_checksum_of_parts_only_is_told(backend: Backend) {
    use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
    let desk = Desk::new(backend).await;
    let (s3, bucket) = (desk.stage.s3(desk.credentials.clone()), &desk.stage.bucket);
    let sha256 = ChecksumAlgorithm::Sha256;
    let begun = s3.create_multipart_upload().bucket(bucket).key("parts").checksum_algorithm(sha256.clone());
    let id = begun.send().await.unwrap().upload_id.unwrap();
    let body = aws_sdk_s3::primitives::ByteStream::from_static(b"in one part");
    let part = s3.upload_part().bucket(bucket).key("parts").upload_id(&id).part_number(1).checksum_algorithm(sha256);
    let part = part.body(body).send().await.unwrap();
    let part =
        CompletedPart::builder().part_number(1).set_e_tag(part.e_tag).set_checksum_sha256(part.checksum_sha256).build();
    let parts = CompletedMultipartUpload::builder().parts(part).build();
    let done = s3.complete_multipart_upload().bucket(bucket).key("parts").upload_id(&id).multipart_upload(parts);
    done.send().await.unwrap();
    let told = desk.ok(&["get", "files/parts"]).await;
    assert_eq!(told, "parts  11 bytes  only the size was verified: S3 has no checksum of the whole\n");
    assert_eq!(desk.json(&["get", "files/parts", "again"]).await["checksum"], Value::Null);
}

async fn only_regular_files_are_replaced_and_keep_their_mode(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.plant("small", "new").await;
    assert!(Command::new("mkfifo").arg(desk.path("pipe")).status().unwrap().success());
    std::os::unix::fs::symlink("pipe", desk.path("link")).unwrap();
    std::fs::create_dir_all(desk.path("dir/small")).unwrap();
    for target in ["pipe", "link"] {
        for force in [&["--force"][..], &[]] {
            let told = desk.fails(&[&["get", "files/small", target], force].concat()).await;
            let right = format!("`{target}` must be a regular file, or not be there: `get files/small - > {target}`");
            assert!(told.contains(&right), "{told}");
            assert!(!desk.path("pipe").metadata().unwrap().is_file(), "{target} was replaced");
        }
    }
    let told = desk.fails(&["get", "files/small", "/dev/null"]).await;
    assert!(told.contains("`/dev/null` must be a regular file") && !told.contains("--force"), "{told}");
    let told = desk.fails(&["get", "files/small", "dir", "--force"]).await;
    assert!(told.contains("`dir/small` is a folder: it must be a file"), "{told}");
    assert_eq!(names(&desk.path("dir")), ["small"], "nothing else is left");

    // More than a umask would leave, and less.
    for mode in [0o666, 0o600, 0o400, 0o751] {
        std::fs::remove_file(desk.path("mine")).ok();
        std::fs::write(desk.path("mine"), "old").unwrap();
        std::fs::set_permissions(desk.path("mine"), std::fs::Permissions::from_mode(mode)).unwrap();
        desk.ok(&["get", "files/small", "mine", "--force"]).await;
        assert_eq!(std::fs::read(desk.path("mine")).unwrap(), b"new");
        assert_eq!(desk.path("mine").metadata().unwrap().permissions().mode() & 0o7777, mode, "{mode:o}");
    }
}

async fn a_file_that_can_not_be_written_is_named(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.file("big", 2 * MIB);
    desk.ok(&["put", "big", "files/"]).await;
    // As on a full disk.
    let told = said(desk.limited("trap '' XFSZ && ulimit -f 64", &["get", "files/big", "back"]).await, 1);
    assert!(told.contains("`back`: File too large"), "{told}");
    assert!(!names(desk.folder.path()).iter().any(|name| name.contains("back")), "nothing is left");
    let mut get = desk.command(&["get", "files/big", "-"]);
    get.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap()).stderr(Stdio::piped());
    let told = said(end(get.spawn().unwrap()).await, 1);
    assert!(told.contains("standard output: No space left"), "{told}");
}

async fn names_do_not_move_the_cursor(backend: Backend) {
    let desk = Desk::new(backend).await;
    let name = "a\nb\x1b[31mc\u{9b}d";
    let shown = "a\u{fffd}b\u{fffd}[31mc\u{fffd}d";
    std::fs::create_dir(desk.path("dir")).unwrap();
    desk.file(name, 10);
    desk.file(&format!("dir/{name}"), 10);
    std::os::unix::fs::symlink("/", desk.path("dir").join("\x1b")).unwrap();
    desk.ok(&["put", name, "files/x"]).await;
    let got = desk.ok(&["get", "files/x", name, "--force"]).await;
    assert!(got.starts_with(&format!("{shown}  10 bytes")), "{got:?}");
    desk.relay.judge(|seen| async move { if seen.method == "PUT" { Fate::Status(400) } else { Fate::Pass } });
    let missing = format!("{name}?");
    for (arguments, code, part) in [
        (&["get", "files/x", name][..], 1, shown),
        (&["put", name, "files/x"], 1, shown),
        (&["put", name, "files/"], 1, "control"),
        (&["put", &missing, "files/x"], 1, shown),
        (&["put", "-r", "dir", "files/"], 1, "`dir/\u{fffd}`: a link to a folder"),
        (&["put", "-r", name, "files/"], 64, shown),
    ] {
        let told = said(desk.run(arguments).await, code);
        assert!(told.contains(part), "{told:?}");
        assert!(!told.replace('\n', "").chars().any(char::is_control), "{told:?}");
        assert!(told.lines().all(|line| line.starts_with("fileaccess: ")), "{told:?}");
    }
}

async fn two_puts_of_one_file_do_not_disturb_each_other(backend: Backend) {
    let desk = Desk::new(backend).await;
    let file = desk.file("big", 40 * MIB);
    let release = desk.hold_after_two_parts();
    let first = desk.start(&["put", "big", "files/big"]);
    desk.two_parts().await;
    for option in [&[][..], &["--resume"]] {
        // One that sent something would be held too.
        let second = [&["put", "big", "files/big"], option].concat();
        let told = tokio::time::timeout(Duration::from_mins(1), desk.fails(&second)).await.expect("an end");
        assert!(told.contains("`big`: another `put` is sending it to `files/big`; wait for that"), "{told}");
    }
    assert_eq!((desk.kept().len(), desk.open_uploads().await), (1, 1), "that of the first");
    release.send_replace(true);
    said(end(first).await, 0);
    assert!(desk.kept().is_empty());
    desk.ok(&["get", "files/big", "back"]).await;
    assert_eq!(sha256(&desk.path("back")), sha256(&file));
    // One after the other is fine, and so is where nothing can be kept.
    desk.ok(&["put", "big", "files/big"]).await;
    std::fs::remove_dir_all(desk.path("state")).unwrap();
    std::fs::write(desk.path("state"), "no folder").unwrap();
    let told = said(desk.run(&["put", "big", "files/big"]).await, 0);
    assert!(told.contains("`big`: the upload can't be resumed later: "), "{told}");
}

async fn a_service_that_gives_no_sign_of_life_is_told(backend: Backend) {
    let desk = Desk::new(backend).await;
    desk.plant("small", "small").await;
    // The system takes connections, and nobody speaks on them.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", mute.local_addr().unwrap());
    let url = desk.start(&["url", "files/small", "--server", &address]);

    let impatient = Server { patience: Duration::from_secs(1), ..Server::default() };
    let client = Client::connect(&Server { address: address.clone(), ..impatient.clone() }).unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(15), client.stat("files", "small")).await;
    let told = answer.expect("an end").unwrap_err().to_string();
    assert!(told.starts_with("the service can't be reached: ") && told.contains("keep-alive timed out"), "{told}");

    // One that lives may take its time.
    let begun = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&begun);
    desk.relay.judge(move |seen| {
        if seen.method == "HEAD" {
            count.fetch_add(1, Ordering::Relaxed);
        }
        async {
            tokio::time::sleep(Duration::from_millis(2500)).await;
            Fate::Pass
        }
    });
    let client = Client::connect(&Server { address: desk.server.clone(), ..impatient }).unwrap();
    assert_eq!(client.stat("files", "small").await.unwrap().size, 5);
    assert_eq!(begun.load(Ordering::Relaxed), 1, "it was asked once");

    let url = tokio::time::timeout(Duration::from_mins(1), end(url)).await.expect("an end");
    let told = said(url, 1);
    assert!(told.contains("the service can't be reached: ") && told.contains("keep-alive timed out"), "{told}");
}

async fn a_life_in_fractions_of_seconds_is_refused(backend: Backend) {
    let desk = Desk::new(backend).await;
    let told = said(desk.run(&["url", "files/small", "--ttl", "1500ms"]).await, 64);
    assert!(told.contains("'1500ms' for '--ttl <DURATION>': must be 1 second to 7 days, in whole seconds"), "{told}");
    desk.ok(&["url", "files/small", "--ttl", "1500ms 500ms"]).await;
    let client = Client::connect(&Server { address: desk.server.clone(), ..Server::default() }).unwrap();
    let operation = fileaccess::pb::presign_request::Operation::Download(fileaccess::pb::Download::default());
    let ttl = Some(Duration::from_millis(1500));
    let refused = client.presign("files", "small", ttl, operation).await.unwrap_err();
    assert_eq!(refused.reason().as_deref(), Some("INVALID_FIELD"), "{refused}");
}
