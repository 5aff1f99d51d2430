//! `fileaccess bootstrap`: makes what `iam-user` signers need, with no more
//! rights than their routes take.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::Failure;
use crate::app::{KeySource, Sources, driver};
use crate::config::{RouteSettings, Settings, SignerSettings, VaultSettings};
use crate::issuer::Iam;
use crate::rotation::keeper::version_of;
use crate::rotation::plan::Goal;
use crate::store::Store;
use crate::store::cors::{self, Origin};

/// The name of the inline policy of each signer's user.
const POLICY: &str = "fileaccess-signer";
/// How long the first key may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// Makes the users, puts their policies, and makes their first keys. What is
/// there already stays as it is, but for the policies, which follow the routes.
/// Pages of the origins in `cors`, if there are any, may use the buckets' URLs.
///
/// # Errors
/// The first thing that can't be done. Running it again goes on from there.
pub(super) async fn run(settings: Settings, cors: &[Origin]) -> Result<(), Failure> {
    let sources = Sources::of(&settings).await;
    let iam = Iam::new(&settings.iam.region, settings.iam.endpoint.clone(), sources.identity.clone());
    let mut any = false;
    for (name, source) in sources.signers {
        let KeySource::IamUser { user, vault, issuer } = source else { continue };
        any = true;
        let failed = |e: &dyn std::fmt::Display| Failure::running(format!("signer `{name}`: {e}"));
        let made = iam.ensure_user(&user).await.map_err(|e| failed(&e))?;
        println!("signer `{name}`: user `{user}` {}", if made { "made" } else { "is there" });
        let policy = signer_policy(&settings, &name).to_string();
        iam.put_policy(&user, POLICY, &policy).await.map_err(|e| failed(&e))?;
        println!("signer `{name}`: policy `{POLICY}` put");

        // What is refused for good is told at once, rather than tried again and again.
        let held = vault.read().await.map_err(|e| failed(&e))?;
        issuer.list(&user).await.map_err(|e| failed(&e))?;
        if let Some(current) = held.current {
            println!("signer `{name}`: key {} is in the vault", current.key.access_key_id());
            continue;
        }
        let driver = driver(&settings, &name, user, vault, issuer).ok_or_else(|| failed(&"no route names it"))?;
        let version = version_of(&name, &rand::random::<u128>().to_string());
        let (tell, told) = watch::channel(Vec::new());
        tokio::time::timeout(PATIENCE, driver.drive(&Goal::Finish, &version, &tell))
            .await
            .map_err(|_| failed(&"its first key was not accepted by S3 within 2 minutes; the log says more"))?
            .map_err(|e| failed(&e))?;
        for done in told.borrow().iter() {
            println!("signer `{name}`: key {} {}", done.key, done.step);
        }
    }
    if !cors.is_empty() {
        for (name, bucket) in &settings.buckets {
            let store = Store::new(bucket, sources.identity.clone());
            let failed = |e| Failure::running(format!("bucket `{name}`: its CORS rules can't be set: {e}"));
            let put = store.allow_origins(cors).await.map_err(failed)?;
            println!("bucket `{name}`: CORS rule `{}` {}", cors::RULE, if put { "put" } else { "is there" });
        }
    } else if !any {
        println!("no signer of the settings is of the kind `iam-user`: there is nothing to make");
    }
    Ok(())
}

/// Prints the policies of all signers, and of the service's own identity, and
/// the CORS rule for these origins, if there are any.
///
/// # Errors
/// None: all that is needed is in the settings.
pub(super) fn print_policies(settings: &Settings, cors: &[Origin]) -> Result<(), Failure> {
    let users = iam_users(settings).map(|(name, _, _)| (name.to_owned(), signer_policy(settings, name)));
    let users: BTreeMap<String, Value> = users.collect();
    let mut all = json!({ "signers": users, "service": service_policy(settings) });
    if !cors.is_empty() {
        all["cors"] = cors_rules(cors);
    }
    println!("{}", serde_json::to_string_pretty(&all).map_err(Failure::running)?);
    Ok(())
}

