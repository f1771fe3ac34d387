//! Choice of the active records among those of all files, as a pure function.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ipnet::IpNet;
use skein_ipc::keys::PublicKeys;

use crate::config::{check_inside, check_outside};
use crate::control::endpoint::Endpoint;
use crate::control::records::conflict::{Conflict, Conflicts};
use crate::control::records::{NodeRecord, ParsedRecords};
use crate::failure::Failure;

/// Records by the file that they come from.
pub(super) type Accepted = BTreeMap<PathBuf, Vec<NodeRecord>>;

/// Name, keys and prefixes of this node in the configuration.
#[derive(Debug, Clone)]
pub(super) struct LocalNode {
    /// Name of this node.
    pub(super) name: String,
    /// Public keys of this node.
    pub(super) keys: PublicKeys,
    /// Configured pod CIDRs; `None` if they come from this node's record.
    pub(super) pod_cidrs: Option<Vec<IpNet>>,
    /// Prefixes that contain the pod CIDRs of all nodes; empty for no restriction.
    pub(super) cluster_cidrs: Vec<IpNet>,
    /// Path under which this node's own record appears among the files, if the agent writes the
    /// record to the Kubernetes API. This record wins over any other record. `None` if the records
    /// are files that an operator writes.
    pub(super) record: Option<PathBuf>,
}

/// Returns the pod CIDRs of this node from its configuration or its record; `None` if neither has
/// any.
pub(super) fn local_cidrs(own: &LocalNode, accepted: &Accepted) -> Option<Vec<IpNet>> {
    let record = || accepted.values().flatten().find(|record| record.name == own.name);
    own.pod_cidrs.clone().or_else(|| record().map(|record| record.pod_cidrs.clone()))
}

/// Checks this node's own record at the start. A record that contradicts the configuration is an
/// error even if a last good version exists, because the configuration or the key has changed.
///
/// # Errors
/// [`Failure::Usage`] with the name of the file and the contradiction.
pub(super) fn check_own(own: &LocalNode, files: &ParsedRecords) -> Result<(), Failure> {
    for (path, records) in files {
        if let Ok(records) = records
            && let Some(error) = own_error(own, records)
        {
            return Err(Failure::Usage(format!("node records {}: {error}", path.display())));
        }
    }
    Ok(())
}

/// Returns the contradiction between this node's record in `records` and its configuration or keys.
fn own_error(own: &LocalNode, records: &[NodeRecord]) -> Option<String> {
    let record = records.iter().find(|record| record.name == own.name)?;
    let ours: Vec<_> = own.keys.iter().collect();
    // A record that the agent writes follows a change of the keys after a delay.
    let wrong = own.record.is_none().then(|| record.keys().iter().find(|key| !ours.contains(key)));
    if let Some(key) = wrong.flatten() {
        return Some(format!(
            "node {}: public_key: the record has the key {key}, but this node's key is {}. Correct the \
             record, or the name in the configuration.",
            own.name, own.keys.first
        ));
    }
    let sorted = |cidrs: &[IpNet]| {
        let mut cidrs = cidrs.to_vec();
        cidrs.sort();
        cidrs
    };
    let differ = |configured: &Vec<IpNet>| sorted(configured) != sorted(&record.pod_cidrs);
    if own.pod_cidrs.as_ref().is_some_and(differ) {
        return Some(format!(
            "node {}: pod_cidrs: the record and the configuration differ. Correct one of them, or remove \
             pod_cidrs from the configuration.",
            own.name
        ));
    }
    range_error(own, record)
}

/// Returns the reason to refuse a record because of `cluster_cidrs`. The pod CIDRs must lie inside
/// these prefixes, because a stolen node must not attract traffic to other addresses. The endpoints
/// must lie outside, because an unreachable route would cut this node off from the endpoint.
fn range_error(own: &LocalNode, record: &NodeRecord) -> Option<String> {
    let NodeRecord { name, pod_cidrs, endpoints, .. } = record;
    if let Err(error) = check_inside(pod_cidrs, &own.cluster_cidrs) {
        return Some(format!("node {name}: pod_cidrs: {error}"));
    }
    let error = check_outside(endpoints.iter().map(Endpoint::ip), &own.cluster_cidrs).err()?;
    Some(format!("node {name}: endpoints: {error}"))
}

