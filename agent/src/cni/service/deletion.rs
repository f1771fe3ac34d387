//! DEL requests: processing at once, from the spool, and after a failed write of the leases.

use std::io;
use std::path::Path;

use skein_cni_protocol::{AttachmentId, CniError, Command, Request, spool};
use skein_ipam::IpamError;

use super::Service;
use crate::cni::error::{Error, refuse};
use crate::cni::pending::remove;

impl Service {
    /// Processes a DEL ([`Command::Del`]). If the lease cannot be written, the request succeeds and
    /// [`Service::release_pending`] releases the addresses later.
    ///
    /// # Errors
    /// [`CniError`] if the kernel refuses to delete the interface.
    pub(in crate::cni) async fn del(&self, id: &AttachmentId) -> Result<(), CniError> {
        let _turn = self.locks.lock(id).await;
        match self.detach(id).await {
            // A full disk must not block the deletion of a pod, whose interface is already gone.
            Err(Error::Ipam(error @ IpamError::Store(_))) => {
                let container = &id.container_id;
                tracing::error!(container, %error, "pod detached, release of its addresses pending");
                self.pending.unreleased().insert(id.clone());
                Ok(())
            }
            outcome => outcome.map_err(|error| refuse(&error)),
        }
    }

    /// Releases the leases that [`Service::del`] could not release; returns the errors.
    pub(in crate::cni) async fn release_pending(&self) -> Vec<String> {
        let unreleased = self.pending.unreleased().clone();
        let mut errors = Vec::new();
        for id in unreleased {
            let _turn = self.locks.lock(&id).await;
            if self.pending.unreleased().contains(&id) {
                let container = &id.container_id;
                let failed = self.detach(&id).await.err();
                errors.extend(failed.map(|error| format!("container {container}: {error}")));
            }
        }
        errors
    }

    /// Processes the DEL requests in the spool, which the plugin stored while the agent did not
    /// answer. Returns the errors of single entries.
    ///
    /// # Errors
    /// An I/O error if the spool cannot be listed.
    pub(in crate::cni) async fn process_spool(&self) -> io::Result<Vec<String>> {
        let directory = self.pending.spool.clone();
        let listing = tokio::task::spawn_blocking(move || spool::list(&directory)).await??;
        let mut errors = Vec::new();
        for entry in listing {
            let shown = entry.path.display();
            let error = match &entry.request {
                Ok(Request { command: Command::Del(del), .. }) => {
                    let completed = self.complete_spooled(&del.id, &entry.path).await;
                    completed.err().map(|error| error.to_string())
                }
                // An I/O error may be temporary: the entry stays.
                Err(error @ spool::EntryError::Io(_)) => Some(format!("{shown}: {error}")),
                // An invalid entry can never be processed; the returned error is logged.
                Ok(_) => Some(discard(&entry.path, "not a DEL request")),
                Err(error) => Some(discard(&entry.path, &error.to_string())),
            };
            errors.extend(error);
        }
        Ok(errors)
    }

    /// Processes a spooled DEL. The entry is removed last, so that a failed DEL is repeated.
    async fn complete_spooled(&self, id: &AttachmentId, entry: &Path) -> Result<(), Error> {
        let _turn = self.locks.lock(id).await;
        // An ADD with the same ID may have processed the entry meanwhile: the pod is a new one.
        if !entry.exists() {
            return Ok(());
        }
        self.detach(id).await?;
        tracing::info!(container = id.container_id, "pod detached by spooled DEL");
        remove(entry)
    }
}

/// Removes an invalid entry from the spool. Returns the message about it, with `reason`.
fn discard(entry: &Path, reason: &str) -> String {
    let kept = spool::remove(entry)
        .map_or_else(|error| format!(", and cannot be removed: {error}"), |()| String::new());
    format!("spool entry {}: {reason}{kept}", entry.display())
}
