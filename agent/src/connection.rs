//! HTTP server for one connection of a client over TCP or a unix socket.

use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};

/// Serves one request and closes the connection. `header_timeout` bounds the time for the request
/// header, `timeout` the time for the request and its answer. A handler may answer `101 Switching
/// Protocols`; it then owns the connection, without a timeout. With `half_close`, a client that has
/// shut down its writing side receives the answer; without, the connection ends.
pub(crate) async fn serve_request<S>(
    stream: S,
    router: Router,
    header_timeout: Duration,
    timeout: Duration,
    half_close: bool,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        // One request per connection, so that an idle client does not occupy a connection.
        .keep_alive(false)
        .half_close(half_close)
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    match tokio::time::timeout(timeout, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "HTTP connection failed"),
        Err(_) => tracing::debug!("HTTP connection timed out"),
    }
}
