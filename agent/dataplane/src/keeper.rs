//! The keeper: a small process that starts the data process and holds a copy of all its descriptors, so
//! that the kernel goes on queueing packets while there is none. When the data process dies, the next one
//! gets them, and its sessions, within milliseconds.
//!
//! A node's data plane belongs to the keeper that has its lock. Keepers pass the lock and the store
//! of the descriptors ([`super::fd_store`]) on to each other.

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

/// A data process that dies sooner than this after its start has gained nothing …
const MIN_UPTIME: Duration = Duration::from_secs(10);
/// … and after so many of these in a row all is handed_over up: whoever started the keeper begins anew.
const MAX_RAPID_RESTARTS: u32 = 3;
/// Timeout for the data process to stop before its keeper ends.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs a data process while this keeper has the data plane, until the data process ends in an
/// orderly way. `arguments` start a data process; the number of its channel's descriptor is
/// appended.
///
/// A keeper that takes over from others ([`Options::takes_over`]) keeps the descriptors of the
/// store after it has handed the data plane over, and takes the data plane back when the other
/// keeper ends without a hand-over of its own. The keeper of an instance has the data plane only
/// while the instance's agent requests it.
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
            // Other keepers may hold the store; the kernel queues packets until one of them
            // continues.
            PlaneEnd::Terminated => return Ok(()),
            PlaneEnd::Ended => {}
        }
    }
}

/// Reasons why the keeper no longer runs the data plane.
enum PlaneEnd {
    /// The data process has ended in an orderly way.
    Ended,
    /// The data plane was handed over to another keeper; the store stays accessible.
    HandedOver(FdStore),
    /// SIGTERM arrived, and the data process has stopped.
    Terminated,
}

/// Runs a data process, and replaces it if it fails.
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
                // The lock is free as soon as it has ended.
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
            bail!("the data process ended: {status}");
        }
        if !activation.as_deref_mut().is_some_and(Activation::is_requested) {
            return Ok(PlaneEnd::Ended);
        }
        // The agent has ended the data process, to start one with other settings.
        plane.listener = server::bind(&options.socket)?;
        rapid_exits = 0;
    }
}

fn set_activity(activation: Option<&mut Activation>, activity: Activity) {
    if let Some(Err(error)) = activation.map(|activation| activation.set_activity(activity)) {
        tracing::error!(%error, "cannot write the marker in the instance's directory");
    }
}

fn spawn(arguments: &[OsString]) -> anyhow::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a channel")?;
    // This process has one thread: nobody else starts a program meanwhile.
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).context("cannot pass the channel on")?;
    let child = Command::new("/proc/self/exe")
        .arg0("skein-agent")
        .args(arguments)
        .arg(theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the data process")?;
    Ok((child, ours))
}

/// Reasons for the end of a data process's run.
enum ChildEnd {
    /// The process has ended.
    Process(ExitStatus),
    /// The data plane was handed over to another keeper.
    HandedOver,
    /// SIGTERM arrived.
    Terminated,
}

/// Serves one data process until it has ended.
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
    // One that dies before it has read this is seen below.
    let sent = send(channel, &StartMessage { state }, &all);
    set_activity(activation.as_deref_mut(), Activity::Active);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.context("the data process has no process id")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the data process")?;
    let mut is_open = sent.is_ok();
    // Connection by which this keeper has asked its own data process to stop.
    let mut stop: Option<UnixStream> = None;
    loop {
        // An event that was handled must not wake this process repeatedly.
        let requests = activation.as_deref().filter(|_| stop.is_none());
        let requests = requests.map(Activation::descriptors).into_iter().flatten();
        let requests: Vec<_> = requests.collect();
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        fds.extend(is_open.then(|| PollFd::new(channel, PollFlags::IN)));
        fds.extend(requests.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout = stop.is_some().then_some(STOP_TIMEOUT);
        let timeout = timeout.map(Timespec::try_from).transpose().context("a timeout")?;
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
        // What it said last counts, too.
        if has_message {
            match plane.on_message(channel) {
                Ok(None) => {}
                // The lanes have stopped, so that no packet is lost with the data process.
                Ok(Some(connection)) if is_own(&connection) => return Ok(ChildEnd::Terminated),
                Ok(Some(connection)) => {
                    let handed_over = plane.stored.is_some() && plane.hand_over(&connection);
                    // It has stopped in either case.
                    let _ = child.kill();
                    let status = child.wait().context("cannot wait for the data process")?;
                    // The other one begins only now: no two processes may seal in one session.
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

/// Returns whether this process has made the connection.
fn is_own(connection: &UnixStream) -> bool {
    peer_credentials(connection).is_ok_and(|peer| peer.pid == Some(std::process::id()))
}

/// Makes the data process stop its lanes, as for another keeper.
fn request_stop(plane: &Plane) -> io::Result<UnixStream> {
    let address = plane.listener.local_addr()?;
    let mut connection = connect(address.as_pathname().ok_or(io::ErrorKind::NotFound)?)?;
    write_frame(&mut connection, &Request::TakeOver { version: HANDOVER_VERSION })?;
    Ok(connection)
}
