//! The one LocalStack of a test run: a process that ends with this one.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{LazyLock, mpsc};
use std::time::Duration;

use crate::tools;

/// How long it may take to start. It takes some 5 seconds.
const PATIENCE: Duration = Duration::from_mins(2);

/// A running LocalStack.
pub struct LocalStack {
    /// `http://ADDRESS:PORT`.
    pub endpoint: String,
    /// Holds it alive: it ends when the kernel closes this, at the latest when
    /// this process ends, however it ends.
    _alive: Option<(Child, ChildStdin)>,
}

/// The LocalStack of this process, started by the first who asks.
///
/// # Errors
/// Why it can't be had here, for the report of what was skipped.
pub fn shared() -> Result<&'static LocalStack, &'static str> {
    static SHARED: LazyLock<Result<LocalStack, String>> = LazyLock::new(|| {
        if let Ok(endpoint) = std::env::var("LOCALSTACK_ENDPOINT") {
            return Ok(LocalStack { endpoint: endpoint.trim_end_matches('/').to_owned(), _alive: None });
        }
        start(&tools::program("python")?)
    });
    SHARED.as_ref().map_err(String::as_str)
}

fn start(python: &Path) -> Result<LocalStack, String> {
    let folder = tools::target().join("localstack");
    let root = folder.join(format!("run-{}", std::process::id()));
    let scripts = root.join("etc/localstack/init/ready.d");
    fs::create_dir_all(&scripts).map_err(|e| e.to_string())?;
    fs::copy(tools::sources().join("key_status.py"), scripts.join("key_status.py")).map_err(|e| e.to_string())?;
    let log_path = root.with_extension("log");
    let mut log = File::create(&log_path).map_err(|e| e.to_string())?;

    let mut child = Command::new(python)
        .arg(tools::sources().join("run_localstack.py"))
        .envs([
            ("OVERRIDE_IN_DOCKER", "0"),
            // Without this it accepts any signature.
            ("S3_SKIP_SIGNATURE_VALIDATION", "0"),
            ("EAGER_SERVICE_LOADING", "0"),
            ("DISABLE_EVENTS", "1"),
            ("SKIP_SSL_CERT_DOWNLOAD", "1"),
            ("DNS_ADDRESS", "0"),
        ])
        .env("FILESYSTEM_ROOT", &root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log.try_clone().map_err(|e| e.to_string())?)
        .spawn()
        .map_err(|e| e.to_string())?;
    let stdin = child.stdin.take().ok_or("no standard input")?;
    let stdout = child.stdout.take().ok_or("no standard output")?;

    let (ready, is_ready) = mpsc::channel();
    std::thread::spawn(move || {
        let mut address = None;
        // Goes on reading after it is ready, so that the pipe never fills up.
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = writeln!(log, "{line}");
            if let Some(listening) = line.strip_prefix("listening on ") {
                address = Some(listening.to_owned());
            } else if line == "KEY-STATUS-READY"
                && let Some(address) = address.take()
            {
                let _ = ready.send(address);
            }
        }
    });
    // An end of the process closes the channel, and so ends the wait too.
    if let Ok(address) = is_ready.recv_timeout(PATIENCE) {
        return Ok(LocalStack { endpoint: format!("http://{address}"), _alive: Some((child, stdin)) });
    }
    drop(stdin);
    let _ = child.wait();
    let log = fs::read_to_string(&log_path).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    let end = lines[lines.len().saturating_sub(15)..].join("\n");
    Err(format!("LocalStack did not start; `{}` ends:\n{end}", log_path.display()))
}
