#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const BOTH: [&str; 2] = ["10.1.0.0/29", "fd00:1::/64"];

fn id(name: impl ToString) -> AttachmentId {
    AttachmentId { container_id: name.to_string(), ifname: "eth0".into() }
}

fn wanted(name: impl ToString) -> Wanted {
    let lease = Lease {
        id: id(name),
        network: "skein".into(),
        addresses: vec![],
        netns: "/run/netns/x".into(),
        namespace: Some(NamespaceId { device: 4, inode: 1 }),
        path_visible: true,
        boot: "boot".into(),
        pod: None,
    };
    Wanted { lease, addresses: vec![] }
}

fn nets(cidrs: &[&str]) -> Vec<IpNet> {
    cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect()
}

fn leases(cidrs: &[&str], reserved: &[&str]) -> Leases {
    let reserved: Vec<IpAddr> = reserved.iter().map(|ip| ip.parse().unwrap()).collect();
    let mut leases = Leases::default();
    leases.set_pools(&nets(cidrs), &reserved);
    leases
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
}

fn texts(lease: &Lease) -> Vec<String> {
    lease.addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn one_address_a_family_and_the_same_for_the_same() {
    let mut leases = leases(&BOTH, &["10.1.0.1", "fd00:1::1"]);
    let first = leases.allocate(wanted("a"), at(0)).unwrap();
    assert_eq!(texts(&first), ["10.1.0.2", "fd00:1::2"]);
    assert_eq!(leases.take_changes().len(), 1);
    assert_eq!(leases.allocate(wanted("a"), at(0)).unwrap(), first);
    assert_eq!(leases.take_changes(), [], "nothing to write");
    let mut elsewhere = wanted("a");
    elsewhere.lease.namespace = Some(NamespaceId { device: 4, inode: 2 });
    let error = leases.allocate(elsewhere, at(0)).unwrap_err();
    assert!(matches!(error, IpamError::OtherNamespace(old) if *old == first));
}

#[test]
fn addresses_rest_unless_nothing_else_is_free() {
    let mut leases = leases(&["10.1.0.0/29"], &["10.1.0.1"]);
    for name in 0..5 {
        leases.allocate(wanted(name), at(0)).unwrap();
    }
    let error = leases.allocate(wanted("late"), at(0)).unwrap_err().to_string();
    assert_eq!(error, "no free address in 10.1.0.0/29: 5 are in use");
    leases.release(&id(1), at(1)).unwrap();
    leases.release(&id(0), at(2)).unwrap();
    assert_eq!(leases.usage(at(2))[0].resting, 2);
    let again = leases.allocate(wanted("again"), at(3)).unwrap();
    assert_eq!(texts(&again), ["10.1.0.3"], "the one that has rested longest");
    assert_eq!(leases.usage(at(3))[0].resting, 1);
    assert_eq!(leases.usage(at(40))[0].resting, 0);
    assert_eq!(
        leases.usage(at(40))[0],
        Usage { cidr: nets(&["10.1.0.0/29"])[0], total: 5, used: 4, resting: 0 }
    );
}

#[test]
fn what_was_freed_comes_last() {
    let mut leases = leases(&["10.1.0.0/24"], &[]);
    for (second, name) in (0..200).zip(0..) {
        let lease = leases.allocate(wanted(name), at(second * 100)).unwrap();
        assert_eq!(texts(&lease), [format!("10.1.0.{}", second + 1)]);
        leases.release(&id(name), at(second * 100)).unwrap();
    }
}

#[test]
fn addresses_that_are_asked_for() {
    let mut leases = leases(&BOTH, &["10.1.0.1"]);
    let ask = |leases: &mut Leases, name: &str, ip: &str| {
        let addresses = vec![ip.parse().unwrap()];
        leases.allocate(Wanted { addresses, ..wanted(name) }, at(0))
    };
    assert_eq!(texts(&ask(&mut leases, "a", "10.1.0.5").unwrap())[0], "10.1.0.5");
    assert!(matches!(ask(&mut leases, "b", "10.1.0.5"), Err(IpamError::Taken(_))));
    for stranger in ["10.2.0.5", "10.1.0.1", "10.1.0.0", "10.1.0.7"] {
        assert!(
            matches!(ask(&mut leases, "b", stranger), Err(IpamError::NotOurs(_))),
            "{stranger}"
        );
    }
    assert!(leases.get(&id("b")).is_none());
}

#[test]
fn pools_change_under_leases() {
    let mut leases = leases(&["10.1.0.0/29"], &[]);
    assert!(matches!(Leases::default().allocate(wanted("x"), at(0)), Err(IpamError::NoPool)));
    let old = leases.allocate(wanted("a"), at(0)).unwrap();
    leases.set_pools(&nets(&["10.2.0.0/29"]), &[]);
    assert_eq!(leases.get(&old.id), Some(&old));
    assert_eq!(texts(&leases.allocate(wanted("b"), at(0)).unwrap()), ["10.2.0.1"]);
    assert_eq!(leases.release(&old.id, at(0)), Some(old));
    assert_eq!(leases.release(&id("a"), at(0)), None);
}

#[test]
fn a_second_pool_serves_when_the_first_is_full() {
    let mut leases = leases(&["10.1.0.0/30", "10.2.0.0/30"], &[]);
    let all: BTreeSet<_> =
        (0..4).map(|name| texts(&leases.allocate(wanted(name), at(0)).unwrap())).collect();
    assert_eq!(all.len(), 4);
    assert!(matches!(leases.allocate(wanted(4), at(0)), Err(IpamError::Exhausted { .. })));
}

#[test]
fn adopted_leases_are_taken_and_never_doubled() {
    let mut leases = leases(&["10.1.0.0/29"], &[]);
    let mut found = wanted("a").lease;
    found.addresses = vec!["10.1.0.1".parse().unwrap()];
    leases.adopt(found.clone()).unwrap();
    leases.adopt(found.clone()).unwrap();
    assert_eq!(leases.take_changes().len(), 1);
    found.id = id("b");
    assert!(matches!(leases.adopt(found), Err(IpamError::Taken(_))));
    assert_eq!(texts(&leases.allocate(wanted("c"), at(0)).unwrap()), ["10.1.0.2"]);
}

#[derive(Debug, Clone)]
enum Step {
    Allocate(u8),
    Release(u8),
    Pools(bool),
    Reset,
    Undo,
    Wait(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..12u8).prop_map(Step::Allocate),
        4 => (0..12u8).prop_map(Step::Release),
        1 => any::<bool>().prop_map(Step::Pools),
        1 => Just(Step::Reset),
        1 => Just(Step::Undo),
        1 => (0..40u8).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..80)
}

