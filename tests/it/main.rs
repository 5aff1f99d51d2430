//! The integration tests: one binary, each test on a stage of its own. What
//! both the embedded S3 and LocalStack can serve is run on both.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

mod audit;
mod behaviours;
mod binary;
mod browser;
mod callers;
mod certificates;
mod contract;
mod delays;
mod files;
mod fleet;
mod forms;
mod grants;
mod hostile;
mod inspect;
mod keys;
mod local_vaults;
mod localstack;
mod object_rotation;
mod operate;
mod outside;
mod puppet;
mod refusals;
mod relay;
mod replicas;
mod revoke;
mod service;
mod sidecar;
mod signer_rotation;
mod stage;
mod tools;
mod uploads;
mod vaults;
mod webdriver;

use std::pin::Pin;

use libtest_mimic::{Arguments, Trial};
use stage::Backend;

/// A test's body.
type Body = Pin<Box<dyn Future<Output = ()>>>;
/// A test on some S3.
type Case = (&'static str, fn(Backend) -> Body);

/// Names each function, and makes a [`Case`] of it.
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        vec![$((concat!(module_path!(), "::", stringify!($name)), |backend| Box::pin($name(backend)))),*]
    };
}
pub(crate) use cases;

fn main() {
    if let Some(config) = std::env::var_os(puppet::CONFIG) {
        return puppet::run(&config);
    }
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let local = if arguments.list { Ok(()) } else { localstack::shared().map(|_| ()) };
    let tools = if arguments.list { Ok(()) } else { tools::program("grpcurl").map(|_| ()) };
    let envoy = if arguments.list { Ok(()) } else { sidecar::envoy().map(|_| ()) };
    let browser = webdriver::installed();
    for missing in [local.err(), tools.err(), envoy.err(), browser.err()].into_iter().flatten() {
        // Where the tools are installed for certain, their absence is a defect.
        assert!(std::env::var_os("CI").is_none(), "a tool is missing in CI: {missing}");
        eprintln!("SKIPPED, and counted as ignored, for want of a tool: {missing}");
    }

    for (name, case) in behaviours::cases()
        .into_iter()
        .chain(refusals::cases())
        .chain(revoke::cases())
        .chain(inspect::cases())
        .chain(audit::cases())
        .chain(signer_rotation::cases())
        .chain(object_rotation::cases())
        .chain(uploads::cases())
        .chain(forms::cases())
        .chain(files::cases())
    {
        trials.push(trial(&format!("embedded::{name}"), move || case(Backend::Embedded), true));
        trials.push(trial(&format!("localstack::{name}"), move || case(Backend::LocalStack), local.is_ok()));
    }
    for (name, case) in browser::browser_cases() {
        let on_localstack = local.is_ok() && browser.is_ok();
        trials.push(trial(&format!("embedded::{name}"), move || case(Backend::Embedded), browser.is_ok()));
        trials.push(trial(&format!("localstack::{name}"), move || case(Backend::LocalStack), on_localstack));
    }
    for (name, case) in behaviours::localstack_cases()
        .into_iter()
        .chain(object_rotation::localstack_cases())
        .chain(revoke::localstack_cases())
        .chain(operate::localstack_cases())
        .chain(browser::localstack_cases())
        .chain(uploads::localstack_cases())
    {
        trials.push(trial(&format!("localstack::{name}"), move || case(Backend::LocalStack), local.is_ok()));
    }
    for (name, case) in vaults::cases().into_iter().chain(replicas::cases()).chain(delays::cases()) {
        trials.push(trial(name, move || case(Backend::LocalStack), local.is_ok()));
    }
    for (name, case) in service::cases()
        .into_iter()
        .chain(keys::cases())
        .chain(local_vaults::cases())
        .chain(grants::cases())
        .chain(callers::cases())
        .chain(hostile::cases())
        .chain(operate::cases())
        .chain(files::embedded_cases())
        .chain(browser::cases())
    {
        trials.push(trial(name, move || case(Backend::Embedded), true));
    }
    for (name, case) in service::grpcurl_cases().into_iter().chain(binary::cases()) {
        trials.push(trial(name, move || case(Backend::Embedded), tools.is_ok()));
    }
    for (name, case) in browser::page_cases() {
        trials.push(trial(name, move || case(Backend::Embedded), browser.is_ok()));
    }
    for (name, case) in sidecar::cases() {
        trials.push(trial(name, move || case(Backend::Embedded), envoy.is_ok()));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: &str, body: impl FnOnce() -> Body + Send + 'static, can_run: bool) -> Trial {
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(body());
        Ok(())
    };
    Trial::test(name.replacen("it::", "", 1), run).with_ignored_flag(!can_run)
}
