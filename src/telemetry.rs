//! Tracing. Text on a terminal, JSON otherwise; never a whole signed URL.

use std::borrow::Cow;
use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// The variable with the filter: `warn`, `fileaccess=debug`, as
/// `tracing-subscriber`'s `EnvFilter` has it.
pub const ENV_LOG: &str = "FILEACCESS_LOG";

/// Sends the log to standard error, if nothing else has taken it yet.
pub fn init(default_filter: &str) {
    let filter = EnvFilter::try_from_env(ENV_LOG).unwrap_or_else(|_| EnvFilter::new(default_filter));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second call, as in tests, changes nothing.
    let _ = if std::io::stderr().is_terminal() {
        log.with_target(false).try_init()
    } else {
        log.json().flatten_event(true).with_span_list(false).with_ansi(false).try_init()
    };
}

/// `text` with every signature and session token in it cut, so that what is
/// left opens nothing.
#[must_use]
pub fn cut_signatures(text: &str) -> Cow<'_, str> {
    let mut cut = Cow::Borrowed(text);
    for parameter in ["X-Amz-Signature=", "X-Amz-Security-Token=", "Signature="] {
        let mut from = 0;
        while let Some(at) = cut.get(from..).and_then(|rest| rest.find(parameter)) {
            let start = from + at + parameter.len();
            let length = cut[start..].find(|c: char| c == '&' || c == '"' || c.is_whitespace());
            let end = length.map_or(cut.len(), |length| start + length);
            cut = Cow::Owned(format!("{}…{}", &cut[..start], &cut[end..]));
            from = start;
        }
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_cut_wherever_they_stand() {
        let url = "https://b/k?X-Amz-Security-Token=tok&X-Amz-Signature=abc&x-id=GetObject and X-Amz-Signature=def";
        assert_eq!(
            cut_signatures(url),
            "https://b/k?X-Amz-Security-Token=…&X-Amz-Signature=…&x-id=GetObject and X-Amz-Signature=…"
        );
        assert_eq!(cut_signatures("nothing to see"), "nothing to see");
    }
}
