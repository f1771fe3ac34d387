//! What the fuzzers call (`agent/fuzz`): whole input in, nothing out, a panic where a promise is broken.
//! The ordinary tests run each of these over the corpus of its target.

use serde::Serialize;
use serde::de::DeserializeOwned;
use skein_dataplane as dataplane;
use skein_ipc::keys::{PrivateKey, PublicKey};
use skein_ipc::{self, Request, Response, Snapshot};
use skein_netlink as netlink;
use skein_netlink::firewall;
use skein_sys as sys;

use crate::cni;
use crate::commands;
use crate::config::Config;
#[cfg(feature = "kubernetes")]
use crate::control::kubernetes::resource::SkeinNode;
use crate::control::{records, registry};

/// A file of node records. One that is taken can be written and read again as JSON, as it is kept.
pub fn node_records(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for record in records::parse(text).unwrap_or_default() {
        survives(&record);
    }
}

/// The agent's configuration. One that is taken can be shown, without a secret: it has none.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = Config::parse(text) {
        assert!(serde_json::to_value(&config).is_ok_and(|shown| shown.is_object()));
    }
}

/// The records that were kept from the last time.
pub fn kept_records(data: &[u8]) {
    registry::fuzz_stored(data);
}

/// The file of the times of peers' handshakes.
pub fn handshake_times(data: &[u8]) {
    crate::control::handshakes::fuzz_kept(data);
}

/// What the API server says of another node.
#[cfg(feature = "kubernetes")]
pub fn skein_node(data: &[u8]) {
    let Ok(node) = serde_json::from_slice::<SkeinNode>(data) else { return };
    if let Ok(record) = node.record() {
        survives(&record);
    }
}

/// What comes over the data process's socket and the keeper's, as every kind of message.
pub fn ipc_frames(data: &[u8]) {
    skein_ipc::fuzz_frames::<Request>(data);
    skein_ipc::fuzz_frames::<Response>(data);
    skein_ipc::fuzz_frames::<Snapshot>(data);
    skein_dataplane::fuzz_frames(data);
}

/// What comes to `bench` from whoever is at the other end.
pub fn bench_lines(data: &[u8]) {
    commands::bench::protocol::fuzz_line(data);
}

/// What `nft -j` prints, of whatever rules others have made.
pub fn firewall_rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    firewall::fuzz_printed(text);
}

/// The network configuration list, with entries of other programs.
pub fn conflist(data: &[u8]) {
    cni::fuzz_conflist(data);
}

/// A plugin's answer to `VERSION`.
pub fn plugin_versions(data: &[u8]) {
    cni::versions::fuzz_answer(data);
}

/// Notifications of nftables and dumps of nexthop objects.
pub fn netlink_messages(data: &[u8]) {
    firewall::fuzz_notifications(data);
    netlink::fuzz_next_hops(data);
}

/// What the kernel says of a link.
pub fn link_answers(data: &[u8]) {
    sys::link::fuzz_answer(data);
}

/// Uevents of the kernel.
pub fn uevents(data: &[u8]) {
    dataplane::fuzz_uevent(data);
}

/// A key's text. Public keys are written as they are read.
pub fn keys(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let private = text.parse::<PrivateKey>();
    assert_eq!(private.is_ok(), text.parse::<PublicKey>().is_ok());
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string(), text.trim());
    }
}

fn survives<T: Serialize + DeserializeOwned + PartialEq>(value: &T) {
    let bytes = serde_json::to_vec(value).expect("plain values");
    assert!(serde_json::from_slice::<T>(&bytes).is_ok_and(|again| again == *value));
}

#[cfg(all(test, feature = "kubernetes"))]
#[path = "../core/src/fuzzing/vary.rs"]
mod vary;

#[cfg(all(test, feature = "kubernetes"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::vary::vary;
    use super::*;

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 14] = [
        ("node_records", node_records),
        ("configuration", configuration),
        ("kept_records", kept_records),
        ("handshake_times", handshake_times),
        ("skein_node", skein_node),
        ("ipc_frames", ipc_frames),
        ("bench_lines", bench_lines),
        ("firewall_rules", firewall_rules),
        ("link_answers", link_answers),
        ("uevents", uevents),
        ("keys", keys),
        ("conflist", conflist),
        ("plugin_versions", plugin_versions),
        ("netlink_messages", netlink_messages),
    ];

    /// Whole, cut anywhere, with any byte changed, and changed in many ways: in as many as SKEIN_VARIATIONS says.
    #[test]
    fn corpora_and_what_is_near_them() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");
        let more = std::env::var("SKEIN_VARIATIONS").ok().map(|count| count.parse().unwrap());
        for (target, run) in TARGETS {
            let entries = std::fs::read_dir(format!("{corpus}/{target}")).unwrap();
            let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
            paths.sort();
            let seeds: Vec<_> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
            assert!(!seeds.is_empty(), "no seeds for {target}");
            vary(&seeds, more.unwrap_or(5_000), run);
            for seed in seeds {
                run(&seed);
                for index in 0..seed.len() {
                    run(&seed[..index]);
                    for change in [1, 0x80, 0xff] {
                        let mut changed = seed.clone();
                        changed[index] ^= change;
                        run(&changed);
                    }
                }
            }
        }
    }
}
