//! Take-over of the agent's role on a node. One agent at a time has the role: the process that
//! holds the lock of the state directory.
//!
//! An agent that takes over changes nothing until it would be ready in the place of the running
//! agent: its configuration is valid and fits the node records, its ports are free, and its
//! instance has a waiting data plane. Then it requests the lock. The running agent closes all other
//! descriptors and passes the lock on. If the running agent ends without that, the kernel releases
//! the lock and this agent acquires it.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use skein_ipc::instance::Instance;
use skein_netlink::Netlink;
use skein_sys::lock::FileLock;
use tokio::time::Instant;

use super::agent_client;
use super::failures::netlink_failure;
use super::kubernetes::{Kubernetes, Requests};
use super::lock::StateLock;
use super::registry::{Registry, Stored};
use super::source::{RecordChanges, RecordSource};
use super::underlay::UnderlayWatch;
use crate::config::Config;
use crate::failure::Failure;
use crate::lifecycle::NotReady;
use crate::listener::bind_tcp;
use crate::status::{NodeState, RegistryStatus, RotationStatus};

/// Interval at which an agent that is not ready to take over checks again.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// Maximum time for which an agent waits until the running agent is ready, so that a take-over does
/// not begin in the middle of another one.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// Parameters of an agent's start.
#[derive(Debug, Default)]
pub struct Start {
    /// True to take over from the running agent, if there is one.
    pub take_over: bool,
    /// Instance of this agent; an agent with an instance takes over as well.
    pub instance: Option<Instance>,
    /// Lock of the role, if an earlier process has passed it on.
    pub lock: Option<FileLock>,
}

impl Start {
    /// Returns whether this agent takes over from a running agent.
    pub fn takes_over(&self) -> bool {
        self.take_over || self.instance.is_some()
    }
}

/// The role of the node's agent.
#[derive(Debug)]
pub struct Role {
    /// Lock of the role; the role ends when the lock is dropped.
    pub lock: StateLock,
    /// Listeners that were bound before the role was taken.
    pub listeners: Listeners,
    /// True if another agent of this node had the role immediately before.
    pub taken_over: bool,
}

/// Listeners for HTTP; `None` for those that were not bound yet.
#[derive(Debug, Default)]
pub struct Listeners {
    /// Listener of the configuration key `metrics.listen`.
    pub metrics: Option<std::net::TcpListener>,
    /// Listener of the configuration key `status_page.listen`.
    pub page: Option<std::net::TcpListener>,
}

/// State of the running agent that its successor needs. Agents of other releases may report more or
/// fewer fields.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Running {
    key: Option<RotationStatus>,
    ready: bool,
    records: RegistryStatus,
    config: Value,
}

/// Takes the role: at once if no agent runs, otherwise as soon as this agent would be ready.
/// `starting` shows the reason for the wait.
///
/// # Errors
/// [`Failure`] if the configuration or the environment is wrong; the role stays with the running
/// agent.
pub async fn take_role(
    config: &Config,
    start: &mut Start,
    starting: &NotReady,
) -> Result<Role, Failure> {
    let state_dir = &config.state_dir;
    let role = |lock, listeners, taken_over| Role { lock, listeners, taken_over };
    if let Some(lock) = start.lock.take() {
        return Ok(role(StateLock::of(lock, state_dir)?, Listeners::default(), true));
    }
    match StateLock::acquire(state_dir) {
        Err(Failure::InUse(_)) if start.takes_over() => {}
        lock => return Ok(role(lock?, Listeners::default(), false)),
    }
    let mut candidate = Candidate::new(config, start.instance.as_ref());
    loop {
        let listeners = candidate.wait(starting).await?;
        starting.because("the running agent hands over");
        tracing::info!("taking over from the running agent");
        let socket = config.control.socket.clone();
        let asked =
            tokio::task::spawn_blocking(move || agent_client::request_hand_over(&socket)).await;
        match asked.map_err(std::io::Error::from).flatten() {
            Ok(Some(lock)) => {
                return Ok(role(StateLock::of(lock, state_dir)?, listeners, true));
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "running agent does not hand over"),
        }
        match StateLock::acquire(state_dir) {
            Err(Failure::InUse(_)) => tokio::time::sleep(CHECK_INTERVAL).await,
            lock => return Ok(role(lock?, listeners, true)),
        }
    }
}

/// An agent that waits to take over.
struct Candidate<'a> {
    config: &'a Config,
    instance: Option<&'a Instance>,
    /// State of the running agent at the last request.
    running: Option<Running>,
    records: Option<Records>,
    /// Deadline until which the running agent may be unready.
    settled: Option<Instant>,
}

/// The node records as this agent reads them.
struct Records {
    /// State whose key the follower of the API server uses.
    node: NodeState,
    reader: RecordSource,
    underlay: UnderlayWatch,
    /// Follows the API server.
    _source: Option<RecordChanges>,
}

impl<'a> Candidate<'a> {
    fn new(config: &'a Config, instance: Option<&'a Instance>) -> Self {
        Self { config, instance, running: None, records: None, settled: None }
    }

