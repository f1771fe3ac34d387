//! Node records in files: one TOML table, or an array `[[node]]` of tables.

pub mod conflict;
mod node;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use serde::Deserialize;
use skein_cni_protocol::excerpt::excerpt;
use skein_core::address;
use skein_ipc::keys::PublicKey;

use self::conflict::first_conflict;
pub use self::node::NodeRecord;
use self::node::parse_endpoints;
use super::endpoint::EndpointError;
use crate::config::{check_disjoint, check_node_name, check_pod_cidr, toml_error};

/// Maximum length of a file of records in bytes; 10,000 nodes take about 3 MiB.
const MAX_FILE: u64 = 16 << 20;

/// Reason to refuse a record or a file of records, with the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordError(String);

impl RecordError {
    /// Returns an error with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RecordError {}

/// Failure to read the source of the records.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The path does not exist, or the directory cannot be listed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The API server has not sent all records yet; the text names what is missing.
    #[error("{0}")]
    Incomplete(String),
}

/// Records of each file, or the reason to refuse the file, by path.
pub type ParsedRecords = BTreeMap<PathBuf, Result<Vec<NodeRecord>, RecordError>>;

/// Reads the records of a file, or of every `*.toml` file in a directory that is not hidden.
///
/// # Errors
/// An I/O error if the directory cannot be listed or the path does not exist. A file that cannot be
/// read or parsed is an error in the result.
pub fn read(source: &Path) -> std::io::Result<ParsedRecords> {
    if !std::fs::metadata(source)?.is_dir() {
        return Ok(BTreeMap::from([(source.to_owned(), read_file(source))]));
    }
    let mut files = ParsedRecords::new();
    for entry in std::fs::read_dir(source)? {
        let path = entry?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "toml") {
            let records = read_file(&path);
            files.insert(path, records);
        }
    }
    Ok(files)
}

/// Returns the first host address of a prefix: the address after the network address, or the
/// network address itself if the prefix has at most two addresses.
pub fn first_host(cidr: &IpNet) -> IpAddr {
    // The network address names the network in IPv4 and is the subnet-router anycast address in
    // IPv6 (RFC 4291, section 2.6.1), except on point-to-point links (RFC 3021, RFC 6164).
    match cidr.max_prefix_len() - cidr.prefix_len() {
        0 | 1 => cidr.network(),
        _ => match cidr.network() {
            IpAddr::V4(ip) => IpAddr::V4((u32::from(ip) + 1).into()),
            IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) + 1).into()),
        },
    }
}

fn read_file(path: &Path) -> Result<Vec<NodeRecord>, RecordError> {
    let cannot = |error| RecordError(format!("the file cannot be read: {error}"));
    let length = std::fs::metadata(path).map_err(cannot)?.len();
    if length > MAX_FILE {
        return Err(RecordError(format!(
            "the file is longer than {MAX_FILE} bytes. Split it into several files."
        )));
    }
    parse(&std::fs::read_to_string(path).map_err(cannot)?)
}

/// A record whose fields are text: a table of a file, or the fields of a SkeinNode.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRecord {
    pub(super) name: String,
    pub(super) public_key: String,
    pub(super) second_public_key: Option<String>,
    pub(super) endpoints: Vec<String>,
    pub(super) pod_cidrs: Vec<String>,
    /// Overlay addresses; empty for the default.
    #[serde(default)]
    pub(super) overlay_addresses: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawArray {
    node: Vec<RawRecord>,
}

/// Parses the text of a file. An empty file is an error, because a file that is being written looks
/// like that; `node = []` states that there are no records.
///
/// # Errors
/// [`RecordError`] if the text is not TOML, if a field is missing, unknown or invalid, or if two
/// records contradict each other.
pub fn parse(text: &str) -> Result<Vec<NodeRecord>, RecordError> {
    let wrong = |error: toml::de::Error| RecordError(toml_error(text, &error));
    let table: toml::Table = toml::from_str(text).map_err(wrong)?;
    if table.is_empty() {
        let text = "the file has no node record. Write name, public_key, endpoints and pod_cidrs, or \
                    remove the file.";
        return Err(RecordError(text.to_owned()));
    }
    // Parsed from the text again, because errors of a table do not name lines.
    let raw = match table.contains_key("node") {
        true => toml::from_str::<RawArray>(text).map_err(wrong)?.node,
        false => vec![toml::from_str::<RawRecord>(text).map_err(wrong)?],
    };
    let records = raw.into_iter().map(RawRecord::validate).collect::<Result<Vec<_>, _>>()?;
    match first_conflict(&records) {
        Some(conflict) => Err(RecordError(conflict.message)),
        None => Ok(records),
    }
}

