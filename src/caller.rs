//! Transport facts to a [`Caller`]. No caller is an error, never a default.
//!
//! A certificate and the header in which a sidecar tells of one lead to the
//! same caller, by the same rule: the one URI, which must be a SPIFFE ID; if
//! there is none, the first DNS name.

pub mod spiffe;
pub mod xfcc;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{Extensions, HeaderMap};
use rustls::pki_types::{CertificateDer, DnsName};

use crate::error::Error;
use spiffe::SpiffeId;

/// Who calls: the identity that the transport vouches for. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Caller(Arc<Identity>);

#[derive(Debug, PartialEq, Eq, Hash)]
enum Identity {
    Spiffe(SpiffeId),
    /// `dns:NAME`, `uid:N` or `loopback`.
    Other(Box<str>),
}

/// Why an identity that came with a call can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The header came where nobody vouches for it.
    #[error("`{name}` is not believed on this listener", name = xfcc::HEADER)]
    NotBelieved,
    /// The header came more than once, and nobody can tell who wrote which.
    #[error("`{name}` came more than once", name = xfcc::HEADER)]
    Repeated,
    /// The header has several elements, and the sidecar is not known to append.
    #[error("`{name}` has several elements, and only a sidecar that `appends` may send those", name = xfcc::HEADER)]
    SeveralElements,
    /// The header has other characters than visible ASCII.
    #[error("`{name}` has other characters than visible ASCII", name = xfcc::HEADER)]
    NotText,
    /// The header is of another form.
    #[error("`{name}` {0}", name = xfcc::HEADER)]
    Header(xfcc::Fault),
    /// The certificate can't be parsed.
    #[error("the client certificate can't be parsed")]
    Certificate,
    /// Several URIs, which X.509-SVID forbids.
    #[error("the client certificate has several URIs, and may have one only")]
    SeveralUris,
    /// The URI is no SPIFFE ID.
    #[error("the URI of the client certificate {0}")]
    SpiffeId(spiffe::Fault),
    /// The DNS name is no host's: a wildcard, say.
    #[error("the first DNS name of the client certificate is no host's")]
    DnsName,
}

/// What the listener has found out, as it stands in a request's extensions.
#[derive(Clone)]
struct Found(Result<Caller, Error>);

impl Caller {
    /// Whoever shares this machine's loopback. They can't be told apart.
    #[must_use]
    pub fn loopback(peer: SocketAddr) -> Option<Self> {
        peer.ip().is_loopback().then(|| Self::other("loopback"))
    }

    /// A local process behind a Unix socket, by its user id (`SO_PEERCRED`).
    #[must_use]
    pub fn user(uid: u32) -> Self {
        Self::other(format!("uid:{uid}"))
    }

    /// Whom a verified client certificate names.
    ///
    /// # Errors
    /// [`Error::CallerUnreadable`], and [`Error::NoCaller`] if it names nobody.
    pub fn certified(certificate: &CertificateDer<'_>) -> Result<Self, Error> {
        let certificate = webpki::EndEntityCert::try_from(certificate).map_err(|_| Unreadable::Certificate)?;
        Self::named(certificate.valid_uri_names(), certificate.valid_dns_names())
    }

