//! Keys that this service does not manage: the AWS default chain, a profile,
//! or a fixed key from the environment.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};

use super::Signer;
use super::presign::chain;
use crate::config::{KeyVariables, Source};
use crate::store;

/// How long a source may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How soon a source that failed is asked again.
const RETRY: Duration = Duration::from_secs(5);
/// How often a key without an end is looked up again.
const REFRESH: Duration = Duration::from_mins(5);

/// The provider behind a source. Fixed keys are read from the environment
/// here, once.
pub async fn provider(source: &Source) -> SharedCredentialsProvider {
    let config = || ProviderConfig::default().with_http_client(store::http_client());
    match source {
        Source::Chain => {
            SharedCredentialsProvider::new(DefaultCredentialsChain::builder().configure(config()).build().await)
        }
        Source::Profile(name) => SharedCredentialsProvider::new(
            ProfileFileCredentialsProvider::builder().configure(&config()).profile_name(name).build(),
        ),
        Source::Environment(KeyVariables { access_key_id, secret_access_key, session_token }) => {
            // `Settings::load` has made sure that they are set.
            let read = |name: &String| std::env::var(name).unwrap_or_default();
            let token = session_token.as_ref().map(read);
            let key = Credentials::new(read(access_key_id), read(secret_access_key), token, None, "environment");
            SharedCredentialsProvider::new(key)
        }
    }
}

/// Looks the key up once, and says when to do it again.
pub async fn refresh(signer: &Signer, provider: &SharedCredentialsProvider) -> Duration {
    let answer = tokio::time::timeout(PATIENCE, provider.provide_credentials()).await;
    let now = SystemTime::now();
    let why = match answer {
        Ok(Ok(credentials)) => {
            // Half of what is left, so that a URL's life is rarely cut short by its key.
            let next = match credentials.expiry() {
                Some(end) => (end.duration_since(now).unwrap_or_default() / 2).clamp(RETRY, REFRESH),
                None => REFRESH,
            };
            signer.adopt(credentials, now);
            return next;
        }
        Ok(Err(e)) => chain(&e),
        Err(_) => format!("no answer in {PATIENCE:?}"),
    };
    // A key at hand stays in use until it ends by itself.
    match signer.key(now) {
        Ok(_) => tracing::warn!(signer = signer.name, why, "key could not be looked up again"),
        Err(_) => signer.withdraw(&why),
    }
    RETRY
}

/// Keeps the key of `signer` fresh, for ever.
pub async fn keep(signer: Arc<Signer>, provider: SharedCredentialsProvider, mut next: Duration) {
    loop {
        tokio::time::sleep(next).await;
        next = refresh(&signer, &provider).await;
    }
}
