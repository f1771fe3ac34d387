//! Keeps a data process at work: starts or adopts it, brings it to the wanted state, starts it
//! again at once when it dies.

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

/// How long a data process may take to listen after its start, and to end when asked.
const START_STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a socket that nobody listens on is tried.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// A data process is asked for a sign of life this often.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Interval between requests for the handshakes' timestamps, which are then written to the disk.
const HANDSHAKES_INTERVAL: Duration = Duration::from_secs(60);
/// So many failed restarts of the first data process end the agent.
const MAX_FIRST_RESTARTS: u32 = 2;
/// A data process that was in the wanted state for this long is started again at once.
const MIN_UPTIME: Duration = Duration::from_secs(5);
/// Longest pause before a restart.
const MAX_RESTART_DELAY: Duration = Duration::from_secs(5);

/// What the supervisor needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The data process's socket.
    pub socket: PathBuf,
    /// Who starts it.
    pub mode: Mode,
    /// How it logs.
    pub log: Log,
    /// Where the time is kept.
    pub clock: PathBuf,
    /// File of the times of the peers' handshakes.
    pub handshakes: PathBuf,
    /// Whether it is confined to the system calls and files that it needs.
    pub seccomp: bool,
    /// Whether a data process that is not confined is refused.
    pub require_confinement: bool,
}

impl Settings {
    /// The part of the configuration that matters here.
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

/// What becomes of the data process when the supervisor ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownMode {
    /// It goes on.
    Keep,
    /// It ends, if it is the control process's to end.
    Stop,
    /// It ends if this supervisor has started it; one that was there before goes on.
    StopOwn,
}

/// A running supervisor.
#[derive(Debug)]
pub struct Handle {
    end: oneshot::Sender<ShutdownMode>,
    task: tokio::task::JoinHandle<()>,
}

impl Handle {
    /// Ends it, and the data process as `end` says.
    pub async fn end(self, end: ShutdownMode) {
        // An error means that the task has ended already.
        let _ = self.end.send(end);
        let _ = self.task.await;
    }
}

/// Supervision that has begun.
#[derive(Debug)]
pub struct Supervision {
    /// Handle of the supervisor.
    pub handle: Handle,
    /// Receiver of the outcome of the first snapshot. A failure is final.
    pub first: oneshot::Receiver<Result<(), Failure>>,
}

/// Starts supervision.
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
    /// Of the data process that was last in the wanted state; to count restarts.
    last_pid: Option<u32>,
    /// Since when this session's data process has been in the wanted state.
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

/// Why a session with a data process has ended.
enum SessionEnd {
    /// The process has gone or hangs.
    Gone(String),
    /// It refused what it was asked.
    Refused { kind: ErrorKind, message: String },
    /// It works with settings that it cannot change: another takes its place.
    Replaced,
    /// It works for another node.
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
                let _ = first.send(Err(Failure::Taken(message.clone())));
            }
            if let SessionEnd::Refused { kind, message } = &why
                && let Some(first) = self.first.take()
            {
                // The receiver ends this supervisor then.
                let _ = first.send(Err(failure(*kind, message.clone())));
            }
            if let SessionEnd::Gone(error) = &why
                && self.settings.mode == Mode::Spawn
                && failures >= MAX_FIRST_RESTARTS
                && let Some(first) = self.first.take()
            {
                let _ = first
                    .send(Err(anyhow::anyhow!("the data process does not start: {error}").into()));
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
            SessionEnd::Gone(error) => format!("the data process is away: {error}"),
            SessionEnd::WrongNode(error) => error.clone(),
            SessionEnd::Refused { message: error, .. } => {
                format!("the data process refuses the wanted state: {error}")
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

    /// Connects, brings the data process to the wanted state, keeps it there; returns when that
    /// has ended.
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
            // Whoever has started it starts another, which takes any settings.
            Err(ClientError::Refused { kind: ErrorKind::RestartRequired, message }) if adopted => {
                tracing::info!(message, "the data process that was found cannot go on");
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
                        // The controller has ended; what becomes of us comes over `ended`.
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
        tracing::info!(pid, revision, "the data process is in the wanted state");
        self.not_ready = None;
        if let Some(first) = self.first.take() {
            // Nobody waits any more where the agent is ending.
            let _ = first.send(Ok(()));
        }
    }

    /// Asks for the whole of a snapshot. A data process that begins anew with a clock set back must not
    /// repeat times that its peers have seen, and must know those that it has seen itself.
    fn apply(&mut self, client: &Client, snapshot: &Snapshot) -> Request {
        let not_before = self.clock.floor(wall());
        let seen_handshakes = match client.accepts_seen_handshakes() {
            true => self.handshakes.seen().clone(),
            false => Default::default(),
        };
        let snapshot = Snapshot { not_before, seen_handshakes, ..snapshot.clone() };
        Request::Apply { snapshot: Box::new(snapshot) }
    }

    /// Brings the data process from `applied` to `wanted`.
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
                tracing::warn!(message, "update refused: sending the whole snapshot");
                let request = self.apply(client, &wanted);
                client.apply(&request).await?
            }
            other => other?,
        };
        tracing::info!(revision, peers = wanted.peers.len(), "change is in force");
        *applied = wanted;
        self.state.set(|status| status.revision = revision);
        Ok(())
    }

    /// Refuses a data process that works for another node. One that has this node's name or key is
    /// this node's: of before its key was changed, or its name.
    fn check_identity(&self, client: &Client) -> Result<(), SessionEnd> {
        let Some(found) = client.node() else { return Ok(()) };
        let snapshot = self.snapshots.borrow();
        let same_key = || snapshot.node.private_key.public().is_ok_and(|k| k == found.public_key);
        if found.name == snapshot.node.name || same_key() {
            return Ok(());
        }
        Err(SessionEnd::WrongNode(format!(
            "the data process at {} works for the node {:?} (public key {}): give each agent of a \
             host its own dataplane.socket",
            self.settings.socket.display(),
            found.name,
            found.public_key
        )))
    }
}

/// The exit that a refusal of the first snapshot leads to.
fn failure(kind: ErrorKind, message: String) -> Failure {
    match kind {
        ErrorKind::Invalid | ErrorKind::RestartRequired => Failure::Usage(message),
        ErrorKind::Missing => Failure::Missing(message),
        ErrorKind::InUse => Failure::Taken(message),
        ErrorKind::Privilege => Failure::Privilege(message),
        ErrorKind::Internal => Failure::Runtime(anyhow::anyhow!(message)),
    }
}

#[cfg(test)]
mod tests;
