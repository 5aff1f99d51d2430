//! What a grant is made of, as the settings have it: who, which keys, which
//! actions, within which ceilings.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer};

use crate::error::Violation;
use crate::object::{BucketName, Lifetime, Prefix};
use crate::ops::upload::Upload;

/// What a caller may be granted to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Presign a download.
    Download,
    /// Presign an upload, of any kind, or upload in parts.
    Upload,
    /// Presign a look at an object's headers.
    Head,
    /// Presign a removal.
    Delete,
    /// List what is under a prefix.
    List,
    /// Ask for an object's facts.
    Stat,
    /// End an object's download URLs.
    RevokeObject,
    /// End all URLs of a signer.
    RevokeSigner,
    /// Ask what a URL is.
    Inspect,
    /// See the signers.
    Signers,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Download,
        Self::Upload,
        Self::Head,
        Self::Delete,
        Self::List,
        Self::Stat,
        Self::RevokeObject,
        Self::RevokeSigner,
        Self::Inspect,
        Self::Signers,
    ];

    /// Its name in the settings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Download => "download",
            Self::Upload => "upload",
            Self::Head => "head",
            Self::Delete => "delete",
            Self::List => "list",
            Self::Stat => "stat",
            Self::RevokeObject => "revoke_object",
            Self::RevokeSigner => "revoke_signer",
            Self::Inspect => "inspect",
            Self::Signers => "signers",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One grant: these callers may do these actions on the keys under this prefix,
/// within these ceilings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantSettings {
    /// Who.
    pub caller: CallerPattern,
    /// The bucket's name in the settings.
    #[serde(deserialize_with = "bucket_name")]
    pub bucket: BucketName,
    /// The beginning of the keys. Empty: all of the bucket.
    pub prefix: PrefixTemplate,
    /// What they may do.
    pub actions: Vec<Action>,
    /// A URL lives no longer than this. A longer ttl is clamped.
    #[serde(default, deserialize_with = "lifetime")]
    pub max_ttl: Option<Lifetime>,
    /// The largest upload, in bytes. Its size must be signed.
    pub max_size: Option<u64>,
    /// What uploads may be. Their media type must be signed.
    pub content_types: Option<Vec<MediaRange>>,
    /// Uploads must refuse to overwrite.
    #[serde(default)]
    pub create_only: bool,
    /// Uploads must have their checksum signed.
    #[serde(default)]
    pub checksum: bool,
}

/// What is to be uploaded, as far as ceilings go.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// How.
    pub kind: LoadKind,
    /// How large it may become, in bytes, at the most. `None`: any size.
    pub size: Option<u64>,
    /// Its media type, if that is bound.
    pub content_type: Option<&'a str>,
    /// Whether it can't overwrite anything.
    pub create_only: bool,
    /// Whether S3 verifies all of its bytes.
    pub checksum: bool,
}

/// How something is uploaded: whose fields a refusal names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadKind {
    /// In one request.
    Whole,
    /// In parts.
    Parts,
    /// By a form.
    Form,
}

impl LoadKind {
    /// The fields of size, media type, `create_only` and checksum.
    fn fields(self) -> [&'static str; 4] {
        match self {
            Self::Whole => ["upload.content_length", "upload.content_type", "upload.create_only", "upload.checksum"],
            Self::Parts => ["size", "upload.content_type", "upload.create_only", "checksum_algorithm"],
            Self::Form => ["form_upload.max_size", "form_upload.content_type", "operation", "operation"],
        }
    }

    /// What must be, which no form can promise.
    fn or_else(self, must: &str) -> &str {
        if self == Self::Form { "be `upload`: a form can't promise what the grant asks for" } else { must }
    }
}

impl<'a> From<&'a Upload> for Load<'a> {
    fn from(upload: &'a Upload) -> Self {
        Self {
            kind: LoadKind::Whole,
            size: upload.content_length,
            content_type: upload.content_type.as_deref(),
            create_only: upload.create_only,
            checksum: upload.checksum.is_some(),
        }
    }
}

