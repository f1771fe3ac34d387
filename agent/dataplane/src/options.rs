//! Options of a keeper.

use std::path::{Path, PathBuf};

use skein_ipc::instance::Instance;

/// Options of a keeper. The control process sends all other settings over the socket.
#[derive(Debug, Clone)]
pub struct Options {
    /// Path of the unix socket to listen on.
    pub socket: PathBuf,
    /// True to take over from the keeper whose data process listens on the socket.
    pub take_over: bool,
    /// Instance of the keeper. The keeper of an instance has the data plane only while the
    /// instance's agent requests it. With `None`, the keeper acquires the data plane at its start.
    pub instance: Option<Instance>,
}

impl Options {
    /// Returns whether this keeper takes over from other keepers, at the start or on request.
    pub(super) fn takes_over(&self) -> bool {
        self.take_over || self.instance.is_some()
    }
}

/// Returns the path of the lock of the data plane whose socket is `socket`.
pub fn lock_path(socket: &Path) -> PathBuf {
    socket.with_extension("lock")
}
