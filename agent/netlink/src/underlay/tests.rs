//! Tests of underlays with several devices against the kernel, each in a scratch network namespace.
//! They need root.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::super::monitor::Monitor;
use super::super::testing::{in_namespace, ip};
use super::*;

/// Creates an underlay that listens on `addresses` and has peers at `peers`.
fn underlay(addresses: &[&str], peers: &[&str]) -> Underlay {
    let endpoint = |text: &&str| SocketAddr::new(text.parse().unwrap(), 51900);
    Underlay {
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        peers: peers.iter().map(endpoint).collect(),
        own: BTreeSet::new(),
        overlay: "sk-test".to_owned(),
    }
}

/// Returns the MTU of the underlay and its device.
async fn mtu(netlink: &Netlink, underlay: &Underlay) -> Option<(u32, String)> {
    let found = netlink.underlay_mtu(underlay).await.unwrap();
    found.map(|found| (found.mtu, found.interface))
}

fn device(name: &str, mtu: u32, addresses: &[&str]) {
    ip(&format!("link add dev {name} mtu {mtu} type bridge"));
    ip(&format!("link set {name} addrgenmode none up"));
    for address in addresses {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        ip(&format!("address add {address} dev {name} {nodad}"));
    }
}

fn some(mtu: u32, interface: &str) -> Option<(u32, String)> {
    Some((mtu, interface.to_owned()))
}

#[test]
fn underlay_mtu_without_routes_is_unknown() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let mut any = underlay(&["0.0.0.0", "::"], &[]);
        assert_eq!(mtu(&netlink, &any).await, None, "Without a device there is no underlay.");
        device("skp0123456789", 1280, &["169.254.9.9/32"]);
        device("sk-test", 1440, &["10.1.0.1/32", "fd00:1::1/128"]);
        device("other", 1400, &["198.51.100.1/24"]);
        assert_eq!(mtu(&netlink, &any).await, None, "No route leads to a peer or out of the node.");
        ip("route add default dev sk-test");
        ip("route add default dev skp0123456789 metric 5");
        assert_eq!(mtu(&netlink, &any).await, None, "The overlay and pods must not count.");
        any.peers.insert("10.1.0.1:1".parse().unwrap());
        assert_eq!(mtu(&netlink, &any).await, None, "An address of this node must not count.");
        any.own.insert("198.51.100.1:51900".parse().unwrap());
        assert_eq!(
            mtu(&netlink, &any).await,
            some(1400, "other"),
            "The device of an own endpoint must count."
        );
    });
}

#[test]
fn underlay_mtu_without_peers_is_that_of_default_routes() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        device("ua", 9000, &["192.0.2.1/24", "2001:db8:a::1/64"]);
        device("ub", 1400, &["198.51.100.1/24", "2001:db8:b::1/64"]);
        device("uc", 1300, &["203.0.113.1/24", "2001:db8:c::1/64"]);
        let any = underlay(&["0.0.0.0", "::"], &[]);
        ip("route add default via 192.0.2.254");
        assert_eq!(mtu(&netlink, &any).await, some(9000, "ua"));
        ip("route replace default via 192.0.2.254 mtu 8000");
        assert_eq!(mtu(&netlink, &any).await, some(8000, "ua"), "The MTU of the route must count.");
        ip("route replace default nexthop via 192.0.2.254 nexthop via 198.51.100.254");
        assert_eq!(mtu(&netlink, &any).await, some(1400, "ub"), "Each next hop must count.");
        ip("-6 route add default nexthop via 2001:db8:a::9 nexthop via 2001:db8:c::9");
        assert_eq!(mtu(&netlink, &any).await, some(1300, "uc"), "IPv6 routes must count.");
        let v4 = underlay(&["0.0.0.0"], &[]);
        assert_eq!(
            mtu(&netlink, &v4).await,
            some(1400, "ub"),
            "Without an IPv6 socket, IPv6 routes must not count."
        );
        for (address, mtu_there, name) in [("192.0.2.1", 9000, "ua"), ("2001:db8:c::1", 1300, "uc")]
        {
            let fixed = underlay(&[address], &[]);
            assert_eq!(mtu(&netlink, &fixed).await, some(mtu_there, name), "of {address}");
        }
    });
}

