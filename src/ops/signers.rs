//! `ListSigners`: the units of revocation.

use std::sync::Arc;
use std::time::SystemTime;

use crate::app::App;
use crate::error::Error;
use crate::policy::Permit;
use crate::signer::{KeySnapshot, Signer};

/// All signers.
#[derive(Clone, Copy, Debug)]
pub struct Ask;

/// A signer, with the key that it signs with now or why it can't.
pub type Found = (Arc<Signer>, Result<Arc<KeySnapshot>, Error>);

/// The signers, in the order of their names.
#[must_use]
pub fn signers(app: &App, permit: &Permit<Ask>, now: SystemTime) -> Vec<Found> {
    let Ask = permit.ask();
    app.signers.values().map(|signer| (Arc::clone(signer), signer.key(now))).collect()
}
