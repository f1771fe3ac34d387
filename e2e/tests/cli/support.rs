//! Helpers of the commands' tests.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::agent::{Agent, Cluster};
use skein_lab::process::{Finished, Process};
use skein_lab::{Family, checks};

/// Waits until every pod of a cluster that has been started reaches every other pod over both
/// families. Lost pings are repeated, because a busy machine may lose some.
pub(super) fn joined(cluster: &Cluster) -> Result<()> {
    let pods = || (0..cluster.lab.nodes.len()).map(|node| cluster.lab.pod(node));
    for (from, to) in pods().flat_map(|from| pods().map(move |to| (from, to))) {
        for family in Family::BOTH {
            checks::wait_until_reached(from, to, family, Duration::from_secs(10))?;
        }
    }
    Ok(())
}

/// Checks that a finished command has exited with `code`.
pub(super) fn ran(finished: &Finished, code: i32) -> Result<()> {
    let (stdout, stderr) = (&finished.stdout, &finished.stderr);
    let found = finished.code;
    ensure!(found == code, "The exit code is {found} instead of {code}: {stdout}{stderr}");
    Ok(())
}

pub(super) fn json(finished: &Finished) -> Result<Value> {
    serde_json::from_str(&finished.stdout).with_context(|| finished.stdout.clone())
}

pub(super) fn says(text: &str, words: &[&str]) -> Result<()> {
    words.iter().try_for_each(|word| {
        ensure!(text.contains(word), "The output does not contain {word:?}:\n{text}");
        Ok(())
    })
}

/// Starts a command that runs while the test continues.
pub(super) fn start(agent: &Agent, arguments: &[&str], log: &Path) -> Result<Process> {
    Process::start(&mut agent.command(arguments)?, log)
}

/// Waits until a process has exited by itself, and returns the exit code. Sends no signal.
pub(super) fn end(process: &mut Process) -> Result<i32> {
    let mut code = None;
    checks::eventually("the command has ended", Duration::from_secs(20), || {
        code = process.exited();
        Ok(code.is_some())
    })
    .with_context(|| process.log_tail(30))?;
    code.context("no exit code")
}
