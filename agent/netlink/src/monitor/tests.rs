//! Tests of the notifications against the kernel. They need root.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;
use crate::connection::Netlink;
use crate::testing::{configure, configured, in_namespace, ip, wanted};

/// Receives the notifications of the next 200 ms.
async fn drain(monitor: &Monitor) {
    let received = async {
        loop {
            monitor.changed().await
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(200), received).await;
}

#[test]
fn deleted_interface_is_reported_and_created_again() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let monitor = Monitor::start("sk-test").unwrap();
        let wanted = wanted();
        let index = configured(&netlink, &wanted).await;
        monitor.set_index(index);
        drain(&monitor).await;
        let within = Duration::from_secs(30);
        for damage in ["route del 10.2.0.0/24", "address flush dev sk-test", "link del sk-test"] {
            ip(damage);
            let told = tokio::time::timeout(within, monitor.changed()).await;
            assert!(told.is_ok(), "{damage} was not reported");
        }
        assert!(netlink.link("sk-test").await.unwrap().is_none());
        let again = configured(&netlink, &wanted).await;
        assert_ne!(index, again);
        ip("link add dev unrelated type bridge");
        monitor.set_index(again);
        drain(&monitor).await;
        ip("link set unrelated up");
        let told = tokio::time::timeout(Duration::from_millis(200), monitor.changed()).await;
        assert!(told.is_err(), "Changes of other interfaces must not be reported.");
    });
}

/// The test runs the loop of the agent without its timer, so that only a notification can cause the
/// repair.
#[test]
fn disabled_forwarding_is_repaired_after_notification() {
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
