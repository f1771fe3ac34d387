//! Start, adoption and stop of the data process.

use std::process::Stdio;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use skein_ipc::Request;
use skein_sys::socket::is_trusted;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::{Connection, RETRY_INTERVAL, START_STOP_TIMEOUT, SessionEnd, ShutdownMode, Supervisor};
use crate::config::Mode;
use crate::control::client::{Client, ClientError};

impl Supervisor {
    /// Connects to the data process that listens, or starts one.
    ///
    /// # Errors
    /// [`SessionEnd`] if no data process listens within [`START_STOP_TIMEOUT`], if a started one
    /// exits, or if the one that listens belongs to another node or had to be killed.
    pub(super) async fn connect(&mut self) -> Result<Connection, SessionEnd> {
        let deadline = Instant::now() + START_STOP_TIMEOUT;
        loop {
            let error = match Client::connect(&self.settings.socket).await {
                Ok(client) => {
                    self.check_identity(&client)?;
                    let own = self.child.as_ref().and_then(Child::id);
                    return Ok(Connection { client, adopted: own.is_none() });
                }
                // The data process is of another release, or it hangs.
                Err(error @ (ClientError::Refused { .. } | ClientError::Timeout)) => {
                    return Err(self.kill_unresponsive(error).await);
                }
                Err(error) => error.to_string(),
            };
            if self.settings.mode == Mode::Spawn {
                match &mut self.child {
                    None => self.child = Some(self.spawn()?),
                    Some(child) => {
                        if let Ok(Some(status)) = child.try_wait() {
                            self.child = None;
                            return Err(SessionEnd::Gone(format!(
                                "it exited at its start: {status}"
                            )));
                        }
                    }
                }
            }
            if Instant::now() > deadline {
                if let Some(mut child) = self.child.take() {
                    // The process hangs and does not listen, so that it cannot be asked to exit.
                    let _ = child.kill().await;
                }
                return Err(SessionEnd::Gone(error));
            }
            sleep(match self.settings.mode {
                Mode::Spawn => RETRY_INTERVAL,
                Mode::External => RETRY_INTERVAL * 10,
            })
            .await;
        }
    }

    /// Kills the data process that listens but does not respond or speaks another protocol, so that
    /// another one can start. An external data process is left running.
    async fn kill_unresponsive(&mut self, error: ClientError) -> SessionEnd {
        if self.settings.mode == Mode::External {
            return error.into();
        }
        tracing::warn!(%error, "killing unresponsive data process");
        let stream = tokio::net::UnixStream::connect(&self.settings.socket).await;
        let peer = stream.and_then(|stream| stream.peer_cred()).ok();
        let pid = peer.filter(|peer| is_trusted(peer.uid())).and_then(|peer| peer.pid());
        match (pid.and_then(Pid::from_raw), &mut self.child) {
            // The keeper of the data process, if there is one, restarts it.
            (Some(pid), _) => kill(pid, Signal::KILL),
            (None, Some(child)) => {
                // `kill` fails only if the process has already exited.
                let _ = child.kill().await;
                self.child = None;
            }
            (None, None) => return error.into(),
        }
        sleep(RETRY_INTERVAL).await;
        SessionEnd::Replaced
    }

    fn spawn(&self) -> Result<Child, SessionEnd> {
        let start = || {
            let log = &self.settings.log;
            let program = std::env::current_exe()?;
            // After an upgrade in place the path holds the next release, or nothing.
            let program = if program.exists() { program } else { "/proc/self/exe".into() };
            Command::new(program)
                .arg0("skein-agent")
                .args(["dataplane", "--log-level", &log.level, "--log-format", log.format.name()])
                .arg("--socket")
                .arg(&self.settings.socket)
                .args((!self.settings.seccomp).then_some("--no-seccomp"))
                .args(self.settings.require_confinement.then_some("--require-confinement"))
                .stdin(Stdio::null())
                // Ctrl-C must reach only the control process, which decides whether the data
                // process stops.
                .process_group(0)
                .spawn()
        };
        let child = start()
            .map_err(|error| SessionEnd::Gone(format!("cannot start the data process: {error}")))?;
        tracing::info!(pid = child.id(), "started a data process");
        Ok(child)
    }

    /// Returns the cause of a closed connection. The child is the keeper: while it runs, it
    /// replaces a data process that has exited.
    pub(super) fn on_connection_closed(&mut self) -> SessionEnd {
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) => {
                self.child = None;
                SessionEnd::Gone(format!("it exited: {status}"))
            }
            _ => SessionEnd::Gone("it closed the connection".to_owned()),
        }
    }

    /// Stops the data process, or leaves it running, according to `end`.
    pub(super) async fn end(mut self, end: ShutdownMode) {
        let own = self.child.is_some();
        let stop = match end {
            ShutdownMode::Keep => false,
            ShutdownMode::Stop => self.settings.mode == Mode::Spawn,
            ShutdownMode::StopOwn => own,
        };
        if !stop {
            return;
        }
        // A new connection, because a request may be outstanding on the session's one.
        match Client::connect(&self.settings.socket).await {
            Ok(client) if self.check_identity(&client).is_ok() => self.stop_process(client).await,
            // A data process of another node keeps running.
            Ok(_) => {}
            Err(_) => {
                if let Some(mut child) = self.child.take() {
                    let _ = child.kill().await;
                }
            }
        }
    }

    /// Requests the shutdown of the data process, waits for its exit, and kills it after
    /// [`START_STOP_TIMEOUT`]. The latest handshake times are stored before.
    pub(super) async fn stop_process(&mut self, mut client: Client) {
        let pid = client.pid().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let polite = async {
            if client.accepts_seen_handshakes()
                && let Ok(seen) = client.seen_handshakes().await
            {
                self.handshakes.update(seen).await;
            }
            // The request fails if the process exits before it has answered.
            let _ = client.request(&Request::Shutdown).await;
            client.closed().await;
            if let Some(child) = &mut self.child {
                let _ = child.wait().await;
            }
        };
        if tokio::time::timeout(START_STOP_TIMEOUT, polite).await.is_err() {
            tracing::warn!("data process does not exit, killing it");
            if let Some(child) = &mut self.child {
                let _ = child.kill().await;
            } else if let Some(pid) = pid {
                kill(pid, Signal::KILL);
                // The keeper starts another data process, which then gets the shutdown request.
                let again = async {
                    loop {
                        if let Ok(mut client) = Client::connect(&self.settings.socket).await {
                            let _ = client.request(&Request::Shutdown).await;
                            return client.closed().await;
                        }
                        sleep(RETRY_INTERVAL).await;
                    }
                };
                let _ = tokio::time::timeout(START_STOP_TIMEOUT, again).await;
            }
        }
        self.child = None;
    }
}

/// Sends a signal to a process that is not a child, if the process still exists.
fn kill(pid: Pid, signal: Signal) {
    let result = pidfd_open(pid, PidfdFlags::empty()).and_then(|fd| pidfd_send_signal(fd, signal));
    if let Err(error) = result {
        tracing::debug!(?pid, %error, "cannot signal the data process");
    }
}
