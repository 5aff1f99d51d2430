//! Presign an upload by a browser's form: a POST policy, which the SDK has not.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-post-example.html>

use std::collections::BTreeMap;
use std::time::SystemTime;

use aws_credential_types::Credentials;
use aws_sigv4::sign::v4::{calculate_signature, generate_signing_key};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use ulid::Ulid;

use crate::object::ObjectKey;

/// What S3 puts the file's own name in place of, in any field.
pub const FILENAME: &str = "${filename}";
/// A field that S3 skips, as it does all that begin with `x-ignore-`. Our mark
/// is in the form only: S3 neither stores nor logs it.
const ISSUE_ID: &str = "x-ignore-issue-id";

/// An upload by a form. S3 refuses what the policy does not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormUpload {
    /// The least size of the file, in bytes.
    pub min_size: u64,
    /// The greatest size of the file, in bytes.
    pub max_size: u64,
    /// Its media type.
    pub content_type: ContentType,
    /// The holder picks the rest of the key.
    pub key_prefix_only: bool,
    /// What S3 answers when it is done: 200, 201 or 204.
    pub success_status: u16,
    /// Where S3 sends the browser when it is done.
    pub success_redirect: Option<String>,
    /// User metadata, without `x-amz-meta-`.
    pub metadata: BTreeMap<String, String>,
}

/// What a form says of the media type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContentType {
    /// Nothing: S3 takes `binary/octet-stream`.
    Default,
    /// Exactly this.
    Exactly(String),
    /// The holder says it, and it begins with this.
    Prefix(String),
}

/// Who signs a form, for what, until when.
pub struct FormTerms<'a> {
    /// The key.
    pub credentials: &'a Credentials,
    /// The bucket's region.
    pub region: &'a str,
    /// The bucket's name in S3.
    pub bucket: &'a str,
    /// The object's key, or its beginning.
    pub key: &'a ObjectKey,
    /// The signing time, in whole seconds.
    pub start: SystemTime,
    /// When S3 begins to refuse the form, in whole seconds.
    pub end: SystemTime,
    /// Goes into the form.
    pub issue_id: Option<Ulid>,
}

impl FormUpload {
    /// The fields of the form, in the order that a form needs: policy and
    /// signature last, and then comes the file.
    #[must_use]
    pub fn fields(&self, terms: &FormTerms<'_>) -> Vec<(String, String)> {
        let mut form = Form::default();
        let key = terms.key.as_str();
        form.conditions.push(json!({ "bucket": terms.bucket }));
        if self.key_prefix_only {
            form.starting("key", key, format!("{key}{FILENAME}"));
        } else {
            form.exactly("key", key);
        }
        form.conditions.push(json!(["content-length-range", self.min_size, self.max_size]));
        match &self.content_type {
            ContentType::Default => {}
            ContentType::Exactly(content_type) => form.exactly("Content-Type", content_type),
            ContentType::Prefix(prefix) => form.starting("Content-Type", prefix, prefix.clone()),
        }
        for (name, value) in &self.metadata {
            form.exactly(&format!("x-amz-meta-{name}"), value);
        }
        match &self.success_redirect {
            Some(url) => form.exactly("success_action_redirect", url),
            None => form.exactly("success_action_status", &self.success_status.to_string()),
        }
        let date = basic_date(terms.start);
        let day = date.get(..8).unwrap_or_default();
        let credential = format!("{}/{day}/{}/s3/aws4_request", terms.credentials.access_key_id(), terms.region);
        form.exactly("x-amz-algorithm", "AWS4-HMAC-SHA256");
        form.exactly("x-amz-credential", &credential);
        form.exactly("x-amz-date", &date);
        if let Some(token) = terms.credentials.session_token() {
            form.exactly("x-amz-security-token", token);
        }
        let Form { mut fields, conditions } = form;
        let policy = json!({ "expiration": expiration(terms.end), "conditions": conditions }).to_string();
        let policy = BASE64_STANDARD.encode(policy);
        let signature = sign(terms.credentials, terms.region, terms.start, &policy);
        fields.extend(terms.issue_id.map(|id| (ISSUE_ID.to_owned(), id.to_string())));
        fields.push(("policy".to_owned(), policy));
        fields.push(("x-amz-signature".to_owned(), signature));
        fields
    }
}

/// A form in the making: what is in it, and what S3 is to insist on.
#[derive(Default)]
struct Form {
    fields: Vec<(String, String)>,
    conditions: Vec<Value>,
}

impl Form {
    fn exactly(&mut self, name: &str, value: &str) {
        self.conditions.push(json!(["eq", format!("${name}"), value]));
        self.fields.push((name.to_owned(), value.to_owned()));
    }

    /// The holder may put anything behind `prefix`.
    fn starting(&mut self, name: &str, prefix: &str, value: String) {
        self.conditions.push(json!(["starts-with", format!("${name}"), prefix]));
        self.fields.push((name.to_owned(), value));
    }
}

/// The signature of a policy in Base64, which is itself what is signed.
fn sign(credentials: &Credentials, region: &str, start: SystemTime, policy: &str) -> String {
    let key = generate_signing_key(credentials.secret_access_key(), start, region, "s3");
    calculate_signature(key, policy.as_bytes())
}

