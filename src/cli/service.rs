//! Which service a subcommand asks, and how it prints.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use serde_json::Value;

use super::Failure;
use crate::client::{self, Client, Error};

/// Which service is asked, and how its answers are printed.
#[derive(Args)]
pub(super) struct Server {
    /// The service: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:50051", env = "FILEACCESS_SERVER")]
    #[allow(clippy::struct_field_names, reason = "it is the option's name")]
    pub(super) server: String,
    /// With https: the PEM file of the authority that has signed the service's
    /// certificate.
    #[arg(long, value_name = "FILE", env = "FILEACCESS_CA")]
    ca: Option<PathBuf>,
    /// With https: the PEM file of our own certificate.
    #[arg(long, value_name = "FILE", requires = "key", env = "FILEACCESS_CERTIFICATE")]
    certificate: Option<PathBuf>,
    /// With https: the PEM file of its key.
    #[arg(long, value_name = "FILE", requires = "certificate", env = "FILEACCESS_KEY")]
    key: Option<PathBuf>,
    /// One JSON object a line.
    #[arg(long)]
    pub(super) json: bool,
}

impl Server {
    pub(super) fn connect(&self) -> Result<Client, Failure> {
        if self.server.starts_with("https:") && self.ca.is_none() {
            return Err(Failure::usage("--ca is needed with https"));
        }
        let server = client::Server {
            address: self.server.clone(),
            ca: self.ca.clone(),
            identity: self.certificate.clone().zip(self.key.clone()),
            ..client::Server::default()
        };
        Ok(Client::connect(&server)?)
    }

    /// Prints `value` as JSON, or else the lines of `text`. What was done is done:
    /// that it can't be told ends nothing, but the exit code says so.
    pub(super) fn print(&self, value: impl FnOnce() -> Value, text: impl FnOnce() -> String) {
        let mut line = if self.json { value().to_string() } else { text() };
        line.push('\n');
        let mut out = io::stdout().lock();
        match out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => {}
            // Nobody reads on, as behind `| head`.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => {
                eprintln!("fileaccess: standard output: {error}");
                UNTOLD.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Whether something could not be printed.
static UNTOLD: AtomicBool = AtomicBool::new(false);

/// Whether all was printed that was to be.
pub(super) fn all_told() -> bool {
    !UNTOLD.load(Ordering::Relaxed)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Settings(wrong) => Self::usage(format!("--{wrong}")),
            error => {
                // The service is not there.
                let is_last = matches!(error, Error::Service(_)) && error.code().is_none();
                Self { is_last, ..Self::running(error) }
            }
        }
    }
}
