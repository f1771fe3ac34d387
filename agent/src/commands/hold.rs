//! `hold`: the process that an agent becomes when another agent takes its place. The kernel has
//! closed all descriptors of the agent. When the other agent ends, the process runs the agent again
//! at once.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rustix::io::FdFlags;
use skein_ipc::instance::Instance;
use skein_sys::descriptors;
use skein_sys::lock::FileLock;

use super::runtime;
use crate::control::{HandOver, instance, lock};
use crate::failure::Failure;
use crate::lifecycle::{Readiness, Signals};

/// Interval between attempts to take the role's lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// The option of `run` that names the role's lock.
const LOCK_FD: &str = "--lock-fd=";

#[derive(Args)]
pub(crate) struct HoldArgs {
    /// File of the role's lock
    #[arg(long)]
    lock: Option<PathBuf>,
    /// Descriptor of the lock, to be sent to the other agent
    #[arg(long, requires = "to_fd")]
    lock_fd: Option<i32>,
    /// Descriptor of the connection to the other agent
    #[arg(long)]
    to_fd: Option<i32>,
    /// Directory of the pod's own sockets
    #[arg(long)]
    instance: Option<PathBuf>,
    /// Answer probes that the agent is ready
    #[arg(long)]
    ready: bool,
    /// Arguments of the agent
    #[arg(last = true)]
    agent: Vec<OsString>,
}

/// Replaces this process by one that passes the role on and waits for it. Returns only if the exec
/// fails.
pub(crate) fn become_holder(
    role: HandOver,
    state_dir: &Path,
    instance: Option<&Instance>,
) -> io::Error {
    let HandOver { lock, connection, ready } = role;
    let lock = OwnedFd::from(lock);
    let inherit = |fd: &dyn AsFd| rustix::io::fcntl_setfd(fd.as_fd(), FdFlags::empty());
    if let Err(error) = inherit(&lock).and_then(|()| inherit(&connection)) {
        return error.into();
    }
    let mut command = program();
    command.args(["hold", "--lock"]).arg(state_dir.join(lock::FILE));
    command.arg(format!("{LOCK_FD}{}", lock.as_raw_fd()));
    command.arg(format!("--to-fd={}", connection.as_raw_fd()));
    if let Some(instance) = instance {
        command.arg("--instance").arg(instance.path());
    }
    command.args(ready.then_some("--ready")).arg("--");
    let is_lock = |argument: &OsString| argument.to_string_lossy().starts_with(LOCK_FD);
    command.args(std::env::args_os().skip(1).filter(|argument| !is_lock(argument)));
    command.exec()
}

fn program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("skein-agent");
    command
}

pub(crate) fn hold(arguments: &HoldArgs) -> Result<(), Failure> {
    if let (Some(lock), Some(to)) = (arguments.lock_fd, arguments.to_fd) {
        let pass = || {
            let lock = descriptors::inherited(lock)?;
            descriptors::send(&descriptors::inherited_socket(to)?, &[lock.as_fd()])
        };
        if let Err(error) = pass() {
            // This process gets the role back below.
            eprintln!("skein-agent: the other agent has not taken over: {error}");
        }
    }
    let lock = runtime()?.block_on(wait(arguments))?;
    let Some(lock) = lock else { return Ok(()) };
    let again = || -> io::Error {
        if let Err(error) = rustix::io::fcntl_setfd(&lock, FdFlags::empty()) {
            return error.into();
        }
        let lock = format!("{LOCK_FD}{}", lock.as_fd().as_raw_fd());
        program().args(&arguments.agent).arg(lock).exec()
    };
    Err(Failure::Runtime(anyhow::Error::new(again()).context("cannot take the role back")))
}

/// Waits for the role's lock; `None` if this process is to end.
async fn wait(arguments: &HoldArgs) -> Result<Option<FileLock>, Failure> {
    let mut signals = Signals::take().context("cannot take signals")?;
    let Some(path) = &arguments.lock else {
        signals.end().await;
        return Ok(None);
    };
    let readiness = Readiness::default();
    let _not_ready = (!arguments.ready)
        .then(|| readiness.block("another agent has the role, and this agent was not ready"));
    let instance = arguments.instance.as_ref().map(Instance::new);
    let _probes = instance.map(|own| instance::answer_probes(&own, readiness)).transpose()?;
    loop {
        // A lock that cannot be opened counts as taken: the state directory may have been removed.
        if let Ok(Some(lock)) = FileLock::try_acquire(path) {
            return Ok(Some(lock));
        }
        tokio::select! {
            () = signals.end() => return Ok(None),
            () = tokio::time::sleep(LOCK_INTERVAL) => {}
        }
    }
}
