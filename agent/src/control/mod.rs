//! The control process: from configuration and node records to an interface, routes and a data
//! process that does what they say; and back again whenever something changes.

pub mod agent_client;
mod border;
mod changes;
pub mod cleanup;
pub mod client;
mod clock;
pub mod dataplane;
pub mod desired;
pub mod endpoint;
pub mod exports;
pub(crate) mod handshakes;
pub mod history;
pub mod identity;
pub mod instance;
#[cfg_attr(not(feature = "kubernetes"), path = "without_kubernetes.rs")]
pub mod kubernetes;
pub mod lock;
mod log_level;
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
pub mod watch;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use ipnet::IpNet;
use skein_ipc::{ReducedPath, Snapshot};
use skein_netlink::firewall::{self, Firewall, Rules};
use skein_netlink::interface::{InterfaceError, Outcome, Present, RouteConflict, Wanted};
use skein_netlink::link::Link;
use skein_netlink::monitor::Monitor;
use skein_netlink::{Netlink, NetlinkError};
use skein_sys::socket::make_directory;
use skein_sys::tun::TunError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};

use self::border::{firewall_rules, networks};
use self::desired::Desired;
use self::exports::{HttpSource, StatusSource};
use self::instance::DataplaneRequest;
use self::kubernetes::{Kubernetes, Requests};
use self::lock::StateLock;
use self::log_level::LogLevels;
use self::registry::{Registry, Stored};
use self::reports::Reports;
use self::rotation::{Rotation, RotationError, RotationRequest};
use self::source::{Reader, Source};
use self::supervisor::{End, Handle};
use self::takeover::{Listeners, Role, Start};
use self::underlay::UnderlayWatch;
use self::view::{AgentView, Publication};
use self::watch::SourceWatch;
use crate::cni::Pods;
use crate::config::{Config, Mode};
use crate::failure::Failure;
use crate::lifecycle::{Asked, NotReady, Readiness, Signals};
use crate::listener::bind_tcp;
use crate::status::{InterfaceStatus, PeerConflict};

/// The interface is compared with what is wanted this often, whatever was announced.
const RESYNC: Duration = Duration::from_secs(10);
/// Minimum interval between two reactions to changed path MTUs: a peer determines its own MTU.
const PATH_INTERVAL: Duration = Duration::from_secs(1);
/// Routes wait this long for the data process to know the node that they lead to.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long an agent that gives way may take.
const RELEASE: Duration = Duration::from_secs(5);
/// Announcements of the kernel that come together are taken together.
const QUIET: Duration = Duration::from_millis(20);

