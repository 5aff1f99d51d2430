//! What every vault and every issuer of keys keeps to, whatever is behind it:
//! `local_vaults` holds those to it that need nothing, `vaults` those on
//! LocalStack.

use aws_credential_types::Credentials;

use fileaccess::issuer::{IssuerError, KeyIssuer, Status};
use fileaccess::vault::{Held, Vault, VaultError, Version};

/// Two handles on one new vault, as two replicas have them.
pub type Pair = [Box<dyn Vault>; 2];

pub fn id(name: char) -> String {
    format!("rotation-{}", name.to_string().repeat(32))
}

pub fn key(name: char) -> Credentials {
    // The provider's name is no part of what a vault keeps.
    Credentials::new(format!("AKIA{name}"), format!("s3cret/{name}+\"\\é"), None, None, "test")
}

/// Neither what is shown nor what is logged has a secret in it.
pub fn hides_secrets(shown: &impl std::fmt::Debug) {
    assert!(!format!("{shown:?}").contains("s3cret"), "{shown:?}");
}

/// The ids by label, after a look whether each has its own key and hides it.
async fn labels(vault: &dyn Vault) -> [Option<char>; 3] {
    let held = vault.read().await.unwrap();
    hides_secrets(&held);
    hides_secrets(&vault);
    let Held { current, pending, previous } = held;
    [current, pending, previous].map(|version| {
        version.map(|Version { id: held_id, key: held_key, .. }| {
            let name = held_id.chars().last().unwrap();
            assert_eq!(held_id, id(name));
            assert_eq!(held_key.access_key_id(), key(name).access_key_id());
            assert_eq!(held_key.secret_access_key(), key(name).secret_access_key());
            name
        })
    })
}

/// Everything but races.
pub async fn vault(new: impl Fn() -> Pair) {
    a_key_goes_from_pending_to_current_to_previous(new()).await;
    everything_can_be_said_twice(new()).await;
    a_writer_that_is_late_moves_nothing(new()).await;
    a_pending_key_can_be_given_up(new()).await;
    ids_are_those_that_every_vault_can_keep(new()).await;
}

async fn a_key_goes_from_pending_to_current_to_previous([one, two]: Pair) {
    assert_eq!(labels(&*one).await, [None, None, None]);
    one.stage(&id('a'), &key('a')).await.unwrap();
    assert_eq!(labels(&*two).await, [None, Some('a'), None], "never current before it was promoted");
    two.promote(None, &id('a')).await.unwrap();
    assert_eq!(labels(&*one).await, [Some('a'), None, None]);
    one.stage(&id('b'), &key('b')).await.unwrap();
    assert_eq!(labels(&*two).await, [Some('a'), Some('b'), None]);
    one.promote(Some(&id('a')), &id('b')).await.unwrap();
    assert_eq!(labels(&*two).await, [Some('b'), None, Some('a')]);
    two.stage(&id('c'), &key('c')).await.unwrap();
    two.promote(Some(&id('b')), &id('c')).await.unwrap();
    assert_eq!(labels(&*one).await, [Some('c'), None, Some('b')]);
    // What came before is remembered, by id.
    assert_eq!(one.read().await.unwrap().current.unwrap().retired, ["AKIAa", "AKIAb"]);
}

async fn everything_can_be_said_twice([one, two]: Pair) {
    for vault in [&one, &two, &one] {
        vault.stage(&id('a'), &key('a')).await.unwrap();
        assert_eq!(labels(&*two).await, [None, Some('a'), None]);
    }
    for vault in [&one, &two, &one] {
        vault.promote(None, &id('a')).await.unwrap();
        assert_eq!(labels(&*two).await, [Some('a'), None, None]);
    }
    one.stage(&id('a'), &key('a')).await.unwrap();
    assert_eq!(labels(&*one).await, [Some('a'), None, None], "what was promoted is not pending again");
    for vault in [&one, &two] {
        vault.unstage(&id('a')).await.unwrap();
        vault.unstage(&id('x')).await.unwrap();
        assert_eq!(labels(&*two).await, [Some('a'), None, None]);
    }
}

async fn a_writer_that_is_late_moves_nothing([one, two]: Pair) {
    assert_eq!(one.promote(None, &id('a')).await, Err(VaultError::Conflict), "it was never staged");
    one.stage(&id('a'), &key('a')).await.unwrap();
    let error = two.stage(&id('a'), &key('b')).await.unwrap_err();
    assert_eq!(error, VaultError::Conflict);
    hides_secrets(&error);
    assert_eq!(labels(&*one).await, [None, Some('a'), None], "the key under an id never changes");
    assert_eq!(one.promote(Some(&id('x')), &id('a')).await, Err(VaultError::Conflict));
    one.promote(None, &id('a')).await.unwrap();

    one.stage(&id('b'), &key('b')).await.unwrap();
    assert_eq!(two.promote(None, &id('b')).await, Err(VaultError::Conflict));
    two.stage(&id('c'), &key('c')).await.unwrap();
    assert_eq!(labels(&*one).await, [Some('a'), Some('c'), None], "the label moved away from the other writer");
    assert_eq!(one.promote(Some(&id('a')), &id('b')).await, Err(VaultError::Conflict), "it is not pending any more");
    two.promote(Some(&id('a')), &id('c')).await.unwrap();
    assert_eq!(one.promote(Some(&id('c')), &id('a')).await, Err(VaultError::Conflict), "there is no way back");
    assert_eq!(labels(&*one).await, [Some('c'), None, Some('a')]);
}

