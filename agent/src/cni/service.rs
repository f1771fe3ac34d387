//! Processing of the plugin's commands, and reconciliation of leases with interfaces.

mod deletion;
mod policy;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use skein_cni_protocol::names::check_id;
use skein_cni_protocol::types::ErrorCode;
use skein_cni_protocol::{
    Add, Attached, AttachmentId, Check, CniError, Command, Gc, Request, Response,
};
use skein_ipam::{IpamError, Lease, Netns, Request as Wanted};
use skein_netlink::Netlink;
use skein_netlink::firewall::Firewall;
use skein_sys::netns::NamespaceId;
use tokio::sync::watch;

use super::attach::{AttachError, Attacher, KernelSnapshot, NodeSide};
use super::error::{Error, refuse};
use super::interface::host_name;
use super::leases::Leases;
use super::locks::Locks;
use super::metrics::{Outcome, Requests, verb};
use super::pending::PendingDeletions;
use super::server::{Handler, refusal};
use crate::lifecycle::Readiness;
use crate::policy::PolicyService;

/// Properties of the node that its pods depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNetworkConfig {
    /// MTU of pods in bytes.
    pub mtu: u16,
    /// Pod CIDRs of this node.
    pub local: Vec<IpNet>,
    /// Addresses of the node in its pod CIDRs, which no pod gets.
    pub reserved: Vec<IpAddr>,
    /// `cluster_cidrs`, or the pod CIDRs of all other nodes if none are configured.
    pub others: Vec<IpNet>,
}

/// Protections that pods need before their links exist.
#[derive(Debug, Clone)]
pub struct Protection {
    /// The firewall.
    pub firewall: Firewall,
    /// Service of network policies; `None` if the policies have no effect.
    pub policy: Option<PolicyService>,
}

/// Service of the plugin's commands.
///
/// [`Service::reconcile`] must have succeeded, and the firewall must be installed, before
/// `prepared` is set; until then every ADD is refused, because an address could be given out twice,
/// or a pod could run without its source check. DEL, CHECK, GC and STATUS are served at any time.
/// Commands of the same attachment run one after the other.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) leases: Leases,
    pub(super) attacher: Attacher,
    pub(super) netlink: Netlink,
    pub(super) network: watch::Receiver<PodNetworkConfig>,
    pub(super) readiness: Readiness,
    protection: Protection,
    /// True after the policy service has received all pods of this node.
    is_policy_informed: AtomicBool,
    pub(super) requests: Requests,
    pub(super) pending: PendingDeletions,
    /// True after the first successful reconciliation with an installed firewall.
    pub(super) prepared: AtomicBool,
    boot: String,
    own: NamespaceId,
    pub(super) locks: Locks,
}