impl GrantSettings {
    /// What an upload lacks to be within the ceilings. Empty: nothing.
    #[must_use]
    pub fn lacks(&self, load: &Load<'_>) -> Vec<Violation> {
        let mut lacks = Vec::new();
        let [size, content_type, create_only, checksum] = load.kind.fields();
        if let Some(max) = self.max_size
            && load.size.is_none_or(|bytes| bytes > max)
        {
            lacks.push(Violation::new(size, format!("be given, and be at most {max} bytes")));
        }
        if let Some(ranges) = &self.content_types
            && !load.content_type.is_some_and(|given| ranges.iter().any(|range| range.has(given)))
        {
            let ranges: Vec<_> = ranges.iter().map(|range| format!("`{}`", range.0)).collect();
            lacks.push(Violation::new(content_type, format!("be given, and be {}", ranges.join(" or "))));
        }
        if self.create_only && !load.create_only {
            lacks.push(Violation::new(create_only, load.kind.or_else("be true")));
        }
        if self.checksum && !load.checksum {
            lacks.push(Violation::new(checksum, load.kind.or_else("be given")));
        }
        lacks
    }

    /// What is wrong with it that no single field can tell, each with its
    /// field.
    #[must_use]
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        if self.actions.is_empty() {
            faults.push(("actions", "is empty; name at least one, or remove the grant".to_owned()));
        }
        if self.content_types.as_ref().is_some_and(Vec::is_empty) {
            faults.push(("content_types", "is empty; name at least one, or leave it out".to_owned()));
        }
        for variable in self.prefix.variables() {
            if !self.caller.may_have(variable) {
                let problem = format!("`{{caller.{variable}}}` is in no caller `{}`; remove it", self.caller);
                faults.push(("prefix", problem));
            }
        }
        faults
    }
}

/// Which callers: one by its whole identity, or those SPIFFE IDs that have the
/// same number of segments, of which some are given by their beginning alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallerPattern {
    /// This one.
    Exact(String),
    /// SPIFFE IDs: the segments behind `spiffe://`.
    Segments(Vec<Segment>),
}

/// One segment of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// This one.
    Exact(String),
    /// Those that begin with this, but never an empty one.
    Stem(String),
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(segment) => f.write_str(segment),
            Self::Stem(stem) => write!(f, "{stem}*"),
        }
    }
}

/// The scheme of SPIFFE IDs.
/// <https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>
const SPIFFE: &str = "spiffe://";

/// The segments of a SPIFFE ID, the trust domain first.
#[must_use]
pub fn segments(caller: &str) -> Option<std::str::Split<'_, char>> {
    Some(caller.strip_prefix(SPIFFE)?.split('/'))
}

impl CallerPattern {
    /// Parses `loopback`, `uid:1000`, `dns:NAME`, or a SPIFFE ID whose path
    /// segments may end in `*`.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            let text = text.escape_debug();
            Err(format!(
                "`{text}` {why}; write it like \"spiffe://mesh.test/ns/shop/sa/*\", \"dns:orders.shop\", \"uid:1000\" or \"loopback\""
            ))
        };
        let exact = || Ok(Self::Exact(text.to_owned()));
        if text == "loopback" {
            return exact();
        }
        if let Some(uid) = text.strip_prefix("uid:") {
            // Only as it is written when a caller comes: no sign, no zero in front.
            let plain = uid.parse::<u32>().is_ok_and(|number| number.to_string() == uid);
            return if plain { exact() } else { wrong("has no user id") };
        }
        if let Some(name) = text.strip_prefix("dns:") {
            let of_name = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
            let fits = !name.is_empty() && name.bytes().all(of_name);
            return if fits { exact() } else { wrong("has no DNS name in lower case") };
        }
        let Some(mut parts) = segments(text) else { return wrong("is no caller") };
        let of_path = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        let of_domain = |b: u8| of_path(b) && !b.is_ascii_uppercase();
        let domain = parts.next().unwrap_or_default();
        if domain.is_empty() || !domain.bytes().all(of_domain) {
            return wrong("has no trust domain, which is 1 or more of a-z, 0-9, `-`, `.` and `_`, and no pattern");
        }
        let mut pattern = vec![Segment::Exact(domain.to_owned())];
        for part in parts {
            let (stem, open) = part.strip_suffix('*').map_or((part, false), |stem| (stem, true));
            if !stem.bytes().all(of_path) || (!open && matches!(stem, "" | "." | "..")) {
                return wrong(
                    "has a path segment that is none of a SPIFFE ID: letters, digits, `-`, `.` and `_`, with `*` only at its end",
                );
            }
            pattern.push(if open { Segment::Stem(stem.to_owned()) } else { Segment::Exact(stem.to_owned()) });
        }
        let open = pattern.iter().any(|segment| matches!(segment, Segment::Stem(_)));
        if open { Ok(Self::Segments(pattern)) } else { exact() }
    }

    /// Whether any caller that fits has a value for `variable`.
    fn may_have(&self, variable: &Variable) -> bool {
        match self {
            Self::Exact(caller) => variable.of(caller).is_some(),
            Self::Segments(pattern) => match variable {
                Variable::Name | Variable::TrustDomain => true,
                // A stem may stand for the name, even where other segments are.
                Variable::Pair(name) => pattern.get(1..).unwrap_or_default().chunks_exact(2).any(|pair| match pair {
                    [Segment::Exact(first), _] => first == name,
                    [Segment::Stem(stem), _] => name.starts_with(stem),
                    _ => false,
                }),
            },
        }
    }
}

