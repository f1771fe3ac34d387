//! Thread for leases. Operations that arrive while a transaction is written share the next one.

use std::io;
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::SystemTime;

use ipnet::IpNet;
use skein_cni_protocol::AttachmentId;

use super::change_set::ChangeSet;
use super::error::IpamError;
use super::ipam::Ipam;
use super::lease::Lease;
use super::state::{Request, State, Usage};

/// Callback for the outcome of an operation. It runs on the thread of the leases and must neither
/// block nor panic. It is dropped without a call if the thread ends before the operation.
pub type Reply<T> = Box<dyn FnOnce(Result<T, IpamError>) + Send>;

/// Maximum number of operations in one transaction. If the transaction fails, all of its operations
/// fail.
const MAX_BATCH: usize = 1024;

/// Handle of the thread. The thread ends after the last handle is dropped and all queued operations
/// are done.
#[derive(Debug, Clone)]
pub struct IpamHandle {
    jobs: Sender<Job>,
}

/// Function of a write operation. It changes the state in memory, or receives the error because of
/// which the operation cannot start. The returned function reports the outcome of the transaction.
type Write = Box<dyn FnOnce(Result<(&mut State, &mut ChangeSet), IpamError>) -> Answer + Send>;
type Answer = Box<dyn FnOnce(Result<(), IpamError>)>;
/// Job that is not part of a transaction.
type IpamJob = Box<dyn FnOnce(&mut Ipam) + Send>;

enum Job {
    Pools(IpamJob),
    Write(Write),
    Read(IpamJob),
}

impl IpamHandle {
    /// Starts the thread `ipam`. The file is closed when the thread ends.
    ///
    /// # Errors
    /// The kernel's error if the thread cannot be started.
    pub fn spawn(ipam: Ipam) -> io::Result<(Self, JoinHandle<()>)> {
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new().name("ipam".to_owned());
        let thread = thread.spawn(move || run(ipam, &queue))?;
        Ok((Self { jobs }, thread))
    }

    /// Queues [`Ipam::set_pools`]. Later allocations use these pools.
    pub fn set_pools(&self, cidrs: Vec<IpNet>, reserved: Vec<IpAddr>) {
        let job = move |ipam: &mut Ipam| ipam.set_pools(&cidrs, &reserved);
        // If the thread has ended, no address will be allocated.
        let _ = self.jobs.send(Job::Pools(Box::new(job)));
    }

    /// Queues [`Ipam::allocate`].
    pub fn allocate(&self, request: Request, now: SystemTime, reply: Reply<Lease>) {
        self.write(move |state, change_set| state.allocate(request, now, change_set), reply);
    }

    /// Queues [`Ipam::release`].
    pub fn release(&self, id: AttachmentId, now: SystemTime, reply: Reply<Option<Lease>>) {
        self.write(move |state, change_set| Ok(state.release(&id, now, change_set)), reply);
    }

    /// Queues [`Ipam::adopt`].
    pub fn adopt(&self, lease: Lease, now: SystemTime, reply: Reply<Lease>) {
        self.write(move |state, change_set| state.adopt(lease, now, change_set), reply);
    }

    /// Queues [`Ipam::get`].
    pub fn get(&self, id: AttachmentId, reply: Reply<Option<Lease>>) {
        self.read(move |ipam| ipam.get(&id).cloned(), reply);
    }

    /// Queues [`Ipam::list`].
    pub fn list(&self, reply: Reply<Vec<Lease>>) {
        self.read(|ipam| ipam.list().cloned().collect(), reply);
    }

    /// Queues [`Ipam::usage`].
    pub fn usage(&self, now: SystemTime, reply: Reply<Usage>) {
        self.read(move |ipam| ipam.usage(now), reply);
    }

    /// Queues [`Ipam::probe`].
    pub fn probe(&self, reply: Reply<()>) {
        let _ = self.jobs.send(Job::Read(Box::new(move |ipam| reply(ipam.probe()))));
    }

    fn write<T: 'static>(
        &self,
        work: impl FnOnce(&mut State, &mut ChangeSet) -> Result<T, IpamError> + Send + 'static,
        reply: Reply<T>,
    ) {
        let job: Write = Box::new(move |memory| {
            let result = memory.and_then(|(state, change_set)| work(state, change_set));
            Box::new(move |written| reply(written.and(result)))
        });
        if let Err(unsent) = self.jobs.send(Job::Write(job))
            && let Job::Write(job) = unsent.0
        {
            job(Err(IpamError::Stopped))(Err(IpamError::Stopped));
        }
    }

    fn read<T>(&self, work: impl FnOnce(&Ipam) -> T + Send + 'static, reply: Reply<T>)
    where
        T: 'static,
    {
        // If the thread has ended, the job and its reply are dropped, which notifies the caller.
        let job = move |ipam: &mut Ipam| reply(Ok(work(ipam)));
        let _ = self.jobs.send(Job::Read(Box::new(job)));
    }
}

fn run(mut ipam: Ipam, queue: &Receiver<Job>) {
    while let Ok(first) = queue.recv() {
        let (mut pools, mut writes, mut reads) = (Vec::new(), Vec::new(), Vec::new());
        for job in std::iter::once(first).chain(queue.try_iter()).take(MAX_BATCH) {
            match job {
                Job::Pools(job) => pools.push(job),
                Job::Write(write) => writes.push(write),
                Job::Read(job) => reads.push(job),
            }
        }
        // All of these operations are concurrent, so any order is valid. This order applies new
        // pools before allocations that were requested after them.
        pools.into_iter().for_each(|job| job(&mut ipam));
        write(&mut ipam, writes);
        reads.into_iter().for_each(|job| job(&mut ipam));
    }
}

fn write(ipam: &mut Ipam, writes: Vec<Write>) {
    if writes.is_empty() {
        return;
    }
    let mut writes = writes.into_iter();
    let mut answers = Vec::new();
    let outcome = ipam.write(|state, change_set| {
        answers.extend(writes.by_ref().map(|write| write(Ok((&mut *state, &mut *change_set)))));
    });
    // If the store could not be opened, the remaining operations were not tried. They get its
    // error.
    if let Err(error) = &outcome {
        answers.extend(writes.map(|write| write(Err(error.clone()))));
    }
    for answer in answers {
        answer(outcome.clone());
    }
}
