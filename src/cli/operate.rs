//! `fileaccess revoke`, `inspect` and `signers`: an operator's questions to a
//! running service.

use std::cell::Cell;
use std::io::Read as _;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use serde_json::{Value, json};
use tonic::Code;

use super::Failure;
use super::service::Server;
use crate::client::{Client, Error};
use crate::pb;
use crate::pb::revoke_request::Target;
use crate::pb::revoke_response::Outcome;

/// What `fileaccess revoke` is told.
#[derive(Args)]
pub(super) struct Revoke {
    #[command(flatten)]
    target: RevokeTarget,
    /// The old key first: old URLs die at once, and so do those that replicas
    /// hand out until they have the new key.
    #[arg(long, conflicts_with = "object")]
    immediate: bool,
    /// Only tell what would end.
    #[arg(long)]
    dry_run: bool,
    /// Why, for the log.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Joins or goes on with the rotation that was asked for with this id.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// How long to wait for the proof. The rotation itself goes on.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = humantime::parse_duration)]
    wait: Duration,
    #[command(flatten)]
    server: Server,
}

/// Which URLs are to end.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct RevokeTarget {
    /// The leaked URL: all that its signer has signed ends. `-` reads it from
    /// standard input, which keeps it out of the shell's history.
    #[arg(value_name = "URL")]
    url: Option<String>,
    /// All that this signer has signed.
    #[arg(long, value_name = "NAME")]
    signer: Option<String>,
    /// The downloads of this object.
    #[arg(long, value_name = "BUCKET/KEY")]
    object: Option<String>,
}

/// What `fileaccess inspect` is told.
#[derive(Args)]
pub(super) struct Inspect {
    /// The URL. `-` reads it from standard input.
    #[arg(value_name = "URL")]
    url: String,
    #[command(flatten)]
    server: Server,
}

fn url_of(text: &str) -> Result<String, Failure> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut url = String::new();
    std::io::stdin().take(64 << 10).read_to_string(&mut url).map_err(Failure::running)?;
    Ok(url.trim().to_owned())
}