#[test]
fn underlay_mtu_with_peers_is_that_of_their_routes() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        device("mgmt", 1400, &["198.51.100.1/24", "2001:db8:b::1/64"]);
        device("fast", 9000, &["192.0.2.1/24", "2001:db8:a::1/64"]);
        device("slow", 1600, &["203.0.113.1/24"]);
        ip("route add default via 198.51.100.254");
        ip("-6 route add default via 2001:db8:b::254");
        let addresses = ["0.0.0.0", "::"];
        let at = async |peers: &[&str]| mtu(&netlink, &underlay(&addresses, peers)).await;
        assert_eq!(at(&[]).await, some(1400, "mgmt"));
        assert_eq!(
            at(&["192.0.2.2"]).await,
            some(9000, "fast"),
            "The default route must not count."
        );
        assert_eq!(at(&["2001:db8:a::2"]).await, some(9000, "fast"));
        assert_eq!(
            at(&["192.0.2.2", "203.0.113.2"]).await,
            some(1600, "slow"),
            "The smallest MTU must count."
        );
        assert_eq!(
            at(&["192.0.2.2", "10.9.9.9"]).await,
            some(1400, "mgmt"),
            "A peer behind the default route must count."
        );
        ip("route add 10.9.9.0/24 nexthop via 192.0.2.254 nexthop via 203.0.113.254");
        assert_eq!(at(&["10.9.9.9"]).await, some(1600, "slow"), "Each next hop must count.");
        ip("route replace 10.9.9.0/24 via 192.0.2.254 mtu 4000");
        assert_eq!(at(&["10.9.9.9"]).await, some(4000, "fast"), "The MTU of the route must count.");
        ip("route replace unreachable 10.9.9.0/24");
        assert_eq!(at(&["10.9.9.9", "192.0.2.2"]).await, some(9000, "fast"));
        assert_eq!(
            at(&["10.9.9.9"]).await,
            some(1400, "mgmt"),
            "Without a reachable peer, the default routes must count."
        );
        let v4 = underlay(&["0.0.0.0"], &["192.0.2.2", "2001:db8:b::2"]);
        assert_eq!(
            mtu(&netlink, &v4).await,
            some(9000, "fast"),
            "Without an IPv6 socket, IPv6 peers must not count."
        );
    });
}

#[test]
fn underlay_mtu_follows_policy_rules() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        device("ua", 1500, &["192.0.2.1/24"]);
        device("ub", 9000, &["198.51.100.1/24"]);
        ip("route add 203.0.113.0/24 via 192.0.2.254");
        ip("route add 203.0.113.0/24 via 198.51.100.254 table 100");
        let any = underlay(&["0.0.0.0"], &["203.0.113.5"]);
        let bound = underlay(&["198.51.100.1"], &["203.0.113.5"]);
        assert_eq!(mtu(&netlink, &any).await, some(1500, "ua"));
        ip("rule add from 198.51.100.1 lookup 100");
        assert_eq!(
            mtu(&netlink, &any).await,
            some(1500, "ua"),
            "A rule for another source must not apply."
        );
        assert_eq!(
            mtu(&netlink, &bound).await,
            some(9000, "ub"),
            "The rule for this source must apply."
        );
        ip("rule add to 203.0.113.0/24 lookup 100");
        assert_eq!(
            mtu(&netlink, &any).await,
            some(9000, "ub"),
            "The rule for the destination must apply."
        );
        ip("address del 198.51.100.1/24 dev ub");
        assert_eq!(
            mtu(&netlink, &bound).await,
            None,
            "Without its source address there is no route."
        );
    });
}

#[test]
fn underlay_mtu_by_nexthop_objects_counts_every_device() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        device("ua", 9000, &["192.0.2.1/24"]);
        device("ub", 1400, &["198.51.100.1/24"]);
        ip("nexthop add id 1 via 192.0.2.254 dev ua");
        ip("nexthop add id 2 via 198.51.100.254 dev ub");
        ip("nexthop add id 3 group 1/2");
        for mode in ["1", "0"] {
            std::fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", mode).unwrap();
            for (object, expected) in [(1, some(9000, "ua")), (3, some(1400, "ub"))] {
                ip(&format!("route replace default nhid {object}"));
                let none = underlay(&["0.0.0.0"], &[]);
                assert_eq!(mtu(&netlink, &none).await, expected, "default, mode {mode}");
                let peer = underlay(&["0.0.0.0"], &["203.0.113.5"]);
                assert_eq!(mtu(&netlink, &peer).await, expected, "peer, mode {mode}");
            }
        }
    });
}

