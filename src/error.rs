//! What can go wrong, and the one place where it becomes a gRPC status.

use prost::Message as _;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::caller::Unreadable;
use crate::object::ObjectKey;
use crate::pb::ErrorReason;
use crate::policy::grant::Action;

/// When to try again if nobody can tell: long enough for a queue to empty.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The domain of every `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "fileaccess";

/// What a field of a request has wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field in the request, as `upload.metadata`.
    pub field: String,
    /// What would be right, as a sentence about the field.
    pub description: String,
}

impl Violation {
    /// The field `field` `must` ….
    pub fn new(field: impl Into<String>, must: impl AsRef<str>) -> Self {
        let field = field.into();
        let description = format!("`{field}` must {}", must.as_ref());
        Self { field, description }
    }
}

/// Why a call failed. The message is for the caller; `detail` fields are for
/// the log and never go onto the wire.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Fields are missing or wrong.
    #[error("{}", list(.0))]
    Invalid(Vec<Violation>),
    /// The page token belongs to another listing, or is none.
    #[error(
        "`page_token` must be the `next_page_token` of a page that the same caller got for the same bucket, prefix and delimiter"
    )]
    PageToken,
    /// The batch has too few or too many items.
    #[error("`requests` must have 1 to {max} items, not {got}")]
    BatchSize {
        /// How many there were.
        got: usize,
        /// How many there may be.
        max: usize,
    },
    /// The upload token is none of this service, or of another caller.
    #[error("`upload_token` must be the `upload_token` of an upload that the same caller has started")]
    UploadToken,
    /// S3 has no such upload.
    #[error("there is no such upload: it was completed, aborted, or cleaned up")]
    UploadNotFound,
    /// The upload's own deadline has passed.
    #[error("the deadline of the upload has passed; start another")]
    UploadExpired,
    /// The parts do not make the object that was announced.
    #[error("the parts do not make the object that was announced: {0}")]
    UploadMismatch(String),
    /// There is such an object, and none was to be overwritten.
    #[error("there is such an object already, and `create_only` was asked for")]
    ObjectExists,
    /// The settings have no such bucket.
    #[error("there is no bucket `{0}` in the settings")]
    UnknownBucket(String),
    /// S3 has no such object or version.
    #[error("there is no such object")]
    ObjectNotFound,
    /// Someone wrote to the object while it was rotated.
    #[error("{}", changed(.kept.as_ref()))]
    SourceChanged {
        /// Where what was there before is kept. `None`: where it was; nothing
        /// was deleted.
        kept: Option<ObjectKey>,
    },
    /// No route covers the key.
    #[error("no route covers this key in bucket `{0}`")]
    NoRoute(String),
    /// The signer's key is not managed here.
    #[error("signer `{0}` is ambient: this service does not manage its key, so replace that key where it is managed")]
    NotRevocable(String),
    /// No signer signs with the URL's key.
    #[error("no signer of this service signs with the key of that URL")]
    ForeignUrl,
    /// The settings have no such signer.
    #[error("there is no signer `{0}` in the settings")]
    UnknownSigner(String),
    /// Both places of an IAM user are taken by keys that are not this service's.
    #[error("both access keys of IAM user `{user}` are unknown here: {}; delete one of them if it is not in use", .keys.join(", "))]
    KeySlotsTaken {
        /// The user.
        user: String,
        /// The ids of the keys.
        keys: Vec<String>,
    },
    /// No identity came with the call.
    #[error("the call carries no identity that this listener accepts")]
    NoCaller,
    /// The identity that came with the call can't be read.
    #[error("the caller can't be told: {0}")]
    CallerUnreadable(Unreadable),
    /// The caller asks for more than it may at a time.
    #[error("too many {what} a second for this caller; try again in {} ms", wait.as_millis())]
    RateLimited {
        /// Of what.
        what: &'static str,
        /// When there is room again.
        wait: Duration,
    },
    /// The replica has as many calls as it takes.
    #[error("this replica has as many calls as it takes; try again, or another one")]
    Overloaded,
    /// There is no room for the record of what would be done.
    #[error("the audit trail can't keep up, and nothing is done without a record; try again later")]
    AuditFull,
    /// No grant lets the caller do this. Says nothing of whether there is what
    /// was asked for.
    #[error("no grant lets caller `{caller}` do `{action}` on {what}")]
    NotGranted {
        /// Who asked.
        caller: String,
        /// For what.
        action: Action,
        /// On what.
        what: String,
    },
    /// A grant would allow it, but for these fields.
    #[error("no grant goes this far: {}", list(.0))]
    OverCeiling(Vec<Violation>),
    /// The signer has no usable key.
    #[error("signer `{signer}` has no usable key at present")]
    SignerUnavailable {
        /// The signer's name.
        signer: String,
        /// Why, for the log.
        detail: String,
    },
    /// S3 can't be reached, or fails.
    #[error("the object store does not answer at present")]
    StoreUnavailable {
        /// Why, for the log.
        detail: String,
    },
    /// S3 refuses the service's own identity or the request as such.
    #[error("the object store refuses the service's own request")]
    StoreRefused {
        /// Why, for the log.
        detail: String,
    },
    /// The deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The request is not a message of this API, or too large.
    #[error("the request must be a message of this API, of at most {max} bytes")]
    Message {
        /// The limit, in bytes.
        max: usize,
        /// What the decoder said, for the log.
        detail: String,
    },
    /// A defect of the service.
    #[error("internal error")]
    Internal {
        /// What, for the log.
        detail: String,
    },
}

