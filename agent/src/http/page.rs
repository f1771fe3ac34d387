//! Status page: the content of `skein-agent status` for a browser. The page is read-only and
//! contains no secret.
//!
//! There is no login, so that every client that reaches the listener can read. Scripts of other
//! sites in the reader's browser cannot: no CORS header allows them, and a request whose host is
//! not an IP address, `localhost` or the node's name is refused (DNS rebinding).

mod peers;

use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use skein_core::drop::{Direction, DropReason};
use skein_core::tunnel::Cipher;
use skein_ipc::keys::PublicKey;
use skein_ipc::{Capability, PeerState, Report, Reported};
use tokio::sync::watch;

use super::is_own_host;
use crate::cni;
use crate::control::dataplane::DataplaneState;
use crate::control::exports::HttpSource;
use crate::control::history::{self, COLUMNS, Sample};
use crate::control::reports::Reports;
use crate::lifecycle::Readiness;
use crate::status::{NodeView, RejectedRecords};

/// Maximum number of rejected records that are listed. All of them are counted.
const MAX_REJECTED_RECORDS: usize = 20;
/// Maximum length of an offload's reason in characters. The reason of UDP GSO lists every
/// destination that refuses it.
const MAX_REASON_CHARS: usize = 300;

/// Headers of every answer. They forbid content of other origins, framing, caching and inline
/// scripts.
const HEADERS: [(HeaderName, &str); 7] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

/// State of the agent that the page shows. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct PageSource {
    /// Name of the node.
    name: String,
    readiness: Readiness,
    node: NodeView,
    dataplane: DataplaneState,
    reports: Reports,
    /// State of the pods; `None` while the agent serves none.
    pods: watch::Receiver<Option<cni::View>>,
}

impl From<HttpSource> for PageSource {
    fn from(source: HttpSource) -> Self {
        let HttpSource { agent, reports, pods, requests: _ } = source;
        Self {
            name: agent.config.name.clone(),
            readiness: agent.readiness,
            node: agent.node,
            dataplane: agent.dataplane,
            reports,
            pods,
        }
    }
}

/// Returns the router of the page, its files and its two API paths.
pub(super) fn router(source: PageSource) -> Router {
    let file = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, kind)], text) })
    };
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("page/index.html")))
        .route("/app.js", file("text/javascript; charset=utf-8", include_str!("page/app.js")))
        .route("/style.css", file("text/css; charset=utf-8", include_str!("page/style.css")))
        .route("/icon.svg", file("image/svg+xml", include_str!("page/icon.svg")))
        .route("/api/status", get(status))
        .route("/api/peers", get(peers))
        .layer(from_fn_with_state(source.clone(), guard))
        .with_state(source)
}