/// How the control process came to its end.
#[derive(Debug)]
pub enum Ended {
    /// It was asked to end.
    Asked,
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

/// Runs until a signal ends it, another agent takes its place, or the start fails.
pub async fn run(
    config: Config,
    mut start: Start,
    serve_http: ServeHttp,
) -> Result<Ended, Failure> {
    let mut signals = Signals::take().context("cannot take signals")?;
    let takes_over = start.takes_over();
    let readiness = Readiness::default();
    // This guard is held until the parts have guards of their own.
    let starting = readiness.block("the agent is starting");
    let probes = start.instance.as_ref();
    let probes = probes.map(|own| instance::answer_probes(own, readiness.clone())).transpose()?;
    // Where somebody else starts it, the directory is theirs to make.
    if config.dataplane.mode == Mode::Spawn {
        make_directory(&config.dataplane.socket)
            .map_err(|error| Failure::io("cannot use dataplane.socket", error))?;
    }
    let role = tokio::select! {
        role = takeover::take_role(&config, &mut start, &starting) => role?,
        () = signals.end() => return Ok(Ended::Asked),
    };
    let Role { lock, listeners, taken_over } = role;
    let rotation = Rotation::load(&config)?;
    let requests = config.kubernetes.enabled.then(Requests::new).transpose()?;
    let published = Publication::new(rotation.status(), readiness.clone());
    let agent = published.view(&config);
    let reports = Reports::new(config.dataplane.socket.clone());
    let bind = async |key: &str, bound: Option<TcpListener>, address| match bound {
        Some(bound) => Ok(Some(bound)),
        None => free(takes_over, || bind_tcp(key, address)).await,
    };
    let metrics = bind("metrics.listen", listeners.metrics, config.metrics.listen).await?;
    let page = bind("status_page.listen", listeners.page, config.status_page.listen).await?;
    let status = free(takes_over, || server::bind(&config.control.socket)).await?;
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
    let asks = server::Asks { hand_over, rotate, log_levels };
    let source = StatusSource { agent: agent.clone(), reports, pods: published.pods.subscribe() };
    let server = tokio::spawn(server::serve(status, source, asks));
    let dataplane = start.instance.as_ref();
    let mut dataplane = dataplane.map(|own| DataplaneRequest::start(own, readiness.clone()));

    let socket = config.control.socket.clone();
    let work = async {
        // The data plane of the other instance may refuse this agent's settings.
        if let Some(dataplane) = dataplane.as_mut().filter(|_| taken_over) {
            dataplane.granted().await;
        }
        let stored = Stored::read(&config);
        refuse_kept_prefixes(&config, stored.as_ref()).await?;
        let source = tokio::select! {
            source = first_records(&agent, requests, &starting, stored.as_ref()) => source?,
            () = signals.end() => return Ok(()),
        };
        let (source, reader) = source;
        let registry = Registry::open(&config, rotation.public(), reader, stored)?;
        let (controller, first) = Controller::start(config, rotation, registry, published).await?;
        drop(starting);
        controller.run(first, source, asked, &mut signals).await
    };
    let result = tokio::select! {
        result = work => result,
        // Whatever is under way is left as a killed agent leaves it: the next one goes on from there.
        Some(connection) = asked_to_hand_over.recv() => {
            tracing::info!("another agent takes this one's place");
            let ready = readiness.reasons().is_empty();
            return Ok(Ended::HandedOver(HandOver { lock, connection, ready }));
        }
    };
    http.iter().for_each(JoinHandle::abort);
    server.abort();
    drop((dataplane, probes));
    // A socket file that stays is harmless: the next start takes it over.
    let _ = std::fs::remove_file(socket);
    lock.release();
    result.map(|()| Ended::Asked)
}

/// Tries until what an agent that gives way has is free.
async fn free<T>(take_over: bool, take: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
    let end = Instant::now() + RELEASE;
    loop {
        match take() {
            Err(Failure::Taken(_)) if take_over && Instant::now() < end => {
                tokio::time::sleep(QUIET).await;
            }
            result => return result,
        }
    }
}

/// Adds the unreachable routes of an earlier process. After a boot, only these routes keep traffic
/// to pods off the underlay while the agent waits for the records. The first start with a state
/// directory adds no routes here, so that a refused configuration leaves no route.
async fn refuse_kept_prefixes(config: &Config, stored: Option<&Stored>) -> Result<(), Failure> {
    let kept = stored.and_then(|stored| stored.unreachable_prefixes(config));
    let Some(kept) = kept else { return Ok(()) };
    let netlink = Netlink::connect().map_err(netlink_failure)?;
    // Existing routes stay: they may belong to the records that are read next.
    let outcome = netlink.add_unreachable_routes(&kept).await;
    outcome.errors.iter().for_each(|error| tracing::error!("{error}"));
    log_changes(&outcome);
    Ok(())
}

/// Restores once what an earlier version has changed. An error is logged, and the next start tries
/// again.
async fn restore_accept_ra(netlink: &Netlink, config: &Config, registry: &mut Registry) {
    if registry.is_accept_ra_restored() || !config.interface.forwarding {
        return;
    }
    match netlink.restore_accept_ra().await {
        Ok(changed) => {
            if !changed.is_empty() {
                let names = abridged(&changed);
                tracing::info!(names, "router advertisements are ignored again (accept_ra 1)");
            }
            registry.set_accept_ra_restored();
        }
        Err(error) => tracing::error!(%error, "accept_ra not restored"),
    }
}

fn log_changes(outcome: &Outcome) {
    if !outcome.changes.is_empty() {
        tracing::info!("changed: {}", abridged(&outcome.changes));
    }
}

/// The source of the records, once there is something to read.
async fn first_records(
    agent: &AgentView,
    requests: Option<Requests>,
    starting: &NotReady,
    stored: Option<&Stored>,
) -> Result<(Source, Reader), Failure> {
    let config = &*agent.config;
    let Some(requests) = requests else {
        let watch = SourceWatch::start(&config.nodes);
        return Ok((Source::Path(watch), Reader::Path(config.nodes.clone())));
    };
    let mut kubernetes = Kubernetes::start(agent, requests).await?;
    let reader = Reader::Kubernetes(kubernetes.records());
    let last_good = stored.is_some_and(|stored| stored.is_of(&reader));
    let waits = |reason: &str| {
        tracing::info!(reason, "waiting for the node records");
        starting.because(format!("waiting for the node records: {reason}"));
    };
    kubernetes.start_with(config, last_good, waits).await?;
    Ok((Source::Kubernetes(kubernetes), reader))
}

struct Controller {
    config: Config,
    rotation: Rotation,
    registry: Registry,
    published: Publication,
    netlink: Netlink,
    monitor: Monitor,
    underlay: UnderlayWatch,
    desired: Desired,
    /// Unreachable routes that this process requested last.
    unreachable: BTreeSet<IpNet>,
    /// Prefixes of this node's addresses on interfaces of other programs.
    networks: Vec<IpNet>,
    interface: Present,
    snapshots: tokio::sync::watch::Sender<Arc<Snapshot>>,
    supervisor: Handle,
    firewall: Firewall,
    _changes: JoinSet<()>,
    /// Absent where pods are somebody else's business.
    pods: Option<Pods>,
    /// Until they are served, where they are to be.
    no_pods: Option<NotReady>,
    /// Addresses and routes wait until the data process has taken the first snapshot.
    started: bool,
    not_ready: Option<NotReady>,
    /// Paths that carry less than the nodes.
    narrow: Vec<ReducedPath>,
    /// Ports of the data process's UDP sockets.
    source_ports: Vec<u16>,
    /// Time of the next reaction to changes of `narrow`.
    narrow_due: Instant,
    /// Logged already, so as not to be logged every ten seconds.
    complaints: Vec<String>,
    /// Prefixes of peers to which another program has a route.
    conflicts: Vec<PeerConflict>,
}

type First = oneshot::Receiver<Result<(), Failure>>;

impl Controller {
    async fn start(
        config: Config,
        rotation: Rotation,
        mut registry: Registry,
        published: Publication,
    ) -> Result<(Self, First), Failure> {
        let netlink = Netlink::connect().map_err(netlink_failure)?;
        let monitor = Monitor::start(&config.interface.name).map_err(netlink_failure)?;
        let mut underlay = UnderlayWatch::default();
        underlay.check(&netlink, &config, &registry).await.map_err(netlink_failure)?;
        let desired = underlay.desired(&config, &registry);
        if let Some(problem) = desired.address_problem() {
            return Err(Failure::Usage(problem));
        }
        log_mtu_problem(None, &desired);
        log_unresolved(&[], &desired.unresolved);
        // Added before any packet could take a route to the underlay.
        let outcome = netlink.add_unreachable_routes(&desired.unreachable).await;
        outcome.errors.iter().for_each(|error| tracing::error!("{error}"));
        log_changes(&outcome);
        restore_accept_ra(&netlink, &config, &mut registry).await;
        let links = netlink.links().await.map_err(netlink_failure)?;
        let addresses = netlink.addresses(None).await.map_err(netlink_failure)?;
        let networks = networks(&links, &addresses, &config);
        // Started before the interface exists: no packet of a pod passes before the rules are
        // installed.
        let firewall = Firewall::start(firewall_rules(&config, &desired, &networks, &[])).await;
        published.firewall.send_replace(Some(firewall.clone()));
        if let Some(table) = registry.former_table() {
            match firewall::remove(table).await {
                Ok(_) => tracing::info!(table, "nftables table of the earlier name removed"),
                Err(error) => tracing::error!(table, %error, "nftables table not removed"),
            }
        }
        let wanted = desired.interface(&config, &[]);
        let interface = wanted.ensure_device(&netlink, &links).await.map_err(interface_failure)?;
        monitor.set_index(interface.index);
        let snapshot =
            desired.snapshot(&config, rotation.keys(), interface.index, first_revision());
        let (snapshots, receiver) = tokio::sync::watch::channel(Arc::new(snapshot));
        let settings = supervisor::Settings::new(&config);
        let (supervisor, first) = supervisor::start(
            settings,
            receiver,
            published.dataplane.clone(),
            published.readiness.clone(),
        );
        let socket = config.dataplane.socket.clone();
        let mut changes = JoinSet::new();
        changes.spawn(changes::subscribe(socket, published.dataplane.clone()));
        let not_ready = Some(published.readiness.block("the interface is not configured yet"));
        let no_pods =
            config.cni.enabled.then(|| published.readiness.block("pods cannot be attached yet"));
        let mut controller = Self {
            config,
            rotation,
            registry,
            published,
            netlink,
            monitor,
            underlay,
            unreachable: desired.unreachable.clone(),
            networks,
            desired,
            interface,
            snapshots,
            supervisor,
            firewall,
            _changes: changes,
            pods: None,
            no_pods,
            started: false,
            not_ready,
            narrow: Vec::new(),
            source_ports: Vec::new(),
            narrow_due: Instant::now(),
            complaints: Vec::new(),
            conflicts: Vec::new(),
        };
        controller.show();
        Ok((controller, first))
    }

