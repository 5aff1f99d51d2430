//! `ListParts`: what S3 has of an upload, so that it can be gone on with.

use std::sync::Arc;
use std::time::SystemTime;

use super::upload_token::Session;
use crate::app::App;
use crate::error::Error;
use crate::policy::Permit;
use crate::store::multipart::Page;

/// A page of parts, as it is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The upload.
    pub session: Arc<Session>,
    /// How many parts at most, 1 to 1,000.
    pub page_size: u16,
    /// The number of the last part of the page before. 0: there was none.
    pub after: u32,
}

/// Fetches the page that the permit allows.
///
/// # Errors
/// [`Error::UploadExpired`], [`Error::UploadNotFound`],
/// [`Error::UnknownBucket`], those of the store.
pub async fn list(app: &App, permit: Permit<Ask>, now: SystemTime) -> Result<(Arc<Session>, Page), Error> {
    let Ask { session, page_size, after } = permit.into_ask();
    session.live(now)?;
    let store = &app.bucket(&session.bucket)?.store;
    let page = store.list_parts(&session.key, &session.upload_id, after, page_size).await?;
    Ok((session, page))
}
