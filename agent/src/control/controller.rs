//! The controller: keeps interface, routes, firewall and data process in the desired state.

mod reconcile;
mod rotate;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use skein_ipc::{ReducedPath, Snapshot};
use skein_netlink::Netlink;
use skein_netlink::firewall::{self, Firewall, Rules};
use skein_netlink::interface::Present;
use skein_netlink::monitor::Monitor;
use skein_netlink::nftables;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::border::{firewall_rules, networks};
use super::changes;
use super::desired::Desired;
use super::failures::{interface_failure, netlink_failure};
use super::logs::{abridged, log_changes, log_mtu_problem, log_unresolved};
use super::registry::Registry;
use super::rotation::{Rotation, RotationRequest};
use super::source::RecordChanges;
use super::supervisor::{self, Handle, ShutdownMode, Supervision};
use super::underlay::UnderlayWatch;
use super::view::Publication;
use crate::cni::{Pods, Protection};
use crate::config::Config;
use crate::failure::Failure;
use crate::lifecycle::{NotReady, SignalEvent, Signals};
use crate::policy::{self, PolicyService};
use crate::status::PeerConflict;

/// Interval of the reconciliation. It does not depend on notifications, because the kernel drops
/// notifications under load.
const RESYNC_INTERVAL: Duration = Duration::from_secs(10);
/// Minimum interval between two reactions to changed path MTUs. A peer chooses the MTU that it
/// announces; without the interval, frequent changes of one peer would keep this node busy.
const MIN_PATH_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum wait for the data process to apply a snapshot before routes to new peers are added.
const APPLY_TIMEOUT: Duration = Duration::from_millis(200);
/// Delay after a notification of the kernel, so that one reconciliation covers several
/// notifications.
const COALESCE_DELAY: Duration = Duration::from_millis(20);

/// Reconciler of the node's network state: interface, routes, firewall, pods and data process.
///
/// Order of calls: [`Controller::start`] adds the unreachable routes, installs the firewall,
/// creates the interface and starts the supervisor; [`Controller::run`] follows events until a
/// signal ends it. Addresses and routes are configured only after the data process has applied the
/// first snapshot (`started`); the CNI service starts after that. If the start fails, `run` removes
/// what this start has created. A later error makes the agent unready and is retried every
/// [`RESYNC_INTERVAL`].
///
/// Each change of the node records passes to the data process first, then to the routes, because a
/// route to an unknown peer would lose packets.
pub(super) struct Controller {
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
    /// Service of network policies; `None` if `policy.mode` is off.
    policy: Option<PolicyService>,
    _changes: JoinSet<()>,
    /// Service of the pods; `None` before its start, or if `cni.enabled` is off.
    pods: Option<Pods>,
    /// Blocks readiness until the pods are served.
    no_pods: Option<NotReady>,
    /// True after the data process has applied the first snapshot.
    started: bool,
    not_ready: Option<NotReady>,
    /// Paths to peers whose MTU is less than that of the overlay.
    reduced_paths: Vec<ReducedPath>,
    /// Ports of the data process's UDP sockets.
    source_ports: Vec<u16>,
    /// Earliest time of the next reaction to changes of `reduced_paths`.
    reduced_paths_due: Instant,
    /// Problems of the last reconciliation, which are logged once.
    logged_problems: Vec<String>,
    /// Prefixes of peers to which another program has a route.
    conflicts: Vec<PeerConflict>,
}

/// Receiver of the outcome of the first snapshot.
pub(super) type FirstOutcome = oneshot::Receiver<Result<(), Failure>>;

