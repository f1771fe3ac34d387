//! The control process: reconciles interface, routes, firewall, pods and data process with the
//! configuration and the node records.

pub mod agent_client;
mod border;
mod changes;
pub mod cleanup;
pub mod client;
mod clock;
mod controller;
pub mod dataplane;
pub mod desired;
pub mod endpoint;
pub mod exports;
mod failures;
pub(crate) mod handshakes;
pub mod history;
pub mod identity;
pub mod instance;
#[cfg_attr(not(feature = "kubernetes"), path = "without_kubernetes.rs")]
pub mod kubernetes;
pub mod lock;
pub mod log_level;
mod logs;
pub mod records;
pub mod registry;
pub mod reports;
pub mod rotation;
pub mod server;
pub mod source;
pub mod supervisor;
pub mod takeover;
mod underlay;
pub mod view;

use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::Context;
use skein_netlink::Netlink;
use skein_sys::socket::make_directory;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::controller::Controller;
use self::exports::{HttpSource, StatusSource};
use self::failures::netlink_failure;
use self::instance::DataplaneRequest;
use self::kubernetes::{Kubernetes, Requests};
use self::lock::StateLock;
use self::log_level::LogLevels;
use self::logs::log_changes;
use self::registry::{Registry, Stored};
use self::reports::Reports;
use self::rotation::Rotation;
use self::source::{RecordChanges, RecordSource};
use self::takeover::{Listeners, Role, Start};
use self::view::{AgentView, Publication};
use crate::config::{Config, Mode};
use crate::failure::Failure;
use crate::lifecycle::{NotReady, Readiness, Signals};
use crate::listener::bind_tcp;
use crate::watch::SourceWatch;

/// Maximum wait until an agent that hands over has released its ports and sockets.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which a port or socket in use is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Cause of the control process's end.
#[derive(Debug)]
pub enum Ended {
    /// A signal ended the agent.
    Signal,
    /// The agent hands over its role to another agent.
    HandedOver(HandOver),
}

/// The role of an agent during its hand-over to another agent.
#[derive(Debug)]
pub struct HandOver {
    /// Lock of the role.
    pub lock: StateLock,
    /// Connection to the agent that receives the role after this process has closed all other
    /// descriptors.
    pub connection: UnixStream,
    /// True if this agent was ready.
    pub ready: bool,
}

/// Starts the tasks that serve HTTP on bound listeners. The caller aborts them.
pub type ServeHttp = fn(Listeners, HttpSource) -> [JoinHandle<()>; 2];

