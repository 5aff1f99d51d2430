//! `fileaccess dev` and `fileaccess demo`: the service with an S3 and an IAM
//! of its own. No account, no settings, no network.

pub mod cors;
pub mod demo;
pub mod forms;
mod http1;
pub mod iam;
pub mod s3;
pub mod web;

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::app::{App, KeySource, Sources};
use crate::cli::{Failure, shutdown_signal};
use crate::config::{AuditSettings, Listen, Settings};
use crate::ops::upload_token::TokenKey;
use crate::policy::grant::Action;
use crate::server::{self, Listener};
use crate::vault::memory::Memory;
use cors::Cors;
use iam::MemoryIam;

/// The seeded bucket.
pub const BUCKET: &str = "demo";
/// The signer of all of it but for its neighbour's keys.
pub const SIGNER: &str = "main";
/// The signer of the keys under the prefix of the same name.
pub const NEIGHBOUR: &str = "neighbour";

/// What `fileaccess dev` is told.
#[derive(clap::Args)]
pub struct Options {
    /// Keep the files in this folder. Without it they go into a temporary one,
    /// and with it at the end.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where the gRPC service listens: a loopback address or `unix:/PATH`.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50051", value_parser = Listen::parse)]
    pub listen: Listen,
    /// Where the embedded S3 listens: a loopback address. Port 0: any.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub s3_listen: SocketAddr,
    /// Where the page for browsers is: a loopback address. Port 0: any.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub web_listen: SocketAddr,
}

/// All of `dev`, listening but not serving gRPC yet.
pub struct Dev {
    /// Where gRPC listens.
    pub address: String,
    /// The embedded S3.
    pub s3: String,
    /// The page for browsers.
    pub web: String,
    /// The IAM behind it.
    pub iam: MemoryIam,
    /// The service's own key.
    pub identity: Credentials,
    /// The audit trail.
    pub audit: PathBuf,
    app: Arc<App>,
    listener: Listener,
    web_listener: TcpListener,
    stop: watch::Sender<bool>,
    _folder: Option<tempfile::TempDir>,
}

impl Dev {
    /// Starts the embedded S3 and binds the gRPC address.
    ///
    /// # Errors
    /// An address that is taken or not loopback, a folder that can't be used.
    pub async fn start(options: &Options) -> Result<Self, Failure> {
        if options.listen.is_remote() {
            return Err(Failure::usage(format!("--listen: `{}` is not loopback", options.listen)));
        }
        for (option, address) in [("--s3-listen", options.s3_listen), ("--web-listen", options.web_listen)] {
            if !address.ip().is_loopback() {
                return Err(Failure::usage(format!("{option}: `{address}` is not loopback")));
            }
        }
        let (root, folder) = if let Some(data) = &options.data {
            (data.clone(), None)
        } else {
            let folder = tempfile::Builder::new().prefix("fileaccess-dev-").tempdir().map_err(Failure::running)?;
            (folder.path().to_owned(), Some(folder))
        };
        std::fs::create_dir_all(root.join(BUCKET))
            .map_err(|e| Failure::running(format!("--data `{}`: {e}", root.display())))?;

        let iam = MemoryIam::default();
        iam.create_user("fileaccess").map_err(Failure::running)?;
        let identity = iam.create_access_key("fileaccess", std::time::SystemTime::now()).map_err(Failure::running)?;

        let (listener, address) = bind(options.s3_listen).await?;
        let s3 = format!("http://{address}");
        let (web_listener, address) = bind(options.web_listen).await?;
        let web = web::origins(address);
        let (stop, stopped) = watch::channel(false);
        let service = s3::service(&root, iam.clone()).map_err(Failure::running)?;
        serve_s3(listener, Cors::new(service, &web), stopped).map_err(Failure::running)?;

        let user = |signer: &str| format!("fileaccess-signer-{signer}");
        let file = |signer: &str| {
            format!(
                "[signers.{signer}]\nkind = 'iam-user'\nuser = '{}'\nvault = {{ file = '/in-memory' }}\n",
                user(signer)
            )
        };
        let actions = Action::ALL.map(|action| format!("'{action}'")).join(", ");
        let grant = |caller: &str| {
            format!("[[grants]]\ncaller = '{caller}'\nbucket = '{BUCKET}'\nprefix = ''\nactions = [{actions}]\n")
        };
        let mut settings = Settings::load(
            &format!(
                "[buckets.{BUCKET}]\nbucket = '{BUCKET}'\nregion = 'us-east-1'\nendpoint = '{s3}'\npath_style = true\n\
                 {}{}[[routes]]\nbucket = '{BUCKET}'\nsigner = '{SIGNER}'\n\
                 [[routes]]\nbucket = '{BUCKET}'\nprefix = '{NEIGHBOUR}/'\nsigner = '{NEIGHBOUR}'\n\
                 {}{}[rotation]\nrefresh = '200ms'\nlease = '1s'\npoll = '20ms'\n\
                 [limits]\nworkers = 1\ndrain = '0s'\ngrace = '5s'\n",
                file(SIGNER),
                file(NEIGHBOUR),
                grant("loopback"),
                grant(&format!("uid:{}", rustix::process::getuid().as_raw())),
            ),
            &BTreeMap::new(),
        )
        .map_err(Failure::running)?;
        settings.listen = options.listen.clone();
        // Standard output is for what is to be pasted.
        let audit = root.canonicalize().map_err(Failure::running)?.join("audit.jsonl");
        settings.audit = AuditSettings { stdout: false, file: Some(audit.clone()), ..AuditSettings::default() };
        let mut signers = BTreeMap::new();
        for signer in [SIGNER, NEIGHBOUR] {
            let user = user(signer);
            iam.create_user(&user).map_err(Failure::running)?;
            // Everything is of this process, and ends with it: so may the vault.
            let (vault, issuer) = (Arc::new(Memory::default()), Arc::new(iam.clone()));
            signers.insert(signer.to_owned(), KeySource::IamUser { user, vault, issuer });
        }
        let sources =
            Sources { identity: SharedCredentialsProvider::new(identity.clone()), signers, tokens: TokenKey::random() };
        let app = App::start(&settings, sources).await.map_err(Failure::running)?;
        for keeper in app.keepers.values() {
            // Makes the first key.
            keeper.finish().await;
        }
        let listener = Listener::bind(&settings.listen)
            .await
            .map_err(|e| Failure::running(format!("can't listen on `{}`: {e}", settings.listen)))?;
        let address = listener.address().map_err(Failure::running)?;
        let [web, _] = web;
        Ok(Self { address, s3, web, iam, identity, audit, app, listener, web_listener, stop, _folder: folder })
    }

