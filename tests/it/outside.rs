//! The service as a process of its own, and what its log tells.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::binary;

/// How long a line of the log may take to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running `fileaccess serve`, ended with the test.
pub struct Service {
    process: Child,
    log: mpsc::UnboundedReceiver<String>,
    /// Where it listens, as its log says.
    pub address: String,
}

impl Service {
    /// Starts it with a store that is down, which presigning does not need, and
    /// `more` settings.
    pub async fn start(folder: &Path, listen: &str, more: &str) -> Self {
        Self::start_with(folder, &(binary::settings(listen, "http://127.0.0.1:9") + more)).await
    }

    /// The same on loopback, with these `limits` as well.
    pub async fn start_limited(folder: &Path, limits: &str, more: &str) -> Self {
        let settings = binary::settings("127.0.0.1:0", "http://127.0.0.1:9");
        let limited = settings.replace("[limits]\n", &format!("[limits]\n{limits}\n"));
        assert_ne!(limited, settings, "they have limits");
        Self::start_with(folder, &(limited + more)).await
    }

    /// Starts it with these settings.
    pub async fn start_with(folder: &Path, settings: &str) -> Self {
        let mut command = binary::serve(folder, settings, &[]);
        command.env("FILEACCESS_LOG", "warn,fileaccess=debug").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("the binary");
        let stderr = process.stderr.take().expect("a pipe");
        let (line, log) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            // Reads to the end even if nobody listens, so that the pipe never fills up.
            for text in BufReader::new(stderr).lines().map_while(Result::ok) {
                let _ = line.send(text);
            }
        });
        let mut service = Self { process, log, address: String::new() };
        let listening = service.logged(&["\"listening\""]).await;
        let line: serde_json::Value = serde_json::from_str(&listening).expect("a line of JSON");
        line["address"].as_str().expect("an address").clone_into(&mut service.address);
        service
    }

    /// Asks it to drain and end.
    pub fn terminate(&self) {
        let killed = Command::new("kill").args(["-TERM", &self.process.id().to_string()]).status().expect("kill");
        assert!(killed.success());
    }

    /// Waits for a line of the log that has all of `parts`, and gives it. Lines
    /// before it are gone.
    pub async fn logged(&mut self, parts: &[&str]) -> String {
        loop {
            let line = tokio::time::timeout(PATIENCE, self.log.recv()).await;
            let Ok(Some(line)) = line else { panic!("the log never had {parts:?}") };
            if parts.iter().all(|part| line.contains(part)) {
                return line;
            }
        }
    }

    /// Who has made the call that is logged next.
    pub async fn caller(&mut self) -> String {
        let line = self.logged(&["\"name\":\"rpc\"", "duration_us"]).await;
        let line: serde_json::Value = serde_json::from_str(&line).expect("a line of JSON");
        line["span"]["caller"].as_str().unwrap_or_default().to_owned()
    }

    /// Resident memory, in KiB.
    pub fn resident(&self) -> i64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("a process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
