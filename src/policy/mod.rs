//! Who may do what. An op can't run without the [`Permit`] that only
//! [`Policy::authorize`] makes, and that needs a grant: there is no other way.

pub mod grant;
pub mod needs;
pub mod reread;
pub mod table;

use std::collections::BTreeMap;

use arc_swap::ArcSwap;

use crate::caller::Caller;
use crate::config::Settings;
use crate::error::Error;
use crate::object::{BucketName, Lifetime, Prefix};
use grant::Action;
use needs::{Ask, Need, OfSigner, Scope};
use table::{Grants, Question, Verdict};

/// A bucket and a prefix, of which one signer signs for all.
type Route = (BucketName, Prefix);

/// The rules of this replica: whatever no grant allows is refused.
#[derive(Debug)]
pub struct Policy {
    ceiling: Lifetime,
    /// What each signer signs for.
    routes: BTreeMap<String, Vec<Route>>,
    grants: ArcSwap<Grants>,
}

/// Proof that `caller` may have `ask` done. Ops take it by value.
///
/// Only [`Policy::authorize`] makes one, and it is good for one op:
///
/// ```
/// use fileaccess::app::App;
/// use fileaccess::caller::Caller;
/// use fileaccess::error::Error;
/// use fileaccess::object::Lifetime;
/// use fileaccess::ops::stat::{Ask, stat};
/// use fileaccess::policy::Permit;
///
/// async fn right(app: &App, caller: Caller, ask: Ask) -> Result<(), Error> {
///     let permit: Permit<Ask> = app.policy.authorize(caller, ask)?;
///     let (_, _, _): (&Caller, &Ask, Lifetime) = (permit.caller(), permit.ask(), permit.ceiling());
///     stat(app, permit).await?;
///     Ok(())
/// }
/// ```
///
/// None can be made up (E0451: its fields are private),
///
/// ```compile_fail,E0451
/// # use fileaccess::app::App;
/// # use fileaccess::caller::Caller;
/// # use fileaccess::error::Error;
/// # use fileaccess::object::Lifetime;
/// # use fileaccess::ops::stat::{Ask, stat};
/// # use fileaccess::policy::Permit;
/// async fn made_up(app: &App, caller: Caller, ask: Ask) -> Result<(), Error> {
///     let permit: Permit<Ask> = Permit { caller, ask, ceiling: Lifetime::MAX };
///     stat(app, permit).await?;
///     Ok(())
/// }
/// ```
///
/// turned to something else (E0616),
///
/// ```compile_fail,E0616
/// # use fileaccess::app::App;
/// # use fileaccess::caller::Caller;
/// # use fileaccess::error::Error;
/// # use fileaccess::ops::stat::{Ask, stat};
/// # use fileaccess::policy::Permit;
/// async fn widened(app: &App, caller: Caller, ask: Ask) -> Result<(), Error> {
///     let mut permit: Permit<Ask> = app.policy.authorize(caller, ask.clone())?;
///     permit.ask = ask;
///     stat(app, permit).await?;
///     Ok(())
/// }
/// ```
///
/// or used twice (E0382).
///
/// ```compile_fail,E0382
/// # use fileaccess::app::App;
/// # use fileaccess::caller::Caller;
/// # use fileaccess::error::Error;
/// # use fileaccess::ops::stat::{Ask, stat};
/// # use fileaccess::policy::Permit;
/// async fn twice(app: &App, caller: Caller, ask: Ask) -> Result<(), Error> {
///     let permit: Permit<Ask> = app.policy.authorize(caller, ask)?;
///     stat(app, permit).await?;
///     stat(app, permit).await?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Permit<A> {
    caller: Caller,
    ask: A,
    ceiling: Lifetime,
}

