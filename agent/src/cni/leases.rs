//! The leases as a task asks for them: [`IpamHandle`] with replies that can be awaited.

use std::io;
use std::net::IpAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use skein_cni_protocol::AttachmentId;
use skein_ipam::{Ipam, IpamError, IpamHandle, Lease, Reply, Request, Usage};
use tokio::sync::oneshot;

/// See the module.
#[derive(Debug)]
pub(super) struct Leases(IpamHandle);

impl Leases {
    /// Starts the thread that keeps them.
    pub(super) fn spawn(ipam: Ipam) -> io::Result<Self> {
        // The thread ends with the last handle; what was answered is on the disk by then.
        let (handle, _thread) = IpamHandle::spawn(ipam)?;
        Ok(Self(handle))
    }

    /// See [`Ipam::set_pools`].
    pub(super) fn set_pools(&self, cidrs: Vec<IpNet>, reserved: Vec<IpAddr>) {
        self.0.set_pools(cidrs, reserved);
    }

    /// See [`Ipam::allocate`].
    pub(super) async fn allocate(&self, request: Request) -> Result<Lease, IpamError> {
        ask(|reply| self.0.allocate(request, SystemTime::now(), reply)).await
    }

    /// See [`Ipam::release`].
    pub(super) async fn release(&self, id: AttachmentId) -> Result<Option<Lease>, IpamError> {
        ask(|reply| self.0.release(id, SystemTime::now(), reply)).await
    }

    /// See [`Ipam::adopt`].
    pub(super) async fn adopt(&self, lease: Lease) -> Result<Lease, IpamError> {
        ask(|reply| self.0.adopt(lease, SystemTime::now(), reply)).await
    }

    /// See [`Ipam::get`].
    pub(super) async fn get(&self, id: AttachmentId) -> Result<Option<Lease>, IpamError> {
        ask(|reply| self.0.get(id, reply)).await
    }

    /// See [`Ipam::list`].
    pub(super) async fn list(&self) -> Result<Vec<Lease>, IpamError> {
        ask(|reply| self.0.list(reply)).await
    }

    /// See [`Ipam::probe`].
    pub(super) async fn probe(&self) -> Result<(), IpamError> {
        ask(|reply| self.0.probe(reply)).await
    }

    /// See [`Ipam::usage`].
    pub(super) async fn usage(&self) -> Result<Usage, IpamError> {
        ask(|reply| self.0.usage(SystemTime::now(), reply)).await
    }
}

async fn ask<T: Send + 'static>(f: impl FnOnce(Reply<T>)) -> Result<T, IpamError> {
    let (sender, answer) = oneshot::channel();
    f(Box::new(move |outcome| {
        // Whoever asked may have gone.
        let _ = sender.send(outcome);
    }));
    answer.await.unwrap_or(Err(IpamError::Stopped))
}