    async fn run(
        mut self,
        mut first: First,
        mut source: Source,
        mut asked: mpsc::Receiver<RotationRequest>,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let mut resync = tokio::time::interval(RESYNC);
        resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let dataplane = self.published.dataplane.clone();
        loop {
            tokio::select! {
                asked = signals.next() => match asked {
                    Asked::End => return self.end().await,
                    Asked::Reload => self.reload().await,
                },
                result = &mut first, if !self.started => {
                    match result.unwrap_or_else(|_| Err(anyhow::anyhow!("the supervisor has ended").into())) {
                        Ok(()) => {
                            self.started = true;
                            self.registry.write_store();
                            self.reconcile().await;
                            if let Err(failure) = self.serve_pods().await {
                                return Err(self.undo(failure).await);
                            }
                        }
                        Err(failure) => return Err(self.undo(failure).await),
                    }
                }
                () = source.due() => {
                    self.reload().await;
                    self.rotate().await;
                }
                Some(asked) = asked.recv() => self.begin_rotation(asked).await,
                () = until(self.rotation.deadline()) => self.rotate().await,
                narrow = dataplane.narrow_paths(&self.narrow, self.narrow_due) => {
                    let paths = self.desired.changed_paths(&self.narrow, &narrow);
                    tracing::info!("path MTUs changed: {}", abridged(&paths));
                    self.narrow = narrow;
                    self.narrow_due = Instant::now() + PATH_INTERVAL;
                    self.reconcile().await;
                }
                ports = dataplane.source_ports(&self.source_ports) => {
                    self.source_ports = ports;
                    self.show();
                }
                () = self.monitor.changed() => {
                    // Missing unreachable routes are added at once, because pods' packets may leave
                    // in clear meanwhile. The reconciliation below retries failures and reports
                    // them.
                    self.ensure_unreachable_routes().await;
                    tokio::time::sleep(QUIET).await;
                    self.reconcile().await;
                }
                () = self.monitor.underlay_changed(), if !self.underlay.is_due() => {
                    self.underlay.changed();
                }
                () = until(self.underlay.deadline()) => self.check_underlay().await,
                _ = resync.tick() => {
                    self.resolve_endpoints().await;
                    self.reconcile().await;
                    self.rotate().await;
                }
            }
        }
    }

