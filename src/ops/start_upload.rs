//! `StartUpload`: plan the parts and open a multipart upload.
//! <https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html>

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ulid::Ulid;

use super::presign::{Presigned, millis};
use super::sign_parts::{self, Part};
use super::upload::{Algorithm, Upload};
use super::upload_plan::Plan;
use super::upload_token::{Session, UPLOAD_ID};
use crate::app::App;
use crate::error::Error;
use crate::object::{BucketName, Lifetime, ObjectKey};
use crate::policy::Permit;
use crate::signer::whole_seconds;

/// How many parts are signed at once, unasked: as many as a browser takes up
/// soon.
const FIRST: u32 = 16;

/// An upload, as it is asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The bucket, by its name in the settings.
    pub bucket: BucketName,
    /// The object.
    pub key: ObjectKey,
    /// Its parts.
    pub plan: Plan,
    /// What is stored with it. Neither length nor checksum.
    pub upload: Upload,
    /// The checksum that each part will have. `None`: S3 makes its own.
    pub algorithm: Option<Algorithm>,
    /// How long the URLs are to live. `None`: the default of the settings.
    pub ttl: Option<Lifetime>,
    /// How long the upload may take.
    pub deadline: Duration,
}

/// An upload that was opened.
pub struct Started {
    /// What stands for it.
    pub token: String,
    /// What that is.
    pub session: Arc<Session>,
    /// The first parts' URLs. None where each part must have its checksum
    /// signed.
    pub parts: Vec<(i32, Result<Presigned, Error>)>,
}

/// Opens the upload that the permit allows.
///
/// # Errors
/// [`Error::UnknownBucket`], [`Error::NoRoute`], [`Error::SignerUnavailable`],
/// those of the store.
pub async fn start(app: &App, permit: Permit<Ask>, now: SystemTime) -> Result<Started, Error> {
    let ask = permit.ask();
    let bucket = app.bucket(&ask.bucket)?;
    // Better known before there is an upload that nobody could go on with.
    bucket.route(&ask.key)?.key(now)?;
    let id = Ulid::from_parts(millis(now), rand::random());
    let mut upload = ask.upload.clone();
    upload.metadata.insert(UPLOAD_ID.to_owned(), id.to_string());
    let upload_id = bucket.store.create_upload(&ask.key, &upload, ask.algorithm).await?;
    let session = Arc::new(Session {
        bucket: ask.bucket.clone(),
        key: ask.key.clone(),
        upload_id,
        id,
        plan: ask.plan,
        algorithm: ask.algorithm,
        create_only: ask.upload.create_only,
        content_type: ask.upload.content_type.clone(),
        deadline: whole_seconds(now + ask.deadline),
    });
    let token = app.tokens.seal(&session, permit.caller())?;
    let first = if ask.algorithm.is_some() { 0 } else { FIRST.min(ask.plan.count()) };
    let parts = (1..=first).map(|number| Part { session: Arc::clone(&session), number, checksum: None });
    let parts = parts.map(|part| (part.number.cast_signed(), Ok(part)));
    let parts = sign_parts::issue_all(app, permit.caller(), parts, ask.ttl, now).await;
    Ok(Started { token, session, parts })
}
