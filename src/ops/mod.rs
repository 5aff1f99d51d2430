//! One file per verb, the same shape in each: what is asked, and how it is
//! done once a [`crate::policy::Permit`] allows it.

pub mod delete;
pub mod download;
pub mod head;
pub mod inspect;
pub mod list;
pub mod presign;
pub mod revoke;
pub mod signers;
pub mod stat;
pub mod upload;
