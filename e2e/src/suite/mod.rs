//! `cargo e2e test`: all tests of the workspace in one command.

mod binaries;
pub mod fuzz;
pub mod watch;

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use skein_cluster::programs;
use skein_lab::console::Console;
use skein_lab::registry;
use skein_lab::{cargo, packages};

/// Options of `cargo e2e test` and `cargo e2e cluster test`.
#[derive(Debug, Args)]
pub struct Options {
    /// Part of the names of the tests to run
    filter: Option<String>,
    /// Number of test modules that run at the same time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=MAX_JOBS))]
    jobs: u8,
}

/// Limit of `--jobs`: each laboratory runs several agents, so more of them need more cores.
const MAX_JOBS: i64 = 16;

/// Runs `cargo e2e test`.
///
/// # Errors
/// If the process does not run as root, if a package cannot be installed, if the build or a test
/// fails, if no test ran, or if tests left something on the host.
pub fn run(options: &Options) -> Result<()> {
    let console = Console::new();
    if !rustix::process::geteuid().is_root() {
        bail!("the tests create network namespaces and need root. Run this as root.");
    }
    packages::ensure(&[packages::DEMO, packages::TEST], &console)?;
    console.step("building everything (release)");
    console.pause(|| {
        cargo::run(&["build", "--release", "--workspace", "--bins", "--tests", "--examples"])
    })?;
    if options.filter.is_none() {
        // Otherwise tests would build the released programs themselves, and exceed TEST_TIMEOUT.
        console.step("building the programs (profile dist)");
        cargo::build_static(&["skein-agent", "skein-cni"])?;
    }
    drop(console);
    run_tests(&["--workspace"], &[], usize::from(options.jobs), watch::TEST_TIMEOUT, options)
}

/// Options of cargo that select the tests on a cluster.
const CLUSTER: [&str; 2] = ["--package=skein-e2e", "--test=cluster"];

/// Module with the tests of features that Kubernetes 1.20 does not have.
const CURRENT: &str = "current::";

/// Runs `cargo e2e cluster test`.
///
/// # Errors
/// If the programs cannot be built, if a test fails, if no test ran, or if tests left something on
/// the host.
pub fn run_cluster(options: &Options) -> Result<()> {
    let console = Console::new();
    programs::build(&console)?;
    console.step("building the tests (release)");
    let mut more = vec!["--ignored"];
    if programs::other().is_none() {
        more.extend(["--skip", CURRENT]);
        console.print(&format!(
            "tests of a current Kubernetes are skipped, because {} is not set",
            programs::OTHER
        ));
    }
    console.pause(|| {
        cargo::run(&["build", "--release", "--workspace", "--bins"])?;
        cargo::run(&[&["build", "--release"][..], &CLUSTER].concat())
    })?;
    drop(console);
    // The key rotation waits for five minutes twice.
    run_tests(&CLUSTER, &more, 1, 2 * watch::TEST_TIMEOUT, options)
}

/// Runs the tests that `which` (options of cargo) and `more` (options of the test harness) select,
/// with up to `jobs` batches at the same time, and prints the totals. A test that prints nothing
/// for `limit` fails.
fn run_tests(
    which: &[&str],
    more: &[&str],
    jobs: usize,
    limit: Duration,
    options: &Options,
) -> Result<()> {
    registry::sweep();

    let mut totals = binaries::run(which, more, options.filter.as_deref(), jobs, limit)?;
    if which.contains(&"--workspace") {
        let mut examples = vec!["test", "--release", "--workspace", "--doc", "--quiet", "--"];
        examples.extend(options.filter.as_deref());
        totals.add(watch::watch(&mut cargo::command(&examples), limit, &mut std::io::stdout())?);
    }

    let left = registry::abandoned();
    println!();
    for name in &totals.flaky {
        println!("PASSED ALONE {name} (failed while other tests ran)");
    }
    for name in &totals.failures {
        println!("FAILED {name}");
    }
    if totals.skipped() > 0 {
        println!(
            "(tests on a real Kubernetes are skipped. Run `cargo e2e cluster test` for them.)"
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
