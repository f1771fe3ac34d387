//! `skein-agent hold`: the program that an agent executes after it handed over its role. The exec
//! has closed all descriptors of the agent except the lock and the connection. When the other agent
//! ends, this process executes the agent again at once.

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
use skein_sys::confine;
use skein_sys::descriptors;
use skein_sys::lock::FileLock;

use super::runtime;
use crate::control::{HandOver, instance, lock};
use crate::failure::Failure;
use crate::lifecycle::{Readiness, Signals};

/// Interval between attempts to acquire the lock of the role.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// Option of `run` for the descriptor of the role's lock.
const LOCK_FD: &str = "--lock-fd=";

#[derive(Args)]
pub(crate) struct HoldArgs {
    /// Lock file that the active agent of the node holds
    #[arg(long)]
    lock: Option<PathBuf>,
    /// Descriptor of the lock, which is sent to the other agent
    #[arg(long, requires = "to_fd")]
    lock_fd: Option<i32>,
    /// Descriptor of the connection to the other agent
    #[arg(long)]
    to_fd: Option<i32>,
    /// Directory of the pod's own sockets
    #[arg(long)]
    instance: Option<PathBuf>,
    /// Report readiness to probes
    #[arg(long)]
    ready: bool,
    /// Arguments with which the agent runs again
    #[arg(last = true)]
    agent: Vec<OsString>,
}

/// Executes `skein-agent hold` in this process: it sends the lock to the other agent and waits
/// until the role is free. Returns only if the exec fails.
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
    // The permitted set stays for the agent that this process becomes again.
    if let Err(error) = confine::restrict_effective(confine::HOLDER) {
        eprintln!("skein-agent: capabilities stay effective while another agent runs: {error}");
    }
    if let (Some(lock), Some(to)) = (arguments.lock_fd, arguments.to_fd) {
        let pass = || {
            let lock = descriptors::inherited(lock)?;
            descriptors::send(&descriptors::inherited_socket(to)?, &[lock.as_fd()])
        };
        if let Err(error) = pass() {
            // This process acquires the role again below.
            eprintln!("skein-agent: cannot send the role to the other agent: {error}");
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
    Err(Failure::Runtime(anyhow::Error::new(again()).context("cannot run the agent again")))
}

/// Waits for the lock of the role. Returns `None` after SIGTERM or SIGINT.
async fn wait(arguments: &HoldArgs) -> Result<Option<FileLock>, Failure> {
    let mut signals = Signals::install().context("cannot install signal handlers")?;
    let Some(path) = &arguments.lock else {
        signals.terminated().await;
        return Ok(None);
    };
    let readiness = Readiness::default();
    let _not_ready = (!arguments.ready)
        .then(|| readiness.block("another agent has the role, and this agent was not ready"));
    let instance = arguments.instance.as_ref().map(Instance::new);
    let _probes = instance.map(|own| instance::answer_probes(&own, readiness)).transpose()?;
    loop {
        // An error counts as a held lock, because the state directory may be missing.
        if let Ok(Some(lock)) = FileLock::try_acquire(path) {
            return Ok(Some(lock));
        }
        tokio::select! {
            () = signals.terminated() => return Ok(None),
            () = tokio::time::sleep(LOCK_INTERVAL) => {}
        }
    }
}
