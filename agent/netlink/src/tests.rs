//! Against the real kernel, each in a scratch network namespace. They need root.

#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use futures_util::StreamExt;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use skein_sys::tun::create_persistent;

use super::interface::{InterfaceError, Outcome, Present, Wanted};
use super::link::{Link, LinkChange};
use super::monitor::Monitor;
use super::provisional::Provisional;
use super::*;

/// Runs a future in a network namespace of its own.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    };
    skein_sys::in_new_network_namespace(run)
        .expect("this test needs root: CAP_SYS_ADMIN for a network namespace");
}

/// Runs iproute2 in the calling thread's namespace; returns what it printed.
pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    let output = output.expect("ip is missing: install the Debian package iproute2");
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {arguments}: {complaint}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn wanted() -> Wanted {
    Wanted {
        name: "sk-test".to_owned(),
        alias: "skein:node-1".to_owned(),
        mtu: 1440,
        txqueuelen: 777,
        addresses: vec!["10.1.0.1".parse().unwrap(), "fd00:1::1".parse().unwrap()],
        routes: ["10.2.0.0/24", "10.3.0.0/16", "fd00:2::/64"].map(|r| r.parse().unwrap()).into(),
        mtus: Default::default(),
        forwarding: true,
        forwarding_ipv6: true,
    }
}

/// Calls [`Wanted::ensure_device`] with the present links.
pub(crate) async fn ensure_device(
    wanted: &Wanted,
    netlink: &Netlink,
) -> Result<Present, InterfaceError> {
    wanted.ensure_device(netlink, &netlink.links().await?).await
}

/// Calls [`Wanted::configure`] with the present addresses.
pub(crate) async fn configure(wanted: &Wanted, netlink: &Netlink, index: u32) -> Outcome {
    let addresses = netlink.addresses(None).await.unwrap();
    wanted.configure(netlink, index, &addresses).await
}

async fn configured(netlink: &Netlink, wanted: &Wanted) -> u32 {
    let present = ensure_device(wanted, netlink).await.unwrap();
    let outcome = configure(wanted, netlink, present.index).await;
    assert_eq!(outcome.errors, [""; 0]);
    present.index
}

#[test]
fn the_interface_becomes_what_is_wanted() {
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
        assert_eq!(again, Default::default(), "a second pass has nothing to do");
    });
}

#[test]
fn ipv6_prefix_of_a_peer_switches_no_forwarding_on() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let addresses = vec!["10.1.0.1".parse().unwrap()];
        let wanted = Wanted { addresses, forwarding_ipv6: false, ..wanted() };
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
fn a_route_carries_the_mtu_of_its_path() {
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
        assert!(ip("-6 route show proto 77").contains("mtu 1280"), "the least of IPv6");
        assert_eq!(configure(&wanted, &netlink, index).await, Default::default());
        wanted.mtus.clear();
        let outcome = configure(&wanted, &netlink, index).await;
        assert_eq!(outcome.changes.len(), 2, "{outcome:?}");
        assert!(!ip("route show proto 77").contains("mtu"), "{}", ip("route show proto 77"));
        assert_eq!(ip("route show proto 77").lines().count(), 2);
    });
}

#[test]
fn what_somebody_changes_is_healed() {
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
fn changed_wants_are_followed_and_others_routes_stay() {
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
        assert!(ip("route show").contains("10.50.0.0/16"), "not ours, so it stays");
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
        assert_eq!(outcome.errors, [""; 0], "The node itself is well.");
        let [conflict] = &outcome.conflicts[..] else { panic!("{outcome:?}") };
        assert_eq!(conflict.prefix, "10.2.0.0/24".parse().unwrap());
        assert!(conflict.problem.contains("another program has one"), "{outcome:?}");
        assert!(ip("route show 10.2.0.0/24").contains("dev other"));
        assert!(ip("route show 10.3.0.0/16").contains("dev sk-test"));
    });
}

