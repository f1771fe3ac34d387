//! The data process: lanes that move packets and a manager that keeps their sessions. Plain
//! threads; fed over a unix socket by the control process, and indifferent to its death.

#![forbid(unsafe_code)]

pub mod activation;
mod active;
mod busy_poll;
mod changes;
mod channel;
mod clock;
mod egress;
mod error;
mod fd_store;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handover;
mod ingress;
mod keeper;
mod lane;
mod lane_context;
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
#[cfg(test)]
mod testing;
mod totals;
mod vm_generation;
mod write;

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use skein_ipc::instance::Instance;
use skein_ipc::{
    Confinement, ConfinementState, PROTOCOL_VERSION, Request, Response, read_frame, write_frame,
};
use skein_sys::socket::connect_trusted;
use skein_sys::{confine, descriptors, landlock, seccomp};

use self::changes::Changes;
use self::channel::KeeperChannel;
use self::handover::{Begin, Estate, HandOver};
use self::tap::Tap;

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

/// Confinement of a data process by the kernel's mechanisms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfinementOptions {
    /// Whether the process is confined at all.
    pub enabled: bool,
    /// Whether the process ends if a mechanism is not active.
    pub required: bool,
}

/// What a process of the data plane has given up.
#[must_use]
pub struct Confined {
    rights: CapabilitySet,
    /// Mechanisms that confine a data process; empty for a keeper.
    mechanisms: Vec<Confinement>,
}

/// Gives up capabilities; a data process (`worker`) also all system calls and files that it does not
/// need. Call it before anything that an unauthenticated sender controls is read, and before there is
/// a second thread.
///
/// # Errors
/// An error if the kernel refuses to take capabilities, or if a mechanism that is required is not
/// active. A keeper checks that before its data process starts, and before it takes over.
pub fn confine(worker: bool, options: ConfinementOptions) -> anyhow::Result<Confined> {
    let rights =
        confine::drop_capabilities(confine::DATAPLANE).context("cannot give up capabilities")?;
    let mut confined = Confined { rights, mechanisms: Vec::new() };
    if !worker {
        if options.required {
            seccomp::probe().context(NOT_CONFINED)?;
            landlock::probe().context(NOT_CONFINED)?;
        }
        return Ok(confined);
    }
    // Nobody could give its descriptors to another one.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot be tied to the keeper")?;
    open_files();
    // The filter does not allow the system calls of Landlock.
    for (mechanism, activate) in
        [("landlock", landlock::confine as fn() -> _), ("seccomp", seccomp::confine)]
    {
        let (state, reason) = match options.enabled.then(activate) {
            None => (ConfinementState::ForcedOff, Some("off in the configuration".to_owned())),
            Some(Ok(())) => (ConfinementState::On, None),
            Some(Err(error)) if error.kind() == io::ErrorKind::Unsupported => {
                (ConfinementState::Unsupported, Some(error.to_string()))
            }
            Some(Err(error)) => (ConfinementState::Failed, Some(error.to_string())),
        };
        let mechanism = Confinement { mechanism: mechanism.to_owned(), state, reason };
        if options.required && state != ConfinementState::On {
            bail!("{NOT_CONFINED}: {mechanism}");
        }
        confined.mechanisms.push(mechanism);
    }
    Ok(confined)
}

const NOT_CONFINED: &str = "the data process cannot be confined, which --require-confinement \
                            (dataplane.require_confinement) demands";

/// Reads and opens the files that a data process needs after it has lost access to files.
fn open_files() {
    busy_poll::default_limit();
    // AWS-LC maps this device at the first use of its random generator, and the generator fails if
    // the device is there but cannot be opened.
    if Path::new("/dev/sysgenid").exists() {
        let _ = aws_lc_rs::rand::fill(&mut [0]);
    }
}

impl Confined {
    /// Logs it, once there is a log.
    pub fn log(&self) {
        tracing::info!(kept = ?self.rights, "capabilities dropped");
        for mechanism in &self.mechanisms {
            match mechanism.state {
                ConfinementState::On => tracing::info!("confined: {mechanism}"),
                _ => tracing::warn!("not confined: {mechanism}"),
            }
        }
    }
}

/// The data process: works for the keeper at the other end of a descriptor that it inherited.
pub fn work(channel: i32, confined: Confined, set_log_level: SetLogLevel) -> anyhow::Result<()> {
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
    let keeper = Some(Arc::new(KeeperChannel::new(channel)));
    serve(listener, keeper, left, set_log_level, confined.mechanisms)
}

/// Works in this process, with nobody to go on when it dies.
pub fn run_alone(socket: &Path, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    serve(server::bind(socket)?, None, None, set_log_level, Vec::new())
}

fn serve(
    listener: UnixListener,
    keeper: Option<Arc<KeeperChannel>>,
    left: Option<(HandOver, Estate)>,
    set_log_level: SetLogLevel,
    confinement: Vec<Confinement>,
) -> anyhow::Result<()> {
    let socket = server::Socket::own(listener, keeper.clone()).context("cannot listen")?;
    let delete_socket = socket.deleter();
    let (tap, changes) = (Arc::new(Tap::default()), Arc::new(Changes::default()));
    let (to_tap, to_changes) = (Arc::clone(&tap), Arc::clone(&changes));
    let (manager, thread) =
        manager::start(keeper, left, set_log_level, to_tap, to_changes, confinement)
            .context("cannot start the manager")?;
    tracing::info!(socket = %socket.path().display(), "the data process listens");
    std::thread::Builder::new()
        .name("control-listener".to_owned())
        .spawn(move || server::serve(socket, manager, tap, changes))
        .context("cannot start the control socket")?;
    let ended = thread.join();
    delete_socket();
    ended.map_err(|_| anyhow::anyhow!("the manager's thread has panicked"))
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
