//! Which of the records that files have are in force: pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::config::{check_inside, check_outside};
use crate::control::endpoint::Endpoint;
use crate::control::records::{self, Files, NodeRecord};
use crate::failure::Failure;
use crate::keys::PublicKeys;

/// Records by the file that they come from.
pub(super) type Accepted = BTreeMap<PathBuf, Vec<NodeRecord>>;

/// This node, as the configuration has it.
#[derive(Debug, Clone)]
pub(super) struct Own {
    /// Its name.
    pub(super) name: String,
    /// Its public keys.
    pub(super) keys: PublicKeys,
    /// What it owns, where the configuration says so.
    pub(super) pod_cidrs: Option<Vec<IpNet>>,
    /// What the pod CIDRs of every node lie in; empty: anywhere.
    pub(super) cluster_cidrs: Vec<IpNet>,
    /// Its record, where that is no file that somebody may have mistaken: it wins over any other.
    pub(super) record: Option<PathBuf>,
}

/// What this node owns, by its configuration or its record.
pub(super) fn local_cidrs(own: &Own, accepted: &Accepted) -> Option<Vec<IpNet>> {
    let record = || accepted.values().flatten().find(|record| record.name == own.name);
    own.pod_cidrs.clone().or_else(|| record().map(|record| record.pod_cidrs.clone()))
}

/// What contradicts the configuration in this node's own record ends a start even where a last good
/// version is known: the configuration has changed, or the key has.
pub(super) fn check_own(own: &Own, files: &Files) -> Result<(), Failure> {
    for (path, records) in files {
        if let Ok(records) = records
            && let Some(error) = own_error(own, records)
        {
            return Err(Failure::Usage(format!("node records {}: {error}", path.display())));
        }
    }
    Ok(())
}

fn own_error(own: &Own, records: &[NodeRecord]) -> Option<String> {
    let record = records.iter().find(|record| record.name == own.name)?;
    let ours: Vec<_> = own.keys.iter().collect();
    // What is made here follows from the keys, if a moment later.
    let wrong = own.record.is_none().then(|| record.keys().iter().find(|key| !ours.contains(key)));
    if let Some(key) = wrong.flatten() {
        return Some(format!(
            "node {}: public_key: the record says {key}, but this node's key is {}: correct the record, \
             or the name in the configuration",
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
            "node {}: pod_cidrs: the record and the configuration differ: correct one, or leave \
             pod_cidrs out of the configuration",
            own.name
        ));
    }
    outside(own, record)
}

/// Returns the reason to refuse a record with addresses outside the node's bounds. A stolen node
/// must not attract traffic to addresses outside the cluster. An endpoint must not lie in a pod
/// prefix, because an unreachable route would cut the node off from it.
fn outside(own: &Own, record: &NodeRecord) -> Option<String> {
    let NodeRecord { name, pod_cidrs, endpoints, .. } = record;
    if let Err(error) = check_inside(pod_cidrs, &own.cluster_cidrs) {
        return Some(format!("node {name}: pod_cidrs: {error}"));
    }
    let error = check_outside(endpoints.iter().map(Endpoint::ip), &own.cluster_cidrs).err()?;
    Some(format!("node {name}: endpoints: {error}"))
}

/// A file on its way to being in force.
struct Candidate {
    records: Vec<NodeRecord>,
    /// Whether it differs from the last good version.
    changed: bool,
}

/// Chooses the records to be in force: every file's new version, less those that are wrong or that
/// contradict others. Of two files that contradict each other the changed one goes back to its last
/// good version; of two changed ones the later by name, but that a key stays with the file whose last
/// good version names it. So what was in force and has not changed is never lost, files that change
/// together (a prefix moves from one to the other) are taken together, and whoever claims the next key of
/// another node after that has announced it does not stop the change. (Where both come at once, as after a
/// time without the API server, nothing tells which of the two is right.) Only what this node says of
/// itself in Kubernetes, which nobody else can change, wins in any case.
///
/// `standing` are the prefixes that this node owns by what is in force; they stay its own while its
/// record is away, so that nobody else's record can take them.
pub(super) fn settle(
    own: &Own,
    standing: &[IpNet],
    last_good: &Accepted,
    files: Files,
) -> (Accepted, BTreeMap<PathBuf, String>) {
    let mut rejected = BTreeMap::new();
    let mut candidates = BTreeMap::new();
    for (path, result) in files {
        let good = last_good.get(&path);
        match result {
            Ok(records) => {
                let changed = good != Some(&records);
                candidates.insert(path, Candidate { records, changed });
            }
            Err(error) => {
                rejected.insert(path.clone(), error.to_string());
                if let Some(good) = good {
                    candidates.insert(path, Candidate { records: good.clone(), changed: false });
                }
            }
        }
    }
    while let Some((path, error)) = contradiction(own, standing, last_good, &candidates) {
        let changed = candidates.remove(&path).is_some_and(|candidate| candidate.changed);
        if let Some(good) = last_good.get(&path).filter(|_| changed) {
            candidates.insert(path.clone(), Candidate { records: good.clone(), changed: false });
        }
        rejected.entry(path).or_insert(error);
    }
    let accepted = candidates.into_iter().map(|(path, candidate)| (path, candidate.records));
    (accepted.collect(), rejected)
}

