//! Who may do what. An op can't run without the [`Permit`] that only
//! [`Policy::authorize`] makes.

use crate::caller::Caller;
use crate::object::Lifetime;

/// The rules of this replica.
///
/// Listeners are local (`config::Listen`), so every caller is a process of
/// this machine or pod, and may ask for all that the routes cover.
#[derive(Clone, Debug)]
pub struct Policy {
    ceiling: Lifetime,
}

/// Proof that `caller` may have `ask` done. Ops take it by value.
#[derive(Debug)]
pub struct Permit<A> {
    caller: Caller,
    ask: A,
    ceiling: Lifetime,
}

impl Policy {
    /// The rules, with the longest life that a URL may have.
    #[must_use]
    pub fn new(ceiling: Lifetime) -> Self {
        Self { ceiling }
    }

    /// Permits one ask, within the rules.
    #[must_use]
    pub fn authorize<A>(&self, caller: Caller, ask: A) -> Permit<A> {
        Permit { caller, ask, ceiling: self.ceiling }
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

    /// A permit for something that this one implies.
    pub(crate) fn imply<B>(&self, ask: B) -> Permit<B> {
        Permit { caller: self.caller.clone(), ask, ceiling: self.ceiling }
    }
}
