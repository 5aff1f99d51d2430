//! Presign a look at an object's headers: `HeadObject`.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html>

use std::collections::BTreeMap;

use crate::error::Error;
use crate::signer::fast::Plain;
use crate::signer::presign::{SignedRequest, Terms};

/// A look at an object's headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Head {
    /// The version to look at.
    pub version_id: Option<String>,
}

impl Head {
    pub(super) fn plain(&self) -> Plain {
        let query = self.version_id.clone().map(|version| ("versionId", version)).into_iter().collect();
        Plain { method: "HEAD", query, headers: BTreeMap::new() }
    }

    pub(super) async fn sdk(&self, terms: &Terms<'_>) -> Result<SignedRequest, Error> {
        let operation = terms
            .client
            .head_object()
            .bucket(terms.bucket)
            .key(terms.key.as_str())
            .set_version_id(self.version_id.clone());
        SignedRequest::from_sdk(operation.customize().map_request(terms.tag()).presigned(terms.config()?).await)
    }
}
