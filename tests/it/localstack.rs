//! The one LocalStack of a test run: a process that ends with this one.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{LazyLock, mpsc};
use std::time::Duration;

use crate::tools;

/// How long it may take to start. It takes some 5 seconds.
const PATIENCE: Duration = Duration::from_secs(120);

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
        let python = tools::program("python")?;
        let mut last = String::new();
        // Somebody else may take the port between our look and its bind.
        for _ in 0..3 {
            match start(&python) {
                Ok(running) => return Ok(running),
                Err(error) => last = error,
            }
        }
        Err(last)
    });
    SHARED.as_ref().map_err(String::as_str)
}

fn start(python: &Path) -> Result<LocalStack, String> {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string())?.port();
    let folder = tools::target().join("localstack");
    let root = folder.join(format!("run-{}-{port}", std::process::id()));
    let scripts = root.join("etc/localstack/init/ready.d");
    fs::create_dir_all(&scripts).map_err(|e| e.to_string())?;
    fs::copy(tools::sources().join("key_status.py"), scripts.join("key_status.py")).map_err(|e| e.to_string())?;
    let log_path = folder.join(format!("run-{}-{port}.log", std::process::id()));
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
            ("PYTHONUNBUFFERED", "1"),
        ])
        .env("FILESYSTEM_ROOT", &root)
        .env("GATEWAY_LISTEN", format!("127.0.0.1:{port}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log.try_clone().map_err(|e| e.to_string())?)
        .spawn()
        .map_err(|e| e.to_string())?;
    let stdin = child.stdin.take().ok_or("no standard input")?;
    let stdout = child.stdout.take().ok_or("no standard output")?;

    let (ready, is_ready) = mpsc::channel();
    std::thread::spawn(move || {
        // Goes on reading after that line, so that the pipe never fills up.
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if line == "KEY-STATUS-READY" {
                let _ = ready.send(());
            }
            let _ = writeln!(log, "{line}");
        }
    });
    let endpoint = format!("http://127.0.0.1:{port}");
    // An end of the process closes the channel, and so ends the wait too.
    if is_ready.recv_timeout(PATIENCE).is_ok() && healthy(port) {
        return Ok(LocalStack { endpoint, _alive: Some((child, stdin)) });
    }
    drop(stdin);
    let _ = child.wait();
    let _ = fs::remove_dir_all(&root);
    let log = fs::read_to_string(&log_path).unwrap_or_default();
    let tail: Vec<_> = log.lines().rev().take(15).collect();
    let tail: Vec<_> = tail.into_iter().rev().collect();
    Err(format!("LocalStack did not start; {} ends:\n{}", log_path.display(), tail.join("\n")))
}

fn healthy(port: u16) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.write_all(b"GET /_localstack/health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    ask().is_ok_and(|answer| answer.split_whitespace().nth(1) == Some("200"))
}