/// `fileaccess revoke`.
///
/// # Errors
/// What the service answers, and a proof that does not come in time.
pub(super) async fn revoke(ask: Revoke) -> Result<(), Failure> {
    let RevokeTarget { url, signer, object } = &ask.target;
    let target = match (url, signer, object) {
        (Some(url), _, _) => Target::Url(url_of(url)?),
        (_, Some(signer), _) => Target::Signer(signer.clone()),
        (_, _, Some(object)) => {
            let (bucket, key) = object
                .split_once('/')
                .ok_or_else(|| Failure::usage(format!("--object `{object}` must be a bucket, `/` and a key")))?;
            Target::Object(pb::ObjectRef { bucket: bucket.to_owned(), key: key.to_owned() })
        }
        (None, None, None) => return Err(Failure::usage("what is to be revoked? see --help")),
    };
    let urgency = if ask.immediate { pb::Urgency::Immediate } else { pb::Urgency::Planned };
    // Ours to choose, so that the wait can be taken up again.
    let request_id = ask.request_id.clone().unwrap_or_else(|| {
        ulid::Ulid::from_parts(crate::ops::presign::millis(SystemTime::now()), rand::random()).to_string()
    });
    let request = pb::RevokeRequest {
        target: Some(target),
        urgency: urgency.into(),
        reason: ask.reason.clone(),
        request_id,
        dry_run: true,
    };
    let client = ask.server.connect()?;
    let mut signer = None;
    // What would end is told before it does. An object may have been moved by an
    // earlier attempt, so that there is nothing to tell of it any more.
    if ask.dry_run || object.is_none() {
        let dry = client.ask(&request, |mut api, request| async move { api.revoke(request).await }).await?;
        print_radius(&ask.server, &dry);
        signer = dry.blast_radius.map(|radius| radius.signer);
    }
    if ask.dry_run {
        return Ok(());
    }
    let begun = Instant::now();
    let told = Cell::new(0);
    let attempt = || async {
        let attempt = pb::RevokeRequest { dry_run: false, ..request.clone() };
        match wait(&ask.server, &client, attempt, signer.as_deref(), &told).await {
            Ok(done) => Ok(Some(done)),
            Err(error) if error.code() == Some(Code::DeadlineExceeded) => Ok(None),
            Err(error) => Err(error),
        }
    };
    // If a replica dies after it has taken the old key away, another one gives the
    // signer a new key under an id of its own, and the name stands for that.
    let is_safe = !(ask.immediate && ask.target.signer.is_some());
    let done = loop {
        let answer = if is_safe { client.persist(attempt).await } else { attempt().await };
        let why = match answer {
            Ok(Some(done)) => break done,
            Ok(None) if begun.elapsed() < ask.wait => continue,
            Ok(None) => format!("no proof within {}", humantime::format_duration(ask.wait)),
            Err(error) if error.code().is_some() => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        let again = if is_safe {
            format!("--request-id {} waits for it again", request.request_id)
        } else {
            "`fileaccess signers` tells of it; ask again with a URL, not with the signer's name".to_owned()
        };
        return Err(Failure::running(format!("{why}; a rotation that has begun goes on: {again}")));
    };
    print_end(&ask.server, &done, told.get(), begun.elapsed());
    Ok(())
}

/// Waits for the answer, and meanwhile prints each step of the signer's
/// rotation as it is confirmed. `told` counts what was printed.
async fn wait(
    server: &Server,
    client: &Client,
    request: pb::RevokeRequest,
    signer: Option<&str>,
    told: &Cell<usize>,
) -> Result<pb::RevokeResponse, Error> {
    let mut watcher = client.api();
    let mut every = tokio::time::interval(Duration::from_millis(200));
    let answer = client.call(request, |mut api, request| async move { api.revoke(request).await });
    tokio::pin!(answer);
    loop {
        tokio::select! {
            answer = &mut answer => return answer,
            _ = every.tick(), if signer.is_some() => {
                // Whoever may not list signers gets the steps at the end.
                let Ok(listed) = watcher.list_signers(pb::ListSignersRequest {}).await else { continue };
                let signers = listed.into_inner().signers;
                let rotation = signers.into_iter().find(|s| Some(s.name.as_str()) == signer).and_then(|s| s.rotation);
                let steps = rotation.map(|rotation| rotation.steps).unwrap_or_default();
                for step in steps.iter().skip(told.get()) {
                    print_step(server, step);
                }
                told.set(told.get().max(steps.len()));
            }
        }
    }
}

fn print_step(server: &Server, step: &pb::RotationStep) {
    let at = time(step.at);
    server.print(|| json!({ "step": step.name, "at": at }), || format!("{at}  {}", step.name));
}

fn print_radius(server: &Server, dry: &pb::RevokeResponse) {
    match (&dry.blast_radius, &dry.outcome) {
        (Some(radius), Some(Outcome::SignerRotation(rotation))) => {
            let out = || {
                radius.urls_out.iter().map(
                    |out| json!({ "caller": out.caller, "urls": out.urls, "latest_expiry": time(out.latest_expiry) }),
                )
            };
            let routes = || radius.routes.iter().map(|r| format!("{}/{}", r.bucket, r.prefix));
            server.print(
                || {
                    json!({
                        "blast_radius": {
                            "signer": radius.signer,
                            "generation": radius.generation,
                            "access_key_id": rotation.old_access_key_id,
                            "routes": routes().collect::<Vec<_>>(),
                            "urls_out": out().collect::<Vec<_>>(),
                            "already_dead": dry.already_dead,
                        }
                    })
                },
                || {
                    let mut text = format!(
                        "signer        {}\nkey           {}, generation {}{}\nroutes        {}",
                        radius.signer,
                        rotation.old_access_key_id,
                        radius.generation,
                        if dry.already_dead { ", dead already" } else { "" },
                        routes().collect::<Vec<_>>().join(", "),
                    );
                    if radius.urls_out.is_empty() {
                        text.push_str("\nURLs out      none from this replica");
                    }
                    for out in &radius.urls_out {
                        let caller = if out.caller.is_empty() { "others" } else { &out.caller };
                        let line = format!(
                            "\nURLs out      {} to `{caller}`, the last until {}",
                            out.urls,
                            time(out.latest_expiry)
                        );
                        text.push_str(&line);
                    }
                    text
                },
            );
        }
        (_, Some(Outcome::ObjectRotation(rotation))) => server.print(
            || json!({ "blast_radius": { "downloads_of": "the object", "new_key": rotation.new_key } }),
            || format!("new key       {}", rotation.new_key),
        ),
        _ => {}
    }
}

fn print_end(server: &Server, done: &pb::RevokeResponse, told: usize, took: Duration) {
    let (steps, confirmed, facts) = match &done.outcome {
        Some(Outcome::SignerRotation(rotation)) => (
            &rotation.steps,
            rotation.confirmed_at,
            [
                ("signer", &rotation.signer),
                ("old_access_key_id", &rotation.old_access_key_id),
                ("new_access_key_id", &rotation.new_access_key_id),
            ]
            .map(|(name, value)| (name, value.clone()))
            .to_vec(),
        ),
        Some(Outcome::ObjectRotation(rotation)) => {
            (&rotation.steps, rotation.confirmed_at, vec![("new_key", rotation.new_key.clone())])
        }
        None => return,
    };
    for step in steps.iter().skip(told) {
        print_step(server, step);
    }
    let confirmed = time(confirmed);
    server.print(
        || {
            let mut end = json!({
                "confirmed_at": confirmed,
                "seconds": took.as_secs_f64(),
                "already_dead": done.already_dead,
                "request_id": done.request_id,
            });
            for (name, value) in &facts {
                end[*name] = json!(value);
            }
            end
        },
        || {
            let mut text = format!("{confirmed}  proven dead, after {:.1} s", took.as_secs_f64());
            for (name, value) in &facts {
                let name = name.replace("access_key_id", "key").replace('_', " ");
                text.push_str(&[&format!("\n{name:<14}"), value.as_str()].concat());
            }
            text
        },
    );
}

/// `fileaccess inspect`.
///
/// # Errors
/// What the service answers.
pub(super) async fn inspect(ask: Inspect) -> Result<(), Failure> {
    let request = pb::InspectRequest { url: url_of(&ask.url)? };
    let client = ask.server.connect()?;
    let found = client.ask(&request, |mut api, request| async move { api.inspect(request).await }).await?;
    let state = found.state().as_str_name().trim_start_matches("STATE_").to_owned();
    let lines = [
        ("state", state),
        ("method", found.method),
        ("bucket", found.bucket),
        ("key", found.key),
        ("version_id", found.version_id.unwrap_or_default()),
        ("signer", found.signer),
        ("access_key_id", found.access_key_id),
        ("issue_id", found.issue_id),
        ("signed_at", time(found.signed_at)),
        ("expires_at", time(found.expires_at)),
    ];
    let lines = || lines.iter().filter(|(_, value)| !value.is_empty());
    ask.server.print(
        || Value::Object(lines().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()),
        || lines().map(|(name, value)| format!("{name:<14}{value}")).collect::<Vec<_>>().join("\n"),
    );
    Ok(())
}

/// `fileaccess signers`.
///
/// # Errors
/// What the service answers.
pub(super) async fn signers(server: &Server) -> Result<(), Failure> {
    let request = pb::ListSignersRequest {};
    let list =
        server.connect()?.ask(&request, |mut api, request| async move { api.list_signers(request).await }).await?;
    for signer in list.signers {
        let kind = signer.kind().as_str_name().trim_start_matches("SIGNER_KIND_").to_lowercase().replace('_', "-");
        let routes: Vec<_> = signer.routes.iter().map(|r| format!("{}/{}", r.bucket, r.prefix)).collect();
        let urls: u64 = signer.urls_out.iter().map(|out| out.urls).sum();
        let rotation = signer.rotation.map(|r| match r.steps.last() {
            Some(step) => format!("{} since {}", step.name, time(step.at)),
            None if r.since.is_some() => format!("begun at {}", time(r.since)),
            None => "carried out by another replica".to_owned(),
        });
        let rows = [
            ("signer", signer.name),
            ("kind", kind),
            ("access_key_id", signer.access_key_id),
            ("generation", signer.generation.to_string()),
            ("since", time(signer.since)),
            ("key_expires_at", time(signer.key_expires_at)),
            ("routes", routes.join(", ")),
            ("urls_out", urls.to_string()),
            ("latest_expiry", time(signer.latest_expiry)),
            ("rotation", rotation.unwrap_or_default()),
            ("unavailable", signer.unavailable),
        ];
        let rows = || rows.iter().filter(|(_, value)| !value.is_empty());
        server.print(
            || Value::Object(rows().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()),
            || {
                let lines: Vec<_> = rows().map(|(name, value)| format!("{name:<15} {value}")).collect();
                lines.join("\n") + "\n"
            },
        );
    }
    Ok(())
}

/// RFC 3339 in UTC, to the millisecond; empty if there is none.
pub(super) fn time(time: Option<prost_types::Timestamp>) -> String {
    time.and_then(|time| SystemTime::try_from(time).ok())
        .map(|time| humantime::format_rfc3339_millis(time).to_string())
        .unwrap_or_default()
}
