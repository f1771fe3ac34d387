//! Tests of the allocation rules.

use super::disk::Disk;
use super::*;

fn ipam(pools: &[&str], reserved: &[&str]) -> Ipam {
    let mut ipam = Disk::new().open().unwrap();
    let reserved: Vec<_> = reserved.iter().map(|text| ip(text)).collect();
    ipam.set_pools(&cidrs(pools), &reserved);
    ipam
}

/// Allocates addresses for the attachment `name` and returns them as text.
fn allocate(ipam: &mut Ipam, name: &str, seconds: u64) -> String {
    shown(&ipam.allocate(request(name), at(seconds)).unwrap())
}

/// Returns all addresses that can be allocated.
fn all(pools: &[&str], reserved: &[&str]) -> Vec<String> {
    let mut ipam = ipam(pools, reserved);
    let next = |n: u32| ipam.allocate(request(&n.to_string()), at(0)).ok();
    (0..1000).map_while(next).map(|lease| shown(&lease)).collect()
}

#[test]
fn reserved_and_network_addresses_are_never_allocated() {
    assert_eq!(
        all(&["10.1.0.0/29"], &[]).len(),
        6,
        "The network and broadcast addresses must not be allocated."
    );
    let given = all(&["10.1.0.0/29"], &["10.1.0.1", "10.9.9.9", "fd00::1"]);
    assert_eq!(given, ["10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"]);
    assert_eq!(all(&["10.1.0.4/30"], &[]), ["10.1.0.5", "10.1.0.6"]);
    assert_eq!(all(&["10.1.0.4/31"], &[]), ["10.1.0.4", "10.1.0.5"]);
    assert_eq!(all(&["10.1.0.4/32"], &[]), ["10.1.0.4"]);
    assert_eq!(all(&["fd00::/126"], &["fd00::1"]), ["fd00::2", "fd00::3"]);
    assert_eq!(all(&["fd00::2/127"], &[]), ["fd00::2", "fd00::3"]);
    assert_eq!(all(&["fd00::2/128"], &[]), ["fd00::2"]);
    assert_eq!(
        all(&["10.2.0.0/30", "10.1.0.0/30"], &["10.1.0.1"]),
        ["10.1.0.2", "10.2.0.1", "10.2.0.2"]
    );
    assert_eq!(all(&["255.255.255.254/31"], &[]).len(), 2);
    assert_eq!(all(&["ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126"], &[]).len(), 3);
    assert_eq!(all(&["10.1.0.0/30"], &["10.1.0.1", "10.1.0.2"]).len(), 0);
}

#[test]
fn each_family_gets_an_address() {
    let mut ipam = ipam(&["10.1.0.0/24", "fd00:1::/64"], &["10.1.0.1", "fd00:1::1"]);
    assert_eq!(allocate(&mut ipam, "a", 0), "10.1.0.2 fd00:1::2");
    assert_eq!(allocate(&mut ipam, "b", 0), "10.1.0.3 fd00:1::3");
    let usage = ipam.usage(at(0));
    assert_eq!(usage.pools[0].total, 253);
    assert_eq!(usage.pools[1].total, (1 << 64) - 2);
    assert!(usage.pools.iter().all(|pool| (pool.in_use, pool.quarantined) == (2, 0)));
    assert!(usage.can_allocate());
}

#[test]
fn repeated_allocation_returns_the_lease_without_a_write() {
    let disk = Disk::new();
    let mut ipam = disk.open().unwrap();
    ipam.set_pools(&cidrs(&["10.1.0.0/24"]), &[]);
    let lease = ipam.allocate(request("a"), at(0)).unwrap();
    disk.reset(disk::Fault::None);
    let mut again = asking("a", &["10.1.0.77"]);
    again.netns.path = "/proc/7/ns/net".into();
    assert_eq!(ipam.allocate(again, at(9)).unwrap(), lease);
    assert_eq!(disk.operations(), 0);
    assert_eq!(ipam.release(&id("nobody"), at(9)).unwrap(), None);
    assert_eq!(disk.operations(), 0);
    let other = Request { id: AttachmentId { ifname: "net1".into(), ..id("a") }, ..request("a") };
    assert_ne!(
        ipam.allocate(other, at(9)).unwrap().v4,
        lease.v4,
        "Another interface must get another address."
    );
}

