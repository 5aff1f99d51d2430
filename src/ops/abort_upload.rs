//! `AbortUpload`: give an upload up, and leave nothing of it.

use std::sync::Arc;

use super::upload_token::Session;
use crate::app::App;
use crate::error::Error;
use crate::policy::Permit;

/// How often an upload is ended whose parts still arrive.
const TRIES: usize = 5;

/// An upload that is to be given up, whether its time is up or not.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The upload.
    pub session: Arc<Session>,
}

/// Ends the upload that the permit allows, until S3 knows nothing of it. What
/// was completed stays.
///
/// # Errors
/// [`Error::UnknownBucket`], those of the store; also if parts arrive all the
/// while.
pub async fn abort(app: &App, permit: Permit<Ask>) -> Result<(), Error> {
    let Ask { session } = permit.into_ask();
    let store = &app.bucket(&session.bucket)?.store;
    for _ in 0..TRIES {
        store.abort_upload(&session.key, &session.upload_id).await?;
        // A part that was on its way may have come too late to be removed.
        // https://docs.aws.amazon.com/AmazonS3/latest/API/API_AbortMultipartUpload.html
        match store.list_parts(&session.key, &session.upload_id, 0, 1).await {
            Err(Error::UploadNotFound) => return Ok(()),
            other => other.map(drop)?,
        }
    }
    Err(Error::StoreUnavailable { detail: "parts of an aborted upload still arrive".into() })
}