#[test]
fn interfaces_of_others_are_refused_and_not_touched() {
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
            let ours = alias == Some("skein:node-2");
            assert_eq!(matches!(error, InterfaceError::OtherNode { .. }), ours, "{error}");
            assert_eq!(matches!(error, InterfaceError::Foreign { .. }), !ours, "{error}");
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
fn nobody_ever_sees_the_interface_without_its_mark() {
    in_namespace(|| async {
        let (connection, _, mut messages) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link]).unwrap();
        let connection = tokio::spawn(connection);
        let netlink = Netlink::connect().unwrap();
        ensure_device(&wanted(), &netlink).await.unwrap();
        let mut seen = Vec::new();
        // Whatever the kernel has to say it says before the last request is answered.
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

#[test]
fn what_a_killed_start_has_left_is_removed() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let provisional = Provisional::new(&wanted.name, &wanted.alias);
        let name = provisional.name();
        for alias in [None, Some(&wanted.alias)] {
            // As far as it got before it was killed.
            create_persistent(name).unwrap();
            if let Some(alias) = alias {
                ip(&format!("link set {name} alias {alias}"));
            }
            let present = ensure_device(&wanted, &netlink).await.unwrap();
            assert!(present.created);
            assert!(netlink.link(name).await.unwrap().is_none(), "it is gone");
            let link = netlink.link("sk-test").await.unwrap().unwrap();
            assert_eq!((link.index, &link.alias), (present.index, &wanted.alias));
            let again = ensure_device(&wanted, &netlink).await.unwrap();
            assert!(!again.created && again.index == present.index);
            netlink.delete_link(present.index).await.unwrap();
        }
    });
}

#[test]
fn what_others_have_under_the_provisional_name_stays() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let provisional = Provisional::new(&wanted.name, &wanted.alias);
        let name = provisional.name();
        for make in [
            format!("link add dev {name} type bridge"),
            format!("tuntap add {name} mode tun\nlink set {name} alias vpn"),
            format!("tuntap add {name} mode tun\nlink set {name} up"),
        ] {
            make.lines().for_each(|line| drop(ip(line)));
            let before = ip(&format!("-details link show {name}"));
            let error = ensure_device(&wanted, &netlink).await.unwrap_err();
            assert!(matches!(error, InterfaceError::Foreign { .. }), "{error}");
            assert_eq!(ip(&format!("-details link show {name}")), before);
            assert!(netlink.link("sk-test").await.unwrap().is_none());
            ip(&format!("link del {name}"));
        }
    });
}

#[test]
fn provisional_names_are_possible_and_differ() {
    let names = [("skein0", "skein:a"), ("skein0", "skein:b"), ("skein1", "skein:a")]
        .map(|(name, alias)| Provisional::new(name, alias).name().to_owned());
    assert!(names.iter().all(|name| name.len() == 15), "{names:?}");
    assert!(names[0] != names[1] && names[0] != names[2] && names[1] != names[2], "{names:?}");
}

#[test]
fn a_name_that_is_taken_meanwhile_leaves_nothing_behind() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let provisional = Provisional::new(&wanted.name, &wanted.alias);
        ip("link add dev sk-test type bridge");
        let error = provisional.create(&netlink, "sk-test").await.unwrap_err();
        assert!(matches!(error, InterfaceError::Netlink(_)), "{error}");
        assert!(netlink.link(provisional.name()).await.unwrap().is_none());
    });
}

#[test]
fn a_deleted_interface_is_announced_and_made_again() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let monitor = Monitor::start("sk-test").unwrap();
        let wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        monitor.set_index(index);
        let drained = async {
            loop {
                monitor.changed().await
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(200), drained).await;
        let within = Duration::from_secs(30);
        for damage in ["route del 10.2.0.0/24", "address flush dev sk-test", "link del sk-test"] {
            ip(damage);
            let told = tokio::time::timeout(within, monitor.changed()).await;
            assert!(told.is_ok(), "{damage} was not announced");
        }
        assert!(netlink.link("sk-test").await.unwrap().is_none());
        let again = configured(&netlink, &wanted).await;
        assert_ne!(index, again);
        ip("link add dev unrelated type bridge");
        monitor.set_index(again);
        let drained = async {
            loop {
                monitor.changed().await
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(200), drained).await;
        ip("link set unrelated up");
        let told = tokio::time::timeout(Duration::from_millis(200), monitor.changed()).await;
        assert!(told.is_err(), "what does not concern us is not announced");
    });
}

