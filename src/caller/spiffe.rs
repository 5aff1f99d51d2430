//! SPIFFE IDs, as the standard has them: parsed strictly, never normalized.
//! <https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>

use std::fmt;

const SCHEME: &str = "spiffe://";

/// The longest SPIFFE ID, in bytes (SPIFFE-ID, section 2.3).
pub const MAX_LEN: usize = 2048;

/// The longest trust domain name, in bytes (SPIFFE-ID, section 2.1).
const MAX_DOMAIN_LEN: usize = 255;

/// A workload's name: `spiffe://TRUST-DOMAIN/PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SpiffeId {
    text: Box<str>,
    /// Where the path begins: at its `/`, or at the end if there is none.
    path: usize,
}

/// Why a text is no SPIFFE ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is longer than [`MAX_LEN`].
    TooLong,
    /// It does not begin with `spiffe://`, in lower case.
    Scheme,
    /// The trust domain is empty, longer than 255 bytes, or has other
    /// characters than `a-z 0-9 . - _`.
    TrustDomain,
    /// A segment of the path is empty, `.` or `..`, or has other characters
    /// than `A-Z a-z 0-9 . - _`. A trailing slash makes an empty segment.
    Path,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "is longer than 2048 bytes",
            Self::Scheme => "does not begin with `spiffe://`",
            Self::TrustDomain => "has a trust domain that is not 1 to 255 of `a-z 0-9 . - _`",
            Self::Path => "has a path segment that is empty, `.`, `..`, or has other than `A-Z a-z 0-9 . - _`",
        })
    }
}

impl std::error::Error for Fault {}

impl SpiffeId {
    /// Parses a SPIFFE ID. What is not exactly one is refused, and nothing is
    /// changed.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn parse(text: &str) -> Result<Self, Fault> {
        if text.len() > MAX_LEN {
            return Err(Fault::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(Fault::Scheme)?;
        let domain = rest.find('/').unwrap_or(rest.len());
        let of_domain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if !(1..=MAX_DOMAIN_LEN).contains(&domain) || !rest.bytes().take(domain).all(of_domain) {
            return Err(Fault::TrustDomain);
        }
        let of_segment = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
        // What comes before the first slash is the trust domain.
        for segment in rest.split('/').skip(1) {
            if matches!(segment, "" | "." | "..") || !segment.bytes().all(of_segment) {
                return Err(Fault::Path);
            }
        }
        Ok(Self { text: text.into(), path: SCHEME.len() + domain })
    }

    /// The whole of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain: `mesh.test` of `spiffe://mesh.test/ns/shop`.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.path]
    }

    /// The segments of the path: `ns` and `shop` of `spiffe://mesh.test/ns/shop`.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.text[self.path..].split('/').skip(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_spiffe_id_is_taken_apart() {
        let id = SpiffeId::parse("spiffe://mesh.test/ns/shop/sa/Orders-2_a.b").unwrap();
        assert_eq!(id.trust_domain(), "mesh.test");
        assert_eq!(id.segments().collect::<Vec<_>>(), ["ns", "shop", "sa", "Orders-2_a.b"]);
        assert_eq!(id.as_str(), "spiffe://mesh.test/ns/shop/sa/Orders-2_a.b");
        let bare = SpiffeId::parse("spiffe://mesh_1.test").unwrap();
        assert_eq!((bare.trust_domain(), bare.segments().count()), ("mesh_1.test", 0));
        let longest = format!("spiffe://d/{}", "x".repeat(MAX_LEN - 11));
        assert_eq!(SpiffeId::parse(&longest).unwrap().as_str().len(), MAX_LEN);
    }

    #[test]
    fn what_is_none_is_refused() {
        for (text, fault) in [
            ("", Fault::Scheme),
            ("SPIFFE://mesh.test/a", Fault::Scheme),
            ("spiffe:/mesh.test/a", Fault::Scheme),
            (" spiffe://mesh.test/a", Fault::Scheme),
            ("https://mesh.test/a", Fault::Scheme),
            ("spiffe://", Fault::TrustDomain),
            ("spiffe:///a", Fault::TrustDomain),
            ("spiffe://Mesh.test/a", Fault::TrustDomain),
            ("spiffe://mesh.test:443/a", Fault::TrustDomain),
            ("spiffe://u@mesh.test/a", Fault::TrustDomain),
            ("spiffe://mesh.test?q", Fault::TrustDomain),
            ("spiffe://m\u{e4}sh.test/a", Fault::TrustDomain),
            ("spiffe://mesh.test/", Fault::Path),
            ("spiffe://mesh.test/a/", Fault::Path),
            ("spiffe://mesh.test//a", Fault::Path),
            ("spiffe://mesh.test/./a", Fault::Path),
            ("spiffe://mesh.test/a/..", Fault::Path),
            ("spiffe://mesh.test/a%2Fb", Fault::Path),
            ("spiffe://mesh.test/a?q", Fault::Path),
            ("spiffe://mesh.test/a#f", Fault::Path),
            ("spiffe://mesh.test/a b", Fault::Path),
            ("spiffe://mesh.test/\u{430}", Fault::Path),
        ] {
            assert_eq!(SpiffeId::parse(text), Err(fault), "{text}");
        }
        assert_eq!(SpiffeId::parse(&format!("spiffe://d/{}", "x".repeat(MAX_LEN - 10))), Err(Fault::TooLong));
        assert_eq!(SpiffeId::parse(&format!("spiffe://{}/a", "d".repeat(256))), Err(Fault::TrustDomain));
    }
}