fn list(violations: &[Violation]) -> String {
    violations.iter().map(|v| v.description.as_str()).collect::<Vec<_>>().join("; ")
}

fn changed(kept: Option<&ObjectKey>) -> String {
    match kept {
        None => "the object was written to while it was copied; nothing was deleted".to_owned(),
        Some(key) => format!(
            "the object was written to after it was copied to `{}`; the copy and what was written are both kept, \
             and another `request_id` rotates the latter",
            key.as_str()
        ),
    }
}

impl Error {
    /// One wrong field.
    pub fn invalid(field: impl Into<String>, must: impl AsRef<str>) -> Self {
        Self::Invalid(vec![Violation::new(field, must)])
    }

    /// A defect of the service.
    pub fn internal(detail: impl Into<String>) -> Self {
        Self::Internal { detail: detail.into() }
    }

    /// The gRPC code and the stable reason.
    #[must_use]
    pub fn code(&self) -> (Code, ErrorReason) {
        match self {
            Self::Invalid(_) => (Code::InvalidArgument, ErrorReason::InvalidField),
            Self::PageToken => (Code::InvalidArgument, ErrorReason::InvalidPageToken),
            Self::UploadToken => (Code::InvalidArgument, ErrorReason::InvalidUploadToken),
            Self::UploadNotFound => (Code::NotFound, ErrorReason::UploadNotFound),
            Self::UploadExpired => (Code::FailedPrecondition, ErrorReason::UploadExpired),
            Self::UploadMismatch(_) => (Code::FailedPrecondition, ErrorReason::UploadMismatch),
            Self::ObjectExists => (Code::AlreadyExists, ErrorReason::ObjectExists),
            Self::BatchSize { .. } => (Code::InvalidArgument, ErrorReason::BatchSize),
            Self::Message { .. } => (Code::InvalidArgument, ErrorReason::InvalidMessage),
            Self::UnknownBucket(_) => (Code::NotFound, ErrorReason::UnknownBucket),
            Self::ObjectNotFound => (Code::NotFound, ErrorReason::ObjectNotFound),
            Self::SourceChanged { .. } => (Code::Aborted, ErrorReason::SourceChanged),
            Self::NoRoute(_) => (Code::FailedPrecondition, ErrorReason::NoRoute),
            Self::NotRevocable(_) => (Code::FailedPrecondition, ErrorReason::NotRevocable),
            Self::ForeignUrl => (Code::FailedPrecondition, ErrorReason::ForeignUrl),
            Self::UnknownSigner(_) => (Code::NotFound, ErrorReason::UnknownSigner),
            Self::KeySlotsTaken { .. } => (Code::FailedPrecondition, ErrorReason::KeySlotsTaken),
            Self::NoCaller => (Code::Unauthenticated, ErrorReason::NoCaller),
            Self::CallerUnreadable(_) => (Code::Unauthenticated, ErrorReason::UnreadableCaller),
            Self::RateLimited { .. } => (Code::ResourceExhausted, ErrorReason::RateLimited),
            Self::Overloaded => (Code::ResourceExhausted, ErrorReason::Overloaded),
            Self::AuditFull => (Code::ResourceExhausted, ErrorReason::AuditFull),
            Self::NotGranted { .. } => (Code::PermissionDenied, ErrorReason::NotGranted),
            Self::OverCeiling(_) => (Code::PermissionDenied, ErrorReason::OverCeiling),
            Self::SignerUnavailable { .. } => (Code::Unavailable, ErrorReason::SignerUnavailable),
            Self::StoreUnavailable { .. } => (Code::Unavailable, ErrorReason::StoreUnavailable),
            Self::StoreRefused { .. } => (Code::FailedPrecondition, ErrorReason::StoreRefused),
            Self::Deadline => (Code::DeadlineExceeded, ErrorReason::Deadline),
            Self::Internal { .. } => (Code::Internal, ErrorReason::Internal),
        }
    }

