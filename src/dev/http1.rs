//! HTTP/1.1 on loopback, for what of `dev` is not gRPC.

use std::error::Error;
use std::io;
use std::pin::pin;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;

/// What hyper wants of the errors that it is handed.
type Failure = Box<dyn Error + Send + Sync>;

/// Serves until `until`, and finishes what runs then.
///
/// # Errors
/// `listener` is not on loopback.
pub(super) async fn serve<S, B>(listener: TcpListener, service: S, until: impl Future<Output = ()>) -> io::Result<()>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error: Into<Failure>, Future: Send> + Clone + Send + 'static,
    B: Body<Data: Send, Error: Into<Failure>> + Send + 'static,
{
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        return Err(io::Error::other(format!("`{address}` is not loopback, as all of `fileaccess dev` must be")));
    }
    let graceful = GracefulShutdown::new();
    let mut until = pin!(until);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut until => break,
        };
        match accepted {
            Ok((stream, _)) => {
                // Else small answers wait for the peer's delayed acknowledgement, some 40 ms.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%address, %error, "connection lost");
                }
                let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service.clone());
                tokio::spawn(graceful.watch(connection));
            }
            Err(error) => {
                tracing::warn!(%address, %error, "connection not accepted");
                // Out of descriptors, it would fail again at once.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    graceful.shutdown().await;
    Ok(())
}
