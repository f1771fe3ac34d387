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
    /// Name of this node's record if the agent writes it itself (Kubernetes): it wins over any
    /// other record. `None` if an operator writes it to a file.
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
    outside(own, record)
}

/// Returns the reason to refuse a record with addresses outside the node's bounds. A stolen node
/// must not attract traffic to addresses outside the cluster. An endpoint must not lie in a pod
/// prefix, because an unreachable route would cut the node off from it.
fn outside(own: &LocalNode, record: &NodeRecord) -> Option<String> {
    let NodeRecord { name, pod_cidrs, endpoints, .. } = record;
    if let Err(error) = check_inside(pod_cidrs, &own.cluster_cidrs) {
        return Some(format!("node {name}: pod_cidrs: {error}"));
    }
    let error = check_outside(endpoints.iter().map(Endpoint::ip), &own.cluster_cidrs).err()?;
    Some(format!("node {name}: endpoints: {error}"))
}

/// Returns the reason to refuse the records of a file regardless of other files.
fn refusal_reason(own: &LocalNode, records: &[NodeRecord]) -> Option<String> {
    let outside = || records.iter().find_map(|record| outside(own, record));
    own_error(own, records).or_else(outside)
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
/// `standing` are the prefixes of this node by the active records. They stay this node's own while
/// its record is missing, so that no other record can claim them.
pub(super) fn resolve_conflicts(
    own: &LocalNode,
    standing: &[IpNet],
    last_good: &Accepted,
    files: ParsedRecords,
) -> Resolution {
    let standing = (!standing.is_empty()).then_some(standing);
    let configured = own.pod_cidrs.as_deref().or(standing).map(|pod_cidrs| NodeRecord {
        name: own.name.clone(),
        public_key: own.keys.first,
        second_public_key: own.keys.second,
        endpoints: Vec::new(),
        pod_cidrs: pod_cidrs.to_vec(),
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
        resolver.refuse(loser, error);
    }
    let Resolver { paths, candidates, rejected, .. } = resolver;
    let accepted = paths.into_iter().zip(candidates).filter_map(|(path, candidate)| {
        candidate.map(|candidate| (path.clone(), candidate.records.to_vec()))
    });
    Resolution { accepted: accepted.collect(), rejected }
}

/// State of a decision. Files are named by their numbers in the order of their paths; `None` stands
/// for this node's configuration.
struct Resolver<'a> {
    own: &'a LocalNode,
    /// Record that stands for this node's own one: always if the configuration names the pod CIDRs,
    /// otherwise while no file has a record of this node.
    configured: Option<&'a NodeRecord>,
    last_good: &'a Accepted,
    paths: Vec<&'a PathBuf>,
    candidates: Vec<Option<Candidate<'a>>>,
    /// Number of candidates' records of this node.
    own_records: usize,
    conflicts: Conflicts<'a, Option<usize>>,
    rejected: BTreeMap<PathBuf, String>,
}

impl<'a> Resolver<'a> {
    /// Adds a candidate. One that contradicts the configuration is rejected.
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
    fn refuse(&mut self, file: usize, error: String) {
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

    /// Enters the first error of a file. Returns the last good version if `candidate` is new.
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
        let stands = self.own.pod_cidrs.is_some() || self.own_records == 0;
        self.conflicts.remove(None, 0);
        if stands {
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
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::control::records::RecordError;
    use crate::control::records::conflict::tests::reference as first_conflict;
    use crate::control::records::tests::record;
    use skein_ipc::keys::PublicKey;

    #[test]
    fn own_record_in_kubernetes_wins() {
        let own = LocalNode {
            name: "node-1".to_owned(),
            keys: PublicKey([1; 32]).into(),
            pod_cidrs: None,
            cluster_cidrs: Vec::new(),
            record: Some("z".into()),
        };
        let good = Accepted::from([("b".into(), vec![record(2, &["10.2.0.0/24"])])]);
        let twin = NodeRecord { name: "twin".to_owned(), ..record(1, &["10.8.0.0/24"]) };
        let files = ParsedRecords::from([
            ("a".into(), Ok(vec![twin])),
            ("b".into(), Ok(vec![record(2, &["10.2.0.0/24"])])),
            ("c".into(), Ok(vec![record(3, &["10.1.0.128/25"])])),
            ("d".into(), Ok(vec![record(4, &["192.0.2.1/32"])])),
            ("z".into(), Ok(vec![record(1, &["10.1.0.0/24"])])),
        ]);
        let Resolution { accepted, rejected } = resolve_conflicts(&own, &[], &good, files);
        assert_eq!(accepted.keys().collect::<Vec<_>>(), [Path::new("b"), Path::new("z")]);
        assert_eq!(rejected.len(), 3, "{rejected:?}");
        // The own record also wins over records that were active before.
        let files = ParsedRecords::from([
            ("b".into(), Ok(vec![record(2, &["10.2.0.0/24"])])),
            ("z".into(), Ok(vec![record(1, &["10.2.0.0/24"])])),
        ]);
        let Resolution { accepted, .. } = resolve_conflicts(&own, &[], &good, files);
        assert_eq!(accepted.keys().collect::<Vec<_>>(), [Path::new("z")]);
    }

    /// Returns the same decision by comparing all records again after each refusal.
    fn reference(
        own: &LocalNode,
        standing: &[IpNet],
        last_good: &Accepted,
        files: &ParsedRecords,
    ) -> (Accepted, BTreeMap<PathBuf, ()>) {
        let mut rejected = BTreeMap::new();
        let mut candidates: BTreeMap<&PathBuf, (&[NodeRecord], bool)> = BTreeMap::new();
        for (path, result) in files {
            let good = last_good.get(path);
            match result {
                Ok(records) => {
                    candidates.insert(path, (records, good != Some(records)));
                }
                Err(_) => {
                    rejected.insert(path.clone(), ());
                    candidates.extend(good.map(|good| (path, (&good[..], false))));
                }
            }
        }
        while let Some(loser) = loser(own, standing, last_good, &candidates) {
            let (_, changed) = candidates.remove(loser).unwrap();
            if let Some(good) = last_good.get(loser).filter(|_| changed) {
                candidates.insert(loser, (good, false));
            }
            rejected.insert(loser.clone(), ());
        }
        let accepted = candidates.into_iter();
        (accepted.map(|(path, (records, _))| (path.clone(), records.to_vec())).collect(), rejected)
    }

    fn loser<'a>(
        own: &LocalNode,
        standing: &[IpNet],
        last_good: &Accepted,
        candidates: &BTreeMap<&'a PathBuf, (&[NodeRecord], bool)>,
    ) -> Option<&'a PathBuf> {
        let is_wrong = |(_, (records, _)): &(&&PathBuf, &(&[NodeRecord], bool))| {
            refusal_reason(own, records).is_some()
        };
        if let Some((path, _)) = candidates.iter().find(is_wrong) {
            return Some(path);
        }
        let mut records = candidates.values().flat_map(|(records, _)| records.iter());
        let recorded = records.any(|record| record.name == own.name);
        let standing = (!recorded && !standing.is_empty()).then_some(standing);
        let configured = own.pod_cidrs.as_deref().or(standing).map(|pod_cidrs| NodeRecord {
            name: own.name.clone(),
            public_key: own.keys.first,
            second_public_key: own.keys.second,
            endpoints: Vec::new(),
            pod_cidrs: pod_cidrs.to_vec(),
        });
        let stands = |record: &NodeRecord| configured.is_some() && record.name == own.name;
        let records = candidates.iter().flat_map(|(path, (records, _))| {
            let records = records.iter().filter(|record| !stands(record));
            records.map(move |record| (Some(*path), record))
        });
        let (a, b, key) = first_conflict(configured.iter().map(|c| (None, c)).chain(records))?;
        let (a, b) = (a.min(b), a.max(b));
        let rank = |path: Option<&PathBuf>| {
            let had_key = path.is_none_or(|path| {
                let mut good = last_good.get(path).into_iter().flatten();
                good.any(|record| record.keys().iter().any(|held| Some(held) == key))
            });
            (path.is_some_and(|path| candidates[path].1), !had_key)
        };
        let own_record = own.record.as_ref();
        let keep_b = (own_record.is_some() && b == own_record)
            || ((own_record.is_none() || a != own_record) && rank(a) > rank(b));
        if keep_b { a } else { b }
    }

    /// Records with few names, keys, prefixes and addresses, so that many of them contradict.
    fn records() -> impl Strategy<Value = Vec<NodeRecord>> {
        const CIDRS: [&str; 8] = [
            "10.1.0.0/24",
            "10.2.0.0/24",
            "10.2.0.128/25",
            "10.3.0.0/24",
            "10.0.0.0/14",
            "fd00:1::/64",
            "192.0.2.4/32",
            "192.0.2.0/30",
        ];
        let cidrs = prop::collection::vec(prop::sample::select(&CIDRS[..]), 1..3);
        let parts = (1_u8..6, 1_u8..6, prop::option::weighted(0.2, 1_u8..6), 1_u8..6, cidrs);
        let one = parts.prop_map(|(name, key, second, endpoint, cidrs)| NodeRecord {
            name: format!("node-{name}"),
            public_key: PublicKey([key; 32]),
            second_public_key: second
                .filter(|second| *second != key)
                .map(|key| PublicKey([key; 32])),
            ..record(endpoint, &cidrs)
        });
        prop::collection::vec(one, 0..3)
    }

    fn accepted() -> impl Strategy<Value = Accepted> {
        prop::collection::btree_map("[a-f]".prop_map(PathBuf::from), records(), 0..6)
    }

    fn files() -> impl Strategy<Value = ParsedRecords> {
        let result = prop_oneof![
            8 => records().prop_map(Ok),
            1 => Just(Err(RecordError::new("wrong"))),
        ];
        prop::collection::btree_map("[a-f]".prop_map(PathBuf::from), result, 0..6)
    }

    fn own() -> impl Strategy<Value = LocalNode> {
        let cidrs = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let (configured, cluster): (Vec<IpNet>, Vec<IpNet>) =
            (cidrs(&["10.1.0.0/24"]), cidrs(&["10.0.0.0/8", "fd00::/16"]));
        let pod_cidrs = prop::option::weighted(0.3, Just(configured));
        let cluster = prop_oneof![Just(Vec::new()), Just(cluster)];
        let record = prop::option::weighted(0.3, "[a-f]".prop_map(PathBuf::from));
        (pod_cidrs, cluster, record).prop_map(|(pod_cidrs, cluster_cidrs, record)| LocalNode {
            name: "node-1".to_owned(),
            keys: PublicKey([1; 32]).into(),
            pod_cidrs,
            cluster_cidrs,
            record,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn outcome_equals_that_of_the_reference(
            own in own(),
            stands in any::<bool>(),
            last_good in accepted(),
            files in files(),
        ) {
            let standing: Vec<IpNet> = stands.then(|| "10.1.0.0/24".parse().unwrap()).into_iter().collect();
            let expected = reference(&own, &standing, &last_good, &files);
            let Resolution { accepted, rejected } = resolve_conflicts(&own, &standing, &last_good, files);
            let rejected = rejected.into_keys().map(|path| (path, ())).collect();
            prop_assert_eq!((accepted, rejected), expected);
        }
    }

    /// The prefix of each node moves to the node before, but one file is unreadable: each refusal
    /// causes the next.
    #[test]
    fn chain_of_refusals_ends_at_the_last_good_records() {
        let count: u32 = 5_000;
        let cidr = |n: u32| IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + n * 16).into(), 28);
        let node = |n: u32, owned: u32| {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&(n + 1).to_be_bytes());
            let cidr = cidr(owned).unwrap();
            let name = format!("node-{n}");
            let record = NodeRecord { name, public_key: PublicKey(key), ..record(1, &[]) };
            vec![NodeRecord { pod_cidrs: vec![cidr], ..record }]
        };
        let path = |n: u32| PathBuf::from(format!("{n:06}"));
        let good: Accepted = (0..count).map(|n| (path(n), node(n, n))).collect();
        let mut files: ParsedRecords = (0..count).map(|n| (path(n), Ok(node(n, n + 1)))).collect();
        files.insert(path(count - 1), Ok(node(count - 1, 0)));
        files.insert(path(0), Err(RecordError::new("wrong")));
        let own = LocalNode {
            name: "own".to_owned(),
            keys: PublicKey([1; 32]).into(),
            pod_cidrs: None,
            cluster_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
            record: None,
        };
        let Resolution { accepted, rejected } = resolve_conflicts(&own, &[], &good, files);
        assert_eq!(rejected.len(), count as usize, "Every change is refused.");
        assert!(accepted == good, "The last good records stay active.");
    }
}
