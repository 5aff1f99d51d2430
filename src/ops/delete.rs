//! Presign a removal: `DeleteObject`.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObject.html>

use std::collections::BTreeMap;

use crate::error::Error;
use crate::signer::fast::Plain;
use crate::signer::presign::{SignedRequest, Terms};

/// A removal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Delete {
    /// The version to remove for good.
    pub version_id: Option<String>,
}

impl Delete {
    pub(super) fn plain(&self) -> Plain {
        let mut query = vec![("x-id", "DeleteObject".to_owned())];
        query.extend(self.version_id.clone().map(|version| ("versionId", version)));
        Plain { method: "DELETE", query, headers: BTreeMap::new() }
    }

    pub(super) async fn sdk(&self, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
        let operation = terms
            .client
            .delete_object()
            .bucket(terms.bucket)
            .key(terms.key.as_str())
            .set_version_id(self.version_id.clone());
        SignedRequest::from_sdk(operation.customize().map_request(terms.tag()).presigned(terms.config()?).await)
    }
}
