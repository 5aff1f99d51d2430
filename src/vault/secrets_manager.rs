//! A vault in AWS Secrets Manager: one secret per signer, whose versions are
//! its keys as AWS's own rotation keeps them.
//! <https://docs.aws.amazon.com/secretsmanager/latest/userguide/rotate-secrets_how.html>

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_secretsmanager::Client;
use aws_sdk_secretsmanager::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use zeroize::Zeroizing;

use super::{Held, KeyJson, Vault, VaultError, Version, check_id, retired_with, same_key, to_json, unreadable};
use crate::aws::{client_config, is_transient};
use crate::signer::presign::chain;

const CURRENT: &str = "AWSCURRENT";
const PENDING: &str = "AWSPENDING";
const PREVIOUS: &str = "AWSPREVIOUS";

/// The version that is current before any key is. Secrets Manager makes the
/// first version of a secret AWSCURRENT whatever labels it is given, and a key
/// must not be that before it was promoted.
const EMPTY_VERSION: &str = "fileaccess-empty-version-00000000";
/// Keeps that version from being deprecated and then deleted.
const EMPTY_LABEL: &str = "FILEACCESS-EMPTY";

/// A vault in one secret of Secrets Manager.
pub struct SecretsManager {
    client: Client,
    secret: String,
    /// What was read of the versions that have labels. A version never
    /// changes, so that only labels have to be asked for again and again.
    read: Mutex<BTreeMap<String, Read>>,
}

#[derive(Clone)]
struct Read {
    version: Version,
    created: Option<SystemTime>,
}

/// The labels of a secret's versions, by version id.
struct Labels(HashMap<String, Vec<String>>);

impl Labels {
    fn has(&self, id: &str, label: &str) -> bool {
        self.0.get(id).is_some_and(|labels| labels.iter().any(|l| l == label))
    }

    fn with(&self, label: &str) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str).filter(move |id| self.has(id, label))
    }

    /// The current version, which may be the empty one.
    fn current(&self) -> Option<&str> {
        self.with(CURRENT).next()
    }

    /// Whether the version is to be promoted. A crash between the two steps of
    /// a promotion leaves AWSPENDING on a version that was promoted.
    fn is_pending(&self, id: &str) -> bool {
        self.has(id, PENDING) && !self.has(id, CURRENT) && !self.has(id, PREVIOUS)
    }
}

impl fmt::Debug for SecretsManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretsManager").field("secret", &self.secret).finish_non_exhaustive()
    }
}

impl SecretsManager {
    /// The vault in the secret named `secret`, which is made when the first
    /// key is staged. Opens nothing yet.
    #[must_use]
    pub fn new(secret: &str, region: &str, endpoint: Option<String>, identity: SharedCredentialsProvider) -> Self {
        let client = Client::new(&client_config(region, endpoint, identity));
        Self { client, secret: secret.to_owned(), read: Mutex::default() }
    }

    /// The labels, if there is such a secret.
    async fn labels(&self) -> Result<Option<Labels>, VaultError> {
        match self.client.describe_secret().secret_id(&self.secret).send().await {
            Ok(secret) if secret.deleted_date.is_some() => {
                Err(VaultError::Refused(format!("the secret `{}` is scheduled for deletion", self.secret)))
            }
            Ok(secret) => Ok(Some(Labels(secret.version_ids_to_stages.unwrap_or_default()))),
            Err(e) if e.code() == Some("ResourceNotFoundException") => Ok(None),
            Err(e) => Err(failed(&e)),
        }
    }

    /// The key of a version, if the version is there and not the empty one.
    async fn key(&self, id: &str) -> Result<Option<Read>, VaultError> {
        if id == EMPTY_VERSION {
            return Ok(None);
        }
        if let Some(read) = self.read.lock().unwrap_or_else(PoisonError::into_inner).get(id) {
            return Ok(Some(read.clone()));
        }
        let value = match self.client.get_secret_value().secret_id(&self.secret).version_id(id).send().await {
            Ok(value) => value,
            Err(e) if e.code() == Some("ResourceNotFoundException") => return Ok(None),
            Err(e) => return Err(failed(&e)),
        };
        let json = Zeroizing::new(value.secret_string.unwrap_or_default());
        let key: KeyJson = serde_json::from_str(&json).map_err(|e| unreadable(&e))?;
        let created = value.created_date.and_then(|time| time.try_into().ok());
        let read = Read { version: key.into_version(id.to_owned()), created };
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), read.clone());
        Ok(Some(read))
    }

    async fn version(&self, id: Option<&str>) -> Result<Option<Version>, VaultError> {
        let Some(id) = id else { return Ok(None) };
        Ok(self.key(id).await?.map(|read| read.version))
    }

    /// Makes the secret, with no version in it.
    async fn create(&self) -> Result<(), VaultError> {
        match self.client.create_secret().name(&self.secret).send().await {
            Ok(_) => Ok(()),
            Err(e) if e.code() == Some("ResourceExistsException") => Ok(()),
            Err(e) => Err(failed(&e)),
        }
    }

    /// Puts the empty version first. Where another version is first after all,
    /// the label that it comes with takes nothing from it.
    async fn put_empty_version(&self) -> Result<(), VaultError> {
        let put = self
            .client
            .put_secret_value()
            .secret_id(&self.secret)
            .client_request_token(EMPTY_VERSION)
            .version_stages(EMPTY_LABEL)
            .secret_string("{}");
        put.send().await.map(drop).map_err(|e| failed(&e))
    }

    async fn take_pending_from(&self, id: &str) -> Result<(), VaultError> {
        let taken = self
            .client
            .update_secret_version_stage()
            .secret_id(&self.secret)
            .version_stage(PENDING)
            .remove_from_version_id(id)
            .send()
            .await;
        match taken {
            Ok(_) => Ok(()),
            // The label is gone already, or the version with it.
            Err(e) if is_mismatch(e.code()) => Ok(()),
            Err(e) => Err(failed(&e)),
        }
    }
}