    /// Waits until this agent would be ready in the place of the running one.
    async fn wait(&mut self, starting: &NotReady) -> Result<Listeners, Failure> {
        let mut logged = String::new();
        loop {
            let reason = match self.obstacle().await? {
                None => match self.bind() {
                    Ok(listeners) => return Ok(listeners),
                    Err(failure) => return Err(failure),
                },
                Some(reason) => reason,
            };
            if reason != logged {
                tracing::info!(reason, "waiting to take over from the running agent");
                starting.because(&reason);
                logged = reason;
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }

    /// Returns the reason why this agent would not be ready now. An error is final.
    async fn obstacle(&mut self) -> Result<Option<String>, Failure> {
        match agent_client::status::<Running>(&self.config.control.socket).await {
            Ok(running) => self.running = Some(running),
            // The running agent has just ended. Its last state counts until this agent has the
            // role.
            Err(_) if self.running.is_some() => {}
            // The running agent ended before the request, so that this start is an ordinary start.
            Err(_) if StateLock::acquire(&self.config.state_dir).is_ok() => return Ok(None),
            Err(error) => return Ok(Some(format!("the running agent does not answer: {error}"))),
        }
        if let Some(instance) = self.instance
            && let Err(error) = tokio::net::UnixStream::connect(instance.dataplane_socket()).await
        {
            return Ok(Some(format!("this instance's data plane does not listen yet: {error}")));
        }
        if let Some(reason) = self.disagreement().await? {
            return Ok(Some(reason));
        }
        let settled = *self.settled.get_or_insert_with(|| Instant::now() + READY_TIMEOUT);
        let ready = self.running.as_ref().is_none_or(|running| running.ready);
        Ok((!ready && Instant::now() < settled)
            .then(|| "the running agent is not ready: it may be taking over itself".to_owned()))
    }

    /// Returns the reason why the node records do not fit this agent's configuration.
    async fn disagreement(&mut self) -> Result<Option<String>, Failure> {
        let Some(running) = &self.running else { return Ok(None) };
        let Some(key) = running.key.clone() else {
            return Ok(Some("the running agent does not report its keys".to_owned()));
        };
        let records = match &mut self.records {
            Some(records) => records,
            none => none.insert(Records::open(self.config, key.clone()).await?),
        };
        records.node.set_key(key.clone());
        if let Err(error) = records.reader.read() {
            return Ok(Some(format!("waiting for the node records: {error}")));
        }
        let stored = Stored::read(self.config);
        let reader = records.reader.clone();
        let registry = match Registry::read(self.config, key.keys, reader, stored) {
            Ok(registry) => registry,
            Err(failure) if self.config.kubernetes.enabled => return Ok(Some(failure.to_string())),
            Err(failure) => return Err(failure),
        };
        let refused =
            |origin: &PathBuf| running.records.rejected.iter().any(|known| known.origin == *origin);
        let rejected = registry.status().rejected;
        if let Some(record) = rejected.iter().find(|record| !refused(&record.origin)) {
            return Ok(Some(format!(
                "this agent would refuse the node record {}, which the running agent uses: {}",
                record.origin.display(),
                record.error
            )));
        }
        let netlink = Netlink::connect().map_err(netlink_failure)?;
        let underlay = &mut records.underlay;
        underlay.check(&netlink, self.config, &registry).await.map_err(netlink_failure)?;
        match underlay.desired(self.config, &registry).address_problem() {
            Some(problem) if !self.config.kubernetes.enabled => Err(Failure::Usage(problem)),
            problem => Ok(problem),
        }
    }

    /// Binds the ports that the running agent does not have. A port in use belongs to another
    /// program.
    fn bind(&self) -> Result<Listeners, Failure> {
        let config = self.config;
        let bind = |key: &str, address: Option<SocketAddr>| match address {
            Some(address) if self.has(address.port()) => Ok(None),
            address => bind_tcp(key, address),
        };
        let listeners = Listeners {
            metrics: bind("metrics.listen", config.metrics.listen)?,
            page: bind("status_page.listen", config.status_page.listen)?,
        };
        let port = config.underlay.port;
        let running = self.running.as_ref().map(|running| &running.config["underlay"]["port"]);
        if running.is_some_and(|running| *running != port) {
            for address in &config.underlay.addresses {
                check_port(SocketAddr::new(*address, port))?;
            }
        }
        Ok(listeners)
    }

    /// Returns whether the running agent listens on a TCP port.
    fn has(&self, port: u16) -> bool {
        let tables = ["metrics", "status_page"];
        self.running
            .iter()
            .flat_map(|running| tables.map(|table| &running.config[table]["listen"]))
            .any(|listen| {
                let address = listen.as_str().and_then(|text| text.parse::<SocketAddr>().ok());
                address.is_some_and(|address| address.port() == port)
            })
    }
}

impl Records {
    async fn open(config: &Config, key: RotationStatus) -> Result<Self, Failure> {
        let (node, underlay) = (NodeState::new(key), UnderlayWatch::default());
        if !config.kubernetes.enabled {
            let reader = RecordSource::Path(config.nodes.clone());
            return Ok(Self { node, reader, underlay, _source: None });
        }
        let (own, key) = (Arc::new(config.clone()), node.view().follow_key());
        let mut kubernetes = Kubernetes::follow(own, key, Requests::new()?).await?;
        // The caller checks repeatedly whether all records are known.
        kubernetes.start_with(config, true, |_| {}).await?;
        let reader = RecordSource::Kubernetes(kubernetes.records());
        Ok(Self { node, reader, underlay, _source: Some(RecordChanges::Kubernetes(kubernetes)) })
    }
}

/// Refuses an underlay port that another program uses.
fn check_port(address: SocketAddr) -> Result<(), Failure> {
    match UdpSocket::bind(address) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Err(Failure::InUse(format!(
                "underlay.port: {address} is in use by another program. Set another port on every node."
            )))
        }
        // The data plane reports a missing address or a missing capability when it opens the port.
        _ => Ok(()),
    }
}
