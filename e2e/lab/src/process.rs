//! Child processes that never outlive this process. The kernel kills a child when the thread that
//! started it exits; dropping a [`Process`] kills and reaps it. Processes are addressed by process
//! id only.

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

/// Maximum time of a command of [`run`].
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum time for a command to enter the namespaces of a machine, or to exit after it was killed.
const ENTER_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests that the kernel kills the child when the thread that starts it exits
/// (PR_SET_PDEATHSIG, prctl(2)).
fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec and calls prctl(2) only, which is
    // async-signal-safe: it takes no lock and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// Exit code and output of a command.
#[derive(Debug)]
pub struct Finished {
    /// Exit code, or 128 plus the number of the signal that ended the process.
    pub code: i32,
    /// Text on standard output.
    pub stdout: String,
    /// Text on standard error.
    pub stderr: String,
}

/// Runs a command with `input` on standard input and waits until it exits. An exit code other than
/// 0 is not an error.
///
/// # Errors
/// If the command cannot be started, or does not exit within `limit`; it is killed then.
pub fn finish(command: &mut Command, input: &[u8], limit: Duration) -> Result<Finished> {
    let what = describe(command);
    die_with_parent(command);
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
    // A grandchild may hold the pipes open for ever: read for at most one second after the exit.
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
        bail!("`{what}` did not exit within {} s. Output: {stdout}{stderr}", limit.as_secs());
    };
    Ok(Finished { code: code(status), stdout, stderr })
}

/// Reads a pipe to its end on a new thread. The channel closes at the end of the pipe.
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

/// Runs a command and returns its standard output.
///
/// # Errors
/// If the command cannot be started, does not exit within 60 s, or exits with a code other than 0.
pub fn run(command: &mut Command) -> Result<String> {
    run_with_input(command, &[])
}

/// Runs a command as [`run`] does, with `input` on standard input.
///
/// # Errors
/// Those of [`run`].
pub fn run_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let finished = finish(command, input, RUN_TIMEOUT)?;
    if finished.code != 0 {
        let text = [finished.stderr.trim(), finished.stdout.trim()].join("\n");
        bail!("`{}` ended with code {}: {}", describe(command), finished.code, text.trim());
    }
    Ok(finished.stdout)
}

/// Returns the program and the arguments of a command, separated by spaces and without quotes.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Returns the exit code, or 128 plus the number of the signal that ended the process.
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

/// A running child process with a log file. Dropping the value kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Process in other namespaces for which the child only waits; see [`Process::start_inside`].
    inner: Option<Pid>,
    what: String,
    log: PathBuf,
}

impl Process {
    /// Starts a command and appends both of its outputs to the file `log`.
    ///
    /// # Errors
    /// If the file cannot be opened, or if the command cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let what = describe(command);
        let file = File::options().create(true).append(true).open(log);
        let file = file.with_context(|| format!("opening {}", log.display()))?;
        die_with_parent(command);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("starting `{what}`"))?;
        Ok(Self { child, inner: None, what, log: log.to_owned() })
    }

    /// Starts a command of a cluster's machine, which has a PID namespace of its own. The value
    /// stands for the process inside, not for the one outside that waits for its exit.
    ///
    /// # Errors
    /// If the command cannot be started, exits, or is not in the PID namespace after 10 s.
    pub fn start_inside(command: &mut Command, log: &Path) -> Result<Self> {
        let mut process = Self::start(command, log)?;
        let end = Instant::now() + ENTER_TIMEOUT;
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let outside = namespace(std::process::id().cast_signed());
        loop {
            // The command has other children, outside of the namespace, before this one.
            let inside = |pid: &&i32| namespace(**pid).is_some_and(|of| Some(of) != outside);
            if let Some(&pid) = children(process.pid()).iter().find(inside) {
                process.inner = Pid::from_raw(pid);
                return Ok(process);
            }
            process.check_alive()?;
            if Instant::now() > end {
                bail!("`{}` did not start:\n{}", process.what, process.log_tail(30));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Returns the process id in the PID namespace of the host.
    pub fn pid(&self) -> i32 {
        match self.inner {
            Some(pid) => pid.as_raw_nonzero().get(),
            None => self.child.id().cast_signed(),
        }
    }

    /// Returns the path of the log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Returns the exit code; `None` while the process runs.
    pub fn exited(&mut self) -> Option<i32> {
        self.child.try_wait().ok().flatten().map(code)
    }

    /// Checks that the process runs.
    ///
    /// # Errors
    /// If the process has exited; with its exit code and the end of the log.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.exited() {
            None => Ok(()),
            Some(code) => bail!("`{}` ended with code {code}:\n{}", self.what, self.log_tail(30)),
        }
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// If the process does not exist any more.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid()).context("no process id")?;
        kill_process(pid, signal)
            .with_context(|| format!("cannot send a signal to `{}`", self.what))
    }

    /// Sends SIGTERM, waits for the exit, and returns the exit code.
    ///
    /// # Errors
    /// If the process does not exit within `limit`; with the end of the log.
    pub fn stop(&mut self, limit: Duration) -> Result<i32> {
        if let Some(code) = self.exited() {
            return Ok(code);
        }
        self.signal(Signal::TERM)?;
        match wait(&mut self.child, limit) {
            Some(status) => Ok(code(status)),
            None => bail!("`{}` did not exit after SIGTERM:\n{}", self.what, self.log_tail(30)),
        }
    }

    /// Kills the process (SIGKILL) and reaps it.
    pub fn kill(&mut self) {
        if self.inner.is_some() && self.exited().is_none() {
            let _ = self.signal(Signal::KILL);
            let _ = wait(&mut self.child, ENTER_TIMEOUT);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Returns the last `lines` lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Returns the last `lines` lines of a text file, or "" if it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Returns the process ids of a process's children, without zombies.
pub fn children(parent: i32) -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may contain spaces and parentheses. The state and the parent
        // follow its end.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.next() != Some("Z") && fields.next() == Some(&parent.to_string())
    };
    pids.filter(is_child).collect()
}

/// Returns the CPU time (user and system) of running processes, seconds. Other processes count as
/// 0.
pub fn cpu_seconds(pids: &[i32]) -> f64 {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let one = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may contain spaces and parentheses: count from its end.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let user: f64 = fields.get(11)?.parse().ok()?;
        let system: f64 = fields.get(12)?.parse().ok()?;
        Some((user + system) / ticks)
    };
    pids.iter().filter_map(one).sum()
}

/// Returns the CPU time (user and system) of a process's threads by thread name, seconds. Threads
/// of one name are added.
///
/// # Errors
/// If the process or one of its threads has exited.
pub fn thread_cpu_seconds(pid: i32) -> Result<BTreeMap<String, f64>> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let name = fs::read_to_string(path.join("comm"))?.trim().to_owned();
        // The first field of `schedstat` counts nanoseconds, `stat` only clock ticks.
        let times = fs::read_to_string(path.join("schedstat"))?;
        let nanos: f64 = times.split_whitespace().next().context("schedstat")?.parse()?;
        *threads.entry(name).or_default() += nanos / 1e9;
    }
    Ok(threads)
}

/// Returns the busy CPU time of the whole machine since its boot, seconds.
pub fn machine_busy_seconds() -> f64 {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let values: Vec<f64> = fields.filter_map(|f| f.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal …
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|&i| values.get(i)).sum::<f64>();
    busy / ticks
}

/// Returns the resident memory of a process, bytes.
///
/// # Errors
/// If the process has exited.
pub fn resident_bytes(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib * 1024)
}