impl Controller {
    /// Prepares the node's network state and starts the supervisor.
    ///
    /// # Errors
    /// [`Failure::Usage`] if the configured addresses are not in the pod CIDRs; otherwise a failure
    /// of the kernel's interfaces.
    pub(super) async fn start(
        config: Config,
        rotation: Rotation,
        mut registry: Registry,
        published: Publication,
    ) -> Result<(Self, FirstOutcome), Failure> {
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
        // The firewall starts before the interface exists, so that no packet of a pod passes before
        // the rules are installed.
        let notifications = nftables::Monitor::start();
        if let Err(error) = &notifications {
            tracing::warn!(%error, "no nftables notifications: changes are noticed within 10 s");
        }
        let rules = firewall_rules(&config, &desired, &networks, &[]);
        let firewall = Firewall::start(rules, notifications.as_ref().ok()).await;
        published.firewall.send_replace(Some(firewall.clone()));
        if let Some(table) = registry.former_table() {
            match firewall::remove(table).await {
                Ok(_) => tracing::info!(table, "nftables table of the earlier name removed"),
                Err(error) => tracing::error!(table, %error, "nftables table not removed"),
            }
        }
        let policy =
            policy::start(&config, &published.readiness, notifications.as_ref().ok()).await?;
        published.policy.send_replace(policy.clone());
        let wanted = desired.interface(&config, &[]);
        let interface = wanted.ensure_device(&netlink, &links).await.map_err(interface_failure)?;
        monitor.set_index(interface.index);
        let snapshot =
            desired.snapshot(&config, rotation.keys(), interface.index, first_revision());
        let (snapshots, receiver) = tokio::sync::watch::channel(Arc::new(snapshot));
        let settings = supervisor::Settings::new(&config);
        let Supervision { handle: supervisor, first } = supervisor::start(
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
            policy,
            _changes: changes,
            pods: None,
            no_pods,
            started: false,
            not_ready,
            reduced_paths: Vec::new(),
            source_ports: Vec::new(),
            reduced_paths_due: Instant::now(),
            logged_problems: Vec::new(),
            conflicts: Vec::new(),
        };
        controller.propagate();
        Ok((controller, first))
    }

    /// Follows events until a signal ends the agent.
    ///
    /// # Errors
    /// [`Failure`] if the data process refuses the first snapshot or does not start, or if the CNI
    /// service cannot start.
    pub(super) async fn run(
        mut self,
        mut first: FirstOutcome,
        mut source: RecordChanges,
        mut asked: mpsc::Receiver<RotationRequest>,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        let mut resync = tokio::time::interval(RESYNC_INTERVAL);
        resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let dataplane = self.published.dataplane.clone();
        loop {
            tokio::select! {
                event = signals.next() => match event {
                    SignalEvent::End => return self.shut_down().await,
                    SignalEvent::Reload => self.reload().await,
                },
                result = &mut first, if !self.started => {
                    match result.unwrap_or_else(|_| Err(anyhow::anyhow!("the supervisor has ended").into())) {
                        Ok(()) => {
                            self.started = true;
                            self.registry.write_store();
                            self.reconcile().await;
                            if let Err(failure) = self.serve_pods().await {
                                return Err(self.roll_back(failure).await);
                            }
                        }
                        Err(failure) => return Err(self.roll_back(failure).await),
                    }
                }
                () = source.due() => {
                    self.reload().await;
                    self.step_rotation().await;
                }
                Some(asked) = asked.recv() => self.begin_rotation(asked).await,
                () = until(self.rotation.deadline()) => self.step_rotation().await,
                narrow = dataplane.changed_paths(&self.reduced_paths, self.reduced_paths_due) => {
                    let paths = self.desired.changed_paths(&self.reduced_paths, &narrow);
                    tracing::info!("path MTUs changed: {}", abridged(&paths));
                    self.reduced_paths = narrow;
                    self.reduced_paths_due = Instant::now() + MIN_PATH_INTERVAL;
                    self.reconcile().await;
                }
                ports = dataplane.source_ports(&self.source_ports) => {
                    self.source_ports = ports;
                    self.propagate();
                }
                () = self.monitor.changed() => {
                    // Missing unreachable routes are added at once, because pods' packets may leave
                    // in clear meanwhile. The reconciliation below retries and reports failures.
                    self.ensure_unreachable_routes().await;
                    tokio::time::sleep(COALESCE_DELAY).await;
                    self.reconcile().await;
                }
                () = self.monitor.underlay_changed(), if !self.underlay.is_due() => {
                    self.underlay.changed();
                }
                () = until(self.underlay.deadline()) => self.check_underlay().await,
                _ = resync.tick() => {
                    self.resolve_endpoints().await;
                    self.reconcile().await;
                    self.step_rotation().await;
                }
            }
        }
    }

    /// Reads the node records, and applies them if they have changed.
    async fn reload(&mut self) {
        let changed = self.registry.reload();
        self.published.node.set_registry(self.registry.status());
        if !changed {
            return;
        }
        self.underlay.records_changed(&self.config, &self.registry);
        let desired = self.underlay.desired(&self.config, &self.registry);
        tracing::info!(peers = desired.peers.len(), "node records have changed");
        self.set_desired(desired).await;
    }

    /// Makes `desired` the desired state of this node and reconciles.
    async fn set_desired(&mut self, desired: Desired) {
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
        // The data process first: packets on a route to a peer that it does not know yet are lost.
        self.publish_snapshot_and_wait().await;
        self.reconcile().await;
        self.propagate();
    }

