//! Supervisor of the data process: starts or adopts it, applies the desired state, and restarts it
//! after an exit.

mod process;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use skein_ipc::{ErrorKind, Request, Snapshot};
use tokio::process::Child;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, sleep};

use super::client::{Client, ClientError};
use super::clock::{WallClockFloor, wall};
use super::dataplane::DataplaneState;
use super::desired::difference;
use super::handshakes::HandshakeTimes;
use crate::config::{Config, Mode};
use crate::failure::Failure;
use crate::lifecycle::{NotReady, Readiness};
use crate::logging::Log;

/// Maximum time of a data process from its start until it listens, and from a shutdown request
/// until it exits.
const START_STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval between two attempts to connect to a data process that does not listen yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// Interval between two heartbeats: requests for a report of the data process.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Interval between requests for the handshakes' timestamps, which are then written to the disk.
const HANDSHAKES_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of restarts of a data process that never applied a snapshot. The start of the
/// agent fails at the next failure.
const MAX_FIRST_RESTARTS: u32 = 2;
/// Minimum time in the desired state after which a data process is restarted without a delay.
const MIN_UPTIME: Duration = Duration::from_secs(5);
/// Maximum delay before a restart; the delay doubles with each failure.
const MAX_RESTART_DELAY: Duration = Duration::from_secs(5);

/// Settings of the supervisor.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Socket of the data process.
    pub socket: PathBuf,
    /// Mode of the data process: the supervisor starts the data process (`spawn`) or another
    /// program does (`external`).
    pub mode: Mode,
    /// Log level and format of a data process that the supervisor starts.
    pub log: Log,
    /// File of the latest known wall-clock time.
    pub clock: PathBuf,
    /// File of the times of the peers' handshakes.
    pub handshakes: PathBuf,
    /// True to confine the data process to the system calls and files that it needs.
    pub seccomp: bool,
    /// True to refuse a data process that is not confined.
    pub require_confinement: bool,
}

impl Settings {
    /// Returns the settings that follow from the configuration.
    pub fn new(config: &Config) -> Self {
        let dataplane = &config.dataplane;
        Self {
            socket: dataplane.socket.clone(),
            mode: dataplane.mode,
            log: config.log.clone(),
            clock: config.state_dir.join(super::clock::FILE),
            handshakes: config.state_dir.join(super::handshakes::FILE),
            seccomp: dataplane.seccomp,
            require_confinement: dataplane.require_confinement,
        }
    }
}

/// Treatment of the data process at the supervisor's shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownMode {
    /// The data process keeps running.
    Keep,
    /// The data process is stopped if `dataplane.mode` is `spawn`.
    Stop,
    /// The data process is stopped only if this supervisor has started it.
    StopOwn,
}

/// Handle of a running supervisor. If it is dropped without [`Handle::end`], the supervisor ends
/// and the data process keeps running.
#[derive(Debug)]
pub struct Handle {
    end: oneshot::Sender<ShutdownMode>,
    task: tokio::task::JoinHandle<()>,
}

impl Handle {
    /// Ends the supervisor, treats the data process according to `end`, and waits until that is
    /// done.
    pub async fn end(self, end: ShutdownMode) {
        // An error means that the task has ended already.
        let _ = self.end.send(end);
        let _ = self.task.await;
    }
}

/// Handle and first outcome of a supervisor that [`start`] has started.
#[derive(Debug)]
pub struct Supervision {
    /// Handle of the supervisor.
    pub handle: Handle,
    /// Receiver of the outcome of the first snapshot. A failure is final.
    pub first: oneshot::Receiver<Result<(), Failure>>,
}

/// Starts the supervisor in a task.
///
/// The supervisor applies the current value of `snapshots`, and each later value, to the data
/// process. The caller waits for `Supervision::first` before it depends on the data process, and
/// ends the supervisor with [`Handle::end`]. The sender of `snapshots` must live until then.
/// `state` shows the data process; `readiness` is blocked while no data process is in the desired
/// state.
pub fn start(
    settings: Settings,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    state: DataplaneState,
    readiness: Readiness,
) -> Supervision {
    let (first, first_result) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let not_ready = Some(readiness.block("the data process is not connected yet"));
    let clock = WallClockFloor::load(settings.clock.clone());
    let handshakes = HandshakeTimes::load(settings.handshakes.clone());
    let supervisor = Supervisor {
        settings,
        snapshots,
        state,
        readiness,
        not_ready,
        first: Some(first),
        child: None,
        last_pid: None,
        applied_since: None,
        clock,
        handshakes,
    };
    let task = tokio::spawn(supervisor.run(ended));
    Supervision { handle: Handle { end, task }, first: first_result }
}

struct Supervisor {
    settings: Settings,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    state: DataplaneState,
    readiness: Readiness,
    not_ready: Option<NotReady>,
    /// Taken when the first snapshot has been applied or refused.
    first: Option<oneshot::Sender<Result<(), Failure>>>,
    child: Option<Child>,
    /// Process ID of the data process that was last in the desired state, to count restarts.
    last_pid: Option<u32>,
    /// Time since which this session's data process has been in the desired state.
    applied_since: Option<Instant>,
    clock: WallClockFloor,
    handshakes: HandshakeTimes,
}

