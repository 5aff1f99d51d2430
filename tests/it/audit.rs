//! The audit trail: each grant, refusal and revoke has its record, and a URL
//! leads back to whoever asked for it.

use std::path::Path;
use std::time::Duration;

use fileaccess::pb;
use fileaccess::pb::presign_request::Operation;
use fileaccess::pb::revoke_request::Target;
use serde_json::{Value, json};

use crate::binary::fileaccess;
use crate::revoke::managed;
use crate::service::reason;
use crate::stage::{Backend, Stage, ask, download, seconds};
use crate::{Case, cases};

pub fn cases() -> Vec<Case> {
    cases![
        what_is_given_and_refused_is_written_down,
        a_used_url_leads_back_to_its_caller,
        without_room_for_a_record_nothing_is_given,
        a_caller_has_so_many_urls_and_calls_a_second,
    ]
}

/// All records so far.
pub fn records(stage: &Stage) -> Vec<Value> {
    assert!(stage.app.audit.flush(Duration::from_secs(10)), "the trail is written");
    let text = std::fs::read_to_string(&stage.audit).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

async fn what_is_given_and_refused_is_written_down(backend: Backend) {
    let stage = Stage::with(backend, &managed(""), None).await;
    let upload = pb::Upload {
        content_type: Some("text/plain".into()),
        content_length: Some(5),
        create_only: true,
        checksum: Some(pb::Checksum { value: Some(pb::checksum::Value::Crc32(vec![0; 4])) }),
        ..pb::Upload::default()
    };
    let given = stage.presign("tenant/a", Operation::Upload(upload)).await;
    let request = pb::PresignRequest { ttl: seconds(60), ..ask("ä \"b\"", download()) };
    let batch = vec![request.clone(), ask("tenant/b", Operation::Head(pb::Head::default())), ask("..", download())];
    let mut api = stage.api.clone();
    api.batch_presign(pb::BatchPresignRequest { requests: batch }).await.unwrap();
    let nowhere = pb::PresignRequest { bucket: "nowhere".into(), ..ask("k", download()) };
    let refusal = reason(&stage.try_presign(nowhere).await.unwrap_err()).1;
    let list = pb::ListRequest { bucket: "files".into(), prefix: "tenant/".into(), ..pb::ListRequest::default() };
    api.list(list).await.unwrap();
    let stat = pb::StatRequest { bucket: "files".into(), key: "tenant/gone".into(), version_id: None };
    api.stat(stat).await.unwrap_err();
    api.list_signers(pb::ListSignersRequest {}).await.unwrap();
    api.inspect(pb::InspectRequest { url: given.url.clone() }).await.unwrap();
    let revoke = pb::RevokeRequest {
        target: Some(Target::Signer("tenant".into())),
        reason: "posted in a chat".into(),
        request_id: "leak-1".into(),
        urgency: pb::Urgency::Immediate.into(),
        ..pb::RevokeRequest::default()
    };
    api.revoke(revoke).await.unwrap();

    let records = records(&stage);
    let brief: Vec<_> = records.iter().map(|r| [&r["action"], &r["bucket"], &r["key"], &r["outcome"]]).collect();
    assert_eq!(
        json!(brief),
        json!([
            ["upload", "files", "tenant/a", "granted"],
            ["download", "files", "ä \"b\"", "granted"],
            ["head", "files", "tenant/b", "granted"],
            ["download", "nowhere", "k", refusal],
            ["list", "files", "tenant/", "granted"],
            ["stat", "files", "tenant/gone", "OBJECT_NOT_FOUND"],
            ["signers", null, null, "granted"],
            ["inspect", null, null, "granted"],
            ["revoke_signer", null, null, "granted"],
        ])
    );
    assert!(records.iter().all(|record| record["caller"] == "loopback" && record["time"].is_string()));
    let first = &records[0];
    assert_eq!(
        first["constraints"],
        json!({ "content_type": "text/plain", "content_length": 5, "create_only": true, "checksum": "x-amz-checksum-crc32" })
    );
    assert_eq!((&first["signer"], &first["generation"]), (&json!("tenant"), &json!(1)));
    assert_eq!(first["issue_id"], json!(given.issue_id));
    assert!(given.url.contains(first["access_key_id"].as_str().unwrap()));
    assert_eq!((&records[1]["ttl"], &records[1]["signer"]), (&json!(60), &json!("main")));
    let revoked = records.last().unwrap();
    assert_eq!((&revoked["signer"], &revoked["access_key_id"]), (&json!("tenant"), &first["access_key_id"]));
    assert_eq!(revoked["revoke"]["reason"], "posted in a chat");
    assert!(revoked["revoke"]["confirmed_at"].is_string() && revoked["revoke"]["new_key"].is_string());
    let text = std::fs::read_to_string(&stage.audit).unwrap();
    assert!(!text.contains("X-Amz-Signature"), "{text}");
}

fn trace(audit: &Path, more: &[&str], stdin: Option<&str>) -> (bool, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = fileaccess(&["trace", "--audit", audit.to_str().unwrap()]);
    command.args(more);
    if let Some(lines) = stdin {
        let file = folder.path().join("lines");
        std::fs::write(&file, lines).unwrap();
        command.stdin(std::fs::File::open(file).unwrap());
    }
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

async fn a_used_url_leads_back_to_its_caller(backend: Backend) {
    let stage = Stage::new(backend).await;
    stage.put("report.pdf", "the figures").await;
    let leaked = stage.presign("report.pdf", download()).await;
    assert_eq!(stage.send(&leaked, "").await.text(), "the figures");
    assert!(stage.app.audit.flush(Duration::from_secs(10)));

    let expect = "by `loopback`: download of files/report.pdf";
    for of in [&leaked.url, &leaked.issue_id] {
        let (found, said) = trace(&stage.audit, &[of], None);
        assert!(found && said.contains(expect), "{said}");
    }
    // As S3 would log the use of the URL, among other requests.
    let (_, request) = leaked.url.split_once("://").unwrap();
    let request = &request[request.find('/').unwrap()..];
    let line = |request: &str| {
        format!(
            "owner {} [24/Nov/2026:12:00:38 +0000] 192.0.2.3 - 3E57427F3 REST.GET.OBJECT report.pdf \
             \"GET {request} HTTP/1.1\" 200 - 11 11 7 6 \"-\" \"curl/8.5\" - hostid SigV4 - QueryString host - - -\n",
            stage.bucket
        )
    };
    let log = line("/other") + &line(request);
    let (found, said) = trace(&stage.audit, &[], Some(&log));
    assert!(found && said.contains(expect) && said.contains("from 192.0.2.3: REST.GET.OBJECT, answered 200"), "{said}");
    let (found, said) = trace(&stage.audit, &["--json"], Some(&log));
    let told: Value = serde_json::from_str(&said).unwrap();
    assert!(found && told["used"]["remote_ip"] == "192.0.2.3", "{said}");
    assert_eq!(told["records"][0]["issue_id"], json!(leaked.issue_id));

    let (found, said) = trace(&stage.audit, &["01ARZ3NDEKTSV4RRFFQ69G5FAV"], None);
    assert!(!found && said.contains("knows nothing of 1 of 1"), "{said}");
    assert!(!trace(&stage.audit, &[], Some(&line("/other"))).0);
}

async fn without_room_for_a_record_nothing_is_given(backend: Backend) {
    let folder = tempfile::tempdir().unwrap();
    let stage = Stage::with(backend, "[audit]\nqueue = 2\n", None).await;
    // The disk is full.
    std::os::unix::fs::symlink("/dev/full", folder.path().join("full")).unwrap();
    std::fs::rename(folder.path().join("full"), &stage.audit).unwrap();
    let mut given = 0;
    let status = loop {
        match stage.try_presign(ask("k", download())).await {
            Ok(_) => given += 1,
            Err(status) => break status,
        }
        assert!(given <= 2, "given without a record");
    };
    assert_eq!(reason(&status), (tonic::Code::ResourceExhausted, "AUDIT_FULL".into()));
    let details = tonic_types::StatusExt::get_error_details(&status);
    assert!(details.retry_info().and_then(|retry| retry.retry_delay).is_some());
    // There is room again: nothing was lost, and it goes on.
    std::fs::remove_file(&stage.audit).unwrap();
    assert_eq!(records(&stage).len(), given);
    stage.presign("k", download()).await;
    assert_eq!(records(&stage).len(), given + 1);
}

async fn a_caller_has_so_many_urls_and_calls_a_second(backend: Backend) {
    let stage = Stage::with(backend, "[limits]\nurls_per_second = 4\ncalls_per_second = 3\n", None).await;
    let requests = vec![ask("k", download()); 6];
    let mut api = stage.api.clone();
    let batch = api.batch_presign(pb::BatchPresignRequest { requests }).await.unwrap().into_inner();
    let refused: Vec<_> = batch
        .results
        .into_iter()
        .filter_map(|item| match item.result {
            Some(pb::presign_result::Result::Error(status)) => Some(status),
            _ => None,
        })
        .collect();
    assert_eq!(refused.len(), 2, "each item is judged on its own");
    assert_eq!(refused[0].code, tonic::Code::ResourceExhausted as i32);
    // A bucket for calls is another matter: this is the second, and there are three.
    let mut status = None;
    for _ in 0..4 {
        status = api.list_signers(pb::ListSignersRequest {}).await.err().or(status);
    }
    let status = status.expect("a refusal");
    assert_eq!(reason(&status), (tonic::Code::ResourceExhausted, "RATE_LIMITED".into()));
    let details = tonic_types::StatusExt::get_error_details(&status);
    let wait = details.retry_info().and_then(|retry| retry.retry_delay).expect("a time to wait");
    assert!(wait <= Duration::from_millis(335), "{wait:?}");
    tokio::time::sleep(wait).await;
    api.list_signers(pb::ListSignersRequest {}).await.expect("who waits is let through");
}
