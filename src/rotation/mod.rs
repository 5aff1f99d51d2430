//! Revoke by rotation: URLs end because what they depend on is replaced.

pub mod driver;
pub mod flight;
pub mod keeper;
pub mod object;
pub mod plan;
pub mod probe;
