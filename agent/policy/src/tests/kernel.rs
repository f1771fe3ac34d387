//! Rulesets against the kernel, in a scratch network namespace. The tests need root and the program
//! `nft`; they fail without.

use std::io::Write as _;
use std::process::{Command, Stdio};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use super::generate::{CROWDED, Cluster, SMALL, cluster};
use super::incremental::{Step, step, take};
use crate::compile::{Families, compile};
use crate::engine::Engine;
use crate::program::Program;
use crate::render::{Mode, Table, apply, install};

pub(super) fn table() -> Table {
    Table {
        name: "skein-policy".to_owned(),
        pod_prefix: "skp".to_owned(),
        log_group: 51,
        mode: Mode::Enforce,
    }
}

/// Runs `nft` with a transaction; returns what it printed.
pub(super) fn nft(arguments: &[&str], transaction: &str) -> String {
    run("nft", "nftables", arguments, transaction)
}

/// Runs a program of a Debian package with an input, in the calling thread's namespace; returns
/// what it printed.
pub(super) fn run(program: &str, package: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|_| panic!("{program} is missing: install the Debian package {package}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {complaint}\n{input}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) fn in_namespace(test: impl FnOnce() + Send) {
    skein_sys::in_new_network_namespace(test)
        .expect("this test needs root: CAP_SYS_ADMIN for a network namespace");
}

/// Returns `count` values of a strategy, the same in every run.
pub(super) fn samples<S: Strategy>(strategy: &S, count: usize) -> Vec<S::Value> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
}

#[test]
fn rulesets_of_random_clusters_load() {
    in_namespace(|| {
        let mut clusters: Vec<Cluster> = samples(&cluster(SMALL), 20);
        clusters.extend(samples(&cluster(CROWDED), 20));
        for cluster in clusters {
            let text = install(&table(), &compile(&cluster.inventory(), Families::BOTH));
            nft(&["-c", "-f", "-"], &text);
            nft(&["-f", "-"], &text);
            nft(&["delete", "table", "inet", "skein-policy"], "");
        }
    });
}

/// Returns the objects of the table in `nft`'s notation, without positions and counts.
pub(super) fn listed() -> Vec<String> {
    let text = nft(&["-s", "list", "table", "inet", "skein-policy"], "");
    let mut objects: Vec<_> = text.split("\n\n").map(sorted_elements).collect();
    objects.sort_unstable();
    objects
}

/// Sorts the words of a set, whose elements `nft` lists in the order of the hash table.
fn sorted_elements(object: &str) -> String {
    let object = object.trim().trim_start_matches("table inet skein-policy {").trim();
    if object.starts_with("chain") {
        return object.trim_end_matches("}\n}").trim_end_matches('}').trim_end().to_owned();
    }
    let elements = object.replace(['\n', '\t', '{', '}'], " ");
    let mut words: Vec<_> = elements.split(',').map(str::trim).collect();
    if let Some((declaration, first)) = words[0].split_once("elements =") {
        words[0] = first.trim();
        words.sort_unstable();
        words.insert(0, declaration.trim());
    }
    words.join(", ")
}

#[test]
fn differences_lead_to_the_same_ruleset_as_an_installation() {
    in_namespace(|| {
        let steps: Vec<Vec<Step>> = samples(&proptest::collection::vec(step(), 25), 6);
        for steps in steps {
            let mut engine = Engine::new(Families::BOTH);
            nft(&["-f", "-"], &install(&table(), &Program::default()));
            for step in steps {
                take(&mut engine, step);
                nft(&["-f", "-"], &apply(&table(), &engine.take_difference()));
            }
            let changed = listed();
            nft(&["delete", "table", "inet", "skein-policy"], "");
            nft(&["-f", "-"], &install(&table(), engine.program()));
            assert_eq!(changed, listed(), "the ruleset differs from a fresh installation");
            nft(&["delete", "table", "inet", "skein-policy"], "");
        }
    });
}
