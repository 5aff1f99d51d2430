//! `fileaccess demo`: the tutorial's story, told while it happens.

use std::time::{Duration, SystemTime};

use reqwest::{Client, Method, StatusCode};
use tonic::transport::Endpoint;

use super::{BUCKET, Dev, NEIGHBOUR, Options};
use crate::cli::Failure;
use crate::config::Listen;
use crate::pb;
use crate::pb::file_access_client::FileAccessClient;
use crate::pb::presign_request::Operation;
use crate::pb::revoke_request::Target;
use crate::pb::revoke_response::Outcome;
use crate::rotation::probe::Probe;

const RECIPE: &str = "Grandmother's goulash: be generous with the paprika.\n";
const KEY: &str = "secret-recipe.txt";

/// Tells the story against a `dev` of its own.
///
/// # Errors
/// The first step that did not go as told.
pub async fn run() -> Result<(), Failure> {
    let any = ([127, 0, 0, 1], 0).into();
    let dev = Dev::start(&Options { data: None, listen: Listen::Tcp(any), s3_listen: any, web_listen: any }).await?;
    let channel = Endpoint::from_shared(format!("http://{}", dev.address)).map_err(Failure::running)?.connect_lazy();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(dev.serve(async {
        // Dropped with the story: that ends it too.
        let _ = ended.await;
    }));
    let story = Story { api: FileAccessClient::new(channel), http: Probe::http_client() };
    let told = story.tell().await;
    drop(end);
    serving.await.map_err(Failure::running)??;
    told?;
    println!("\nAll of it went as told.");
    Ok(())
}

struct Story {
    api: FileAccessClient<tonic::transport::Channel>,
    http: Client,
}

impl Story {
    async fn tell(mut self) -> Result<(), Failure> {
        println!("A private bucket, `{BUCKET}`, and a service that never touches a byte of what is in it.\n");

        println!("1. A backend asks for an upload URL of `{KEY}`: text, {} bytes, never to overwrite.", RECIPE.len());
        let upload = Operation::Upload(pb::Upload {
            content_type: Some("text/plain".into()),
            content_length: i64::try_from(RECIPE.len()).ok(),
            create_only: true,
            ..pb::Upload::default()
        });
        let upload = self.presign(upload, 300).await?;
        self.send(&upload, &upload.method, &upload.url, Some(RECIPE), StatusCode::OK).await?;

        println!("2. Another asks for a download URL of it, and passes it on.");
        let download = self.presign(Operation::Download(pb::Download::default()), 300).await?;
        let text = self.send(&download, "GET", &download.url, None, StatusCode::OK).await?;
        if text != RECIPE {
            return Err(Failure::running("the download is not what was uploaded"));
        }
        println!("   The recipe came back to the letter: {}", text.trim_end());

        println!("\nWhat must fail:\n");
        println!("3. The same upload again: the URL was signed for creating only.");
        self.send(&upload, "PUT", &upload.url, Some(RECIPE), StatusCode::PRECONDITION_FAILED).await?;

        println!("4. A tampered URL: the same signature for another key.");
        let tampered = download.url.replace(KEY, "payroll.txt");
        self.send(&download, "GET", &tampered, None, StatusCode::FORBIDDEN).await?;

        println!("5. The download URL, used to upload.");
        self.send(&download, "PUT", &download.url, Some("poison"), StatusCode::FORBIDDEN).await?;

        println!("6. An expired URL: it was good for one second.");
        let brief = self.presign(Operation::Download(pb::Download::default()), 1).await?;
        let end = brief
            .expires_at
            .and_then(|end| SystemTime::try_from(end).ok())
            .ok_or_else(|| Failure::running("no expires_at"))?;
        // S3 counts whole seconds: past the end means the second after it.
        let wait = end.duration_since(SystemTime::now()).unwrap_or_default() + Duration::from_millis(1100);
        tokio::time::sleep(wait).await;
        self.send(&brief, "GET", &brief.url, None, StatusCode::FORBIDDEN).await?;
        self.revoke(&download).await
    }

