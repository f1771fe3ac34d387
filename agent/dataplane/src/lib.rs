//! The data process: lanes that move packets and a manager that keeps their sessions. Plain
//! threads; fed over a unix socket by the control process, and indifferent to its death.

#![forbid(unsafe_code)]

// Short names for what was moved to crates of its own.
use skein_ipc::{self as ipc, instance, keys};
use skein_sys as sys;

pub mod activation;
mod busy_poll;
mod changes;
mod egress;
mod fd_store;
mod handover;
mod ingress;
mod keeper;
mod lane;
mod manager;
mod memory;
mod pending;
mod queue;
mod report;
mod server;
mod setup;
mod stats;
mod tables;
mod tap;
mod totals;
mod write;

use std::ffi::OsString;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use rustix::time::{ClockId, clock_gettime};

use self::changes::Changes;
use self::handover::{Begin, Estate, HandOver};
use self::tap::Tap;
use crate::instance::Instance;
use crate::ipc::{PROTOCOL_VERSION, Request, Response, read_frame, write_frame};
use crate::sys::socket::connect_trusted;
use crate::sys::{confine, descriptors, seccomp};

/// How long a probe waits for each step.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the data plane is started with; everything else comes over the socket.
#[derive(Debug, Clone)]
pub struct Options {
    /// Path of the unix socket to listen on.
    pub socket: PathBuf,
    /// Whether to take everything over from the data process that listens there.
    pub take_over: bool,
    /// Instance whose agent requests the data plane.
    pub instance: Option<Instance>,
}

/// Sets the filter of this process's log. `None` restores the filter that the process was started
/// with. The error is a sentence with the remedy.
pub type SetLogLevel = fn(Option<&str>) -> Result<(), String>;

/// Returns the time since boot (CLOCK_BOOTTIME), which is the same for all processes, advances
/// while the machine is suspended, and is never set. Sessions carry such times, so that the next
/// process can compute their age.
fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let secs = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(secs, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Returns the path of the lock of the data plane at `socket`.
pub fn lock_path(socket: &Path) -> PathBuf {
    socket.with_extension("lock")
}

impl Options {
    /// Returns whether this keeper takes the data plane over from other keepers, at once or on
    /// request.
    fn takes_over(&self) -> bool {
        self.take_over || self.instance.is_some()
    }
}

/// Keeps a data process at work until it is asked to end over its socket. `arguments` of this
/// program start a data process that calls [`work`]; the number of the descriptor is appended.
///
/// # Errors
/// An error if the socket, the lock or the instance's directory cannot be used, or if data
/// processes end again and again.
pub fn run(options: &Options, arguments: &[OsString]) -> anyhow::Result<()> {
    keeper::run(options, arguments)
}

/// What a process of the data plane has given up.
#[must_use]
pub struct Confined {
    rights: CapabilitySet,
    /// Whether it is a data process, and no keeper.
    worker: bool,
    /// `None` where its system calls are left alone.
    calls: Option<std::io::Result<()>>,
}

/// Gives up capabilities; a data process (`worker`) also all system calls that it does not need, where `calls`
/// says so. Before anything of a stranger's is read, and before there is a second thread.
pub fn confine(worker: bool, calls: bool) -> anyhow::Result<Confined> {
    let rights = confine::give_up(confine::DATAPLANE).context("cannot give up capabilities")?;
    if worker {
        // Nobody could give its descriptors to another one.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .context("cannot be tied to the keeper")?;
    }
    Ok(Confined { rights, worker, calls: (worker && calls).then(seccomp::confine) })
}

impl Confined {
    /// Says so in the log, once there is one.
    pub fn tell(&self) {
        let rights = self.rights;
        match &self.calls {
            Some(Ok(())) => tracing::info!(capabilities = ?rights, "confined to what it needs"),
            Some(Err(error)) => tracing::warn!(%error, "not confined: this kernel has no seccomp"),
            None if self.worker => tracing::warn!("not confined: seccomp is switched off"),
            None => tracing::info!(capabilities = ?rights, "capabilities given up but for these"),
        }
    }
}

/// The data process: works for the keeper at the other end of a descriptor that it inherited.
pub fn work(channel: i32, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    let channel =
        descriptors::inherited_socket(channel).context("--worker is the keeper's to use")?;
    let begin: Option<Begin> = handover::receive(&channel).context("the keeper says nothing")?;
    let Begin { left } = begin.context("the keeper is gone")?;
    let count = 2 + left.as_ref().map_or(0, HandOver::descriptors);
    let mut all = descriptors::receive(&channel, count).context("the keeper gives nothing")?;
    let listener = all.remove(0).into();
    // No other process may seal in these sessions while this process runs.
    let _lock = all.remove(0);
    let left = left.and_then(|left| Estate::sort(&left, all).map(|estate| (left, estate)));
    serve(listener, Some(channel), left, set_log_level)
}

/// Works in this process, with nobody to go on when it dies.
pub fn run_alone(socket: &Path, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    serve(server::bind(socket)?, None, None, set_log_level)
}

fn serve(
    listener: UnixListener,
    keeper: Option<UnixStream>,
    left: Option<(HandOver, Estate)>,
    set_log_level: SetLogLevel,
) -> anyhow::Result<()> {
    let socket = listener.local_addr().ok();
    let socket = socket.as_ref().and_then(|address| address.as_pathname()).map(Path::to_owned);
    server::own(&listener).context("cannot listen")?;
    let (tap, changes) = (Arc::new(Tap::default()), Arc::new(Changes::default()));
    let (manager, thread) =
        manager::start(keeper, left, set_log_level, Arc::clone(&tap), Arc::clone(&changes))
            .context("cannot start the manager")?;
    tracing::info!(?socket, "the data process listens");
    std::thread::Builder::new()
        .name("control-listener".to_owned())
        .spawn(move || server::serve(listener, manager, tap, changes))
        .context("cannot start the control socket")?;
    let ended = thread.join();
    // Nobody can connect any more; a failure leaves a stale socket, which the next start removes.
    if let Some(socket) = socket {
        let _ = std::fs::remove_file(socket);
    }
    ended.map_err(|_| anyhow::anyhow!("the manager's thread has panicked"))
}

/// For the fuzzer: what a keeper and its data process say to each other.
#[doc(hidden)]
pub fn fuzz_frames(bytes: &[u8]) {
    crate::ipc::fuzz_frames::<Begin>(bytes);
    crate::ipc::fuzz_frames::<handover::ToKeeper>(bytes);
}

/// Checks that the manager's thread of the data process at `socket` answers. Succeeds without a
/// check if `instance` does not have the data plane, because no data process of the instance could
/// hang.
pub fn probe(socket: &Path, instance: Option<&Instance>) -> anyhow::Result<()> {
    if instance.is_some_and(|instance| !instance.dataplane_marker().exists()) {
        return Ok(());
    }
    let shown = socket.display();
    let mut stream =
        connect_trusted(socket).with_context(|| format!("no data process answers on {shown}"))?;
    stream.set_read_timeout(Some(PATIENCE)).context("cannot bound the wait")?;
    stream.set_write_timeout(Some(PATIENCE)).context("cannot bound the wait")?;
    let mut ask = || {
        write_frame(&mut stream, &Request::Hello { version: PROTOCOL_VERSION })?;
        read_frame(&mut stream)
    };
    match ask().with_context(|| format!("the data process on {shown} does not answer"))? {
        Some(Response::Hello { .. }) => Ok(()),
        Some(Response::Error { message, .. }) => bail!("{message}"),
        Some(_) | None => bail!("what listens on {shown} is no data process"),
    }
}
