//! Comparison with a slow and simple model under random operations.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::super::change_set::ChangeSet;
use super::super::state::State;
use super::disk::Disk;
use super::*;

#[derive(Debug, Clone)]
enum Step {
    Allocate { who: u8, namespace: u64, asked: Option<u8> },
    Release { who: u8 },
    Adopt { who: u8, host: u8 },
    Pools { which: u8, reserved: u8 },
    Wait { seconds: u64 },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let asked = prop::option::weighted(0.2, 0..20_u8);
    prop_oneof![
        8 => (0..10_u8, 1..3_u64, asked)
            .prop_map(|(who, namespace, asked)| Step::Allocate { who, namespace, asked }),
        6 => (0..10_u8).prop_map(|who| Step::Release { who }),
        1 => (0..10_u8, 0..20_u8).prop_map(|(who, host)| Step::Adopt { who, host }),
        1 => (0..4_u8, 0..9_u8).prop_map(|(which, reserved)| Step::Pools { which, reserved }),
        4 => (0..25_u64).prop_map(|seconds| Step::Wait { seconds }),
        1 => Just(Step::Reopen),
    ]
}

/// Model of IPv4 in 10.0.0.0/27 only, because both families share their code. Hosts are the last
/// byte of the address.
#[derive(Default)]
struct Model {
    leases: BTreeMap<u8, (u8, Option<u64>)>,
    freed: BTreeMap<u8, u64>,
    usable: BTreeSet<u8>,
    in_cidr: BTreeSet<u8>,
    cursor: Option<u8>,
}

impl Model {
    fn leased(&self) -> BTreeSet<u8> {
        let hosts: BTreeSet<_> = self.leases.values().map(|(host, _)| *host).collect();
        assert_eq!(hosts.len(), self.leases.len(), "An address has two leases.");
        hosts
    }

    fn next(&self, now: u64) -> Option<u8> {
        let leased = self.leased();
        let available: Vec<_> = self.usable.difference(&leased).copied().collect();
        let is_quarantined = |host: &u8| self.freed.get(host).is_some_and(|freed| now - freed < 30);
        let free: Vec<_> = available.iter().copied().filter(|host| !is_quarantined(host)).collect();
        let later = free.iter().find(|host| Some(**host) > self.cursor).or(free.first());
        let oldest = || available.iter().min_by_key(|host| (self.freed[host], **host));
        later.or_else(oldest).copied()
    }

    fn insert_lease(&mut self, who: u8, host: u8, namespace: Option<u64>) {
        self.freed.remove(&host);
        self.leases.insert(who, (host, namespace));
    }

    /// Sets the pools and the reserved address of the model. Returns both for [`Ipam::set_pools`].
    fn set_pools(&mut self, which: u8, reserved: u8) -> (Vec<IpNet>, Vec<IpAddr>) {
        let pools = match which {
            0 => vec![],
            1 => cidrs(&["10.0.0.0/29"]),
            2 => cidrs(&["10.0.0.8/29", "10.0.0.2/31"]),
            _ => cidrs(&["10.0.0.0/28"]),
        };
        let hosts = |cidr: &IpNet, all: bool| match cidr {
            IpNet::V4(cidr) if all && cidr.prefix_len() < 31 => {
                let (first, last) = (cidr.network().octets()[3], cidr.broadcast().octets()[3]);
                (first..=last).collect::<Vec<_>>()
            }
            IpNet::V4(cidr) => cidr.hosts().map(|ip| ip.octets()[3]).collect(),
            IpNet::V6(_) => unreachable!("IPv4 alone"),
        };
        self.in_cidr = pools.iter().flat_map(|cidr| hosts(cidr, true)).collect();
        self.usable = pools.iter().flat_map(|cidr| hosts(cidr, false)).collect();
        self.usable.remove(&reserved);
        (pools, vec![IpAddr::V4(address(reserved))])
    }
}

fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, host)
}

fn host(lease: &Lease) -> u8 {
    assert_eq!(lease.v6, None);
    lease.v4.unwrap().octets()[3]
}

