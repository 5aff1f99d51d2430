//! Takes up new grants when the settings file changes. Anything wrong with it
//! leaves the grants as they are.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::Policy;
use super::table::Grants;
use crate::config::Settings;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// A settings file as it was when the process started.
#[derive(Clone, Debug)]
pub struct SettingsFile {
    /// Where it is.
    pub path: PathBuf,
    /// The variables that override it.
    pub env: BTreeMap<String, String>,
    /// What was in it.
    pub text: String,
}

impl SettingsFile {
    /// Looks at the file for ever, and at once on SIGHUP. What is new there is
    /// taken only when it has been the same twice, so that a file which is
    /// being written is left alone.
    ///
    /// # Errors
    /// Those of the system, when SIGHUP can't be had.
    pub async fn keep(self, policy: &Policy) -> std::io::Result<()> {
        let mut hangup = signal(SignalKind::hangup())?;
        let mut settled = Ok(self.text.clone());
        let mut last = settled.clone();
        loop {
            let asked = tokio::select! {
                () = tokio::time::sleep(LOOK) => false,
                _ = hangup.recv() => true,
            };
            let path = self.path.clone();
            let Some(now) = aside(move || std::fs::read_to_string(path).map_err(|e| e.to_string())).await else {
                continue;
            };
            if now != settled && (now == last || asked) {
                let (read, env) = (now.clone(), self.env.clone());
                match aside(move || compile(&read?, &env)).await {
                    Some(Ok(grants)) => self.adopt(policy, grants, now.as_deref().unwrap_or_default()),
                    Some(Err(why)) => tracing::error!(
                        path = %self.path.display(), why, grants = policy.grants(),
                        "settings file is wrong: the grants stay as they were before it changed"
                    ),
                    None => continue,
                }
                settled.clone_from(&now);
            }
            last = now;
        }
    }

    fn adopt(&self, policy: &Policy, grants: Grants, text: &str) {
        policy.replace(grants);
        tracing::info!(path = %self.path.display(), grants = policy.grants(), "grants taken from the changed settings");
        warn_if_none(policy);
        let others = changed_sections(&self.text, text);
        if !others.is_empty() {
            tracing::warn!(
                sections = others.join(", "),
                "settings other than grants have changed: they need a restart"
            );
        }
    }
}

/// Does it on a thread of its own: a file system may take its time, and so do
/// thousands of grants. `None`: it panicked, or the runtime ends.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

fn compile(text: &str, env: &BTreeMap<String, String>) -> Result<Grants, String> {
    let settings = Settings::load(text, env).map_err(|e| e.to_string())?;
    Ok(Grants::compile(&settings.grants))
}

/// Says it if nobody may do anything.
pub fn warn_if_none(policy: &Policy) {
    if policy.grants() == 0 {
        tracing::error!("there are no grants: every call will be refused; add [[grants]] to the settings");
    }
}

/// The top-level settings that differ, but for the grants.
fn changed_sections(before: &str, after: &str) -> Vec<String> {
    let table = |text| toml::from_str::<toml::Table>(text).unwrap_or_default();
    let (before, after) = (table(before), table(after));
    let names: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    names.into_iter().filter(|name| *name != "grants" && before.get(*name) != after.get(*name)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_sections_are_named() {
        let before = "listen = 'a'\n[ttl]\ndefault = '5m'\n[[grants]]\ncaller = 'x'\n";
        let after = "listen = 'a'\n[ttl]\ndefault = '6m'\n[[grants]]\ncaller = 'y'\n[iam]\nregion = 'z'\n";
        assert_eq!(changed_sections(before, after), ["iam", "ttl"]);
        assert!(changed_sections(before, &before.replace("'x'", "'y'")).is_empty());
    }
}
