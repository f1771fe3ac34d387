//! File of the last good records (registry.json), and the prefixes that follow from the records.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use skein_cni_protocol::excerpt::message_excerpt;

use super::former::{FormerPrefixes, hosts, overlay_prefixes, owners};
use super::resolve::Accepted;
use crate::config::Config;
use crate::control::source::RecordSource;
use crate::files;

/// The last good records, as they are kept on disk.
#[derive(Debug, Serialize, Deserialize)]
pub struct Stored {
    /// Name of the source that the records come from.
    pub(super) source: PathBuf,
    /// Records by the file that they come from.
    pub(super) files: Accepted,
    /// Pod CIDRs of this node. This field and those below are absent in files of versions that had
    /// no unreachable routes.
    #[serde(default)]
    pub(super) local_cidrs: Vec<IpNet>,
    /// `cluster_cidrs` of the last configuration with which an agent has started successfully. A
    /// start fails if a prefix contains the API server or overlaps with a Service range.
    #[serde(default)]
    pub(super) cluster_cidrs: Vec<IpNet>,
    /// Prefixes that no node owns any more.
    #[serde(flatten)]
    pub(super) former: FormerPrefixes,
    /// Name of the nftables table; `None` in files of versions that did not store it.
    #[serde(default)]
    pub(super) table: Option<String>,
    /// True if [`restore_accept_ra`] has restored the `accept_ra` sysctls of the interfaces, or if
    /// no earlier version has changed them. The field is absent in files of versions that changed
    /// them, and then counts as false.
    ///
    /// [`restore_accept_ra`]: skein_netlink::Netlink::restore_accept_ra
    #[serde(default)]
    pub(super) accept_ra_restored: bool,
}

/// Returns the path of the file of the last good records.
pub(super) fn path(config: &Config) -> PathBuf {
    config.state_dir.join("registry.json")
}

impl Stored {
    /// Reads the last good records; `None` if the file does not exist, or if it is invalid, which
    /// is logged.
    pub fn read(config: &Config) -> Option<Self> {
        let store = path(config);
        let bytes = std::fs::read(&store).ok()?;
        let stored = serde_json::from_slice::<Self>(&bytes).inspect_err(|error| {
            let error = error.to_string();
            let error = message_excerpt(&error);
            tracing::warn!(path = %store.display(), %error, "cannot parse the last valid records");
        });
        let mut stored = stored.ok()?;
        stored.leave_out_unusable();
        Some(stored)
    }

    /// Returns whether the records come from this source.
    pub fn is_of(&self, source: &RecordSource) -> bool {
        self.source == source.name()
    }

    /// Returns the prefixes for unreachable routes that follow from the records; `None` if the
    /// configuration wants no such routes.
    pub fn unreachable_prefixes(&self, config: &Config) -> Option<BTreeSet<IpNet>> {
        if !config.interface.unreachable_routes {
            return None;
        }
        // Prefixes that are not in the file are left out, because they may contain the API server.
        // They are compared with its address only after this call.
        let mut config = config.clone();
        config.cluster_cidrs.retain(|net| self.cluster_cidrs.contains(net));
        let local = config.pod_cidrs.as_ref().unwrap_or(&self.local_cidrs);
        let mut all: BTreeSet<_> = owners(&self.files, &config.name, local).into_keys().collect();
        all.extend(&self.local_cidrs);
        let own = self.files.values().flatten().find(|record| record.name == config.name);
        let hosts = hosts(&config, own);
        Some(overlay_prefixes(&config.cluster_cidrs, local, &all, &self.former, &hosts))
    }

    /// Returns the name of the nftables table if another name is configured now.
    pub fn former_table(&self, config: &Config) -> Option<String> {
        self.table.clone().filter(|table| *table != config.cni.table)
    }

    /// Leaves out the records whose endpoints this release refuses. Their prefixes count as former
    /// ones, so that packets to the pods there stay refused.
    fn leave_out_unusable(&mut self) {
        for records in self.files.values_mut() {
            for record in records.extract_if(.., |record| record.endpoints.is_empty()) {
                tracing::warn!(
                    node = record.name,
                    "stored node record without an endpoint left out"
                );
                self.former.add(&record.name, &record.pod_cidrs);
            }
        }
    }

    /// Replaces the file durably. A power failure may stop the node and the API server at the same
    /// time, and the node then needs the file for its records.
    ///
    /// # Errors
    /// The file or its directory cannot be written.
    pub(super) fn write(&self, store: &Path) -> io::Result<()> {
        files::replace(store, &serde_json::to_vec(self)?)
    }
}

/// Parses `bytes` as a file of last good records, for the fuzzer. A file that parses can be written
/// and parsed again.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_stored(bytes: &[u8]) {
    let Ok(stored) = serde_json::from_slice::<Stored>(bytes) else { return };
    let again = serde_json::to_vec(&stored).map(|bytes| serde_json::from_slice::<Stored>(&bytes));
    assert!(again.is_ok_and(|again| again.is_ok_and(|again| again.files == stored.files)));
}
