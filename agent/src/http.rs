//! HTTP listeners: one for `/metrics`, `/healthz` and `/readyz`, one for the status page.

mod connections;
mod page;

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::task::JoinHandle;

use self::connections::{ConnectionLimits, accept};
use crate::control::exports::HttpSource;
use crate::control::takeover::Listeners;
use crate::metrics;

/// Starts the tasks that serve metrics, liveness and readiness, and the status page. Each task runs
/// until it is aborted; the task of an absent listener ends at once.
pub fn serve(listeners: Listeners, source: HttpSource) -> [JoinHandle<()>; 2] {
    let Listeners { metrics, page } = listeners;
    [(metrics, metrics_router(source.clone())), (page, page::router(source.into()))]
        .map(|(listener, router)| tokio::spawn(serve_router(listener, router)))
}

async fn serve_router(listener: Option<TcpListener>, router: Router) {
    let Some(listener) = listener else { return };
    match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => accept(listener, router, ConnectionLimits::default()).await,
        Err(error) => tracing::error!(%error, "cannot start the HTTP server"),
    }
}

fn metrics_router(source: HttpSource) -> Router {
    Router::new()
        .route("/metrics", get(metrics_page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
        .with_state(source)
}

async fn metrics_page(State(source): State<HttpSource>, headers: HeaderMap) -> Response {
    let HttpSource { agent, reports, pods, requests } = source;
    let settings = &agent.config.metrics;
    if !is_own_host(&headers, &agent.config.name, &settings.hosts) {
        let text = "/metrics accepts the hosts localhost, IP addresses, the node's name and metrics.hosts only\n";
        return (StatusCode::MISDIRECTED_REQUEST, text).into_response();
    }
    let report = reports.recent().await;
    // The values are cloned so that no lock is held while the counters are read.
    let (pods, firewall) = (pods.borrow().clone(), agent.firewall.borrow().clone());
    let policy = agent.policy.borrow().clone();
    let input = metrics::Input {
        conflicts: agent.node.interface().conflicts.len(),
        report,
        dataplane: agent.dataplane.status(),
        registry: agent.node.registry(),
        ready: agent.readiness.reasons().is_empty(),
        key: Some(agent.node.key()),
        per_peer: settings.per_peer,
        requests: requests.map(|requests| requests.families()).unwrap_or_default(),
        pods: match pods {
            Some(pods) => {
                Some(metrics::Pods { requests: pods.requests(), usage: pods.usage().await })
            }
            None => None,
        },
        policy: match policy {
            Some(policy) => Some(policy.metrics().await),
            None => None,
        },
        firewall: match firewall {
            Some(firewall) => Some(metrics::Firewall {
                status: firewall.status(),
                counters: firewall.counters().await,
            }),
            None => None,
        },
    };
    match metrics::render(&input) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn readiness(State(source): State<HttpSource>, headers: HeaderMap) -> Response {
    let reasons = source.agent.readiness.reasons();
    if reasons.is_empty() {
        return "ready\n".into_response();
    }
    let config = &source.agent.config;
    if !is_own_host(&headers, &config.name, &config.metrics.hosts) {
        return (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response()
}

/// Returns whether the only Host header is an IP address, `localhost`, the node's name or one of
/// `hosts`. A name that a foreign DNS server resolves to this node (DNS rebinding) is refused.
fn is_own_host(headers: &HeaderMap, node: &str, hosts: &[String]) -> bool {
    let mut found = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (found.next(), found.next()) else { return false };
    let Ok(host) = host.to_str() else { return false };
    if let Some(v6) = host.strip_prefix('[') {
        return v6.split(']').next().is_some_and(|v6| v6.parse::<Ipv6Addr>().is_ok());
    }
    let name = host.split(':').next().unwrap_or_default();
    let mut names = ["localhost", node].into_iter().chain(hosts.iter().map(String::as_str));
    name.parse::<Ipv4Addr>().is_ok() || names.any(|own| own.eq_ignore_ascii_case(name))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;
    use crate::control::exports::tests::http_source;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    /// Returns the state of an agent without a data process.
    pub(crate) fn source() -> HttpSource {
        http_source("name = 'node-a'\n[metrics]\nhosts = ['node-a.example']")
    }

    /// Serves `router` on a port of the loopback interface.
    pub(crate) async fn start(router: Router, limits: ConnectionLimits) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, router, limits));
        address
    }

    /// Serves metrics, liveness and readiness with these limits.
    pub(crate) async fn server(limits: ConnectionLimits) -> SocketAddr {
        start(metrics_router(source()), limits).await
    }

    pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
        exchange(address, &format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")).await
    }

    /// Sends a request and returns the whole answer.
    pub(crate) async fn exchange(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let all = tokio::time::timeout(Duration::from_secs(30), stream.read_to_string(&mut answer));
        all.await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn each_path_is_answered_and_connection_closed() {
        let address = server(ConnectionLimits::default()).await;
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics").await.contains("skein_dataplane_up 0"));
        assert!(get(address, "/nothing").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn metrics_for_foreign_host_names_are_refused() {
        let address = server(ConnectionLimits::default()).await;
        let request = async |path: &str, host: &str| {
            exchange(address, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await
        };
        let own = ["192.0.2.1:9464", "[2001:db8::1]:9464", "localhost", "node-a:9464", "NODE-A"];
        for host in own.into_iter().chain(["node-a.example:9464"]) {
            let answer = request("/metrics", host).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
        }
        for host in ["evil.example", "node-a.evil.example:9464", "192.0.2.1.evil.example"] {
            let answer = request("/metrics", host).await;
            assert!(answer.starts_with("HTTP/1.1 421"), "{host}: {answer}");
            assert!(!answer.contains("skein_"), "{host}: A refused request must get no metrics.");
            let health = request("/healthz", host).await;
            assert!(
                health.starts_with("HTTP/1.1 200"),
                "The liveness answer has no information to protect: {health}"
            );
        }
    }

    #[tokio::test]
    async fn readiness_for_foreign_host_names_has_no_reasons() {
        let source = source();
        let _blocked = source.agent.readiness.block("interface skein0: refused");
        let address = start(metrics_router(source), ConnectionLimits::default()).await;
        let request = async |host: &str| {
            exchange(address, &format!("GET /readyz HTTP/1.1\r\nHost: {host}\r\n\r\n")).await
        };
        let answer = request("192.0.2.1:9464").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("skein0"), "{answer}");
        let answer = request("evil.example").await;
        assert!(
            answer.starts_with("HTTP/1.1 503"),
            "The result of the probe must not change: {answer}"
        );
        assert!(!answer.contains("skein0"), "A foreign host name must get no reasons: {answer}");
    }
}