async fn a_pending_key_can_be_given_up([one, two]: Pair) {
    one.unstage(&id('a')).await.unwrap();
    for (name, held) in [('a', [None, None, None]), ('c', [Some('b'), None, None])] {
        one.stage(&id(name), &key(name)).await.unwrap();
        two.unstage(&id('x')).await.unwrap();
        assert_eq!(labels(&*one).await[1], Some(name));
        two.unstage(&id(name)).await.unwrap();
        assert_eq!(labels(&*one).await, held);
        assert_eq!(one.promote(None, &id(name)).await, Err(VaultError::Conflict));
        if name == 'a' {
            one.stage(&id('b'), &key('b')).await.unwrap();
            one.promote(None, &id('b')).await.unwrap();
        }
    }
}

async fn ids_are_those_that_every_vault_can_keep([one, _]: Pair) {
    for length in [0, 31, 65] {
        let staged = one.stage(&"i".repeat(length), &key('a')).await;
        assert!(matches!(staged, Err(VaultError::Refused(_))), "{length}: {staged:?}");
    }
    for length in [32, 64] {
        one.stage(&"i".repeat(length), &key('a')).await.unwrap();
    }
}

/// Two replicas that rotate at once: exactly one of them wins, from an empty
/// vault and from a full one. Not for LocalStack's Secrets Manager, which loses
/// AWSCURRENT in this race: see `vaults`.
pub async fn one_of_two_rotations_wins(new: impl Fn() -> Pair) {
    async fn rotate(vault: &dyn Vault, from: Option<&str>, to: char) -> Result<(), VaultError> {
        vault.stage(&id(to), &key(to)).await?;
        vault.promote(from, &id(to)).await
    }
    for _ in 0..10 {
        let [one, two] = new();
        let mut current: Option<char> = None;
        for names in [['a', 'b'], ['c', 'd'], ['e', 'f']] {
            let from = current.map(id);
            let results =
                tokio::join!(rotate(&*one, from.as_deref(), names[0]), rotate(&*two, from.as_deref(), names[1]));
            let winner = match results {
                (Ok(()), Err(VaultError::Conflict)) => names[0],
                (Err(VaultError::Conflict), Ok(())) => names[1],
                other => panic!("{other:?}"),
            };
            let [now, _, before] = labels(&*one).await;
            assert_eq!((now, before), (Some(winner), current));
            current = now;
        }
    }
}

/// `user` is there and has no keys.
pub async fn issuer(issuer: &dyn KeyIssuer, user: &str) {
    let missing = format!("{user}-missing");
    assert_eq!(issuer.list(&missing).await, Err(IssuerError::NoSuchUser));
    assert_eq!(issuer.create(&missing).await, Err(IssuerError::NoSuchUser));

    assert_eq!(issuer.list(user).await, Ok(Vec::new()));
    let first = issuer.create(user).await.unwrap();
    let second = issuer.create(user).await.unwrap();
    assert_eq!(issuer.create(user).await, Err(IssuerError::LimitExceeded));
    for key in [&first, &second] {
        for shown in [format!("{issuer:?}"), format!("{key:?}"), format!("{:?}", issuer.list(user).await)] {
            assert!(!shown.contains(key.secret_access_key()), "{shown}");
        }
    }

    let statuses = async || {
        let keys = issuer.list(user).await.unwrap();
        assert!(keys.iter().all(|key| key.created.elapsed().unwrap_or_default().as_secs() < 300), "{keys:?}");
        let mut statuses: Vec<_> = keys.into_iter().map(|key| (key.id, key.status)).collect();
        statuses.sort_by_key(|(id, _)| id != first.access_key_id());
        statuses
    };
    let (a, b) = (first.access_key_id(), second.access_key_id());
    assert_eq!(statuses().await, [(a.to_owned(), Status::Active), (b.to_owned(), Status::Active)]);
    for status in [Status::Inactive, Status::Inactive, Status::Active, Status::Active, Status::Inactive] {
        issuer.set_status(user, a, status).await.unwrap();
        assert_eq!(statuses().await, [(a.to_owned(), status), (b.to_owned(), Status::Active)]);
    }
    assert_eq!(issuer.create(user).await, Err(IssuerError::LimitExceeded), "an inactive key counts");

    for _ in 0..2 {
        issuer.delete(user, a).await.unwrap();
        assert_eq!(statuses().await, [(b.to_owned(), Status::Active)]);
    }
    issuer.set_status(user, a, Status::Inactive).await.unwrap();
    let activated = issuer.set_status(user, a, Status::Active).await;
    assert!(matches!(activated, Err(IssuerError::Refused(_))), "{activated:?}");
    issuer.delete(user, b).await.unwrap();
    assert_eq!(issuer.list(user).await, Ok(Vec::new()));
}