    /// Serves gRPC and the page until `shutdown`, then stops the embedded S3 too.
    ///
    /// # Errors
    /// Those of [`server::run`].
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), Failure> {
        let page = web::serve(self.web_listener, Arc::clone(&self.app), stop_of(self.stop.subscribe()));
        tokio::spawn(page);
        let served = server::run(self.listener, self.app, shutdown).await.map_err(Failure::running);
        self.stop.send_replace(true);
        served
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Failure> {
    let failed = |e| Failure::running(format!("can't listen on {address}: {e}"));
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Serves the embedded S3 on threads of its own: what is uploaded there must not
/// keep the service from reading its keys in time.
fn serve_s3(listener: TcpListener, service: Cors, stopped: watch::Receiver<bool>) -> io::Result<()> {
    let listener = listener.into_std()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("s3").build()?;
    let serve = async move { s3::serve(TcpListener::from_std(listener)?, service, stop_of(stopped)).await };
    std::thread::Builder::new().name("s3".to_owned()).spawn(move || {
        if let Err(error) = runtime.block_on(serve) {
            tracing::error!(%error, "the embedded S3 has ended");
        }
    })?;
    Ok(())
}

/// Resolves when all is to stop.
async fn stop_of(mut stopped: watch::Receiver<bool>) {
    // Whoever held the other end is gone: that is as good as a stop.
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// `fileaccess dev`.
///
/// # Errors
/// See [`Dev::start`].
pub async fn run(options: Options) -> Result<(), Failure> {
    let shutdown = shutdown_signal().map_err(Failure::running)?;
    let dev = Dev::start(&options).await?;
    let address = &dev.address;
    let to = if address.starts_with("unix:") { format!("-authority localhost {address}") } else { address.clone() };
    println!(
        r#"FileAccess for development: gRPC on {address}, S3 on {s3}, bucket "{BUCKET}", files {files}.

Open {web}/ in a browser to upload, download and revoke there.

Paste these, and send what comes back with curl:

  grpcurl -plaintext -d '{{"bucket":"{BUCKET}","key":"secret-recipe.txt","upload":{{"content_type":"text/plain"}}}}' {to} fileaccess.v1.FileAccess/Presign
  grpcurl -plaintext -d '{{"bucket":"{BUCKET}","key":"secret-recipe.txt","ttl":"300s","download":{{}}}}' {to} fileaccess.v1.FileAccess/Presign
  grpcurl -plaintext -d '{{"bucket":"{BUCKET}","delimiter":"/","download_ttl":"60s"}}' {to} fileaccess.v1.FileAccess/List

Who was given what is written to {audit}: fileaccess trace --audit {audit} URL
"#,
        s3 = dev.s3,
        web = dev.web,
        audit = dev.audit.display(),
        files = options.data.as_ref().map_or("in a temporary folder".into(), |d| format!("in {}", d.display())),
    );
    tracing::info!(address = dev.address, s3 = dev.s3, web = dev.web, "listening");
    dev.serve(shutdown).await
}
