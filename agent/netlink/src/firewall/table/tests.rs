//! Tests of [`Table`] against the kernel, each in a scratch network namespace. They need root and
//! the program `nft`.

#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

use super::*;
use crate::nftables::finished;
use crate::testing::in_namespace;

/// Number of peers of a large cluster.
const PEERS: u16 = 3000;
/// Receive buffer in bytes that overflows with every transaction; the kernel doubles it.
const SMALL_BUFFER: usize = 2048;

/// Returns the rules of a cluster whose pod CIDRs are not adjacent, so that no two set elements
/// merge.
fn large_rules() -> Rules {
    let address = |first: u8, number: u16, last: u8| {
        let [high, low] = number.to_be_bytes();
        Ipv4Addr::new(first, high, low, last)
    };
    let prefix = |peer: u16| IpNet::V4(Ipv4Net::new(address(10, peer * 2, 0), 24).unwrap());
    let endpoint = |peer: u16| SocketAddr::from((address(172, peer, 1), 51900));
    Rules {
        cluster: (0..PEERS).map(prefix).collect(),
        peers: (0..PEERS).map(endpoint).collect(),
        ..Rules::example()
    }
}

#[test]
fn crash_of_nft_names_the_signal_and_the_remedy() {
    let run =
        |script: &str| std::process::Command::new("sh").args(["-c", script]).output().unwrap();
    let crashed = finished(&run("kill -SEGV $$")).unwrap_err();
    assert!(matches!(crashed, FirewallError::Crashed(11)), "{crashed}");
    assert!(crashed.to_string().contains("install a later version"), "{crashed}");
    let refused = finished(&run("echo first >&2; echo second >&2; exit 1")).unwrap_err();
    assert_eq!(refused.to_string(), "nft refused: first");
    finished(&run("exit 0")).unwrap();
}

#[test]
fn large_table_is_installed_although_messages_are_lost() {
    in_namespace(|| async {
        // The task blocks the runtime, and with it the reader of the notifications, for 20 ms at a
        // time. A reader without pauses would lose no notification, because the kernel yields the
        // CPU to the reader while the receive buffer is more than half full.
        let pauses = tokio::spawn(async {
            loop {
                std::thread::sleep(Duration::from_millis(20));
                tokio::task::yield_now().await;
            }
        });
        let monitor = Monitor::with_receive_buffer(SMALL_BUFFER).unwrap();
        let mut table = Table::new(large_rules(), Some(&monitor));
        assert!(table.ensure().await.unwrap(), "the first call installs the table");
        assert!(!table.ensure().await.unwrap(), "the second call changes nothing");
        let notifications = table.notifications.as_mut().unwrap();
        let (replaced, received) = notifications.observe(replace(&large_rules())).await;
        replaced.unwrap();
        assert!(received.lost, "the small buffer has lost no message: {received:?}");
        assert!(!table.ensure().await.unwrap(), "the same rules were loaded");
        nft(&["delete", "table", "inet", "skein"], "").await.unwrap();
        assert!(table.ensure().await.unwrap(), "the deleted table is restored");
        pauses.abort();
    });
}

#[test]
fn unread_messages_of_large_transactions_fit_the_buffer() {
    in_namespace(|| async {
        let mut notifications = Monitor::start().unwrap().subscribe("skein");
        for _ in 0..2 {
            replace(&large_rules()).await.unwrap();
        }
        assert_eq!(notifications.drain().await, Received { transactions: 2, lost: false });
        assert_eq!(notifications.drain().await, Received::default(), "messages were left");
        let (replaced, received) = notifications.observe(replace(&large_rules())).await;
        replaced.unwrap();
        assert_eq!(received, Received { transactions: 1, lost: false });
    });
}

#[test]
fn subscriptions_of_one_monitor_get_their_own_tables() {
    in_namespace(|| async {
        let monitor = Monitor::start().unwrap();
        let (mut ours, mut others) = (monitor.subscribe("skein"), monitor.subscribe("other"));
        nft(&["add", "table", "inet", "skein"], "").await.unwrap();
        // The first subscription reads the notification for both.
        assert_eq!(others.drain().await, Received::default(), "the change is of another table");
        assert_eq!(ours.drain().await, Received { transactions: 1, lost: false });
        let mut late = monitor.subscribe("skein");
        assert_eq!(
            late.drain().await,
            Received::default(),
            "the change was before the subscription"
        );
        let waiters = async { tokio::join!(ours.changed(), late.changed(), others.changed()) };
        let changes = async {
            nft(&["delete", "table", "inet", "skein"], "").await.unwrap();
            nft(&["add", "table", "inet", "other"], "").await.unwrap();
        };
        let all = async { tokio::join!(waiters, changes) };
        tokio::time::timeout(Duration::from_secs(10), all).await.unwrap();
    });
}

#[test]
fn generation_grows_by_one_for_each_transaction() {
    in_namespace(|| async {
        let monitor = Monitor::start().unwrap();
        let before = monitor.generation().unwrap();
        replace(&Rules::example()).await.unwrap();
        assert_eq!(
            monitor.generation().unwrap(),
            before + 1,
            "The installation must be one transaction."
        );
        list("skein").await.unwrap();
        assert_eq!(
            monitor.generation().unwrap(),
            before + 1,
            "A list must not count as a transaction."
        );
        nft(&["add", "table", "ip", "other"], "").await.unwrap();
        assert_eq!(
            monitor.generation().unwrap(),
            before + 2,
            "A change of another table must count."
        );
    });
}

#[test]
fn change_by_another_program_fails_the_installation() {
    let check = |transactions, lost, before, after| {
        check_alone(Received { transactions, lost }, before, after)
    };
    assert!(check(1, false, Some(7), Some(9)).is_ok(), "the other change was of another table");
    assert!(check(1, false, None, None).is_ok(), "no message was lost");
    assert!(matches!(check(2, false, Some(7), Some(9)), Err(FirewallError::Contended)));
    assert!(check(0, true, Some(7), Some(8)).is_ok(), "the one transaction is the installation");
    assert!(check(0, true, Some(u32::MAX), Some(0)).is_ok(), "the generation has wrapped");
    assert!(matches!(check(0, true, Some(7), Some(9)), Err(FirewallError::Lost)));
    assert!(matches!(check(0, true, Some(7), None), Err(FirewallError::Lost)));
}
