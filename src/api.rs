//! The tonic trait. Every body is the same: who calls, parse, authorize, do;
//! and what came of it is written down.

use std::sync::Arc;
use std::time::SystemTime;

use tonic::{Request, Response, Status};

use crate::app::App;
use crate::audit::Asked;
use crate::caller::Caller;
use crate::error::Error;
use crate::ops::{
    abort_upload, complete_upload, inspect, list, list_parts, presign, revoke, sign_parts, signers, start_upload, stat,
};
use crate::pb;
use crate::pb::file_access_server::FileAccess;
use crate::signer::url::SignedUrl;
use crate::wire;

/// The service, on one replica.
#[derive(Clone)]
pub struct Api(pub Arc<App>);

type Answer<T> = Result<Response<T>, Status>;

impl Api {
    /// Who calls, unless they call too often.
    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Error> {
        let caller = Caller::of(request.extensions())?;
        self.0.calls.take(&caller)?;
        Ok(caller)
    }

    /// Does `work` with a record of it.
    async fn recorded<T>(
        &self,
        caller: &Caller,
        asked: impl Into<Asked>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let entry = self.0.audit.open(caller.clone(), asked.into(), SystemTime::now()).await?;
        let ended = work.await;
        entry.close(&ended);
        ended
    }
}

#[tonic::async_trait]
impl FileAccess for Api {
    async fn presign(&self, request: Request<pb::PresignRequest>) -> Answer<pb::PresignResponse> {
        let caller = self.caller(&request)?;
        let ask = presign::Ask::try_from(request.into_inner())?;
        Ok(Response::new(presign::issue(&self.0, caller, ask, SystemTime::now()).await?.into()))
    }

    async fn batch_presign(&self, request: Request<pb::BatchPresignRequest>) -> Answer<pb::BatchPresignResponse> {
        let caller = self.caller(&request)?;
        let asks = wire::parse_batch(request.into_inner())?;
        let mut results = Vec::with_capacity(asks.len());
        for (n, ask) in asks.into_iter().enumerate() {
            self.0.give_way(n).await;
            let result = match ask {
                Ok(ask) => presign::issue(&self.0, caller.clone(), ask, SystemTime::now()).await,
                Err(error) => Err(error),
            };
            results.push(result.into());
        }
        Ok(Response::new(pb::BatchPresignResponse { results }))
    }

    async fn start_upload(&self, request: Request<pb::StartUploadRequest>) -> Answer<pb::StartUploadResponse> {
        let (app, now) = (&self.0, SystemTime::now());
        let caller = self.caller(&request)?;
        let ask = start_upload::Ask::try_from(request.into_inner())?;
        let mut entry = app.audit.open(caller.clone(), (&ask).into(), now).await?;
        let started = async { start_upload::start(app, app.policy.authorize(caller, ask)?, now).await }.await;
        if let Ok(started) = &started {
            entry.started(&started.session);
        }
        entry.close(&started);
        Ok(Response::new(started?.into()))
    }

    async fn sign_parts(&self, request: Request<pb::SignPartsRequest>) -> Answer<pb::SignPartsResponse> {
        let caller = self.caller(&request)?;
        let request = request.into_inner();
        let session = self.0.tokens.open(&request.upload_token, &caller)?;
        let ask = wire::parse_sign_parts(request, &session)?;
        let signed = self.recorded(&caller, Asked::of_upload("sign_parts", &session), async {
            let permit = self.0.policy.authorize(caller.clone(), ask)?;
            sign_parts::sign(&self.0, permit, SystemTime::now()).await
        });
        Ok(Response::new(signed.await?.into()))
    }

    async fn list_parts(&self, request: Request<pb::ListPartsRequest>) -> Answer<pb::ListPartsResponse> {
        let caller = self.caller(&request)?;
        let request = request.into_inner();
        let session = self.0.tokens.open(&request.upload_token, &caller)?;
        let ask = wire::parse_list_parts(&request, &session)?;
        let page = self.recorded(&caller, Asked::of_upload("list_parts", &session), async {
            let permit = self.0.policy.authorize(caller.clone(), ask)?;
            list_parts::list(&self.0, permit, SystemTime::now()).await
        });
        Ok(Response::new(page.await?.into()))
    }

