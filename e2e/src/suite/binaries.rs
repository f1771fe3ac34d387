//! The workspace's test binaries, and a pool that runs several of them side by side.

use std::collections::VecDeque;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::watch::{self, Totals};
use crate::cargo;
use crate::lab::LABORATORIES;

/// Names of the binaries with the longest run times. They start first, so that none of them runs
/// alone at the end.
const LONGEST: [&str; 6] = ["firewall", "faults", "upgrade", "plaintext", "offloads", "operations"];

/// Names of the binaries that run one after the other, when no other binary runs: their tests
/// start a laboratory in another process and wait for it.
const ALONE: [&str; 2] = ["commands", "laboratory"];

/// A test binary that cargo has built.
#[derive(Debug)]
struct Binary {
    name: String,
    executable: PathBuf,
    /// Directory of the package, the working directory of the tests.
    directory: PathBuf,
}

impl Binary {
    /// Reads one of cargo's JSON messages. Returns `None` if it does not describe a test binary.
    fn from_message(line: &str) -> Option<Self> {
        let message: Value = serde_json::from_str(line).ok()?;
        if message["profile"]["test"] != true {
            return None;
        }
        Some(Self {
            name: message["target"]["name"].as_str()?.to_owned(),
            executable: message["executable"].as_str()?.into(),
            directory: Path::new(message["manifest_path"].as_str()?).parent()?.into(),
        })
    }
}

/// Builds the test binaries that `which` selects.
fn build(which: &[&str]) -> Result<Vec<Binary>> {
    let arguments = ["test", "--release", "--no-run", "--message-format=json-render-diagnostics"];
    let mut command = cargo::command(&[&arguments, which].concat());
    command.stderr(std::process::Stdio::inherit());
    let built = command.output().context("starting cargo")?;
    ensure!(built.status.success(), "the tests do not compile");
    let text = String::from_utf8(built.stdout).context("cargo's messages are not UTF-8")?;
    let binaries: Vec<_> = text.lines().filter_map(Binary::from_message).collect();
    ensure!(!binaries.is_empty(), "cargo built no test");
    Ok(binaries)
}

/// Runs every test binary that `which` selects, up to `jobs` at the same time, and passes
/// `arguments` to each. The output of a binary is printed when the binary ends.
///
/// # Errors
///
/// Returns an error if the tests do not compile or if a binary cannot be started. A failed test is
/// no error: it is counted in the result.
pub(super) fn run(
    which: &[&str],
    arguments: &[&str],
    jobs: usize,
    limit: Duration,
) -> Result<Totals> {
    let (alone, mut shared): (Vec<_>, Vec<_>) =
        build(which)?.into_iter().partition(|binary| ALONE.contains(&binary.name.as_str()));
    let rank = |binary: &Binary| LONGEST.iter().position(|name| *name == binary.name);
    shared.sort_by_key(|binary| rank(binary).unwrap_or(LONGEST.len()));

    let queue = Mutex::new(VecDeque::from(shared));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let worker = || -> Result<Vec<(Binary, Totals)>> {
        let mut results = Vec::new();
        while let Some(binary) = next() {
            let totals = run_one(&binary, arguments, jobs, limit)?;
            results.push((binary, totals));
        }
        Ok(results)
    };
    let results = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
    });
    let mut totals = Totals::of_no_test();
    for result in results {
        let results =
            result.map_err(|_| anyhow::anyhow!("a worker of the test pool panicked"))??;
        for (binary, mut result) in results {
            if jobs > 1 {
                repeat_failures(&binary, &mut result, limit)?;
            }
            totals.add(result);
        }
    }
    for binary in alone {
        totals.add(run_one(&binary, arguments, 1, limit)?);
    }
    Ok(totals)
}

/// Runs each failed test of a binary once more, when no other test runs. A test that passes then
/// counts as passed, and its name is printed at the end: it depends on the load of the machine.
fn repeat_failures(binary: &Binary, totals: &mut Totals, limit: Duration) -> Result<()> {
    for name in std::mem::take(&mut totals.failures) {
        let again = run_one(binary, &["--exact", &name, "--test-threads=1"], 1, limit)?;
        if again.success && again.passed == 1 {
            totals.passed_alone(name);
        } else {
            totals.failures.push(name);
        }
    }
    Ok(())
}

/// Runs one test binary and prints its output and its run time.
fn run_one(binary: &Binary, arguments: &[&str], jobs: usize, limit: Duration) -> Result<Totals> {
    let mut command = Command::new(&binary.executable);
    command.args(arguments).current_dir(&binary.directory);
    command.env(LABORATORIES, jobs.to_string());
    let start = Instant::now();
    let mut output = Vec::new();
    let totals = watch::watch(&mut command, limit, &mut output)?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "\n     Ran {} in {:.0?}", binary.name, start.elapsed())?;
    stdout.write_all(&output)?;
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_message_of_test_binary_is_read() {
        let message = r#"{"reason":"compiler-artifact","manifest_path":"/w/e2e/Cargo.toml",
            "target":{"name":"upgrade"},"profile":{"test":true},"executable":"/t/upgrade-1"}"#;
        let binary = Binary::from_message(message).expect("the message describes a test binary");
        assert_eq!(binary.name, "upgrade");
        assert_eq!(binary.executable, Path::new("/t/upgrade-1"));
        assert_eq!(binary.directory, Path::new("/w/e2e"));
    }

    #[test]
    fn cargo_messages_of_other_artifacts_are_ignored() {
        for message in [
            r#"{"profile":{"test":false},"executable":"/t/skein-agent"}"#,
            r#"{"profile":{"test":true},"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
            "not JSON",
        ] {
            assert!(Binary::from_message(message).is_none(), "{message} was read");
        }
    }
}
