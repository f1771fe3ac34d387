//! HTTP: /metrics, /healthz and /readyz on one listener, the status page on another.

mod page;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;

use crate::control::shared::Shared;
use crate::failure::Failure;
use crate::metrics;

/// Binds the address that the configuration has under `key`, if there is one.
pub fn bind(key: &str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, Failure> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map(Some).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Failure::Taken(format!(
            "{key} = {address}: the port is in use: set another, or \"off\""
        )),
        std::io::ErrorKind::AddrNotAvailable => Failure::Usage(format!(
            "{key} = {address}: not an address of this host: set another, or \"off\""
        )),
        _ => Failure::io(format!("cannot listen on {key} = {address}"), error),
    })
}

/// Connections at once; whoever comes beyond waits in the listener's queue.
const CONNECTIONS: usize = 64;
/// How long a connection may take for its one request and the answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long to wait where a connection cannot be accepted: descriptors do not come back at once.
const AGAIN: Duration = Duration::from_millis(100);
/// How often that is said while it lasts.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Connections that could not be accepted: said at once, then rarely.
#[derive(Debug, Default)]
struct Refusals {
    said: Option<Instant>,
    unsaid: u64,
}

impl Refusals {
    /// Counts one; whether it is to be said, and how many were not since the last time.
    fn count(&mut self, now: Instant) -> Option<u64> {
        if self.said.is_some_and(|said| now.saturating_duration_since(said) < SAY_AGAIN) {
            self.unsaid += 1;
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// Serves metrics, liveness and readiness until it is aborted.
pub async fn serve_metrics(listener: Option<TcpListener>, shared: Shared) {
    serve(listener, metrics_router(shared)).await;
}

/// Serves the status page until it is aborted.
pub async fn serve_page(listener: Option<TcpListener>, shared: Shared) {
    serve(listener, page::router(shared)).await;
}

async fn serve(listener: Option<TcpListener>, router: Router) {
    let Some(listener) = listener else { return };
    match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => accept(listener, router, DEADLINE).await,
        Err(error) => tracing::error!(%error, "the HTTP server cannot start"),
    }
}

fn metrics_router(shared: Shared) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
        .with_state(shared)
}

async fn accept(listener: tokio::net::TcpListener, router: Router, deadline: Duration) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut refusals = Refusals::default();
    loop {
        // Fails only where the semaphore is closed, which nobody does.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                if let Some(unsaid) = refusals.count(Instant::now()) {
                    tracing::warn!(%error, unsaid, "cannot accept an HTTP connection");
                }
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let _place = place;
            let connection = http1::Builder::new()
                // One request a connection: none is held open by somebody who asks once a minute.
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(deadline, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "an HTTP connection failed"),
                Err(_) => tracing::debug!("an HTTP connection took too long"),
            }
        });
    }
}

async fn metrics_page(State(shared): State<Shared>) -> Response {
    let report = shared.recent_report().await;
    let input = metrics::Input {
        report,
        dataplane: shared.dataplane.get(),
        registry: shared.registry(),
        ready: shared.readiness.reasons().is_empty(),
        key: Some(shared.key()),
        per_peer: shared.config.metrics.per_peer,
        requests: shared.requests().map(|requests| requests.families()).unwrap_or_default(),
        pods: match shared.pods() {
            Some(pods) => Some(metrics::Pods {
                requests: pods.requests(),
                usage: pods.usage().await,
                forged: pods.forged().await,
            }),
            None => None,
        },
    };
    match metrics::render(&input) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn readiness(State(shared): State<Shared>) -> Response {
    let reasons = shared.readiness.reasons();
    if reasons.is_empty() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use crate::config::Config;
    use crate::control::rotation::RotationStatus;
    use crate::keys::PublicKey;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    /// An agent's state without a data process.
    pub(crate) fn shared() -> Shared {
        let config = Config::parse("name = 'node-a'").unwrap();
        Shared::new(config, RotationStatus::of(PublicKey([1; 32])))
    }

    /// Serves on a port of the loopback.
    pub(crate) async fn start(router: Router, deadline: Duration) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, router, deadline));
        address
    }

    async fn server(deadline: Duration) -> SocketAddr {
        start(metrics_router(shared()), deadline).await
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        ask(address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await
    }

    /// Sends a request; the whole answer.
    pub(crate) async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let all = tokio::time::timeout(Duration::from_secs(5), stream.read_to_string(&mut answer));
        all.await.unwrap().unwrap();
        answer
    }

    #[test]
    fn refusals_are_said_once_a_minute_with_their_number() {
        let start = Instant::now();
        let mut refusals = Refusals::default();
        let said: Vec<_> = (0..1500_u32).map(|n| refusals.count(start + n * AGAIN)).collect();
        assert_eq!((said[0], said[1], said[599]), (Some(0), None, None));
        assert_eq!((said[600], said[1200]), (Some(599), Some(599)));
        assert_eq!(said.iter().flatten().count(), 3);
    }

    #[tokio::test]
    async fn pages_answer_and_connections_end() {
        let address = server(DEADLINE).await;
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics").await.contains("skein_dataplane_up 0"));
        assert!(get(address, "/nothing").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn slow_clients_are_cut_off_and_keep_nobody_out_for_long() {
        let address = server(Duration::from_millis(300)).await;
        let mut slow = Vec::new();
        for _ in 0..CONNECTIONS + 20 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /hea").await.unwrap();
            slow.push(stream);
        }
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        for mut stream in slow {
            let mut rest = Vec::new();
            let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest));
            // Closed, or reset with what it had not read.
            let _ = end.await.expect("the connection was not cut off");
        }
    }
}
