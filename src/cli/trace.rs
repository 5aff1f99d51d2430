//! `fileaccess trace`: from a leaked URL, or from what S3 has logged of its
//! use, back to whoever asked for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use ulid::Ulid;

use super::Failure;
use crate::signer::presign::ISSUE_ID;

/// What `fileaccess trace` is told.
#[derive(Args)]
pub(super) struct Trace {
    /// URLs or issue ids. Without any: lines of an S3 server access log, or
    /// URLs, from standard input.
    #[arg(value_name = "URL|ISSUE_ID")]
    of: Vec<String>,
    /// The audit trail: files of JSON lines, of all replicas.
    #[arg(long, value_name = "FILE", required = true)]
    audit: Vec<PathBuf>,
    /// One JSON object for each that was looked for.
    #[arg(long)]
    json: bool,
}

/// What is looked for, and where it was seen.
struct Lead {
    id: Ulid,
    used: Option<Use>,
}

/// The use of a URL, as S3 has logged it.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/LogFormat.html>
#[derive(Debug, PartialEq, Eq)]
struct Use {
    time: String,
    remote_ip: String,
    operation: String,
    status: String,
}

/// `fileaccess trace`.
///
/// # Errors
/// Something without an issue id, or of which the trail knows nothing.
pub(super) fn run(ask: &Trace) -> Result<(), Failure> {
    let mut leads = Vec::new();
    if ask.of.is_empty() {
        let stdin = std::io::stdin();
        for line in stdin.lock().lines() {
            let line = line.map_err(|e| Failure::running(format!("standard input: {e}")))?;
            // Most lines of a bucket's log are of other requests.
            leads.extend(lead(&line));
        }
    }
    for text in &ask.of {
        let wrong = || Failure::usage(format!("there is neither an issue id nor an `{ISSUE_ID}` in what was given"));
        leads.push(lead(text).ok_or_else(wrong)?);
    }
    if leads.is_empty() {
        return Err(Failure::running(format!("no line has an `{ISSUE_ID}`")));
    }
    let wanted = leads.iter().map(|lead| lead.id).collect();
    let found = search(&ask.audit, &wanted)?;
    let mut missing = 0;
    for lead in &leads {
        let records = found.get(&lead.id).map(Vec::as_slice).unwrap_or_default();
        missing += usize::from(records.is_empty());
        if ask.json {
            let mut told = json!({ "issue_id": lead.id.to_string(), "records": records });
            if let Some(Use { time, remote_ip, operation, status }) = &lead.used {
                told["used"] =
                    json!({ "time": time, "remote_ip": remote_ip, "operation": operation, "status": status });
            }
            println!("{told}");
        } else {
            print(lead, records);
        }
    }
    match missing {
        0 => Ok(()),
        n => Err(Failure::running(format!("the audit trail knows nothing of {n} of {}", leads.len()))),
    }
}

fn print(lead: &Lead, records: &[Value]) {
    println!("{}", lead.id);
    if let Some(Use { time, remote_ip, operation, status }) = &lead.used {
        println!("  used      {time} from {remote_ip}: {operation}, answered {status}");
    }
    if records.is_empty() {
        println!("  unknown to this trail");
    }
    for record in records {
        let get = |name: &str| record[name].as_str().unwrap_or_default();
        println!(
            "  {:<9} {} by `{}`: {} of {}/{}",
            get("outcome"),
            get("time"),
            get("caller"),
            get("action"),
            get("bucket"),
            get("key"),
        );
        println!(
            "  signed    by `{}` with {}, generation {}, until {}",
            get("signer"),
            get("access_key_id"),
            record["generation"],
            get("expires_at"),
        );
    }
}

