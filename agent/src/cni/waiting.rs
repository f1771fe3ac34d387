//! Deletions: those that are done at once, and those that wait. The plugin keeps what it cannot say while
//! the agent is away (the spool); the agent keeps what it cannot write while its disk is full.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use skein_cni_protocol::spool;
use skein_cni_protocol::{AttachmentId, CniError, Command, Request};
use skein_ipam::IpamError;

use super::service::{Error, Service, refuse};

/// Deletions that wait.
#[derive(Debug)]
pub(super) struct Waiting {
    spool: PathBuf,
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

    fn unreleased(&self) -> MutexGuard<'_, BTreeSet<AttachmentId>> {
        // Nothing under the lock can panic half way.
        self.unreleased.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Service {
    /// See [`Command::Del`].
    pub(super) async fn del(&self, id: &AttachmentId) -> Result<(), CniError> {
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
    pub(super) async fn release_the_rest(&self) -> Vec<String> {
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
    pub(super) async fn empty_spool(&self) -> Result<Vec<String>, String> {
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

fn remove(entry: &Path) -> Result<(), Error> {
    spool::remove(entry).map_err(|error| Error::Spool(error.to_string()))
}
