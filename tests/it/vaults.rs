//! Secrets Manager as a vault and IAM as an issuer, on LocalStack.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use fileaccess::issuer::{Iam, IssuerError, KeyIssuer as _, Status};
use fileaccess::vault::secrets_manager::SecretsManager;
use fileaccess::vault::{Held, Vault, VaultError};

use crate::contract::{self, hides_secrets, id, key};
use crate::stage::Backend;
use crate::{Case, cases, localstack};

pub fn cases() -> Vec<Case> {
    cases![
        secrets_manager_keeps_the_contract,
        a_secret_that_was_made_without_a_value_keeps_it_too,
        one_of_two_promotions_wins,
        of_two_pending_versions_the_newest_counts,
        a_crash_between_the_steps_of_a_promotion_is_seen_through,
        what_is_no_key_is_corrupt,
        a_secret_that_is_being_deleted_is_refused,
        iam_issues_by_the_contract,
        a_key_is_asked_for_once,
        nobody_there_is_unavailable,
    ]
}

fn endpoint() -> String {
    localstack::shared().expect("it is ignored where LocalStack can't be had").endpoint.clone()
}

fn identity() -> SharedCredentialsProvider {
    SharedCredentialsProvider::new(Credentials::new("test", "test", None, None, "test"))
}

fn new_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("fileaccess/it-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn vault(secret: &str) -> SecretsManager {
    SecretsManager::new(secret, "us-east-1", Some(endpoint()), identity())
}

/// The SDK's client, for what the tests arrange.
fn client() -> aws_sdk_secretsmanager::Client {
    let config = aws_sdk_secretsmanager::Config::builder()
        .behavior_version(aws_sdk_secretsmanager::config::BehaviorVersion::latest())
        .region(aws_sdk_secretsmanager::config::Region::new("us-east-1"))
        .endpoint_url(endpoint())
        .credentials_provider(identity())
        .http_client(fileaccess::store::http_client());
    aws_sdk_secretsmanager::Client::from_conf(config.build())
}

/// Gives the version AWSPENDING, and takes it from none: LocalStack allows it.
async fn make_pending_too(secret: &str, id: &str) {
    client()
        .update_secret_version_stage()
        .secret_id(secret)
        .version_stage("AWSPENDING")
        .move_to_version_id(id)
        .send()
        .await
        .unwrap();
}

/// Puts a version with a label of its own, by which LocalStack keeps it.
async fn put(secret: &str, id: &str, label: &str, value: &str) {
    let put = client().put_secret_value().secret_id(secret).client_request_token(id);
    put.version_stages(label).secret_string(value).send().await.unwrap();
}

/// As AWS's own rotation has it.
fn json(name: char) -> String {
    let secret = key(name).secret_access_key().replace('\\', "\\\\").replace('"', "\\\"");
    format!("{{\"AccessKeyId\": \"AKIA{name}\", \"SecretAccessKey\": \"{secret}\"}}")
}

async fn secrets_manager_keeps_the_contract(_: Backend) {
    contract::vault(|| {
        let name = new_name();
        [Box::new(vault(&name)) as Box<dyn Vault>, Box::new(vault(&name))]
    })
    .await;
}

async fn a_secret_that_was_made_without_a_value_keeps_it_too(_: Backend) {
    let name = new_name();
    client().create_secret().name(&name).send().await.unwrap();
    let vault = vault(&name);
    assert_eq!(vault.read().await, Ok(Held::default()));
    vault.stage(&id('a'), &key('a')).await.unwrap();
    let held = vault.read().await.unwrap();
    assert_eq!((held.current, held.pending.unwrap().id), (None, id('a')));
    vault.promote(None, &id('a')).await.unwrap();

    // What AWS's own tools find.
    let value = client().get_secret_value().secret_id(&name).send().await.unwrap();
    assert_eq!(value.version_id(), Some(id('a').as_str()));
    let fields: serde_json::Value = serde_json::from_str(value.secret_string().unwrap()).unwrap();
    assert_eq!(fields["AccessKeyId"], "AKIAa");
    assert_eq!(fields["SecretAccessKey"], key('a').secret_access_key());
}

async fn one_of_two_promotions_wins(_: Backend) {
    let name = new_name();
    let (one, two) = (vault(&name), vault(&name));
    let mut current: Option<String> = None;
    for names in [['a', 'b'], ['c', 'd'], ['e', 'f'], ['g', 'h']] {
        one.stage(&id(names[0]), &key(names[0])).await.unwrap();
        // Not by `stage`, for which LocalStack would delete the other version.
        put(&name, &id(names[1]), "ANOTHER-WRITERS", &json(names[1])).await;
        make_pending_too(&name, &id(names[1])).await;
        let (to_one, to_two) = (id(names[0]), id(names[1]));
        let results = tokio::join!(one.promote(current.as_deref(), &to_one), two.promote(current.as_deref(), &to_two));
        let winner = match results {
            (Ok(()), Err(VaultError::Conflict)) => to_one,
            (Err(VaultError::Conflict), Ok(())) => to_two,
            other => panic!("{other:?}"),
        };
        let held = one.read().await.unwrap();
        assert_eq!(held.current.map(|version| version.id), Some(winner.clone()));
        assert_eq!(held.previous.map(|version| version.id), current);
        for name in names {
            one.unstage(&id(name)).await.unwrap();
        }
        current = Some(winner);
    }
}

