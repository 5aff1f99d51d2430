//! The tonic trait. Every body is the same four lines: who calls, parse,
//! authorize, do.

use std::sync::Arc;
use std::time::SystemTime;

use tonic::{Request, Response, Status};

use crate::app::App;
use crate::caller::Caller;
use crate::ops::{inspect, list, presign, revoke, signers, stat};
use crate::pb;
use crate::pb::file_access_server::FileAccess;
use crate::wire;

/// The service, on one replica.
#[derive(Clone)]
pub struct Api(pub Arc<App>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl FileAccess for Api {
    async fn presign(&self, request: Request<pb::PresignRequest>) -> Answer<pb::PresignResponse> {
        let caller = Caller::of(request.extensions())?;
        let ask = presign::Ask::try_from(request.into_inner())?;
        let permit = self.0.policy.authorize(caller, ask);
        Ok(Response::new(presign::presign(&self.0, permit, SystemTime::now()).await?.into()))
    }

    async fn batch_presign(&self, request: Request<pb::BatchPresignRequest>) -> Answer<pb::BatchPresignResponse> {
        let caller = Caller::of(request.extensions())?;
        let asks = wire::parse_batch(request.into_inner())?;
        let mut results = Vec::with_capacity(asks.len());
        for (n, ask) in asks.into_iter().enumerate() {
            self.0.give_way(n).await;
            let result = match ask {
                Ok(ask) => {
                    let permit = self.0.policy.authorize(caller.clone(), ask);
                    presign::presign(&self.0, permit, SystemTime::now()).await
                }
                Err(error) => Err(error),
            };
            results.push(result.into());
        }
        Ok(Response::new(pb::BatchPresignResponse { results }))
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Answer<pb::ListResponse> {
        let caller = Caller::of(request.extensions())?;
        let ask = list::Ask::try_from(request.into_inner())?;
        let permit = self.0.policy.authorize(caller, ask);
        Ok(Response::new(list::list(&self.0, permit, SystemTime::now()).await?.into()))
    }

    async fn stat(&self, request: Request<pb::StatRequest>) -> Answer<pb::StatResponse> {
        let caller = Caller::of(request.extensions())?;
        let ask = stat::Ask::try_from(request.into_inner())?;
        let permit = self.0.policy.authorize(caller, ask);
        Ok(Response::new(stat::stat(&self.0, permit).await?.into()))
    }

    async fn revoke(&self, request: Request<pb::RevokeRequest>) -> Answer<pb::RevokeResponse> {
        let caller = Caller::of(request.extensions())?;
        let ask = revoke::Ask::try_from(request.into_inner())?;
        let permit = self.0.policy.authorize(caller, ask);
        Ok(Response::new(revoke::revoke(&self.0, permit, SystemTime::now()).await?.into()))
    }

    async fn inspect(&self, request: Request<pb::InspectRequest>) -> Answer<pb::InspectResponse> {
        let caller = Caller::of(request.extensions())?;
        let ask = inspect::Ask::try_from(request.into_inner())?;
        let permit = self.0.policy.authorize(caller, ask);
        Ok(Response::new(inspect::inspect(&self.0, permit, SystemTime::now()).into()))
    }

    async fn list_signers(&self, request: Request<pb::ListSignersRequest>) -> Answer<pb::ListSignersResponse> {
        let caller = Caller::of(request.extensions())?;
        let permit = self.0.policy.authorize(caller, signers::Ask);
        Ok(Response::new(signers::signers(&self.0, &permit, SystemTime::now()).into()))
    }
}
