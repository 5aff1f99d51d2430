//! FileAccess hands out S3 presigned URLs to internal backends, lists what is
//! stored, and takes URLs back by rotating what they depend on. No file byte
//! passes through it.
//!
//! ```text
//! bytes ─► api ─► caller ─► wire ─► policy ─► ops/* ─► signer | store | rotation ─► wire ─► bytes
//!          tonic   who?     parse   Permit    verb     SigV4    S3      revoke      encode
//! ```
//!
//! Data flows one way. Every RPC body is the same: who calls ([`throttle`] says
//! if too often), parse, authorize, do; and [`audit`] has a record of it.
//! [`client`] and [`cli`] stand at the other end of the wire.

pub mod api;
pub mod app;
pub mod audit;
mod aws;
pub mod caller;
pub mod cli;
pub mod client;
pub mod config;
#[cfg(feature = "dev")]
pub mod dev;
pub mod error;
pub mod issuer;
pub mod object;
pub mod ops;
pub mod pb;
pub mod policy;
pub mod rotation;
pub mod server;
pub mod signer;
pub mod store;
pub mod telemetry;
pub mod throttle;
pub mod tls;
pub mod vault;
pub mod wire;