    /// Reads the node records and follows them.
    async fn reload(&mut self) {
        let changed = self.registry.reload();
        self.published.node.set_registry(self.registry.status());
        if !changed {
            return;
        }
        self.underlay.records_changed(&self.config, &self.registry);
        let desired = self.underlay.desired(&self.config, &self.registry);
        tracing::info!(peers = desired.peers.len(), "node records have changed");
        self.follow(desired).await;
    }

    /// Makes `desired` the state of this node.
    async fn follow(&mut self, desired: Desired) {
        if let Some(problem) = desired.address_problem() {
            tracing::error!("{problem}");
        }
        log_mtu_problem(Some(&self.desired), &desired);
        log_unresolved(&self.desired.unresolved, &desired.unresolved);
        if desired.mtu != self.desired.mtu {
            let (from, to) = (self.desired.mtu, desired.mtu);
            tracing::info!(from, to, underlay = %self.underlay, "mtu of the overlay changes");
        }
        self.desired = desired;
        // The data process first: a route to a node that it does not know yet loses packets.
        self.publish_and_wait().await;
        self.reconcile().await;
        self.show();
    }

    /// Follows interfaces of link-local endpoints that are created or deleted.
    async fn resolve_endpoints(&mut self) {
        let before = self.desired.unresolved.clone();
        if self.started && self.desired.resolve_endpoints(&self.registry) {
            self.publish_and_wait().await;
        }
        log_unresolved(&before, &self.desired.unresolved);
    }

