//! What `fileaccess put` stores with each file.

use std::collections::BTreeMap;
use std::path::Path;

use clap::Args;

use super::Failure;
use crate::client::{Encryption, Upload};
use crate::error::Error;
use crate::ops::presign::Ask;
use crate::ops::upload_plan::{MAX_PART, MIN_PART};
use crate::pb;
use crate::pb::presign_request::Operation;

type Pair = (String, String);

/// What is stored with each file, and in parts of which size.
#[derive(Args)]
pub(super) struct Stored {
    /// The media type of all of them. Without it: as the file's extension says,
    /// or none if that says nothing. Empty: none.
    #[arg(long, value_name = "TYPE", value_parser = content_type)]
    content_type: Option<String>,
    /// User metadata, stored as `x-amz-meta-NAME`. May be given again.
    #[arg(long, value_name = "NAME=VALUE", value_parser = metadata)]
    metadata: Vec<Pair>,
    /// An object tag. May be given again, 10 times in all.
    #[arg(long, value_name = "NAME=VALUE", value_parser = tag)]
    tag: Vec<Pair>,
    /// Stored as `Cache-Control`.
    #[arg(long, value_name = "VALUE", value_parser = cache_control)]
    cache_control: Option<String>,
    /// Stored as `Content-Disposition`.
    #[arg(long, value_name = "VALUE", value_parser = content_disposition)]
    content_disposition: Option<String>,
    /// The storage class, as `STANDARD_IA`. Without it: the bucket's default.
    #[arg(long, value_name = "CLASS", value_parser = storage_class)]
    storage_class: Option<pb::StorageClass>,
    /// Encryption at rest: `s3`, `kms` (with the account's own key), or `kms:` and
    /// a key's id or ARN. Without it: the bucket's default.
    #[arg(long, value_name = "s3|kms|kms:KEY", value_parser = encryption)]
    sse: Option<Encryption>,
    /// With kms: use an S3 Bucket Key, to ask KMS less often.
    #[arg(long, requires = "sse")]
    sse_bucket_key: bool,
    /// The size of parts, as `64MiB`: 5MiB to 5GiB. A file of one part, or of up to
    /// 16 MiB, goes in one request. Without it: the service chooses.
    #[arg(long, value_name = "SIZE", value_parser = part_size)]
    part_size: Option<u64>,
}

impl Stored {
    /// An upload to nowhere with all this.
    ///
    /// # Errors
    /// What no single value can tell.
    pub(super) fn upload(&self) -> Result<Upload, Failure> {
        let mut encryption = self.sse.clone();
        match &mut encryption {
            Some(Encryption::Kms { bucket_key, .. }) => *bucket_key = self.sse_bucket_key,
            _ if self.sse_bucket_key => return Err(Failure::usage("--sse-bucket-key needs `--sse kms`")),
            _ => {}
        }
        let upload = Upload {
            content_type: self.content_type.clone().filter(|media| !media.is_empty()),
            metadata: once("--metadata", &self.metadata)?,
            tags: once("--tag", &self.tag)?,
            cache_control: self.cache_control.clone(),
            content_disposition: self.content_disposition.clone(),
            storage_class: self.storage_class,
            encryption,
            part_size: self.part_size,
            ..Upload::default()
        };
        for (option, given, part) in [
            ("--metadata", self.metadata.len(), Upload { metadata: upload.metadata.clone(), ..Upload::default() }),
            ("--tag", self.tag.len(), Upload { tags: upload.tags.clone(), ..Upload::default() }),
        ] {
            check(&part).map_err(|must| Failure::usage(format!("{option}, given {given} times, {must}")))?;
        }
        Ok(upload)
    }

    /// The media type of what is called `name`.
    pub(super) fn media_type(&self, name: &Path) -> Option<String> {
        match &self.content_type {
            Some(media) => Some(media.clone()).filter(|media| !media.is_empty()),
            None => mime_guess::from_path(name).first_raw().map(str::to_owned),
        }
    }
}

fn once(option: &str, pairs: &[Pair]) -> Result<BTreeMap<String, String>, Failure> {
    let mut all = BTreeMap::new();
    for (name, value) in pairs {
        if all.insert(name.clone(), value.clone()).is_some() {
            return Err(Failure::usage(format!("{option} `{name}` is given twice: each name must be given once")));
        }
    }
    Ok(all)
}

/// By the service's own rules, so that it is known before anything is sent.
fn check(upload: &Upload) -> Result<(), String> {
    let operation = Some(Operation::Upload(upload.constraints()));
    let ask = pb::PresignRequest { bucket: "any".to_owned(), key: "any".to_owned(), ttl: None, operation };
    match Ask::try_from(ask) {
        Ok(_) => Ok(()),
        // Its field is the option, which the caller names.
        Err(Error::Invalid(wrong)) => Err(wrong.first().map_or_else(String::new, |wrong| {
            wrong.description.strip_prefix(&format!("`{}` ", wrong.field)).unwrap_or(&wrong.description).to_owned()
        })),
        Err(error) => Err(error.to_string()),
    }
}

