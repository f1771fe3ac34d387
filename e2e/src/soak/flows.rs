//! Traffic of the soak test: connections that last for the whole run, files, datagrams at a fixed
//! rate, and requests with responses. Every byte is checked.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::Random;
use skein_lab::load::pattern::{Pattern, WrongByte};
use skein_lab::load::progress::FlowProgress;
use skein_lab::load::retry_bind;
use skein_lab::load::transfer::{self, Transfer};
use skein_lab::load::udp::{self, Load, Receiver};
use skein_lab::{Family, Lab, Pod};

/// Maximum rate of each long connection and of each flow of files, bytes per second.
const RATE: u64 = 4 << 20;

/// Size of the largest file, bytes.
const MAX_FILE: usize = 6 << 20;
/// Size of the longest response to a request, bytes.
const MAX_RESPONSE: usize = 16 << 10;

/// Maximum time that the client or the server of requests waits for the other.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(40);

/// Delay between a response and the next request.
const REQUEST_DELAY: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlowKind {
    /// Bulk data over one TCP connection that lasts for the whole run.
    Bulk,
    /// Files of random size, each over its own TCP connection.
    Files,
    /// UDP datagrams: payload in bytes, and datagrams per second.
    Datagrams(usize, u64),
    /// Requests and responses over one TCP connection that lasts for the whole run.
    Requests,
}

use Family::{V4, V6};
use FlowKind::{Bulk, Datagrams, Files, Requests};

/// Flows of the run: kind, index of the sending node, index of the receiving node, address family.
const FLOWS: [(FlowKind, usize, usize, Family); 10] = [
    (Bulk, 0, 1, V4),
    (Bulk, 1, 2, V6),
    (Bulk, 2, 0, V4),
    (Files, 0, 1, V6),
    (Files, 1, 0, V4),
    (Files, 2, 1, V6),
    (Datagrams(1200, 1000), 0, 2, V4),
    (Datagrams(300, 500), 2, 1, V6),
    (Requests, 1, 0, V6),
    (Requests, 2, 1, V4),
];

/// Counters and failures of one flow.
#[derive(Default)]
pub(super) struct FlowStats {
    pub(super) name: String,
    pub(super) progress: Arc<FlowProgress>,
    /// Files, responses or datagrams that arrived complete and unchanged.
    pub(super) done: AtomicU64,
    /// Datagrams that were sent and did not arrive.
    pub(super) lost: AtomicU64,
    /// Files, responses or datagrams with wrong bytes.
    pub(super) wrong: AtomicU64,
    /// Error messages: connections that ended too early, and other failures.
    pub(super) failures: Mutex<Vec<String>>,
}

/// All flows of a run, each on its own thread.
pub(super) struct Flows<'scope> {
    stats: Vec<(FlowKind, Arc<FlowStats>)>,
    threads: Vec<thread::ScopedJoinHandle<'scope, ()>>,
}

impl<'scope> Flows<'scope> {
    pub(super) fn start<'env>(scope: &'scope Scope<'scope, 'env>, lab: &'env Lab) -> Self {
        let mut flows = Self { stats: vec![], threads: vec![] };
        for (number, (kind, from, to, family)) in FLOWS.into_iter().enumerate() {
            let name =
                format!("{kind:?} {} to {} {family}", lab.nodes[from].name, lab.nodes[to].name);
            let stats = Arc::new(FlowStats { name, ..FlowStats::default() });
            flows.stats.push((kind, stats.clone()));
            let flow = Flow {
                from: lab.pod(from),
                to: lab.pod(to),
                address: (lab.pod(to).address(family), 7100 + number as u16).into(),
                stats,
            };
            flows.threads.push(scope.spawn(move || flow.run(kind, number as u64)));
        }
        flows
    }

    /// Returns the longest pause on any connection, and starts a new measurement. Only pauses that
    /// ended since the last call count.
    pub(super) fn take_longest_pause(&self) -> Duration {
        self.connections()
            .map(|stats| stats.progress.take_longest_pause())
            .max()
            .unwrap_or_default()
    }

    /// Returns the name of a connection on which no byte has arrived since `since`.
    pub(super) fn stalled_since(&self, since: Instant) -> Option<&str> {
        let mut connections = self.connections();
        let stalled = connections
            .find(|stats| stats.progress.last_received().is_none_or(|last| last <= since));
        stalled.map(|stats| stats.name.as_str())
    }

    fn connections(&self) -> impl Iterator<Item = &FlowStats> {
        let connections = self.stats.iter().filter(|(kind, _)| !matches!(kind, Datagrams(..)));
        connections.map(|(_, stats)| &**stats)
    }

    /// Returns a line about the progress of the run.
    pub(super) fn progress(&self, elapsed: Duration, faults: usize) -> String {
        let sum =
            |of: fn(&FlowStats) -> u64| self.stats.iter().map(|(_, stats)| of(stats)).sum::<u64>();
        format!(
            "{:>5} s: {} MiB received, compared: {}, wrong: {}, failures: {}, faults: {faults}",
            elapsed.as_secs(),
            sum(|stats| stats.progress.bytes()) >> 20,
            sum(|stats| stats.done.load(Ordering::Relaxed)),
            sum(|stats| stats.wrong.load(Ordering::Relaxed)),
            sum(|stats| stats.failures().len() as u64),
        )
    }

    /// Stops all flows and returns their counters.
    pub(super) fn stop(self) -> Vec<(FlowKind, Arc<FlowStats>)> {
        self.stats.iter().for_each(|(_, stats)| stats.progress.stop());
        for thread in self.threads {
            let _ = thread.join();
        }
        self.stats
    }
}

