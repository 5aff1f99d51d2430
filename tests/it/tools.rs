//! The programs that the tests drive, in a virtual environment under
//! `target/`: made once, used by every run after.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

/// Cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from)
}

/// Where the tools' own files are.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools")
}

/// A program of the virtual environment, which is made if need be.
///
/// # Errors
/// Why it can't be had here, for the report of what was skipped.
pub fn program(name: &str) -> Result<PathBuf, &'static str> {
    static BIN: LazyLock<Result<PathBuf, String>> = LazyLock::new(environment);
    BIN.as_ref().map(|bin| bin.join(name)).map_err(String::as_str)
}

/// The folder of the environment's programs.
fn environment() -> Result<PathBuf, String> {
    let requirements = sources().join("requirements.txt");
    let wanted = fs::read(&requirements).map_err(|e| format!("{}: {e}", requirements.display()))?;
    let folder = target().join("tools");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    // Two test processes at once must not both build it.
    let lock = File::create(folder.join("lock")).map_err(|e| e.to_string())?;
    lock.lock().map_err(|e| e.to_string())?;

    let venv = folder.join("venv");
    let bin = venv.join("bin");
    // Written last, so that an interrupted installation is made anew.
    let made = venv.join("requirements.made");
    if fs::read(&made).is_ok_and(|had| had == wanted) {
        return Ok(bin);
    }
    eprintln!("making the tests' Python environment under {}, once: about a minute", venv.display());
    let _ = fs::remove_dir_all(&venv);
    run(Command::new(base_python()?).args(["-m", "venv"]).arg(&venv))?;
    run(Command::new(bin.join("python"))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
        .arg(&requirements))?;
    fs::write(&made, wanted).map_err(|e| e.to_string())?;
    Ok(bin)
}

fn base_python() -> Result<&'static str, String> {
    let fits = |python: &&str| {
        let check = "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))";
        Command::new(python).args(["-c", check]).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    ["python3", "python3.11", "python3.12", "python3.13"].into_iter().find(fits).ok_or_else(|| {
        "the tests' tools need Python 3.11 to 3.13 with venv and pip: install python3 and python3-venv".into()
    })
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}