async fn of_two_pending_versions_the_newest_counts(_: Backend) {
    let name = new_name();
    let vault = vault(&name);
    vault.stage(&id('z'), &key('z')).await.unwrap();
    // The same second as far as LocalStack tells: then by id.
    put(&name, &id('y'), "ANOTHER-WRITERS", &json('y')).await;
    make_pending_too(&name, &id('y')).await;
    let dates_differ = async || {
        let dates = client().list_secret_version_ids().secret_id(&name).send().await.unwrap();
        let date = |of: &str| {
            dates.versions().iter().find(|version| version.version_id() == Some(of)).unwrap().created_date().copied()
        };
        date(&id('z')) != date(&id('y'))
    };
    let newest = if dates_differ().await { 'y' } else { 'z' };
    assert_eq!(vault.read().await.unwrap().pending.unwrap().id, id(newest));

    tokio::time::sleep(Duration::from_millis(1100)).await;
    put(&name, &id('b'), "A-THIRD-WRITERS", &json('b')).await;
    make_pending_too(&name, &id('b')).await;
    assert_eq!(vault.read().await.unwrap().pending.unwrap().id, id('b'));
    for name in ['b', 'y', 'z'] {
        vault.unstage(&id(name)).await.unwrap();
    }
    assert_eq!(vault.read().await, Ok(Held::default()));
}

async fn a_crash_between_the_steps_of_a_promotion_is_seen_through(_: Backend) {
    let name = new_name();
    let vault = vault(&name);
    vault.stage(&id('a'), &key('a')).await.unwrap();
    vault.promote(None, &id('a')).await.unwrap();
    make_pending_too(&name, &id('a')).await;
    let held = vault.read().await.unwrap();
    assert_eq!((held.current.unwrap().id, held.pending), (id('a'), None));
    vault.promote(None, &id('a')).await.unwrap();
    let described = client().describe_secret().secret_id(&name).send().await.unwrap();
    let labels = &described.version_ids_to_stages().unwrap()[&id('a')];
    assert_eq!(labels, &["AWSCURRENT"], "the rest of the promotion was made up for");
}

async fn what_is_no_key_is_corrupt(_: Backend) {
    for value in [
        "{\"AccessKeyId\": \"AKIA\", \"SecretAccessKey\": {\"s3cret\": 1}}",
        "{\"AccessKeyId\": \"s3cret\"}",
        "s3cret",
        "\"s3cret\"",
    ] {
        let name = new_name();
        client().create_secret().name(&name).client_request_token(id('a')).secret_string(value).send().await.unwrap();
        let error = vault(&name).read().await.unwrap_err();
        assert!(matches!(error, VaultError::Corrupt(_)), "{error}");
        hides_secrets(&error);
    }
}

async fn a_secret_that_is_being_deleted_is_refused(_: Backend) {
    let name = new_name();
    let vault = vault(&name);
    vault.stage(&id('a'), &key('a')).await.unwrap();
    vault.read().await.unwrap();
    client().delete_secret().secret_id(&name).recovery_window_in_days(7).send().await.unwrap();
    for result in [
        vault.read().await.map(drop),
        vault.stage(&id('b'), &key('b')).await,
        vault.promote(None, &id('a')).await,
        vault.unstage(&id('a')).await,
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, VaultError::Refused(_)), "{error}");
        hides_secrets(&error);
    }
}

async fn iam_issues_by_the_contract(_: Backend) {
    let user = format!("issuer-{}", std::process::id());
    let config = aws_sdk_iam::Config::builder()
        .behavior_version(aws_sdk_iam::config::BehaviorVersion::latest())
        .region(aws_sdk_iam::config::Region::new("us-east-1"))
        .endpoint_url(endpoint())
        .credentials_provider(identity())
        .http_client(fileaccess::store::http_client());
    let client = aws_sdk_iam::Client::from_conf(config.build());
    client.create_user().user_name(&user).send().await.unwrap();
    contract::issuer(&Iam::new("us-east-1", Some(endpoint()), identity()), &user).await;
}

async fn a_key_is_asked_for_once(_: Backend) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        // Hangs up without an answer, as a server that crashes does.
        while listener.accept().await.is_ok() {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
    });
    let iam = Iam::new("us-east-1", Some(endpoint), identity());
    assert!(matches!(iam.list("u").await, Err(IssuerError::Unavailable(_))));
    assert_eq!(COUNT.swap(0, Ordering::Relaxed), 3, "what changes nothing is asked again");
    assert!(matches!(iam.create("u").await, Err(IssuerError::Unavailable(_))));
    assert_eq!(COUNT.load(Ordering::Relaxed), 1, "a second attempt could make a second key");
}

async fn nobody_there_is_unavailable(_: Backend) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let vault = SecretsManager::new("fileaccess/nobody", "us-east-1", Some(endpoint.clone()), identity());
    let iam = Iam::new("us-east-1", Some(endpoint), identity());
    let (a, secret) = (id('a'), key('a'));
    let (read, staged, promoted, unstaged) =
        tokio::join!(vault.read(), vault.stage(&a, &secret), vault.promote(None, &a), vault.unstage(&a));
    for result in [read.map(drop), staged, promoted, unstaged] {
        assert!(matches!(result, Err(VaultError::Unavailable(_))), "{result:?}");
        hides_secrets(&result);
    }
    let (listed, made, set, deleted) = tokio::join!(
        iam.list("u"),
        iam.create("u"),
        iam.set_status("u", "AKIA", Status::Inactive),
        iam.delete("u", "AKIA")
    );
    for result in [listed.map(drop), made.map(drop), set, deleted] {
        assert!(matches!(result, Err(IssuerError::Unavailable(_))), "{result:?}");
    }
}