/// Returns the reason to refuse the records of a file regardless of other files.
fn refusal_reason(own: &LocalNode, records: &[NodeRecord]) -> Option<String> {
    let in_ranges = || records.iter().find_map(|record| range_error(own, record));
    own_error(own, records).or_else(in_ranges)
}

/// Decision about all files of records.
#[derive(Debug)]
pub(super) struct Resolution {
    /// Active records by file.
    pub(super) accepted: Accepted,
    /// Refused files, each with the reason.
    pub(super) rejected: BTreeMap<PathBuf, String>,
}

/// Records of a file that may become active.
#[derive(Debug, Clone, Copy)]
struct Candidate<'a> {
    records: &'a [NodeRecord],
    /// True if the records differ from the last good version.
    changed: bool,
}

/// Chooses the active records: the new version of every file, except files that are invalid or that
/// contradict others. If two files contradict each other, the changed one returns to its last good
/// version. If both have changed, the later one by name loses, except that a key stays with the
/// file whose last good version names it. This node's own record in Kubernetes, which no other node
/// can change, always wins.
///
/// Therefore active records that have not changed are never lost, files that change together (a
/// prefix moves from one to the other) are accepted together, and a node that claims the announced
/// next key of another node does not stop that node's key rotation. If the claim and the
/// announcement are read together, for example after a time without the API server, the record of
/// the claiming node may win.
///
/// `active_cidrs` are the pod CIDRs that this node has according to the active records. While this
/// node's record is missing, no other record can claim them.
pub(super) fn resolve_conflicts(
    own: &LocalNode,
    active_cidrs: &[IpNet],
    last_good: &Accepted,
    files: ParsedRecords,
) -> Resolution {
    let active_cidrs = (!active_cidrs.is_empty()).then_some(active_cidrs);
    let configured = own.pod_cidrs.as_deref().or(active_cidrs).map(|pod_cidrs| NodeRecord {
        name: own.name.clone(),
        public_key: own.keys.first,
        second_public_key: own.keys.second,
        endpoints: Vec::new(),
        pod_cidrs: pod_cidrs.to_vec(),
        overlay_addresses: Vec::new(),
    });
    let mut resolver = Resolver {
        own,
        configured: configured.as_ref(),
        last_good,
        paths: files.keys().collect(),
        candidates: vec![None; files.len()],
        own_records: 0,
        conflicts: Conflicts::default(),
        rejected: BTreeMap::new(),
    };
    resolver.update_configured();
    for (file, (path, result)) in files.iter().enumerate() {
        let good = last_good.get(path);
        match result {
            Ok(records) => {
                resolver.add(file, Candidate { records, changed: good != Some(records) });
            }
            Err(error) => {
                resolver.rejected.insert(path.clone(), error.to_string());
                if let Some(records) = good {
                    resolver.add(file, Candidate { records, changed: false });
                }
            }
        }
    }
    while let Some(conflict) = resolver.conflicts.first() {
        let Some((loser, error)) = resolver.choose_loser(&conflict) else { break };
        resolver.replace_with_last_good(loser, error);
    }
    let Resolver { paths, candidates, rejected, .. } = resolver;
    let accepted = paths.into_iter().zip(candidates).filter_map(|(path, candidate)| {
        candidate.map(|candidate| (path.clone(), candidate.records.to_vec()))
    });
    Resolution { accepted: accepted.collect(), rejected }
}

