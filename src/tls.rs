//! Mutual TLS at the service itself: who has no certificate of the client CA
//! gets no connection. The files are read again when they change.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zeroize::Zeroizing;

use crate::caller::Caller;
use crate::config::TlsSettings;
use crate::error::Error;

/// HTTP/2 in ALPN (RFC 9113, section 3.1).
const H2: &[u8] = b"h2";

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What is wrong with a file of the settings' `[tls]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsError {
    path: &'static str,
    file: String,
    problem: String,
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: `{}`: {}", self.path, self.file, self.problem)
    }
}

impl std::error::Error for TlsError {}

impl TlsError {
    fn new(path: &'static str, file: &Path, problem: impl fmt::Display) -> Self {
        Self { path, file: file.display().to_string(), problem: problem.to_string() }
    }
}

/// The TLS side of a listener.
pub struct Tls {
    settings: TlsSettings,
    config: ArcSwap<ServerConfig>,
    /// What `config` was made of.
    digest: [u8; 32],
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// The first file that can't be read or used, by its path in the settings.
    pub fn load(settings: &TlsSettings) -> Result<Arc<Self>, TlsError> {
        let files = Files::read(settings)?;
        let config = ArcSwap::from_pointee(files.config(settings)?);
        Ok(Arc::new(Self { settings: settings.clone(), config, digest: files.digest() }))
    }

    /// Shakes hands over `stream`, and says whose certificate was shown. A
    /// certificate that names nobody still gets a connection, so that its calls
    /// are told why they are refused.
    ///
    /// # Errors
    /// No certificate of the client CA, no HTTP/2, or too slow.
    pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> std::io::Result<(TlsStream<S>, Result<Caller, Error>)> {
        let acceptor = TlsAcceptor::from(self.config.load_full());
        let Ok(shaken) = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await else {
            return Err(std::io::Error::other(format!("not done within {HANDSHAKE:?}")));
        };
        let stream = shaken?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(H2) {
            return Err(std::io::Error::other("the client does not offer HTTP/2 in ALPN"));
        }
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let caller = leaf.map_or(Err(Error::NoCaller), Caller::certified);
        Ok((stream, caller))
    }

    /// Looks at the files, for ever. What has changed is taken up when it was
    /// the same for two looks, so that nothing half written is; if it is wrong,
    /// the log says so and what was there before goes on. Connections keep what
    /// they were opened with.
    pub(crate) async fn keep(self: Arc<Self>) {
        let mut judged = Ok(self.digest);
        let mut seen = judged.clone();
        loop {
            tokio::time::sleep(LOOK).await;
            let settings = self.settings.clone();
            // Files may be on a network; key parsing takes a moment.
            let Ok(files) = tokio::task::spawn_blocking(move || Files::read(&settings)).await else { return };
            let look = files.as_ref().map(Files::digest).map_err(Clone::clone);
            if look != seen {
                seen = look;
                continue;
            }
            if look == judged {
                continue;
            }
            judged = look;
            match files.and_then(|files| files.config(&self.settings)) {
                Ok(config) => {
                    self.config.store(Arc::new(config));
                    tracing::info!("changed tls files taken up");
                }
                Err(error) => tracing::error!(%error, "changed tls files are wrong; the former go on"),
            }
        }
    }
}

/// The contents of the files, as PEM (RFC 7468).
struct Files {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Vec<u8>,
}

impl Files {
    fn read(settings: &TlsSettings) -> Result<Self, TlsError> {
        let read = |path, file: &Path| std::fs::read(file).map_err(|e| TlsError::new(path, file, e));
        Ok(Self {
            certificate: read("tls.certificate", &settings.certificate)?,
            key: read("tls.key", &settings.key)?.into(),
            client_ca: read("tls.client_ca", &settings.client_ca)?,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        for file in [&self.certificate, &*self.key, &self.client_ca] {
            digest.update((file.len() as u64).to_le_bytes());
            digest.update(file);
        }
        digest.finalize().into()
    }

    fn config(&self, settings: &TlsSettings) -> Result<ServerConfig, TlsError> {
        let chain = certificates(&self.certificate)
            .map_err(|problem| TlsError::new("tls.certificate", &settings.certificate, problem))?;
        // The parser's own words may hold a line of the file, so they are not told.
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| TlsError::new("tls.key", &settings.key, "holds no private key as PEM; write it as PKCS #8"))?;
        let wrong_ca = |problem: &dyn fmt::Display| TlsError::new("tls.client_ca", &settings.client_ca, problem);
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.client_ca).map_err(|problem| wrong_ca(&problem))? {
            roots.add(certificate).map_err(|e| wrong_ca(&e))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|e| wrong_ca(&e))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong_ca(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| TlsError::new("tls.key", &settings.key, format!("does not fit `tls.certificate`: {e}")))?;
        config.alpn_protocols = vec![H2.to_vec()];
        // A resumed session would not have its certificate looked at again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    match CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err("holds no certificate as PEM, or a broken one"),
    }
}
