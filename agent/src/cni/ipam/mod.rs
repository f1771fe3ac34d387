//! Which attachment has which addresses: leases, durable before anybody hears of them.
//!
//! [`Leases`] is the state with its rules, in plain memory; [`store`] keeps it in a redb database; and
//! [`Ipam`] is the thread that owns both and writes the changes of all requests that wait in one
//! transaction, so that a hundred pods do not wait for a hundred flushes of the disk.

mod leases;
mod pool;
mod store;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::SystemTime;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use skein_cni::protocol::{AttachmentId, Pod};
use thiserror::Error;
use tokio::sync::oneshot;

use self::leases::Leases;
pub use self::pool::Usage;
use self::store::Store;
pub use self::store::StoreError;
use crate::sys::netns::NamespaceId;

/// What an attachment has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Whose.
    pub id: AttachmentId,
    /// Name of the network in the plugin's configuration.
    #[serde(default)]
    pub network: String,
    /// Addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// The namespace as the runtime named it; empty where it was learnt from the kernel.
    #[serde(default)]
    pub netns: PathBuf,
    /// The namespace, where the agent has seen it.
    #[serde(default)]
    pub namespace: Option<NamespaceId>,
    /// Whether the agent saw that namespace at that path: whether it can tell that it is gone.
    #[serde(default)]
    pub path_visible: bool,
    /// The boot (`/proc/sys/kernel/random/boot_id`) in which it was given.
    #[serde(default)]
    pub boot: String,
    /// The pod, where the runtime said so.
    #[serde(default)]
    pub pod: Option<Pod>,
}

/// A request for addresses.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// All of the lease but its addresses.
    pub lease: Lease,
    /// Addresses that were asked for; empty for any.
    pub addresses: Vec<IpAddr>,
}

/// Why there is no lease.
#[derive(Debug, Error)]
pub enum IpamError {
    /// Every address is taken.
    #[error("no free address in {cidr}: {used} are in use")]
    Exhausted {
        /// The pool.
        cidr: IpNet,
        /// Addresses in use.
        used: u64,
    },
    /// There is nothing to give from.
    #[error("this node has no pod CIDR")]
    NoPool,
    /// The attachment has a lease, but in another namespace.
    #[error("{} of {} is attached in another namespace", .0.id.ifname, .0.id.container_id)]
    OtherNamespace(Box<Lease>),
    /// An address that was asked for belongs to no pool.
    #[error("{0} is not in a pod CIDR of this node, or cannot be a pod's")]
    NotOurs(IpAddr),
    /// An address is taken.
    #[error("{0} is in use by another container")]
    Taken(IpAddr),
    /// The database refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The thread has ended.
    #[error("the address store has ended")]
    Ended,
}

/// A handle of the thread that owns the leases; dropping it ends the thread.
#[derive(Debug)]
pub struct Ipam {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// Changes the leases, and returns what to do once that is on the disk.
type Job = Box<dyn FnOnce(&mut Leases) -> Completion + Send>;
type Completion = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// What opening found.
#[derive(Debug)]
pub struct Opened {
    /// Ready for requests.
    pub ipam: Ipam,
    /// Where a damaged database was put aside.
    pub damaged: Option<PathBuf>,
}

impl Ipam {
    /// Opens or makes the database. Blocks.
    pub fn open(path: &Path) -> Result<Opened, StoreError> {
        let (store, damaged) = Store::open(path)?;
        let leases = Leases::new(store.load()?);
        let (jobs, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("ipam".to_owned())
            .spawn(move || work(store, leases, &receiver))
            .map_err(|error| StoreError::new("start a thread for", path, error))?;
        Ok(Opened { ipam: Self { jobs: Some(jobs), thread: Some(thread) }, damaged })
    }

    /// What addresses may be given from, and which of them never.
    pub async fn set_pools(
        &self,
        cidrs: Vec<IpNet>,
        reserved: Vec<IpAddr>,
    ) -> Result<(), IpamError> {
        self.ask(move |leases| {
            leases.set_pools(&cidrs, &reserved);
            Ok(())
        })
        .await
    }

    /// One address a family. The same attachment in the same namespace keeps what it has.
    pub async fn allocate(&self, wanted: Wanted) -> Result<Lease, IpamError> {
        self.ask(move |leases| leases.allocate(wanted, SystemTime::now())).await
    }

    /// Gives the addresses back; `None` where there were none.
    pub async fn release(&self, id: AttachmentId) -> Result<Option<Lease>, IpamError> {
        self.ask(move |leases| Ok(leases.release(&id, SystemTime::now()))).await
    }

    /// Takes over an attachment that was found in the kernel.
    pub async fn adopt(&self, lease: Lease) -> Result<(), IpamError> {
        self.ask(move |leases| leases.adopt(lease)).await
    }

    /// The lease of an attachment.
    pub async fn get(&self, id: AttachmentId) -> Result<Option<Lease>, IpamError> {
        self.ask(move |leases| Ok(leases.get(&id).cloned())).await
    }

    /// All leases.
    pub async fn list(&self) -> Result<Vec<Lease>, IpamError> {
        self.ask(|leases| Ok(leases.iter().cloned().collect())).await
    }

    /// How full the pools are.
    pub async fn usage(&self) -> Result<Vec<Usage>, IpamError> {
        self.ask(|leases| Ok(leases.usage(SystemTime::now()))).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Leases) -> Result<T, IpamError> + Send + 'static,
    ) -> Result<T, IpamError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |leases| {
            let result = f(leases);
            Box::new(move |written| {
                // Whoever asked may have gone.
                let _ = reply.send(written.map_err(IpamError::from).and(result));
            })
        });
        let jobs = self.jobs.as_ref().ok_or(IpamError::Ended)?;
        jobs.send(job).map_err(|_| IpamError::Ended)?;
        answer.await.unwrap_or(Err(IpamError::Ended))
    }
}

impl Drop for Ipam {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Takes all jobs that wait, writes their changes in one transaction, and answers.
fn work(mut store: Store, mut leases: Leases, jobs: &mpsc::Receiver<Job>) {
    while let Ok(first) = jobs.recv() {
        let waiting = std::iter::once(first).chain(jobs.try_iter());
        let completions: Vec<Completion> = waiting.map(|job| job(&mut leases)).collect();
        let changes = leases.take_changes();
        let written = store.write(&changes);
        if written.is_err() {
            // Nothing of it happened: memory goes back to what the disk says, as far as that can
            // be read; otherwise to what it was before.
            match store.reload() {
                Ok(found) => leases.reset(found),
                Err(_) => leases.undo(changes),
            }
        }
        for complete in completions {
            complete(written.clone());
        }
    }
}

#[cfg(test)]
mod tests;