/// State of a decision. Files are numbered in the order of their paths. The number `None` means
/// this node's configuration.
struct Resolver<'a> {
    own: &'a LocalNode,
    /// Record of this node with the pod CIDRs of the configuration or, if the configuration names
    /// none, of the active records. In the first case `conflicts` always contains this record. In
    /// the second case `conflicts` contains it only while no candidate has a record of this node.
    configured: Option<&'a NodeRecord>,
    last_good: &'a Accepted,
    paths: Vec<&'a PathBuf>,
    candidates: Vec<Option<Candidate<'a>>>,
    /// Number of records of this node in all candidates.
    own_records: usize,
    conflicts: Conflicts<'a, Option<usize>>,
    rejected: BTreeMap<PathBuf, String>,
}

impl<'a> Resolver<'a> {
    /// Adds a candidate. A candidate that contradicts the configuration is rejected, and the last
    /// good version is added instead if the candidate is new.
    fn add(&mut self, file: usize, mut candidate: Candidate<'a>) {
        while let Some(error) = refusal_reason(self.own, candidate.records) {
            match self.reject(file, candidate, error) {
                Some(good) => candidate = good,
                None => return,
            }
        }
        self.candidates[file] = Some(candidate);
        for (index, record) in candidate.records.iter().enumerate() {
            if record.name == self.own.name {
                self.own_records += 1;
                // The configuration names the same prefixes and is already inserted.
                if self.own.pod_cidrs.is_some() {
                    continue;
                }
            }
            self.conflicts.insert(Some(file), index, record);
        }
        self.update_configured();
    }

    /// Removes the candidate of a file, and adds the last good version if the candidate is new.
    fn replace_with_last_good(&mut self, file: usize, error: String) {
        let Some(candidate) = self.candidates[file].take() else { return };
        for (index, record) in candidate.records.iter().enumerate() {
            self.conflicts.remove(Some(file), index);
            self.own_records -= usize::from(record.name == self.own.name);
        }
        self.update_configured();
        if let Some(good) = self.reject(file, candidate, error) {
            self.add(file, good);
        }
    }

    /// Stores the error of a file, unless the file has an error already. Returns the last good
    /// version if `candidate` is new.
    fn reject(
        &mut self,
        file: usize,
        candidate: Candidate<'a>,
        error: String,
    ) -> Option<Candidate<'a>> {
        let path = self.paths[file];
        self.rejected.entry(path.clone()).or_insert(error);
        let records = self.last_good.get(path).filter(|_| candidate.changed)?;
        Some(Candidate { records, changed: false })
    }

    fn update_configured(&mut self) {
        let Some(configured) = self.configured else { return };
        let is_needed = self.own.pod_cidrs.is_some() || self.own_records == 0;
        self.conflicts.remove(None, 0);
        if is_needed {
            self.conflicts.insert(None, 0, configured);
        }
    }

    /// Returns the file that loses, with the reason; `None` if the configuration contradicts
    /// itself.
    fn choose_loser(&self, conflict: &Conflict<Option<usize>>) -> Option<(usize, String)> {
        let changed = |file: Option<usize>| {
            file.and_then(|file| self.candidates[file]).is_some_and(|candidate| candidate.changed)
        };
        let had_key = |file: Option<usize>| {
            file.is_none_or(|file| {
                let mut good = self.last_good.get(self.paths[file]).into_iter().flatten();
                good.any(|record| record.keys().iter().any(|key| Some(key) == conflict.key))
            })
        };
        let (a, b) = conflict.between;
        let (a, b) = (a.min(b), a.max(b));
        let is_own = |file: Option<usize>| {
            file.is_some_and(|file| self.own.record.as_ref() == Some(self.paths[file]))
        };
        let keep_b = match (is_own(a), is_own(b)) {
            (_, true) => true,
            (true, false) => false,
            _ => (changed(a), !had_key(a)) > (changed(b), !had_key(b)),
        };
        let (loser, other) = if keep_b { (a, b) } else { (b, a) };
        let other = match other {
            Some(_) if other == loser => String::new(),
            Some(other) => format!(" (the other is in {})", self.paths[other].display()),
            None => " (the other is this node)".to_owned(),
        };
        Some((loser?, format!("{}{other}", conflict.message)))
    }
}

#[cfg(test)]
mod tests;
