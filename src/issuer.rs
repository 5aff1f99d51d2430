//! Who makes access keys: IAM, or in `dev` the one in memory.

use std::fmt;
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_iam::Client;
use aws_sdk_iam::config::retry::RetryConfig;
use aws_sdk_iam::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_iam::types::{AccessKeyMetadata, StatusType};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use crate::aws::{client_config, is_transient};
use crate::signer::presign::chain;

/// Whether S3 honours a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It does.
    Active,
    /// It does not, until the key is activated again.
    Inactive,
}

/// What can be told of a key. Its secret is told once, when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFacts {
    /// The access key id.
    pub id: String,
    /// Whether S3 honours it.
    pub status: Status,
    /// When it was made.
    pub created: SystemTime,
}

/// Why an issuer fails. The details are for the log only and hold no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IssuerError {
    /// It does not answer, or not now.
    #[error("the issuer of keys does not answer at present: {0}")]
    Unavailable(String),
    /// It does not let us.
    #[error("the issuer of keys refuses: {0}")]
    Refused(String),
    /// There is no such user.
    #[error("there is no such user")]
    NoSuchUser,
    /// The user has as many keys as it may have.
    #[error("the user has as many keys as it may have")]
    LimitExceeded,
}

/// Makes and ends the access keys of users.
#[tonic::async_trait]
pub trait KeyIssuer: Send + Sync + fmt::Debug {
    /// All keys of `user`.
    ///
    /// # Errors
    /// [`IssuerError::NoSuchUser`], [`IssuerError::Unavailable`],
    /// [`IssuerError::Refused`].
    async fn list(&self, user: &str) -> Result<Vec<KeyFacts>, IssuerError>;

    /// Makes a key of `user`, active at once. One call makes at most one key;
    /// after [`IssuerError::Unavailable`] it may have made one whose secret
    /// nobody has.
    ///
    /// # Errors
    /// [`IssuerError::LimitExceeded`], and those of [`KeyIssuer::list`].
    async fn create(&self, user: &str) -> Result<Credentials, IssuerError>;

    /// Activates or deactivates a key of `user`. Deactivating one that is gone
    /// is fine, activating it is refused.
    ///
    /// # Errors
    /// [`IssuerError::Unavailable`], [`IssuerError::Refused`].
    async fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IssuerError>;

    /// Removes a key of `user` for good. One that is gone already is fine.
    ///
    /// # Errors
    /// [`IssuerError::Unavailable`], [`IssuerError::Refused`].
    async fn delete(&self, user: &str, id: &str) -> Result<(), IssuerError>;
}

/// AWS IAM.
pub struct Iam {
    client: Client,
    endpoint: Option<String>,
}

impl fmt::Debug for Iam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iam").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Iam {
    /// IAM as `identity` sees it. It is global: `region` tells the partition.
    /// Opens nothing yet.
    #[must_use]
    pub fn new(region: &str, endpoint: Option<String>, identity: SharedCredentialsProvider) -> Self {
        Self { client: Client::new(&client_config(region, endpoint.clone(), identity)), endpoint }
    }

    /// Makes the user, unless it is there. Says whether it was made.
    ///
    /// # Errors
    /// [`IssuerError::Unavailable`], [`IssuerError::Refused`].
    pub async fn ensure_user(&self, user: &str) -> Result<bool, IssuerError> {
        match self.client.create_user().user_name(user).send().await {
            Ok(_) => Ok(true),
            Err(e) if e.code() == Some("EntityAlreadyExists") => Ok(false),
            Err(e) => Err(failed(&e)),
        }
    }

    /// Gives the user this inline policy, in place of one of the same name.
    ///
    /// # Errors
    /// [`IssuerError::NoSuchUser`], [`IssuerError::Unavailable`],
    /// [`IssuerError::Refused`].
    pub async fn put_policy(&self, user: &str, name: &str, json: &str) -> Result<(), IssuerError> {
        let put = self.client.put_user_policy().user_name(user).policy_name(name).policy_document(json);
        put.send().await.map(drop).map_err(|e| failed_for_user(&e))
    }
}

#[tonic::async_trait]
impl KeyIssuer for Iam {
    async fn list(&self, user: &str) -> Result<Vec<KeyFacts>, IssuerError> {
        let mut pages = self.client.list_access_keys().user_name(user).into_paginator().send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|e| failed_for_user(&e))?;
            keys.extend(page.access_key_metadata().iter().map(facts));
        }
        Ok(keys)
    }

    async fn create(&self, user: &str) -> Result<Credentials, IssuerError> {
        // INVARIANT: never sent again. An attempt whose answer was lost may have
        // made a key, and a second one would make another.
        let once = aws_sdk_iam::Config::builder().retry_config(RetryConfig::disabled());
        let create = self.client.create_access_key().user_name(user).customize().config_override(once);
        let made = create.send().await.map_err(|e| failed_for_user(&e))?;
        let key = made.access_key.ok_or_else(|| IssuerError::Unavailable("an answer without a key".into()))?;
        Ok(Credentials::new(key.access_key_id, key.secret_access_key, None, None, "iam"))
    }

    async fn set_status(&self, user: &str, id: &str, status: Status) -> Result<(), IssuerError> {
        let wanted = match status {
            Status::Active => StatusType::Active,
            Status::Inactive => StatusType::Inactive,
        };
        match self.client.update_access_key().user_name(user).access_key_id(id).status(wanted).send().await {
            Ok(_) => Ok(()),
            Err(e) if status == Status::Inactive && e.code() == Some("NoSuchEntity") => Ok(()),
            Err(e) => Err(failed(&e)),
        }
    }

    async fn delete(&self, user: &str, id: &str) -> Result<(), IssuerError> {
        match self.client.delete_access_key().user_name(user).access_key_id(id).send().await {
            Ok(_) => Ok(()),
            Err(e) if e.code() == Some("NoSuchEntity") => Ok(()),
            Err(e) => Err(failed(&e)),
        }
    }
}

fn facts(key: &AccessKeyMetadata) -> KeyFacts {
    KeyFacts {
        id: key.access_key_id().unwrap_or_default().to_owned(),
        status: if key.status() == Some(&StatusType::Active) { Status::Active } else { Status::Inactive },
        // Of unknown age is new: old keys may be taken for orphans.
        created: key.create_date().and_then(|time| (*time).try_into().ok()).unwrap_or_else(SystemTime::now),
    }
}

/// What a failed call that names no key means.
fn failed_for_user<E>(error: &SdkError<E, HttpResponse>) -> IssuerError
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    match error.code() {
        Some("NoSuchEntity") => IssuerError::NoSuchUser,
        Some("LimitExceeded") => IssuerError::LimitExceeded,
        _ => failed(error),
    }
}

fn failed<E>(error: &SdkError<E, HttpResponse>) -> IssuerError
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    let detail = chain(error);
    if is_transient(error) { IssuerError::Unavailable(detail) } else { IssuerError::Refused(detail) }
}