fn checked<T: Clone>(value: T, upload: impl FnOnce(T) -> Upload) -> Result<T, String> {
    check(&upload(value.clone())).map(|()| value)
}

fn content_type(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Ok(String::new());
    }
    let must = |_| "must be a media type, as `text/plain`, or empty for none".to_owned();
    text.parse::<mime_guess::Mime>().map_err(must)?;
    checked(text.to_owned(), |media| Upload { content_type: Some(media), ..Upload::default() })
}

fn cache_control(text: &str) -> Result<String, String> {
    checked(text.to_owned(), |value| Upload { cache_control: Some(value), ..Upload::default() })
}

fn content_disposition(text: &str) -> Result<String, String> {
    checked(text.to_owned(), |value| Upload { content_disposition: Some(value), ..Upload::default() })
}

fn pair(text: &str) -> Result<Pair, String> {
    let (name, value) = text.split_once('=').ok_or("must be a name, `=` and a value")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn metadata(text: &str) -> Result<Pair, String> {
    checked(pair(text)?, |pair| Upload { metadata: [pair].into(), ..Upload::default() })
}

fn tag(text: &str) -> Result<Pair, String> {
    checked(pair(text)?, |pair| Upload { tags: [pair].into(), ..Upload::default() })
}

fn storage_class(text: &str) -> Result<pb::StorageClass, String> {
    let name = |class: pb::StorageClass| class.as_str_name().trim_start_matches("STORAGE_CLASS_");
    let mut all = (1..).map_while(|class| pb::StorageClass::try_from(class).ok());
    let all_names = || all.clone().map(name).collect::<Vec<_>>().join(", ");
    let must = format!("must be one of {}", all_names());
    all.find(|class| name(*class) == text).ok_or(must)
}

fn encryption(text: &str) -> Result<Encryption, String> {
    let encryption = match text.split_once(':') {
        None if text == "s3" => Encryption::S3,
        None if text == "kms" => Encryption::Kms { key_id: None, bucket_key: false },
        Some(("kms", key)) if !key.is_empty() => Encryption::Kms { key_id: Some(key.to_owned()), bucket_key: false },
        _ => return Err("must be `s3`, `kms`, or `kms:` and a key's id or ARN".to_owned()),
    };
    checked(encryption, |encryption| Upload { encryption: Some(encryption), ..Upload::default() })
}

fn part_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "" => Some(1),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    let bytes = number.parse::<u64>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    bytes
        .filter(|bytes| (MIN_PART..=MAX_PART).contains(bytes))
        .ok_or_else(|| "must be `5MiB` to `5GiB`, in bytes, MiB or GiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_size_is_in_bytes_or_their_multiples() {
        for (text, bytes) in [("5MiB", MIN_PART), ("5242880", MIN_PART), ("64MiB", 64 << 20), ("5GiB", MAX_PART)] {
            assert_eq!(part_size(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "MiB", "5", "5MB", "-5MiB", "5 MiB", "5242879", "6GiB", "99999999999999999999", "34359738369GiB"]
        {
            assert!(part_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_storage_class_has_its_name() {
        assert_eq!(storage_class("STANDARD"), Ok(pb::StorageClass::Standard));
        assert_eq!(storage_class("REDUCED_REDUNDANCY"), Ok(pb::StorageClass::ReducedRedundancy));
        let must = storage_class("standard").unwrap_err();
        assert!(must.contains("STANDARD_IA, ONEZONE_IA") && !must.contains("UNSPECIFIED"), "{must}");
    }

    #[test]
    fn a_wrong_value_is_told_what_would_be_right() {
        assert!(metadata("a").unwrap_err().starts_with("must be a name"));
        assert!(metadata("A=b").unwrap_err().contains("lower-case HTTP tokens, unlike `A`"));
        assert!(metadata("a=ü").unwrap_err().starts_with("must be printable ASCII"));
        assert!(tag("a=b?").unwrap_err().starts_with("must have names of 1 to 128"));
        assert!(content_type("text").unwrap_err().contains("`text/plain`"));
        assert!(cache_control(" no-store").unwrap_err().starts_with("must be printable ASCII"));
        assert!(encryption("kms:").unwrap_err().contains("`kms:` and"));
        assert_eq!(encryption("kms"), Ok(Encryption::Kms { key_id: None, bucket_key: false }));
        assert_eq!(encryption("kms:a:b"), Ok(Encryption::Kms { key_id: Some("a:b".into()), bucket_key: false }));
    }
}