#[test]
fn allocation_in_another_namespace_needs_a_release() {
    let mut ipam = ipam(&["10.1.0.0/24"], &[]);
    let lease = ipam.allocate(request("a"), at(0)).unwrap();
    let rebooted = Netns { boot_id: "later".to_owned(), ..netns(1) };
    for netns in [netns(2), Netns { dev: 5, ..netns(1) }, rebooted] {
        let error = ipam.allocate(Request { netns, ..request("a") }, at(1)).unwrap_err();
        assert!(matches!(&error, IpamError::OtherNamespace(old) if **old == lease), "{error}");
    }
    assert_eq!(ipam.get(&id("a")), Some(&lease));
    // An adopted lease has no network namespace, so that a request from any namespace gets it.
    ipam.adopt(
        Lease { netns: None, ..Lease { id: id("b"), v4: "10.1.0.9".parse().ok(), ..lease } },
        at(1),
    )
    .unwrap();
    assert_eq!(ipam.allocate(request("b"), at(1)).unwrap().v4, "10.1.0.9".parse().ok());
}

#[test]
fn requested_addresses_are_checked() {
    let mut ipam = ipam(&["10.1.0.0/24", "fd00::/64"], &["10.1.0.1"]);
    assert_eq!(
        shown(&ipam.allocate(asking("a", &["10.1.0.9"]), at(0)).unwrap()),
        "10.1.0.9 fd00::1"
    );
    assert_eq!(
        shown(&ipam.allocate(asking("b", &["fd00::9", "10.1.0.8"]), at(0)).unwrap()),
        "10.1.0.8 fd00::9"
    );
    assert_eq!(
        allocate(&mut ipam, "c", 0),
        "10.1.0.2 fd00::2",
        "A requested address must not move the cursor."
    );
    let mut error = |ips: &[&str]| {
        let error = ipam.allocate(asking("x", ips), at(0)).unwrap_err();
        assert_eq!(error.code() as u32, 7, "{error}");
        error.to_string()
    };
    assert_eq!(error(&["10.1.0.9"]), "10.1.0.9 belongs to eth0 of container a");
    assert_eq!(error(&["10.2.0.9"]), "10.2.0.9 is in none of this node's pod CIDRs");
    for reserved in ["10.1.0.0", "10.1.0.1", "10.1.0.255", "fd00::"] {
        assert_eq!(error(&[reserved]), format!("{reserved} is reserved"));
    }
    assert!(error(&["10.1.0.20", "10.1.0.21"]).contains("same address family"));
    assert!(error(&["10.1.0.20", "fd00::9"]).contains("belongs to"));
    assert_eq!(ipam.list().len(), 3, "A refused request must change nothing.");
    assert_eq!(
        shown(&ipam.allocate(asking("x", &["10.1.0.20"]), at(0)).unwrap()),
        "10.1.0.20 fd00::3"
    );
    ipam.release(&id("a"), at(0)).unwrap();
    let lease = ipam.allocate(asking("y", &["10.1.0.9"]), at(1)).unwrap();
    assert_eq!(lease.v4, "10.1.0.9".parse().ok(), "A quarantined address can be requested.");
}

#[test]
fn exhaustion_names_the_pool() {
    let mut ipam = ipam(&["10.1.0.0/30", "fd00::/64"], &[]);
    assert_eq!(allocate(&mut ipam, "a", 0), "10.1.0.1 fd00::1");
    assert_eq!(allocate(&mut ipam, "b", 0), "10.1.0.2 fd00::2");
    let error = ipam.allocate(request("c"), at(0)).unwrap_err();
    assert_eq!(error.to_string(), "no free address in 10.1.0.0/30 (2 in use)");
    assert_eq!(error.code() as u32, 11);
    assert!(!ipam.usage(at(0)).can_allocate());
    assert_eq!(
        ipam.usage(at(0)).pools[1].in_use,
        2,
        "A failed allocation must take no address of the other family."
    );
    ipam.set_pools(&[], &[]);
    let error = ipam.allocate(request("c"), at(0)).unwrap_err();
    assert!(matches!(error, IpamError::NoPools));
    assert_eq!(error.code() as u32, 11);
}

#[test]
fn released_addresses_are_quarantined() {
    let mut ipam = ipam(&["10.1.0.0/29"], &[]);
    for name in ["a", "b", "c"] {
        allocate(&mut ipam, name, 0);
    }
    ipam.release(&id("b"), at(1)).unwrap();
    assert_eq!(ipam.usage(at(1)).pools[0].quarantined, 1);
    assert_eq!(allocate(&mut ipam, "d", 1), "10.1.0.4", "The search must start after the cursor.");
    assert_eq!(allocate(&mut ipam, "e", 1), "10.1.0.5");
    ipam.release(&id("a"), at(2)).unwrap();
    assert_eq!(allocate(&mut ipam, "f", 2), "10.1.0.6");
    assert_eq!(
        allocate(&mut ipam, "g", 3),
        "10.1.0.2",
        "If none is free, the oldest quarantined address is allocated."
    );
    ipam.release(&id("d"), at(4)).unwrap();
    assert_eq!(ipam.usage(at(31)).pools[0].quarantined, 2);
    assert_eq!(ipam.usage(at(32)).pools[0].quarantined, 1);
    assert_eq!(
        allocate(&mut ipam, "h", 32),
        "10.1.0.1",
        "Only the address whose quarantine has ended is free."
    );
    assert_eq!(allocate(&mut ipam, "i", 32), "10.1.0.4");
}

