//! Transport facts to a [`Caller`]. No caller is an error, never a default.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use http::Extensions;

use crate::error::Error;

/// Who calls: the identity that the transport vouches for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Caller(Arc<str>);

impl Caller {
    /// Whoever shares this machine's loopback. They can't be told apart.
    #[must_use]
    pub fn loopback(peer: SocketAddr) -> Option<Self> {
        peer.ip().is_loopback().then(|| Self("loopback".into()))
    }

    /// A local process behind a Unix socket, by its user id (`SO_PEERCRED`).
    #[must_use]
    pub fn user(uid: u32) -> Self {
        Self(format!("uid:{uid}").into())
    }

    /// The caller of a request, as the listener has put it there.
    ///
    /// # Errors
    /// [`Error::NoCaller`].
    pub fn of(extensions: &Extensions) -> Result<Self, Error> {
        extensions.get::<Self>().cloned().ok_or(Error::NoCaller)
    }

    /// The identity, as the audit record has it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_an_error() {
        assert!(matches!(Caller::of(&Extensions::new()), Err(Error::NoCaller)));
        assert_eq!(Caller::loopback("192.0.2.1:1".parse().unwrap()), None);
    }
}
