//! Service for the CNI plugin: attachment of pods, leases, and installation of the plugin.
//!
//! [`Pods`] is the interface to the control process. It serves the plugin's requests, reconciles
//! leases, interfaces and the firewall in a task of its own, and installs the plugin after the
//! agent was ready for the first time.

mod attach;
mod conflist;
mod error;
mod files;
mod install;
mod interface;
mod leases;
mod locks;
pub(crate) mod metrics;
mod others;
mod pending;
mod removal;
mod server;
mod service;
mod versions;
mod wire;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use prometheus::proto::MetricFamily;
use skein_ipam::{Ipam, Usage};
use skein_netlink::Netlink;
use skein_netlink::firewall::Firewall;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::conflist::fuzz_conflist;
use self::install::Install;
use self::leases::Leases;
pub use self::removal::{Removal, remove};
use self::service::Service;
pub use self::service::{PodNetworkConfig, Protection};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::versions::fuzz_answer;
use crate::config::{Cni, Config};
use crate::failure::Failure;
use crate::lifecycle::{NotReady, Readiness};
use crate::listener::Listener;
use crate::status::Offer;
use crate::watched_value::send_if_changed;

/// Interval of the reconciliation of leases, interfaces, firewall, spool and installed files.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(10);
/// Timeout of one reconciliation of leases, interfaces and spool; 1000 pods take seconds.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(120);
/// Interval of the readiness check until the agent is ready for the first time.
const READINESS_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Service of the node's pods, which ends when the value is dropped.
///
/// Order of calls: [`Pods::start`] after the data process has applied the first snapshot and the
/// interface is configured; then [`Pods::set_network`] after each change of the node's MTU or
/// prefixes.
#[derive(Debug)]
pub struct Pods {
    network: watch::Sender<PodNetworkConfig>,
    _tasks: JoinSet<()>,
}

/// View of the pods' leases, requests and CNI versions, for metrics and status. Cheap to clone.
#[derive(Debug, Clone)]
pub struct View {
    service: Arc<Service>,
    offer: watch::Receiver<Offer>,
}

impl Pods {
    /// Opens the leases, reconciles them with the kernel once, then serves the plugin.
    ///
    /// # Errors
    /// [`Failure`] if the leases cannot be opened, the socket of the plugin cannot be bound, or the
    /// kernel refuses a netlink socket. An error of the first reconciliation only makes the agent
    /// unready.
    pub async fn start(
        config: &Config,
        network: PodNetworkConfig,
        protection: Protection,
        readiness: Readiness,
    ) -> Result<(Self, View), Failure> {
        let cni = config.cni.clone();
        let path = config.state_dir.join(skein_ipam::FILE);
        let opened = tokio::task::spawn_blocking(move || Ipam::open(&path)).await;
        let opened = opened.context("cannot open the leases")?.map_err(anyhow::Error::from)?;
        if let Some(damaged) = opened.damaged {
            let (path, reason) = (damaged.path.display(), damaged.reason);
            tracing::error!(%path, reason, "leases damaged: file set aside, leases adopted from the kernel");
        }
        let leases = Leases::spawn(opened.ipam).context("cannot start the thread of the leases")?;
        let netlink = Netlink::connect().map_err(anyhow::Error::from)?;
        let (sender, receiver) = watch::channel(network);
        let spool = cni.spool.clone();
        let service = Service::new(
            leases,
            &config.name,
            netlink,
            receiver.clone(),
            readiness.clone(),
            protection.clone(),
            spool,
        )?;
        let service = Arc::new(service);
        let listener = Listener::bind("cni.socket", &cni.socket, Some(readiness.clone()))?;
        let (offers, offer) = watch::channel(Offer::default());
        let mut reconciler = Reconciler {
            service: Arc::clone(&service),
            firewall: protection.firewall,
            network: receiver,
            readiness,
            not_ready: None,
            logged_errors: Vec::new(),
            can_serve: false,
            install: Install::default(),
            offers,
            cni,
        };
        // The reconciliation precedes the first request, because a pod must not get an address that
        // is already in use.
        reconciler.update_pools();
        reconciler.reconcile().await;
        let view = View { service: Arc::clone(&service), offer };
        let mut tasks = JoinSet::new();
        tasks.spawn(server::serve(listener, service));
        tasks.spawn(reconciler.run());
        Ok((Self { network: sender, _tasks: tasks }, view))
    }

    /// Sets the node's network. The pools and the node's ends of existing pods follow; a changed
    /// MTU applies to new pods.
    pub fn set_network(&self, network: PodNetworkConfig) {
        send_if_changed(&self.network, network);
    }
}

