//! Keeper: a small process that starts the data process and holds a copy of each of its
//! descriptors, so that the kernel keeps queueing packets while no data process runs. The next data
//! process receives the descriptors and sessions and continues within milliseconds.
//!
//! A node's data plane belongs to the keeper that has its lock. Keepers hand over the lock and the
//! descriptor store ([`super::fd_store`]).

mod acquire;
mod client;
mod plane;

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use skein_ipc::{HANDOVER_VERSION, Request, write_frame};
use skein_sys::socket::peer_credentials;

use self::acquire::{acquire, acquire_on_request};
use self::client::connect;
use self::plane::Plane;
use super::activation::{Activation, Activity};
use super::fd_store::FdStore;
use super::handover::{StartMessage, send};
use super::options::Options;
use super::server;

/// Run time after which a data process counts as stable.
const MIN_UPTIME: Duration = Duration::from_secs(10);
/// Maximum number of restarts in a row without a data process that ran for [`MIN_UPTIME`]. The
/// keeper exits at the next failure, or at once if it holds no descriptors. The service manager or
/// the control process then starts another keeper.
const MAX_RAPID_RESTARTS: u32 = 3;
/// Maximum time that the data process gets to stop its lanes after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs a data process while this keeper has the data plane, until the data process exits
/// successfully. `arguments` make this program start a data process that calls
/// [`work`](super::work); the number of its channel's descriptor is appended.
///
/// A keeper that takes over from others ([`Options::take_over`], [`Options::instance`]) keeps the
/// descriptor store after it has handed over the data plane, and takes the data plane back if the
/// other keeper exits without a hand-over of its own. The keeper of an instance has the data plane
/// only while the instance's agent requests it.
///
/// # Errors
/// An error if the socket, the lock or the instance's directory cannot be used, if another keeper
/// does not hand over the data plane, or if data processes repeatedly exit with an error.
pub fn run(options: &Options, arguments: &[OsString]) -> anyhow::Result<()> {
    let mut activation = options.instance.as_ref().map(Activation::bind).transpose()?;
    let mut held = None;
    loop {
        let plane = match &mut activation {
            None => acquire(options, &mut held)?,
            Some(activation) => match acquire_on_request(options, activation, &mut held)? {
                Some(plane) => plane,
                None => return Ok(()),
            },
        };
        let end = run_data_process(plane, options, arguments, activation.as_mut());
        set_activity(activation.as_mut(), Activity::Idle);
        match end? {
            PlaneEnd::HandedOver(store) => {
                tracing::info!("data plane handed over");
                if !options.takes_over() {
                    return Ok(());
                }
                held = Some(store);
            }
            PlaneEnd::Ended if activation.is_none() => return Ok(()),
            // The kernel queues packets until another keeper that holds the store continues.
            PlaneEnd::Terminated => return Ok(()),
            PlaneEnd::Ended => {}
        }
    }
}

/// Reasons for the end of the data plane in this keeper.
enum PlaneEnd {
    /// The data process exited successfully.
    Ended,
    /// The data plane was handed over to another keeper; this keeper keeps access to the store.
    HandedOver(FdStore),
    /// SIGTERM arrived, and the data process has stopped.
    Terminated,
}

/// Runs the data process, and restarts it after failures.
///
/// # Errors
/// An error if a data process cannot be started, or if it failed and cannot be restarted
/// ([`MAX_RAPID_RESTARTS`]).
fn run_data_process(
    mut plane: Plane,
    options: &Options,
    arguments: &[OsString],
    mut activation: Option<&mut Activation>,
) -> anyhow::Result<PlaneEnd> {
    let mut rapid_exits = 0;
    loop {
        let started = Instant::now();
        let (mut child, channel) = spawn(arguments)?;
        tracing::info!(
            pid = child.id(),
            inherits = plane.stored.is_some(),
            "started a data process"
        );
        let ended = supervise_child(&mut child, &channel, &mut plane, activation.as_deref_mut())?;
        let status = match ended {
            ChildEnd::Process(status) => status,
            ChildEnd::HandedOver => return Ok(PlaneEnd::HandedOver(plane.store)),
            ChildEnd::Terminated => {
                // The lock is released when the process exits.
                let _ = child.kill().and_then(|()| child.wait());
                return Ok(PlaneEnd::Terminated);
            }
        };
        rapid_exits = if started.elapsed() < MIN_UPTIME { rapid_exits + 1 } else { 1 };
        if !status.success() && plane.stored.is_some() && rapid_exits <= MAX_RAPID_RESTARTS {
            tracing::error!(%status, "data process exited, restarting it with its sockets and sessions");
            continue;
        }
        // Copies of the descriptors would keep the device and the port in use.
        plane.stored = None;
        plane.save();
        if !status.success() {
            bail!("the data process exited: {status}");
        }
        if !activation.as_deref_mut().is_some_and(Activation::is_requested) {
            return Ok(PlaneEnd::Ended);
        }
        // The agent has stopped the data process to start one with other settings.
        plane.listener = server::bind(&options.socket)?;
        rapid_exits = 0;
    }
}