impl Policy {
    /// The rules that the settings have.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let routes = |signer: &String| {
            let routes = settings.routes.iter().filter(|route| route.signer == *signer);
            (signer.clone(), routes.map(|route| (route.bucket.clone(), route.prefix.clone())).collect())
        };
        Self {
            ceiling: settings.ttl.ceiling,
            routes: settings.signers.keys().map(routes).collect(),
            grants: ArcSwap::from_pointee(Grants::compile(&settings.grants)),
        }
    }

    /// Takes up other grants, all at once: whoever asks is judged by the former
    /// or by these.
    pub fn replace(&self, grants: Grants) {
        self.grants.store(grants.into());
    }

    /// How many grants there are.
    #[must_use]
    pub fn grants(&self) -> usize {
        self.grants.load().count()
    }

    /// Permits one ask, if a grant allows all of it.
    ///
    /// # Errors
    /// [`Error::NotGranted`], the same whether or not there is what was asked
    /// for, and [`Error::OverCeiling`].
    pub fn authorize<A: Ask>(&self, caller: Caller, ask: A) -> Result<Permit<A>, Error> {
        let need = ask.needs();
        match self.judge(caller.as_str(), &need) {
            Verdict::Granted(ceiling) => {
                let ceiling = ceiling.map_or(self.ceiling, |ceiling| ceiling.min(self.ceiling));
                Ok(Permit { caller, ask, ceiling })
            }
            Verdict::OverCeiling(violations) => Err(Error::OverCeiling(violations)),
            Verdict::NotGranted => Err(not_granted(&caller, &need)),
        }
    }

    fn judge(&self, caller: &str, need: &Need<'_>) -> Verdict {
        let Need { action, on, upload } = *need;
        let grants = self.grants.load();
        let route = |(bucket, prefix): &Route| {
            let question = Question { caller, action, bucket, key: prefix.as_str(), upload };
            matches!(grants.judge(&question), Verdict::Granted(_))
        };
        let granted = match on {
            Scope::Key(bucket, key) | Scope::Prefix(bucket, key) => {
                return grants.judge(&Question { caller, action, bucket, key, upload });
            }
            Scope::Signer(name) => self.all_routes(name, route),
            Scope::AnySigner | Scope::SignerOfUrl => self.routes.keys().any(|name| self.all_routes(name, route)),
        };
        if granted { Verdict::Granted(None) } else { Verdict::NotGranted }
    }

    /// Whether all that a signer signs for is granted. If that is nothing, or
    /// there is no such signer: whether all that any signs for is, so that
    /// others hear no more than a refusal.
    fn all_routes(&self, name: &str, granted: impl Fn(&Route) -> bool) -> bool {
        let own = self.routes.get(name).filter(|routes| !routes.is_empty());
        let of = own.map_or_else(|| self.routes.values().flatten().collect(), |own| own.iter().collect::<Vec<_>>());
        // Nothing at all is nothing that a grant could cover.
        !of.is_empty() && of.into_iter().all(granted)
    }
}

impl<A> Permit<A> {
    /// Who asks.
    #[must_use]
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// What was asked for and granted.
    #[must_use]
    pub fn ask(&self) -> &A {
        &self.ask
    }

    /// What was asked for and granted, when it is done.
    #[must_use]
    pub fn into_ask(self) -> A {
        self.ask
    }

    /// The longest life that a URL may have under this permit.
    #[must_use]
    pub fn ceiling(&self) -> Lifetime {
        self.ceiling
    }
}

impl<A: Ask> Permit<A> {
    /// Whether its caller may do `action` to `signer` as well.
    #[must_use]
    pub fn reaches(&self, policy: &Policy, action: Action, signer: &str) -> bool {
        let need = OfSigner(action, signer);
        matches!(policy.judge(self.caller.as_str(), &need.needs()), Verdict::Granted(_))
    }

    /// The refusal in its place, if it turns out later that no grant allows it.
    #[must_use]
    pub fn refusal(&self) -> Error {
        not_granted(&self.caller, &self.ask.needs())
    }
}

fn not_granted(caller: &Caller, need: &Need<'_>) -> Error {
    Error::NotGranted { caller: caller.to_string(), action: need.action, what: need.on.to_string() }
}

#[cfg(test)]
mod tests;