#[test]
fn clock_set_back_does_not_extend_quarantine() {
    let mut ipam = ipam(&["10.1.0.0/30"], &[]);
    allocate(&mut ipam, "a", 100_000);
    ipam.release(&id("a"), at(100_000)).unwrap();
    assert_eq!(allocate(&mut ipam, "b", 10), "10.1.0.2");
    ipam.release(&id("b"), at(20)).unwrap();
    assert_eq!(ipam.usage(at(39)).pools[0].quarantined, 2);
    assert_eq!(
        allocate(&mut ipam, "c", 40),
        "10.1.0.1",
        "The quarantine of both releases must have ended."
    );
}

#[test]
fn quarantine_and_cursor_outlive_the_process() {
    let disk = Disk::new();
    let mut ipam = disk.open().unwrap();
    let pools = cidrs(&["10.1.0.0/29", "fd00::/64"]);
    ipam.set_pools(&pools, &[]);
    for name in ["a", "b", "c"] {
        allocate(&mut ipam, name, 0);
    }
    ipam.release(&id("c"), at(0)).unwrap();
    let leases: Vec<_> = ipam.list().cloned().collect();
    drop(ipam);
    let mut ipam = disk.open().unwrap();
    assert!(ipam.list().eq(leases.iter()), "Leases must be known before pools are set.");
    ipam.set_pools(&pools, &[]);
    assert_eq!(allocate(&mut ipam, "d", 29), "10.1.0.4 fd00::4");
    assert_eq!(allocate(&mut ipam, "e", 29), "10.1.0.5 fd00::5");
    assert_eq!(allocate(&mut ipam, "f", 29), "10.1.0.6 fd00::6");
    drop(ipam);
    let mut ipam = disk.open().unwrap();
    ipam.set_pools(&pools, &[]);
    assert_eq!(allocate(&mut ipam, "g", 30), "10.1.0.3 fd00::7");
}

#[test]
fn leases_survive_a_change_of_pools() {
    let mut ipam = ipam(&["10.1.0.0/29"], &[]);
    let (a, b) = (allocate(&mut ipam, "a", 0), allocate(&mut ipam, "b", 0));
    assert_eq!((a.as_str(), b.as_str()), ("10.1.0.1", "10.1.0.2"));
    ipam.set_pools(&cidrs(&["10.2.0.0/29", "fd00::/64"]), &[]);
    assert_eq!(allocate(&mut ipam, "a", 0), a, "A repeated allocation must return the same lease.");
    assert_eq!(allocate(&mut ipam, "c", 0), "10.2.0.1 fd00::1");
    let usage = ipam.usage(at(0));
    assert_eq!((usage.leases, usage.pools[0].in_use), (3, 1));
    ipam.release(&id("a"), at(0)).unwrap();
    ipam.set_pools(&cidrs(&["10.1.0.0/29"]), &[ip("10.1.0.3"), ip("10.1.0.2")]);
    assert_eq!(
        allocate(&mut ipam, "d", 0),
        "10.1.0.4",
        "Of addresses 1 to 3, one is quarantined, one leased, one reserved."
    );
    ipam.release(&id("b"), at(0)).unwrap();
    assert_eq!(allocate(&mut ipam, "e", 60), "10.1.0.5");
    assert_eq!(allocate(&mut ipam, "f", 60), "10.1.0.6");
    assert_eq!(allocate(&mut ipam, "g", 60), "10.1.0.1");
    assert!(ipam.allocate(request("h"), at(60)).is_err(), "All other addresses are reserved.");
    // Pools that no valid configuration contains must do no harm either.
    let both = cidrs(&["10.1.0.0/29", "10.1.0.0/28"]);
    ipam.set_pools(&both, &[ip("10.1.0.3"), ip("10.1.0.2")]);
    assert_eq!(
        allocate(&mut ipam, "i", 60),
        "10.1.0.7",
        "The broadcast address of one pool is usable in the other."
    );
}