/// Reports to the agent of the instance whether this keeper has the data plane; logs an error.
fn set_activity(activation: Option<&mut Activation>, activity: Activity) {
    if let Some(Err(error)) = activation.map(|activation| activation.set_activity(activity)) {
        tracing::error!(%error, "cannot write the marker in the instance's directory");
    }
}

/// Starts a data process. Returns the process and the keeper's end of its channel.
fn spawn(arguments: &[OsString]) -> anyhow::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().context("cannot create a socket pair")?;
    // This process has one thread, so no other child can inherit the descriptor.
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty())
        .context("cannot pass the channel to the data process")?;
    let child = Command::new("/proc/self/exe")
        .arg0("skein-agent")
        .args(arguments)
        .arg(theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the data process")?;
    Ok((child, ours))
}

/// Reasons for the end of supervision of one data process.
enum ChildEnd {
    /// The process has exited.
    Process(ExitStatus),
    /// The data plane was handed over to another keeper.
    HandedOver,
    /// SIGTERM arrived.
    Terminated,
}

/// Sends the stored state to the data process and serves its messages until it exits.
///
/// # Errors
/// An error if the process cannot be watched or awaited.
fn supervise_child(
    child: &mut Child,
    channel: &UnixStream,
    plane: &mut Plane,
    mut activation: Option<&mut Activation>,
) -> anyhow::Result<ChildEnd> {
    let mut all = vec![plane.listener.as_fd(), plane.lock.as_fd()];
    let state = plane.stored.as_ref().map(|stored| {
        all.extend(stored.descriptors.iter().map(AsFd::as_fd));
        stored.state.clone()
    });
    // If the data process has exited before it reads the message, the loop below notices it.
    let sent = send(channel, &StartMessage { state }, &all);
    set_activity(activation.as_deref_mut(), Activity::Active);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.context("the data process has no process id")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the data process")?;
    let mut is_open = sent.is_ok();
    // Connection over which this keeper has requested its own data process to stop.
    let mut stop: Option<UnixStream> = None;
    loop {
        // After the request to stop, do not poll the activation, because its events stay pending
        // and would end each poll at once.
        let requests = activation.as_deref().filter(|_| stop.is_none());
        let requests = requests.map(Activation::descriptors).into_iter().flatten();
        let requests: Vec<_> = requests.collect();
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        fds.extend(is_open.then(|| PollFd::new(channel, PollFlags::IN)));
        fds.extend(requests.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout = stop.is_some().then_some(STOP_TIMEOUT);
        let timeout = timeout.map(Timespec::try_from).transpose().context("invalid timeout")?;
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(ChildEnd::Terminated),
            Err(rustix::io::Errno::INTR) => continue,
            other => other.context("cannot wait for the data process")?,
        };
        let ended = !fds[0].revents().is_empty();
        let has_message = is_open && fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if let Some(activation) = activation.as_deref_mut() {
            activation.accept();
            if stop.is_none() && activation.is_terminated() {
                match request_stop(plane) {
                    Ok(connection) => stop = Some(connection),
                    Err(_) => return Ok(ChildEnd::Terminated),
                }
            }
        }
        // Handle the last message of a process that has exited, too.
        if has_message {
            match plane.on_message(channel) {
                Ok(None) => {}
                // The lanes have stopped, so no packet is lost with the data process.
                Ok(Some(connection)) if is_own(&connection) => return Ok(ChildEnd::Terminated),
                Ok(Some(connection)) => {
                    let handed_over = plane.stored.is_some() && plane.hand_over(&connection);
                    // The lanes have stopped, even if the hand-over failed.
                    let _ = child.kill();
                    let status = child.wait().context("cannot wait for the data process")?;
                    // The other keeper starts its data process after this byte: two processes must
                    // never seal in the same session.
                    let handed_over = handed_over && (&connection).write_all(&[0]).is_ok();
                    return Ok(if handed_over {
                        ChildEnd::HandedOver
                    } else {
                        ChildEnd::Process(status)
                    });
                }
                Err(_) => is_open = false,
            }
        } else if ended {
            let status = child.wait().context("cannot wait for the data process")?;
            return Ok(ChildEnd::Process(status));
        }
    }
}

/// Returns whether the other end of the connection is this process.
fn is_own(connection: &UnixStream) -> bool {
    peer_credentials(connection).is_ok_and(|peer| peer.pid == Some(std::process::id()))
}

/// Requests the data process to stop its lanes, as another keeper would.
///
/// # Errors
/// The error of the connection.
fn request_stop(plane: &Plane) -> io::Result<UnixStream> {
    let address = plane.listener.local_addr()?;
    let mut connection = connect(address.as_pathname().ok_or(io::ErrorKind::NotFound)?)?;
    write_frame(&mut connection, &Request::TakeOver { version: HANDOVER_VERSION })?;
    Ok(connection)
}
