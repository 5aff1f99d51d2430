//! The header `x-forwarded-client-cert`, in which Envoy tells whose
//! certificate it has verified.
//! <https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers#x-forwarded-client-cert>
//!
//! ```text
//! header  = element *( "," element )      one element for each proxy on the way
//! element = pair *( ";" pair )
//! pair    = key "=" ( plain / quoted )    keys in any case
//! plain   = any but `"`, `,` and `;`
//! quoted  = `"`, any but `"` and `\`, or `\` and any character, `"`
//! ```
//!
//! The whole header has to be of this form: where an element ends depends on
//! the quotes before it. But only the last element counts, since it is the one
//! that the trusted proxy has added.
//!
//! Envoy (1.40) quotes and escapes subjects, but not the names of a
//! certificate: one with a comma in it makes two elements of one. Whether there
//! may be several is therefore for the settings to say.

use std::borrow::Cow;
use std::fmt;

/// The header's name.
pub const HEADER: &str = "x-forwarded-client-cert";

/// The longest header that is read, in bytes.
pub const MAX_LEN: usize = 8 << 10;

/// A pair of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<'a> {
    /// The key, as it was written.
    pub key: &'a str,
    /// The value, without its quotes, but with its escapes.
    raw: &'a str,
    escaped: bool,
}

impl<'a> Pair<'a> {
    /// The value, without quotes and escapes.
    #[must_use]
    pub fn value(&self) -> Cow<'a, str> {
        if !self.escaped {
            return Cow::Borrowed(self.raw);
        }
        let mut value = String::with_capacity(self.raw.len());
        let mut chars = self.raw.chars();
        while let Some(c) = chars.next() {
            // INVARIANT: `quoted` has seen a character after each backslash.
            value.extend(if c == '\\' { chars.next() } else { Some(c) });
        }
        Cow::Owned(value)
    }
}

/// The last element of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Last<'a> {
    /// Its pairs, in order.
    pub pairs: Vec<Pair<'a>>,
    /// Whether there is no other.
    pub is_only: bool,
}

/// Why a header can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is longer than [`MAX_LEN`].
    TooLong,
    /// There is something else than a key of letters, and `=`.
    Key,
    /// A value has a quote where none may be, or lacks its closing one.
    Quote,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "is longer than 8192 bytes",
            Self::Key => "has something else where `KEY=` belongs",
            Self::Quote => "has a value with a quote out of place",
        })
    }
}

impl std::error::Error for Fault {}

/// The last element of `header`.
///
/// # Errors
/// [`Fault`], wherever in the header it is.
pub fn last_element(header: &str) -> Result<Last<'_>, Fault> {
    if header.len() > MAX_LEN {
        return Err(Fault::TooLong);
    }
    // Room for what Envoy writes: By, Hash, Subject, URI, and some DNS.
    let mut last = Last { pairs: Vec::with_capacity(8), is_only: true };
    let mut rest = header;
    loop {
        let end = rest.bytes().position(|b| !b.is_ascii_alphabetic()).ok_or(Fault::Key)?;
        let (key, value) = rest.split_at(end);
        let value = value.strip_prefix('=').filter(|_| !key.is_empty()).ok_or(Fault::Key)?;
        let (raw, escaped, after) = match value.strip_prefix('"') {
            Some(text) => quoted(text)?,
            None => plain(value)?,
        };
        last.pairs.push(Pair { key, raw, escaped });
        rest = match after.as_bytes().first() {
            None => return Ok(last),
            Some(b';') => &after[1..],
            Some(b',') => {
                last.pairs.clear();
                last.is_only = false;
                &after[1..]
            }
            Some(_) => return Err(Fault::Quote),
        };
    }
}

/// A value without quotes, whether it has escapes, and what comes after it.
fn plain(text: &str) -> Result<(&str, bool, &str), Fault> {
    let end = text.bytes().position(|b| matches!(b, b',' | b';' | b'"')).unwrap_or(text.len());
    let (raw, after) = text.split_at(end);
    if after.starts_with('"') { Err(Fault::Quote) } else { Ok((raw, false, after)) }
}