#[tonic::async_trait]
impl Vault for SecretsManager {
    /// If several versions are pending, which AWS does not allow and others
    /// do, the newest counts, and of those made in the same second the one
    /// with the greatest id.
    async fn read(&self) -> Result<Held, VaultError> {
        let Some(labels) = self.labels().await? else { return Ok(Held::default()) };
        self.read.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| labels.0.contains_key(id));

        let current = self.version(labels.current()).await?;
        if current.is_none() && labels.current().is_some_and(|id| id != EMPTY_VERSION) {
            return Err(VaultError::Unavailable(format!("{CURRENT} was moved while it was read")));
        }
        let previous = self.version(labels.with(PREVIOUS).next()).await?;
        let mut pending = Vec::new();
        for id in labels.0.keys().filter(|id| labels.is_pending(id)) {
            pending.extend(self.key(id).await?.map(|read| (read.created, id, read.version)));
        }
        let newest = pending.into_iter().max_by_key(|(created, id, _)| (*created, *id));
        let pending = newest.map(|(_, _, version)| version);
        Ok(Held { current, pending, previous })
    }

    async fn stage(&self, id: &str, key: &Credentials) -> Result<(), VaultError> {
        check_id(id)?;
        let labels = self.labels().await?;
        if labels.is_none() {
            self.create().await?;
        }
        if labels.as_ref().is_none_or(|labels| labels.0.is_empty()) {
            self.put_empty_version().await?;
        }
        // Not left to `PutSecretValue`: LocalStack lets it overwrite a pending
        // version.
        if labels.as_ref().is_some_and(|labels| labels.0.contains_key(id))
            && let Some(known) = self.key(id).await?
        {
            return if same_key(&known.version.key, key) { Ok(()) } else { Err(VaultError::Conflict) };
        }
        let current = self.version(labels.as_ref().and_then(Labels::current)).await?;
        let json = to_json(&KeyJson::new(key, current.as_ref().map(retired_with).unwrap_or_default()))?;
        let json = str::from_utf8(&json).map_err(|e| VaultError::Corrupt(e.to_string()))?;
        // INVARIANT: the secret has a version, so that this one does not become
        // AWSCURRENT.
        let put = self
            .client
            .put_secret_value()
            .secret_id(&self.secret)
            .client_request_token(id)
            .version_stages(PENDING)
            .secret_string(json);
        match put.send().await {
            Ok(put) if put.version_stages().iter().any(|label| label == PENDING) => Ok(()),
            // The id was staged before and has lost its label since.
            Ok(_) => Err(VaultError::Conflict),
            Err(e) if e.code() == Some("ResourceExistsException") => Err(VaultError::Conflict),
            Err(e) => Err(failed(&e)),
        }
    }

    async fn promote(&self, from: Option<&str>, to: &str) -> Result<(), VaultError> {
        let Some(labels) = self.labels().await? else { return Err(VaultError::Conflict) };
        if labels.current() != Some(to) {
            let current = labels.current();
            if current.filter(|id| *id != EMPTY_VERSION) != from || !labels.is_pending(to) {
                return Err(VaultError::Conflict);
            }
            let moved = self
                .client
                .update_secret_version_stage()
                .secret_id(&self.secret)
                .version_stage(CURRENT)
                .move_to_version_id(to)
                // Makes it a compare-and-move: it fails if the label is elsewhere.
                .set_remove_from_version_id(current.map(str::to_owned))
                .send()
                .await;
            if let Err(e) = moved {
                if !is_mismatch(e.code()) {
                    return Err(failed(&e));
                }
                // Another writer's doing, or our own: an attempt whose answer was
                // lost is sent again.
                let labels = self.labels().await?;
                if labels.as_ref().and_then(Labels::current) != Some(to) {
                    return Err(VaultError::Conflict);
                }
            }
        } else if !labels.has(to, PENDING) {
            return Ok(());
        }
        self.take_pending_from(to).await
    }

    async fn unstage(&self, id: &str) -> Result<(), VaultError> {
        match self.labels().await? {
            Some(labels) if labels.has(id, PENDING) => self.take_pending_from(id).await,
            _ => Ok(()),
        }
    }
}

/// Whether `UpdateSecretVersionStage` found labels or versions other than it was
/// told.
fn is_mismatch(code: Option<&str>) -> bool {
    matches!(code, Some("InvalidParameterException" | "InvalidRequestException" | "ResourceNotFoundException"))
}

fn failed<E>(error: &SdkError<E, HttpResponse>) -> VaultError
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    let detail = chain(error);
    // What was made a moment ago may not be there for every server yet.
    if is_transient(error) || error.code() == Some("ResourceNotFoundException") {
        VaultError::Unavailable(detail)
    } else {
        VaultError::Refused(detail)
    }
}
