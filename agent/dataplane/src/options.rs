//! Options of a keeper.

use std::path::{Path, PathBuf};

use skein_ipc::instance::Instance;

/// What the data plane is started with; everything else comes over the socket.
#[derive(Debug, Clone)]
pub struct Options {
    /// Path of the unix socket to listen on.
    pub socket: PathBuf,
    /// Whether to take everything over from the data process that listens there.
    pub take_over: bool,
    /// Instance whose agent requests the data plane.
    pub instance: Option<Instance>,
}

impl Options {
    /// Returns whether this keeper takes the data plane over from other keepers, at once or on
    /// request.
    pub(super) fn takes_over(&self) -> bool {
        self.take_over || self.instance.is_some()
    }
}

/// Returns the path of the lock of the data plane at `socket`.
pub fn lock_path(socket: &Path) -> PathBuf {
    socket.with_extension("lock")
}
