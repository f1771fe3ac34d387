//! Deletions: those that are done at once, and those that wait. The plugin keeps what it cannot say while
//! the agent is away (the spool); the agent keeps what it cannot write while its disk is full.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use skein_cni_protocol::{AttachmentId, spool};

use super::error::Error;

/// Deletions that wait.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) spool: PathBuf,
    /// Attachments whose interfaces are gone while their leases could not be written. In memory only: the next
    /// agent frees them when it sees that their namespaces are gone.
    unreleased: Mutex<BTreeSet<AttachmentId>>,
}

impl Waiting {
    pub(super) fn new(spool: PathBuf) -> Self {
        Self { spool, unreleased: Mutex::default() }
    }

    /// Whether a deletion of that name waits.
    pub(super) fn contains(&self, id: &AttachmentId) -> bool {
        self.unreleased().contains(id) || spool::path(&self.spool, id).exists()
    }

    /// Its addresses are free.
    pub(super) fn released(&self, id: &AttachmentId) {
        self.unreleased().remove(id);
    }

    /// What the plugin kept is done.
    pub(super) fn forget(&self, id: &AttachmentId) -> Result<(), Error> {
        remove(&spool::path(&self.spool, id))
    }

    pub(super) fn unreleased(&self) -> MutexGuard<'_, BTreeSet<AttachmentId>> {
        // Nothing under the lock can panic half way.
        self.unreleased.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes a request from the spool.
pub(super) fn remove(entry: &Path) -> Result<(), Error> {
    spool::remove(entry).map_err(|error| Error::Spool(error.to_string()))
}