/// The same of a value whose opening quote was taken off.
fn quoted(text: &str) -> Result<(&str, bool, &str), Fault> {
    let (mut at, mut escaped) = (0, false);
    loop {
        // What is escaped may be a part of a longer character: no part of it is a quote or a backslash.
        match text.as_bytes().get(at) {
            None => return Err(Fault::Quote),
            Some(b'"') => return Ok((&text[..at], escaped, &text[at + 1..])),
            Some(b'\\') => {
                escaped = true;
                at += 2;
            }
            Some(_) => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(header: &str) -> Result<Vec<(String, String)>, Fault> {
        let pairs = last_element(header)?.pairs;
        Ok(pairs.into_iter().map(|pair| (pair.key.to_owned(), pair.value().into_owned())).collect())
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_envoy_writes_is_read() {
        let header = r#"By=spiffe://mesh.test/files;Hash=0a1b;Subject="CN=orders,OU=a\,b\;c=\"d,O=Shop";URI=spiffe://mesh.test/ns/shop/sa/orders;DNS=a.test;DNS=b.test"#;
        let expect = [
            ("By", "spiffe://mesh.test/files"),
            ("Hash", "0a1b"),
            ("Subject", r#"CN=orders,OU=a,b;c="d,O=Shop"#),
            ("URI", "spiffe://mesh.test/ns/shop/sa/orders"),
            ("DNS", "a.test"),
            ("DNS", "b.test"),
        ];
        assert_eq!(read(header), Ok(owned(&expect)));
        assert_eq!(read("URI="), Ok(owned(&[("URI", "")])));
        assert_eq!(read(r#"Subject="""#), Ok(owned(&[("Subject", "")])));
        assert_eq!(read(r#"Subject="\\\"\é""#), Ok(owned(&[("Subject", r#"\"é"#)])));
    }

    #[test]
    fn only_the_last_element_counts() {
        assert_eq!(read("URI=spiffe://a/x;DNS=d,URI=spiffe://a/y"), Ok(owned(&[("URI", "spiffe://a/y")])));
        // What looks like another element is in the quotes of the only one.
        let quoted = r#"Hash=1;Subject="CN=x,URI=spiffe://a/forged""#;
        assert_eq!(read(quoted).unwrap().len(), 2);
        // A client that opens a quote can't swallow what the proxy appends.
        assert_eq!(read(r#"URI=spiffe://a/forged;X=",By=b;Subject="CN=x";URI=spiffe://a/y"#), Err(Fault::Quote));
    }

    #[test]
    fn what_is_of_another_form_is_refused() {
        for (header, fault) in [
            ("", Fault::Key),
            ("URI", Fault::Key),
            ("=x", Fault::Key),
            (" URI=x", Fault::Key),
            ("URI =x", Fault::Key),
            ("URI=x;", Fault::Key),
            ("URI=x,", Fault::Key),
            (",URI=x", Fault::Key),
            ("URI=x, URI=y", Fault::Key),
            ("URI=x;;DNS=y", Fault::Key),
            ("\"URI\"=x", Fault::Key),
            ("URI=x\"y", Fault::Quote),
            ("URI=\"x", Fault::Quote),
            ("URI=\"x\\", Fault::Quote),
            ("URI=\"x\\\"", Fault::Quote),
            ("URI=\"x\"y", Fault::Quote),
            ("URI=\"x\" ;DNS=y", Fault::Quote),
        ] {
            assert_eq!(read(header), Err(fault), "{header}");
        }
        assert_eq!(read(&format!("URI={}", "x".repeat(MAX_LEN - 4))).map(|pairs| pairs.len()), Ok(1));
        assert_eq!(read(&format!("URI={}", "x".repeat(MAX_LEN - 3))), Err(Fault::TooLong));
    }

    /// Writes a header as the grammar allows: in quotes where need be, and where
    /// `quote` says so.
    fn write(elements: &[Vec<(String, String, bool)>]) -> String {
        let pair = |(key, value, quote): &(String, String, bool)| {
            if *quote || value.contains(['"', ',', ';']) {
                format!("{key}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
            } else {
                format!("{key}={value}")
            }
        };
        let element = |pairs: &Vec<_>| pairs.iter().map(pair).collect::<Vec<_>>().join(";");
        elements.iter().map(element).collect::<Vec<_>>().join(",")
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(elements in prop::collection::vec(
            prop::collection::vec(("[A-Za-z]{1,8}", r#"[\PC",;=\\]{0,20}"#, any::<bool>()), 1..6), 1..4,
        )) {
            let expect: Vec<_> = elements.last().unwrap().iter().map(|(k, v, _)| (k.clone(), v.clone())).collect();
            let header = write(&elements);
            prop_assert_eq!(read(&header), Ok(expect));
            prop_assert_eq!(last_element(&header).unwrap().is_only, elements.len() == 1);
        }

        #[test]
        fn any_text_is_read_or_refused(text in r#"([A-Za-z]{0,3}[=,;"\\ ]|\PC){0,40}"#) {
            if let Ok(last) = last_element(&text) {
                prop_assert!(!last.pairs.is_empty());
            }
        }

        #[test]
        fn what_is_in_front_never_changes_what_is_last(front in r#"([A-Za-z]{0,3}[=,;"\\]|\PC){0,30}"#, subject in r#"[A-Za-z"\\,;= ]{0,12}"#) {
            // As a proxy appends to what a client has sent, subjects as RFC 2253 escapes them.
            let mut escaped = String::new();
            for c in subject.chars() {
                if !c.is_ascii_alphabetic() && c != ' ' && c != '=' {
                    escaped.push('\\');
                }
                escaped.push(c);
            }
            let own = format!("Hash=00;Subject=\"CN={escaped}\";URI=spiffe://mesh.test/own");
            if let Ok(pairs) = read(&format!("{front},{own}")) {
                prop_assert_eq!(Ok(pairs), read(&own));
            }
        }
    }
}
