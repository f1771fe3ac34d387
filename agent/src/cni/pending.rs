//! DEL requests that are not complete. The plugin spools requests while the agent does not answer;
//! the agent keeps attachments whose lease it cannot write, for example while its disk is full.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use skein_cni_protocol::{AttachmentId, spool};

use super::error::Error;

/// DEL requests that are not complete: entries of the plugin's spool (on disk), and attachments
/// whose interface is gone but whose lease could not be released (in memory).
#[derive(Debug)]
pub(super) struct PendingDeletions {
    /// Directory of the spool.
    pub(super) spool: PathBuf,
    /// Attachments without an interface whose lease could not be released. In memory only: the next
    /// agent process releases the leases when their namespaces are gone.
    unreleased: Mutex<BTreeSet<AttachmentId>>,
}

impl PendingDeletions {
    pub(super) fn new(spool: PathBuf) -> Self {
        Self { spool, unreleased: Mutex::default() }
    }

    /// Returns whether a DEL of an attachment is not complete.
    pub(super) fn contains(&self, id: &AttachmentId) -> bool {
        self.unreleased().contains(id) || spool::path(&self.spool, id).exists()
    }

    /// Records that the lease of an attachment was released.
    pub(super) fn on_released(&self, id: &AttachmentId) {
        self.unreleased().remove(id);
    }

    /// Removes the DEL of an attachment from the spool.
    ///
    /// # Errors
    /// [`Error::Spool`] if the entry cannot be removed.
    pub(super) fn remove_spooled(&self, id: &AttachmentId) -> Result<(), Error> {
        remove(&spool::path(&self.spool, id))
    }

    pub(super) fn unreleased(&self) -> MutexGuard<'_, BTreeSet<AttachmentId>> {
        // No code under the lock leaves the set inconsistent if it panics.
        self.unreleased.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes an entry from the spool.
///
/// # Errors
/// [`Error::Spool`] if the entry cannot be removed.
pub(super) fn remove(entry: &Path) -> Result<(), Error> {
    spool::remove(entry).map_err(|error| Error::Spool(error.to_string()))
}
