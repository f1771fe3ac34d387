//! Entry points of the fuzz targets (`agent/fuzz`). Each function reads a whole input and panics if
//! an invariant is violated. Unit tests run each function over the corpus of its target.

use serde::Serialize;
use serde::de::DeserializeOwned;
#[cfg(feature = "fuzzing")]
pub use skein_dataplane::fuzzing::uevents;
use skein_ipc::keys::{PrivateKey, PublicKey};
#[cfg(feature = "fuzzing")]
pub use skein_netlink::fuzzing::{firewall_rules, netlink_messages};
#[cfg(feature = "fuzzing")]
pub use skein_sys::fuzzing::link_answers;

use crate::cni;
use crate::commands;
use crate::config::Config;
#[cfg(feature = "kubernetes")]
use crate::control::kubernetes::resource::SkeinNode;
use crate::control::{records, registry};

/// Parses a file of node records. Accepted records must survive a round trip through JSON, the
/// format of the stored records.
pub fn node_records(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for record in records::parse(text).unwrap_or_default() {
        survives(&record);
    }
}

/// Parses a configuration file. A valid configuration must be serializable, because the log shows
/// it.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = Config::parse(text) {
        assert!(serde_json::to_value(&config).is_ok_and(|shown| shown.is_object()));
    }
}

/// Parses the stored node records of the previous process.
pub fn kept_records(data: &[u8]) {
    registry::fuzz_stored(data);
}

/// Parses the file with the times of peers' handshakes.
pub fn handshake_times(data: &[u8]) {
    crate::control::handshakes::fuzz_kept(data);
}

/// Parses a SkeinNode from the API server. Accepted records must survive a round trip through JSON.
#[cfg(feature = "kubernetes")]
pub fn skein_node(data: &[u8]) {
    let Ok(node) = serde_json::from_slice::<SkeinNode>(data) else { return };
    if let Ok(record) = node.record() {
        survives(&record);
    }
}

/// Parses messages between control process, data process and keeper.
#[cfg(feature = "fuzzing")]
pub fn ipc_frames(data: &[u8]) {
    skein_ipc::fuzzing::ipc_frames(data);
    skein_dataplane::fuzzing::ipc_frames(data);
}

/// Parses a line of the protocol of `bench`.
pub fn bench_lines(data: &[u8]) {
    commands::bench::protocol::fuzz_line(data);
}

/// Parses a network configuration list with entries of other programs.
pub fn conflist(data: &[u8]) {
    cni::fuzz_conflist(data);
}

/// Parses the answer of a CNI plugin to `VERSION`.
pub fn plugin_versions(data: &[u8]) {
    cni::fuzz_answer(data);
}

/// Parses the text of a key. A public key must be formatted as it was parsed.
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
#[allow(clippy::unwrap_used)]
#[path = "../fuzz/corpus_mutations.rs"]
mod corpus_mutations;

#[cfg(all(test, feature = "kubernetes"))]
mod tests {
    use super::corpus_mutations::run_corpus_and_mutations;
    use super::*;

    type Target = (&'static str, fn(&[u8]));

    /// Targets of this crate. The other crates test their own targets.
    const TARGETS: [Target; 9] = [
        ("node_records", node_records),
        ("configuration", configuration),
        ("kept_records", kept_records),
        ("handshake_times", handshake_times),
        ("skein_node", skein_node),
        ("bench_lines", bench_lines),
        ("keys", keys),
        ("conflist", conflist),
        ("plugin_versions", plugin_versions),
    ];

    #[test]
    fn fuzz_targets_accept_corpora_and_mutations() {
        for (target, run) in TARGETS {
            run_corpus_and_mutations(target, run);
        }
    }
}