/// Connection to the data process.
struct Connection {
    client: Client,
    /// True if this supervisor has not started the data process.
    adopted: bool,
}

/// Cause of the end of a session with a data process.
enum SessionEnd {
    /// The process has exited or hangs.
    Gone(String),
    /// The process refused a request.
    Refused { kind: ErrorKind, message: String },
    /// The process was stopped, because it could not change its settings or did not respond. The
    /// next session starts another one.
    Replaced,
    /// The process works for another node.
    WrongNode(String),
}

impl From<ClientError> for SessionEnd {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused { kind, message } => SessionEnd::Refused { kind, message },
            error => SessionEnd::Gone(error.to_string()),
        }
    }
}

impl Supervisor {
    async fn run(mut self, mut ended: oneshot::Receiver<ShutdownMode>) {
        let mut failures = 0u32;
        loop {
            self.applied_since = None;
            let why = tokio::select! {
                why = self.session() => why,
                end = &mut ended => return self.end(end.unwrap_or(ShutdownMode::Keep)).await,
            };
            if self.applied_since.is_some_and(|since| since.elapsed() > MIN_UPTIME) {
                failures = 0;
            }
            if let SessionEnd::WrongNode(message) = &why
                && let Some(first) = self.first.take()
            {
                let _ = first.send(Err(Failure::InUse(message.clone())));
            }
            if let SessionEnd::Refused { kind, message } = &why
                && let Some(first) = self.first.take()
            {
                // The receiver ends this supervisor after a failure.
                let _ = first.send(Err(failure(*kind, message.clone())));
            }
            if let SessionEnd::Gone(error) = &why
                && self.settings.mode == Mode::Spawn
                && failures >= MAX_FIRST_RESTARTS
                && let Some(first) = self.first.take()
            {
                let _ = first
                    .send(Err(anyhow::anyhow!("the data process did not start: {error}").into()));
            }
            self.on_session_end(&why);
            let pause = match failures {
                0 => Duration::ZERO,
                n => (RETRY_INTERVAL * 2u32.saturating_pow(n)).min(MAX_RESTART_DELAY),
            };
            failures += 1;
            tokio::select! {
                () = sleep(pause) => {}
                end = &mut ended => return self.end(end.unwrap_or(ShutdownMode::Keep)).await,
            }
        }
    }

    fn on_session_end(&mut self, why: &SessionEnd) {
        let reason = match why {
            SessionEnd::Replaced => "the data process is being replaced".to_owned(),
            SessionEnd::Gone(error) => format!("no connection to the data process: {error}"),
            SessionEnd::WrongNode(error) => error.clone(),
            SessionEnd::Refused { message: error, .. } => {
                format!("the data process refuses the desired state: {error}")
            }
        };
        let waiting = self.settings.mode == Mode::External && self.last_pid.is_none();
        match why {
            SessionEnd::Replaced => tracing::info!("{reason}"),
            SessionEnd::Gone(_) if waiting => tracing::debug!("{reason}"),
            _ => tracing::error!("{reason}"),
        }
        match &self.not_ready {
            Some(guard) => guard.because(&reason),
            None => self.not_ready = Some(self.readiness.block(&reason)),
        }
        self.state.set(|status| {
            status.up = false;
            status.pid = None;
            status.error = Some(reason);
        });
    }

    /// Connects to the data process, applies the desired state, and follows its changes. Returns
    /// the cause of the session's end.
    async fn session(&mut self) -> SessionEnd {
        let Connection { mut client, adopted } = match self.connect().await {
            Ok(connected) => connected,
            Err(end) => return end,
        };
        if self.settings.require_confinement {
            let missing = match client.report(false).await {
                Ok(report) => report.unconfined(),
                Err(error) => return error.into(),
            };
            if let Some(missing) = missing {
                let reason = format!(
                    "dataplane.require_confinement is true, but the data process is not confined: \
                     {missing}"
                );
                if !adopted || self.settings.mode == Mode::External {
                    return SessionEnd::Refused { kind: ErrorKind::Missing, message: reason };
                }
                tracing::warn!("{reason}");
                self.stop_process(client).await;
                return SessionEnd::Replaced;
            }
        }
        let mut applied = Arc::clone(&self.snapshots.borrow_and_update());
        let request = self.apply(&client, &applied);
        match client.apply(&request).await {
            Ok(revision) => self.on_applied(&client, revision),
            // The settings need a new process; after the stop the next session starts one.
            Err(ClientError::Refused { kind: ErrorKind::RestartRequired, message }) if adopted => {
                tracing::info!(reason = message, "replacing the running data process");
                self.stop_process(client).await;
                return SessionEnd::Replaced;
            }
            Err(error) => return error.into(),
        }
        let mut handshakes = tokio::time::interval(HANDSHAKES_INTERVAL);
        handshakes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heartbeat = tokio::time::interval(HEARTBEAT_INTERVAL);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let report_wanted = Arc::clone(&self.state.report_wanted);
        loop {
            tokio::select! {
                _ = heartbeat.tick() => {
                    self.clock.update(wall());
                    match client.report(false).await {
                        Ok(report) => self.state.on_report(report),
                        Err(error) => return error.into(),
                    }
                }
                _ = handshakes.tick(), if client.accepts_seen_handshakes() => {
                    match client.seen_handshakes().await {
                        Ok(seen) => self.handshakes.update(seen).await,
                        Err(error) => return error.into(),
                    }
                }
                () = report_wanted.notified() => match client.report(false).await {
                    Ok(report) => self.state.on_report(report),
                    Err(error) => return error.into(),
                },
                changed = self.snapshots.changed() => {
                    if changed.is_err() {
                        // The controller has ended; the shutdown mode comes through `ended`.
                        std::future::pending::<()>().await;
                    }
                    let wanted = Arc::clone(&self.snapshots.borrow_and_update());
                    if let Err(end) = self.follow(&mut client, &mut applied, wanted).await {
                        return end;
                    }
                }
                () = client.closed() => return self.on_connection_closed(),
            }
        }
    }

