//! Leases of a node: the state in memory and the store on disk.

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

/// Path of the database below the state directory.
pub const FILE: &str = "cni/leases.redb";

/// Leases of a node.
///
/// The caller opens the store, adopts the kernel's leases if the store was damaged, sets the pools,
/// and then allocates and releases. Every change is on disk when its call returns; after an error
/// the state in memory is unchanged, and a later call reads the store again. One process at a time
/// can open the file.
#[derive(Debug)]
pub struct Ipam {
    pub(super) state: State,
    pub(super) store: Store,
}

/// Result of [`Ipam::open`].
#[derive(Debug)]
pub struct Opened {
    /// The opened leases.
    pub ipam: Ipam,
    /// The damaged file, if there was one. Its leases are lost: adopt the addresses that the kernel
    /// routes to pods before the first allocation.
    pub damaged: Option<Damaged>,
}

/// Damaged file that was replaced by an empty one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Path to which the file was moved.
    pub path: PathBuf,
    /// Damage that was found.
    pub reason: String,
}

impl Ipam {
    /// Opens the leases at `path`, or creates an empty store. Moves a damaged file aside and
    /// creates an empty store.
    ///
    /// # Errors
    /// [`OpenError`] if another process has the file open, if a newer version has written it, or if
    /// the file or its directory cannot be read or written.
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

    /// Sets the CIDRs from which addresses are allocated, and the addresses that are never
    /// allocated. Existing leases outside the CIDRs remain until they are released.
    pub fn set_pools(&mut self, cidrs: &[IpNet], reserved: &[IpAddr]) {
        self.state.set_pools(cidrs, reserved);
    }

    /// Allocates one address per address family of the node and commits the lease to disk.
    /// Idempotent: an attachment that has a lease in the same network namespace gets that lease.
    ///
    /// # Errors
    /// `NoPools`, `Exhausted`; `NotInPool`, `Reserved`, `Taken` or `TooMany` for requested
    /// addresses; `OtherNamespace` (release the lease first); `Path` (not UTF-8); `Store` (retry:
    /// the outcome on disk is unknown until the store can be read again).
    pub fn allocate(&mut self, request: Request, now: SystemTime) -> Result<Lease, IpamError> {
        self.write(|state, change_set| state.allocate(request, now, change_set))?
    }

    /// Releases the lease of an attachment and quarantines its addresses. Returns the lease; `None`
    /// if there was none.
    ///
    /// # Errors
    /// `Store` (retry: the outcome on disk is unknown until the store can be read again).
    pub fn release(
        &mut self,
        id: &AttachmentId,
        now: SystemTime,
    ) -> Result<Option<Lease>, IpamError> {
        self.write(|state, change_set| state.release(id, now, change_set))
    }

    /// Stores a lease that the kernel's state shows, in a pool or not, reserved or not. Properties
    /// that the kernel does not show (network namespace, pod, network) keep their known values;
    /// other addresses of the attachment are released. Returns the stored lease.
    ///
    /// # Errors
    /// `NoAddress`, `Taken` if another attachment has one of the addresses, `Path` (not UTF-8),
    /// `Store`.
    pub fn adopt(&mut self, lease: Lease, now: SystemTime) -> Result<Lease, IpamError> {
        self.write(|state, change_set| state.adopt(lease, now, change_set))?
    }

    /// Returns the lease of an attachment. While the store can be neither written nor read, this
    /// method, [`Ipam::list`] and [`Ipam::usage`] return the state before the failure.
    pub fn get(&self, id: &AttachmentId) -> Option<&Lease> {
        self.state.get(id)
    }

    /// Returns all leases in the order of their attachments.
    pub fn list(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.state.list()
    }

    /// Returns the usage of the pools.
    pub fn usage(&self, now: SystemTime) -> Usage {
        self.state.usage(now)
    }

    /// Checks that a lease could be written now: writes as many bytes and removes them in the same
    /// transaction.
    ///
    /// # Errors
    /// `Store` with the error of the store.
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

    /// Runs `work` on the state in memory and commits its changes in one transaction. If the commit
    /// fails, the changes in memory are undone, and the state is read from the disk again. If the
    /// disk cannot be read either, the state before `work` remains in memory, and nothing is
    /// written until the disk can be read.
    ///
    /// # Errors
    /// `Store` with the error of the store.
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
            // The cause that prevented the write probably prevents the read, too; the next call
            // reads again.
            let _ = self.reload();
            return Err(failed(error));
        }
        Ok(result)
    }

    fn reload(&mut self) -> Result<(), StoreError> {
        let contents = self.store.open()?;
        // Changes must not be added to a store whose content was refused.
        self.state.load(contents).inspect_err(|_| self.store.close())
    }
}
