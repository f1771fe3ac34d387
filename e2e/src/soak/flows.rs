//! The traffic: connections that last the whole run, files one after the other, datagrams at a
//! rate, requests with answers. Every byte of it is checked.

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
use skein_lab::load::transfer::{self, Transfer};
use skein_lab::load::udp::{self, Load, Receiver};
use skein_lab::{Family, Lab, Pod};

/// Of each long connection and of each flow of files, in bytes a second.
const RATE: u64 = 4 << 20;

/// The largest file, and the longest answer to a request.
const FILE: usize = 6 << 20;
const ANSWER: usize = 16 << 10;

/// How long either end of a request waits for the other.
const PATIENCE: Duration = Duration::from_secs(40);

/// Between an answer and the next request.
const THINKING: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// One TCP connection for the whole run.
    Bulk,
    /// A connection each.
    Files,
    /// UDP: so many bytes, so many a second.
    Datagrams(usize, u64),
    /// One connection for the whole run.
    Requests,
}

use Family::{V4, V6};
use Work::{Bulk, Datagrams, Files, Requests};

/// From which node to which, and the family.
const FLOWS: [(Work, usize, usize, Family); 10] = [
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

/// What one flow has done.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) name: String,
    pub(super) progress: Arc<FlowProgress>,
    /// Files, requests or datagrams that arrived whole and right.
    pub(super) done: AtomicU64,
    /// Datagrams that were sent and did not arrive.
    pub(super) lost: AtomicU64,
    /// Pieces with wrong bytes in them.
    pub(super) wrong: AtomicU64,
    /// Connections that ended before their time, and whatever else went wrong.
    pub(super) failures: Mutex<Vec<String>>,
}

/// All flows, under way.
pub(super) struct Flows<'scope> {
    tallies: Vec<(Work, Arc<Tally>)>,
    threads: Vec<thread::ScopedJoinHandle<'scope, ()>>,
}

impl<'scope> Flows<'scope> {
    pub(super) fn start<'env>(scope: &'scope Scope<'scope, 'env>, lab: &'env Lab) -> Self {
        let mut flows = Self { tallies: vec![], threads: vec![] };
        for (number, (work, from, to, family)) in FLOWS.into_iter().enumerate() {
            let name =
                format!("{work:?} {} to {} {family}", lab.nodes[from].name, lab.nodes[to].name);
            let tally = Arc::new(Tally { name, ..Tally::default() });
            flows.tallies.push((work, tally.clone()));
            let flow = Flow {
                from: lab.pod(from),
                to: lab.pod(to),
                address: (lab.pod(to).address(family), 7100 + number as u16).into(),
                tally,
            };
            flows.threads.push(scope.spawn(move || flow.go_on(work, number as u64)));
        }
        flows
    }

    /// The longest pause of any connection that has ended since the last call.
    pub(super) fn longest_pause(&self) -> Duration {
        self.connections()
            .map(|tally| tally.progress.take_longest_pause())
            .max()
            .unwrap_or_default()
    }

    /// A connection on which nothing has come since then.
    pub(super) fn behind(&self, since: Instant) -> Option<&str> {
        let mut connections = self.connections();
        let behind = connections
            .find(|tally| tally.progress.last_received().is_none_or(|last| last <= since));
        behind.map(|tally| tally.name.as_str())
    }

    fn connections(&self) -> impl Iterator<Item = &Tally> {
        let connections = self.tallies.iter().filter(|(work, _)| !matches!(work, Datagrams(..)));
        connections.map(|(_, tally)| &**tally)
    }

    /// A line for people.
    pub(super) fn progress(&self, elapsed: Duration, faults: usize) -> String {
        let sum =
            |of: fn(&Tally) -> u64| self.tallies.iter().map(|(_, tally)| of(tally)).sum::<u64>();
        format!(
            "{:>5} s: {} MiB moved, {} files and answers compared, {} wrong, {} failures, {faults} \
             faults",
            elapsed.as_secs(),
            sum(|tally| tally.progress.bytes()) >> 20,
            sum(|tally| tally.done.load(Ordering::Relaxed)),
            sum(|tally| tally.wrong.load(Ordering::Relaxed)),
            sum(|tally| tally.failures().len() as u64),
        )
    }

    /// Ends all; what they have done.
    pub(super) fn stop(self) -> Vec<(Work, Arc<Tally>)> {
        self.tallies.iter().for_each(|(_, tally)| tally.progress.stop());
        for thread in self.threads {
            let _ = thread.join();
        }
        self.tallies
    }
}