    /// Records that the data process has applied the first snapshot of this session.
    fn on_applied(&mut self, client: &Client, revision: u64) {
        let pid = client.pid();
        let restarted = self.last_pid.is_some() && self.last_pid != pid;
        self.last_pid = pid.or(self.last_pid);
        self.applied_since = Some(Instant::now());
        self.state.set(|status| {
            status.up = true;
            status.pid = pid;
            status.restarts += u64::from(restarted);
            status.revision = revision;
            status.error = None;
        });
        tracing::info!(pid, revision, "data process in desired state");
        self.not_ready = None;
        if let Some(first) = self.first.take() {
            // The receiver is dropped if the agent is already stopping.
            let _ = first.send(Ok(()));
        }
    }

    /// Returns the request to apply a whole snapshot. It contains the lower bound of the wall
    /// clock, because a restarted data process must not repeat handshake timestamps, and the latest
    /// timestamps of the peers, because it must not accept them again.
    fn apply(&mut self, client: &Client, snapshot: &Snapshot) -> Request {
        let not_before = self.clock.floor(wall());
        let seen_handshakes = match client.accepts_seen_handshakes() {
            true => self.handshakes.seen().clone(),
            false => Default::default(),
        };
        let snapshot = Snapshot { not_before, seen_handshakes, ..snapshot.clone() };
        Request::Apply { snapshot: Box::new(snapshot) }
    }

    /// Applies the difference between `applied` and `wanted`. If the data process refuses an
    /// update, the whole snapshot is sent.
    async fn follow(
        &mut self,
        client: &mut Client,
        applied: &mut Arc<Snapshot>,
        wanted: Arc<Snapshot>,
    ) -> Result<(), SessionEnd> {
        let Some(request) = difference(applied, &wanted) else {
            let revision = wanted.revision;
            *applied = wanted;
            self.state.set(|status| status.revision = revision);
            return Ok(());
        };
        let revision = match client.apply(&request).await {
            Err(ClientError::Refused { message, .. })
                if matches!(request, Request::Update { .. }) =>
            {
                tracing::warn!(reason = message, "update refused, sending the whole snapshot");
                let request = self.apply(client, &wanted);
                client.apply(&request).await?
            }
            other => other?,
        };
        tracing::info!(revision, peers = wanted.peers.len(), "change applied");
        *applied = wanted;
        self.state.set(|status| status.revision = revision);
        Ok(())
    }

    /// Refuses a data process that works for another node. A data process with this node's name or
    /// key is accepted, because the key or the name may have changed since its start.
    fn check_identity(&self, client: &Client) -> Result<(), SessionEnd> {
        let Some(found) = client.node() else { return Ok(()) };
        let snapshot = self.snapshots.borrow();
        let same_key = || snapshot.node.private_key.public().is_ok_and(|k| k == found.public_key);
        if found.name == snapshot.node.name || same_key() {
            return Ok(());
        }
        Err(SessionEnd::WrongNode(format!(
            "the data process at {} works for the node {:?} (public key {}). Give each agent of a host \
             its own dataplane.socket.",
            self.settings.socket.display(),
            found.name,
            found.public_key
        )))
    }
}

/// Returns the failure of the agent after a refusal of the first snapshot.
fn failure(kind: ErrorKind, message: String) -> Failure {
    match kind {
        ErrorKind::Invalid | ErrorKind::RestartRequired => Failure::Usage(message),
        ErrorKind::Missing => Failure::Missing(message),
        ErrorKind::InUse => Failure::InUse(message),
        ErrorKind::Privilege => Failure::Privilege(message),
        ErrorKind::Internal => Failure::Runtime(anyhow::anyhow!(message)),
    }
}

#[cfg(test)]
mod tests;
