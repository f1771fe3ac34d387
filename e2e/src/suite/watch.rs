//! Cargo's tests under a watch: what they say is passed on and counted, and one that hangs is named
//! and ended.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::process::children;

/// How long one test may take, with its wait for another run's laboratory. All but a few take
/// seconds.
pub const LIMIT: Duration = Duration::from_secs(10 * 60);

/// How the runner shows what another test runs in a process of its own: it is not left out.
const PART: &str = " ... ignored, part of another test";

/// How long a hanging test has to remove what it made.
const GRACE: Duration = Duration::from_secs(10);

/// What came of the tests.
#[derive(Debug, Default)]
pub struct Totals {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that were left out, [`PART`]s among them.
    ignored: u64,
    parts: u64,
    /// The names of those that failed.
    pub failures: Vec<String>,
    /// Whether cargo is content.
    pub success: bool,
    /// The line that is being written.
    line: Vec<u8>,
}

impl Totals {
    /// Tests that were left out.
    pub fn skipped(&self) -> u64 {
        self.ignored.saturating_sub(self.parts)
    }

    /// Takes a piece of the test runner's output.
    fn take(&mut self, piece: &[u8]) {
        for &byte in piece {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.line(&String::from_utf8_lossy(&line));
            } else {
                self.line.push(byte);
            }
        }
    }

    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let count = |word: &str| -> u64 {
                let before = rest.split(word).next().unwrap_or_default().trim_end();
                before.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
            };
            self.passed += count("passed");
            self.failed += count("failed");
            self.ignored += count("ignored");
        } else if line.ends_with(PART) {
            self.parts += 1;
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
    }

    /// The test at work: one that runs alone writes its name first and its result later.
    fn at_work(&self) -> String {
        let line = String::from_utf8_lossy(&self.line);
        let name = line.strip_prefix("test ").and_then(|rest| rest.split(" ... ").next());
        name.unwrap_or("cargo, between two tests,").to_owned()
    }

    /// Counts the test at work as one that hangs; what to say of it.
    fn hung(&mut self, limit: Duration) -> String {
        let name = self.at_work();
        let seconds = limit.as_secs_f64();
        self.failures.push(format!("{name} (hung for {seconds} s)"));
        self.failed += 1;
        self.line.clear();
        format!("{name} hangs: nothing came of it for {seconds} s, so it is ended")
    }
}

/// Runs cargo, passes its output on to `out` and counts. Where nothing comes for `limit`, the test at work
/// has failed, and its process is ended; the other test programs still have their turn.
pub fn watch(command: &mut Command, limit: Duration, out: &mut impl Write) -> Result<Totals> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("starting cargo test")?;
    let pieces = read(child.stdout.take().context("no output")?);
    let mut totals = Totals::default();
    loop {
        match pieces.recv_timeout(limit) {
            Ok(piece) => {
                out.write_all(&piece)?;
                out.flush()?;
                totals.take(&piece);
            }
            Err(RecvTimeoutError::Timeout) => {
                writeln!(out, "\n{}", totals.hung(limit))?;
                if child.try_wait()?.is_some() {
                    // Somebody that a test has left holds the pipe open.
                    break;
                }
                end_children(&mut child);
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    totals.success = child.wait()?.success();
    Ok(totals)
}

/// Reads on a thread of its own; the channel closes with the pipe.
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

/// Ends what cargo runs: politely first, because a test that can still take a signal removes what
/// it made. What the tests themselves started ends with them.
fn end_children(cargo: &mut Child) {
    let pid = cargo.id().cast_signed();
    if children(pid).is_empty() {
        // It is cargo itself that hangs.
        let _ = cargo.kill();
    }
    let hanging = children(pid);
    for signal in [Signal::TERM, Signal::KILL] {
        let end = Instant::now() + GRACE;
        loop {
            let now = children(pid);
            let mut left = hanging.iter().filter(|child| now.contains(child)).peekable();
            if left.peek().is_none() {
                return;
            }
            if Instant::now() > end {
                break;
            }
            for child in left.filter_map(|&child| Pid::from_raw(child)) {
                let _ = kill_process(child, signal);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_runners_lines_are_counted() {
        let mut totals = Totals::default();
        totals.take(b"test lanes::a ... ok\ntest lanes::b ... FAIL");
        assert_eq!(totals.at_work(), "lanes::b");
        totals.take(b"ED\ntest lanes::c ... ignored, part of another test\n");
        totals.take(b"test lanes::d ... ignored, takes a cluster\ntest result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured\n");
        totals
            .take(b"test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n");
        assert_eq!((totals.passed, totals.failed, totals.skipped()), (15, 1, 1));
        assert_eq!(totals.failures, ["lanes::b"]);
    }

    #[test]
    fn a_test_that_hangs_is_named_and_the_next_program_has_its_turn() {
        let mut runner = Command::new("sh");
        let script = "echo 'test quick ... ok'; printf 'test slow ... '; sleep 1000; \
                      printf '\ntest result: ok. 2 passed; 0 failed\n'";
        let (limit, mut said) = (Duration::from_millis(300), vec![]);
        let start = Instant::now();
        let totals = watch(runner.args(["-c", script]), limit, &mut said).unwrap();
        assert!(start.elapsed() < GRACE);
        assert!(String::from_utf8_lossy(&said).contains("\nslow hangs: "));
        assert_eq!(totals.failures, ["slow (hung for 0.3 s)"]);
        assert_eq!((totals.passed, totals.failed), (2, 1));
    }

    #[test]
    fn a_runner_that_hangs_is_ended_too() {
        let script = "printf 'test slow ... '; exec sleep 1000";
        let limit = Duration::from_millis(300);
        let mut runner = Command::new("sh");
        let totals = watch(runner.args(["-c", script]), limit, &mut std::io::sink()).unwrap();
        assert_eq!(totals.failures, ["slow (hung for 0.3 s)"]);
        assert!(!totals.success);
    }
}