impl FlowStats {
    pub(super) fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add_failure(&self, error: &anyhow::Error) {
        let wrong = error.downcast_ref::<WrongByte>().is_some();
        self.wrong.fetch_add(wrong.into(), Ordering::Relaxed);
        let text = format!("{}: {error:#}", self.name);
        eprintln!("{} {text}", super::utc_time());
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }
}

/// Endpoints and counters of one flow.
struct Flow<'a> {
    from: &'a Pod,
    to: &'a Pod,
    address: SocketAddr,
    stats: Arc<FlowStats>,
}

impl Flow<'_> {
    /// Runs the flow until it is stopped. Records a failure, and starts again after 1 s.
    fn run(&self, kind: FlowKind, number: u64) {
        let mut random = Random::new(number);
        while !self.stats.progress.is_stopped() {
            let done = match kind {
                Bulk => self.transfer(u64::MAX),
                Files => self.transfer(1 + random.below(MAX_FILE) as u64),
                Datagrams(payload, rate) => self.datagrams(payload, rate),
                Requests => self.requests(),
            };
            if let Err(error) = done {
                self.stats.add_failure(&error);
                thread::sleep(Duration::from_secs(1));
            }
        }
    }

    fn transfer(&self, bytes: u64) -> Result<()> {
        let (from, to, progress) = (&self.from.ns, &self.to.ns, &self.stats.progress);
        Transfer::start_with_progress(from, to, self.address, bytes, Some(RATE), progress)?
            .join()?;
        self.stats.done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn datagrams(&self, payload: usize, rate: u64) -> Result<()> {
        let (stats, to) = (&self.stats, self.address);
        let receiver = Receiver::start_with_progress(&self.to.ns, to, payload, &stats.progress)?;
        let source = self.from.ns.run(move || udp::bind_for(to))??;
        let load = Load { payload, rate: Some(rate), duration: Duration::from_secs(1) };
        let (mut sent, mut next) = (0, 0);
        while !stats.progress.is_stopped() {
            sent += self.from.ns.run(|| udp::send_from(&source, to, load, &mut next))??.0;
        }
        // Receive the datagrams that are still in queues.
        thread::sleep(Duration::from_secs(1));
        let outcome = receiver.stop()?;
        let relaxed = Ordering::Relaxed;
        stats.done.fetch_add(outcome.received - outcome.corrupt, relaxed);
        stats.lost.fetch_add(sent.saturating_sub(outcome.received), relaxed);
        stats.wrong.fetch_add(outcome.corrupt, relaxed);
        ensure!(outcome.doubled == 0, "datagrams that arrived twice: {}", outcome.doubled);
        Ok(())
    }

    fn requests(&self) -> Result<()> {
        let listener = self
            .to
            .ns
            .run(|| retry_bind(|| TcpListener::bind(self.address)))?
            .context("binding")?;
        let server = self.to.ns.spawn(move || serve(&listener));
        let stats = self.stats.clone();
        let address = self.address;
        let client = self.from.ns.spawn(move || send_requests(address, &stats)).join();
        // The server ends with the connection.
        let served = server.join();
        client.and(served)
    }
}

/// Sends requests until the flow is stopped. A request consists of a seed and a length (u64, big
/// endian); the response is the pattern of this seed with this length.
fn send_requests(to: SocketAddr, stats: &FlowStats) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, REQUEST_TIMEOUT).context("connecting")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    let mut random = Random::new(to.port().into());
    let mut answer = vec![0; MAX_RESPONSE];
    while !stats.progress.is_stopped() {
        let (seed, length) = (random.below(usize::MAX) as u64, 1 + random.below(MAX_RESPONSE));
        let request = [seed.to_be_bytes(), (length as u64).to_be_bytes()].concat();
        stream.write_all(&request).context("sending a request")?;
        let answer = &mut answer[..length];
        stream.read_exact(answer).context("waiting for a response")?;
        if let Some(at) = Pattern::new(seed).mismatch(answer) {
            bail!(WrongByte(at as u64));
        }
        stats.progress.add_received(length as u64);
        stats.done.fetch_add(1, Ordering::Relaxed);
        thread::sleep(REQUEST_DELAY);
    }
    Ok(())
}

/// Accepts one connection and answers its requests until it ends.
fn serve(listener: &TcpListener) -> Result<()> {
    let mut stream = transfer::accept(listener, REQUEST_TIMEOUT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    let mut request = [0; 16];
    loop {
        match stream.read_exact(&mut request) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            done => done.context("waiting for a request")?,
        }
        let (seed, length) = request.split_at(8);
        let number = |bytes: &[u8]| bytes.try_into().map(u64::from_be_bytes);
        let mut answer = vec![0; MAX_RESPONSE.min(number(length)? as usize)];
        Pattern::new(number(seed)?).fill(&mut answer);
        stream.write_all(&answer).context("sending a response")?;
    }
}