    /// For whom a trusted sidecar says that it calls, in
    /// `x-forwarded-client-cert`. Unless it `appends`, the header may have one
    /// element only; else the last one counts. The header may come once only:
    /// HTTP would join several, but Envoy never sends them.
    ///
    /// # Errors
    /// [`Error::CallerUnreadable`], and [`Error::NoCaller`] if there is no such
    /// header, or it names nobody.
    pub fn forwarded(headers: &HeaderMap, appends: bool) -> Result<Self, Error> {
        let mut lines = headers.get_all(xfcc::HEADER).iter();
        let header = lines.next().ok_or(Error::NoCaller)?;
        if lines.next().is_some() {
            return Err(Unreadable::Repeated.into());
        }
        let header = header.to_str().map_err(|_| Unreadable::NotText)?;
        let xfcc::Last { pairs, is_only } = xfcc::last_element(header).map_err(Unreadable::Header)?;
        if !is_only && !appends {
            return Err(Unreadable::SeveralElements.into());
        }
        let values = |key: &'static str| {
            let of_key = pairs.iter().filter(move |pair| pair.key.eq_ignore_ascii_case(key));
            // Envoy writes the key of a URI even if there is none.
            of_key.map(xfcc::Pair::value).filter(|value| !value.is_empty())
        };
        Self::named(values("URI"), values("DNS"))
    }

    /// The rule for all certificates: the URI, which must be the only one and a
    /// SPIFFE ID, as X.509-SVID demands (section 2); without any, the first DNS
    /// name, which must be a host's, in lower case.
    /// <https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md>
    fn named<S: AsRef<str>>(
        mut uris: impl Iterator<Item = S>,
        mut dns: impl Iterator<Item = S>,
    ) -> Result<Self, Error> {
        if let Some(uri) = uris.next() {
            if uris.next().is_some() {
                return Err(Unreadable::SeveralUris.into());
            }
            let id = SpiffeId::parse(uri.as_ref()).map_err(Unreadable::SpiffeId)?;
            return Ok(Self(Arc::new(Identity::Spiffe(id))));
        }
        let name = dns.next().ok_or(Error::NoCaller)?;
        let name = name.as_ref();
        DnsName::try_from(name).map_err(|_| Unreadable::DnsName)?;
        Ok(Self::other(format!("dns:{}", name.to_ascii_lowercase())))
    }

    fn other(name: impl Into<Box<str>>) -> Self {
        Self(Arc::new(Identity::Other(name.into())))
    }

    /// Puts what the listener has found out where [`Caller::of`] finds it.
    pub fn put(found: Result<Self, Error>, extensions: &mut Extensions) {
        extensions.insert(Found(found));
    }

    /// The caller of a request, as the listener has put it there.
    ///
    /// # Errors
    /// [`Error::NoCaller`], and [`Error::CallerUnreadable`] if what was there
    /// could not be read.
    pub fn of(extensions: &Extensions) -> Result<Self, Error> {
        extensions.get::<Found>().map_or(Err(Error::NoCaller), |Found(found)| found.clone())
    }

    /// The identity, as the audit record has it: a SPIFFE ID, `dns:NAME`,
    /// `uid:N` or `loopback`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match &*self.0 {
            Identity::Spiffe(id) => id.as_str(),
            Identity::Other(name) => name,
        }
    }

    /// The SPIFFE ID, if that is how the caller is known.
    #[must_use]
    pub fn spiffe(&self) -> Option<&SpiffeId> {
        match &*self.0 {
            Identity::Spiffe(id) => Some(id),
            Identity::Other(_) => None,
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Unreadable> for Error {
    fn from(unreadable: Unreadable) -> Self {
        Self::CallerUnreadable(unreadable)
    }
}

/// How a listener knows who calls over one of its connections.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    /// All calls are of one caller, or of nobody.
    One(Result<Caller, Error>),
    /// A sidecar, which says in each call for whom it is.
    Sidecar {
        /// Whether it appends to what it was sent.
        appends: bool,
    },
}

impl Peer {
    /// Who makes a call with these headers.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller, Error> {
        match self {
            Self::Sidecar { appends } => Caller::forwarded(headers, *appends),
            // Somebody takes this for another listener, or lies. Both should hear of it.
            Self::One(_) if headers.contains_key(xfcc::HEADER) => Err(Unreadable::NotBelieved.into()),
            Self::One(caller) => caller.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn nobody_is_an_error() {
        assert!(matches!(Caller::of(&Extensions::new()), Err(Error::NoCaller)));
        assert_eq!(Caller::loopback("192.0.2.1:1".parse().unwrap()), None);
    }

    fn headers(lines: &[&[u8]]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(xfcc::HEADER, HeaderValue::from_bytes(line).unwrap());
        }
        headers
    }

    fn forwarded(header: &str) -> Result<String, Error> {
        Caller::forwarded(&headers(&[header.as_bytes()]), false).map(|caller| caller.to_string())
    }

    #[test]
    fn a_sidecar_names_the_caller() {
        let id = "spiffe://mesh.test/ns/shop/sa/orders";
        for (header, caller) in [
            (format!("By=spiffe://mesh.test/own;Hash=00;URI={id};DNS=orders.test"), id),
            (format!("uri={id}"), id),
            (format!("Hash=00;URI=\"{id}\""), id),
            ("Hash=00;URI=;DNS=Orders.test;DNS=b.test".to_owned(), "dns:orders.test"),
        ] {
            assert_eq!(forwarded(&header).unwrap(), caller, "{header}");
        }
        let chain = headers(&[format!("URI=spiffe://mesh.test/before,Hash=00;URI={id}").as_bytes()]);
        let caller = Caller::forwarded(&chain, true).unwrap();
        assert_eq!(caller.as_str(), id);
        assert_eq!(caller.spiffe().unwrap().segments().last(), Some("orders"));
        assert_eq!(Caller::user(7).spiffe(), None);
    }

    #[test]
    fn a_sidecar_that_names_nobody_or_too_many_is_refused() {
        for header in ["By=spiffe://mesh.test/own;Hash=00", "Subject=\"CN=x,URI=spiffe://mesh.test/x\"", "URI=;DNS="] {
            assert!(matches!(forwarded(header), Err(Error::NoCaller)), "{header}");
        }
        for (header, expect) in [
            ("URI=spiffe://mesh.test/a;URI=spiffe://mesh.test/b", Unreadable::SeveralUris),
            ("URI=https://x.test;URI=spiffe://mesh.test/b;DNS=a.test", Unreadable::SeveralUris),
            ("URI=https://x.test;DNS=a.test", Unreadable::SpiffeId(spiffe::Fault::Scheme)),
            ("URI=;DNS=*.test;DNS=a.test", Unreadable::DnsName),
            ("URI=https://x.test/,URI=spiffe://mesh.test/b", Unreadable::SeveralElements),
            ("URI=Spiffe://mesh.test/a;DNS=a.test", Unreadable::SpiffeId(spiffe::Fault::Scheme)),
            ("URI=spiffe://mesh.test/a/;DNS=a.test", Unreadable::SpiffeId(spiffe::Fault::Path)),
            ("URI=spiffe://mesh.test/a, URI=spiffe://mesh.test/b", Unreadable::Header(xfcc::Fault::Key)),
        ] {
            let Err(Error::CallerUnreadable(unreadable)) = forwarded(header) else { panic!("{header}") };
            assert_eq!(unreadable, expect, "{header}");
        }
        let refused = |lines: &[&[u8]]| match Caller::forwarded(&headers(lines), true) {
            Err(Error::CallerUnreadable(unreadable)) => unreadable,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&[b"URI=spiffe://mesh.test/a", b"Hash=00"]), Unreadable::Repeated);
        assert_eq!(refused(&[b"URI=spiffe://mesh.test/\xe4"]), Unreadable::NotText);
        assert!(matches!(Caller::forwarded(&HeaderMap::new(), true), Err(Error::NoCaller)));
    }

    #[test]
    fn the_header_is_refused_from_whom_it_is_not_believed() {
        let forged = headers(&[b"URI=spiffe://mesh.test/a"]);
        let local = Peer::One(Ok(Caller::user(0)));
        assert!(matches!(local.caller(&forged), Err(Error::CallerUnreadable(Unreadable::NotBelieved))));
        assert_eq!(local.caller(&HeaderMap::new()).unwrap().as_str(), "uid:0");
        assert!(matches!(Peer::Sidecar { appends: false }.caller(&HeaderMap::new()), Err(Error::NoCaller)));
    }

    #[test]
    fn a_certificate_names_the_caller_by_the_same_rule() {
        use rcgen::SanType::{DnsName, URI};
        let key = rcgen::KeyPair::generate().unwrap();
        let name = |sans: Vec<rcgen::SanType>| {
            let mut of = rcgen::CertificateParams::default();
            of.subject_alt_names = sans;
            let certificate = of.self_signed(&key).unwrap();
            Caller::certified(certificate.der()).map(|caller| caller.to_string())
        };
        let uri = |text: &str| URI(text.try_into().unwrap());
        let dns = |text: &str| DnsName(text.try_into().unwrap());
        let id = "spiffe://mesh.test/ns/shop/sa/orders";
        assert_eq!(name(vec![dns("a.test"), uri(id)]).unwrap(), id);
        assert_eq!(name(vec![dns("A.test"), dns("b.test")]).unwrap(), "dns:a.test");
        assert!(matches!(name(vec![dns("*.shop.test"), dns("a")]), Err(Error::CallerUnreadable(Unreadable::DnsName))));
        assert!(matches!(name(vec![uri("https://x.test"), dns("a")]), Err(Error::CallerUnreadable(_))));
        assert!(matches!(name(vec![uri(id), uri(id)]), Err(Error::CallerUnreadable(Unreadable::SeveralUris))));
        assert!(matches!(name(vec![uri("spiffe://mesh.test/"), dns("a")]), Err(Error::CallerUnreadable(_))));
        assert!(matches!(name(vec![]), Err(Error::NoCaller)));
        let none = CertificateDer::from(&b"no certificate"[..]);
        assert!(matches!(Caller::certified(&none), Err(Error::CallerUnreadable(Unreadable::Certificate))));
    }
}
