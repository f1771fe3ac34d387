//! Registry of the node records: the active records, the refused files with the reasons, and the
//! last good records on disk. The records come from files or from SkeinNodes, each of which counts
//! as a file.
//!
//! A file that is invalid, or that contradicts the active records, is refused as a whole, and the
//! last good version of its records stays active. A typing error therefore removes no node from the
//! network.

mod former;
mod resolve;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use skein_ipc::keys::PublicKeys;

pub use self::former::overlay_prefixes;
use self::former::{FormerPrefixes, Owners, hosts, owners};
use self::resolve::{Accepted, LocalNode, Resolution, check_own, local_cidrs, resolve_conflicts};
pub use self::store::Stored;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::store::fuzz_stored;
use self::store::path as store_path;
use super::records::NodeRecord;
use super::source::RecordSource;
use crate::config::Config;
use crate::failure::Failure;
use crate::status::{RegistryStatus, RejectedRecords};

/// Registry of the node records.
///
/// Order of calls: [`Registry::open`] at the start; [`Registry::write_store`] after the agent has
/// started (a failed start must not count as an earlier process); then [`Registry::reload`]
/// whenever the source reports a change, which stores the records itself. [`Registry::set_keys`]
/// must precede the next `reload` after this node's keys have changed, because the registry refuses
/// an own record with other keys.
///
/// The active records never contradict each other, the configuration, or this node's keys. `reload`
/// never removes an active record unless its file has changed or was removed, or unless it
/// contradicts the record that this node's agent writes to Kubernetes.
#[derive(Debug)]
pub struct Registry {
    own: LocalNode,
    /// Pod CIDRs of this node.
    local_cidrs: Vec<IpNet>,
    source: RecordSource,
    store: PathBuf,
    accepted: Accepted,
    /// Prefixes that a node owned and that no node owns now.
    former: FormerPrefixes,
    /// Name of the nftables table.
    table: String,
    /// Name of the table of an earlier process, if it was another one.
    former_table: Option<String>,
    /// True if no earlier process has stored records.
    never_started: bool,
    /// True unless `accept_ra` may have values of an earlier version.
    accept_ra_restored: bool,
    rejected: BTreeMap<PathBuf, String>,
    source_error: Option<String>,
}

impl Registry {
    /// Reads the records at the start, and logs the refused files. `stored` are the last good
    /// records.
    ///
    /// # Errors
    /// [`Failure::Usage`] if this node's own record contradicts the configuration or the keys, if
    /// this node has no pod CIDRs, or if the source cannot be read and no last good records exist.
    /// At the first start with files, any refused file is an error.
    pub fn open(
        config: &Config,
        keys: PublicKeys,
        source: RecordSource,
        stored: Option<Stored>,
    ) -> Result<Self, Failure> {
        let registry = Self::read(config, keys, source, stored)?;
        for (path, error) in &registry.rejected {
            log_rejected(path, error);
        }
        Ok(registry)
    }

    /// Reads the records without writing to the state directory.
    ///
    /// # Errors
    /// The same as those of [`Registry::open`].
    pub fn read(
        config: &Config,
        keys: PublicKeys,
        source: RecordSource,
        stored: Option<Stored>,
    ) -> Result<Self, Failure> {
        let own = LocalNode {
            name: config.name.clone(),
            keys,
            pod_cidrs: config.pod_cidrs.clone(),
            cluster_cidrs: config.cluster_cidrs.clone(),
            record: source.own_record(&config.name),
        };
        let name = source.name();
        let shown = name.display();
        let former_table = stored.as_ref().and_then(|stored| stored.former_table(config));
        let accept_ra_restored = stored.as_ref().is_none_or(|stored| stored.accept_ra_restored);
        let owned =
            stored.as_ref().map(|stored| owners(&stored.files, &own.name, &stored.local_cidrs));
        let (last_good, mut former) = match stored {
            Some(kept) => ((kept.source == name).then_some(kept.files), kept.former),
            None => (None, FormerPrefixes::default()),
        };
        let (files, source_error) = match (source.read(), &last_good) {
            (Ok(files), _) => (files, None),
            (Err(error), Some(stored)) => {
                tracing::warn!(source = %shown, %error, "cannot read the node records, using the last valid records");
                let files = stored.iter().map(|(path, good)| (path.clone(), Ok(good.clone())));
                (files.collect(), Some(error.to_string()))
            }
            (Err(error), None) => {
                return Err(Failure::Usage(format!(
                    "cannot read the node records {shown}: {error}. Create the directory, or set \
                     nodes to the file or directory with the records."
                )));
            }
        };
        check_own(&own, &files)?;
        let first_start = last_good.is_none();
        let Resolution { accepted, rejected } =
            resolve_conflicts(&own, &[], &last_good.unwrap_or_default(), files);
        let mut problems: Vec<_> = rejected
            .iter()
            .map(|(path, error)| format!("node records {}: {error}", path.display()))
            .collect();
        // Files are written by the operator who starts the agent. An invalid record of another node
        // in Kubernetes must not keep this node from starting.
        let local = matches!(source, RecordSource::Path(_));
        if local && first_start && !problems.is_empty() {
            return Err(Failure::Usage(problems.join("\n")));
        }
        let Some(local_cidrs) = local_cidrs(&own, &accepted) else {
            problems.push(format!(
                "this node ({}) has no pod CIDRs. Set pod_cidrs in the configuration, or add a \
                 record with this name to {shown}.",
                own.name
            ));
            return Err(Failure::Usage(problems.join("\n")));
        };
        let never_started = owned.is_none();
        let now = owners(&accepted, &own.name, &local_cidrs);
        former.update(&owned.unwrap_or_default(), &now, &own.cluster_cidrs);
        Ok(Self {
            own,
            local_cidrs,
            source,
            store: store_path(config),
            accepted,
            former,
            table: config.cni.table.clone(),
            former_table,
            never_started,
            accept_ra_restored,
            rejected,
            source_error,
        })
    }