    async fn publish_and_wait(&self) {
        let revision = self.publish();
        let reached = self.published.dataplane.reached(revision);
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            tracing::warn!(revision, "the data process has not taken the change yet");
        }
    }

    /// Somebody wants another key.
    async fn begin_rotation(&mut self, asked: RotationRequest) {
        if asked.answer.is_closed() {
            // Whoever asked was told that nobody answers, and may have asked again.
            return;
        }
        let away = self.registry.status().source_error;
        let before = self.rotation.public();
        let begun = match (self.started, away) {
            (false, _) => Err(RotationError::Starting),
            // Nobody could be told of the new key, and nobody would take the old one.
            (true, Some(error)) if asked.at_once => Err(RotationError::NoRecords(error)),
            (true, _) => self.rotation.begin(asked.at_once).map_err(RotationError::from),
        };
        if self.rotation.public() != before {
            self.take_keys().await;
        }
        // Whoever asked may have gone.
        let _ = asked.answer.send(begun.map(|()| self.rotation.status()));
    }

    /// Goes on with a change of the key, where it is time.
    async fn rotate(&mut self) {
        if !self.started {
            return;
        }
        let before = self.rotation.public();
        let held = self.published.dataplane.get().second_key_peers;
        let result = self.rotation.step(self.registry.told_keys(), held);
        if self.rotation.public() != before {
            self.take_keys().await;
        }
        let mut status = self.rotation.status();
        if let Err(failure) = result {
            let complaint = format!("the key cannot be changed: {failure}");
            tracing::error!("{complaint}");
            status.waits_for = Some(complaint);
        }
        self.published.node.set_key(status);
    }

    /// This node has other keys: they must be answered to before anybody is told of them.
    async fn take_keys(&mut self) {
        self.registry.set_keys(self.rotation.public());
        self.publish_and_wait().await;
        self.published.node.set_key(self.rotation.status());
    }

    /// Begins to serve the CNI plugin, where that is wanted.
    async fn serve_pods(&mut self) -> Result<(), Failure> {
        if !self.config.cni.enabled {
            return Ok(());
        }
        let (network, readiness) =
            (self.desired.network(&self.config), self.published.readiness.clone());
        let firewall = self.firewall.clone();
        let (pods, view) = Pods::start(&self.config, network, firewall, readiness).await?;
        self.published.pods.send_replace(Some(view));
        self.pods = Some(pods);
        self.no_pods = None;
        Ok(())
    }

