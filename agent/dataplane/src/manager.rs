//! The session manager: one thread that owns the protocol engine. Lanes hand it handshakes and
//! control messages; it hands them new tables. The packet path never waits for it.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use skein_core::time::Time;
use skein_ipc::{
    Confinement, ErrorKind, HANDOVER_VERSION, NodeSettings, Request, Response, Snapshot,
};

use super::active::{Active, KeeperUpdate, random};
use super::changes::Changes;
use super::channel::KeeperChannel;
use super::clock::clock;
use super::error::SetupError;
use super::handover::{self, HandOver, InheritedFds, ToKeeper};
use super::memory::MemfdStore;
use super::queue::{self, ToManager, ToManagerQueue};
use super::report;
use super::setup::{ProcessHandles, Running};
use super::tap::Tap;
use super::vm_generation::{ClockWatch, Uevents};

/// How soon to look again whether lanes have let go of old tables.
const RETIRED_TABLES_INTERVAL: Duration = Duration::from_millis(100);
/// Interval between comparisons of the wall clock with the boot clock.
const CLOCK_INTERVAL: Duration = Duration::from_secs(1);
/// Messages dealt with before what they led to is published and sent.
const MAX_BATCH: usize = 32;

/// Sets the filter of this process's log. `None` restores the filter that the process was started
/// with. The error is a sentence with the remedy.
pub type SetLogLevel = fn(Option<&str>) -> Result<(), String>;

/// Starts the manager's thread, with what another process has state. It ends when [`Request::Shutdown`]
/// came or every sender is gone.
pub(super) fn start(
    keeper: Option<Arc<KeeperChannel>>,
    state: Option<(HandOver, InheritedFds)>,
    set_log_level: SetLogLevel,
    tap: Arc<Tap>,
    changes: Arc<Changes>,
    confinement: Vec<Confinement>,
) -> std::io::Result<(ToManagerQueue, JoinHandle<()>)> {
    let (sender, receiver) = queue::channel();
    // Before sessions are resumed, so that no announcement is missed after that.
    if let Err(error) = Uevents::subscribe().and_then(|uevents| uevents.watch(sender.clone())) {
        tracing::warn!(%error, "sessions do not end if this virtual machine is cloned");
    }
    let mut manager = Manager {
        started: Instant::now(),
        queue: receiver,
        handles: ProcessHandles { to_manager: sender.clone(), tap, keeper },
        set_log_level,
        changes,
        clock: ClockWatch::default(),
        confinement,
        active: None,
    };
    // Before the thread starts, and with it the first handshake.
    if let Some((state, fds)) = state {
        manager.inherit(state, fds);
    }
    let thread =
        std::thread::Builder::new().name("manager".to_owned()).spawn(move || manager.run())?;
    Ok((sender, thread))
}

struct Manager {
    started: Instant,
    queue: Receiver<ToManager>,
    handles: ProcessHandles,
    set_log_level: SetLogLevel,
    changes: Arc<Changes>,
    clock: ClockWatch,
    confinement: Vec<Confinement>,
    /// `None` before the first snapshot.
    active: Option<Active>,
}

impl Manager {
    fn run(mut self) {
        // The first use of a thread's generator gathers entropy for a fifth of a second: now, rather
        // than in the first handshake.
        random(&mut [0; 32]);
        loop {
            let mut message = match self.timeout() {
                Some(timeout) => match self.queue.recv_timeout(timeout) {
                    Ok(message) => Some(message),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                },
                None => match self.queue.recv() {
                    Ok(message) => Some(message),
                    Err(_) => return,
                },
            };
            let now = clock();
            if self.clock.has_jumped(now) {
                self.end_sessions(now, "the wall clock has jumped ahead");
            }
            // What came together leads to one publication, however many sessions it makes.
            for _ in 0..MAX_BATCH {
                let Some(taken) = message else { break };
                if self.handle(now, taken).is_break() {
                    return;
                }
                message = self.queue.try_recv().ok();
            }
            if let Some(taken) = message
                && self.handle(now, taken).is_break()
            {
                return;
            }
            if let Some(active) = &mut self.active {
                active.drive(now);
                if std::mem::take(&mut active.reduced_paths_changed) {
                    self.changes.raise();
                }
            }
        }
    }

