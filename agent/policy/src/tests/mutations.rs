//! Proof that the agreement test finds faults: each deliberate fault of the compiler is found.

use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::agreement::check;
use super::generate::{SMALL, cluster};
use crate::compile::{Families, compile};
use crate::model::{Mutation, with_mutation};

/// Faults that the property test must find.
const MUTATIONS: [Mutation; 12] = [
    Mutation::NotInNeedsKey,
    Mutation::IgnoreExcept,
    Mutation::ShareExcept,
    Mutation::NamedPortOfAnyProtocol,
    Mutation::EndPortExclusive,
    Mutation::IsolateBothDirections,
    Mutation::PassSkipsNetworkPolicies,
    Mutation::IgnorePriority,
    Mutation::UnknownPeerIsIgnored,
    Mutation::BaselineForIsolated,
    Mutation::NoPortsMeansTransport,
    Mutation::ForgetOwnNamespace,
];

/// Runs the agreement test with a fault. Returns whether a cluster shows the fault.
fn is_found(mutation: Option<Mutation>, cases: u32) -> bool {
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let result = runner.run(&cluster(SMALL), |cluster| {
        let program = with_mutation(mutation, || compile(&cluster.inventory(), Families::BOTH));
        check(&cluster, &program, SMALL)
    });
    result.is_err()
}

#[test]
fn every_mutation_of_the_compiler_is_found() {
    assert!(!is_found(None, 50), "the compiler without a fault agrees with the oracle");
    let missed: Vec<_> =
        MUTATIONS.into_iter().filter(|mutation| !is_found(Some(*mutation), 2000)).collect();
    assert!(missed.is_empty(), "the property test does not find {missed:?}");
}
