//! Child processes that end with their test, and that tests wait for with a timeout.
//!
//! The data process is designed to outlive the agent. `skein-agent cleanup` ends it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

/// Timeout of a process's exit and of events that a test waits for.
pub(crate) const PROCESS_TIMEOUT: Duration = Duration::from_secs(15);

/// Child process. It is killed on drop, and by the kernel when the thread that started it ends.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        // SAFETY: the closure only makes the system call prctl(2), which takes no lock and
        // allocates no memory.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        command.stdin(Stdio::null()).spawn().map(Self)
    }

    pub(crate) fn exited(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    /// Sends a signal. Fails if the process has exited, because another process may have its id.
    pub(crate) fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.exited()?.is_some() {
            return Err(io::Error::other("the process has exited"));
        }
        send(signal, self.0.id())
    }

    /// Waits for the exit of the process, at most [`PROCESS_TIMEOUT`].
    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + PROCESS_TIMEOUT;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the process did not exit in time",
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both calls have no effect on a child that has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal to a process. The caller must know that the process exists.
pub(crate) fn send(signal: Signal, pid: u32) -> io::Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(kill_process(pid, signal)?)
}

/// Runs a command until it exits, at most [`PROCESS_TIMEOUT`].
pub(crate) fn finish(command: &mut Command) -> io::Result<Output> {
    // Files instead of pipes: a data process that keeps running would hold a pipe open.
    let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let status = Process::start(command).and_then(|mut process| process.wait());
    let status = status.map_err(|e| io::Error::new(e.kind(), format!("{command:?}: {e}")))?;
    Ok(Output { status, stdout: content(&stdout)?, stderr: content(&stderr)? })
}

fn content(file: &File) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    // The writer shares the file position, so reading must not change it.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
