//! The header `x-forwarded-client-cert`, and the SPIFFE IDs in it.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, reason = "only the parsers are used")]
#[path = "../../../src/caller/spiffe.rs"]
mod spiffe;
#[allow(dead_code, reason = "only the parsers are used")]
#[path = "../../../src/caller/xfcc.rs"]
mod xfcc;

fuzz_target!(|text: &str| {
    let Ok(last) = xfcc::last_element(text) else { return };
    assert!(!last.pairs.is_empty() && text.len() <= xfcc::MAX_LEN);
    // Written again, it reads the same.
    let quote = |value: &str| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
    let told = |last: &xfcc::Last| -> Vec<_> {
        last.pairs.iter().map(|pair| (pair.key.to_owned(), pair.value().into_owned())).collect()
    };
    let pairs = told(&last);
    let again: Vec<_> = pairs.iter().map(|(key, value)| format!("{key}={}", quote(value))).collect();
    let again = again.join(";");
    if again.len() <= xfcc::MAX_LEN {
        assert_eq!(xfcc::last_element(&again).map(|last| told(&last)), Ok(pairs.clone()));
    }
    for (_, value) in &pairs {
        if let Ok(id) = spiffe::SpiffeId::parse(value) {
            let path: String = id.segments().map(|segment| format!("/{segment}")).collect();
            assert_eq!(id.as_str(), format!("spiffe://{}{path}", id.trust_domain()));
        }
    }
});
