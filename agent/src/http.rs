//! /metrics, /healthz and /readyz.

use std::net::TcpListener;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::config::Config;
use crate::control::shared::Shared;
use crate::failure::Failure;
use crate::metrics;

/// Binds the address of the configuration, if there is one.
pub fn bind(config: &Config) -> Result<Option<TcpListener>, Failure> {
    let Some(address) = config.metrics.listen else { return Ok(None) };
    let listener = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map(Some).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Failure::Taken(format!(
            "metrics.listen = {address}: the port is in use: set another, or \"off\""
        )),
        std::io::ErrorKind::AddrNotAvailable => Failure::Usage(format!(
            "metrics.listen = {address}: not an address of this host: set another, or \"off\""
        )),
        _ => Failure::io(format!("cannot listen on metrics.listen = {address}"), error),
    })
}

/// Serves until it is aborted.
pub async fn serve(listener: Option<TcpListener>, shared: Shared) {
    let Some(listener) = listener else { return };
    let router = Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
        .with_state(shared);
    let served = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => axum::serve(listener, router).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!(%error, "the HTTP server has ended");
    }
}

async fn metrics_page(State(shared): State<Shared>) -> Response {
    let report = shared.report().await.ok();
    let input = metrics::Input {
        report,
        dataplane: shared.dataplane.get(),
        registry: shared.registry(),
        ready: shared.readiness.reasons().is_empty(),
        per_peer: shared.config.metrics.per_peer,
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