impl View {
    /// Returns the usage of the address pools; empty if the leases' thread has ended.
    pub async fn usage(&self) -> Usage {
        self.service.leases.usage().await.unwrap_or_default()
    }

    /// Returns the CNI versions of the network configuration.
    pub fn offer(&self) -> Offer {
        self.offer.borrow().clone()
    }

    /// Returns the metrics of the plugin's requests, for a scrape.
    pub fn requests(&self) -> Vec<MetricFamily> {
        self.service.requests.families()
    }
}

/// Reconciler of leases, interfaces, firewall, spool and installed files.
///
/// The owner calls [`Reconciler::update_pools`] and [`Reconciler::reconcile`] once before the first
/// request of the plugin is served, then spawns [`Reconciler::run`], which repeats both until the
/// sender of the network is dropped. An error of one pod is logged and does not affect other pods;
/// any other error makes the agent unready until a reconciliation succeeds.
struct Reconciler {
    service: Arc<Service>,
    firewall: Firewall,
    network: watch::Receiver<PodNetworkConfig>,
    readiness: Readiness,
    not_ready: Option<NotReady>,
    /// Errors of the last reconciliation, which are logged once.
    logged_errors: Vec<String>,
    /// True once the agent has been ready for the first time. From then on the plugin may be
    /// installed. Requests of the plugin are served earlier, too.
    can_serve: bool,
    install: Install,
    offers: watch::Sender<Offer>,
    cni: Cni,
}

impl Reconciler {
    async fn run(mut self) {
        let mut reconcile = tokio::time::interval(RECONCILE_INTERVAL);
        reconcile.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ready = tokio::time::interval(READINESS_POLL_INTERVAL);
        ready.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = self.network.changed() => match changed {
                    Ok(()) => {
                        self.update_pools();
                        self.reconcile().await;
                    }
                    // The control process has dropped `Pods`.
                    Err(_) => return,
                },
                _ = reconcile.tick() => self.reconcile().await,
                _ = ready.tick(), if !self.can_serve => {
                    if self.readiness.reasons().is_empty() {
                        self.can_serve = true;
                        self.reconcile().await;
                    }
                }
            }
        }
    }

    fn update_pools(&mut self) {
        let network = self.network.borrow_and_update().clone();
        self.service.leases.set_pools(network.local, network.reserved);
    }

    async fn reconcile(&mut self) {
        let mut errors = Vec::new();
        if let Err(error) = self.firewall.wait_until_applied().await {
            errors.push(format!("firewall: {error}"));
        }
        let mut pod_errors = Vec::new();
        // Leases are adopted from the kernel first, because a spooled deletion needs the lease of
        // its pod.
        let work = async {
            let reconciled = self.service.reconcile().await.map_err(|error| error.to_string());
            let spooled = self.service.process_spool().await.map_err(|error| error.to_string());
            [reconciled, spooled]
        };
        match tokio::time::timeout(RECONCILE_TIMEOUT, work).await {
            Err(_) => {
                errors.push(format!(
                    "leases and interfaces not compared within {RECONCILE_TIMEOUT:?}"
                ));
            }
            Ok(outcomes) => outcomes.into_iter().for_each(|outcome| match outcome {
                Ok(problems) => pod_errors.extend(problems),
                Err(error) => errors.push(error),
            }),
        }
        errors.extend(self.service.report_attachments().await.err());
        if errors.is_empty() {
            self.service.prepared.store(true, Ordering::Release);
        }
        errors.extend(self.install().await.err().map(|error| error.to_string()));
        // An error of one pod must not make the node unready for all others.
        self.not_ready = match errors.is_empty() {
            true => None,
            false => Some(self.readiness.block(format!("pods: {}", errors.join("; ")))),
        };
        errors.extend(pod_errors);
        for error in errors.iter().filter(|error| !self.logged_errors.contains(error)) {
            tracing::error!("pods: {error}");
        }
        self.logged_errors = errors;
    }

    /// Installs the plugin, then the configuration, unless both are correct. The runtime starts
    /// pods as soon as the configuration exists.
    async fn install(&mut self) -> anyhow::Result<()> {
        let mut install = std::mem::take(&mut self.install);
        let (cni, can_serve) = (self.cni.clone(), self.can_serve);
        let work = tokio::task::spawn_blocking(move || {
            let result = install.run(&cni, can_serve);
            (install, result)
        });
        let (install, result) = work.await?;
        self.install = install;
        self.offers.send_replace(self.install.offer().clone());
        result
    }
}
