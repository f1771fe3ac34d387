//! Pods: what the agent does for the CNI plugin.
//!
//! [`Pods`] is what the control process sees: told of the node's network, it serves the plugin, tends
//! leases, interfaces and the firewall in a task of its own, and installs the plugin once the agent
//! can serve.

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
mod removal;
mod server;
mod service;
mod versions;
mod waiting;
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
pub use self::service::Network;
use self::service::Service;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::versions::fuzz_answer;
use crate::config::{Cni, Config};
use crate::failure::Failure;
use crate::lifecycle::{NotReady, Readiness};
use crate::listener::Listener;
use crate::status::Offer;

/// Leases, interfaces, the firewall and the spool are looked at this often.
const TEND: Duration = Duration::from_secs(10);
/// How long one look may take: a thousand pods take seconds.
const LIMIT: Duration = Duration::from_secs(120);
/// How often the agent looks whether it is ready, until it was once.
const READY: Duration = Duration::from_millis(100);

/// Pods are served until this is dropped.
#[derive(Debug)]
pub struct Pods {
    network: watch::Sender<Network>,
    _tasks: JoinSet<()>,
}

/// What metrics and status show of pods. Cheap to clone.
#[derive(Debug, Clone)]
pub struct View {
    service: Arc<Service>,
    offer: watch::Receiver<Offer>,
}

impl Pods {
    /// Opens the leases, listens, and begins.
    pub async fn start(
        config: &Config,
        network: Network,
        firewall: Firewall,
        readiness: Readiness,
    ) -> Result<(Self, View), Failure> {
        let cni = config.cni.clone();
        let path = config.state_dir.join(skein_ipam::FILE);
        let opened = tokio::task::spawn_blocking(move || Ipam::open(&path)).await;
        let opened = opened.context("opening the leases")?.map_err(anyhow::Error::from)?;
        if let Some(damaged) = opened.damaged {
            let (path, reason) = (damaged.path.display(), damaged.reason);
            tracing::error!(%path, reason, "the leases were damaged: put aside, and taken from the kernel");
        }
        let leases = Leases::spawn(opened.ipam).context("cannot start the leases' thread")?;
        let netlink = Netlink::connect().map_err(anyhow::Error::from)?;
        let (sender, receiver) = watch::channel(network);
        let spool = cni.spool.clone();
        let service = Service::new(
            leases,
            &config.name,
            netlink,
            receiver.clone(),
            readiness.clone(),
            firewall.clone(),
            spool,
        )?;
        let service = Arc::new(service);
        let listener = Listener::bind("cni.socket", &cni.socket, Some(readiness.clone()))?;
        let (offers, offer) = watch::channel(Offer::default());
        let mut keeper = Keeper {
            service: Arc::clone(&service),
            firewall,
            network: receiver,
            readiness,
            not_ready: None,
            complaints: Vec::new(),
            can_serve: false,
            install: Install::default(),
            offers,
            cni,
        };
        // Before anything is served: whoever asks for an address must not get one that is in use.
        keeper.take_network();
        keeper.tend().await;
        let view = View { service: Arc::clone(&service), offer };
        let mut tasks = JoinSet::new();
        tasks.spawn(server::serve(listener, service));
        tasks.spawn(keeper.run());
        Ok((Self { network: sender, _tasks: tasks }, view))
    }

    /// Tells of another network.
    pub fn set_network(&self, network: Network) {
        self.network.send_if_modified(|present| {
            let differs = *present != network;
            *present = network;
            differs
        });
    }
}

impl View {
    /// How full the pools are.
    pub async fn usage(&self) -> Usage {
        self.service.leases.usage().await.unwrap_or_default()
    }

    /// CNI versions of the network configuration.
    pub fn offer(&self) -> Offer {
        self.offer.borrow().clone()
    }

    /// Requests, for a scrape.
    pub fn requests(&self) -> Vec<MetricFamily> {
        self.service.requests.families()
    }
}

/// Keeps everything of pods as it should be.
struct Keeper {
    service: Arc<Service>,
    firewall: Firewall,
    network: watch::Receiver<Network>,
    readiness: Readiness,
    not_ready: Option<NotReady>,
    /// Logged already, so as not to be logged every ten seconds.
    complaints: Vec<String>,
    /// Whether the agent was ready once.
    can_serve: bool,
    install: Install,
    offers: watch::Sender<Offer>,
    cni: Cni,
}

impl Keeper {
    async fn run(mut self) {
        let mut tend = tokio::time::interval(TEND);
        tend.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ready = tokio::time::interval(READY);
        ready.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = self.network.changed() => match changed {
                    Ok(()) => {
                        self.take_network();
                        self.tend().await;
                    }
                    // The control process ends.
                    Err(_) => return,
                },
                _ = tend.tick() => self.tend().await,
                _ = ready.tick(), if !self.can_serve => {
                    if self.readiness.reasons().is_empty() {
                        self.can_serve = true;
                        self.tend().await;
                    }
                }
            }
        }
    }

    fn take_network(&mut self) {
        let network = self.network.borrow_and_update().clone();
        self.service.leases.set_pools(network.local, network.reserved);
    }

    async fn tend(&mut self) {
        let mut errors = Vec::new();
        if let Err(error) = self.firewall.settled().await {
            errors.push(format!("firewall: {error}"));
        }
        let mut single = Vec::new();
        // First what the kernel has: only then a deletion that waited finds its address.
        let work = async { [self.service.tend().await, self.service.empty_spool().await] };
        match tokio::time::timeout(LIMIT, work).await {
            Err(_) => errors.push(format!("leases and kernel were not compared within {LIMIT:?}")),
            Ok(outcomes) => outcomes.into_iter().for_each(|outcome| match outcome {
                Ok(problems) => single.extend(problems),
                Err(error) => errors.push(error),
            }),
        }
        if errors.is_empty() {
            self.service.prepared.store(true, Ordering::Release);
        }
        errors.extend(self.install().await.err());
        // One pod's trouble is no reason to refuse all others.
        self.not_ready = match errors.is_empty() {
            true => None,
            false => Some(self.readiness.block(format!("pods: {}", errors.join("; ")))),
        };
        errors.extend(single);
        for complaint in errors.iter().filter(|error| !self.complaints.contains(error)) {
            tracing::error!("pods: {complaint}");
        }
        self.complaints = errors;
    }

    /// The plugin, then the configuration: from now on the runtime starts pods. What somebody takes
    /// away comes back.
    async fn install(&mut self) -> Result<(), String> {
        let mut install = std::mem::take(&mut self.install);
        let (cni, can_serve) = (self.cni.clone(), self.can_serve);
        let work = tokio::task::spawn_blocking(move || {
            let result = install.run(&cni, can_serve);
            (install, result)
        });
        let (install, result) = work.await.map_err(|error| error.to_string())?;
        self.install = install;
        self.offers.send_replace(self.install.offer().clone());
        result
    }
}
