//! Tests of the interface against the kernel. They need root.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use futures_util::StreamExt;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use skein_sys::tun::create_persistent;

use super::*;
use crate::testing::{configure, configured, ensure_device, in_namespace, ip, wanted};

#[test]
fn interface_is_configured_as_specified() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        let link = ip("-details link show sk-test");
        for expected in ["mtu 1440", "qlen 777", "alias skein:node-1", ",UP", "persist on"] {
            assert!(link.contains(expected), "no {expected:?} in {link}");
        }
        let v4 = ip("route show proto 77");
        assert!(v4.contains("10.2.0.0/24 dev sk-test scope link src 10.1.0.1"), "{v4}");
        assert!(v4.contains("10.3.0.0/16"), "{v4}");
        let v6 = ip("-6 route show proto 77");
        assert!(v6.contains("fd00:2::/64 dev sk-test src fd00:1::1"), "{v6}");
        let addresses = ip("address show dev sk-test");
        assert!(addresses.contains("10.1.0.1/32") && addresses.contains("fd00:1::1/128"));
        assert!(!link.contains("MULTICAST"), "{link}");
        assert!(!addresses.contains("fe80::") && !addresses.contains("tentative"), "{addresses}");
        let sysctl = |key: &str| std::fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap();
        assert_eq!(sysctl("ipv4/conf/sk-test/rp_filter").trim(), "2");
        assert_eq!(sysctl("ipv4/ip_forward").trim(), "1");
        assert_eq!(sysctl("ipv6/conf/all/forwarding").trim(), "1");
        let again = configure(&wanted, &netlink, index).await;
        assert_eq!(again, Default::default(), "A second pass must change nothing.");
    });
}

#[test]
fn ipv6_prefix_of_a_peer_does_not_enable_forwarding() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let addresses = vec!["10.1.0.1".parse().unwrap()];
        let wanted = InterfaceSpec { addresses, forwarding_ipv6: false, ..wanted() };
        configured(&netlink, &wanted).await;
        let sysctl = |key: &str| std::fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap();
        assert!(ip("-6 route show proto 77").contains("fd00:2::/64 dev sk-test"));
        for scope in ["all", "sk-test"] {
            let value = sysctl(&format!("ipv6/conf/{scope}/forwarding"));
            assert_eq!(value.trim(), "0", "This node has no IPv6 pods: {scope}");
        }
        assert_eq!(sysctl("ipv4/ip_forward").trim(), "1");
    });
}

#[test]
fn route_has_the_mtu_of_its_path() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let mut wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        let narrow = ["10.2.0.0/24", "fd00:2::/64"].map(|net| (net.parse().unwrap(), 1200));
        wanted.mtus = narrow.into();
        let outcome = configure(&wanted, &netlink, index).await;
        assert_eq!(outcome.changes, ["route 10.2.0.0/24: mtu 1200", "route fd00:2::/64: mtu 1280"]);
        let v4 = ip("route show proto 77");
        let route = v4.lines().find(|line| line.starts_with("10.2.0.0/24 ")).unwrap_or_default();
        assert!(route.contains("mtu 1200") && route.contains("src 10.1.0.1"), "{v4}");
        assert!(
            ip("-6 route show proto 77").contains("mtu 1280"),
            "An IPv6 route must have at least 1280 bytes."
        );
        assert_eq!(configure(&wanted, &netlink, index).await, Default::default());
        wanted.mtus.clear();
        let outcome = configure(&wanted, &netlink, index).await;
        assert_eq!(outcome.changes.len(), 2, "{outcome:?}");
        assert!(!ip("route show proto 77").contains("mtu"), "{}", ip("route show proto 77"));
        assert_eq!(ip("route show proto 77").lines().count(), 2);
    });
}

#[test]
fn changes_by_other_programs_are_repaired() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        for damage in [
            "route del 10.2.0.0/24",
            "-6 route del fd00:2::/64",
            "address del 10.1.0.1/32 dev sk-test",
            "address del fd00:1::1/128 dev sk-test",
            "link set sk-test mtu 1300",
            "link set sk-test down",
            "address flush dev sk-test",
            "address add 10.99.0.1/24 dev sk-test",
            "route add 10.77.0.0/16 dev sk-test proto 77",
        ] {
            ip(damage);
            let outcome = configure(&wanted, &netlink, index).await;
            assert_eq!(outcome.errors, [""; 0], "{damage}");
            assert!(!outcome.changes.is_empty(), "{damage}");
            let again = configure(&wanted, &netlink, index).await;
            assert_eq!(again, Default::default(), "{damage}");
        }
        assert!(!ip("route show").contains("10.77.0.0"));
    });
}