/// A file that cannot be in force beside the others, and why.
fn contradiction(
    own: &Own,
    standing: &[IpNet],
    last_good: &Accepted,
    candidates: &BTreeMap<PathBuf, Candidate>,
) -> Option<(PathBuf, String)> {
    for (path, candidate) in candidates {
        let outside = || candidate.records.iter().find_map(|record| outside(own, record));
        if let Some(error) = own_error(own, &candidate.records).or_else(outside) {
            return Some((path.clone(), error));
        }
    }
    let mut records = candidates.values().flat_map(|candidate| &candidate.records);
    let recorded = records.any(|record| record.name == own.name);
    let standing = (!recorded && !standing.is_empty()).then_some(standing);
    let configured = own.pod_cidrs.as_deref().or(standing).map(|pod_cidrs| NodeRecord {
        name: own.name.clone(),
        public_key: own.keys.first,
        second_public_key: own.keys.second,
        endpoints: Vec::new(),
        pod_cidrs: pod_cidrs.to_vec(),
    });
    // The configuration stands for this node's own record, which says the same.
    let stands = |record: &NodeRecord| configured.is_some() && record.name == own.name;
    let records = candidates.iter().flat_map(|(path, candidate)| {
        let records = candidate.records.iter().filter(|record| !stands(record));
        records.map(move |record| (Some(path), record))
    });
    let conflict = records::conflict(configured.iter().map(|c| (None, c)).chain(records))?;
    let changed = |path: &Option<&PathBuf>| path.is_some_and(|path| candidates[path].changed);
    // This node's configuration, which is no file, never loses.
    let had_key = |path: &Option<&PathBuf>| {
        path.is_none_or(|path| {
            let mut good = last_good.get(path).into_iter().flatten();
            good.any(|record| record.keys().iter().any(|key| Some(key) == conflict.key))
        })
    };
    let (a, b) = match conflict.between {
        (a, b) if a <= b => (a, b),
        (a, b) => (b, a),
    };
    let keep_b = match own.record.as_ref() {
        Some(record) if b == Some(record) => true,
        Some(record) if a == Some(record) => false,
        _ => (changed(&a), !had_key(&a)) > (changed(&b), !had_key(&b)),
    };
    let (loser, other) = if keep_b { (a, b) } else { (b, a) };
    let other = match other {
        Some(other) if Some(other) != loser => format!(" (the other is in {})", other.display()),
        Some(_) => String::new(),
        None => " (the other is this node)".to_owned(),
    };
    Some((loser?.clone(), format!("{}{other}", conflict.message)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::control::records::tests::record;
    use crate::keys::PublicKey;

    #[test]
    fn what_this_node_says_of_itself_in_kubernetes_wins() {
        let own = Own {
            name: "node-1".to_owned(),
            keys: PublicKey([1; 32]).into(),
            pod_cidrs: None,
            cluster_cidrs: Vec::new(),
            record: Some("z".into()),
        };
        let good = Accepted::from([("b".into(), vec![record(2, &["10.2.0.0/24"])])]);
        let twin = NodeRecord { name: "twin".to_owned(), ..record(1, &["10.8.0.0/24"]) };
        let files = Files::from([
            ("a".into(), Ok(vec![twin])),
            ("b".into(), Ok(vec![record(2, &["10.2.0.0/24"])])),
            ("c".into(), Ok(vec![record(3, &["10.1.0.128/25"])])),
            ("d".into(), Ok(vec![record(4, &["192.0.2.1/32"])])),
            ("z".into(), Ok(vec![record(1, &["10.1.0.0/24"])])),
        ]);
        let (accepted, rejected) = settle(&own, &[], &good, files);
        assert_eq!(accepted.keys().collect::<Vec<_>>(), [Path::new("b"), Path::new("z")]);
        assert_eq!(rejected.len(), 3, "{rejected:?}");
        // Also over what was in force before this node was.
        let files = Files::from([
            ("b".into(), Ok(vec![record(2, &["10.2.0.0/24"])])),
            ("z".into(), Ok(vec![record(1, &["10.2.0.0/24"])])),
        ]);
        let (accepted, _) = settle(&own, &[], &good, files);
        assert_eq!(accepted.keys().collect::<Vec<_>>(), [Path::new("z")]);
    }
}