    /// Reads the records again; returns whether the active records have changed. If the source
    /// cannot be read, the active records stay.
    pub fn reload(&mut self) -> bool {
        let files = match self.source.read() {
            Ok(files) => files,
            Err(error) => {
                let error = error.to_string();
                if self.source_error.as_ref() != Some(&error) {
                    tracing::error!(source = %self.source.name().display(), %error,
                        "cannot read the node records, the active records stay");
                    self.source_error = Some(error);
                }
                return false;
            }
        };
        let error = self.source.error();
        if let Some(error) =
            error.as_ref().filter(|error| self.source_error.as_ref() != Some(error))
        {
            tracing::warn!(source = %self.source.name().display(), %error, "node records may be outdated");
        }
        self.source_error = error;
        let Resolution { accepted, rejected } =
            resolve_conflicts(&self.own, &self.local_cidrs, &self.accepted, files);
        for (path, error) in &rejected {
            if self.rejected.get(path) != Some(error) {
                log_rejected(path, error);
            }
        }
        self.rejected = rejected;
        if accepted == self.accepted {
            return false;
        }
        let owned = self.owners();
        self.accepted = accepted;
        match local_cidrs(&self.own, &self.accepted) {
            Some(cidrs) => self.local_cidrs = cidrs,
            None => tracing::warn!("own node record was removed, its pod CIDRs stay active"),
        }
        let now = self.owners();
        self.former.update(&owned, &now, &self.own.cluster_cidrs);
        self.write_store();
        true
    }

    /// Returns the pod CIDRs of all nodes, this node's included.
    pub fn prefixes(&self) -> BTreeSet<IpNet> {
        self.owners().into_keys().collect()
    }

    fn owners(&self) -> Owners {
        owners(&self.accepted, &self.own.name, &self.local_cidrs)
    }

    /// Returns whether no earlier process has read its records successfully with this state
    /// directory.
    pub fn is_first_start(&self) -> bool {
        self.never_started
    }

    /// Returns the name of the nftables table of an earlier process if another name is configured
    /// now. The rules of the earlier table drop the packets of an interface with another name.
    pub fn former_table(&self) -> Option<&str> {
        self.former_table.as_deref()
    }

    /// Returns whether the settings of router advertisements are those of this version.
    pub fn is_accept_ra_restored(&self) -> bool {
        self.accept_ra_restored
    }

    /// Records that the settings of router advertisements are those of this version.
    pub fn set_accept_ra_restored(&mut self) {
        self.accept_ra_restored = true;
    }

    /// Returns the prefixes that only the overlay carries ([`overlay_prefixes`]).
    pub fn overlay_prefixes(&self, config: &Config) -> BTreeSet<IpNet> {
        let hosts = hosts(config, self.own());
        let (cluster, local) = (&config.cluster_cidrs, &self.local_cidrs);
        overlay_prefixes(cluster, local, &self.prefixes(), &self.former, &hosts)
    }

    /// Returns the pod CIDRs of this node.
    pub fn local_cidrs(&self) -> &[IpNet] {
        &self.local_cidrs
    }

    /// Returns this node's own record, if it exists.
    pub fn own(&self) -> Option<&NodeRecord> {
        self.accepted.values().flatten().find(|record| record.name == self.own.name)
    }

    /// Returns the records of all other nodes.
    pub fn peers(&self) -> impl Iterator<Item = &NodeRecord> {
        self.accepted.values().flatten().filter(|record| record.name != self.own.name)
    }

    /// Sets this node's keys, with which its own record must agree.
    pub fn set_keys(&mut self, keys: PublicKeys) {
        self.own.keys = keys;
    }

    /// Returns the keys of this node's record as the other nodes can read it; `None` if there is no
    /// record.
    pub fn published_keys(&self) -> Option<PublicKeys> {
        match &self.source {
            RecordSource::Path(_) => self.own().map(NodeRecord::keys),
            RecordSource::Kubernetes(records) => records.published_keys(),
        }
    }

    /// Returns the state of the registry, for the status and the metrics.
    pub fn status(&self) -> RegistryStatus {
        let rejected = self.rejected.iter();
        RegistryStatus {
            source: self.source.name(),
            accepted: self.accepted.values().map(Vec::len).sum(),
            rejected: rejected
                .map(|(origin, error)| RejectedRecords {
                    origin: origin.clone(),
                    error: error.clone(),
                })
                .collect(),
            source_error: self.source_error.clone(),
        }
    }

    /// Stores the active records in the state directory. The first call follows the start of the
    /// agent, because a start that fails must not count as an earlier process. An error is logged.
    pub fn write_store(&self) {
        let stored = Stored {
            source: self.source.name(),
            files: self.accepted.clone(),
            local_cidrs: self.local_cidrs.clone(),
            cluster_cidrs: self.own.cluster_cidrs.clone(),
            former: self.former.clone(),
            table: Some(self.table.clone()),
            accept_ra_restored: self.accept_ra_restored,
        };
        if let Err(error) = stored.write(&self.store) {
            tracing::warn!(path = %self.store.display(), %error, "cannot store the last valid records");
        }
    }
}

fn log_rejected(path: &Path, error: &str) {
    tracing::error!(file = %path.display(), error, "node records refused, the last valid records stay active");
}

#[cfg(test)]
mod tests;
