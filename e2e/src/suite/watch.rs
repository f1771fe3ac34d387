//! Supervision of a test binary: forwards its output, counts its tests, and ends it if a test
//! hangs.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use skein_lab::process::children;

/// Maximum time without output of a test binary, and therefore maximum duration of a test that
/// prints nothing, including its wait for other laboratories. Most tests take seconds.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// Suffix of the line that the test runner prints for an ignored function that is a part of another
/// test. The other test runs the function in a separate process. Such a function does not count as
/// skipped.
const PART_SUFFIX: &str = " ... ignored, part of another test";

/// Maximum time for a test to clean up after SIGTERM, before SIGKILL.
const TERMINATION_TIMEOUT: Duration = Duration::from_secs(10);

/// Counts and names of tests.
#[derive(Debug, Default)]
pub struct Totals {
    /// Number of tests that passed.
    pub passed: u64,
    /// Number of tests that failed.
    pub failed: u64,
    /// Number of tests that the runner ignored, `parts` included.
    ignored: u64,
    /// Number of ignored functions that are parts of other tests ([`PART_SUFFIX`]).
    parts: u64,
    /// Names of the tests that failed.
    pub failures: Vec<String>,
    /// Names of the tests that failed while other tests ran, and passed alone.
    pub flaky: Vec<String>,
    /// Every process ended with code 0, or each of its failed tests passed alone.
    pub success: bool,
    /// Line of output that is not complete yet.
    line: Vec<u8>,
}

impl Totals {
    /// Returns the number of tests that were not run.
    pub fn skipped(&self) -> u64 {
        self.ignored.saturating_sub(self.parts)
    }

    /// Returns the totals of a successful run without tests.
    pub fn of_no_test() -> Self {
        Self { success: true, ..Self::default() }
    }

    /// Adds the counts of another run.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.parts += other.parts;
        self.failures.extend(other.failures);
        self.flaky.extend(other.flaky);
        self.success &= other.success;
    }

    /// Counts a failed test as passed, because it passed without other tests at the same time.
    pub fn passed_alone(&mut self, name: String) {
        self.failed -= 1;
        self.passed += 1;
        self.flaky.push(name);
        self.success = self.failed == 0;
    }

    /// Parses a piece of the test runner's output.
    fn parse(&mut self, piece: &[u8]) {
        for &byte in piece {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.parse_line(&String::from_utf8_lossy(&line));
            } else {
                self.line.push(byte);
            }
        }
    }

    fn parse_line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let count = |word: &str| -> u64 {
                let before = rest.split(word).next().unwrap_or_default().trim_end();
                before.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
            };
            self.passed += count("passed");
            self.failed += count("failed");
            self.ignored += count("ignored");
        } else if line.ends_with(PART_SUFFIX) {
            self.parts += 1;
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }

    /// Returns the name of the running test. With one test at a time, the runner prints the name
    /// first and the result later.
    fn running_test(&self) -> String {
        let line = String::from_utf8_lossy(&self.line);
        let name = line.strip_prefix("test ").and_then(|rest| rest.split(" ... ").next());
        name.unwrap_or("cargo (no test runs)").to_owned()
    }

    /// Counts the running test as failed, because it hangs, and returns a message.
    fn add_hanging(&mut self, limit: Duration) -> String {
        let name = self.running_test();
        let seconds = limit.as_secs_f64();
        self.failures.push(format!("{name} (hung for {seconds} s)"));
        self.failed += 1;
        self.line.clear();
        format!("{name} hangs: no output for {seconds} s. Its process is ended.")
    }
}

/// Runs a test binary or cargo, forwards its output to `out`, and counts the tests. If nothing is
/// printed for `limit`, the current test counts as failed, and its process is ended.
///
/// # Errors
///
/// Returns an error if the process cannot be started or if `out` cannot be written.
pub fn watch(command: &mut Command, limit: Duration, out: &mut impl Write) -> Result<Totals> {
    let (reader, writer) = std::io::pipe().context("creating a pipe")?;
    let errors = writer.try_clone().context("duplicating the pipe")?;
    let mut child = command.stdout(writer).stderr(errors).spawn().context("starting a test")?;
    // The command would keep the writing end of the pipe open.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let pieces = read(reader);
    let mut totals = Totals::default();
    loop {
        match pieces.recv_timeout(limit) {
            Ok(piece) => {
                out.write_all(&piece)?;
                out.flush()?;
                totals.parse(&piece);
            }
            Err(RecvTimeoutError::Timeout) => {
                writeln!(out, "\n{}", totals.add_hanging(limit))?;
                if child.try_wait()?.is_some() {
                    // A process that a test left behind keeps the pipe open.
                    break;
                }
                end(&mut child)?;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    totals.success = child.wait()?.success();
    Ok(totals)
}

/// Reads a pipe to its end on a new thread. The channel closes at the end of the pipe.
fn read(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            if sender.send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Ends the child and its children: first with SIGTERM, after which a test cleans up if it still
/// handles signals, then with SIGKILL.
fn end(child: &mut Child) -> Result<()> {
    let pid = child.id().cast_signed();
    for signal in [Signal::TERM, Signal::KILL] {
        for pid in children(pid).into_iter().chain([pid]).filter_map(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
        let deadline = Instant::now() + TERMINATION_TIMEOUT;
        while Instant::now() < deadline {
            if child.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn runner_output_is_counted() {
        let mut totals = Totals::default();
        totals.parse(b"test lanes::a ... ok\ntest lanes::b ... FAIL");
        assert_eq!(totals.running_test(), "lanes::b");
        totals.parse(b"ED\ntest lanes::c ... ignored, part of another test\n");
        totals.parse(b"test lanes::d ... ignored, takes a cluster\ntest result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured\n");
        totals
            .parse(b"test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n");
        assert_eq!((totals.passed, totals.failed, totals.skipped()), (15, 1, 1));
        assert_eq!(totals.failures, ["lanes::b"]);
    }

    #[test]
    fn hanging_test_is_named_and_ended() {
        let mut runner = Command::new("sh");
        let script =
            "echo 'test quick ... ok'; echo 'a warning' >&2; printf 'test slow ... '; sleep 1000";
        let (limit, mut output) = (Duration::from_millis(300), vec![]);
        let start = Instant::now();
        let totals = watch(runner.args(["-c", script]), limit, &mut output).unwrap();
        assert!(
            start.elapsed() < TERMINATION_TIMEOUT,
            "SIGTERM did not end the runner and its child"
        );
        let output = String::from_utf8_lossy(&output);
        assert!(output.contains("\nslow hangs: "), "the output does not name the test: {output}");
        assert!(output.contains("a warning"), "the output lacks stderr: {output}");
        assert_eq!(totals.failures, ["slow (hung for 0.3 s)"]);
        assert_eq!((totals.passed, totals.failed), (0, 1));
    }

    #[test]
    fn hanging_runner_is_ended() {
        let script = "printf 'test slow ... '; exec sleep 1000";
        let limit = Duration::from_millis(300);
        let mut runner = Command::new("sh");
        let totals = watch(runner.args(["-c", script]), limit, &mut std::io::sink()).unwrap();
        assert_eq!(totals.failures, ["slow (hung for 0.3 s)"]);
        assert!(!totals.success);
    }
}