/// `2026-11-24T10:57:52.000Z`: the form that the policies of AWS's examples
/// have.
fn expiration(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// `20261124T105752Z`.
fn basic_date(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string().replace(['-', ':'], "")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The policy of AWS's example, in Base64, and its signature.
    /// <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-post-example.html>
    const POLICY: &str = "eyAiZXhwaXJhdGlvbiI6ICIyMDE1LTEyLTMwVDEyOjAwOjAwLjAwMFoiLA0KICAiY29uZGl0aW9ucyI6IFsNCiAgICB7ImJ1Y2tldCI6ICJzaWd2NGV4YW1wbGVidWNrZXQifSwNCiAgICBbInN0YXJ0cy13aXRoIiwgIiRrZXkiLCAidXNlci91c2VyMS8iXSwNCiAgICB7ImFjbCI6ICJwdWJsaWMtcmVhZCJ9LA0KICAgIHsic3VjY2Vzc19hY3Rpb25fcmVkaXJlY3QiOiAiaHR0cDovL3NpZ3Y0ZXhhbXBsZWJ1Y2tldC5zMy5hbWF6b25hd3MuY29tL3N1Y2Nlc3NmdWxfdXBsb2FkLmh0bWwifSwNCiAgICBbInN0YXJ0cy13aXRoIiwgIiRDb250ZW50LVR5cGUiLCAiaW1hZ2UvIl0sDQogICAgeyJ4LWFtei1tZXRhLXV1aWQiOiAiMTQzNjUxMjM2NTEyNzQifSwNCiAgICB7IngtYW16LXNlcnZlci1zaWRlLWVuY3J5cHRpb24iOiAiQUVTMjU2In0sDQogICAgWyJzdGFydHMtd2l0aCIsICIkeC1hbXotbWV0YS10YWciLCAiIl0sDQoNCiAgICB7IngtYW16LWNyZWRlbnRpYWwiOiAiQUtJQUlPU0ZPRE5ON0VYQU1QTEUvMjAxNTEyMjkvdXMtZWFzdC0xL3MzL2F3czRfcmVxdWVzdCJ9LA0KICAgIHsieC1hbXotYWxnb3JpdGhtIjogIkFXUzQtSE1BQy1TSEEyNTYifSwNCiAgICB7IngtYW16LWRhdGUiOiAiMjAxNTEyMjlUMDAwMDAwWiIgfQ0KICBdDQp9";
    const SIGNATURE: &str = "8afdbf4008c03f22c2cd3cdb72e4afbb1f6a588f3255ac628749a66d7f09699e";

    fn at(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).unwrap()
    }

    fn example() -> Credentials {
        let secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
        Credentials::new("AKIAIOSFODNN7EXAMPLE", secret, None, None, "example")
    }

    #[test]
    fn it_signs_as_in_the_example_of_aws() {
        assert_eq!(sign(&example(), "us-east-1", at("2015-12-29T00:00:00Z"), POLICY), SIGNATURE);
    }

    #[test]
    fn each_field_has_its_condition_and_policy_and_signature_come_last() {
        let form = FormUpload {
            min_size: 1,
            max_size: 10,
            content_type: ContentType::Prefix("image/".into()),
            key_prefix_only: true,
            success_status: 201,
            success_redirect: None,
            metadata: [("owner".into(), "ann".into())].into(),
        };
        let key = Credentials::new("AKIA1", "secret", Some("token".into()), None, "test");
        let start = at("2026-11-24T10:57:52Z");
        let terms = FormTerms {
            credentials: &key,
            region: "eu-central-1",
            bucket: "photos-prod",
            key: &ObjectKey::parse("user/\"é\"/").unwrap(),
            start,
            end: start + Duration::from_mins(5),
            issue_id: Some(Ulid::from_parts(1, 2)),
        };
        let fields = form.fields(&terms);
        let names: Vec<_> = fields.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "key",
                "Content-Type",
                "x-amz-meta-owner",
                "success_action_status",
                "x-amz-algorithm",
                "x-amz-credential",
                "x-amz-date",
                "x-amz-security-token",
                "x-ignore-issue-id",
                "policy",
                "x-amz-signature",
            ]
        );
        assert_eq!(fields[0].1, "user/\"é\"/${filename}");
        let policy = &fields[9].1;
        assert_eq!(fields[10].1, sign(&key, "eu-central-1", start, policy));
        let policy: Value = serde_json::from_slice(&BASE64_STANDARD.decode(policy).unwrap()).unwrap();
        assert_eq!(
            policy,
            json!({
                "expiration": "2026-11-24T11:02:52.000Z",
                "conditions": [
                    { "bucket": "photos-prod" },
                    ["starts-with", "$key", "user/\"é\"/"],
                    ["content-length-range", 1, 10],
                    ["starts-with", "$Content-Type", "image/"],
                    ["eq", "$x-amz-meta-owner", "ann"],
                    ["eq", "$success_action_status", "201"],
                    ["eq", "$x-amz-algorithm", "AWS4-HMAC-SHA256"],
                    ["eq", "$x-amz-credential", "AKIA1/20261124/eu-central-1/s3/aws4_request"],
                    ["eq", "$x-amz-date", "20261124T105752Z"],
                    ["eq", "$x-amz-security-token", "token"],
                ]
            })
        );
    }
}