    /// Resolves the interfaces of link-local endpoints again, which may have been created or
    /// deleted.
    async fn resolve_endpoints(&mut self) {
        let before = self.desired.unresolved.clone();
        if self.started && self.desired.resolve_endpoints(&self.registry) {
            self.publish_snapshot_and_wait().await;
        }
        log_unresolved(&before, &self.desired.unresolved);
    }

    /// Reads the MTU of the underlay, and applies it if it has changed.
    async fn check_underlay(&mut self) {
        match self.underlay.check(&self.netlink, &self.config, &self.registry).await {
            Ok(true) => {
                let desired = self.underlay.desired(&self.config, &self.registry);
                if desired != self.desired {
                    self.set_desired(desired).await;
                }
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot read the MTU of the underlay"),
        }
    }

    /// Passes the desired state to the supervisor and waits until the data process has applied it,
    /// at most [`APPLY_TIMEOUT`].
    async fn publish_snapshot_and_wait(&self) {
        let revision = self.publish_snapshot();
        let reached = self.published.dataplane.wait_for_revision(revision);
        if tokio::time::timeout(APPLY_TIMEOUT, reached).await.is_err() {
            tracing::warn!(revision, "data process has not applied the change yet");
        }
    }

    /// Starts the CNI service if `cni.enabled` is on.
    async fn serve_pods(&mut self) -> Result<(), Failure> {
        if !self.config.cni.enabled {
            return Ok(());
        }
        let (network, readiness) =
            (self.desired.network(&self.config), self.published.readiness.clone());
        let protection =
            Protection { firewall: self.firewall.clone(), policy: self.policy.clone() };
        let (pods, view) = Pods::start(&self.config, network, protection, readiness).await?;
        self.published.pods.send_replace(Some(view));
        self.pods = Some(pods);
        self.no_pods = None;
        Ok(())
    }

    /// Passes the desired state to the supervisor; returns its revision.
    fn publish_snapshot(&self) -> u64 {
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

    async fn shut_down(self) -> Result<(), Failure> {
        let keep = self.config.dataplane.keep_on_exit;
        tracing::info!(keep_dataplane = keep, "agent stops");
        self.supervisor.end(if keep { ShutdownMode::Keep } else { ShutdownMode::Stop }).await;
        Ok(())
    }

    /// Removes what this start has created; returns `failure`.
    async fn roll_back(self, failure: Failure) -> Failure {
        self.supervisor.end(ShutdownMode::StopOwn).await;
        if self.interface.created
            && let Err(error) = self.netlink.delete_link(self.interface.index).await
        {
            tracing::error!(%error, "interface not removed. Remove it with skein-agent cleanup.");
        }
        // Only the first start removes the unreachable routes and the rules. Before a later start
        // the node may have got pods, whose traffic must stay blocked.
        if self.registry.is_first_start() {
            let (before, alias) = (&self.unreachable, self.config.alias());
            let none = BTreeSet::new();
            let outcome = self.netlink.ensure_unreachable_routes(&none, before, &alias).await;
            for error in outcome.errors {
                tracing::error!("{error}. Remove the route with skein-agent cleanup.");
            }
            self.firewall.set_rules(Rules::none(&self.config.cni.table));
            if let Err(error) = self.firewall.wait_until_applied().await {
                tracing::error!(
                    %error,
                    "nftables table not removed. Remove it with skein-agent cleanup."
                );
            }
        }
        failure
    }
}

/// Waits until `deadline`; forever if it is `None`.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Returns the first revision of this process, milliseconds since 1970: larger than the revisions
/// of earlier control processes, so that reports distinguish them.
fn first_revision() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(1)
}

/// Restores the `accept_ra` sysctls that an earlier version has changed. After a success, later
/// starts with the same state directory do nothing. An error is logged, and the next start retries.
async fn restore_accept_ra(netlink: &Netlink, config: &Config, registry: &mut Registry) {
    if registry.is_accept_ra_restored() || !config.interface.forwarding {
        return;
    }
    match netlink.restore_accept_ra().await {
        Ok(changed) => {
            if !changed.is_empty() {
                let names = abridged(&changed);
                tracing::info!(
                    names,
                    "accept_ra restored to 1. A kernel that forwards IPv6 then ignores router \
                     advertisements."
                );
            }
            registry.set_accept_ra_restored();
        }
        Err(error) => tracing::error!(%error, "accept_ra not restored"),
    }
}