    /// Deals with one message; breaks where the process is to end.
    fn handle(&mut self, now: Time, message: ToManager) -> ControlFlow<()> {
        if let ToManager::Request { request, answer } = message {
            let shutdown = matches!(request, Request::Shutdown);
            let response = self.request(now, request);
            // The asker may have gone; what it asked for is done all the same.
            let _ = answer.send(response);
            return if shutdown { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        }
        if let ToManager::HandOver { connection, answer } = message {
            // It works on where it cannot be given away.
            let _ = answer.send(self.hand_over(&connection));
            return ControlFlow::Continue(());
        }
        if let ToManager::EndSessions { reason } = message {
            self.end_sessions(now, reason);
            return ControlFlow::Continue(());
        }
        let Some(active) = &mut self.active else { return ControlFlow::Continue(()) };
        if let ToManager::TunGone { generation } = message
            && generation == active.running.generation
            && active.has_device()
        {
            tracing::error!(
                "a queue of the TUN device failed though the device is there: ending, to begin anew"
            );
            return ControlFlow::Break(());
        }
        active.handle(now, message, &self.handles.tap);
        ControlFlow::Continue(())
    }

    fn timeout(&self) -> Option<Duration> {
        let active = self.active.as_ref()?;
        let due = active.engine.poll_timeout();
        let due = due.map(|due| due.mono.saturating_sub(clock().mono));
        let sweep = active.has_retired_tables.then_some(RETIRED_TABLES_INTERVAL);
        due.into_iter().chain(sweep).chain([CLOCK_INTERVAL]).min()
    }

    /// Ends all sessions: a clone of this machine may continue with the same keys and counters.
    fn end_sessions(&mut self, now: Time, reason: &str) {
        let Some(active) = &mut self.active else { return };
        tracing::warn!(reason, "ending all sessions");
        active.engine.end_sessions(now);
    }

    fn request(&mut self, now: Time, request: Request) -> Response {
        let result = match request {
            Request::Hello { version } if version == skein_ipc::PROTOCOL_VERSION => {
                let node = self.active.as_ref().map(Active::identity);
                let pid = std::process::id();
                return Response::Hello { version, pid, node, accepts_seen_handshakes: true };
            }
            Request::Hello { version } => Err(SetupError::Invalid(format!(
                "protocol version {version} is not {}: agent and data plane must be of one release",
                skein_ipc::PROTOCOL_VERSION
            ))),
            Request::Apply { snapshot } => {
                self.apply(now, *snapshot).inspect(|update| self.update_keeper(*update)).map(drop)
            }
            Request::Update { update } => match &mut self.active {
                Some(active) => active
                    .update(now, update)
                    .inspect(|()| self.update_keeper(KeeperUpdate::Snapshot)),
                None => Err(SetupError::Invalid("an update came before any snapshot".to_owned())),
            },
            Request::LogLevel { level } => {
                (self.set_log_level)(level.as_deref()).map_err(SetupError::Invalid)
            }
            // The server makes another message of it.
            Request::TakeOver { .. } => {
                let text = format!("what is handed over here has format {HANDOVER_VERSION}");
                Err(SetupError::Invalid(text))
            }
            Request::Report { peers } => {
                let report = self.report(now, peers);
                return Response::Report { report: Box::new(report) };
            }
            Request::SeenHandshakes => {
                let seen = self.active.as_ref().map(Active::seen_handshakes).unwrap_or_default();
                return Response::SeenHandshakes { seen };
            }
            // The connection's thread has it: whoever watches does not burden the manager.
            Request::Capture { .. } | Request::Changes { .. } => {
                Err(SetupError::Invalid("not the manager's".to_owned()))
            }
            Request::Shutdown => Ok(()),
        };
        match result {
            Ok(()) => Response::Applied {
                revision: self.active.as_ref().map_or(0, |active| active.snapshot.revision),
            },
            Err(error) => {
                tracing::error!(%error, "request refused");
                Response::Error { kind: error.kind(), message: error.to_string() }
            }
        }
    }

    fn apply(&mut self, now: Time, snapshot: Snapshot) -> Result<KeeperUpdate, SetupError> {
        match &mut self.active {
            Some(active) => active.apply(now, snapshot),
            None => {
                let store = self.handles.keeper.as_ref().and_then(|_| {
                    let made = MemfdStore::create();
                    made.inspect_err(
                        |error| tracing::warn!(%error, "sessions end with this process"),
                    )
                    .ok()
                });
                let open = |node: &NodeSettings, published: &_| {
                    Running::open(node, published, &self.handles)
                };
                self.active = Some(Active::start(now, snapshot, store, Vec::new(), open)?);
                Ok(KeeperUpdate::All)
            }
        }
    }

    /// Goes on where the process before has state off; where that cannot be, begins anew.
    fn inherit(&mut self, state: HandOver, fds: InheritedFds) {
        let InheritedFds { snapshot, sessions, queues, sockets } = fds;
        let begun = Instant::now();
        let inherit = || -> anyhow::Result<Active> {
            let snapshot = handover::read_snapshot(snapshot).context("the snapshot")?;
            let (store, sessions) = MemfdStore::open(sessions).context("the sessions")?;
            let open = |node: &NodeSettings, published: &_| {
                Running::from_inherited(node, state, queues, sockets, published, &self.handles)
            };
            Ok(Active::start(clock(), snapshot, Some(store), sessions, open)?)
        };
        match inherit() {
            Ok(active) => {
                let sessions =
                    active.engine.tables().map(|(_, view)| view.receive.len()).sum::<usize>();
                let ms = begun.elapsed().as_secs_f64() * 1e3;
                tracing::info!(sessions, ms, "goes on with what the data process before has state");
                self.active = Some(active);
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "cannot go on with what the data process before has state");
                // Its copies would keep the device and the port in use.
                let keeper = self.handles.keeper.as_ref();
                let forgotten = keeper.map(|keeper| keeper.notify(&ToKeeper::Forget, &[]));
                if let Some(Err(error)) = forgotten {
                    tracing::error!(%error, "the keeper is gone");
                }
            }
        }
    }