/// Refuses requests for foreign hosts and adds [`HEADERS`] to every answer.
async fn guard(State(source): State<PageSource>, request: Request, next: Next) -> Response {
    let mut response = if is_own_host(request.headers(), &source.name, &[]) {
        next.run(request).await
    } else {
        let text =
            "the status page accepts the hosts localhost, IP addresses and the node's name only\n";
        (StatusCode::MISDIRECTED_REQUEST, text).into_response()
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Query parameters of `/api/status`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StatusQuery {
    /// Time of the last sample that the client has, milliseconds of the history's clock.
    since: u64,
}

/// Body of `/api/status`: the status without the list of peers.
#[derive(Debug, Serialize)]
struct Status {
    node: String,
    version: &'static str,
    /// Process id of the control process; changes with a restart.
    process: u32,
    public_key: PublicKey,
    ready: bool,
    reasons: Vec<String>,
    interface: Interface,
    records: Records,
    dataplane: Dataplane,
    lanes: usize,
    /// Cipher of the sessions; `None` if they have different ciphers or if there is no session.
    cipher: Option<Reported<Cipher>>,
    offloads: Vec<Capability>,
    /// Drops by direction and reason, without those that never occurred.
    drops: Vec<Drops>,
    peers: Peers,
    /// Pools of pod addresses; `None` if the agent serves no pods.
    pools: Option<Vec<Pool>>,
    history: History,
}

#[derive(Debug, Serialize)]
struct Interface {
    name: String,
    mtu: u16,
    addresses: Vec<std::net::IpAddr>,
    local_cidrs: Vec<IpNet>,
    routes: usize,
}

#[derive(Debug, Serialize)]
struct Records {
    source: String,
    accepted: usize,
    rejected_count: usize,
    rejected: Vec<RejectedRecords>,
    source_error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Dataplane {
    /// Process id; `None` if the data process is not available.
    process: Option<u32>,
    uptime_seconds: f64,
    restarts: u64,
    revision: u64,
    error: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Drops {
    direction: String,
    reason: String,
    meaning: &'static str,
    packets: u64,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Peers {
    total: usize,
    established: usize,
    connecting: usize,
    idle: usize,
    unreachable: usize,
    narrow: usize,
}

#[derive(Debug, Serialize)]
struct Pool {
    cidr: IpNet,
    // Floating point, because readers of JSON may not support integers of 128 bits.
    total: f64,
    used: u64,
    free: f64,
    resting: u64,
}

#[derive(Debug, Serialize)]
struct History {
    /// Current time of the clock of the rows, milliseconds.
    now_ms: u64,
    columns: [&'static str; COLUMNS.len()],
    rows: Vec<Sample>,
}

async fn status(
    State(source): State<PageSource>,
    Query(query): Query<StatusQuery>,
) -> Json<Status> {
    let (present, report) = match source.reports.recent().await {
        Some(report) => (true, report),
        None => (false, Report::default()),
    };
    let reasons = source.readiness.reasons();
    let (interface, registry) = (source.node.interface(), source.node.registry());
    let dataplane = source.dataplane.status();
    let rows = source.dataplane.history().since(query.since);
    let pods = source.pods.borrow().clone();
    let pools = match pods {
        Some(pods) => Some(pods.usage().await.pools.iter().map(pool).collect()),
        None => None,
    };
    Json(Status {
        node: source.name,
        version: env!("CARGO_PKG_VERSION"),
        process: std::process::id(),
        public_key: source.node.key().keys.first,
        ready: reasons.is_empty(),
        reasons,
        interface: Interface {
            name: interface.name,
            mtu: interface.mtu,
            addresses: interface.addresses,
            local_cidrs: interface.local_cidrs,
            routes: interface.routes.len(),
        },
        records: Records {
            source: registry.source.display().to_string(),
            accepted: registry.accepted,
            rejected_count: registry.rejected.len(),
            rejected: registry.rejected.into_iter().take(MAX_REJECTED_RECORDS).collect(),
            source_error: registry.source_error,
        },
        dataplane: Dataplane {
            process: present.then_some(report.pid),
            uptime_seconds: report.uptime_seconds,
            restarts: dataplane.restarts,
            revision: dataplane.revision,
            error: dataplane.error,
        },
        lanes: report.lanes.len(),
        cipher: cipher(&report),
        offloads: report.capabilities.iter().map(offload).collect(),
        drops: drops(&report),
        peers: count(&report),
        pools,
        history: History { now_ms: history::now_ms(), columns: COLUMNS, rows },
    })
}

async fn peers(
    State(source): State<PageSource>,
    Query(query): Query<peers::PeerQuery>,
) -> Response {
    let report = source.reports.recent().await.unwrap_or_default();
    Json(peers::select(&report.peers, &query)).into_response()
}

fn cipher(report: &Report) -> Option<Reported<Cipher>> {
    let mut ciphers = report.peers.iter().filter_map(|peer| peer.cipher.as_ref());
    let first = ciphers.next()?;
    ciphers.all(|other| other == first).then(|| first.clone())
}

fn offload(capability: &Capability) -> Capability {
    let mut shown = capability.clone();
    if let Some(reason) = &mut shown.reason
        && let Some((end, _)) = reason.char_indices().nth(MAX_REASON_CHARS)
    {
        reason.truncate(end);
        reason.push('…');
    }
    shown
}

fn drops(report: &Report) -> Vec<Drops> {
    let some = report.drops.iter().filter(|drop| drop.packets > 0);
    let mut drops: Vec<_> = some
        .map(|drop| Drops {
            meaning: drop.kind.known().map_or("", DropReason::meaning),
            direction: drop.kind.direction().to_owned(),
            reason: drop.kind.reason().to_owned(),
            packets: drop.packets,
        })
        .collect();
    let overflow = report.lanes.iter().map(|lane| lane.receive_queue_overflow).sum();
    if overflow > 0 {
        drops.push(Drops {
            direction: Direction::Ingress.label().to_owned(),
            reason: "receive_queue_overflow".to_owned(),
            meaning: "The kernel dropped a datagram because the receive queue of a socket was full.",
            packets: overflow,
        });
    }
    if report.tun_queue_drops > 0 {
        drops.push(Drops {
            direction: Direction::Egress.label().to_owned(),
            reason: "tun_queue_full".to_owned(),
            meaning: "The kernel dropped a packet because a queue of the TUN device was full.",
            packets: report.tun_queue_drops,
        });
    }
    drops
}

fn count(report: &Report) -> Peers {
    let of = |state| report.peers.iter().filter(|peer| peer.state == state).count();
    Peers {
        total: report.peers.len(),
        established: of(PeerState::Established),
        connecting: of(PeerState::Connecting),
        idle: of(PeerState::Idle),
        unreachable: of(PeerState::Unreachable),
        narrow: report.reduced_paths.len(),
    }
}

fn pool(pool: &skein_ipam::PoolUsage) -> Pool {
    let total = pool.total as f64;
    Pool {
        cidr: pool.cidr,
        total,
        used: pool.in_use,
        free: total - pool.in_use as f64 - pool.quarantined as f64,
        resting: pool.quarantined,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::http::connections::ConnectionLimits;
    use crate::http::tests::{exchange, source, start};
    use crate::status::tests::peer;
    use skein_ipc::{CapabilityName, CapabilityState, DropReport, LaneReport};

    async fn server() -> SocketAddr {
        start(router(source().into()), ConnectionLimits::default()).await
    }

    async fn get(address: SocketAddr, path: &str, host: &str) -> String {
        exchange(address, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await
    }

    #[tokio::test]
    async fn every_answer_has_security_headers() {
        let address = server().await;
        for (path, code, kind) in [
            ("/", "200", "text/html"),
            ("/app.js", "200", "text/javascript"),
            ("/style.css", "200", "text/css"),
            ("/icon.svg", "200", "image/svg+xml"),
            ("/api/status", "200", "application/json"),
            ("/api/peers?limit=5&state=idle", "200", "application/json"),
            ("/api/peers?limit=many", "400", "text/plain"),
            ("/api/peers?colour=red", "400", "text/plain"),
            ("/metrics", "404", ""),
        ] {
            let answer = get(address, path, "127.0.0.1:9465").await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {code}")), "{path}: {answer}");
            assert!(answer.contains(kind), "{path}: {answer}");
            for (name, value) in HEADERS {
                assert!(answer.contains(&format!("{name}: {value}\r\n")), "{path}: {name}");
            }
            let lower = answer.to_lowercase();
            assert!(!lower.contains("set-cookie") && !lower.contains("access-control"), "{path}");
        }
    }

    #[tokio::test]
    async fn methods_that_change_state_are_refused() {
        let address = server().await;
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let request = format!("{method} /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n");
            let answer = exchange(address, &request).await;
            assert!(answer.starts_with("HTTP/1.1 405"), "{method}: {answer}");
        }
    }

    #[tokio::test]
    async fn foreign_host_names_are_refused() {
        let address = server().await;
        for host in ["127.0.0.1", "192.0.2.7:80", "[::1]:9465", "localhost:9465", "node-a"] {
            assert!(get(address, "/", host).await.starts_with("HTTP/1.1 200"), "{host}");
        }
        for host in ["evil.example", "evil.example:9465", "127.0.0.1.evil.example", "[x]", ""] {
            assert!(get(address, "/api/status", host).await.starts_with("HTTP/1.1 421"), "{host}");
        }
        let two = "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n";
        assert!(!exchange(address, two).await.starts_with("HTTP/1.1 200"));
        assert!(exchange(address, "GET / HTTP/1.0\r\n\r\n").await.starts_with("HTTP/1.0 421"));
    }

    #[test]
    fn page_loads_only_served_files_and_no_inline_code() {
        let html = include_str!("page/index.html");
        for (attribute, known) in [("src=\"", 1), ("href=\"", 2)] {
            let targets: Vec<_> = html.split(attribute).skip(1).collect();
            assert_eq!(targets.len(), known, "{attribute}");
            for target in targets {
                let target = target.split('"').next().unwrap();
                assert!(["app.js", "style.css", "icon.svg"].contains(&target), "{target}");
            }
        }
        assert!(!html.contains("<style") && !html.contains(" style=") && !html.contains(" on"));
        let script = include_str!("page/app.js");
        for unsafe_way in ["innerHTML", "outerHTML", "insertAdjacent", "eval(", "document.write"] {
            assert!(!script.contains(unsafe_way), "{unsafe_way}");
        }
        // The only URL in the script is the name of the SVG namespace.
        assert_eq!(script.matches("http://").count(), 1);
        assert_eq!(script.matches("https://").count(), 0);
    }

    #[test]
    fn nonzero_drops_have_their_meaning() {
        let drop = |reason: DropReason, packets| DropReport { kind: reason.into(), packets };
        let lane = LaneReport { receive_queue_overflow: 4, ..LaneReport::default() };
        let drops = drops(&Report {
            drops: vec![drop(DropReason::Replayed, 3), drop(DropReason::InnerSource, 0)],
            lanes: vec![lane],
            ..Report::default()
        });
        let shown: Vec<_> = drops.iter().map(|drop| (&*drop.reason, drop.packets)).collect();
        assert_eq!(shown, [("replayed", 3), ("receive_queue_overflow", 4)]);
        assert_eq!(drops[0].meaning, "A datagram with the same counter has been received before.");
    }

    #[test]
    fn peers_are_counted_and_long_reasons_truncated() {
        let peers = vec![peer("b", PeerState::Established), peer("c", PeerState::Unreachable)];
        let report = Report { peers, ..Report::default() };
        let expected = Peers { total: 2, established: 1, unreachable: 1, ..Peers::default() };
        assert_eq!(count(&report), expected);
        assert_eq!(cipher(&report), Some(Cipher::Aes256Gcm.into()));
        let long = Capability {
            name: CapabilityName::UdpGso.into(),
            state: CapabilityState::Degraded.into(),
            reason: Some("ä".repeat(5000)),
        };
        assert_eq!(offload(&long).reason.unwrap().chars().count(), MAX_REASON_CHARS + 1);
    }
}