    /// The story's end: the URL is out, and is taken back.
    async fn revoke(mut self, leaked: &pb::PresignResponse) -> Result<(), Failure> {
        println!("The recipe's URL has leaked.\n");
        println!("7. It works for anybody who has it, as does one of another signer.");
        self.send(leaked, "GET", &leaked.url, None, StatusCode::OK).await?;
        let upload = Operation::Upload(pb::Upload::default());
        let upload = self.presign_key(&format!("{NEIGHBOUR}/menu.txt"), upload, 300).await?;
        self.send(&upload, "PUT", &upload.url, Some("Goulash."), StatusCode::OK).await?;
        let menu = Operation::Download(pb::Download::default());
        let menu = self.presign_key(&format!("{NEIGHBOUR}/menu.txt"), menu, 300).await?;

        println!(
            "8. Revoke, by the leaked URL itself. Its signer gets a new key, and S3 is seen to refuse the old one:"
        );
        let request = pb::RevokeRequest {
            target: Some(Target::Url(leaked.url.clone())),
            reason: "posted in a chat".into(),
            ..pb::RevokeRequest::default()
        };
        let revoked = self.api.revoke(request).await.map_err(Failure::running)?.into_inner();
        let Some(Outcome::SignerRotation(rotation)) = revoked.outcome else {
            return Err(Failure::running("no signer was rotated"));
        };
        for step in &rotation.steps {
            println!("   {}", step.name);
        }
        println!(
            "   → signer `{}` has {} in place of {}\n",
            rotation.signer, rotation.new_access_key_id, rotation.old_access_key_id
        );

        println!("9. The leaked URL is dead, its neighbour under another signer lives, and new URLs work.");
        self.send(leaked, "GET", &leaked.url, None, StatusCode::FORBIDDEN).await?;
        self.send(&menu, "GET", &menu.url, None, StatusCode::OK).await?;
        let fresh = self.presign(Operation::Download(pb::Download::default()), 300).await?;
        self.send(&fresh, "GET", &fresh.url, None, StatusCode::OK).await?;
        Ok(())
    }

    async fn presign(&mut self, operation: Operation, ttl: i64) -> Result<pb::PresignResponse, Failure> {
        self.presign_key(KEY, operation, ttl).await
    }

    async fn presign_key(&mut self, key: &str, operation: Operation, ttl: i64) -> Result<pb::PresignResponse, Failure> {
        let request = pb::PresignRequest {
            bucket: BUCKET.into(),
            key: key.into(),
            ttl: Some(prost_types::Duration { seconds: ttl, nanos: 0 }),
            operation: Some(operation),
        };
        let response = self.api.presign(request).await.map_err(Failure::running)?.into_inner();
        println!(
            "   Presign → issue {} by signer `{}`, headers {:?}",
            response.issue_id, response.signer, response.headers
        );
        Ok(response)
    }

    async fn send(
        &self,
        presigned: &pb::PresignResponse,
        method: &str,
        url: &str,
        body: Option<&'static str>,
        expect: StatusCode,
    ) -> Result<String, Failure> {
        let method: Method = method.parse().map_err(Failure::running)?;
        println!("   {method} {url}");
        let mut request = self.http.request(method, url);
        for (name, value) in &presigned.headers {
            request = request.header(name, value);
        }
        if let Some(body) = body {
            request = request.body(body);
        }
        let response = request.send().await.map_err(Failure::running)?;
        let status = response.status();
        let text = response.text().await.map_err(Failure::running)?;
        let code =
            text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>")).map_or("", |(code, _)| code);
        println!("   → {status} {code}\n");
        if status == expect {
            Ok(text)
        } else {
            Err(Failure::running(format!("expected {expect}, got {status}: {text}")))
        }
    }
}
