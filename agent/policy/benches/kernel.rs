//! Cost of changes of the table in the kernel, with 1,000 policies that each have a set of 100
//! addresses. The benchmarks need root and the program `nft`, and run in a scratch network
//! namespace.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::Command;

use divan::Bencher;
use skein_netlink::nftables::Monitor;
use skein_policy::api::{LabelSelector, PortRange, Protocol};
use skein_policy::enforce::Enforcer;
use skein_policy::model::Direction;
use skein_policy::program::{
    Chain, Change, Difference, Element, Family, Match, Program, Set, SetKey, Statement, Verdict,
};
use skein_policy::render::{Mode, Table};
use tokio::runtime::Runtime;

const POLICIES: u32 = 1_000;
const ADDRESSES: u32 = 100;

fn main() {
    skein_sys::in_new_network_namespace(divan::main)
        .expect("the benchmarks need root: CAP_SYS_ADMIN for a network namespace");
}

fn set(number: u32) -> String {
    format!("h4_{number}")
}

/// Returns the element with a number; elements with different numbers are different.
fn element(number: u32) -> Element {
    Element::Address(Ipv4Addr::from_bits(0x0a00_0000 + number).into())
}

fn chain(port: u16, set: String) -> Chain {
    let matches = vec![
        Match::Peer(Family::V4, set),
        Match::Port(Protocol::Tcp, PortRange { start: port, end: port }),
    ];
    let allow = Statement { matches, counter: None, verdict: Verdict::Accept };
    let refuse = Statement { matches: Vec::new(), counter: None, verdict: Verdict::Refuse };
    Chain { direction: Direction::Ingress, statements: vec![allow, refuse] }
}

fn program() -> Program {
    let mut program = Program::default();
    for number in 0..POLICIES {
        let key = SetKey::Nodes(vec![LabelSelector::default()]);
        program.sets.insert(set(number), Set { key, family: Some(Family::V4) });
        let elements = (0..ADDRESSES).map(|one| element(number * ADDRESSES + one)).collect();
        program.elements.insert(set(number), elements);
        let chain = chain(80, set(number));
        let interface = format!("skp{number}");
        program.from.insert(interface.clone(), Verdict::Accept);
        program.to.insert(interface, Verdict::Goto(chain.name()));
        program.chains.insert(chain.name(), chain);
    }
    program
}

/// Returns a runtime, and an enforcer of the installed program.
fn installed() -> (Runtime, Enforcer) {
    delete_table();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut enforcer = runtime.block_on(async { open() });
    runtime.block_on(enforcer.install(&program())).unwrap();
    (runtime, enforcer)
}

fn open() -> Enforcer {
    let table = Table {
        name: "skein-policy".to_owned(),
        pod_prefix: "skp".to_owned(),
        log_group: 51,
        mode: Mode::Enforce,
    };
    Enforcer::open(table, &Monitor::start().unwrap()).unwrap()
}

fn delete_table() {
    // The table does not exist before the first benchmark.
    let _ = Command::new("nft").args(["delete", "table", "inet", "skein-policy"]).output();
}

/// Each iteration applies two differences to the installed program; the second reverts the first.
fn apply_in_turn(bencher: Bencher<'_, '_>, there: &Difference, back: &Difference) {
    let (runtime, mut enforcer) = installed();
    bencher.bench_local(|| {
        runtime.block_on(enforcer.apply(there)).unwrap();
        runtime.block_on(enforcer.apply(back)).unwrap();
    });
}

/// Each iteration adds an element to a number of sets, and removes the elements again.
#[divan::bench(args = [1, 100, 1_000], sample_count = 50)]
fn elements_come_and_go(bencher: Bencher<'_, '_>, sets: u32) {
    let difference = |added| {
        let changes = BTreeMap::from([(element(POLICIES * ADDRESSES), added)]);
        let elements = (0..sets).map(|number| (set(number), changes.clone())).collect();
        Difference { elements, ..Difference::default() }
    };
    let (there, back) = (difference(true), difference(false));
    apply_in_turn(bencher, &there, &back);
}

/// Each iteration adds the verdicts of an interface, and removes them again.
#[divan::bench(sample_count = 50)]
fn interface_comes_and_goes(bencher: Bencher<'_, '_>) {
    let difference = |change: Change<Verdict>| {
        let changes = BTreeMap::from([("skpnew".to_owned(), change)]);
        Difference { from: changes.clone(), to: changes, ..Difference::default() }
    };
    let there = difference(Change::Added(Verdict::Accept));
    let back = difference(Change::Removed);
    apply_in_turn(bencher, &there, &back);
}

/// Each iteration replaces the chain of one pod twice.
#[divan::bench(sample_count = 5)]
fn policy_changes(bencher: Bencher<'_, '_>) {
    let (old, new) = (chain(80, set(0)), chain(81, set(0)));
    let difference = |from: &Chain, to: &Chain| Difference {
        chains: BTreeMap::from([
            (from.name(), Change::Removed),
            (to.name(), Change::Added(to.clone())),
        ]),
        to: BTreeMap::from([("skp0".to_owned(), Change::Replaced(Verdict::Goto(to.name())))]),
        ..Difference::default()
    };
    let (there, back) = (difference(&old, &new), difference(&new, &old));
    apply_in_turn(bencher, &there, &back);
}

/// Each iteration installs the whole table.
#[divan::bench(sample_count = 5)]
fn whole_load(bencher: Bencher<'_, '_>) {
    let (runtime, mut enforcer) = installed();
    let program = program();
    bencher
        .with_inputs(delete_table)
        .bench_local_values(|()| runtime.block_on(enforcer.install(&program)).unwrap());
}

/// Each iteration compares the whole table, which is as wanted.
#[divan::bench(sample_count = 5)]
fn comparison(bencher: Bencher<'_, '_>) {
    let (runtime, mut enforcer) = installed();
    let program = program();
    bencher.bench_local(|| assert!(runtime.block_on(enforcer.verify(&program)).unwrap()));
}
