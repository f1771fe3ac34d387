//! The data process: lanes that move packets and a manager that keeps their sessions. Plain
//! threads; fed over a unix socket by the control process, and indifferent to its death.

mod busy_poll;
mod egress;
mod ingress;
mod lane;
mod manager;
mod pending;
mod report;
mod server;
mod setup;
mod stats;
mod tables;
mod totals;
mod write;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::ipc::{PROTOCOL_VERSION, Request, Response, read_frame, write_frame};

/// How long a probe waits for each step.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the data process is started with; everything else comes over the socket.
#[derive(Debug, Clone)]
pub struct Options {
    /// Path of the unix socket to listen on.
    pub socket: PathBuf,
}

/// Runs the data process until it is asked to end over its socket.
pub fn run(options: Options) -> anyhow::Result<()> {
    let listener = server::bind(&options.socket)?;
    tracing::info!(socket = %options.socket.display(), "data process listens");
    let (manager, thread) = manager::start().context("cannot start the manager")?;
    std::thread::Builder::new()
        .name("control-listener".to_owned())
        .spawn(move || server::serve(listener, manager))
        .context("cannot start the control socket")?;
    let ended = thread.join();
    // Nobody can connect any more; a failure leaves a stale socket, which the next start removes.
    let _ = std::fs::remove_file(&options.socket);
    ended.map_err(|_| anyhow::anyhow!("the manager's thread has panicked"))
}

/// Whether the data process at `socket` answers: its manager's thread, which the lanes obey.
pub fn probe(socket: &Path) -> anyhow::Result<()> {
    let shown = socket.display();
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("nobody listens on {shown}"))?;
    stream.set_read_timeout(Some(PATIENCE)).context("cannot bound the wait")?;
    stream.set_write_timeout(Some(PATIENCE)).context("cannot bound the wait")?;
    let mut ask = || {
        write_frame(&mut stream, &Request::Hello { version: PROTOCOL_VERSION })?;
        read_frame(&mut stream)
    };
    match ask().with_context(|| format!("the data process on {shown} does not answer"))? {
        Some(Response::Hello { .. }) => Ok(()),
        Some(Response::Error { message, .. }) => bail!("{message}"),
        Some(_) | None => bail!("what listens on {shown} is no data process"),
    }
}
