//! `cargo e2e test`: everything that can be tested here, in one command.

pub mod fuzz;
pub mod watch;

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use crate::cluster::programs;
use crate::console::Console;
use crate::lab::registry;
use crate::{cargo, packages};

/// What to test.
#[derive(Debug, Args)]
pub struct Options {
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let console = Console::new();
    if !rustix::process::geteuid().is_root() {
        bail!("the tests make network namespaces and need root: run this as root");
    }
    packages::ensure(&[packages::DEMO, packages::TEST], &console)?;
    console.step("building everything (release)");
    console.pause(|| {
        cargo::run(&["build", "--release", "--workspace", "--bins", "--tests", "--examples"])
    })?;
    if options.filter.is_none() {
        // Tests of what ships would build it: no test has the time for that.
        console.step("building the programs as they ship");
        cargo::build_static(&["skein-agent", "skein-cni"])?;
    }
    drop(console);
    run_tests(&["--workspace", "--no-fail-fast"], &[], watch::LIMIT, options)
}

/// What needs a cluster.
const CLUSTER: [&str; 4] =
    ["--package=skein-e2e", "--test=cluster", "--test=cluster_skein", "--test=cluster_upgrade"];

/// Runs the tests that need a cluster.
pub fn run_cluster(options: &Options) -> Result<()> {
    let console = Console::new();
    programs::build(&console)?;
    console.step("building the tests (release)");
    console.pause(|| {
        cargo::run(&["build", "--release", "--workspace", "--bins"])?;
        cargo::run(&[&["build", "--release"][..], &CLUSTER].concat())
    })?;
    drop(console);
    // The change of a key waits for five minutes twice.
    run_tests(&CLUSTER, &["--ignored"], 2 * watch::LIMIT, options)
}

/// Has cargo run the tests of `which`, each for `limit` at most, and says what came of them.
fn run_tests(which: &[&str], more: &[&str], limit: Duration, options: &Options) -> Result<()> {
    registry::sweep();

    // Namespace tests measure times and rates: one at a time.
    let mut arguments = [&["test", "--release"], which, &["--", "--test-threads=1"], more].concat();
    arguments.extend(options.filter.as_deref());
    let mut tests = cargo::command(&arguments);
    let totals = watch::watch(&mut tests, limit, &mut std::io::stdout())?;

    let left = registry::abandoned();
    println!();
    for name in &totals.failures {
        println!("FAILED {name}");
    }
    if totals.skipped() > 0 {
        println!(
            "(tests on a real Kubernetes are skipped here: `cargo e2e cluster test` runs them)"
        );
    }
    println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, totals.skipped());
    if !left.is_empty() {
        bail!("left behind: {}", left.join(", "));
    }
    if totals.failed > 0 || !totals.success {
        bail!("the tests failed");
    }
    if totals.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}
