//! Session manager: one thread that owns the protocol engine. Lanes pass handshake and control
//! messages to the manager, and the manager publishes new tables for the lanes. The packet path
//! never waits for the manager.

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

/// Interval at which the manager checks whether lanes still use replaced tables.
const RETIRED_TABLES_INTERVAL: Duration = Duration::from_millis(100);
/// Interval at which the wall clock is compared with the boot clock.
const CLOCK_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of messages that are handled before the engine's results are published and sent.
const MAX_BATCH: usize = 32;

/// Function that sets the filter of this process's log. `None` restores the filter of the process's
/// start. The error contains the remedy.
pub type SetLogLevel = fn(Option<&str>) -> anyhow::Result<()>;

/// Starts the manager's thread. `state` is the state of the previous data process. The thread ends
/// after [`Request::Shutdown`], or when every sender of its queue is dropped.
///
/// # Errors
/// The kernel's error if the thread cannot be started.
pub(super) fn start(
    keeper: Option<Arc<KeeperChannel>>,
    state: Option<(HandOver, InheritedFds)>,
    set_log_level: SetLogLevel,
    tap: Arc<Tap>,
    changes: Arc<Changes>,
    confinement: Vec<Confinement>,
) -> std::io::Result<(ToManagerQueue, JoinHandle<()>)> {
    let (sender, receiver) = queue::channel();
    // Subscribe before sessions are restored, so that no later announcement is missed.
    if let Err(error) = Uevents::subscribe().and_then(|uevents| uevents.watch(sender.clone())) {
        tracing::warn!(%error, "cannot detect clones of this virtual machine by uevents");
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
    // Restore before the thread starts its first handshake.
    if let Some((state, fds)) = state {
        manager.inherit(state, fds);
    }
    let thread =
        std::thread::Builder::new().name("manager".to_owned()).spawn(move || manager.run())?;
    Ok((sender, thread))
}

/// State of the manager's thread.
struct Manager {
    started: Instant,
    queue: Receiver<ToManager>,
    handles: ProcessHandles,
    set_log_level: SetLogLevel,
    changes: Arc<Changes>,
    clock: ClockWatch,
    confinement: Vec<Confinement>,
    /// The data plane; `None` before the first snapshot.
    active: Option<Active>,
}

impl Manager {
    fn run(mut self) {
        // The first use of a thread's generator gathers entropy for about 200 ms. Do it before the
        // first handshake.
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
            // A batch of messages leads to one publication, however many sessions it creates.
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

    /// Handles one message. Breaks if the process must end.
    fn handle(&mut self, now: Time, message: ToManager) -> ControlFlow<()> {
        if let ToManager::Request { request, answer } = message {
            let shutdown = matches!(request, Request::Shutdown);
            let response = self.request(now, request);
            // If the client has disconnected, the request is carried out all the same.
            let _ = answer.send(response);
            return if shutdown { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        }
        if let ToManager::HandOver { connection, answer } = message {
            // `hand_over` returns only if the data plane cannot be handed over; the process
            // continues then.
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
            tracing::error!("TUN queue failed although the device exists, exiting");
            return ControlFlow::Break(());
        }
        active.handle(now, message, &self.handles.tap);
        ControlFlow::Continue(())
    }

    /// Returns the time until the next timer is due; `None` before the first snapshot.
    fn timeout(&self) -> Option<Duration> {
        let active = self.active.as_ref()?;
        let due = active.engine.poll_timeout();
        let due = due.map(|due| due.mono.saturating_sub(clock().mono));
        let sweep = active.has_retired_tables.then_some(RETIRED_TABLES_INTERVAL);
        due.into_iter().chain(sweep).chain([CLOCK_INTERVAL]).min()
    }

    /// Ends all sessions, because a clone of this virtual machine may continue with the same keys
    /// and counters.
    fn end_sessions(&mut self, now: Time, reason: &str) {
        let Some(active) = &mut self.active else { return };
        tracing::warn!(reason, "ending all sessions");
        active.engine.end_sessions(now);
    }

    /// Carries out a request of the control socket and returns its response.
    fn request(&mut self, now: Time, request: Request) -> Response {
        let result = match request {
            Request::Hello { version } if version == skein_ipc::PROTOCOL_VERSION => {
                let node = self.active.as_ref().map(Active::identity);
                let pid = std::process::id();
                return Response::Hello { version, pid, node, accepts_seen_handshakes: true };
            }
            Request::Hello { version } => Err(SetupError::Invalid(format!(
                "protocol version is {version}, expected {}. Run agent and data plane of the same \
                 release.",
                skein_ipc::PROTOCOL_VERSION
            ))),
            Request::Apply { snapshot } => {
                self.apply(now, *snapshot).inspect(|update| self.update_keeper(*update)).map(drop)
            }
            Request::Update { update } => match &mut self.active {
                Some(active) => active
                    .update(now, update)
                    .inspect(|()| self.update_keeper(KeeperUpdate::Snapshot)),
                None => Err(SetupError::Invalid(
                    "an update arrived before the first snapshot".to_owned(),
                )),
            },
            Request::LogLevel { level } => {
                let set = (self.set_log_level)(level.as_deref());
                set.map_err(|error| SetupError::Invalid(format!("{error:#}")))
            }
            // The server sends `ToManager::HandOver` for a request with `HANDOVER_VERSION`.
            Request::TakeOver { version } => Err(SetupError::Invalid(format!(
                "cannot hand over the data plane: the new keeper requests version {version}, this \
                 data process supports version {HANDOVER_VERSION}"
            ))),
            Request::Report { peers } => {
                let report = self.report(now, peers);
                return Response::Report { report: Box::new(report) };
            }
            Request::SeenHandshakes => {
                let seen = self.active.as_ref().map(Active::seen_handshakes).unwrap_or_default();
                return Response::SeenHandshakes { seen };
            }
            // The connection's thread serves these requests, so that they do not load the manager.
            Request::Capture { .. } | Request::Changes { .. } => Err(SetupError::Invalid(
                "the session manager does not serve this request".to_owned(),
            )),
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

    /// Applies a snapshot; the first one starts the data plane. Returns what the keeper must
    /// receive.
    ///
    /// # Errors
    /// [`SetupError`] of the start or the change.
    fn apply(&mut self, now: Time, snapshot: Snapshot) -> Result<KeeperUpdate, SetupError> {
        match &mut self.active {
            Some(active) => active.apply(now, snapshot),
            None => {
                let store = self.handles.keeper.as_ref().and_then(|_| {
                    let made = MemfdStore::create();
                    made.inspect_err(
                        |error| tracing::warn!(%error, "no session store: sessions end with this process"),
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

    /// Restores the data plane of the previous data process. If that fails, logs the error and has
    /// the keeper delete the stored state.
    fn inherit(&mut self, state: HandOver, fds: InheritedFds) {
        let InheritedFds { snapshot, sessions, queues, sockets } = fds;
        let begun = Instant::now();
        let inherit = || -> anyhow::Result<Active> {
            let snapshot = handover::read_snapshot(snapshot).context("cannot read the snapshot")?;
            let (store, sessions) =
                MemfdStore::open(sessions).context("cannot open the session store")?;
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
                tracing::info!(
                    sessions,
                    ms,
                    "sessions and sockets of the previous data process restored"
                );
                self.active = Some(active);
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "state of the previous data process not restored");
                // The keeper's copies of the descriptors would keep the device and the port in use.
                let keeper = self.handles.keeper.as_ref();
                let forgotten = keeper.map(|keeper| keeper.notify(&ToKeeper::Forget, &[]));
                if let Some(Err(error)) = forgotten {
                    tracing::error!(%error, "keeper does not answer");
                }
            }
        }
    }

    /// Sends the changed state to the keeper; logs an error.
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
            tracing::error!(%error, "cannot send state to the keeper: the next data process will lose the sessions");
        }
    }

    /// Stops the lanes and has the keeper hand over the data plane; the keeper then kills this
    /// process. Returns the reason if the data plane cannot be handed over.
    fn hand_over(&mut self, connection: &UnixStream) -> Response {
        let refused = |message: &str| Response::Error {
            kind: ErrorKind::Invalid,
            message: message.to_owned(),
        };
        let (Some(keeper), Some(active)) = (&self.handles.keeper, &mut self.active) else {
            return refused(
                "the data process has no settings yet, so there is no state to hand over",
            );
        };
        if active.store.is_none() {
            return refused(
                "the data process has no session store, so it cannot hand over its sessions",
            );
        }
        active.running.stop();
        active.running.stop_ecn_reports();
        match keeper.notify(&ToKeeper::HandOver, &[connection.as_fd()]) {
            // The keeper kills this process, even if the hand-over fails.
            Ok(()) => loop {
                std::thread::park();
            },
            Err(error) => {
                tracing::error!(%error, "keeper does not answer, exiting");
                std::process::exit(1);
            }
        }
    }

    /// Returns the report of the process; `peers` adds the state of each peer.
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
