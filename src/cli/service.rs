//! Which service a subcommand asks, and how it prints.

use std::path::PathBuf;

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

    /// Prints `value` as JSON, or else the lines of `text`.
    pub(super) fn print(&self, value: impl FnOnce() -> Value, text: impl FnOnce() -> String) {
        if self.json {
            println!("{}", value());
        } else {
            println!("{}", text());
        }
    }
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
