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

use std::path::PathBuf;

use anyhow::Context;

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