/// The CORS rule as `aws s3api put-bucket-cors` takes it.
fn cors_rules(origins: &[Origin]) -> Value {
    json!({ "CORSRules": [{
        "ID": cors::RULE,
        "AllowedOrigins": origins.iter().map(Origin::as_str).collect::<Vec<_>>(),
        "AllowedMethods": cors::METHODS,
        "AllowedHeaders": ["*"],
        "ExposeHeaders": cors::EXPOSED,
        "MaxAgeSeconds": cors::MAX_AGE,
    }] })
}

fn iam_users(settings: &Settings) -> impl Iterator<Item = (&str, &str, &VaultSettings)> {
    settings.signers.iter().filter_map(|(name, signer)| match signer {
        SignerSettings::IamUser { user, vault } => Some((name.as_str(), user.as_str(), vault)),
        SignerSettings::Ambient { .. } => None,
    })
}

/// What the holder of the signer's URLs may do, at the most: what this service
/// signs, on the keys that its routes send to this signer.
fn signer_policy(settings: &Settings, signer: &str) -> Value {
    let ours = || settings.routes.iter().filter(|route| route.signer == signer);
    // A longer prefix may belong to another signer. Where it holds one of ours
    // in turn, a denial would be too much.
    let is_within = |inner: &RouteSettings, outer: &RouteSettings| {
        inner.bucket == outer.bucket && inner.prefix.as_str().starts_with(outer.prefix.as_str())
    };
    let others = settings.routes.iter().filter(|route| {
        route.signer != signer && ours().any(|own| is_within(route, own)) && !ours().any(|own| is_within(own, route))
    });
    let mut statements = vec![json!({
        "Effect": "Allow",
        "Action": [
            "s3:GetObject", "s3:GetObjectVersion", "s3:PutObject", "s3:PutObjectTagging",
            "s3:DeleteObject", "s3:DeleteObjectVersion",
        ],
        "Resource": ours().map(|route| keys_arn(settings, route)).collect::<Vec<_>>(),
    })];
    let denied: Vec<_> = others.map(|route| keys_arn(settings, route)).collect();
    if !denied.is_empty() {
        statements.push(json!({ "Effect": "Deny", "Action": "s3:*", "Resource": denied }));
    }
    json!({ "Version": "2012-10-17", "Statement": statements })
}

/// What the service itself does: it lists, copies and deletes, and runs the
/// signers' keys and vaults. It never signs a URL.
fn service_policy(settings: &Settings) -> Value {
    let buckets: Vec<_> = settings
        .buckets
        .values()
        .map(|bucket| format!("arn:{}:s3:::{}", partition(&bucket.region), bucket.bucket))
        .collect();
    let keys: Vec<_> = settings.routes.iter().map(|route| keys_arn(settings, route)).collect();
    let mut statements = vec![
        json!({
            "Effect": "Allow",
            "Action": ["s3:ListBucket", "s3:ListBucketVersions", "s3:ListBucketMultipartUploads"],
            "Resource": buckets,
        }),
        json!({
            "Effect": "Allow",
            "Action": [
                "s3:GetObject", "s3:GetObjectVersion", "s3:GetObjectTagging", "s3:GetObjectVersionTagging",
                "s3:PutObject", "s3:PutObjectTagging", "s3:DeleteObject", "s3:DeleteObjectVersion",
                "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts",
            ],
            "Resource": keys,
        }),
    ];
    let partition_of_iam = partition(&settings.iam.region);
    let users: Vec<_> =
        iam_users(settings).map(|(_, user, _)| format!("arn:{partition_of_iam}:iam::*:user/{user}")).collect();
    if !users.is_empty() {
        statements.push(json!({
            "Effect": "Allow",
            "Action": ["iam:ListAccessKeys", "iam:CreateAccessKey", "iam:UpdateAccessKey", "iam:DeleteAccessKey"],
            "Resource": users,
        }));
    }
    let secrets: Vec<_> = iam_users(settings)
        .filter_map(|(_, _, vault)| match vault {
            VaultSettings::SecretsManager(secret) => Some(secret),
            VaultSettings::File(_) => None,
        })
        // Secrets Manager adds six random characters to the name.
        .map(|secret| {
            let partition = partition(&secret.region);
            format!("arn:{partition}:secretsmanager:{}:*:secret:{}-??????", secret.region, secret.secret)
        })
        .collect();
    if !secrets.is_empty() {
        statements.push(json!({
            "Effect": "Allow",
            "Action": [
                "secretsmanager:CreateSecret", "secretsmanager:DescribeSecret", "secretsmanager:GetSecretValue",
                "secretsmanager:PutSecretValue", "secretsmanager:UpdateSecretVersionStage",
            ],
            "Resource": secrets,
        }));
    }
    json!({ "Version": "2012-10-17", "Statement": statements })
}