    async fn complete_upload(&self, request: Request<pb::CompleteUploadRequest>) -> Answer<pb::CompleteUploadResponse> {
        let caller = self.caller(&request)?;
        let request = request.into_inner();
        let session = self.0.tokens.open(&request.upload_token, &caller)?;
        let ask = wire::parse_complete_upload(request, &session)?;
        let made = self.recorded(&caller, Asked::of_upload("complete_upload", &session), async {
            let permit = self.0.policy.authorize(caller.clone(), ask)?;
            complete_upload::complete(&self.0, permit, SystemTime::now()).await
        });
        Ok(Response::new(made.await?.into()))
    }

    async fn abort_upload(&self, request: Request<pb::AbortUploadRequest>) -> Answer<pb::AbortUploadResponse> {
        let caller = self.caller(&request)?;
        let session = self.0.tokens.open(&request.into_inner().upload_token, &caller)?;
        let aborted = self.recorded(&caller, Asked::of_upload("abort_upload", &session), async {
            let permit =
                self.0.policy.authorize(caller.clone(), abort_upload::Ask { session: Arc::clone(&session) })?;
            abort_upload::abort(&self.0, permit).await
        });
        aborted.await?;
        Ok(Response::new(pb::AbortUploadResponse {}))
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Answer<pb::ListResponse> {
        let caller = self.caller(&request)?;
        let ask = list::Ask::try_from(request.into_inner())?;
        let page = self.recorded(&caller, &ask, async {
            let permit = self.0.policy.authorize(caller.clone(), ask.clone())?;
            list::list(&self.0, permit, SystemTime::now()).await
        });
        Ok(Response::new(page.await?.into()))
    }

    async fn stat(&self, request: Request<pb::StatRequest>) -> Answer<pb::StatResponse> {
        let caller = self.caller(&request)?;
        let ask = stat::Ask::try_from(request.into_inner())?;
        let facts = self.recorded(&caller, &ask, async {
            let permit = self.0.policy.authorize(caller.clone(), ask.clone())?;
            stat::stat(&self.0, permit).await
        });
        Ok(Response::new(facts.await?.into()))
    }

    async fn revoke(&self, request: Request<pb::RevokeRequest>) -> Answer<pb::RevokeResponse> {
        let (app, now) = (&self.0, SystemTime::now());
        let caller = self.caller(&request)?;
        let ask = revoke::Ask::try_from(request.into_inner())?;
        let mut entry = app.audit.open(caller.clone(), (&ask).into(), now).await?;
        let revoked = async { revoke::revoke(app, app.policy.authorize(caller, ask)?, now).await }.await;
        if let Ok(revoked) = &revoked {
            entry.revoked(revoked);
        }
        entry.close(&revoked);
        Ok(Response::new(revoked?.into()))
    }

    async fn inspect(&self, request: Request<pb::InspectRequest>) -> Answer<pb::InspectResponse> {
        let caller = self.caller(&request)?;
        let url = SignedUrl::try_from(request.into_inner())?;
        let inspected = self.recorded(&caller, &url, async {
            let permit = self.0.policy.authorize(caller.clone(), inspect::Ask::new(&self.0, url.clone()))?;
            inspect::inspect(&self.0, permit, SystemTime::now())
        });
        Ok(Response::new(inspected.await?.into()))
    }

    async fn list_signers(&self, request: Request<pb::ListSignersRequest>) -> Answer<pb::ListSignersResponse> {
        let caller = self.caller(&request)?;
        let signers = self.recorded(&caller, Asked::Signers, async {
            let permit = self.0.policy.authorize(caller.clone(), signers::Ask)?;
            Ok(signers::signers(&self.0, permit, SystemTime::now()))
        });
        Ok(Response::new(signers.await?.into()))
    }
}