impl RawRecord {
    /// Parses the fields.
    ///
    /// # Errors
    /// [`RecordError`] with the name of the first invalid field and the remedy.
    pub(super) fn validate(self) -> Result<NodeRecord, RecordError> {
        let name = self.name;
        check_node_name(&name).map_err(|error| RecordError(error.to_string()))?;
        let wrong =
            |field: &str, text: String| RecordError(format!("node {name}: {field}: {text}"));
        let key = |field, text: &String| {
            let remedy = "Use the output of skein-agent pubkey on that node.";
            let key = text
                .parse::<PublicKey>()
                .map_err(|error| wrong(field, format!("{:?}: {error}. {remedy}", excerpt(text))))?;
            match key.0 == [0; 32] {
                true => Err(wrong(field, format!("the key is all zeros. {remedy}"))),
                false => Ok(key),
            }
        };
        let public_key = key("public_key", &self.public_key)?;
        let second = self.second_public_key.as_ref();
        let second_public_key = second.map(|text| key("second_public_key", text)).transpose()?;
        if second_public_key == Some(public_key) {
            let text = "the key equals public_key. Remove second_public_key.";
            return Err(wrong("second_public_key", text.to_owned()));
        }
        let (endpoints, refused) = parse_endpoints(&self.endpoints);
        if endpoints.is_empty() {
            let text =
                "the list is empty. Give at least one address of the node, as 192.0.2.1:51900.";
            let text = refused.first().map_or(text.to_owned(), |(endpoint, error)| {
                format!("{:?} {error}", excerpt(endpoint))
            });
            return Err(wrong("endpoints", text));
        }
        let mut pod_cidrs = Vec::with_capacity(self.pod_cidrs.len());
        for text in &self.pod_cidrs {
            let cidr: IpNet = address::parse(text).map_err(|_| {
                let example = "Use an address and a length, as 10.244.1.0/24.";
                wrong("pod_cidrs", format!("{:?} is not a prefix. {example}", excerpt(text)))
            })?;
            check_pod_cidr(&cidr).map_err(|error| wrong("pod_cidrs", error.to_string()))?;
            pod_cidrs.push(cidr);
        }
        if pod_cidrs.is_empty() {
            let text = "the list is empty. Give the prefixes of the node's pods, as 10.244.1.0/24.";
            return Err(wrong("pod_cidrs", text.to_owned()));
        }
        check_disjoint(&pod_cidrs).map_err(|error| wrong("pod_cidrs", error.to_string()))?;
        let mut overlay_addresses = Vec::with_capacity(self.overlay_addresses.len());
        for text in &self.overlay_addresses {
            let address: IpAddr = address::parse(text).map_err(|_| {
                wrong("overlay_addresses", format!("{:?} is not an address", excerpt(text)))
            })?;
            if !pod_cidrs.iter().any(|cidr| cidr.contains(&address)) {
                let text = format!("{address} is outside of pod_cidrs. Use an address in them.");
                return Err(wrong("overlay_addresses", text));
            }
            overlay_addresses.push(address);
        }
        log_refused(&name, &refused);
        Ok(NodeRecord {
            name,
            public_key,
            second_public_key,
            endpoints,
            pod_cidrs,
            overlay_addresses,
        })
    }
}

