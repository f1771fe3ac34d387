//! Tests of the conflict resolution. Some tests compare it with a reference that compares all
//! pairs.

#![allow(clippy::unwrap_used)]

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
    active_cidrs: &[IpNet],
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
    while let Some(loser) = loser(own, active_cidrs, last_good, &candidates) {
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
    active_cidrs: &[IpNet],
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
    let active_cidrs = (!recorded && !active_cidrs.is_empty()).then_some(active_cidrs);
    let configured = own.pod_cidrs.as_deref().or(active_cidrs).map(|pod_cidrs| NodeRecord {
        name: own.name.clone(),
        public_key: own.keys.first,
        second_public_key: own.keys.second,
        endpoints: Vec::new(),
        pod_cidrs: pod_cidrs.to_vec(),
        overlay_addresses: Vec::new(),
    });
    let is_configured = |record: &NodeRecord| configured.is_some() && record.name == own.name;
    let records = candidates.iter().flat_map(|(path, (records, _))| {
        let records = records.iter().filter(|record| !is_configured(record));
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
        second_public_key: second.filter(|second| *second != key).map(|key| PublicKey([key; 32])),
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
        has_active_cidrs in any::<bool>(),
        last_good in accepted(),
        files in files(),
    ) {
        let active_cidrs = has_active_cidrs.then(|| "10.1.0.0/24".parse::<IpNet>().unwrap());
        let active_cidrs: Vec<_> = active_cidrs.into_iter().collect();
        let expected = reference(&own, &active_cidrs, &last_good, &files);
        let Resolution { accepted, rejected } =
            resolve_conflicts(&own, &active_cidrs, &last_good, files);
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