/// The issue id in a URL, in a line of a log, or alone.
fn lead(text: &str) -> Option<Lead> {
    if let Ok(id) = Ulid::from_string(text.trim()) {
        return Some(Lead { id, used: None });
    }
    let mark = format!("{ISSUE_ID}=");
    let at = text.find(&mark)? + mark.len();
    let id = Ulid::from_string(text.get(at..at + ulid::ULID_LEN)?).ok()?;
    Some(Lead { id, used: parse_log(text) })
}

/// The fields of a line of a server access log that matter here.
fn parse_log(line: &str) -> Option<Use> {
    // Owner and bucket, the time in brackets, and what follows up to the
    // request itself, which is quoted.
    let (_, rest) = line.split_once(" [")?;
    let (time, rest) = rest.split_once("] ")?;
    let (before, rest) = rest.split_once(" \"")?;
    let (_, after) = rest.split_once("\" ")?;
    let mut fields = before.split(' ');
    let (remote_ip, _requester, _request_id, operation) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let status = after.split(' ').next()?;
    Some(Use {
        time: time.to_owned(),
        remote_ip: remote_ip.to_owned(),
        operation: operation.to_owned(),
        status: status.to_owned(),
    })
}

/// All records of the trail that have one of these ids.
fn search(files: &[PathBuf], wanted: &BTreeSet<Ulid>) -> Result<BTreeMap<Ulid, Vec<Value>>, Failure> {
    let mut found: BTreeMap<Ulid, Vec<Value>> = BTreeMap::new();
    for path in files {
        let wrong = |e: &dyn std::fmt::Display| Failure::usage(format!("--audit `{}`: {e}", path.display()));
        let file = File::open(path).map_err(|e| wrong(&e))?;
        for (n, line) in BufReader::new(file).lines().enumerate() {
            let line = line.map_err(|e| wrong(&e))?;
            // Where the trail shares its output with something else.
            if !line.starts_with('{') {
                continue;
            }
            let record: Value = serde_json::from_str(&line).map_err(|e| wrong(&format!("line {}: {e}", n + 1)))?;
            // What was inspected was not given.
            let id = record["issue_id"].as_str().and_then(|id| Ulid::from_string(id).ok());
            if let Some(id) = id.filter(|id| wanted.contains(id) && record["action"] != "inspect") {
                found.entry(id).or_default().push(record);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_found_alone_in_a_url_and_in_a_line_of_the_log() {
        let id = "01M86K8YRD4WKF7R0AMGDZYCGX";
        let url = format!("https://b.s3.amazonaws.com/k?x-id=GetObject&x-issue-id={id}&X-Amz-Expires=9");
        // The form of AWS's own example, with our parameter.
        let line = format!(
            "79a59df900b949e55d96a1e698fbacedfd6e09d98eacf8f8d5218e7cd47ef2be amzn-s3-demo-bucket1 \
             [06/Feb/2019:00:00:38 +0000] 192.0.2.3 - 3E57427F3EXAMPLE REST.GET.OBJECT k \
             \"GET /amzn-s3-demo-bucket1/k?x-id=GetObject&x-issue-id={id}&X-Amz-Expires=9 HTTP/1.1\" 200 - 113 - 7 - \"-\" \
             \"curl/8\" - hostid SigV4 TLS_AES_128_GCM_SHA256 QueryString host TLSv1.3 - -"
        );
        for text in [id.to_owned(), url, line.clone()] {
            assert_eq!(lead(&text).map(|lead| lead.id.to_string()).as_deref(), Some(id), "{text}");
        }
        let used = lead(&line).and_then(|lead| lead.used).unwrap();
        assert_eq!((used.remote_ip.as_str(), used.operation.as_str()), ("192.0.2.3", "REST.GET.OBJECT"));
        assert_eq!((used.time.as_str(), used.status.as_str()), ("06/Feb/2019:00:00:38 +0000", "200"));
        for other in ["", "https://b/k?x-issue-id=", "https://b/k?x-issue-id=short", "https://b/k"] {
            assert!(lead(other).is_none(), "{other}");
        }
    }
}
