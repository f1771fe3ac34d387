//! Child processes that never outlive us: killed with the thread that started them, reaped when
//! dropped, addressed by process id only.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

/// How long a command of [`run`] may take.
const RUN_LIMIT: Duration = Duration::from_secs(60);

/// How long it may take to enter namespaces, or to leave them.
const ENTER_LIMIT: Duration = Duration::from_secs(10);

/// Asks the kernel to kill the child when the thread that starts it ends.
fn die_with_us(command: &mut Command) {
    // SAFETY: between fork and exec only prctl(2) is called, which is safe there: it takes no
    // lock and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Finished {
    /// Exit code, or 128 and the signal's number.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a command to its end within `limit`; a bad exit code is no error here.
pub fn finish(command: &mut Command, input: &[u8], limit: Duration) -> Result<Finished> {
    let what = describe(command);
    die_with_us(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting `{what}`"))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = input.to_vec();
    thread::spawn(move || stdin.map(|mut pipe| pipe.write_all(&input)));
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    let status = wait(&mut child, limit);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    // A grandchild may hold the pipes open for ever: what came until shortly after the end counts.
    let text = |lines: Receiver<Vec<u8>>| {
        let end = Instant::now() + Duration::from_secs(1);
        let mut bytes = vec![];
        while let Ok(more) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            bytes.extend(more);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    let Some(status) = status else {
        bail!("`{what}` did not end within {} s; it said: {stdout}{stderr}", limit.as_secs());
    };
    Ok(Finished { code: code(status), stdout, stderr })
}

/// Reads a pipe to its end on a thread of its own; the channel closes with the pipe.
fn collect(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let Some(mut pipe) = pipe else { return };
        let mut buffer = [0; 8192];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            if sender.send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Runs a command that must succeed within a minute; returns its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    run_with_input(command, &[])
}

/// The same with something on standard input.
pub fn run_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let finished = finish(command, input, RUN_LIMIT)?;
    if finished.code != 0 {
        let text = [finished.stderr.trim(), finished.stdout.trim()].join("\n");
        bail!("`{}` ended with code {}: {}", describe(command), finished.code, text.trim());
    }
    Ok(finished.stdout)
}

/// The command as one would type it.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Exit code, or 128 and the signal's number.
fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Err(_) => return None,
            Ok(None) if Instant::now() >= end => return None,
            Ok(None) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// A long-running child.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Where the child only waits for another in other namespaces, that one.
    inner: Option<Pid>,
    what: String,
    log: PathBuf,
}

impl Process {
    /// Starts it; both its outputs are appended to the file `log`.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let what = describe(command);
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("opening {}", log.display()))?;
        die_with_us(command);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("starting `{what}`"))?;
        Ok(Self { child, inner: None, what, log: log.to_owned() })
    }

    /// The same for a command of a cluster's machine: it is the process inside that is
    /// meant, not the one that waits outside for its end.
    pub fn start_inside(command: &mut Command, log: &Path) -> Result<Self> {
        let mut process = Self::start(command, log)?;
        let end = Instant::now() + ENTER_LIMIT;
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let outside = namespace(std::process::id().cast_signed());
        loop {
            // On its way there it has other children, which stay outside.
            let inside = |pid: &&i32| namespace(**pid).is_some_and(|of| Some(of) != outside);
            if let Some(&pid) = children(process.pid()).iter().find(inside) {
                process.inner = Pid::from_raw(pid);
                return Ok(process);
            }
            process.check_alive()?;
            if Instant::now() > end {
                bail!("`{}` does not start:\n{}", process.what, process.log_tail(30));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Process id, as the host numbers it.
    pub fn pid(&self) -> i32 {
        match self.inner {
            Some(pid) => pid.as_raw_nonzero().get(),
            None => self.child.id().cast_signed(),
        }
    }

    /// Where its outputs go.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its exit code if it has ended.
    pub fn exited(&mut self) -> Option<i32> {
        self.child.try_wait().ok().flatten().map(code)
    }

    /// Fails with the log's tail if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.exited() {
            None => Ok(()),
            Some(code) => bail!("`{}` ended with code {code}:\n{}", self.what, self.log_tail(30)),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid()).context("no process id")?;
        kill_process(pid, signal).with_context(|| format!("signalling `{}`", self.what))
    }

    /// Asks it to end (SIGTERM) and waits; its exit code, or an error with the log's tail.
    pub fn stop(&mut self, limit: Duration) -> Result<i32> {
        if let Some(code) = self.exited() {
            return Ok(code);
        }
        self.signal(Signal::TERM)?;
        match wait(&mut self.child, limit) {
            Some(status) => Ok(code(status)),
            None => bail!("`{}` did not end when asked to:\n{}", self.what, self.log_tail(30)),
        }
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&mut self) {
        if self.inner.is_some() && self.exited().is_none() {
            let _ = self.signal(Signal::KILL);
            let _ = wait(&mut self.child, ENTER_LIMIT);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The last lines that it wrote.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last lines of a text file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Living children of a process.
pub fn children(parent: i32) -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may hold anything, so count from its end: state, then parent.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.next() != Some("Z") && fields.next() == Some(&parent.to_string())
    };
    pids.filter(is_child).collect()
}

/// CPU time (user and system) that living processes have used, in seconds.
pub fn cpu_seconds(pids: &[i32]) -> f64 {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let one = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, so count from its end.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let user: f64 = fields.get(11)?.parse().ok()?;
        let system: f64 = fields.get(12)?.parse().ok()?;
        Some((user + system) / ticks)
    };
    pids.iter().filter_map(one).sum()
}

/// CPU time (user and system) that each thread of a process has used, in seconds, by their names.
pub fn thread_cpu_seconds(pid: i32) -> Result<BTreeMap<String, f64>> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let name = fs::read_to_string(path.join("comm"))?.trim().to_owned();
        // Finer than the ticks of `stat`: nanoseconds, in the first field.
        let times = fs::read_to_string(path.join("schedstat"))?;
        let nanos: f64 = times.split_whitespace().next().context("schedstat")?.parse()?;
        *threads.entry(name).or_default() += nanos / 1e9;
    }
    Ok(threads)
}

/// Busy CPU time of the whole machine since it started, in seconds.
pub fn machine_busy_seconds() -> f64 {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let values: Vec<f64> = fields.filter_map(|f| f.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal …
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|&i| values.get(i)).sum::<f64>();
    busy / ticks
}

/// Resident memory of a process in bytes.
pub fn resident_bytes(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib * 1024)
}
