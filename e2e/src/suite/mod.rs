//! `cargo e2e test`: everything that can be tested here, in one command.

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

/// What to test.
#[derive(Debug, Args)]
pub struct Options {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Number of test modules that run at the same time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=MAX_JOBS))]
    jobs: u8,
}

/// Limit of `--jobs`: each laboratory runs several agents, so more of them need more cores.
const MAX_JOBS: i64 = 16;

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
    run_tests(&["--workspace"], &[], usize::from(options.jobs), watch::LIMIT, options)
}

/// What needs a cluster.
const CLUSTER: [&str; 2] = ["--package=skein-e2e", "--test=cluster"];

/// Module with the tests of what Kubernetes 1.20 does not have.
const CURRENT: &str = "current::";

/// Runs the tests that need a cluster.
pub fn run_cluster(options: &Options) -> Result<()> {
    let console = Console::new();
    programs::build(&console)?;
    console.step("building the tests (release)");
    let mut more = vec!["--ignored"];
    if programs::other().is_none() {
        more.extend(["--skip", CURRENT]);
        console.print(&format!(
            "the tests of a current Kubernetes are left out: {} names none",
            programs::OTHER
        ));
    }
    console.pause(|| {
        cargo::run(&["build", "--release", "--workspace", "--bins"])?;
        cargo::run(&[&["build", "--release"][..], &CLUSTER].concat())
    })?;
    drop(console);
    // The change of a key waits for five minutes twice.
    run_tests(&CLUSTER, &more, 1, 2 * watch::LIMIT, options)
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