    /// Hands the wanted state to the supervisor.
    fn publish(&self) -> u64 {
        let revision = self.snapshots.borrow().revision + 1;
        let snapshot = self.desired.snapshot(
            &self.config,
            self.rotation.keys(),
            self.interface.index,
            revision,
        );
        // The supervisor lives as long as this controller.
        self.snapshots.send_replace(Arc::new(snapshot));
        revision
    }

    /// Brings the interface to what is wanted, making it anew where it is gone.
    async fn reconcile(&mut self) {
        if !self.started {
            return;
        }
        let wanted = self.desired.interface(&self.config, &self.narrow);
        // The unreachable route to a prefix is added before the first route to it, and stays when
        // that route is gone.
        let mut complaints = self.ensure_unreachable_routes().await;
        if let Err(error) = self.ensure_interface(&wanted, &mut complaints).await {
            complaints.push(error.to_string());
        }
        for complaint in complaints.iter().filter(|new| !self.complaints.contains(new)) {
            tracing::error!(interface = wanted.name, "{complaint}");
        }
        self.not_ready = match complaints.is_empty() {
            true => None,
            false => {
                let reason = format!("interface {}: {}", wanted.name, complaints.join("; "));
                Some(self.published.readiness.block(reason))
            }
        };
        self.complaints = complaints;
    }

    /// Brings the interface and the border's networks to the node's state.
    async fn ensure_interface(
        &mut self,
        wanted: &Wanted,
        complaints: &mut Vec<String>,
    ) -> Result<(), NetlinkError> {
        let links = self.netlink.links().await?;
        let device = self.device(wanted, &links).await;
        let addresses = self.netlink.addresses(None).await?;
        let networks = networks(&links, &addresses, &self.config);
        if networks != self.networks {
            self.networks = networks;
            self.show();
        }
        if let Err(error) = device {
            complaints.push(error.to_string());
            return Ok(());
        }
        let outcome = wanted.configure(&self.netlink, self.interface.index, &addresses).await;
        if !outcome.changes.is_empty() {
            tracing::info!(interface = wanted.name, "changed: {}", abridged(&outcome.changes));
        }
        complaints.extend(outcome.errors);
        self.take_conflicts(outcome.conflicts);
        Ok(())
    }

    /// Stores the peers' prefixes to which another program has a route. The conflict concerns only
    /// these peers: this node stays ready.
    fn take_conflicts(&mut self, found: Vec<RouteConflict>) {
        let conflicts = self.desired.conflicts(found);
        for new in conflicts.iter().filter(|new| !self.conflicts.contains(new)) {
            tracing::error!(peer = new.peer, prefix = %new.prefix, "{}", new.problem);
        }
        if self.conflicts != conflicts {
            self.conflicts = conflicts;
            self.show();
        }
    }

    /// Adds and removes unreachable routes until they match `self.desired`; returns the errors.
    async fn ensure_unreachable_routes(&mut self) -> Vec<String> {
        let before = std::mem::replace(&mut self.unreachable, self.desired.unreachable.clone());
        let (wanted, alias) = (&self.unreachable, self.config.alias());
        let outcome = self.netlink.ensure_unreachable_routes(wanted, &before, &alias).await;
        log_changes(&outcome);
        outcome.errors
    }

    async fn device(&mut self, wanted: &Wanted, links: &[Link]) -> Result<(), InterfaceError> {
        let present = wanted.ensure_device(&self.netlink, links).await?;
        if present.index != self.interface.index {
            tracing::warn!(interface = wanted.name, "the interface was deleted and is made again");
            let created = self.interface.created || present.created;
            self.interface = Present { created, ..present };
            self.monitor.set_index(present.index);
            self.publish();
            self.show();
        }
        Ok(())
    }