/// Runs the loop of the agent without its timer, so that only a notification can cause the repair.
#[test]
fn forwarding_switched_off_is_repaired_by_notification() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let monitor = Monitor::start("sk-test").unwrap();
        let wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        monitor.set_index(index);
        let path = |key: &str| format!("/proc/sys/net/{key}");
        let is_on = |key: &str| std::fs::read_to_string(path(key)).unwrap().trim() == "1";
        for key in [
            "ipv4/ip_forward",
            "ipv4/conf/all/forwarding",
            "ipv4/conf/sk-test/forwarding",
            "ipv6/conf/all/forwarding",
            "ipv6/conf/sk-test/forwarding",
        ] {
            let repair = async {
                while !is_on(key) {
                    monitor.changed().await;
                    configure(&wanted, &netlink, index).await;
                }
            };
            std::fs::write(path(key), "0").unwrap();
            let repaired = tokio::time::timeout(Duration::from_secs(30), repair).await;
            assert!(repaired.is_ok(), "{key} stays off.");
            assert!(is_on(key), "{key}");
        }
    });
}

#[test]
fn deleting_what_is_gone_is_no_error() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let present = ensure_device(&wanted(), &netlink).await.unwrap();
        netlink.delete_link(present.index).await.unwrap();
        netlink.delete_link(present.index).await.unwrap();
        let change = LinkChange { up: true, ..LinkChange::default() };
        assert!(netlink.change_link(present.index, &change).await.is_err());
    });
}

/// Sets `accept_ra` of some interfaces, of which `uplink` has a learned route.
async fn with_learned_route(values: &[(&str, &str)]) -> Netlink {
    let netlink = Netlink::connect().unwrap();
    for name in ["uplink", "bridge", "manual"] {
        ip(&format!("link add dev {name} type bridge"));
        ip(&format!("link set {name} up"));
    }
    ip("-6 route add default via fe80::1 dev uplink proto ra");
    for (name, value) in values {
        std::fs::write(accept_ra_file(name), value).unwrap();
    }
    netlink
}

fn accept_ra_file(name: &str) -> String {
    format!("/proc/sys/net/ipv6/conf/{name}/accept_ra")
}

fn accept_ra(name: &str) -> String {
    std::fs::read_to_string(accept_ra_file(name)).unwrap().trim().to_owned()
}

#[test]
fn only_interfaces_with_learned_routes_accept_advertisements() {
    in_namespace(|| async {
        let off =
            [("uplink", "1"), ("bridge", "1"), ("manual", "0"), ("default", "1"), ("all", "1")];
        let netlink = with_learned_route(&off).await;
        configured(&netlink, &wanted()).await;
        let expected =
            [("uplink", "2"), ("bridge", "1"), ("manual", "0"), ("default", "1"), ("all", "1")];
        for (name, value) in expected {
            assert_eq!(accept_ra(name), value, "{name}");
        }
        assert_eq!(accept_ra("sk-test"), "0");
        ip("link add dev later type bridge");
        assert_eq!(accept_ra("later"), "1", "A later interface ignores advertisements.");
    });
}

#[test]
fn settings_of_earlier_versions_are_restored() {
    in_namespace(|| async {
        let earlier =
            [("uplink", "2"), ("bridge", "2"), ("manual", "0"), ("default", "2"), ("all", "2")];
        let netlink = with_learned_route(&earlier).await;
        assert!(netlink.restore_accept_ra().await.unwrap().is_empty(), "No router yet.");
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let changed = netlink.restore_accept_ra().await.unwrap();
        assert_eq!(changed, ["all", "default", "bridge"]);
        let expected =
            [("uplink", "2"), ("bridge", "1"), ("manual", "0"), ("default", "1"), ("all", "1")];
        for (name, value) in expected {
            assert_eq!(accept_ra(name), value, "{name}");
        }
        assert!(netlink.restore_accept_ra().await.unwrap().is_empty());
    });
}
