//! What each ask needs to be granted: the only table of it.

use std::fmt;

use super::grant::{Action, Load, LoadKind};
use crate::object::BucketName;
use crate::ops::form_upload::ContentType;
use crate::ops::presign::Operation;
use crate::ops::upload_token::Session;
use crate::ops::{
    abort_upload, complete_upload, inspect, list, list_parts, presign, revoke, sign_parts, signers, start_upload, stat,
};

/// What has to be granted for an ask to be done.
#[derive(Clone, Copy, Debug)]
pub struct Need<'a> {
    /// What is to be done.
    pub action: Action,
    /// To what.
    pub on: Scope<'a>,
    /// What is to be uploaded.
    pub upload: Option<Load<'a>>,
}

/// What an ask is about.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// One object.
    Key(&'a BucketName, &'a str),
    /// All keys that begin with this.
    Prefix(&'a BucketName, &'a str),
    /// All that a signer signs for: each of its routes.
    Signer(&'a str),
    /// All that some signer signs for. The op asks again about each.
    AnySigner,
    /// The same, where the signer is not known yet.
    SignerOfUrl,
}

impl fmt::Display for Scope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(bucket, key) => write!(f, "key `{key}` of bucket `{bucket}`"),
            Self::Prefix(bucket, prefix) => write!(f, "prefix `{prefix}` of bucket `{bucket}`"),
            Self::Signer(name) => write!(f, "signer `{name}`"),
            Self::AnySigner => f.write_str("any signer"),
            Self::SignerOfUrl => f.write_str("the signer of that URL, if there is one"),
        }
    }
}

/// What can be asked for.
pub trait Ask {
    /// What has to be granted for it.
    fn needs(&self) -> Need<'_>;
}

/// An action on one signer, asked for on the way to something else.
#[derive(Clone, Copy, Debug)]
pub struct OfSigner<'a>(pub Action, pub &'a str);

impl Ask for OfSigner<'_> {
    fn needs(&self) -> Need<'_> {
        Need { action: self.0, on: Scope::Signer(self.1), upload: None }
    }
}

impl Ask for presign::Ask {
    fn needs(&self) -> Need<'_> {
        let mut on = Scope::Key(&self.bucket, self.key.as_str());
        let (action, upload) = match &self.operation {
            Operation::Download(_) => (Action::Download, None),
            Operation::Upload(upload) => (Action::Upload, Some(upload.into())),
            Operation::Head(_) => (Action::Head, None),
            Operation::Delete(_) => (Action::Delete, None),
            Operation::Part(part) => (Action::Upload, Some(part.session.load())),
            Operation::FormUpload(form) => {
                if form.key_prefix_only {
                    on = Scope::Prefix(&self.bucket, self.key.as_str());
                }
                let load = Load {
                    kind: LoadKind::Form,
                    size: Some(form.max_size),
                    content_type: match &form.content_type {
                        ContentType::Exactly(content_type) => Some(content_type),
                        // Whatever may follow is in no range for certain.
                        ContentType::Default | ContentType::Prefix(_) => None,
                    },
                    create_only: false,
                    checksum: false,
                };
                (Action::Upload, Some(load))
            }
        };
        Need { action, on, upload }
    }
}

impl Ask for start_upload::Ask {
    fn needs(&self) -> Need<'_> {
        let load = Load {
            kind: LoadKind::Parts,
            size: Some(self.plan.size()),
            content_type: self.upload.content_type.as_deref(),
            create_only: self.upload.create_only,
            checksum: self.algorithm.is_some(),
        };
        let on = Scope::Key(&self.bucket, self.key.as_str());
        Need { action: Action::Upload, on, upload: Some(load) }
    }
}

/// What it takes to go on with an upload: what it took to start it, and that is
/// looked at again.
fn going_on(session: &Session) -> Need<'_> {
    Need { upload: Some(session.load()), ..looking_at(session) }
}

/// Whoever may upload may see what there is of it, and give it up.
fn looking_at(session: &Session) -> Need<'_> {
    let on = Scope::Key(&session.bucket, session.key.as_str());
    Need { action: Action::Upload, on, upload: None }
}

impl Ask for sign_parts::Ask {
    fn needs(&self) -> Need<'_> {
        going_on(&self.session)
    }
}

impl Ask for complete_upload::Ask {
    fn needs(&self) -> Need<'_> {
        going_on(&self.session)
    }
}

impl Ask for list_parts::Ask {
    fn needs(&self) -> Need<'_> {
        looking_at(&self.session)
    }
}

impl Ask for abort_upload::Ask {
    fn needs(&self) -> Need<'_> {
        looking_at(&self.session)
    }
}

impl Ask for list::Ask {
    fn needs(&self) -> Need<'_> {
        Need { action: Action::List, on: Scope::Prefix(&self.bucket, self.prefix.as_str()), upload: None }
    }
}

impl Ask for stat::Ask {
    fn needs(&self) -> Need<'_> {
        Need { action: Action::Stat, on: Scope::Key(&self.bucket, self.key.as_str()), upload: None }
    }
}

impl Ask for revoke::Ask {
    fn needs(&self) -> Need<'_> {
        let (action, on) = match &self.target {
            revoke::Target::Object(bucket, key) => (Action::RevokeObject, Scope::Key(bucket, key.as_str())),
            revoke::Target::Signer(name) => (Action::RevokeSigner, Scope::Signer(name)),
            revoke::Target::KeyOfUrl(_) => (Action::RevokeSigner, Scope::SignerOfUrl),
        };
        Need { action, on, upload: None }
    }
}

impl Ask for inspect::Ask {
    fn needs(&self) -> Need<'_> {
        let on = match &self.object {
            Some((bucket, key)) => Scope::Key(bucket, key.as_str()),
            None => Scope::SignerOfUrl,
        };
        Need { action: Action::Inspect, on, upload: None }
    }
}

impl Ask for signers::Ask {
    fn needs(&self) -> Need<'_> {
        Need { action: Action::Signers, on: Scope::AnySigner, upload: None }
    }
}