impl fmt::Display for CallerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(caller) => f.write_str(caller),
            Self::Segments(pattern) => {
                for (n, segment) in pattern.iter().enumerate() {
                    write!(f, "{}{segment}", if n == 0 { SPIFFE } else { "/" })?;
                }
                Ok(())
            }
        }
    }
}

/// What a prefix may take from a caller's SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Variable {
    /// The last segment of the path.
    Name,
    /// The trust domain.
    TrustDomain,
    /// The segment behind the one of this name, the path read in pairs.
    Pair(String),
}

impl Variable {
    /// Its value in this caller's identity. `None`: there is none, or more than
    /// one.
    #[must_use]
    pub fn of<'a>(&self, caller: &'a str) -> Option<&'a str> {
        let mut parts = segments(caller)?;
        let domain = parts.next()?;
        let value = match self {
            Self::TrustDomain => Some(domain),
            Self::Name => parts.next_back(),
            Self::Pair(name) => {
                let mut found = None;
                while let (Some(first), Some(second)) = (parts.next(), parts.next()) {
                    if first == name {
                        if found.is_some() {
                            return None;
                        }
                        found = Some(second);
                    }
                }
                found
            }
        };
        value.filter(|value| !value.is_empty())
    }
}

impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Name => "name",
            Self::TrustDomain => "trust_domain",
            Self::Pair(name) => name,
        })
    }
}

/// The beginning of keys, which may depend on who asks: `{caller.sa}/`.
///
/// INVARIANT: `/` follows each variable. No value of one has a `/`, so that no
/// caller's prefix is the beginning of another's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrefixTemplate {
    /// What stands before the first variable.
    stem: String,
    /// The variables, each with what stands behind it.
    rest: Vec<(Variable, String)>,
}

impl PrefixTemplate {
    /// Parses a prefix with any number of `{caller.NAME}`. Braces have no other
    /// use.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("`{}` {why}", text.escape_debug()));
        let mut pieces = text.split('{');
        let stem = pieces.next().unwrap_or_default().to_owned();
        let mut rest = Vec::new();
        let mut sample = stem.clone();
        for piece in pieces {
            let known =
                piece.split_once('}').and_then(|(inside, behind)| Some((inside.strip_prefix("caller.")?, behind)));
            let Some((name, behind)) = known else {
                return wrong("has a brace that is no template; write it like \"{caller.name}/\"");
            };
            let variable = match name {
                "name" => Variable::Name,
                "trust_domain" => Variable::TrustDomain,
                _ => Variable::Pair(name.to_owned()),
            };
            if !behind.starts_with('/') {
                return wrong("must have a `/` behind each template, or else one caller's prefix begins another's");
            }
            sample.push('x');
            sample.push_str(behind);
            rest.push((variable, behind.to_owned()));
        }
        if sample.contains('}') {
            return wrong("has a brace that is no template; write it like \"{caller.name}/\"");
        }
        Prefix::parse(sample).map_err(|must| format!("`{}` must {must}", text.escape_debug()))?;
        Ok(Self { stem, rest })
    }

    /// What every prefix made of it begins with.
    #[must_use]
    pub fn stem(&self) -> &str {
        &self.stem
    }

    /// Whether the prefix that it is for `caller` covers `key`, byte for byte.
    #[must_use]
    pub fn covers(&self, key: &str, caller: &str) -> bool {
        let mut left = key.strip_prefix(&*self.stem);
        for (variable, behind) in &self.rest {
            left = left
                .zip(variable.of(caller))
                .and_then(|(left, value)| left.strip_prefix(value))
                .and_then(|left| left.strip_prefix(&**behind));
        }
        left.is_some()
    }

    pub(super) fn variables(&self) -> impl Iterator<Item = &Variable> {
        self.rest.iter().map(|(variable, _)| variable)
    }
}

