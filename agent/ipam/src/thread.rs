//! Leases on a thread of their own: whoever waits while a transaction is written shares the next.

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

/// What is called with the outcome, on the thread of the leases: it must neither block nor panic.
/// It is dropped without having been called where that thread has ended with the work undone.
pub type Reply<T> = Box<dyn FnOnce(Result<T, IpamError>) + Send>;

/// Operations in one transaction at most: bounds what a failure takes with it.
const MAX_BATCH: usize = 1024;

/// Asks the thread of the leases. The thread ends when the last handle is gone and everything that
/// was asked is done.
#[derive(Debug, Clone)]
pub struct IpamHandle {
    jobs: Sender<Job>,
}

/// Runs a write in memory, or fails it; what it returns answers when the transaction has ended.
type Write = Box<dyn FnOnce(Result<(&mut State, &mut ChangeSet), IpamError>) -> Answer + Send>;
type Answer = Box<dyn FnOnce(Result<(), IpamError>)>;
type ReadJob = Box<dyn FnOnce(&mut Ipam) + Send>;

enum Job {
    Pools(ReadJob),
    Write(Write),
    Read(ReadJob),
}

impl IpamHandle {
    /// Starts the thread `ipam`. To join it is to know that the file is closed.
    pub fn spawn(ipam: Ipam) -> io::Result<(Self, JoinHandle<()>)> {
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new().name("ipam".to_owned());
        let thread = thread.spawn(move || run(ipam, &queue))?;
        Ok((Self { jobs }, thread))
    }

    /// As [`Ipam::set_pools`]; what is asked later gives addresses of these.
    pub fn set_pools(&self, cidrs: Vec<IpNet>, reserved: Vec<IpAddr>) {
        let job = move |ipam: &mut Ipam| ipam.set_pools(&cidrs, &reserved);
        // Where the thread has ended there is nobody left to give an address to.
        let _ = self.jobs.send(Job::Pools(Box::new(job)));
    }

    /// As [`Ipam::allocate`].
    pub fn allocate(&self, request: Request, now: SystemTime, reply: Reply<Lease>) {
        self.write(move |state, change_set| state.allocate(request, now, change_set), reply);
    }

    /// As [`Ipam::release`].
    pub fn release(&self, id: AttachmentId, now: SystemTime, reply: Reply<Option<Lease>>) {
        self.write(move |state, change_set| Ok(state.release(&id, now, change_set)), reply);
    }

    /// As [`Ipam::adopt`].
    pub fn adopt(&self, lease: Lease, now: SystemTime, reply: Reply<Lease>) {
        self.write(move |state, change_set| state.adopt(lease, now, change_set), reply);
    }

    /// As [`Ipam::get`].
    pub fn get(&self, id: AttachmentId, reply: Reply<Option<Lease>>) {
        self.read(move |ipam| ipam.get(&id).cloned(), reply);
    }

    /// As [`Ipam::list`].
    pub fn list(&self, reply: Reply<Vec<Lease>>) {
        self.read(|ipam| ipam.list().cloned().collect(), reply);
    }

    /// As [`Ipam::usage`].
    pub fn usage(&self, now: SystemTime, reply: Reply<Usage>) {
        self.read(move |ipam| ipam.usage(now), reply);
    }

    /// As [`Ipam::probe`].
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
        // A reply that cannot be sent is dropped with its question, which tells who waits.
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
        // All of them came while nobody was answered, so that any order is one that they may
        // expect: this one has what was asked after a change of pools see the change.
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
    // Those that were not even tried, as the store could not be opened.
    if let Err(error) = &outcome {
        answers.extend(writes.map(|write| write(Err(error.clone()))));
    }
    for answer in answers {
        answer(outcome.clone());
    }
}