    /// The stable reason, as `google.rpc.ErrorInfo` and the audit trail have it.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        let name = self.code().1.as_str_name();
        name.strip_prefix("ERROR_REASON_").unwrap_or(name)
    }

    /// What the log may have and the wire may not.
    #[must_use]
    pub fn detail(&self) -> Option<&str> {
        match self {
            Self::SignerUnavailable { detail, .. }
            | Self::StoreUnavailable { detail }
            | Self::StoreRefused { detail }
            | Self::Message { detail, .. }
            | Self::Internal { detail } => Some(detail),
            Self::Invalid(_)
            | Self::PageToken
            | Self::UploadToken
            | Self::UploadNotFound
            | Self::UploadExpired
            | Self::UploadMismatch(_)
            | Self::ObjectExists
            | Self::BatchSize { .. }
            | Self::UnknownBucket(_)
            | Self::ObjectNotFound
            | Self::SourceChanged { .. }
            | Self::NoRoute(_)
            | Self::NotRevocable(_)
            | Self::ForeignUrl
            | Self::UnknownSigner(_)
            | Self::KeySlotsTaken { .. }
            | Self::NoCaller
            | Self::CallerUnreadable(_)
            | Self::RateLimited { .. }
            | Self::Overloaded
            | Self::AuditFull
            | Self::NotGranted { .. }
            | Self::OverCeiling(_)
            | Self::Deadline => None,
        }
    }

    fn details(&self) -> ErrorDetails {
        let mut details = ErrorDetails::new();
        details.set_error_info(self.reason(), DOMAIN, []);
        match self {
            Self::Invalid(violations) | Self::OverCeiling(violations) => {
                for Violation { field, description } in violations {
                    details.add_bad_request_violation(field, description);
                }
            }
            Self::PageToken => {
                details.add_bad_request_violation("page_token", self.to_string());
            }
            Self::BatchSize { .. } => {
                details.add_bad_request_violation("requests", self.to_string());
            }
            Self::RateLimited { wait, .. } => {
                details.set_retry_info(Some(*wait));
            }
            Self::Overloaded | Self::AuditFull => {
                details.set_retry_info(Some(RETRY_DELAY));
            }
            Self::UploadToken => {
                details.add_bad_request_violation("upload_token", self.to_string());
            }
            Self::UnknownBucket(_)
            | Self::UploadNotFound
            | Self::UploadExpired
            | Self::UploadMismatch(_)
            | Self::ObjectExists
            | Self::ObjectNotFound
            | Self::SourceChanged { .. }
            | Self::NoRoute(_)
            | Self::NotRevocable(_)
            | Self::ForeignUrl
            | Self::UnknownSigner(_)
            | Self::KeySlotsTaken { .. }
            | Self::NoCaller
            | Self::CallerUnreadable(_)
            | Self::NotGranted { .. }
            | Self::SignerUnavailable { .. }
            | Self::StoreUnavailable { .. }
            | Self::StoreRefused { .. }
            | Self::Deadline
            | Self::Message { .. }
            | Self::Internal { .. } => {}
        }
        details
    }
}

impl From<Error> for Status {
    /// Logs what may not go onto the wire, and leaves it behind.
    fn from(error: Error) -> Self {
        if let Some(detail) = error.detail() {
            tracing::warn!(reason = error.code().1.as_str_name(), detail, "{error}");
        }
        Status::with_error_details(error.code().0, error.to_string(), error.details())
    }
}

impl From<Error> for tonic_types::Status {
    /// The status of one item of a batch: what the call alone would have got.
    fn from(error: Error) -> Self {
        let status = Status::from(error);
        // `with_error_details` puts exactly this message into the details.
        Self::decode(status.details()).unwrap_or_else(|_| Self {
            code: status.code().into(),
            message: status.message().to_owned(),
            details: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_name_the_reason_and_the_field_and_hide_the_rest() {
        let status = Status::from(Error::invalid("upload.tags", "be few"));
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "INVALID_FIELD");
        assert_eq!(details.error_info().unwrap().domain, DOMAIN);
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "upload.tags");

        let status = Status::from(Error::StoreRefused { detail: "AKIA-and-more".into() });
        assert!(!format!("{status:?}").contains("AKIA-and-more"));
        assert_eq!(status.code(), Code::FailedPrecondition);
    }

    #[test]
    fn the_readme_explains_every_reason() {
        let readme = include_str!("../README.md");
        let reasons: Vec<_> = (1..1000).filter_map(|n| ErrorReason::try_from(n).ok()).collect();
        assert!(reasons.len() > 20);
        for reason in reasons {
            let name = reason.as_str_name().trim_start_matches("ERROR_REASON_");
            assert_eq!(readme.matches(&format!("\n| `{name}` | `")).count(), 1, "{name}");
        }
    }

    #[test]
    fn an_item_of_a_batch_has_the_details_of_the_call() {
        let item = tonic_types::Status::from(Error::UnknownBucket("x".into()));
        assert_eq!(item.code, Code::NotFound as i32);
        assert_eq!(item.details.len(), 1);
    }
}