#[test]
fn changed_spec_is_applied_and_foreign_routes_stay() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let mut wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        ip("route add 10.50.0.0/16 dev sk-test");
        wanted.routes = vec!["10.2.0.0/24".parse().unwrap(), "10.4.0.0/24".parse().unwrap()];
        wanted.addresses = vec!["10.1.0.9".parse().unwrap()];
        let outcome = configure(&wanted, &netlink, index).await;
        assert_eq!(outcome.errors, [""; 0]);
        let routes = ip("route show proto 77");
        assert!(routes.contains("10.2.0.0/24 dev sk-test scope link src 10.1.0.9"), "{routes}");
        assert!(routes.contains("10.4.0.0/24") && !routes.contains("10.3.0.0"), "{routes}");
        assert!(ip("route show").contains("10.50.0.0/16"), "A route of another program must stay.");
        assert_eq!(ip("-6 route show proto 77"), "");
    });
}

#[test]
fn route_of_another_program_is_a_conflict_of_one_prefix() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        ip("link add dev other type bridge");
        ip("link set other up");
        ip("route add 10.2.0.0/24 dev other");
        let wanted = wanted();
        let present = ensure_device(&wanted, &netlink).await.unwrap();
        let outcome = configure(&wanted, &netlink, present.index).await;
        assert_eq!(outcome.errors, [""; 0], "A conflict is not an error of the node.");
        let [conflict] = &outcome.conflicts[..] else { panic!("{outcome:?}") };
        assert_eq!(conflict.prefix, "10.2.0.0/24".parse().unwrap());
        assert!(conflict.problem.contains("another program has one"), "{outcome:?}");
        assert!(ip("route show 10.2.0.0/24").contains("dev other"));
        assert!(ip("route show 10.3.0.0/16").contains("dev sk-test"));
    });
}

#[test]
fn foreign_interface_is_refused_and_unchanged() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        for (make, alias) in [
            ("link add dev sk-test type bridge", None),
            ("link add dev sk-test type bridge", Some("skein:node-1")),
            ("tuntap add sk-test mode tun", None),
            ("tuntap add sk-test mode tun", Some("vpn")),
            ("tuntap add sk-test mode tun", Some("skein:node-2")),
        ] {
            ip(make);
            if let Some(alias) = alias {
                ip(&format!("link set sk-test alias {alias}"));
            }
            let before = ip("-details link show sk-test");
            let error = ensure_device(&wanted, &netlink).await.unwrap_err();
            let of_skein = alias == Some("skein:node-2");
            assert_eq!(matches!(error, InterfaceError::OtherNode { .. }), of_skein, "{error}");
            assert_eq!(matches!(error, InterfaceError::Foreign { .. }), !of_skein, "{error}");
            assert!(error.to_string().contains("interface.name"), "{error}");
            assert_eq!(ip("-details link show sk-test"), before);
            ip("link del sk-test");
        }
    });
}

#[test]
fn renamed_interface_gets_its_name_back() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        ip("link set sk-test name elsewhere");
        let present = ensure_device(&wanted, &netlink).await.unwrap();
        assert_eq!((present.index, present.created), (index, false), "The device is the same.");
        assert!(netlink.link("elsewhere").await.unwrap().is_none(), "No orphan is left.");
        let outcome = configure(&wanted, &netlink, index).await;
        assert_eq!(outcome.errors, [""; 0]);
        assert!(ip("route show proto 77").contains("10.2.0.0/24 dev sk-test"));
    });
}

#[test]
fn second_interface_of_the_same_node_is_removed() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        for (name, alias) in [("orphan", "skein:node-1"), ("other", "skein:node-2")] {
            create_persistent(name).unwrap();
            ip(&format!("link set {name} alias {alias}"));
        }
        let present = ensure_device(&wanted, &netlink).await.unwrap();
        assert_eq!((present.index, present.created), (index, false));
        assert!(netlink.link("orphan").await.unwrap().is_none(), "The orphan is removed.");
        assert!(netlink.link("other").await.unwrap().is_some(), "Another node's device stays.");
    });
}

#[test]
fn interface_appears_under_its_name_only_with_alias() {
    in_namespace(|| async {
        let (connection, _, mut messages) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link]).unwrap();
        let connection = tokio::spawn(connection);
        let netlink = Netlink::connect().unwrap();
        ensure_device(&wanted(), &netlink).await.unwrap();
        let mut seen = Vec::new();
        // The kernel sends its notifications before it answers the last request.
        while let Ok(Some((message, _))) =
            tokio::time::timeout(Duration::from_millis(500), messages.next()).await
        {
            if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) =
                message.payload
            {
                seen.push(Link::from(link));
            }
        }
        connection.abort();
        let named: Vec<_> = seen.iter().filter(|link| link.name == "sk-test").collect();
        assert!(!named.is_empty(), "{seen:?}");
        assert!(named.iter().all(|link| link.alias == "skein:node-1"), "{named:?}");
    });
}
