//! Tests of router advertisements against the kernel. They need root.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::testing::{configured, in_namespace, ip, wanted};

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
        let before =
            [("uplink", "1"), ("bridge", "1"), ("manual", "0"), ("default", "1"), ("all", "1")];
        let netlink = with_learned_route(&before).await;
        configured(&netlink, &wanted()).await;
        let expected =
            [("uplink", "2"), ("bridge", "1"), ("manual", "0"), ("default", "1"), ("all", "1")];
        for (name, value) in expected {
            assert_eq!(accept_ra(name), value, "{name}");
        }
        assert_eq!(accept_ra("sk-test"), "0");
        ip("link add dev later type bridge");
        assert_eq!(accept_ra("later"), "1", "A later interface must keep the value 1.");
    });
}

#[test]
fn settings_of_earlier_versions_are_restored() {
    in_namespace(|| async {
        let earlier =
            [("uplink", "2"), ("bridge", "2"), ("manual", "0"), ("default", "2"), ("all", "2")];
        let netlink = with_learned_route(&earlier).await;
        assert!(
            netlink.restore_accept_ra().await.unwrap().is_empty(),
            "The host does not forward."
        );
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