/// Logs the endpoints of a record that are left out if one of them is new, because every change of
/// any record reads all records again.
fn log_refused(node: &str, refused: &[(&str, EndpointError)]) {
    /// Maximum number of nodes whose endpoints are remembered.
    const MAX_NODES: usize = 4096;
    static LOGGED: Mutex<BTreeMap<String, Vec<String>>> = Mutex::new(BTreeMap::new());
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    let before = logged.remove(node).unwrap_or_default();
    let texts: Vec<_> = refused.iter().map(|(text, _)| excerpt(text).into_owned()).collect();
    let new = texts.iter().zip(refused).find(|(text, _)| !before.contains(text));
    if let Some((endpoint, (_, error))) = new {
        let count = refused.len();
        tracing::warn!(node, count, first = %endpoint, %error, "endpoints of a node record left out");
    }
    if !texts.is_empty() && logged.len() < MAX_NODES {
        logged.insert(node.to_owned(), texts);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use std::net::SocketAddr;

    use super::*;
    use proptest::prelude::*;

    /// A record for tests: node `n` with key bytes `n`.
    pub(crate) fn record(n: u8, cidrs: &[&str]) -> NodeRecord {
        NodeRecord {
            name: format!("node-{n}"),
            public_key: PublicKey([n; 32]),
            second_public_key: None,
            endpoints: vec![SocketAddr::from(([192, 0, 2, n], 51900)).into()],
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            overlay_addresses: Vec::new(),
        }
    }

    /// The text of a record file.
    pub(crate) fn text(n: u8, cidrs: &[&str]) -> String {
        let record = record(n, cidrs);
        format!(
            "name = {:?}\npublic_key = \"{}\"\nendpoints = [\"{}\"]\npod_cidrs = {cidrs:?}\n",
            record.name, record.public_key, record.endpoints[0]
        )
    }

    fn error(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn one_record_and_arrays_are_parsed() {
        let one = text(1, &["10.1.0.0/24", "fd00:1::/64"]);
        assert_eq!(parse(&one).unwrap(), [record(1, &["10.1.0.0/24", "fd00:1::/64"])]);
        let two = format!("[[node]]\n{one}\n[[node]]\n{}", text(2, &["10.2.0.0/24"]));
        assert_eq!(parse(&two).unwrap()[1], record(2, &["10.2.0.0/24"]));
        assert_eq!(parse("node = []").unwrap(), []);
    }

    #[test]
    fn endpoint_without_port_has_default_port() {
        let text = text(1, &["10.1.0.0/24"]).replace("192.0.2.1:51900", "2001:db8::1");
        assert_eq!(parse(&text).unwrap()[0].endpoints, ["[2001:db8::1]:51900".parse().unwrap()]);
    }

    #[test]
    fn errors_name_the_field_and_the_remedy() {
        let good = text(1, &["10.1.0.0/24"]);
        let key = record(1, &[]).public_key.to_string();
        for (bad, field, remedy) in [
            (String::new(), "no node record", "remove"),
            ("# being written".to_owned(), "no node record", "remove"),
            ("name = ".to_owned(), "line 1", ""),
            (good.clone() + "mtu = 1\n", "mtu", "expected one of"),
            ("node = 1".to_owned(), "node", "sequence"),
            (good.replace("node-1", "node 1"), "name", "letters"),
            (good.replace(&key, "AAAA"), "node-1: public_key", "skein-agent pubkey"),
            (good.replace(&key, "?"), "node-1: public_key", "skein-agent pubkey"),
            (good.clone() + "second_public_key = '?'", "second_public_key", "skein-agent pubkey"),
            (
                good.clone() + &format!("second_public_key = '{key}'"),
                "second",
                "Remove second_public_key",
            ),
            (text(0, &["10.1.0.0/24"]).replace("node-0", "z"), "z: public_key", "pubkey"),
            (good.replace("192.0.2.1:51900", "host:1"), "node-1: endpoints", "192.0.2.1"),
            (good.replace("192.0.2.1:51900", "0.0.0.0"), "node-1: endpoints", "192.0.2.1"),
            (good.replace("\"192.0.2.1:51900\"", ""), "node-1: endpoints", "at least one"),
            (good.replace("10.1.0.0/24", "10.1.0.9/24"), "node-1: pod_cidrs", "10.1.0.0/24"),
            (good.replace("10.1.0.0/24", "10.1.0.0"), "node-1: pod_cidrs", "length"),
            (good.replace("\"10.1.0.0/24\"", ""), "node-1: pod_cidrs", "prefixes"),
            (text(1, &["10.1.0.0/24", "10.1.0.0/25"]), "pod_cidrs", "overlap"),
            (good.clone() + "overlay_addresses = ['x']\n", "overlay_addresses", "address"),
            (good.clone() + "overlay_addresses = ['10.2.0.1']\n", "overlay_addresses", "pod_cidrs"),
        ] {
            let error = error(&bad);
            assert!(error.contains(field), "{bad}: {error}");
            assert!(error.contains(remedy), "{bad}: {error}");
        }
    }

    /// Writer of log lines into memory.
    #[derive(Clone, Default)]
    struct Lines(std::sync::Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn refused_endpoint_is_logged_once_for_each_text() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber =
            tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        let with = |refused: &str| {
            let good = text(77, &["10.77.0.0/24"]);
            parse(&good.replace("endpoints = [", &format!("endpoints = [{refused}"))).unwrap();
        };
        tracing::subscriber::with_default(subscriber, || {
            for refused in
                ["'255.255.255.255:9', ", "'255.255.255.255:9', '224.0.0.1', ", "", "'224.0.0.1', "]
            {
                (0..3).for_each(|_| with(refused));
            }
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let count = |endpoint: &str| text.lines().filter(|line| line.contains(endpoint)).count();
        assert_eq!(count("left out"), 3, "{text}");
        assert_eq!((count("255.255.255.255:9"), count("224.0.0.1")), (1, 2), "{text}");
    }

    #[test]
    fn mapped_addresses_of_a_record_are_ipv4() {
        let good = text(1, &["10.1.0.0/24"]);
        let mapped = good.replace("192.0.2.1:51900", "[::ffff:192.0.2.1]:51900");
        assert_eq!(parse(&mapped).unwrap(), parse(&good).unwrap());
        let mapped = good.replace("192.0.2.1:51900", "::ffff:192.0.2.1");
        assert_eq!(parse(&mapped).unwrap(), parse(&good).unwrap());
        let mapped = good.replace("10.1.0.0/24", "::ffff:10.1.0.0/120");
        assert_eq!(parse(&mapped).unwrap(), parse(&good).unwrap());
        for bad in ["[::ffff:224.0.0.1]:51900", "[::ffff:0.0.0.0]:51900", "255.255.255.255:51900"] {
            let error = error(&good.replace("192.0.2.1:51900", bad));
            assert!(error.contains("is not an address"), "{bad}: {error}");
        }
        // An endpoint in another node's prefix would cause a routing loop of the overlay's packets.
        let inside = text(2, &["10.2.0.0/24"]).replace("192.0.2.2", "[::ffff:10.1.0.9]");
        let error = error(&format!("[[node]]\n{good}[[node]]\n{inside}"));
        assert!(error.contains("10.1.0.9, where node node-2 listens"), "{error}");
    }

    #[test]
    fn mapped_addresses_of_a_kept_record_are_ipv4() {
        let good = record(1, &["10.1.0.0/24"]);
        let kept = serde_json::to_string(&good).unwrap();
        let mapped = kept
            .replace("192.0.2.1:51900", "[::ffff:192.0.2.1]:51900")
            .replace("10.1.0.0/24", "::ffff:10.1.0.0/120");
        assert_ne!(mapped, kept);
        assert_eq!(serde_json::from_str::<NodeRecord>(&mapped).unwrap(), good);
    }

    #[test]
    fn record_with_one_usable_endpoint_is_accepted() {
        let good = text(1, &["10.1.0.0/24"]);
        for bad in ["[fe80::1]:51900", "255.255.255.255:51900", "[::ffff:224.0.0.1]:51900"] {
            let both = good.replace("\"192.0.2.1", &format!("\"{bad}\", \"192.0.2.1"));
            assert_ne!(both, good);
            let found = parse(&both).unwrap();
            assert_eq!(found, parse(&good).unwrap(), "{bad} is left out.");
            let error = error(&good.replace("192.0.2.1:51900", bad));
            assert!(error.contains("node-1: endpoints") && error.contains(bad), "{bad}: {error}");
        }
    }

    #[test]
    fn refused_endpoint_of_kept_record_is_left_out() {
        let good = record(1, &["10.1.0.0/24"]);
        let kept = serde_json::to_string(&good).unwrap();
        let both = kept.replace("\"192.0.2.1", "\"[fe80::1]:51900\", \"192.0.2.1");
        assert_ne!(both, kept);
        assert_eq!(serde_json::from_str::<NodeRecord>(&both).unwrap(), good);
        let none = kept.replace("192.0.2.1:51900", "255.255.255.255:51900");
        let found = serde_json::from_str::<NodeRecord>(&none).unwrap();
        assert_eq!(found, NodeRecord { endpoints: Vec::new(), ..good });
    }

    #[test]
    fn contradictions_within_a_file_are_refused() {
        let file = |a: &str, b: &str| format!("[[node]]\n{a}[[node]]\n{b}");
        let a = text(1, &["10.1.0.0/16"]);
        assert!(error(&file(&a, &text(2, &["10.1.9.0/24"]))).contains("overlap"));
        assert!(
            error(&file(&a, &text(1, &["10.2.0.0/24"]))).contains("two records of node node-1")
        );
        let twin = text(1, &["10.2.0.0/24"]).replace("node-1", "twin");
        assert!(error(&file(&a, &twin)).contains("same key"));
        let key = record(1, &[]).public_key;
        let second = text(2, &["10.2.0.0/24"]) + &format!("second_public_key = '{key}'\n");
        assert!(error(&file(&text(1, &["10.1.0.0/24"]), &second)).contains("same key"));
        for taken in ["192.0.2.0/24", "192.0.2.1/32", "192.0.0.0/16"] {
            let taken = error(&file(&a, &text(2, &[taken])));
            assert!(taken.contains("192.0.2.1, where node node-1 listens"), "{taken}");
        }
    }

    #[test]
    fn only_visible_toml_files_of_a_directory_are_read() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.toml", ".b.toml", "c.toml~", "d"] {
            std::fs::write(directory.path().join(name), text(1, &["10.1.0.0/24"])).unwrap();
        }
        let files = read(directory.path()).unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), [&directory.path().join("a.toml")]);
        let file = directory.path().join("d");
        assert!(
            read(&file).unwrap()[&file].is_ok(),
            "a file that the configuration names is read in any case"
        );
        assert!(read(&directory.path().join("none")).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }
    }
}
