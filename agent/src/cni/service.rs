//! The verbs: leases and interfaces brought together.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use skein_cni::protocol::{Add, Answer, AttachmentId, Check, Command, Gc, Refusal, Request};
use skein_cni::types::ErrorCode;
use skein_cni::{protocol, spool};
use thiserror::Error;
use tokio::sync::watch;

use super::attach::{AttachError, Attacher, Kernel, host_name};
use super::ipam::{IpamError, Lease, Netns, Request as Wanted};
use super::leases::Leases;
use super::locks::Locks;
use super::metrics::{Requests, verb};
use super::server::{Handler, refusal};
use crate::lifecycle::Readiness;
use crate::netlink::{Netlink, NetlinkError};
use crate::sys::netns::NamespaceId;

/// An attachment is not as it was made (CNI leaves 100 and above to plugins).
const BROKEN: u32 = 100;

/// What pods need to know of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// MTU of pods in bytes.
    pub mtu: u16,
    /// Prefixes of this node.
    pub local: Vec<IpNet>,
    /// Addresses of the node out of these, which no pod gets.
    pub reserved: Vec<IpAddr>,
    /// The cluster's prefixes, or where those are not known those of all other nodes.
    pub others: Vec<IpNet>,
}

/// Why a request was not done.
#[derive(Debug, Error)]
enum Error {
    #[error(transparent)]
    Ipam(#[from] IpamError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("{0}")]
    Namespace(String),
    #[error("it is the node's own network namespace")]
    OwnNamespace,
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Broken(String),
    #[error("the agent has not looked at this node's pods and firewall yet: {0}")]
    NotPrepared(String),
    #[error("a deletion that waited cannot be forgotten: {0}")]
    Spool(String),
}

impl From<NetlinkError> for Error {
    fn from(error: NetlinkError) -> Self {
        Self::Attach(error.into())
    }
}

impl Error {
    /// The code of the CNI specification.
    fn code(&self) -> u32 {
        match self {
            Error::Ipam(error) => error.code() as u32,
            Error::Invalid(_) => ErrorCode::InvalidNetworkConfig as u32,
            Error::Attach(AttachError::Exists(_) | AttachError::DefaultRoute) => {
                ErrorCode::InvalidEnvironment as u32
            }
            Error::Attach(_) | Error::NotPrepared(_) => ErrorCode::TryAgainLater as u32,
            Error::Spool(_) => ErrorCode::Io as u32,
            Error::Namespace(_) => ErrorCode::UnknownContainer as u32,
            Error::OwnNamespace => ErrorCode::InvalidNetns as u32,
            Error::Broken(_) => BROKEN,
        }
    }
}

/// What serves the plugin.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) leases: Leases,
    pub(super) attacher: Attacher,
    pub(super) netlink: Netlink,
    pub(super) network: watch::Receiver<Network>,
    pub(super) readiness: Readiness,
    pub(super) requests: Requests,
    pub(super) spool: PathBuf,
    /// Whether leases and kernel were brought together and the firewall was in place once: before, an
    /// address could be given out twice, or a pod be without its source check.
    pub(super) prepared: AtomicBool,
    /// Attachments whose interfaces are gone while their leases could not be written.
    unreleased: Mutex<BTreeSet<AttachmentId>>,
    boot: String,
    own: NamespaceId,
    locks: Locks,
}