impl Service {
    /// Returns the service of the node `node`, which refuses every ADD until `prepared` is set.
    ///
    /// # Errors
    /// An error if the boot ID or this process's network namespace cannot be read.
    pub(super) fn new(
        leases: Leases,
        node: &str,
        netlink: Netlink,
        network: watch::Receiver<PodNetworkConfig>,
        readiness: Readiness,
        protection: Protection,
        spool: PathBuf,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            leases,
            attacher: Attacher::new(node),
            netlink,
            network,
            readiness,
            protection,
            is_policy_informed: AtomicBool::new(false),
            requests: Requests::new()?,
            pending: PendingDeletions::new(spool),
            prepared: AtomicBool::new(false),
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            own: NamespaceId::own()?,
            locks: Locks::default(),
        })
    }

    async fn add(&self, add: Add, netns: Option<OwnedFd>) -> Result<Attached, Error> {
        let netns = netns.ok_or_else(|| {
            Error::Namespace("the request has no descriptor of a network namespace".to_owned())
        })?;
        let namespace = self.identify(&netns)?;
        if !self.attacher.alias_fits(&add.id) {
            return Err(Error::Invalid(
                "the container ID is too long for the alias of the interface (255 bytes)"
                    .to_owned(),
            ));
        }
        if !self.prepared.load(Ordering::Acquire) {
            return Err(Error::NotPrepared(self.readiness.reasons().join("; ")));
        }
        let _turn = self.locks.lock(&add.id).await;
        // Container names may be reused (ctr, nerdctl): a pending deletion must not remove the new
        // pod.
        if self.pending.contains(&add.id) {
            self.detach(&add.id).await?;
            self.pending.remove_spooled(&add.id)?;
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
                tracing::info!(
                    container = old.id.container_id,
                    "attachment moved to another namespace"
                );
                self.detach(&old.id).await?;
                self.leases.allocate(wanted).await?
            }
            lease => lease?,
        };
        let (mtu, addresses) = {
            let network = self.network.borrow();
            (u32::from(network.mtu), network.reserved.clone())
        };
        let node = NodeSide { mtu, addresses: &addresses };
        let (netlink, ips) = (&self.netlink, Vec::from_iter(lease.ips()));
        let attached = match self.enforce_policies(&lease).await {
            Ok(()) => {
                let attached = self.attacher.attach(netlink, netns.as_fd(), &add.id, &ips, &node);
                attached.await.map_err(Error::from)
            }
            Err(error) => Err(error),
        };
        match attached {
            Ok(attached) => {
                if lease.netns.is_none() {
                    // The lease was adopted from the kernel: store its namespace and network.
                    let lease = Lease { netns: Some(netns_record), network, ..lease };
                    self.leases.adopt(lease).await?;
                }
                Ok(attached)
            }
            // The attachment existed before and may be in use: only a DEL removes it.
            Err(error) if known.is_some_and(|known| known == lease) => Err(error),
            // Nothing was created: the existing interface may be in use by another program.
            Err(error @ Error::Attach(AttachError::Exists(_) | AttachError::DefaultRoute)) => {
                self.end_policies(&add.id).await;
                self.leases.release(add.id.clone()).await?;
                Err(error)
            }
            Err(error) => {
                // Removes what was created; the address is released only if that succeeds.
                if let Err(further) = self.detach(&add.id).await {
                    tracing::error!(error = %further, "cannot undo a failed attachment");
                }
                Err(error)
            }
        }
    }

    /// Deletes the interface of an attachment, then releases its addresses. The caller holds the
    /// lock of the attachment.
    ///
    /// # Errors
    /// [`Error`] if the kernel refuses, or if the lease cannot be released; the interface is
    /// deleted in the second case.
    pub(super) async fn detach(&self, id: &AttachmentId) -> Result<(), Error> {
        match self.attacher.detach(&self.netlink, id).await {
            // An interface of another owner does not use the address.
            Ok(()) | Err(AttachError::Foreign { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // The link is gone: no packet needs the entries any more.
        self.end_policies(id).await;
        self.leases.release(id.clone()).await?;
        self.pending.on_released(id);
        Ok(())
    }

    async fn check(&self, check: Check, netns: Option<OwnedFd>) -> Result<(), Error> {
        let netns = netns.ok_or_else(|| {
            Error::Namespace("the request has no descriptor of a network namespace".to_owned())
        })?;
        let namespace = self.identify(&netns)?;
        let _turn = self.locks.lock(&check.id).await;
        let lease = self.leases.get(check.id.clone()).await?;
        let Some(lease) = lease else {
            return Err(Error::Broken(format!(
                "interface {} of container {} has no lease",
                check.id.ifname, check.id.container_id
            )));
        };
        let mut problems = Vec::new();
        let ips = Vec::from_iter(lease.ips());
        if lease.netns.as_ref().is_some_and(|known| identity(known) != namespace) {
            problems.push("the lease names another network namespace".to_owned());
        }
        let stray = check.ips.iter().filter(|net| !ips.contains(&net.addr()));
        problems
            .extend(stray.map(|net| format!("the lease does not have the address {}", net.addr())));
        let (netlink, fd) = (&self.netlink, netns.as_fd());
        problems.extend(self.attacher.check(netlink, fd, &check.id, &ips).await?);
        let verified = self.protection.firewall.verify().await;
        problems.extend(verified.err().map(|error| error.to_string()));
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Broken(problems.join("; "))),
        }
    }

    async fn gc(&self, gc: Gc) -> Result<(), Error> {
        let mut failed = None;
        let kernel = self.attacher.read_kernel(&self.netlink).await?;
        for lease in self.leases.list().await? {
            // The network of an adopted lease is unknown (empty).
            let ours = lease.network.is_empty() || lease.network == gc.network;
            if ours && !gc.valid.contains(&lease.id) {
                // An error must not keep other leases from being released.
                failed = self.collect(&kernel, &lease, true).await.err().or(failed);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Returns an error if an ADD could not be served now (STATUS of the CNI specification).
    async fn status(&self) -> Result<(), CniError> {
        let refuse = |code: ErrorCode, msg: String| {
            Err(CniError { code: code as u32, msg, details: String::new() })
        };
        let reasons = self.readiness.reasons();
        if !reasons.is_empty() {
            return refuse(ErrorCode::NotAvailableLimited, reasons.join("; "));
        }
        // Usage comes from memory, so that only a write shows a full disk.
        if let Err(error) = self.leases.probe().await {
            return refuse(ErrorCode::NotAvailable, error.to_string());
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

    /// Releases a lease if no pod can use its addresses, and returns whether it did.
    ///
    /// The addresses of an attachment whose node's end exists stay: a veth pair goes with its
    /// namespace. Without that end, the namespace must be gone. A namespace whose path the agent
    /// never saw counts as gone if the runtime disowns the attachment (`disowned`).
    async fn collect(
        &self,
        kernel: &KernelSnapshot,
        lease: &Lease,
        disowned: bool,
    ) -> Result<bool, Error> {
        let invisible = lease.netns.as_ref().is_some_and(|netns| !netns.path_visible);
        let gone = self.is_gone(lease) || (disowned && invisible);
        if self.attacher.has_host_interface(kernel, &lease.id) || !gone {
            return Ok(false);
        }
        let _turn = self.locks.lock(&lease.id).await;
        // Another request may have changed the lease meanwhile.
        if self.leases.get(lease.id.clone()).await?.as_ref() != Some(lease) {
            return Ok(false);
        }
        // An ADD may have created the interface after the kernel was read.
        if self.netlink.link(&host_name(&lease.id)).await?.is_some() {
            return Ok(false);
        }
        self.detach(&lease.id).await?;
        let (container, addresses) = (&lease.id.container_id, Vec::from_iter(lease.ips()));
        tracing::info!(
            container,
            ?addresses,
            missing_in_gc = disowned,
            "addresses released, pod is gone"
        );
        Ok(true)
    }

    /// Returns whether the namespace of a lease is provably gone: it is of an earlier boot, or its
    /// path leads to another namespace or to none.
    fn is_gone(&self, lease: &Lease) -> bool {
        // The lease was adopted from an interface that is gone, so that no pod can use the address.
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

    /// Reconciles leases and kernel: adopts leases of attachments that have none, releases leases
    /// whose namespace is gone, and repairs the node's ends. Returns the errors of single pods,
    /// which do not affect other pods.
    ///
    /// # Errors
    /// [`Error`] if the kernel or the leases cannot be read; nothing is changed then.
    pub(super) async fn reconcile(&self) -> Result<Vec<String>, Error> {
        let kernel = self.attacher.read_kernel(&self.netlink).await?;
        let leases = self.leases.list().await?;
        let mut errors = Vec::new();
        for pod in &self.attacher.attachments(&kernel) {
            if pod.addresses.is_empty() || leases.iter().any(|lease| lease.id == pod.id) {
                continue;
            }
            if let Err(error) = self.adopt(pod.id.clone(), pod.addresses.clone()).await {
                errors.push(error.to_string());
            }
        }
        for lease in &leases {
            let result = match self.collect(&kernel, lease, false).await {
                Ok(false) => self.repair(&kernel, lease).await,
                other => other.map(drop),
            };
            errors.extend(result.err().map(|error| error.to_string()));
        }
        errors.extend(self.release_pending().await);
        Ok(errors)
    }

    async fn adopt(&self, id: AttachmentId, addresses: Vec<IpAddr>) -> Result<(), Error> {
        let _turn = self.locks.lock(&id).await;
        // A DEL may have removed the interface after the kernel was read.
        let gone = self.netlink.link(&host_name(&id)).await?.is_none();
        if gone || self.leases.get(id.clone()).await?.is_some() {
            return Ok(());
        }
        tracing::warn!(container = id.container_id, ?addresses, "adopting lease from kernel state");
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
        let lease = self.leases.adopt(lease).await?;
        self.enforce_policies(&lease).await
    }

    async fn repair(&self, kernel: &KernelSnapshot, lease: &Lease) -> Result<(), Error> {
        let _turn = self.locks.lock(&lease.id).await;
        if self.leases.get(lease.id.clone()).await?.as_ref() != Some(lease) {
            return Ok(());
        }
        let ips = Vec::from_iter(lease.ips());
        let node = self.network.borrow().reserved.clone();
        let changes = self.attacher.repair(&self.netlink, kernel, &lease.id, &ips, &node).await?;
        if !changes.is_empty() {
            let container = &lease.id.container_id;
            tracing::warn!(container, changes = changes.join("; "), "interface of pod repaired");
        }
        Ok(())
    }

    /// Returns the identity of a namespace; an error if the descriptor is not one of a network
    /// namespace, or if it is the node's own.
    fn identify(&self, netns: &OwnedFd) -> Result<NamespaceId, Error> {
        let namespace = NamespaceId::of(netns).map_err(|error| {
            Error::Namespace(format!("cannot identify the network namespace: {error}"))
        })?;
        if namespace == self.own {
            return Err(Error::OwnNamespace);
        }
        Ok(namespace)
    }

    async fn dispatch(&self, command: Command, netns: Option<OwnedFd>) -> Response {
        let done = |result: Result<(), CniError>| match result {
            Ok(()) => Response::Done,
            Err(refusal) => Response::Refused(refusal),
        };
        // The plugin checks the ID as well. The agent uses it as a key and in an alias, and must
        // not depend on the plugin's check.
        if let Some(Err(error)) = command.id().map(check_id) {
            return refusal(ErrorCode::InvalidEnvironment as u32, error.to_string());
        }
        match command {
            Command::Add(add) => match self.add(add, netns).await {
                Ok(attached) => Response::Attached(attached),
                Err(error) => Response::Refused(refuse(&error)),
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
    async fn answer(&self, request: Request, netns: Option<OwnedFd>) -> Response {
        let verb = verb(&request.command);
        let answer = self.dispatch(request.command, netns).await;
        if let Response::Refused(refusal) = &answer {
            tracing::warn!(verb, code = refusal.code, reason = refusal.msg, "request refused");
        }
        answer
    }

    fn on_answered(&self, verb: &'static str, outcome: Outcome, took: Duration) {
        self.requests.count(verb, outcome, took);
    }
}

fn identity(netns: &Netns) -> NamespaceId {
    NamespaceId { device: netns.dev, inode: netns.inode }
}