proptest! {
    #[test]
    fn nothing_is_doubled_or_lost(steps in steps()) {
        let mut leases = leases(&BOTH, &[]);
        // What was written.
        let mut disk: BTreeMap<AttachmentId, Lease> = BTreeMap::new();
        let mut now = 0;
        for step in steps {
            match step {
                Step::Allocate(name) => match leases.allocate(wanted(name), at(now)) {
                    Ok(lease) => prop_assert_eq!(leases.get(&id(name)), Some(&lease)),
                    Err(IpamError::Exhausted { .. }) => prop_assert!(leases.iter().count() >= 2),
                    Err(other) => prop_assert!(false, "{}", other),
                },
                Step::Release(name) => {
                    leases.release(&id(name), at(now));
                    prop_assert!(leases.get(&id(name)).is_none());
                }
                Step::Pools(small) => {
                    let cidrs = if small { ["10.1.0.0/30", "fd00:1::/126"] } else { BOTH };
                    leases.set_pools(&nets(&cidrs), &[]);
                }
                Step::Reset => leases.reset(disk.values().cloned().collect()),
                Step::Undo => {
                    let changes = leases.take_changes();
                    leases.undo(changes);
                }
                Step::Wait(seconds) => now += u64::from(seconds),
            }
            if matches!(step, Step::Reset | Step::Undo) {
                prop_assert!(leases.iter().eq(disk.values()));
            } else if now % 2 == 0 {
                for change in leases.take_changes() {
                    match change.after {
                        Some(lease) => disk.insert(change.id, lease),
                        None => disk.remove(&change.id),
                    };
                }
                prop_assert!(leases.iter().eq(disk.values()));
            }
            let addresses: Vec<_> = leases.iter().flat_map(|lease| &lease.addresses).collect();
            let unique: BTreeSet<_> = addresses.iter().collect();
            prop_assert_eq!(addresses.len(), unique.len());
        }
    }
}

fn open(path: &Path) -> Ipam {
    let opened = Ipam::open(path).unwrap();
    assert_eq!(opened.damaged, None);
    opened.ipam
}

async fn with_pools(ipam: Ipam) -> Ipam {
    ipam.set_pools(nets(&["10.1.0.0/16", "fd00:1::/64"]), vec![]).await.unwrap();
    ipam
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cni/leases.redb");
    let ipam = with_pools(open(&path)).await;
    let (a, b) =
        (ipam.allocate(wanted("a")).await.unwrap(), ipam.allocate(wanted("b")).await.unwrap());
    ipam.release(a.id.clone()).await.unwrap();
    assert!(Ipam::open(&path).unwrap_err().to_string().contains("another process"));
    drop(ipam);
    let ipam = with_pools(open(&path)).await;
    assert_eq!(ipam.list().await.unwrap(), std::slice::from_ref(&b));
    let c = ipam.allocate(wanted("c")).await.unwrap();
    assert!(c.addresses[0] > b.addresses[0], "not the one that was just freed");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_share_a_transaction_and_get_different_addresses() {
    let directory = tempfile::tempdir().unwrap();
    let ipam = std::sync::Arc::new(with_pools(open(&directory.path().join("leases.redb"))).await);
    let ask = |name: usize| {
        let ipam = std::sync::Arc::clone(&ipam);
        tokio::spawn(async move { ipam.allocate(wanted(name)).await.unwrap().addresses })
    };
    let mut all = BTreeSet::new();
    for asked in (0..100).map(ask).collect::<Vec<_>>() {
        all.extend(asked.await.unwrap());
    }
    assert_eq!(all.len(), 200);
    assert_eq!(ipam.usage().await.unwrap()[0].used, 100);
}

#[tokio::test]
async fn a_damaged_database_is_put_aside() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leases.redb");
    for damage in [&b"no database at all"[..], &[0; 8192]] {
        std::fs::write(&path, damage).unwrap();
        let opened = Ipam::open(&path).unwrap();
        let aside = opened.damaged.unwrap();
        assert_eq!(std::fs::read(aside).unwrap(), damage);
        with_pools(opened.ipam).await.allocate(wanted("a")).await.unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