impl Service {
    pub(super) fn new(
        leases: Leases,
        node: &str,
        netlink: Netlink,
        network: watch::Receiver<Network>,
        readiness: Readiness,
        spool: PathBuf,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            leases,
            attacher: Attacher::new(node),
            netlink,
            network,
            readiness,
            requests: Requests::new()?,
            spool,
            prepared: AtomicBool::new(false),
            unreleased: Mutex::default(),
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            own: NamespaceId::own()?,
            locks: Locks::default(),
        })
    }

    async fn add(&self, add: Add, netns: Option<OwnedFd>) -> Result<protocol::Attached, Error> {
        let netns = netns.ok_or_else(|| {
            Error::Namespace("no descriptor of the network namespace came along".to_owned())
        })?;
        let namespace = self.identify(&netns)?;
        if !self.attacher.can_mark(&add.id) {
            return Err(Error::Invalid("the container's ID is too long".to_owned()));
        }
        if !self.prepared.load(Ordering::Acquire) {
            return Err(Error::NotPrepared(self.readiness.reasons().join("; ")));
        }
        let _turn = self.locks.lock(&add.id).await;
        // A name may come again (ctr, nerdctl): its old deletion must not find the new pod.
        let waiting = spool::path(&self.spool, &add.id);
        let unreleased = self.unreleased().contains(&add.id);
        if unreleased || waiting.exists() {
            self.detach(&add.id).await?;
            spool::remove(&waiting).map_err(|error| Error::Spool(error.to_string()))?;
        }
        let visible = NamespaceId::at(&add.netns).is_ok_and(|seen| seen == namespace);
        let wanted = Wanted {
            id: add.id.clone(),
            network: add.network,
            netns: Netns {
                path: add.netns,
                dev: namespace.device,
                inode: namespace.inode,
                path_visible: visible,
                boot_id: self.boot.clone(),
            },
            pod: add.pod,
            ips: add.ips,
        };
        let (netns_record, network) = (wanted.netns.clone(), wanted.network.clone());
        let known = self.leases.get(add.id.clone()).await?;
        let lease = match self.leases.allocate(wanted.clone()).await {
            Err(IpamError::OtherNamespace(old)) => {
                tracing::info!(container = old.id.container_id, "attached anew elsewhere");
                self.detach(&old.id).await?;
                self.leases.allocate(wanted).await?
            }
            lease => lease?,
        };
        let mtu = u32::from(self.network.borrow().mtu);
        let (netlink, ips) = (&self.netlink, Vec::from_iter(lease.ips()));
        let attached = self.attacher.attach(netlink, netns.as_fd(), &add.id, &ips, mtu).await;
        match attached {
            Ok(attached) => {
                if lease.netns.is_none() {
                    // Adopted from the kernel: from now on it is known whose it is.
                    let lease = Lease { netns: Some(netns_record), network, ..lease };
                    self.leases.adopt(lease).await?;
                }
                Ok(attached)
            }
            // It was attached before, and may be at work: its DEL is the runtime's decision.
            Err(error) if known.is_some_and(|known| known == lease) => Err(error.into()),
            // Nothing was made; what is there is somebody's, and perhaps at work.
            Err(error @ (AttachError::Exists(_) | AttachError::DefaultRoute)) => {
                self.leases.release(add.id.clone()).await?;
                Err(error.into())
            }
            Err(error) => {
                // Whatever was made goes; the address with it, if that worked.
                if let Err(further) = self.detach(&add.id).await {
                    tracing::error!(%further, "a failed attachment is not undone");
                }
                Err(error.into())
            }
        }
    }

    /// Takes the interface away, then gives the addresses back.
    async fn detach(&self, id: &AttachmentId) -> Result<(), Error> {
        match self.attacher.detach(&self.netlink, id).await {
            // Somebody else's interface is no reason to keep the address.
            Ok(()) | Err(AttachError::Foreign { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.leases.release(id.clone()).await?;
        self.unreleased().remove(id);
        Ok(())
    }

    fn unreleased(&self) -> MutexGuard<'_, BTreeSet<AttachmentId>> {
        // Nothing under the lock can panic half way.
        self.unreleased.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Command::Del`].
    pub(super) async fn del(&self, id: &AttachmentId) -> Result<(), Refusal> {
        let _turn = self.locks.lock(id).await;
        match self.detach(id).await {
            // A full disk must not keep a pod from going: its interface is gone, the rest is done later.
            Err(Error::Ipam(error @ IpamError::Store(_))) => {
                let container = &id.container_id;
                tracing::error!(container, %error, "detached; its address is freed when that is possible");
                self.unreleased().insert(id.clone());
                Ok(())
            }
            outcome => outcome.map_err(|error| refuse(&error)),
        }
    }

    /// Frees what [`Service::del`] could not.
    async fn release_the_rest(&self) -> Result<(), Error> {
        let waiting = self.unreleased().clone();
        for id in waiting {
            let _turn = self.locks.lock(&id).await;
            if self.unreleased().contains(&id) {
                self.detach(&id).await?;
            }
        }
        Ok(())
    }

    async fn check(&self, check: Check, netns: Option<OwnedFd>) -> Result<(), Error> {
        let netns = netns.ok_or_else(|| {
            Error::Namespace("no descriptor of the network namespace came along".to_owned())
        })?;
        let namespace = self.identify(&netns)?;
        let _turn = self.locks.lock(&check.id).await;
        let lease = self.leases.get(check.id.clone()).await?;
        let Some(lease) = lease else {
            return Err(Error::Broken(format!(
                "no address is reserved for {} of {}",
                check.id.ifname, check.id.container_id
            )));
        };
        let mut problems = Vec::new();
        let ips = Vec::from_iter(lease.ips());
        if lease.netns.as_ref().is_some_and(|known| identity(known) != namespace) {
            problems.push("it was attached in another network namespace".to_owned());
        }
        let stray = check.ips.iter().filter(|net| !ips.contains(&net.addr()));
        problems.extend(stray.map(|net| format!("{} is not reserved for it", net.addr())));
        let (netlink, fd) = (&self.netlink, netns.as_fd());
        problems.extend(self.attacher.check(netlink, fd, &check.id, &ips).await?);
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Broken(problems.join("; "))),
        }
    }

    async fn gc(&self, gc: Gc) -> Result<(), Error> {
        let mut failed = None;
        let kernel = self.attacher.look(&self.netlink).await?;
        for lease in self.leases.list().await? {
            // What was adopted belongs to a network that nobody remembers.
            let ours = lease.network.is_empty() || lease.network == gc.network;
            if ours && !gc.valid.contains(&lease.id) {
                // One that fails keeps no other.
                failed = self.collect(&kernel, &lease).await.err().or(failed);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether an ADD could be served now, as STATUS says it.
    async fn status(&self) -> Result<(), Refusal> {
        let refuse = |code: ErrorCode, msg: String| {
            Err(Refusal { code: code as u32, msg, details: String::new() })
        };
        let reasons = self.readiness.reasons();
        if !reasons.is_empty() {
            return refuse(ErrorCode::NotAvailableLimited, reasons.join("; "));
        }
        let usage = match self.leases.usage().await {
            Ok(usage) => usage,
            Err(error) => return refuse(ErrorCode::NotAvailable, error.to_string()),
        };
        if !usage.can_allocate() {
            let full = usage.pools.iter().filter(|pool| u128::from(pool.in_use) >= pool.total);
            let names: Vec<String> = full.map(|pool| pool.cidr.to_string()).collect();
            let msg = match names.is_empty() {
                true => IpamError::NoPools.to_string(),
                false => format!("no free address in {}", names.join(", ")),
            };
            return refuse(ErrorCode::NotAvailable, msg);
        }
        Ok(())
    }

    /// Releases a lease if its namespace is provably gone; says whether.
    async fn collect(&self, kernel: &Kernel, lease: &Lease) -> Result<bool, Error> {
        if self.attacher.is_there(kernel, &lease.id) || !self.is_gone(lease) {
            return Ok(false);
        }
        let _turn = self.locks.lock(&lease.id).await;
        // It may have changed while we waited.
        if self.leases.get(lease.id.clone()).await?.as_ref() != Some(lease) {
            return Ok(false);
        }
        // So may the kernel: an ADD that was at work when it was looked at.
        if self.netlink.link(&host_name(&lease.id)).await?.is_some() {
            return Ok(false);
        }
        self.detach(&lease.id).await?;
        let (container, addresses) = (&lease.id.container_id, Vec::from_iter(lease.ips()));
        tracing::info!(container, ?addresses, "its namespace is gone: released");
        Ok(true)
    }

    /// Whether a namespace is provably gone: of another boot, or not where it was seen.
    fn is_gone(&self, lease: &Lease) -> bool {
        // Learnt from an interface of the kernel's; that is gone, so that no pod can use the address.
        let Some(netns) = &lease.netns else { return true };
        if netns.boot_id != self.boot {
            return true;
        }
        if !netns.path_visible {
            return false;
        }
        match NamespaceId::at(&netns.path) {
            Ok(now) => identity(netns) != now,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Brings leases and kernel together: adopts attachments without a lease, releases the leases of
    /// namespaces that are gone, puts back what somebody took. What is wrong with one pod is returned,
    /// and keeps nothing else from being done.
    pub(super) async fn tend(&self) -> Result<Vec<String>, String> {
        let kernel = self.attacher.look(&self.netlink).await.map_err(|e| e.to_string())?;
        let leases = self.leases.list().await.map_err(|error| error.to_string())?;
        let mut errors = Vec::new();
        for pod in &self.attacher.found(&kernel) {
            if pod.addresses.is_empty() || leases.iter().any(|lease| lease.id == pod.id) {
                continue;
            }
            if let Err(error) = self.adopt(pod.id.clone(), pod.addresses.clone()).await {
                errors.push(error.to_string());
            }
        }
        for lease in &leases {
            let result = match self.collect(&kernel, lease).await {
                Ok(false) => self.heal(&kernel, lease).await,
                other => other.map(drop),
            };
            errors.extend(result.err().map(|error| error.to_string()));
        }
        self.release_the_rest().await.map_err(|error| error.to_string())?;
        Ok(errors)
    }

    async fn adopt(&self, id: AttachmentId, addresses: Vec<IpAddr>) -> Result<(), Error> {
        let _turn = self.locks.lock(&id).await;
        // A DEL may have taken both since the kernel was looked at.
        let gone = self.netlink.link(&host_name(&id)).await?.is_none();
        if gone || self.leases.get(id.clone()).await?.is_some() {
            return Ok(());
        }
        tracing::warn!(container = id.container_id, ?addresses, "found in the kernel: adopted");
        let mut lease = Lease {
            id,
            network: String::new(),
            v4: None,
            v6: None,
            netns: None,
            pod: None,
            time: SystemTime::now(),
        };
        for address in addresses {
            match address {
                IpAddr::V4(v4) => lease.v4 = Some(v4),
                IpAddr::V6(v6) => lease.v6 = Some(v6),
            }
        }
        self.leases.adopt(lease).await?;
        Ok(())
    }

    async fn heal(&self, kernel: &Kernel, lease: &Lease) -> Result<(), Error> {
        let _turn = self.locks.lock(&lease.id).await;
        if self.leases.get(lease.id.clone()).await?.as_ref() != Some(lease) {
            return Ok(());
        }
        let ips = Vec::from_iter(lease.ips());
        let changes = self.attacher.heal(&self.netlink, kernel, &lease.id, &ips).await?;
        if !changes.is_empty() {
            let container = &lease.id.container_id;
            tracing::warn!(container, "put back: {}", changes.join("; "));
        }
        Ok(())
    }

    /// Does what the plugin could not say while the agent was away. What is wrong with one entry is
    /// returned.
    pub(super) async fn empty_spool(&self) -> Result<Vec<String>, String> {
        let listing = spool::list(&self.spool).map_err(|error| error.to_string())?;
        let mut errors = Vec::new();
        for entry in listing {
            let shown = entry.path.display();
            let done = match &entry.request {
                Ok(Request { command: Command::Del(del), .. }) => {
                    self.waited(&del.id, &entry.path).await.map_err(|error| error.to_string())
                }
                // It may be readable next time.
                Err(error @ spool::EntryError::Io(_)) => Err(format!("{shown}: {error}")),
                // Nothing that could be done; whoever wonders finds it in the log.
                Ok(_) => self.forget(&entry.path, "no deletion"),
                Err(error) => self.forget(&entry.path, &error.to_string()),
            };
            errors.extend(done.err());
        }
        Ok(errors)
    }

    /// A deletion that has waited; its entry stays until all of it is done.
    async fn waited(&self, id: &AttachmentId, entry: &Path) -> Result<(), Error> {
        let _turn = self.locks.lock(id).await;
        // An ADD of the same name may have done it meanwhile, and what is there now is new.
        if !entry.exists() {
            return Ok(());
        }
        self.detach(id).await?;
        tracing::info!(container = id.container_id, "a deletion that had waited");
        spool::remove(entry).map_err(|error| Error::Spool(error.to_string()))
    }

    fn forget(&self, entry: &Path, why: &str) -> Result<(), String> {
        let removed =
            spool::remove(entry).map_or_else(|e| format!(", and stays: {e}"), |()| String::new());
        Err(format!("{}: {why}{removed}", entry.display()))
    }

    /// Which namespace it is; an error where it is none, or the node's own.
    fn identify(&self, netns: &OwnedFd) -> Result<NamespaceId, Error> {
        let namespace = NamespaceId::of(netns)
            .map_err(|error| Error::Namespace(format!("the network namespace: {error}")))?;
        if namespace == self.own {
            return Err(Error::OwnNamespace);
        }
        Ok(namespace)
    }

    async fn dispatch(&self, command: Command, netns: Option<OwnedFd>) -> Answer {
        let done = |result: Result<(), Refusal>| match result {
            Ok(()) => Answer::Done,
            Err(refusal) => Answer::Refused(refusal),
        };
        if let Some(answer) = bad_id(&command) {
            return answer;
        }
        match command {
            Command::Add(add) => match self.add(add, netns).await {
                Ok(attached) => Answer::Attached(attached),
                Err(error) => Answer::Refused(refuse(&error)),
            },
            Command::Del(del) => done(self.del(&del.id).await),
            Command::Check(check) => {
                done(self.check(check, netns).await.map_err(|error| refuse(&error)))
            }
            Command::Gc(gc) => done(self.gc(gc).await.map_err(|error| refuse(&error))),
            Command::Status => done(self.status().await),
        }
    }
}

impl Handler for Service {
    async fn answer(&self, request: Request, netns: Option<OwnedFd>) -> Answer {
        let (verb, began) = (verb(&request.command), Instant::now());
        let answer = self.dispatch(request.command, netns).await;
        let took: Duration = began.elapsed();
        if let Answer::Refused(refusal) = &answer {
            tracing::warn!(verb, code = refusal.code, "refused: {}", refusal.msg);
        }
        self.requests.count(verb, &answer, took);
        answer
    }
}

fn identity(netns: &Netns) -> NamespaceId {
    NamespaceId { device: netns.dev, inode: netns.inode }
}

fn refuse(error: &Error) -> Refusal {
    Refusal { code: error.code(), msg: error.to_string(), details: String::new() }
}

/// The plugin checks them; but what becomes a key and an alias is checked where it does.
fn bad_id(command: &Command) -> Option<Answer> {
    let id = match command {
        Command::Add(Add { id, .. }) | Command::Check(Check { id, .. }) => id,
        Command::Del(del) => &del.id,
        Command::Gc(_) | Command::Status => return None,
    };
    let plain = |text: &str| {
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        !text.is_empty() && !text.contains(bad)
    };
    let good = plain(&id.container_id) && plain(&id.ifname) && id.ifname.len() <= 15;
    let code = ErrorCode::InvalidEnvironment as u32;
    (!good).then(|| refusal(code, "CNI_CONTAINERID or CNI_IFNAME is not valid"))
}