    /// Puts what the status shows in its place.
    fn show(&mut self) {
        let rules = firewall_rules(&self.config, &self.desired, &self.networks, &self.source_ports);
        self.firewall.set_rules(rules);
        if let Some(pods) = &self.pods {
            pods.set_network(self.desired.network(&self.config));
        }
        self.published.node.set_registry(self.registry.status());
        let wanted = self.desired.interface(&self.config, &self.narrow);
        self.published.node.set_interface(InterfaceStatus {
            name: wanted.name,
            index: self.interface.index,
            mtu: self.desired.mtu,
            mtu_problem: self.desired.mtu_problem.clone(),
            addresses: wanted.addresses,
            routes: wanted.routes,
            local_cidrs: self.desired.local_cidrs.clone(),
            conflicts: self.conflicts.clone(),
        });
    }

    async fn end(self) -> Result<(), Failure> {
        let keep = self.config.dataplane.keep_on_exit;
        tracing::info!(keep_dataplane = keep, "ending");
        self.supervisor.end(if keep { End::Keep } else { End::Stop }).await;
        Ok(())
    }

    /// Takes back what this start has made.
    async fn undo(self, failure: Failure) -> Failure {
        self.supervisor.end(End::StopOwn).await;
        if self.interface.created
            && let Err(error) = self.netlink.delete_link(self.interface.index).await
        {
            tracing::error!(%error, "the interface stays behind: remove it with skein-agent cleanup");
        }
        // A node that was part of the network before may still have pods. Their traffic stays
        // refused.
        if self.registry.is_first_start() {
            let (before, alias) = (&self.unreachable, self.config.alias());
            let none = BTreeSet::new();
            let outcome = self.netlink.ensure_unreachable_routes(&none, before, &alias).await;
            for error in outcome.errors {
                tracing::error!("{error}: remove the route with skein-agent cleanup");
            }
            self.firewall.set_rules(Rules::none(&self.config.cni.table));
            if let Err(error) = self.firewall.settled().await {
                tracing::error!(
                    error,
                    "nftables table not removed: remove it with skein-agent cleanup"
                );
            }
        }
        failure
    }
}

/// Logs endpoints that have become unusable, each once.
fn log_unresolved(before: &[String], now: &[String]) {
    for complaint in now.iter().filter(|complaint| !before.contains(complaint)) {
        tracing::error!("{complaint}");
    }
}

/// Logs that the MTU is too small, once for each problem.
fn log_mtu_problem(before: Option<&Desired>, now: &Desired) {
    let problem = now.mtu_problem.as_ref();
    let known = before.and_then(|before| before.mtu_problem.as_ref());
    if let Some(problem) = problem.filter(|_| problem != known) {
        tracing::error!("{problem}");
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The first few of many.
fn abridged(changes: &[String]) -> String {
    const SHOWN: usize = 20;
    let more = match changes.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    changes[..changes.len().min(SHOWN)].join("; ") + &more
}

/// Larger than any that an earlier control process has used, so that reports tell them apart.
fn first_revision() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(1)
}

fn netlink_failure(error: NetlinkError) -> Failure {
    match error.source.kind() {
        std::io::ErrorKind::PermissionDenied => {
            Failure::Privilege(format!("{error}: run as root or grant CAP_NET_ADMIN"))
        }
        _ => Failure::Runtime(error.into()),
    }
}

pub(crate) fn interface_failure(error: InterfaceError) -> Failure {
    match error {
        InterfaceError::Foreign { .. } | InterfaceError::OtherNode { .. } => {
            Failure::Taken(error.to_string())
        }
        InterfaceError::Netlink(error) => netlink_failure(error),
        InterfaceError::Tun(error) => match error {
            TunError::NotFound | TunError::NoDevice { .. } => Failure::Missing(error.to_string()),
            TunError::Permission { .. } => Failure::Privilege(error.to_string()),
            TunError::Exists { .. } | TunError::Busy { .. } | TunError::NotATun { .. } => {
                Failure::Taken(error.to_string())
            }
            TunError::Flags { .. } => Failure::Taken(error.to_string()),
            TunError::Name { .. } => Failure::Usage(error.to_string()),
            TunError::Io { .. } => Failure::Runtime(error.into()),
        },
    }
}