/// Runs the control process until a signal ends it or another agent takes over.
///
/// # Errors
/// [`Failure`] if the start fails: invalid configuration or records, missing rights, or a resource
/// in use.
pub async fn run(
    config: Config,
    mut start: Start,
    serve_http: ServeHttp,
) -> Result<Ended, Failure> {
    let mut signals = Signals::install().context("cannot install signal handlers")?;
    let takes_over = start.takes_over();
    let readiness = Readiness::default();
    // This guard is held until the controller and the supervisor block readiness themselves.
    let starting = readiness.block("the agent is starting");
    let probes = start.instance.as_ref();
    let probes = probes.map(|own| instance::answer_probes(own, readiness.clone())).transpose()?;
    // An external data process is started by another program, which creates the directory.
    if config.dataplane.mode == Mode::Spawn {
        make_directory(&config.dataplane.socket)
            .map_err(|error| Failure::io("cannot use dataplane.socket", error))?;
    }
    let role = tokio::select! {
        role = takeover::take_role(&config, &mut start, &starting) => role?,
        () = signals.terminated() => return Ok(Ended::Signal),
    };
    let Role { lock, listeners, taken_over } = role;
    let rotation = Rotation::load(&config)?;
    let requests = config.kubernetes.enabled.then(Requests::new).transpose()?;
    let published = Publication::new(rotation.status(), readiness.clone());
    let agent = published.view(&config);
    let reports = Reports::new(config.dataplane.socket.clone());
    let bind = async |key: &str, bound: Option<TcpListener>, address| match bound {
        Some(bound) => Ok(Some(bound)),
        None => retry_until_free(takes_over, || bind_tcp(key, address)).await,
    };
    let metrics = bind("metrics.listen", listeners.metrics, config.metrics.listen).await?;
    let page = bind("status_page.listen", listeners.page, config.status_page.listen).await?;
    let status = retry_until_free(takes_over, || server::bind(&config.control.socket)).await?;
    let (hand_over, mut asked_to_hand_over) = mpsc::channel(1);
    let shown = HttpSource {
        agent: agent.clone(),
        reports: reports.clone(),
        pods: published.pods.subscribe(),
        requests: requests.clone(),
    };
    let http = serve_http(Listeners { metrics, page }, shown);
    let (rotate, asked) = mpsc::channel(1);
    let log_levels = LogLevels { dataplane: config.dataplane.socket.clone() };
    let senders = server::RequestSenders { hand_over, rotate, log_levels };
    let source = StatusSource { agent: agent.clone(), reports, pods: published.pods.subscribe() };
    let server = tokio::spawn(server::serve(status, source, senders));
    let dataplane = start.instance.as_ref();
    let mut dataplane = dataplane.map(|own| DataplaneRequest::start(own, readiness.clone()));

    let socket = config.control.socket.clone();
    let work = async {
        // After a take-over, the data process of the other instance may still serve the data plane.
        // It may refuse this agent's settings, so wait for the data plane of this instance.
        if let Some(dataplane) = dataplane.as_mut().filter(|_| taken_over) {
            dataplane.granted().await;
        }
        let stored = Stored::read(&config);
        add_stored_unreachable_routes(&config, stored.as_ref()).await?;
        let source = tokio::select! {
            source = first_records(&agent, requests, &starting, stored.as_ref()) => source?,
            () = signals.terminated() => return Ok(()),
        };
        let (source, reader) = source;
        let registry = Registry::open(&config, rotation.public(), reader, stored)?;
        let (controller, first) = Controller::start(config, rotation, registry, published).await?;
        drop(starting);
        controller.run(first, source, asked, &mut signals).await
    };
    let result = tokio::select! {
        result = work => result,
        // The controller's work is interrupted anywhere, as in an agent that is killed: its
        // successor reconciles the state.
        Some(connection) = asked_to_hand_over.recv() => {
            tracing::info!("handing over to another agent");
            let ready = readiness.reasons().is_empty();
            return Ok(Ended::HandedOver(HandOver { lock, connection, ready }));
        }
    };
    http.iter().for_each(JoinHandle::abort);
    server.abort();
    drop((dataplane, probes));
    // A socket file that stays is harmless, because the next start takes it over.
    let _ = std::fs::remove_file(socket);
    lock.release();
    result.map(|()| Ended::Signal)
}

/// Calls `take` again while an agent that hands over still has the resource, at most
/// [`RELEASE_TIMEOUT`].
async fn retry_until_free<T>(
    take_over: bool,
    take: impl Fn() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let end = Instant::now() + RELEASE_TIMEOUT;
    loop {
        match take() {
            Err(Failure::InUse(_)) if take_over && Instant::now() < end => {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            result => return result,
        }
    }
}

/// Adds the unreachable routes that follow from the stored records of an earlier process. After a
/// boot, only these routes keep traffic to pods off the underlay while the agent waits for the
/// records. Without stored records, which is the case at an agent's first start, this function adds
/// no route, so that a refused configuration leaves no route.
async fn add_stored_unreachable_routes(
    config: &Config,
    stored: Option<&Stored>,
) -> Result<(), Failure> {
    let kept = stored.and_then(|stored| stored.unreachable_prefixes(config));
    let Some(kept) = kept else { return Ok(()) };
    let netlink = Netlink::connect().map_err(netlink_failure)?;
    // Existing routes stay, because they may belong to the records that are read next.
    let outcome = netlink.add_unreachable_routes(&kept).await;
    outcome.errors.iter().for_each(|error| tracing::error!("{error}"));
    log_changes(&outcome);
    Ok(())
}

/// Waits until the source has records; returns the source and its change notifications.
async fn first_records(
    agent: &AgentView,
    requests: Option<Requests>,
    starting: &NotReady,
    stored: Option<&Stored>,
) -> Result<(RecordChanges, RecordSource), Failure> {
    let config = &*agent.config;
    let Some(requests) = requests else {
        let watch = SourceWatch::start(&config.nodes);
        return Ok((RecordChanges::Path(watch), RecordSource::Path(config.nodes.clone())));
    };
    let mut kubernetes = Kubernetes::start(agent, requests).await?;
    let reader = RecordSource::Kubernetes(kubernetes.records());
    let last_good = stored.is_some_and(|stored| stored.is_of(&reader));
    let waits = |reason: &str| {
        tracing::info!(reason, "waiting for the node records");
        starting.because(format!("waiting for the node records: {reason}"));
    };
    kubernetes.start_with(config, last_good, waits).await?;
    Ok((RecordChanges::Kubernetes(kubernetes), reader))
}