    /// Gives the keeper what has changed.
    fn update_keeper(&mut self, update: KeeperUpdate) {
        let (Some(keeper), Some(active)) = (&self.handles.keeper, &self.active) else { return };
        let Some(store) = &active.store else { return };
        let send = || -> std::io::Result<()> {
            let snapshot = handover::write_sealed_snapshot(&active.snapshot())?;
            match update {
                KeeperUpdate::Snapshot => keeper.notify(&ToKeeper::Snapshot, &[snapshot.as_fd()]),
                KeeperUpdate::All => {
                    let (state, more) = active.running.hand_over_state(&active.snapshot.node);
                    let mut all = vec![snapshot.as_fd(), store.file()];
                    all.extend(more);
                    keeper.notify(&ToKeeper::Store { state }, &all)
                }
            }
        };
        if let Err(error) = send() {
            tracing::error!(%error, "the next data process will begin anew");
        }
    }

    /// Stops the lanes and has the keeper give all away: it then ends this process. Returns why not.
    fn hand_over(&mut self, connection: &UnixStream) -> Response {
        let refused = |message: &str| Response::Error {
            kind: ErrorKind::Invalid,
            message: message.to_owned(),
        };
        let (Some(keeper), Some(active)) = (&self.handles.keeper, &mut self.active) else {
            return refused("there is nothing to take over yet");
        };
        if active.store.is_none() {
            return refused("its sessions end with it");
        }
        active.running.stop();
        active.running.stop_ecn_reports();
        match keeper.notify(&ToKeeper::HandOver, &[connection.as_fd()]) {
            // Whoever kills this process is on the way, also where nobody takes it over.
            Ok(()) => loop {
                std::thread::park();
            },
            Err(error) => {
                tracing::error!(%error, "the keeper is gone: ending, to begin anew");
                std::process::exit(1);
            }
        }
    }

    fn report(&self, now: Time, peers: bool) -> skein_ipc::Report {
        let mut report = skein_ipc::Report {
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            confinement: self.confinement.clone(),
            ..Default::default()
        };
        if let Some(active) = &self.active {
            report.revision = active.snapshot.revision;
            report.tun = Some(active.snapshot.node.tun.name.clone());
            let sources = report::Sources {
                engine: &active.engine,
                running: &active.running,
                drops: &active.drops,
                totals: &active.totals,
            };
            report::fill(&mut report, now, &sources, active.peers.values(), peers);
        }
        report
    }
}
