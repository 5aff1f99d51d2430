//! What all calls to IAM and Secrets Manager have in common.

use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use crate::store::http_client;

/// What a client is made with: three attempts, each of 5 seconds at the most.
pub(crate) fn client_config(region: &str, endpoint: Option<String>, identity: SharedCredentialsProvider) -> SdkConfig {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(2))
        .operation_attempt_timeout(Duration::from_secs(5))
        .build();
    let mut config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(region.to_owned()))
        .credentials_provider(identity)
        .http_client(http_client())
        .retry_config(RetryConfig::standard().with_max_attempts(3))
        .timeout_config(timeouts);
    config.set_endpoint_url(endpoint);
    config.build()
}

/// Whether the same call may go well later: nobody answered, or the service
/// says that it is its own fault or that it is too much at once.
pub(crate) fn is_transient<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    let Some(response) = error.raw_response() else { return true };
    let code = error.code().unwrap_or_default();
    matches!(response.status().as_u16(), 429 | 500..)
        || code.contains("Throttling")
        || matches!(
            code,
            "RequestLimitExceeded"
                | "TooManyRequestsException"
                | "ConcurrentModification"
                | "EntityTemporarilyUnmodifiable"
        )
}
