//! The tonic trait. Every body is the same: who calls, parse, authorize, do;
//! and what came of it is written down.

use std::sync::Arc;
use std::time::SystemTime;

use tonic::{Request, Response, Status};

use crate::app::App;
use crate::audit::Asked;
use crate::caller::Caller;
use crate::error::Error;
use crate::ops::{inspect, list, presign, revoke, signers, stat};
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
