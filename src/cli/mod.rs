//! The subcommands, one function each.

mod bootstrap;
mod files;
mod folder;
mod operate;
mod put;
mod service;
mod stored;
mod trace;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::app::{App, Sources};
use crate::client::printable;
use crate::config::Settings;
use crate::policy::reread::{SettingsFile, warn_if_none};
use crate::server::{self, Listener};
use crate::store::cors::Origin;
use crate::telemetry;
use crate::tls::Tls;

/// All went as asked.
pub const EXIT_OK: u8 = 0;
/// Something failed while running.
pub const EXIT_FAILURE: u8 = 1;
/// Bad usage or settings: `EX_USAGE` of BSD's `sysexits`.
pub const EXIT_USAGE: u8 = 64;

/// Hands out S3 presigned URLs over gRPC. No file byte passes through it.
#[derive(Parser)]
#[command(name = "fileaccess", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Try it out: the service with an S3 of its own, without account,
    /// settings or network.
    #[cfg(feature = "dev")]
    Dev(crate::dev::Options),
    /// See it work: tells the whole story against a `dev` of its own, and ends
    /// with 0 only if all went as told.
    #[cfg(feature = "dev")]
    Demo,
    /// Upload files.
    Put(put::Put),
    /// Download files.
    Get(files::Get),
    /// List what is stored.
    Ls(files::Ls),
    /// Print a presigned URL.
    Url(files::Url),
    /// Remove files.
    Rm(files::Rm),
    /// Run the service.
    Serve {
        /// The settings file (TOML). Variables `FILEACCESS_SECTION__FIELD`
        /// override it.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Only check the settings.
        #[arg(long)]
        check: bool,
    },
    /// End URLs that are already out, and wait for the proof.
    Revoke(operate::Revoke),
    /// Tell what a presigned URL is, and whether it is good.
    Inspect(operate::Inspect),
    /// List the signers: whose keys sign which URLs.
    Signers(service::Server),
    /// Tell who was given a URL: from the URL, its issue id, or lines of an S3
    /// server access log, with the audit trail.
    Trace(trace::Trace),
    /// Make what the `iam-user` signers of the settings need: the IAM users,
    /// their policies, and their first keys. Again does no harm.
    Bootstrap {
        /// The settings file (TOML).
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Change nothing: print the policies, of the signers and of the
        /// service's own identity.
        #[arg(long)]
        print_policies: bool,
        /// Let web pages of this origin use the URLs: adds a CORS rule to every
        /// bucket, or prints it with the policies. May be given again.
        #[arg(long, value_name = "ORIGIN")]
        cors: Vec<Origin>,
    },
}

/// Why a subcommand ended early, and with which exit code.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    code: u8,
    message: String,
    /// Whether whatever else is asked would fail too.
    is_last: bool,
}

impl Failure {
    /// Bad usage or settings.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self { code: EXIT_USAGE, message: message.to_string(), is_last: false }
    }

    /// A failure while running.
    pub fn running(message: impl fmt::Display) -> Self {
        Self { code: EXIT_FAILURE, message: message.to_string(), is_last: false }
    }

    /// The same, as that of one thing of several.
    fn of(self, name: &str) -> Self {
        Self { message: format!("`{}`: {}", printable(name), self.message), ..self }
    }
}

/// Parses the command line, and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors. A closed standard output is nobody's loss.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { EXIT_OK });
        }
    };
    let ended = match cli.command {
        #[cfg(feature = "dev")]
        Command::Dev(options) => {
            telemetry::init("info,fileaccess=debug,s3s=off,s3s_fs=warn");
            block_on(crate::dev::run(options))
        }
        #[cfg(feature = "dev")]
        Command::Demo => {
            telemetry::init("warn,s3s=off");
            block_on(crate::dev::demo::run())
        }
        Command::Serve { config, check } => {
            telemetry::init("info");
            load(config).and_then(|(settings, file)| {
                if check {
                    println!("settings are good");
                    return Ok(());
                }
                block_on(serve(settings, file))
            })
        }
        Command::Put(ask) => interruptible(put::run(ask)),
        Command::Get(ask) => interruptible(files::get(ask)),
        Command::Ls(ask) => block_on(files::ls(ask)),
        Command::Url(ask) => block_on(files::url(ask)),
        Command::Rm(ask) => block_on(files::rm(ask)),
        Command::Revoke(ask) => block_on(operate::revoke(ask)),
        Command::Inspect(ask) => block_on(operate::inspect(ask)),
        Command::Signers(server) => block_on(operate::signers(&server)),
        Command::Trace(ask) => {
            telemetry::init("warn");
            trace::run(&ask)
        }
        Command::Bootstrap { config, print_policies, cors } => {
            telemetry::init("warn");
            load(config).and_then(|(settings, _)| {
                if print_policies {
                    return bootstrap::print_policies(&settings, &cors);
                }
                block_on(bootstrap::run(settings, &cors))
            })
        }
    };
    match ended {
        Ok(()) => ExitCode::from(if service::all_told() { EXIT_OK } else { EXIT_FAILURE }),
        Err(Failure { code, message, .. }) => {
            eprintln!("fileaccess: {message}");
            ExitCode::from(code)
        }
    }
}

fn load(path: PathBuf) -> Result<(Settings, SettingsFile), Failure> {
    let text = std::fs::read_to_string(&path)
        .map_err(|e| Failure::usage(format!("settings file `{}`: {e}", path.display())))?;
    let env: BTreeMap<String, String> =
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
    let settings =
        Settings::load(&text, &env).map_err(|e| Failure::usage(format!("settings file `{}`:\n{e}", path.display())))?;
    Ok((settings, SettingsFile { path, env, text }))
}

async fn serve(settings: Settings, file: SettingsFile) -> Result<(), Failure> {
    let shutdown = shutdown_signal().map_err(Failure::running)?;
    let tls = settings.tls.as_ref().map(Tls::load).transpose().map_err(Failure::usage)?;
    let sources = Sources::of(&settings).await;
    let app = App::start(&settings, sources)
        .await
        .map_err(|e| Failure::running(format!("the audit trail can't be begun: {e}")))?;
    let not_listening = |e| Failure::running(format!("can't listen on `{}`: {e}", settings.listen));
    let mut listener = Listener::bind(&settings.listen).await.map_err(not_listening)?;
    if let Some(tls) = tls {
        listener = listener.with_tls(tls);
    } else if let Some(sidecar) = &settings.trusted_sidecar {
        listener = listener.behind(sidecar).map_err(not_listening)?;
    }
    warn_if_none(&app.policy);
    if settings.uploads.token_key.is_none() {
        tracing::warn!("no `uploads.token_key`: an upload in parts can't be gone on with on another replica");
    }
    tracing::info!(address = listener.address().unwrap_or_default(), "listening");
    let policy = Arc::clone(&app);
    tokio::select! {
        served = server::run(listener, app, shutdown) => served.map_err(Failure::running),
        // Ends only if it can't begin.
        kept = file.keep(&policy.policy) => kept.map_err(Failure::running),
    }
}

/// Resolves at SIGTERM or SIGINT. The handlers are in place when it returns.
///
/// # Errors
/// Those of the system.
pub fn shutdown_signal() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// As [`block_on`], without waiting in the end for a thread that reads or writes
/// what may never come or go.
fn interruptible(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::running)?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}

/// One thread accepts and keeps the keys; the threads of [`server::run`] serve.
fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::running)?;
    runtime.block_on(work)
}
