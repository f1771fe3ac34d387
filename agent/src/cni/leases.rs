//! Asynchronous interface of [`IpamHandle`].

use std::io;
use std::net::IpAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use skein_cni_protocol::AttachmentId;
use skein_ipam::{Ipam, IpamError, IpamHandle, Lease, Reply, Request, Usage};
use tokio::sync::oneshot;

/// Handle of the thread that owns the leases. Each method waits for the thread's reply, and fails
/// with [`IpamError::Stopped`] if the thread has ended.
#[derive(Debug)]
pub(super) struct Leases(IpamHandle);

impl Leases {
    /// Starts the thread.
    ///
    /// # Errors
    /// An I/O error if the thread cannot be created.
    pub(super) fn spawn(ipam: Ipam) -> io::Result<Self> {
        // The thread ends with the last handle. Every change was on disk before its reply.
        let (handle, _thread) = IpamHandle::spawn(ipam)?;
        Ok(Self(handle))
    }

    /// Sets the pools and the reserved addresses ([`Ipam::set_pools`]).
    pub(super) fn set_pools(&self, cidrs: Vec<IpNet>, reserved: Vec<IpAddr>) {
        self.0.set_pools(cidrs, reserved);
    }

    /// Allocates addresses for an attachment ([`Ipam::allocate`]).
    ///
    /// # Errors
    /// [`IpamError`] if no address is free, if a requested address is not available, if the
    /// attachment has a lease in another namespace, or if the lease cannot be written.
    pub(super) async fn allocate(&self, request: Request) -> Result<Lease, IpamError> {
        call(|reply| self.0.allocate(request, SystemTime::now(), reply)).await
    }

    /// Releases the lease of an attachment and returns it ([`Ipam::release`]).
    ///
    /// # Errors
    /// [`IpamError`] if the change cannot be written.
    pub(super) async fn release(&self, id: AttachmentId) -> Result<Option<Lease>, IpamError> {
        call(|reply| self.0.release(id, SystemTime::now(), reply)).await
    }

    /// Stores a lease that follows from the kernel's state ([`Ipam::adopt`]).
    ///
    /// # Errors
    /// [`IpamError`] if another attachment has an address of the lease, or if it cannot be written.
    pub(super) async fn adopt(&self, lease: Lease) -> Result<Lease, IpamError> {
        call(|reply| self.0.adopt(lease, SystemTime::now(), reply)).await
    }

    /// Returns the lease of an attachment ([`Ipam::get`]).
    ///
    /// # Errors
    /// [`IpamError::Stopped`] if the thread has ended.
    pub(super) async fn get(&self, id: AttachmentId) -> Result<Option<Lease>, IpamError> {
        call(|reply| self.0.get(id, reply)).await
    }

    /// Returns all leases ([`Ipam::list`]).
    ///
    /// # Errors
    /// [`IpamError::Stopped`] if the thread has ended.
    pub(super) async fn list(&self) -> Result<Vec<Lease>, IpamError> {
        call(|reply| self.0.list(reply)).await
    }

    /// Checks that leases can be written ([`Ipam::probe`]).
    ///
    /// # Errors
    /// [`IpamError`] if a write fails, for example because the disk is full.
    pub(super) async fn probe(&self) -> Result<(), IpamError> {
        call(|reply| self.0.probe(reply)).await
    }

    /// Returns the usage of the pools ([`Ipam::usage`]).
    ///
    /// # Errors
    /// [`IpamError::Stopped`] if the thread has ended.
    pub(super) async fn usage(&self) -> Result<Usage, IpamError> {
        call(|reply| self.0.usage(SystemTime::now(), reply)).await
    }
}

async fn call<T: Send + 'static>(f: impl FnOnce(Reply<T>)) -> Result<T, IpamError> {
    let (sender, answer) = oneshot::channel();
    f(Box::new(move |outcome| {
        // The caller may have dropped the future.
        let _ = sender.send(outcome);
    }));
    answer.await.unwrap_or(Err(IpamError::Stopped))
}
