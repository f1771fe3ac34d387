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

/// The data process: works for the keeper at the other end of a descriptor that it inherited.
pub fn work(channel: i32, confined: Confined, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    let channel =
        descriptors::inherited_socket(channel).context("--worker is the keeper's to use")?;
    let begin: Option<StartMessage> =
        handover::receive(&channel).context("the keeper says nothing")?;
    let StartMessage { state } = begin.context("the keeper is gone")?;
    let count = 2 + state.as_ref().map_or(0, HandOver::descriptor_count);
    let mut all = descriptors::receive(&channel, count).context("the keeper gives nothing")?;
    let listener = all.remove(0).into();
    // No other process may seal in these sessions while this process runs.
    let _lock = all.remove(0);
    let state =
        state.and_then(|state| InheritedFds::from_descriptors(&state, all).map(|fds| (state, fds)));
    let keeper = Some(Arc::new(KeeperChannel::new(channel)));
    serve(listener, keeper, state, set_log_level, confined.mechanisms)
}

/// Works in this process, with nobody to go on when it dies.
pub fn run_alone(socket: &Path, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    serve(server::bind(socket)?, None, None, set_log_level, Vec::new())
}

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
    tracing::info!(socket = %socket.path().display(), "the data process listens");
    std::thread::Builder::new()
        .name("control-listener".to_owned())
        .spawn(move || server::serve(socket, manager, tap, changes))
        .context("cannot start the control socket")?;
    let ended = thread.join();
    delete_socket();
    ended.map_err(|_| anyhow::anyhow!("the manager's thread has panicked"))
}
