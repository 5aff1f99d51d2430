//! How fast `fileaccess put` and `get` move a sparse file to and from the S3 of
//! `fileaccess dev`, next to curl with one presigned URL, and how much memory
//! they take. Fails above [`MAX_KIB`], or where the bytes are not the same.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, missing_docs, reason = "a benchmark")]

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

/// The most memory that `put` and `get` may take.
const MAX_KIB: u64 = 96 << 10;

fn main() {
    let mib: u64 = std::env::var("THROUGHPUT_MIB").map_or(2048, |mib| mib.parse().expect("THROUGHPUT_MIB: MiB"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("sparse");
    std::fs::File::create(&file).expect("a file").set_len(mib << 20).expect("a file of that size");
    let back = folder.path().join("back");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    drop(listener);
    let mut dev = Dev::start(folder.path(), &address);
    let (file, back) = (file.to_str().expect("UTF-8"), back.to_str().expect("UTF-8"));
    println!("{mib} MiB, S3 of `fileaccess dev` on the same machine");

    if Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_ok() {
        let url = output(fileaccess(&address, &["url", "--upload", "demo/curl"]));
        dev.measure("curl -T, one PUT", mib, curl(&["-T", file, url.trim()]));
        let url = output(fileaccess(&address, &["url", "demo/curl"]));
        dev.measure("curl -o, one GET", mib, curl(&["-o", back, url.trim()]));
    } else {
        eprintln!("SKIPPED for want of curl: the comparison");
    }
    let put = dev.measure("fileaccess put", mib, fileaccess(&address, &["put", file, "demo/put"]));
    let get = dev.measure("fileaccess get", mib, fileaccess(&address, &["get", "demo/put", back, "--force"]));
    assert!(sha256(Path::new(back)) == sha256(Path::new(file)), "other bytes have come back");
    assert!(put <= MAX_KIB && get <= MAX_KIB, "more than {MAX_KIB} KiB");
}

struct Dev(Child);

impl Dev {
    fn start(folder: &Path, address: &str) -> Self {
        let mut command = fileaccess(address, &["dev", "--listen", address, "--data"]);
        command.arg(folder.join("data")).stderr(Stdio::piped());
        let mut dev = Self(command.spawn().expect("the binary"));
        let mut log = BufReader::new(dev.0.stderr.take().expect("a pipe")).lines();
        assert!(log.any(|line| line.expect("a line").contains("listening")), "dev did not start");
        // Read to its end, so that the pipe never fills up.
        std::thread::spawn(move || log.for_each(drop));
        dev
    }

    /// Prints what it took, and gives its peak of memory in KiB.
    fn measure(&mut self, name: &str, mib: u64, mut command: Command) -> u64 {
        let before = cpu(self.0.id());
        let begun = Instant::now();
        let mut child = command.stdout(Stdio::null()).spawn().expect("a program");
        let (mut peak, mut own) = (0, 0.0);
        let status = loop {
            if let Some(now) = memory(child.id()) {
                (peak, own) = (now, cpu(child.id()));
            }
            match child.try_wait().expect("a child") {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let took = begun.elapsed().as_secs_f64();
        assert!(status.success(), "{name}: {status}");
        let server = cpu(self.0.id()) - before;
        let rate = f64::from(u32::try_from(mib).expect("MiB")) * 1.048_576 / took;
        println!(
            "{name:<18} {took:6.2} s  {rate:6.0} MB/s  {:5.1} MiB at most  {own:5.2} s of CPU, S3 and service {server:.2} s",
            f64::from(u32::try_from(peak).expect("KiB")) / 1024.0
        );
        peak
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn fileaccess(address: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fileaccess"));
    command.args(arguments).env("FILEACCESS_SERVER", format!("http://{address}")).stdin(Stdio::null());
    command.stdout(Stdio::null());
    command
}

fn curl(arguments: &[&str]) -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail"]).args(arguments);
    command
}

fn output(mut command: Command) -> String {
    let output = command.stdout(Stdio::piped()).output().expect("a program");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The peak of resident memory, in KiB.
fn memory(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// User and system time, in seconds, at the kernel's 100 ticks a second.
fn cpu(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11);
    let mut ticks = || fields.next().and_then(|ticks| ticks.parse::<u32>().ok()).unwrap_or_default();
    f64::from(ticks() + ticks()) / 100.0
}

fn sha256(path: &Path) -> Vec<u8> {
    let mut digest = Sha256::new();
    let mut file = std::fs::File::open(path).expect("a file");
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read(&mut bytes).expect("bytes") {
            0 => return digest.finalize().to_vec(),
            len => digest.update(&bytes[..len]),
        }
    }
}
