//! Deletions of attachments: at once, and those that waited in the spool or for the disk.

use std::path::Path;

use skein_cni_protocol::{AttachmentId, CniError, Command, Request, spool};
use skein_ipam::IpamError;

use super::Service;
use crate::cni::error::{Error, refuse};
use crate::cni::waiting::remove;
impl Service {
    /// See [`Command::Del`].
    pub(in crate::cni) async fn del(&self, id: &AttachmentId) -> Result<(), CniError> {
        let _turn = self.locks.lock(id).await;
        match self.detach(id).await {
            // A full disk must not keep a pod from going: its interface is gone, the rest is done later.
            Err(Error::Ipam(error @ IpamError::Store(_))) => {
                let container = &id.container_id;
                tracing::error!(container, %error, "detached; its address is freed when that is possible");
                self.waiting.unreleased().insert(id.clone());
                Ok(())
            }
            outcome => outcome.map_err(|error| refuse(&error)),
        }
    }

    /// Frees what [`Service::del`] could not; what still cannot be is returned.
    pub(in crate::cni) async fn release_the_rest(&self) -> Vec<String> {
        let waiting = self.waiting.unreleased().clone();
        let mut errors = Vec::new();
        for id in waiting {
            let _turn = self.locks.lock(&id).await;
            if self.waiting.unreleased().contains(&id) {
                let container = &id.container_id;
                let failed = self.detach(&id).await.err();
                errors.extend(failed.map(|error| format!("container {container}: {error}")));
            }
        }
        errors
    }

    /// Does what the plugin could not say while the agent was away. What is wrong with one entry is
    /// returned.
    pub(in crate::cni) async fn empty_spool(&self) -> Result<Vec<String>, String> {
        let directory = self.waiting.spool.clone();
        let listing = tokio::task::spawn_blocking(move || spool::list(&directory)).await;
        let listing =
            listing.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let mut errors = Vec::new();
        for entry in listing {
            let shown = entry.path.display();
            let done = match &entry.request {
                Ok(Request { command: Command::Del(del), .. }) => {
                    self.waited(&del.id, &entry.path).await.map_err(|error| error.to_string())
                }
                // It may be readable next time.
                Err(error @ spool::EntryError::Io(_)) => Err(format!("{shown}: {error}")),
                // Nothing that could be done; whoever wonders finds it in the log.
                Ok(_) => forget(&entry.path, "no deletion"),
                Err(error) => forget(&entry.path, &error.to_string()),
            };
            errors.extend(done.err());
        }
        Ok(errors)
    }

    /// A deletion that has waited; its entry stays until all of it is done.
    async fn waited(&self, id: &AttachmentId, entry: &Path) -> Result<(), Error> {
        let _turn = self.locks.lock(id).await;
        // An ADD of the same name may have done it meanwhile, and what is there now is new.
        if !entry.exists() {
            return Ok(());
        }
        self.detach(id).await?;
        tracing::info!(container = id.container_id, "a deletion that had waited");
        remove(entry)
    }
}

/// Takes an entry away of which nothing can be done; says why.
fn forget(entry: &Path, why: &str) -> Result<(), String> {
    let removed =
        spool::remove(entry).map_or_else(|e| format!(", and stays: {e}"), |()| String::new());
    Err(format!("{}: {why}{removed}", entry.display()))
}
