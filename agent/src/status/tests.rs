#![allow(clippy::unwrap_used)]

use skein_core::drop::DropReason;
use skein_core::tunnel::{Cipher, UnreachableReason};
use skein_ipc::keys::PublicKey;
use skein_ipc::{Capability, CapabilityName, CapabilityState, DropReport};

use super::*;

/// Returns a peer for tests.
pub(crate) fn peer(name: &str, state: PeerState) -> PeerReport {
    PeerReport {
        name: name.to_owned(),
        public_key: PublicKey([2; 32]),
        endpoint: Some("192.0.2.2:51900".parse().unwrap()),
        pod_cidrs: vec!["10.2.0.0/24".parse().unwrap()],
        state: state.into(),
        reason: (state == PeerState::Unreachable).then(|| UnreachableReason::NoAnswer.into()),
        cipher: Some(Cipher::Aes256Gcm.into()),
        lanes: Some(2),
        handshake_age_seconds: Some(75.2),
        last_received_seconds: Some(0.1),
        rtt_us: Some(421),
        path_mtu: None,
        gso: true,
        tx_packets: 10,
        tx_bytes: 123_456_789,
        rx_packets: 20,
        rx_bytes: 999,
    }
}

/// Returns a status for tests. `inner` is the number of outgoing inner packets.
pub(crate) fn document(inner: u64) -> Document {
    let mut lane = LaneReport::default();
    lane.egress.inner_packets = inner;
    lane.egress.outer_packets = 40_000;
    lane.egress.calls = 1000;
    let drop = |reason: DropReason, packets| DropReport { kind: reason.into(), packets };
    let report = Report {
        pid: 42,
        uptime_seconds: 3725.0,
        revision: 7,
        capabilities: vec![Capability {
            name: CapabilityName::UdpGso.into(),
            state: CapabilityState::Degraded.into(),
            reason: Some("refused towards 192.0.2.2:51900".to_owned()),
        }],
        lanes: vec![lane],
        drops: vec![drop(DropReason::Replayed, 3), drop(DropReason::InnerSource, 0)],
        peers: vec![peer("node-b", PeerState::Established), peer("node-c", PeerState::Unreachable)],
        ..Report::default()
    };
    Document {
        node: "node-a".to_owned(),
        version: "1.2.3".to_owned(),
        public_key: PublicKey([1; 32]),
        key: RotationStatus::of(PublicKey([1; 32])),
        ready: false,
        reasons: vec!["interface skein0: cannot add".to_owned()],
        notes: vec!["underlay.addresses: no IPv6".to_owned()],
        interface: Default::default(),
        records: Default::default(),
        firewall: Default::default(),
        policy: None,
        dataplane: Default::default(),
        report: Some(report),
        cni: None,
        config: serde_json::Value::Null,
    }
}

fn line<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    let line = text.lines().find(|line| line.trim_start().starts_with(start));
    line.unwrap_or_else(|| panic!("no line {start:?} in\n{text}")).split_whitespace().collect()
}

#[test]
fn status_contains_all_sections() {
    let text = render(&document(5), None);
    assert_eq!(line(&text, "node "), ["node", "node-a", "(skein-agent", "1.2.3)"]);
    assert_eq!(line(&text, "ready"), ["ready", "no"]);
    assert_eq!(line(&text, "because")[1], "interface");
    assert_eq!(line(&text, "note")[1..], ["underlay.addresses:", "no", "IPv6"]);
    assert_eq!(line(&text, "udp_gso")[1..3], ["degraded", "refused"]);
    assert_eq!(
        line(&text, "node-b"),
        [
            "node-b",
            "192.0.2.2:51900",
            "established",
            "1",
            "min",
            "15",
            "s",
            "0.42",
            "ms",
            "-",
            "yes",
            "aes256-gcm",
            "117.7",
            "MiB",
            "999",
            "B"
        ]
    );
    assert!(text.contains("unreachable: handshakes get no answer"));
    assert_eq!(line(&text, "ingress"), ["ingress", "replayed", "3"]);
    assert!(!text.contains("inner_source"), "Reasons without a drop must not be listed.");
    assert!(text.contains("up 1 h 2 min"));
}

#[test]
fn rates_need_two_samples_of_one_process() {
    let (before, now) = (document(1_000), document(41_000));
    let ago = Duration::from_secs(2);
    assert_eq!(line(&render(&now, None), "0  ")[2], "-");
    let text = render(&now, Some((&before, ago)));
    assert_eq!(line(&text, "0  ")[..5], ["0", "out", "20.0k", "0", "0"]);
    let mut other = before.clone();
    other.report.as_mut().unwrap().pid = 41;
    assert_eq!(line(&render(&now, Some((&other, ago))), "0  ")[2], "-");
}

#[test]
fn summary_is_shown_without_data_process() {
    let text = render(&Document { report: None, ..document(0) }, None);
    assert!(text.contains("node-a"));
    assert!(text.contains("not available"));
}

#[test]
fn numbers_are_formatted_in_few_characters() {
    assert_eq!(count(9999), "9999");
    assert_eq!(count(12_345), "12.3k");
    assert_eq!(count(u64::MAX), "18.4E");
    assert_eq!(bytes(10_240), "10.0 KiB");
    assert_eq!(age(90_061.0), "1 d 1 h");
    assert_eq!(age(3_725.0), "1 h 2 min");
    assert_eq!(age(125.0), "2 min 5 s");
}

#[test]
fn rejected_records_keep_their_keys() {
    let rejected = RejectedRecords { origin: "b.toml".into(), error: "line 1".to_owned() };
    let document = serde_json::json!({ "file": "b.toml", "error": "line 1" });
    assert_eq!(serde_json::to_value(rejected).unwrap(), document);
}
