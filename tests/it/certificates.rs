//! Certificates as a mesh makes them, and a gRPC channel that shows one.

use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

/// The name that every server certificate of these tests has.
pub const SERVER: &str = "files.test";

/// A certificate authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut of = CertificateParams::default();
        of.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        of.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(of, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate with these names: URIs have a colon, the others are DNS
    /// names.
    pub fn issue(&self, names: &[&str]) -> Identity {
        self.issue_as(names, |_| {})
    }

    pub fn issue_as(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut of = CertificateParams::default();
        let name = |name: &&str| {
            let text = (*name).try_into().unwrap();
            if name.contains(':') { SanType::URI(text) } else { SanType::DnsName(text) }
        };
        of.subject_alt_names = names.iter().map(name).collect();
        change(&mut of);
        let key = KeyPair::generate().unwrap();
        Identity { certificate: of.signed_by(&key, &self.0).unwrap().pem(), key: key.serialize_pem() }
    }

    pub fn expired(&self, names: &[&str]) -> Identity {
        self.issue_as(names, |of| {
            of.not_before = rcgen::date_time_ymd(2020, 1, 1);
            of.not_after = rcgen::date_time_ymd(2020, 1, 2);
        })
    }
}

impl Identity {
    /// Writes `NAME.crt` and `NAME.key`, each replaced at once.
    pub fn write(&self, folder: &Path, name: &str) {
        replace(&folder.join(format!("{name}.crt")), &self.certificate);
        replace(&folder.join(format!("{name}.key")), &self.key);
    }
}

/// Replaces a file at once, as those do who rotate certificates.
pub fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, file).unwrap();
}

/// A client's side of TLS: it trusts `roots` (PEM) and shows `identity`.
pub fn client(roots: &str, identity: Option<&Identity>, alpn: &[&str]) -> TlsConnector {
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(store);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(Identity { certificate, key }) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

/// A connection to `address`, with TLS.
pub async fn dial(address: &str, connector: &TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    connector.connect(ServerName::try_from(SERVER).unwrap(), stream).await
}

/// A channel to `address` with TLS, connected with its first call.
pub fn channel(address: &str, connector: TlsConnector) -> Channel {
    let address = address.to_owned();
    let dial = move |_| {
        let (address, connector) = (address.clone(), connector.clone());
        async move { dial(&address, &connector).await.map(TokioIo::new) }
    };
    Endpoint::from_shared(format!("http://{SERVER}")).unwrap().connect_with_connector_lazy(tower::service_fn(dial))
}
