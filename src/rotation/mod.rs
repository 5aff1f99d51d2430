//! Revoke by rotation: URLs end because what they depend on is replaced.

pub mod object;