/// Which media types: `text/plain` or `image/*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediaRange(String);

impl MediaRange {
    /// Parses a media type without parameters, in lower case, whose subtype may
    /// be `*`.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        let essence = text.strip_suffix("/*").map_or_else(|| text.to_owned(), |kind| format!("{kind}/x"));
        if is_media_type(&essence) && !essence.contains('*') && !essence.bytes().any(|b| b.is_ascii_uppercase()) {
            Ok(Self(text.to_owned()))
        } else {
            let text = text.escape_debug();
            Err(format!("`{text}` is no media type; write it in lower case, like \"text/plain\" or \"image/*\""))
        }
    }

    /// Whether a `Content-Type` is of these. Parameters don't matter.
    ///
    /// A comma does: those who join header lines read what stands behind it as
    /// another type, so that `image/png, text/html` would be HTML to a browser.
    /// <https://fetch.spec.whatwg.org/#concept-header-extract-mime-type>
    #[must_use]
    pub fn has(&self, content_type: &str) -> bool {
        let essence = content_type.split(';').next().unwrap_or_default().trim_end();
        if content_type.contains(',') || !is_media_type(essence) {
            return false;
        }
        match self.0.strip_suffix('*') {
            Some(kind) => essence.get(..kind.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(kind)),
            None => essence.eq_ignore_ascii_case(&self.0),
        }
    }
}

/// Two tokens and a `/` between them.
/// <https://www.rfc-editor.org/rfc/rfc9110#section-8.3.1>
fn is_media_type(text: &str) -> bool {
    let is_token = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
    };
    text.split_once('/').is_some_and(|(kind, sub)| is_token(kind) && is_token(sub))
}

/// Reads a text through `parse`.
macro_rules! parsed {
    ($($name:ident),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
            }
        }
    )*};
}
parsed!(CallerPattern, PrefixTemplate, MediaRange);

fn bucket_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BucketName, D::Error> {
    crate::config::bucket_name(deserializer)
}

