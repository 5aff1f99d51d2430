//! Mutual TLS at the service itself: who has no certificate of the client CA
//! gets no connection. The files are read again when they change.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
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

/// A connection by TLS.
pub(crate) struct Shaken<S> {
    pub(crate) stream: TlsStream<S>,
    /// Whose certificate was shown.
    pub(crate) caller: Result<Caller, Error>,
    /// When that certificate ends.
    pub(crate) not_after: SystemTime,
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
    /// No certificate of the client CA, or no HTTP/2.
    pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> std::io::Result<Shaken<S>> {
        let acceptor = TlsAcceptor::from(self.config.load_full());
        let stream = acceptor.accept(stream).await?;
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(H2) {
            return Err(std::io::Error::other("the client does not offer HTTP/2 in ALPN"));
        }
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let leaf = leaf.ok_or_else(|| std::io::Error::other("no client certificate was shown"))?;
        let not_after = not_after(leaf).ok_or_else(|| std::io::Error::other("the certificate has no end"))?;
        let caller = Caller::certified(leaf);
        Ok(Shaken { stream, caller, not_after })
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

/// When a certificate ends (RFC 5280, section 4.1.2.5).
fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    // At the end of all days every certificate is expired, and the library says since when. It
    // looks at that before anything else.
    let never = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
    match certificate.verify_for_usage(&[], &[], &[], never, webpki::KeyUsage::client_auth(), None, None) {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs()))
        }
        _ => None,
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    match CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err("holds no certificate as PEM, or a broken one"),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn the_end_of_a_certificate_is_told_in_both_of_its_forms() {
        let end_of = |year| {
            let mut of = CertificateParams::default();
            of.not_before = date_time_ymd(2020, 1, 1);
            of.not_after = date_time_ymd(year, 2, 3);
            not_after(of.self_signed(&KeyPair::generate().unwrap()).unwrap().der()).unwrap()
        };
        // UTCTime until 2049, GeneralizedTime from then on, 9999 for those that are to have no end.
        for year in [2021, 2049, 2050, 9999] {
            let expect = humantime::parse_rfc3339(&format!("{year}-02-03T00:00:00Z")).unwrap();
            assert_eq!(end_of(year), expect);
        }
        assert_eq!(not_after(&CertificateDer::from(vec![0x30, 0])), None);
    }
}
