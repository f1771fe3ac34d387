//! The last good records on this node's disk, with the prefixes that follow from them.

use std::io;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::former::FormerPrefixes;
use super::settle::Accepted;
use crate::control::identity;

/// The last good records, as they are kept on disk.
#[derive(Serialize, Deserialize)]
pub(super) struct Stored {
    /// Name of the source that the records come from.
    pub(super) source: PathBuf,
    /// Records by the file that they come from.
    pub(super) files: Accepted,
    /// Pod CIDRs of this node. This field and those below are absent in files of versions that had no
    /// unreachable routes.
    #[serde(default)]
    pub(super) local_cidrs: Vec<IpNet>,
    /// The configured `cluster_cidrs`, which the cluster has not contradicted.
    #[serde(default)]
    pub(super) cluster_cidrs: Vec<IpNet>,
    /// Prefixes that no node owns any more, the oldest first.
    #[serde(default)]
    pub(super) former: FormerPrefixes,
    /// Name of the nftables table; `None` in files of versions that did not store it.
    #[serde(default)]
    pub(super) table: Option<String>,
}

impl Stored {
    /// Reads the last good records; `None` if there are none, or if they are unreadable, which is
    /// logged.
    pub(super) fn read(store: &Path) -> Option<Self> {
        let bytes = std::fs::read(store).ok()?;
        let stored = serde_json::from_slice::<Self>(&bytes).inspect_err(|error| {
            tracing::warn!(path = %store.display(), %error, "the kept records are unreadable");
        });
        let mut stored = stored.ok()?;
        stored.leave_out_unusable();
        Some(stored)
    }

    /// Leaves out the records whose endpoints this release refuses. Their prefixes count as former
    /// ones, so that packets to the pods there stay refused.
    fn leave_out_unusable(&mut self) {
        for records in self.files.values_mut() {
            for record in records.extract_if(.., |record| record.endpoints.is_empty()) {
                tracing::warn!(node = record.name, "kept node record without an endpoint left out");
                self.former.add(&record.pod_cidrs);
            }
        }
    }

    /// Replaces the file durably, because a node may lose its power, and the API server with it.
    ///
    /// # Errors
    /// The file or its directory cannot be written.
    pub(super) fn write(&self, store: &Path) -> io::Result<()> {
        identity::replace(store, &serde_json::to_vec(self)?)
    }
}

/// Reads `bytes` as a file of kept records, for the fuzzer. The records that are read can be written
/// and read again.
pub(crate) fn fuzz_stored(bytes: &[u8]) {
    let Ok(stored) = serde_json::from_slice::<Stored>(bytes) else { return };
    let again = serde_json::to_vec(&stored).map(|bytes| serde_json::from_slice::<Stored>(&bytes));
    assert!(again.is_ok_and(|again| again.is_ok_and(|again| again.files == stored.files)));
}
