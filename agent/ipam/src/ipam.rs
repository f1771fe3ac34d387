//! The leases of a node: the state in memory, and the store on disk.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use skein_cni_protocol::AttachmentId;

use super::change_set::ChangeSet;
use super::error::{IpamError, OpenError, StoreError};
use super::lease::Lease;
use super::state::{Request, State, Usage};
use super::store::{self, Store};

/// Where the leases lie in the state directory.
pub const FILE: &str = "cni/leases.redb";

/// The leases of a node. One process at a time has the file open.
#[derive(Debug)]
pub struct Ipam {
    pub(super) state: State,
    pub(super) store: Store,
}

/// See [`Ipam::open`].
#[derive(Debug)]
pub struct Opened {
    /// The leases.
    pub ipam: Ipam,
    /// Where the file was moved that was found damaged. What it held is lost to us: the addresses
    /// that the kernel routes to pods have to be adopted before any is given.
    pub damaged: Option<Damaged>,
}

/// A file that was not what had been written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Where it lies now.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl Ipam {
    /// Opens the leases, or makes a file without any. A damaged one is moved aside.
    pub fn open(path: &Path) -> Result<Opened, OpenError> {
        let failed = |error| OpenError { path: path.to_owned(), error };
        let open = || {
            store::prepare(path)?;
            Self::with(Store::new(store::opener(path)))
        };
        match open() {
            Ok(ipam) => Ok(Opened { ipam, damaged: None }),
            Err(StoreError::Damaged(reason)) => {
                let path = store::move_aside(path).map_err(|error| failed(error.into()))?;
                let damaged = Some(Damaged { path, reason });
                Ok(Opened { ipam: open().map_err(failed)?, damaged })
            }
            Err(error) => Err(failed(error)),
        }
    }

    pub(super) fn with(mut store: Store) -> Result<Self, StoreError> {
        let mut state = State::new();
        state.load(store.open()?)?;
        Ok(Self { state, store })
    }

    /// From now on gives addresses of these CIDRs, but for those that are reserved. Leases outside
    /// of them stay until they are released.
    pub fn set_pools(&mut self, cidrs: &[IpNet], reserved: &[IpAddr]) {
        self.state.set_pools(cidrs, reserved);
    }

    /// Leases an address of each family that the node has. The same attachment in the same
    /// namespace gets the lease that it has, whatever it asks for.
    pub fn allocate(&mut self, request: Request, now: SystemTime) -> Result<Lease, IpamError> {
        self.write(|state, change_set| state.allocate(request, now, change_set))?
    }

    /// Ends a lease, and says which it was.
    pub fn release(
        &mut self,
        id: &AttachmentId,
        now: SystemTime,
    ) -> Result<Option<Lease>, IpamError> {
        self.write(|state, change_set| state.release(id, now, change_set))
    }

    /// Takes a lease as the kernel has it, in a pool or not, reserved or not. What it does not say
    /// (namespace, pod, network) stays as it was known; addresses of which it has others are freed.
    /// Returns the lease as it is now.
    pub fn adopt(&mut self, lease: Lease, now: SystemTime) -> Result<Lease, IpamError> {
        self.write(|state, change_set| state.adopt(lease, now, change_set))?
    }

    /// The lease of an attachment. While the store can be neither written nor read, this and what
    /// follows say what was known before it failed.
    pub fn get(&self, id: &AttachmentId) -> Option<&Lease> {
        self.state.get(id)
    }

    /// All leases, by attachment.
    pub fn list(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.state.list()
    }

    /// How much is used.
    pub fn usage(&self, now: SystemTime) -> Usage {
        self.state.usage(now)
    }

    /// Whether a lease could be written now: it writes as much, and nothing that lasts.
    pub fn probe(&mut self) -> Result<(), IpamError> {
        let failed = |error| IpamError::Store(Arc::new(error));
        if !self.store.is_open() {
            self.reload().map_err(failed)?;
        }
        self.store.probe().map_err(|error| {
            let _ = self.reload();
            failed(error)
        })
    }

    /// Does some work on the state in memory and writes what it changed in one transaction. Where
    /// that fails, memory is as the disk is, or, if the disk cannot be read either, as it was
    /// before; then nothing is written until it can be.
    pub(super) fn write<T>(
        &mut self,
        work: impl FnOnce(&mut State, &mut ChangeSet) -> T,
    ) -> Result<T, IpamError> {
        let failed = |error| IpamError::Store(Arc::new(error));
        if !self.store.is_open() {
            self.reload().map_err(failed)?;
        }
        let mut change_set = ChangeSet::default();
        let result = work(&mut self.state, &mut change_set);
        if change_set.is_empty() {
            return Ok(result);
        }
        if let Err(error) = self.store.write(&change_set) {
            self.state.undo(change_set);
            // What keeps it from being read now is likely what kept it from being written.
            let _ = self.reload();
            return Err(failed(error));
        }
        Ok(result)
    }

    fn reload(&mut self) -> Result<(), StoreError> {
        let contents = self.store.open()?;
        // What cannot be taken from the disk must not be added to there.
        self.state.load(contents).inspect_err(|_| self.store.close())
    }
}
