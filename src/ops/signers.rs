//! `ListSigners`: the units of revocation.

use std::sync::Arc;
use std::time::SystemTime;

use crate::app::App;
use crate::error::Error;
use crate::policy::Permit;
use crate::policy::grant::Action;
use crate::rotation::keeper::UnderWay;
use crate::signer::usage::UrlsOut;
use crate::signer::{KeySnapshot, Signer};

/// All signers that the caller may see.
#[derive(Clone, Copy, Debug)]
pub struct Ask;

/// A signer, and what this replica knows of it.
pub struct Found {
    /// The signer.
    pub signer: Arc<Signer>,
    /// The key that it signs with now, or why it can't.
    pub key: Result<Arc<KeySnapshot>, Error>,
    /// What that key has signed on this replica that is still out.
    pub urls_out: Vec<UrlsOut>,
    /// The rotation that this replica carries out.
    pub under_way: Option<Arc<UnderWay>>,
    /// The key that is to sign next, whichever replica has made it.
    pub pending: Option<String>,
}

/// The signers all of whose routes the caller is granted to see, in the order
/// of their names.
#[must_use]
#[expect(clippy::needless_pass_by_value, reason = "a permit is good for one op")]
pub fn signers(app: &App, permit: Permit<Ask>, now: SystemTime) -> Vec<Found> {
    let Ask = permit.ask();
    let seen = app.signers.values().filter(|signer| permit.reaches(&app.policy, Action::Signers, &signer.name));
    let found = seen.map(|signer| {
        let key = signer.key(now);
        let keeper = app.keepers.get(&signer.name);
        Found {
            signer: Arc::clone(signer),
            urls_out: key.as_ref().map(|key| key.usage.out(now)).unwrap_or_default(),
            key,
            under_way: keeper.and_then(|keeper| keeper.under_way()),
            pending: keeper.and_then(|keeper| keeper.pending()),
        }
    });
    found.collect()
}