#[test]
fn leases_are_adopted_from_the_kernel() {
    let disk = Disk::new();
    let mut ipam = disk.open().unwrap();
    ipam.set_pools(&cidrs(&["10.1.0.0/24"]), &[ip("10.1.0.1")]);
    let kernel_lease = |name: &str, v4: &str, v6: Option<&str>| Lease {
        id: id(name),
        network: String::new(),
        v4: v4.parse().ok(),
        v6: v6.map(|v6| v6.parse().unwrap()),
        netns: None,
        pod: None,
        time: at(5),
    };
    let a = ipam.adopt(kernel_lease("a", "10.1.0.2", Some("fd00::7")), at(5)).unwrap();
    assert_eq!(
        allocate(&mut ipam, "b", 5),
        "10.1.0.3",
        "The adopted address must not be allocated."
    );
    let error = ipam.adopt(kernel_lease("c", "10.1.0.3", None), at(5)).unwrap_err();
    assert_eq!(error.to_string(), "10.1.0.3 belongs to eth0 of container b");
    let error = ipam.adopt(kernel_lease("c", "", None), at(5)).unwrap_err();
    assert!(matches!(error, IpamError::NoAddress(_)));
    assert_eq!(
        ipam.adopt(a.clone(), at(9)).unwrap(),
        a,
        "A repeated adoption must change nothing."
    );
    // First the network namespace becomes known, then an address changes.
    let known = Lease { netns: Some(netns(7)), network: "pods".into(), ..a.clone() };
    assert_eq!(ipam.adopt(known.clone(), at(9)).unwrap(), known);
    assert_eq!(
        ipam.adopt(a.clone(), at(9)).unwrap(),
        known,
        "Unknown properties must keep their values."
    );
    let moved = ipam.adopt(kernel_lease("a", "10.1.0.1", None), at(9)).unwrap();
    assert_eq!((shown(&moved).as_str(), moved.netns.is_some()), ("10.1.0.1", true));
    let usage = ipam.usage(at(9));
    assert_eq!(
        (usage.pools[0].in_use, usage.pools[0].quarantined),
        (1, 1),
        "The reserved address 10.1.0.1 must not count as in use."
    );
    let all: Vec<_> = ipam.list().cloned().collect();
    drop(ipam);
    assert!(disk.open().unwrap().list().eq(all.iter()));
}

#[test]
fn paths_that_cannot_be_stored_are_refused() {
    use std::os::unix::ffi::OsStringExt;
    let mut ipam = ipam(&["10.1.0.0/24"], &[]);
    let mut request = request("a");
    request.netns.path = std::ffi::OsString::from_vec(vec![b'/', 0xff]).into();
    assert!(matches!(ipam.allocate(request, at(0)), Err(IpamError::Path(_))));
    assert_eq!(ipam.list().len(), 0);
}

#[test]
fn stored_leases_of_other_versions_are_read() {
    let lease: Lease = serde_json::from_str(
        r#"{"id": {"container_id": "c", "ifname": "eth0"}, "v4": "10.1.0.2", "colour": "green",
            "netns": {"dev": 4, "inode": 5}}"#,
    )
    .unwrap();
    assert_eq!(lease.v4, "10.1.0.2".parse().ok());
    assert_eq!(lease.netns.unwrap().path, std::path::PathBuf::new());
    let lease = Lease {
        netns: Some(netns(3)),
        time: at(1),
        ..serde_json::from_str(r#"{"id": {"container_id": "c", "ifname": "eth0"}}"#).unwrap()
    };
    let text = serde_json::to_string(&lease).unwrap();
    assert!(text.contains(r#""time":1700000001000"#), "{text}");
    assert_eq!(serde_json::from_str::<Lease>(&text).unwrap(), lease);
}

#[test]
fn allocation_is_fast_in_large_and_full_pools() {
    use super::super::change_set::ChangeSet;
    use super::super::state::State;
    // Without a disk, to measure the work in memory: 65,533 of 65,534 addresses are leased.
    let mut state = State::new();
    state.set_pools(&cidrs(&["10.1.0.0/16", "fd00::/64"]), &[]);
    let mut change_set = ChangeSet::default();
    let started = std::time::Instant::now();
    for n in 0..65_533 {
        state.allocate(request(&n.to_string()), at(0), &mut change_set).unwrap();
    }
    for n in 0..65_000_u64 {
        state.release(&id(&n.to_string()), at(n), &mut change_set).unwrap();
        state.allocate(request(&n.to_string()), at(n), &mut change_set).unwrap();
    }
    // It takes about 0.5 s; a scan of the pool per allocation would take minutes.
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}
