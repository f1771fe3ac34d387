//! Test binaries of the workspace, and a pool that runs their modules concurrently.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::watch::{self, Totals};
use skein_lab::LABORATORIES_VARIABLE;
use skein_lab::cargo;

/// Names of the batches with the longest run times. They start first, so that none of them runs
/// alone at the end.
const LONGEST: [&str; 7] = [
    "security::firewall",
    "cni::forward_chains",
    "lifecycle::faults",
    "lifecycle::upgrade",
    "security::plaintext",
    "offload::fallbacks",
    "security::firewall_repair",
];

/// Name of the binary whose modules run one after the other, when no other module runs: its tests
/// start a laboratory in another process and wait for it.
const ALONE: &str = "harness";

/// A test binary that cargo has built.
#[derive(Debug, Clone)]
struct Binary {
    name: String,
    executable: PathBuf,
    /// Directory of the package, the working directory of the tests.
    directory: PathBuf,
    /// The binary is an integration test, whose modules are independent of each other. Unit tests
    /// may share state of the process or of the host.
    integration: bool,
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
            integration: message["target"]["kind"][0] == "test",
        })
    }

    /// Lists the tests that `options` of the test harness select, and divides them into batches.
    ///
    /// # Errors
    ///
    /// Returns an error if the binary does not start or refuses an option.
    fn batches(self, options: &[&str], filter: Option<&str>) -> Result<Vec<Batch>> {
        if !self.integration {
            let arguments = filter.into_iter().map(str::to_owned).collect();
            return Ok(vec![Batch { name: self.name.clone(), binary: self, arguments }]);
        }
        let mut list = Command::new(&self.executable);
        list.args(["--list", "--format=terse"]).args(options).args(filter);
        let listed = list.output().with_context(|| format!("starting {}", self.name))?;
        let error = String::from_utf8_lossy(&listed.stderr);
        ensure!(listed.status.success(), "cannot list the tests of {}: {error}", self.name);
        let tests = String::from_utf8(listed.stdout).context("names of tests are not UTF-8")?;
        let modules = by_module(tests.lines().filter_map(|line| line.strip_suffix(": test")));
        let batch = |(module, tests): (&str, Vec<&str>)| Batch {
            name: match module {
                "" => self.name.clone(),
                module => format!("{}::{module}", self.name),
            },
            binary: self.clone(),
            arguments: ["--exact"].into_iter().chain(tests).map(str::to_owned).collect(),
        };
        Ok(modules.into_iter().map(batch).collect())
    }
}

/// Groups paths of tests by their first module; tests at the root of a binary have the module "".
fn by_module<'a>(tests: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, Vec<&'a str>> {
    let mut modules = BTreeMap::<_, Vec<_>>::new();
    for test in tests {
        let module = test.split_once("::").map_or("", |(module, _)| module);
        modules.entry(module).or_default().push(test);
    }
    modules
}

/// Tests that run one after the other in one process: those of a module of an integration test, or
/// all unit tests of a crate.
#[derive(Debug)]
struct Batch {
    /// Path of the module, or name of the binary.
    name: String,
    binary: Binary,
    /// Arguments of the test harness that select the tests.
    arguments: Vec<String>,
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

/// Runs every test that `which` (options of cargo), `options` (of the test harness) and `filter` (a
/// part of the name) select: up to `jobs` batches at the same time, the tests of a batch one after
/// the other. The output of a batch is printed when the batch ends.
///
/// # Errors
///
/// Returns an error if the tests do not compile or if a binary cannot be started. A failed test is
/// not an error, but is counted in the result.
pub(super) fn run(
    which: &[&str],
    options: &[&str],
    filter: Option<&str>,
    jobs: usize,
    limit: Duration,
) -> Result<Totals> {
    let batches = build(which)?
        .into_iter()
        .map(|binary| binary.batches(options, filter))
        .collect::<Result<Vec<_>>>()?;
    let (alone, mut shared): (Vec<_>, Vec<_>) =
        batches.into_iter().flatten().partition(|batch| batch.binary.name == ALONE);
    let rank = |batch: &Batch| LONGEST.iter().position(|name| *name == batch.name);
    shared.sort_by_key(|batch| rank(batch).unwrap_or(LONGEST.len()));

    let queue = Mutex::new(VecDeque::from(shared));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let worker = || -> Result<Vec<(Batch, Totals)>> {
        let mut results = Vec::new();
        while let Some(batch) = next() {
            let totals = run_one(&batch, options, jobs, limit)?;
            results.push((batch, totals));
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
        for (batch, mut result) in results {
            if jobs > 1 {
                repeat_failures(batch, options, &mut result, limit)?;
            }
            totals.add(result);
        }
    }
    for batch in alone {
        totals.add(run_one(&batch, options, 1, limit)?);
    }
    Ok(totals)
}

/// Runs each failed test of a batch once more while no other test runs. If the test passes the
/// second time, it counts as passed, and its name is printed at the end: the result of the test
/// depends on the load of the machine.
fn repeat_failures(
    mut batch: Batch,
    options: &[&str],
    totals: &mut Totals,
    limit: Duration,
) -> Result<()> {
    for name in std::mem::take(&mut totals.failures) {
        batch.arguments = vec!["--exact".to_owned(), name.clone()];
        let again = run_one(&batch, options, 1, limit)?;
        if again.success && again.passed == 1 {
            totals.passed_alone(name);
        } else {
            totals.failures.push(name);
        }
    }
    Ok(())
}

/// Runs a batch and prints its output and its run time.
fn run_one(batch: &Batch, options: &[&str], jobs: usize, limit: Duration) -> Result<Totals> {
    let mut command = Command::new(&batch.binary.executable);
    // The tests of a batch measure times and rates, so they run one at a time.
    command.arg("--test-threads=1").args(options).args(&batch.arguments);
    command.current_dir(&batch.binary.directory).env(LABORATORIES_VARIABLE, jobs.to_string());
    let start = Instant::now();
    let mut output = Vec::new();
    let totals = watch::watch(&mut command, limit, &mut output)?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "\n     Ran {} in {:.0?}", batch.name, start.elapsed())?;
    stdout.write_all(&output)?;
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_message_of_test_binary_is_read() {
        let message = r#"{"reason":"compiler-artifact","manifest_path":"/w/e2e/Cargo.toml",
            "target":{"name":"upgrade","kind":["test"]},"profile":{"test":true},"executable":"/t/upgrade-1"}"#;
        let binary = Binary::from_message(message).expect("the message describes a test binary");
        assert_eq!(binary.name, "upgrade");
        assert_eq!(binary.executable, Path::new("/t/upgrade-1"));
        assert_eq!(binary.directory, Path::new("/w/e2e"));
        assert!(binary.integration, "the kind is not read");
    }

    #[test]
    fn longest_batches_are_modules() {
        for name in LONGEST {
            let path = cargo::workspace().join("e2e/tests").join(name.replace("::", "/"));
            assert!(path.with_extension("rs").is_file(), "There is no module {name}.");
        }
    }

    #[test]
    fn tests_are_grouped_by_their_first_module() {
        let groups = by_module(["pods::a", "root", "pods::inner::b", "runtime::c"].into_iter());
        let expected = [
            ("", vec!["root"]),
            ("pods", vec!["pods::a", "pods::inner::b"]),
            ("runtime", vec!["runtime::c"]),
        ];
        assert_eq!(groups.into_iter().collect::<Vec<_>>(), expected);
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