impl Tally {
    pub(super) fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn failed(&self, error: &anyhow::Error) {
        let wrong = error.downcast_ref::<WrongByte>().is_some();
        self.wrong.fetch_add(wrong.into(), Ordering::Relaxed);
        let text = format!("{}: {error:#}", self.name);
        eprintln!("{} {text}", super::wall());
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }
}

/// One flow, on a thread of its own.
struct Flow<'a> {
    from: &'a Pod,
    to: &'a Pod,
    address: SocketAddr,
    tally: Arc<Tally>,
}

impl Flow<'_> {
    /// Goes on until it is to stop; whatever fails is noted and begins anew.
    fn go_on(&self, work: Work, number: u64) {
        let mut random = Random::new(number);
        while !self.tally.progress.is_stopped() {
            let done = match work {
                Bulk => self.transfer(u64::MAX),
                Files => self.transfer(1 + random.below(FILE) as u64),
                Datagrams(payload, rate) => self.datagrams(payload, rate),
                Requests => self.requests(),
            };
            if let Err(error) = done {
                self.tally.failed(&error);
                thread::sleep(Duration::from_secs(1));
            }
        }
    }

    fn transfer(&self, bytes: u64) -> Result<()> {
        let (from, to, progress) = (&self.from.ns, &self.to.ns, &self.tally.progress);
        Transfer::start_with_progress(from, to, self.address, bytes, Some(RATE), progress)?
            .join()?;
        self.tally.done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn datagrams(&self, payload: usize, rate: u64) -> Result<()> {
        let (tally, to) = (&self.tally, self.address);
        let receiver = Receiver::start_with_progress(&self.to.ns, to, payload, &tally.progress)?;
        let source = self.from.ns.run(move || udp::bind_for(to))??;
        let load = Load { payload, rate: Some(rate), duration: Duration::from_secs(1) };
        let (mut sent, mut next) = (0, 0);
        while !tally.progress.is_stopped() {
            sent += self.from.ns.run(|| udp::send_from(&source, to, load, &mut next))??.0;
        }
        // Some may have waited somewhere.
        thread::sleep(Duration::from_secs(1));
        let outcome = receiver.stop()?;
        let load = Ordering::Relaxed;
        tally.done.fetch_add(outcome.received - outcome.corrupt, load);
        tally.lost.fetch_add(sent.saturating_sub(outcome.received), load);
        tally.wrong.fetch_add(outcome.corrupt, load);
        ensure!(outcome.doubled == 0, "{} datagrams came twice", outcome.doubled);
        Ok(())
    }

    fn requests(&self) -> Result<()> {
        let listener = self.to.ns.run(|| transfer::bind(self.address))?.context("binding")?;
        let server = self.to.ns.spawn(move || answer(&listener));
        let tally = self.tally.clone();
        let address = self.address;
        let asked = self.from.ns.spawn(move || ask(address, &tally)).join();
        // It ends with the connection.
        let answered = server.join();
        asked.and(answered)
    }
}

/// A request is a seed and a length: the answer is the pattern of the one, as long as the other.
fn ask(to: SocketAddr, tally: &Tally) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connecting")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut random = Random::new(to.port().into());
    let mut answer = vec![0; ANSWER];
    while !tally.progress.is_stopped() {
        let (seed, length) = (random.below(usize::MAX) as u64, 1 + random.below(ANSWER));
        let request = [seed.to_be_bytes(), (length as u64).to_be_bytes()].concat();
        stream.write_all(&request).context("asking")?;
        let answer = &mut answer[..length];
        stream.read_exact(answer).context("waiting for an answer")?;
        if let Some(at) = Pattern::new(seed).mismatch(answer) {
            bail!(WrongByte(at as u64));
        }
        tally.progress.add_received(length as u64);
        tally.done.fetch_add(1, Ordering::Relaxed);
        thread::sleep(THINKING);
    }
    Ok(())
}

fn answer(listener: &TcpListener) -> Result<()> {
    let mut stream = transfer::accept(listener, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = [0; 16];
    loop {
        match stream.read_exact(&mut request) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            done => done.context("waiting for a request")?,
        }
        let (seed, length) = request.split_at(8);
        let number = |bytes: &[u8]| bytes.try_into().map(u64::from_be_bytes);
        let mut answer = vec![0; ANSWER.min(number(length)? as usize)];
        Pattern::new(number(seed)?).fill(&mut answer);
        stream.write_all(&answer).context("answering")?;
    }
}
