//! Cost of a change of the node records: reading the files and resolving their conflicts.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::net::Ipv4Addr;

use divan::Bencher;
use skein_agent::config::Config;
use skein_agent::control::registry::Registry;
use skein_agent::control::source::RecordSource;
use skein_ipc::keys::PublicKey;
use tempfile::TempDir;

/// Number of record files.
const FILES: [u32; 2] = [1_000, 3_000];

fn main() {
    divan::main();
}

/// Returns a registry whose source has `files` records. `key` and `prefix` return the number of
/// each record's key and /28 prefix.
fn registry(
    files: u32,
    key: impl Fn(u32) -> u32,
    prefix: impl Fn(u32) -> u32,
) -> (TempDir, Registry) {
    let directory = tempfile::tempdir().unwrap();
    let nodes = directory.path().join("nodes");
    fs::create_dir(&nodes).unwrap();
    let text = format!(
        "name = 'own'\npod_cidrs = ['10.255.0.0/24']\nnodes = {nodes:?}\nstate_dir = {:?}\n",
        directory.path()
    );
    let config = Config::parse(&text).unwrap();
    let source = RecordSource::Path(nodes.clone());
    let own = PublicKey([1; 32]).into();
    let registry = Registry::open(&config, own, source, None).unwrap();
    for number in 0..files {
        let mut bytes = [7; 32];
        bytes[..4].copy_from_slice(&key(number).to_be_bytes());
        let record = format!(
            "name = 'node-{number}'\npublic_key = '{}'\nendpoints = ['192.0.2.1:51900']\n\
             pod_cidrs = ['{}/28']\n",
            PublicKey(bytes),
            Ipv4Addr::from(0x0a00_0000 + 16 * prefix(number))
        );
        fs::write(nodes.join(format!("{number:06}.toml")), record).unwrap();
    }
    (directory, registry)
}

fn reload(bencher: Bencher<'_, '_>, (_directory, mut registry): (TempDir, Registry)) {
    registry.reload();
    bencher.bench_local(|| registry.reload());
}

#[divan::bench(args = FILES)]
fn without_contradictions(bencher: Bencher<'_, '_>, files: u32) {
    reload(bencher, registry(files, |number| number, |number| number));
}

#[divan::bench(args = FILES)]
fn one_key_of_all(bencher: Bencher<'_, '_>, files: u32) {
    reload(bencher, registry(files, |_| 0, |number| number));
}

#[divan::bench(args = FILES)]
fn one_prefix_of_all(bencher: Bencher<'_, '_>, files: u32) {
    reload(bencher, registry(files, |number| number, |_| 0));
}
