//! `cargo e2e test`: everything that can be tested here, in one command.

pub mod fuzz;

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use clap::Args;

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
    drop(console);
    registry::sweep();

    // Namespace tests measure times and rates: one at a time.
    let mut arguments = vec!["test", "--release", "--workspace", "--no-fail-fast", "--"];
    arguments.push("--test-threads=1");
    arguments.extend(options.filter.as_deref());
    let totals = watch(&arguments)?;

    let left = registry::existing();
    println!();
    for name in &totals.failures {
        println!("FAILED {name}");
    }
    println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, totals.ignored);
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

#[derive(Debug, Default)]
struct Totals {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
    success: bool,
}

impl Totals {
    /// Takes a line of the test runner's output.
    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let count = |word: &str| -> u64 {
                let before = rest.split(word).next().unwrap_or_default().trim_end();
                before.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
            };
            self.passed += count("passed");
            self.failed += count("failed");
            self.ignored += count("ignored");
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }
}

/// Runs cargo, passes its output on and counts.
fn watch(arguments: &[&str]) -> Result<Totals> {
    let mut child =
        cargo::command(arguments).stdout(Stdio::piped()).spawn().context("starting cargo test")?;
    let mut totals = Totals::default();
    let output = child.stdout.take().context("no output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        totals.line(&line);
    }
    totals.success = child.wait()?.success();
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runners_lines_are_counted() {
        let mut totals = Totals::default();
        totals.line("test lanes::a ... ok");
        totals.line("test lanes::b ... FAILED");
        totals.line("test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered");
        totals.line("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        assert_eq!((totals.passed, totals.failed, totals.ignored), (15, 1, 2));
        assert_eq!(totals.failures, ["lanes::b"]);
    }
}
