//! One file per verb, the same shape in each: what is asked, and how it is
//! done once a [`crate::policy::Permit`] allows it.

pub mod abort_upload;
pub mod complete_upload;
pub mod delete;
pub mod download;
pub mod form_upload;
pub mod head;
pub mod inspect;
pub mod list;
pub mod list_parts;
pub mod presign;
pub mod revoke;
pub mod sign_parts;
pub mod signers;
pub mod start_upload;
pub mod stat;
pub mod upload;
pub mod upload_plan;
pub mod upload_token;
