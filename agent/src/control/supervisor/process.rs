//! The data process as a process: found, started, ended.

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
    /// Finds the data process that listens, or starts one.
    pub(super) async fn connect(&mut self) -> Result<Connection, SessionEnd> {
        let deadline = Instant::now() + START_STOP_TIMEOUT;
        loop {
            let error = match Client::connect(&self.settings.socket).await {
                Ok(client) => {
                    self.check_identity(&client)?;
                    let own = self.child.as_ref().and_then(Child::id);
                    return Ok(Connection { client, adopted: own.is_none() });
                }
                // Of another release, or it hangs.
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
                                "it ended at its start: {status}"
                            )));
                        }
                    }
                }
            }
            if Instant::now() > deadline {
                if let Some(mut child) = self.child.take() {
                    // It hangs before it listens; there is nobody to ask.
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

    /// Ends the data process that listens but cannot be talked to, so that one of ours can start.
    async fn kill_unresponsive(&mut self, error: ClientError) -> SessionEnd {
        if self.settings.mode == Mode::External {
            return error.into();
        }
        tracing::warn!(%error, "killing the data process that listens");
        let stream = tokio::net::UnixStream::connect(&self.settings.socket).await;
        let peer = stream.and_then(|stream| stream.peer_cred()).ok();
        let pid = peer.filter(|peer| is_trusted(peer.uid())).and_then(|peer| peer.pid());
        match (pid.and_then(Pid::from_raw), &mut self.child) {
            // Its keeper, if it has one, gives its work to another.
            (Some(pid), _) => kill(pid, Signal::KILL),
            (None, Some(child)) => {
                // It fails only where the process has ended already.
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
                // The terminal's Ctrl-C is for the control process, which decides what ends.
                .process_group(0)
                .spawn()
        };
        let child = start()
            .map_err(|error| SessionEnd::Gone(format!("cannot start the data process: {error}")))?;
        tracing::info!(pid = child.id(), "started a data process");
        Ok(child)
    }

    /// What was started is the keeper, which has begun to replace a data process that died.
    pub(super) fn on_connection_closed(&mut self) -> SessionEnd {
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) => {
                self.child = None;
                SessionEnd::Gone(format!("it ended: {status}"))
            }
            _ => SessionEnd::Gone("it closed its connection".to_owned()),
        }
    }

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
        // A connection of its own: the session's may be in the middle of a request.
        match Client::connect(&self.settings.socket).await {
            Ok(client) if self.check_identity(&client).is_ok() => self.stop_process(client).await,
            // Another node's is not ours to end.
            Ok(_) => {}
            Err(_) => {
                if let Some(mut child) = self.child.take() {
                    let _ = child.kill().await;
                }
            }
        }
    }

    /// Asks the data process to end, waits, and kills it when it does not.
    pub(super) async fn stop_process(&mut self, mut client: Client) {
        let pid = client.pid().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let polite = async {
            if client.accepts_seen_handshakes()
                && let Ok(seen) = client.seen_handshakes().await
            {
                self.handshakes.update(seen).await;
            }
            // An error is what a process that ends at once looks like.
            let _ = client.request(&Request::Shutdown).await;
            client.closed().await;
            if let Some(child) = &mut self.child {
                let _ = child.wait().await;
            }
        };
        if tokio::time::timeout(START_STOP_TIMEOUT, polite).await.is_err() {
            tracing::warn!("the data process does not end: killing it");
            if let Some(child) = &mut self.child {
                let _ = child.kill().await;
            } else if let Some(pid) = pid {
                kill(pid, Signal::KILL);
                // Its keeper starts another one, which can be asked.
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

/// Sends a signal to a process that is not a child, if it is still there.
fn kill(pid: Pid, signal: Signal) {
    let result = pidfd_open(pid, PidfdFlags::empty()).and_then(|fd| pidfd_send_signal(fd, signal));
    if let Err(error) = result {
        tracing::debug!(?pid, %error, "cannot signal the data process");
    }
}
