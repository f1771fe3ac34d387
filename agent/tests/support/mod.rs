//! Processes that never outlive their test, and that nobody waits for without a bound.
//!
//! A data process is the agent's child, made to outlive it: `skein-agent cleanup` ends that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

/// How long a process may take for what it is asked.
pub(crate) const LIMIT: Duration = Duration::from_secs(15);

/// A child. The kernel kills it when the thread that started it ends, and dropping it does.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        // SAFETY: between fork and exec only prctl(2) is called, which is safe there: it takes no
        // lock and allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        command.stdin(Stdio::null()).spawn().map(Self)
    }

    pub(crate) fn exited(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    /// Sends a signal, unless it has ended: then its number may be somebody else's by now.
    pub(crate) fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.exited()?.is_some() {
            return Err(io::Error::other("it has ended already"));
        }
        send(signal, self.0.id())
    }

    /// Waits for its end; an error if that takes too long.
    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not end by itself"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both do nothing to a child that has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal to a process that the caller knows to be there.
pub(crate) fn send(signal: Signal, pid: u32) -> io::Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(kill_process(pid, signal)?)
}

/// Runs a command to its end, which must come by itself.
pub(crate) fn finish(command: &mut Command) -> io::Result<Output> {
    // Not pipes: a data process that stays would hold them open, and nobody would see their end.
    let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let status = Process::start(command).and_then(|mut process| process.wait());
    let status = status.map_err(|e| io::Error::new(e.kind(), format!("{command:?}: {e}")))?;
    Ok(Output { status, stdout: content(&stdout)?, stderr: content(&stderr)? })
}

fn content(file: &File) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    // Whoever writes to it has the same position in it: reading must not move that.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
