//! The data process: the manager's thread and the control socket.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use skein_ipc::Confinement;
use skein_sys::descriptors;

use super::changes::Changes;
use super::channel::KeeperChannel;
use super::confinement::Confined;
use super::handover::{self, HandOver, InheritedFds, StartMessage};
use super::manager::{self, SetLogLevel};
use super::server;
use super::tap::Tap;

/// Runs the data process for the keeper at the other end of the inherited descriptor `channel`,
/// until it is asked to exit.
///
/// # Errors
/// An error if the channel or a received descriptor cannot be used, or if the manager panics.
pub fn work(channel: i32, confined: Confined, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    let channel = descriptors::inherited_socket(channel)
        .context("cannot use the descriptor of --worker, which only the keeper passes")?;
    let begin: Option<StartMessage> =
        handover::receive(&channel).context("cannot receive the start message of the keeper")?;
    let StartMessage { state } = begin.context("the keeper has closed the channel")?;
    let count = 2 + state.as_ref().map_or(0, HandOver::descriptor_count);
    let mut all = descriptors::receive(&channel, count)
        .context("cannot receive the descriptors of the keeper")?;
    let listener = all.remove(0).into();
    // Holds the lock, so that no other process seals in these sessions while this process runs.
    let _lock = all.remove(0);
    let state =
        state.and_then(|state| InheritedFds::from_descriptors(&state, all).map(|fds| (state, fds)));
    let keeper = Some(Arc::new(KeeperChannel::new(channel)));
    serve(listener, keeper, state, set_log_level, confined.mechanisms)
}

/// Runs the data process inside the calling process. No keeper holds its descriptors, so the
/// sessions end with the process.
///
/// # Errors
/// An error if the socket cannot be bound, or if the manager panics.
pub fn run_alone(socket: &Path, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    serve(server::bind(socket)?, None, None, set_log_level, Vec::new())
}

/// Starts the manager and the control socket, and waits for the manager's end.
///
/// # Errors
/// An error if a thread cannot be started, or if the manager panics.
fn serve(
    listener: UnixListener,
    keeper: Option<Arc<KeeperChannel>>,
    state: Option<(HandOver, InheritedFds)>,
    set_log_level: SetLogLevel,
    confinement: Vec<Confinement>,
) -> anyhow::Result<()> {
    let socket = server::Socket::own(listener, keeper.clone()).context("cannot listen")?;
    let delete_socket = socket.deleter();
    let (tap, changes) = (Arc::new(Tap::default()), Arc::new(Changes::default()));
    let (to_tap, to_changes) = (Arc::clone(&tap), Arc::clone(&changes));
    let (manager, thread) =
        manager::start(keeper, state, set_log_level, to_tap, to_changes, confinement)
            .context("cannot start the manager")?;
    tracing::info!(socket = %socket.path().display(), "data process listens");
    std::thread::Builder::new()
        .name("control-listener".to_owned())
        .spawn(move || server::serve(socket, manager, tap, changes))
        .context("cannot start the control socket")?;
    let ended = thread.join();
    delete_socket();
    ended.map_err(|_| anyhow::anyhow!("the session manager has panicked"))
}
