//! The generated protobuf code of `proto/fileaccess/v1/`, which documents it.

#![allow(clippy::pedantic, missing_docs, reason = "generated")]

tonic::include_proto!("fileaccess.v1");

/// The descriptors of the API and of all that it imports, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/fileaccess.fds"));