#[test]
fn underlay_mtu_over_ipv6_follows_router_advertisements() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        device("ua", 9000, &["192.0.2.1/24", "2001:db8:a::1/64"]);
        // A router advertisement with an MTU option has the same effect.
        std::fs::write("/proc/sys/net/ipv6/conf/ua/mtu", "1480").unwrap();
        let addresses = ["0.0.0.0", "::"];
        let v6 = underlay(&addresses, &["2001:db8:a::2"]);
        assert_eq!(mtu(&netlink, &v6).await, some(1480, "ua"));
        let v4 = underlay(&addresses, &["192.0.2.2"]);
        assert_eq!(
            mtu(&netlink, &v4).await,
            some(9000, "ua"),
            "The IPv6 MTU must not apply to IPv4."
        );
    });
}

#[test]
fn underlay_mtu_to_link_local_peer_is_that_of_its_scope() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        device("ua", 1400, &["fe80::1/64"]);
        device("ub", 9000, &["fe80::1/64"]);
        let index = netlink.link("ub").await.unwrap().unwrap().index;
        let mut one = underlay(&["::"], &[]);
        let peer = std::net::SocketAddrV6::new("fe80::2".parse().unwrap(), 51900, 0, index);
        one.peers.insert(peer.into());
        assert_eq!(mtu(&netlink, &one).await, some(9000, "ub"));
    });
}

#[test]
fn default_interfaces_include_every_next_hop() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        device("ua", 1500, &["192.0.2.1/24"]);
        device("ub", 1500, &["198.51.100.1/24"]);
        assert_eq!(netlink.default_interfaces().await.unwrap(), [0; 0]);
        let index = async |name| netlink.link(name).await.unwrap().unwrap().index;
        let both = [index("ua").await, index("ub").await];
        ip("route add default nexthop via 192.0.2.254 nexthop via 198.51.100.254");
        assert_eq!(netlink.default_interfaces().await.unwrap(), both);
        ip("nexthop add id 1 via 192.0.2.254 dev ua");
        std::fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", "0").unwrap();
        ip("route replace default nhid 1");
        let interfaces = netlink.default_interfaces().await.unwrap();
        assert!(
            interfaces.iter().any(|index| *index != both[1]),
            "The device of the next hop object must be included."
        );
    });
}

#[test]
fn underlay_changes_are_reported_and_others_are_not() {
    in_namespace(|| async {
        // Duplicate address detection would change addresses and routes later.
        std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
        device("ua", 1500, &["192.0.2.1/24", "2001:db8:a::1/64"]);
        device("skp0123456789", 1440, &[]);
        let monitor = Monitor::start("sk-test").unwrap();
        let drain_notifications = async || {
            let within = Duration::from_millis(200);
            while tokio::time::timeout(within, monitor.underlay_changed()).await.is_ok() {}
        };
        for change in [
            "link set ua mtu 1400",
            "address add 192.0.2.7/24 dev ua",
            "route add 203.0.113.0/24 via 192.0.2.9",
            "-6 route add 2001:db8:f::/48 via 2001:db8:a::9",
            "rule add to 203.0.113.0/24 lookup 100",
            "link set ua down",
            "link set ua up",
        ] {
            drain_notifications().await;
            ip(change);
            let reported =
                tokio::time::timeout(Duration::from_secs(30), monitor.underlay_changed());
            assert!(reported.await.is_ok(), "{change} was not reported");
        }
        drain_notifications().await;
        for change in [
            "link set skp0123456789 mtu 1400",
            "route add 10.9.0.0/16 dev ua proto 77",
            "-6 route add fd00:9::/64 dev ua proto 77",
        ] {
            ip(change);
            let reported =
                tokio::time::timeout(Duration::from_millis(300), monitor.underlay_changed());
            assert!(reported.await.is_err(), "{change} must not be reported");
        }
    });
}