fn run(steps: Vec<Step>) {
    let disk = Disk::new();
    let mut ipam = Some(disk.open().unwrap());
    let (mut model, mut now) = (Model::default(), 0);
    let (mut pools, mut reserved) = model.set_pools(3, 1);
    ipam.as_mut().unwrap().set_pools(&pools, &reserved);
    for step in steps {
        if let Step::Reopen = step {
            // Only one process at a time can open the file.
            drop(ipam.take());
            ipam.insert(disk.open().unwrap()).set_pools(&pools, &reserved);
        }
        let ipam = ipam.as_mut().unwrap();
        match step {
            Step::Reopen => {}
            Step::Wait { seconds } => now += seconds,
            Step::Pools { which, reserved: host } => {
                (pools, reserved) = model.set_pools(which, host);
                ipam.set_pools(&pools, &reserved);
            }
            Step::Release { who } => {
                let released = ipam.release(&id(&who.to_string()), at(now)).unwrap();
                let expected = model.leases.remove(&who).map(|(host, _)| host);
                assert_eq!(released.as_ref().map(host), expected);
                model.freed.extend(expected.map(|host| (host, now)));
            }
            Step::Adopt { who, host: wanted } => {
                let mut lease = Lease {
                    id: id(&who.to_string()),
                    network: String::new(),
                    v4: Some(address(wanted)),
                    v6: None,
                    netns: None,
                    pod: None,
                    time: at(now),
                };
                let result = ipam.adopt(lease.clone(), at(now));
                if model.leases.iter().any(|(id, (host, _))| *host == wanted && *id != who) {
                    assert!(matches!(result, Err(IpamError::Taken { .. })));
                    continue;
                }
                let before = model.leases.get(&who).copied();
                if let Some((old, _)) = before.filter(|(old, _)| *old != wanted) {
                    model.freed.insert(old, now);
                }
                model.insert_lease(who, wanted, before.and_then(|(_, namespace)| namespace));
                lease.netns.clone_from(&result.as_ref().unwrap().netns);
                assert_eq!(host(&result.unwrap()), wanted);
            }
            Step::Allocate { who, namespace, asked } => {
                let request = Request {
                    netns: netns(namespace),
                    ips: asked.map(|host| IpAddr::V4(address(host))).into_iter().collect(),
                    ..request(&who.to_string())
                };
                let result = ipam.allocate(request, at(now));
                let expected = match (model.leases.get(&who), asked) {
                    (Some((host, known)), _) if known.is_none_or(|known| known == namespace) => {
                        Ok(*host)
                    }
                    (Some(_), _) => Err("namespace"),
                    (None, _) if model.in_cidr.is_empty() => Err("no pools"),
                    (None, Some(host)) if model.leased().contains(&host) => Err("taken"),
                    (None, Some(host)) if model.usable.contains(&host) => Ok(host),
                    (None, Some(host)) if model.in_cidr.contains(&host) => Err("reserved"),
                    (None, Some(_)) => Err("not in pool"),
                    (None, None) => model.next(now).ok_or("exhausted"),
                };
                let given = result.as_ref().map(host).map_err(|error| match error {
                    IpamError::OtherNamespace(_) => "namespace",
                    IpamError::Taken { .. } => "taken",
                    IpamError::Reserved(_) => "reserved",
                    IpamError::NotInPool(_) => "not in pool",
                    IpamError::NoPools => "no pools",
                    IpamError::Exhausted { .. } => "exhausted",
                    _ => "other error",
                });
                assert_eq!(given, expected);
                if let (Ok(host), None) = (given, model.leases.get(&who)) {
                    model.insert_lease(who, host, Some(namespace));
                    model.cursor = if asked.is_none() { Some(host) } else { model.cursor };
                }
            }
        }
        let leases: BTreeMap<_, _> = ipam
            .list()
            .map(|lease| {
                let who = lease.id.container_id.parse().unwrap();
                (who, (host(lease), lease.netns.as_ref().map(|netns| netns.inode)))
            })
            .collect();
        assert_eq!(leases, model.leases);
        let usage = ipam.usage(at(now));
        let leased = model.leased();
        let quarantined = model.freed.iter().filter(|(_, freed)| now - **freed < 30);
        let quarantined: BTreeSet<_> = quarantined.map(|(host, _)| *host).collect();
        let sum = |pick: fn(&PoolUsage) -> u128| usage.pools.iter().map(pick).sum::<u128>();
        let usable = |hosts: &BTreeSet<u8>| model.usable.intersection(hosts).count() as u128;
        assert_eq!(sum(|pool| pool.total), model.usable.len() as u128);
        assert_eq!(sum(|pool| pool.in_use.into()), usable(&leased));
        assert_eq!(sum(|pool| pool.quarantined.into()), usable(&quarantined));
    }
}

/// Applies the steps in memory only.
fn apply(state: &mut State, steps: &[Step], now: &mut u64, change_set: &mut ChangeSet) {
    for step in steps {
        match *step {
            Step::Wait { seconds } => *now += seconds,
            Step::Release { who } => {
                state.release(&id(&who.to_string()), at(*now), change_set);
            }
            Step::Adopt { who, host } => {
                let lease = Lease {
                    id: id(&who.to_string()),
                    network: String::new(),
                    v4: Some(address(host)),
                    v6: None,
                    netns: None,
                    pod: None,
                    time: at(*now),
                };
                let _ = state.adopt(lease, at(*now), change_set);
            }
            Step::Allocate { who, asked, .. } => {
                let ips = asked.map(|host| IpAddr::V4(address(host))).into_iter().collect();
                let request = Request { ips, ..request(&who.to_string()) };
                let _ = state.allocate(request, at(*now), change_set);
            }
            Step::Pools { .. } | Step::Reopen => {}
        }
    }
}

proptest! {
    #[test]
    fn undo_restores_the_state(
        before in prop::collection::vec(step(), 0..40),
        undone in prop::collection::vec(step(), 1..40),
    ) {
        let (mut state, mut now) = (State::new(), 0);
        state.set_pools(&cidrs(&["10.0.0.0/28", "fd00::/64"]), &[ip("10.0.0.1")]);
        apply(&mut state, &before, &mut now, &mut ChangeSet::default());
        let text = format!("{state:?}");
        let mut change_set = ChangeSet::default();
        apply(&mut state, &undone, &mut now, &mut change_set);
        state.undo(change_set);
        prop_assert_eq!(format!("{:?}", state), text);
    }

    #[test]
    fn operations_match_the_model(steps in prop::collection::vec(step(), 1..120)) {
        run(steps);
    }
}