/// All keys of a route.
fn keys_arn(settings: &Settings, route: &RouteSettings) -> String {
    let bucket = settings.buckets.get(&route.bucket);
    let (name, region) = bucket.map_or(("", ""), |bucket| (bucket.bucket.as_str(), bucket.region.as_str()));
    format!("arn:{}:s3:::{name}/{}*", partition(region), escaped(route.prefix.as_str()))
}

/// What stands for itself where IAM would see a wildcard or a variable.
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_variables.html#policy-vars-specialchars>
fn escaped(prefix: &str) -> String {
    let mut text = String::with_capacity(prefix.len());
    for c in prefix.chars() {
        match c {
            '*' | '?' | '$' => text.extend(['$', '{', c, '}']),
            _ => text.push(c),
        }
    }
    text
}

/// <https://docs.aws.amazon.com/whitepapers/latest/aws-fault-isolation-boundaries/partitions.html>
fn partition(region: &str) -> &'static str {
    match region {
        _ if region.starts_with("cn-") => "aws-cn",
        _ if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        let text = "
            [buckets.files]\nbucket = 'prod-files'\nregion = 'us-gov-west-1'\n
            [signers.main]\nkind = 'iam-user'\nuser = 'u-main'\nvault = { file = '/v' }\n
            [signers.tenant]\nkind = 'iam-user'\nuser = 'u-tenant'\n
            vault = { secrets_manager = { secret = 'fa/tenant', region = 'eu-central-1' } }\n
            [[routes]]\nbucket = 'files'\nsigner = 'main'\n
            [[routes]]\nbucket = 'files'\nprefix = 'tenant/*/'\nsigner = 'tenant'\n
            [[routes]]\nbucket = 'files'\nprefix = 'tenant/*/shared/'\nsigner = 'main'\n
            [[routes]]\nbucket = 'files'\nprefix = 'private/'\nsigner = 'tenant'\n";
        Settings::load(text, &BTreeMap::new()).unwrap()
    }

    #[test]
    fn a_signer_may_do_what_its_routes_say_and_no_more() {
        let policy = signer_policy(&settings(), "tenant");
        assert_eq!(
            policy["Statement"][0]["Resource"],
            json!(["arn:aws-us-gov:s3:::prod-files/tenant/${*}/*", "arn:aws-us-gov:s3:::prod-files/private/*"])
        );
        // Its route within the other's, which it is not allowed to touch.
        let denied = json!(["arn:aws-us-gov:s3:::prod-files/tenant/${*}/shared/*"]);
        assert_eq!(policy["Statement"][1], json!({ "Effect": "Deny", "Action": "s3:*", "Resource": denied }));
        // `main` has a route within `tenant/*/`, so that only `private/` can be denied.
        let policy = signer_policy(&settings(), "main");
        assert_eq!(policy["Statement"][1]["Resource"], json!(["arn:aws-us-gov:s3:::prod-files/private/*"]));
    }

    #[test]
    fn the_service_may_run_its_users_and_secrets_and_no_others() {
        let policy = service_policy(&settings());
        let resources: Vec<_> = policy["Statement"].as_array().unwrap().iter().map(|s| s["Resource"].clone()).collect();
        assert_eq!(resources[0], json!(["arn:aws-us-gov:s3:::prod-files"]));
        assert_eq!(resources[2], json!(["arn:aws:iam::*:user/u-main", "arn:aws:iam::*:user/u-tenant"]));
        assert_eq!(resources[3], json!(["arn:aws:secretsmanager:eu-central-1:*:secret:fa/tenant-??????"]));
    }
}
