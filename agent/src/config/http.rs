//! Configuration tables of the HTTP listeners: `[metrics]`, `[status_page]` and `[control]`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use super::{Invalid, parse};

/// TCP port of the default of `metrics.listen`.
const METRICS_PORT: u16 = 9464;
/// TCP port of `status_page.listen` in examples.
const STATUS_PAGE_PORT: u16 = 9465;

/// HTTP listener for metrics, liveness and readiness.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Address and port to listen on; `None` disables the listener.
    #[serde(deserialize_with = "metrics_listen")]
    pub listen: Option<SocketAddr>,
    /// Enables series for each peer.
    pub per_peer: bool,
    /// Host names that `/metrics` accepts, in addition to IP addresses, `localhost` and the node's
    /// name.
    pub hosts: Vec<String>,
}

/// HTTP listener of the status page.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StatusPage {
    /// Address and port to listen on; `None` disables the listener.
    #[serde(deserialize_with = "status_page_listen")]
    pub listen: Option<SocketAddr>,
}

/// Unix socket that serves the agent's HTTP control API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// Path of the control socket.
    pub socket: PathBuf,
}

impl Default for Metrics {
    fn default() -> Self {
        let listen = Some((Ipv4Addr::LOCALHOST, METRICS_PORT).into());
        Self { listen, per_peer: false, hosts: Vec::new() }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self { socket: "/run/skein/control.sock".into() }
    }
}

impl Metrics {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let wrong = |host: &&String| host.is_empty() || !host.chars().all(allowed);
        if let Some(host) = self.hosts.iter().find(wrong) {
            return Err(Invalid(format!(
                "metrics.hosts: {host:?} is not a host name. Use letters, digits, '-', '.' and '_'."
            )));
        }
        Ok(())
    }
}

fn metrics_listen<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    parse::listen("metrics.listen", METRICS_PORT, deserializer)
}

fn status_page_listen<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    parse::listen("status_page.listen", STATUS_PAGE_PORT, deserializer)
}