fn lifetime<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Lifetime>, D::Error> {
    crate::config::lifetime(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = "spiffe://mesh.test/ns/shop/sa/orders";

    #[test]
    fn callers_that_are_none_are_refused() {
        for right in
            ["loopback", "uid:0", "uid:1000", "dns:a.b", SHOP, "spiffe://mesh.test", "spiffe://m/*", "spiffe://m/a*/b"]
        {
            assert_eq!(CallerPattern::parse(right).unwrap().to_string(), right);
        }
        for wrong in [
            "",
            "*",
            "Loopback",
            "loopback*",
            "uid:",
            "uid:*",
            "uid:+1",
            "uid:01",
            "uid:4294967296",
            "dns:",
            "dns:*",
            "dns:a b",
            "dns:A.b",
            "spiffe:/m/a",
            "spiffe://",
            "spiffe://*/a",
            "spiffe://M/a",
            "spiffe://m//a",
            "spiffe://m/a/",
            "spiffe://m/..",
            "spiffe://m/a*b",
            "spiffe://m/**",
            "spiffe://m/*/..",
            "spiffe://m/é",
            "SPIFFE://m/a",
            "spiffe://m/a%2Fb",
        ] {
            assert!(CallerPattern::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_template_takes_its_values_from_the_path() {
        for (template, key, covers) in [
            ("{caller.sa}/", "orders/x", true),
            ("{caller.sa}/", "orders", false),
            ("{caller.sa}/", "ordersx/", false),
            ("{caller.name}/", "orders/", true),
            ("t/{caller.ns}/{caller.sa}/in", "t/shop/orders/inbox", true),
            ("t/{caller.ns}/{caller.sa}/in", "t/shop/orders/out", false),
            ("{caller.trust_domain}/", "mesh.test/a", true),
            // A name that is a value, a pair that is none.
            ("{caller.shop}/", "sa/x", false),
            ("{caller.nobody}/", "/x", false),
            ("", "anything", true),
        ] {
            assert_eq!(PrefixTemplate::parse(template).unwrap().covers(key, SHOP), covers, "{template} {key}");
        }
        let twice = "spiffe://m/ns/a/ns/b";
        assert_eq!(Variable::Pair("ns".into()).of(twice), None);
        assert_eq!(Variable::Pair("c".into()).of("spiffe://m/a/b/c"), None);
        for none in ["loopback", "dns:ns/a", "spiffe://m", "spiffe://m/", "spiffe://m/ns/"] {
            assert_eq!((Variable::Name.of(none), Variable::Pair("ns".into()).of(none)), (None, None), "{none}");
        }
        for wrong in [
            "{",
            "}",
            "{}",
            "{caller}/",
            "{caller.sa",
            "{caller.sa}",
            "{caller.sa}-x/",
            "{caller.a}{caller.b}/",
            "{user.sa}/",
            "a}",
            "../{caller.sa}/",
            "a\n",
        ] {
            assert!(PrefixTemplate::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_template_that_no_caller_can_fill_is_a_fault() {
        for (caller, prefix, fits) in [
            ("spiffe://m/ns/*/sa/*", "{caller.ns}/{caller.sa}/", true),
            ("spiffe://m/ns/*/sa/*", "{caller.team}/", false),
            ("spiffe://m/ns/*/sa/*", "{caller.shop}/", false),
            ("spiffe://m/*/a", "{caller.team}/", true),
            ("spiffe://m/te*/a", "{caller.team}/", true),
            ("spiffe://m/te*/a", "{caller.ns}/", false),
            ("spiffe://m/*", "{caller.name}/", true),
            ("spiffe://m/*", "{caller.ns}/", false),
            ("spiffe://m", "{caller.trust_domain}/", true),
            ("spiffe://m", "{caller.name}/", false),
            ("loopback", "{caller.name}/", false),
            ("uid:7", "{caller.trust_domain}/", false),
        ] {
            let caller = CallerPattern::parse(caller).unwrap();
            let prefix = PrefixTemplate::parse(prefix).unwrap();
            assert_eq!(prefix.variables().all(|variable| caller.may_have(variable)), fits, "{caller} {prefix:?}");
        }
    }

    #[test]
    fn media_ranges_match_types_and_never_a_list_of_them() {
        let range = |text| MediaRange::parse(text).unwrap();
        for (pattern, given, fits) in [
            ("image/*", "image/png", true),
            ("image/*", "IMAGE/PNG", true),
            ("image/*", "image/png; q=1", true),
            ("image/*", "image/", false),
            ("image/*", "image", false),
            ("image/*", "imagex/png", false),
            ("image/*", "image/png, text/html", false),
            ("image/*", "image/png;a=b, text/html", false),
            ("image/*", "image/p ng", false),
            ("text/plain", "text/plain;charset=utf-8", true),
            ("text/plain", "text/plainer", false),
            ("text/plain", "text/plain/x", false),
            ("text/plain", "", false),
        ] {
            assert_eq!(range(pattern).has(given), fits, "{pattern} {given}");
        }
        for wrong in ["", "*", "*/*", "image", "image/", "/png", "Image/*", "im*/png", "a/b;c", "a/b*", "a/b/*"] {
            assert!(MediaRange::parse(wrong).is_err(), "{wrong}");
        }
    }
}
