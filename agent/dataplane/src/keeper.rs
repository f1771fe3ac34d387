//! The keeper: a small process that starts the data process and holds a copy of all its descriptors, so
//! that the kernel goes on queueing packets while there is none. When the data process dies, the next one
//! gets them, and its sessions, within milliseconds.
//!
//! A node's data plane belongs to the keeper that has its lock. Keepers pass the lock and the store
//! of the descriptors ([`super::fd_store`]) on to each other.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use skein_ipc::{ErrorKind, HANDOVER_VERSION, Request, Response, read_frame, write_frame};
use skein_sys::descriptors;
use skein_sys::lock::FileLock;
use skein_sys::socket::{
    connect_trusted, is_disconnect, is_no_listener, make_directory, peer_credentials,
};

use super::activation::{Activation, Activity};
use super::channel::{answer_listener, answer_queues};
use super::fd_store::{FdStore, Kept};
use super::handover::{Answer, Begin, ToKeeper, receive, send};
use super::{Options, lock_path, server};

/// A data process that dies sooner than this after its start has gained nothing …
const STABLE: Duration = Duration::from_secs(10);
/// … and after so many of these in a row all is given up: whoever started the keeper begins anew.
const DEATHS: u32 = 3;
/// How long the other side of a hand-over may take for each step.
const PATIENCE: Duration = Duration::from_secs(5);
/// Interval between attempts of a waiting keeper to take the data plane's lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);
/// Time for which the lock must have been free before a keeper without descriptors takes it:
/// several intervals of the keepers that have descriptors.
const HOLDER_DELAY: Duration = Duration::from_millis(50);
/// Timeout for the data process to stop before its keeper ends.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);
/// Delay before a request for the data plane that was refused is repeated.
const REQUEST_DELAY: Duration = Duration::from_secs(1);

/// A data plane that belongs to this keeper.
struct Plane {
    /// Lock of the data plane. The data process has a copy, so that the lock is free when both
    /// processes have ended.
    lock: FileLock,
    store: FdStore,
    listener: UnixListener,
    /// Path of the listening socket.
    socket: PathBuf,
    kept: Option<Kept>,
}

impl Plane {
    /// Opens the data plane of the lock's owner: with the descriptors in the store, or a new one.
    fn open(lock: FileLock, store: Option<FdStore>, options: &Options) -> anyhow::Result<Self> {
        let mut store = match store {
            Some(store) => store,
            None => FdStore::create().context("cannot make a store for descriptors")?,
        };
        let (listener, kept) = match store.take() {
            Some((listener, kept)) => (listener, Some(kept)),
            None => {
                if options.takes_over() {
                    end_unlocked(&options.socket)?;
                }
                (server::bind(&options.socket)?, None)
            }
        };
        let socket = options.socket.clone();
        let mut plane = Self { lock, store, listener, socket, kept };
        plane.save();
        Ok(plane)
    }

    /// Puts the descriptors of the data process into the store.
    fn save(&mut self) {
        let Some(kept) = &self.kept else { return self.store.clear() };
        if let Err(error) = self.store.put(&self.listener, kept) {
            tracing::error!(%error, "cannot store descriptors: others would lose the sessions");
        }
    }

    /// Handles a message of the data process; returns the connection to hand over to, if the
    /// message requests a hand-over.
    fn take_message(&mut self, channel: &UnixStream) -> io::Result<Option<UnixStream>> {
        let message = receive(channel)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match message {
            ToKeeper::Keep { left } => {
                let descriptors = descriptors::receive(channel, left.descriptors())?;
                self.kept = Some(Kept { left, descriptors });
            }
            ToKeeper::Snapshot => {
                let later = descriptors::receive(channel, 1)?.pop();
                if let (Some(kept), Some(later)) = (&mut self.kept, later) {
                    kept.descriptors[0] = later;
                }
            }
            ToKeeper::Forget => self.kept = None,
            ToKeeper::OpenQueues { name, queues, allowed } => {
                answer_queues(channel, &name, queues, allowed)?;
                return Ok(None);
            }
            ToKeeper::Listen => {
                let created = server::bind(&self.socket).map(|new| {
                    self.listener = new;
                    &self.listener
                });
                answer_listener(channel, created)?;
            }
            ToKeeper::DeleteSocket => {
                // A failure leaves a stale file, which the next start removes.
                let _ = std::fs::remove_file(&self.socket);
                send(channel, &Answer::Done, &[])?;
                return Ok(None);
            }
            ToKeeper::GiveAway => {
                return Ok(descriptors::receive(channel, 1)?.pop().map(UnixStream::from));
            }
        }
        self.save();
        Ok(None)
    }

    /// Sends the lock and the store to the keeper at the other end; returns whether that keeper
    /// confirms their receipt.
    fn give(&self, connection: &UnixStream) -> bool {
        let give = || -> io::Result<()> {
            connection.set_read_timeout(Some(PATIENCE))?;
            connection.set_write_timeout(Some(PATIENCE))?;
            let all: Vec<_> =
                [self.lock.as_fd()].into_iter().chain(self.store.descriptors()).collect();
            send(connection, &Response::HandOver, &all)?;
            (&*connection).read_exact(&mut [0])
        };
        let given = give();
        if let Err(error) = &given {
            tracing::error!(%error, "hand-over to the new keeper failed");
        }
        given.is_ok()
    }
}

/// Runs a data process while this keeper has the data plane, until the data process ends in an
/// orderly way. `arguments` start a data process; the number of its channel's descriptor is
/// appended.
///
/// A keeper that takes over from others ([`Options::takes_over`]) keeps the descriptors of the
/// store after it has handed the data plane over, and takes the data plane back when the other
/// keeper ends without a hand-over of its own. The keeper of an instance has the data plane only
/// while the instance's agent requests it.
pub(super) fn run(options: &Options, arguments: &[OsString]) -> anyhow::Result<()> {
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
        let end = keep(plane, options, arguments, activation.as_mut());
        set(activation.as_mut(), Activity::Idle);
        match end? {
            End::GivenAway(store) => {
                tracing::info!("data plane handed over");
                if !options.takes_over() {
                    return Ok(());
                }
                held = Some(store);
            }
            End::Ended if activation.is_none() => return Ok(()),
            // Other keepers may hold the store; the kernel queues packets until one of them
            // continues.
            End::Terminated => return Ok(()),
            End::Ended => {}
        }
    }
}

/// Reasons why the keeper no longer runs the data plane.
enum End {
    /// The data process has ended in an orderly way.
    Ended,
    /// The data plane was handed over to another keeper; the store stays accessible.
    GivenAway(FdStore),
    /// SIGTERM arrived, and the data process has stopped.
    Terminated,
}

/// Runs a data process, and replaces it if it fails.
fn keep(
    mut plane: Plane,
    options: &Options,
    arguments: &[OsString],
    mut activation: Option<&mut Activation>,
) -> anyhow::Result<End> {
    let mut deaths = 0;
    loop {
        let started = Instant::now();
        let (mut child, channel) = spawn(arguments)?;
        tracing::info!(pid = child.id(), takes_up = plane.kept.is_some(), "started a data process");
        let ended = attend(&mut child, &channel, &mut plane, activation.as_deref_mut())?;
        let status = match ended {
            Ended::Process(status) => status,
            Ended::GivenAway => return Ok(End::GivenAway(plane.store)),
            Ended::Terminated => {
                // The lock is free as soon as it has ended.
                let _ = child.kill().and_then(|()| child.wait());
                return Ok(End::Terminated);
            }
        };
        deaths = if started.elapsed() < STABLE { deaths + 1 } else { 1 };
        if !status.success() && plane.kept.is_some() && deaths <= DEATHS {
            tracing::error!(%status, "data process exited, restarting it with its sockets and sessions");
            continue;
        }
        // Copies of the descriptors would keep the device and the port in use.
        plane.kept = None;
        plane.save();
        if !status.success() {
            bail!("the data process ended: {status}");
        }
        if !activation.as_deref_mut().is_some_and(Activation::is_requested) {
            return Ok(End::Ended);
        }
        // The agent has ended the data process, to start one with other settings.
        plane.listener = server::bind(&options.socket)?;
        deaths = 0;
    }
}

fn set(activation: Option<&mut Activation>, activity: Activity) {
    if let Some(Err(error)) = activation.map(|activation| activation.set(activity)) {
        tracing::error!(%error, "cannot write the marker in the instance's directory");
    }
}

/// Acquires the data plane: at once, or, if this keeper has handed it over, when it is free.
fn acquire(options: &Options, held: &mut Option<FdStore>) -> anyhow::Result<Plane> {
    let mut attempt = Attempt::new(options);
    let until = Instant::now() + PATIENCE;
    let holds = held.is_some();
    loop {
        if let Some(lock) = attempt.lock(held.is_some())? {
            return Plane::open(lock, held.take(), options);
        }
        if !holds && options.take_over {
            match request(&options.socket, held, &mut attempt) {
                Ok(lock) => return Plane::open(lock, held.take(), options),
                Err(error) if !error.is_passing() || Instant::now() > until => {
                    return Err(error.into_error(&options.socket));
                }
                Err(error) => tracing::debug!(
                    ?error,
                    "the data process closed the connection, repeating the request"
                ),
            }
        } else if !holds && Instant::now() > until {
            bail!(
                "another keeper has the data plane of {}: stop it, or set dataplane.socket to \
                 another path",
                options.socket.display()
            );
        }
        std::thread::sleep(LOCK_INTERVAL);
    }
}

/// Acquires the data plane when the agent requests it, or, if this keeper has handed it over, when
/// it is free. `None` if this process is to end.
fn acquire_on_request(
    options: &Options,
    activation: &mut Activation,
    held: &mut Option<FdStore>,
) -> anyhow::Result<Option<Plane>> {
    let mut attempt = Attempt::new(options);
    let mut next_request = Instant::now();
    while !activation.is_terminated() {
        let requested = activation.is_requested();
        if (requested || held.is_some())
            && let Some(lock) = attempt.lock(held.is_some())?
        {
            return Plane::open(lock, held.take(), options).map(Some);
        }
        if requested && Instant::now() >= next_request {
            match request(&options.socket, held, &mut attempt) {
                Ok(lock) => return Plane::open(lock, held.take(), options).map(Some),
                Err(error) if error.is_passing() => {}
                Err(error) => {
                    tracing::error!("{:#}", error.into_error(&options.socket));
                    next_request = Instant::now() + REQUEST_DELAY;
                }
            }
        }
        activation.wait((requested || held.is_some()).then_some(LOCK_INTERVAL))?;
    }
    Ok(None)
}

/// Attempts to take the lock of the data plane.
struct Attempt {
    path: PathBuf,
    takes_over: bool,
    /// Time since which the lock was free at every attempt.
    free_since: Option<Instant>,
}

impl Attempt {
    fn new(options: &Options) -> Self {
        let path = lock_path(&options.socket);
        Self { path, takes_over: options.takes_over(), free_since: None }
    }

    /// Takes the lock if it is free; a keeper that `holds` descriptors comes first.
    fn lock(&mut self, holds: bool) -> anyhow::Result<Option<FileLock>> {
        let failed = || format!("cannot lock {}", self.path.display());
        make_directory(&self.path).with_context(failed)?;
        let lock = FileLock::try_acquire(&self.path).with_context(failed)?;
        if lock.is_none() {
            self.free_since = None;
            return Ok(None);
        }
        let since = *self.free_since.get_or_insert_with(Instant::now);
        Ok(lock.filter(|_| holds || !self.takes_over || since.elapsed() >= HOLDER_DELAY))
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
enum Ended {
    /// The process has ended.
    Process(ExitStatus),
    /// The data plane was handed over to another keeper.
    GivenAway,
    /// SIGTERM arrived.
    Terminated,
}

/// Serves one data process until it has ended.
fn attend(
    child: &mut Child,
    channel: &UnixStream,
    plane: &mut Plane,
    mut activation: Option<&mut Activation>,
) -> anyhow::Result<Ended> {
    let mut all = vec![plane.listener.as_fd(), plane.lock.as_fd()];
    let left = plane.kept.as_ref().map(|kept| {
        all.extend(kept.descriptors.iter().map(AsFd::as_fd));
        kept.left.clone()
    });
    // One that dies before it has read this is seen below.
    let begun = send(channel, &Begin { left }, &all);
    set(activation.as_deref_mut(), Activity::Active);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.context("the data process has no process id")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the data process")?;
    let mut listens = begun.is_ok();
    // Connection by which this keeper has asked its own data process to stop.
    let mut stop: Option<UnixStream> = None;
    loop {
        // An event that was handled must not wake this process repeatedly.
        let requests = activation.as_deref().filter(|_| stop.is_none());
        let requests = requests.map(Activation::descriptors).into_iter().flatten();
        let requests: Vec<_> = requests.collect();
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        fds.extend(listens.then(|| PollFd::new(channel, PollFlags::IN)));
        fds.extend(requests.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout = stop.is_some().then_some(STOP_TIMEOUT);
        let timeout = timeout.map(Timespec::try_from).transpose().context("a timeout")?;
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(Ended::Terminated),
            Err(rustix::io::Errno::INTR) => continue,
            other => other.context("cannot wait for the data process")?,
        };
        let ended = !fds[0].revents().is_empty();
        let told = listens && fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if let Some(activation) = activation.as_deref_mut() {
            activation.accept();
            if stop.is_none() && activation.is_terminated() {
                match request_stop(plane) {
                    Ok(connection) => stop = Some(connection),
                    Err(_) => return Ok(Ended::Terminated),
                }
            }
        }
        // What it said last counts, too.
        if told {
            match plane.take_message(channel) {
                Ok(None) => {}
                // The lanes have stopped, so that no packet is lost with the data process.
                Ok(Some(connection)) if is_own(&connection) => return Ok(Ended::Terminated),
                Ok(Some(connection)) => {
                    let given = plane.kept.is_some() && plane.give(&connection);
                    // It has stopped in either case.
                    let _ = child.kill();
                    let status = child.wait().context("cannot wait for the data process")?;
                    // The other one begins only now: no two processes may seal in one session.
                    let given = given && (&connection).write_all(&[0]).is_ok();
                    return Ok(if given { Ended::GivenAway } else { Ended::Process(status) });
                }
                Err(_) => listens = false,
            }
        } else if ended {
            let status = child.wait().context("cannot wait for the data process")?;
            return Ok(Ended::Process(status));
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

/// Errors of a request for the data plane.
#[derive(Debug)]
enum Refusal {
    /// The connection failed.
    Io(io::Error),
    /// The data process refuses, or is of a release with another hand-over.
    Refused(ErrorKind, String),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Refusal {
    /// Returns whether to repeat the request at once: the data process has just died and its socket
    /// closes soon, or its keeper is starting the next one.
    fn is_passing(&self) -> bool {
        match self {
            Self::Io(error) => is_disconnect(error) || is_no_listener(error),
            // The data process was ended.
            Self::Refused(kind, _) => *kind == ErrorKind::Invalid,
        }
    }

    fn into_error(self, socket: &Path) -> anyhow::Error {
        let failed = format!("the data process on {} does not hand over", socket.display());
        match self {
            Self::Io(error) => anyhow::Error::new(error).context(failed),
            Self::Refused(_, message) => anyhow::anyhow!("{failed}: {message}"),
        }
    }
}

/// Requests the data plane from the data process that listens on `socket`. Keeps the received store
/// in `held`, even if the other keeper dies before it has handed over the data plane. Ends a data
/// process that cannot hand over.
///
/// Returns also if the lock becomes free while the request is not answered: the connection to a
/// process that dies before it has accepted it stays open, because the store of this keeper holds the
/// listening socket, too.
fn request(
    socket: &Path,
    held: &mut Option<FdStore>,
    attempt: &mut Attempt,
) -> Result<FileLock, Refusal> {
    let mut stream = connect(socket)?;
    write_frame(&mut stream, &Request::TakeOver { version: HANDOVER_VERSION })?;
    let deadline = Instant::now() + PATIENCE;
    while !is_readable(&stream, LOCK_INTERVAL)? && Instant::now() < deadline {
        let lock = attempt.lock(held.is_some());
        if let Some(lock) = lock.map_err(|error| io::Error::other(format!("{error:#}")))? {
            return Ok(lock);
        }
    }
    let answer = read_frame(&mut stream)?;
    match answer.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))? {
        Response::HandOver => {}
        // The data process is of a release with another hand-over, or has no snapshot.
        Response::Error { kind: kind @ ErrorKind::Invalid, message } => {
            tracing::warn!(message, "cannot take over: the previous data process is ended instead");
            end(socket)?;
            return Err(Refusal::Refused(kind, message));
        }
        Response::Error { kind, message } => return Err(Refusal::Refused(kind, message)),
        _ => return Err(invalid("an answer to another request").into()),
    }
    let mut all = descriptors::receive(&stream, 1 + FdStore::DESCRIPTORS)?;
    let lock = FileLock::from_received(all.remove(0))?;
    let store = FdStore::received(all).ok_or_else(|| invalid("descriptors are missing"))?;
    *held = Some(store);
    stream.write_all(&[0])?;
    // Without a confirmation, the other keeper continues with the data plane; or it is dead, and
    // the lock becomes free.
    stream.read_exact(&mut [0])?;
    tracing::info!(socket = %socket.display(), "taken over from the previous data process");
    Ok(lock)
}

fn is_readable(stream: &UnixStream, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    match rustix::event::poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = connect_trusted(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Asks a data process to end, and waits until it has.
fn end(socket: &Path) -> io::Result<()> {
    let mut stream = connect(socket)?;
    write_frame(&mut stream, &Request::Shutdown)?;
    while read_frame::<Response>(&mut stream)?.is_some() {}
    Ok(())
}

/// Ends a data process of a release without locks, which listens although the lock is free.
fn end_unlocked(socket: &Path) -> anyhow::Result<()> {
    match end(socket) {
        Err(error) if !is_disconnect(&error) && !is_no_listener(&error) => Err(error)
            .with_context(|| format!("cannot end the data process on {}", socket.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::handover::HandOver;
    use super::*;
    use skein_sys::tun::TunOffload;

    fn options(directory: &Path) -> Options {
        Options { socket: directory.join("dataplane.sock"), take_over: true, instance: None }
    }

    fn acquire_alone(options: &Options) -> Plane {
        acquire(options, &mut None).unwrap()
    }

    /// A data process that was killed, as another one sees it: its socket takes connections until the
    /// kernel has closed it.
    #[test]
    fn whoever_dies_while_it_is_asked_is_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        drop(acquire_alone(&options));
        std::fs::remove_file(&options.socket).unwrap();
        let lock = FileLock::try_acquire(&lock_path(&options.socket)).unwrap().unwrap();
        let listener = UnixListener::bind(&options.socket).unwrap();
        let dying = std::thread::spawn(move || {
            // One is closed with what it asked unread, one that was read, and one never accepted.
            drop(listener.accept().unwrap());
            let (stream, _) = listener.accept().unwrap();
            let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
            assert!(matches!(asked, Request::TakeOver { version: HANDOVER_VERSION }), "{asked:?}");
            drop(stream);
            std::thread::sleep(3 * LOCK_INTERVAL);
            drop(listener);
            drop(lock);
        });
        assert!(acquire_alone(&options).kept.is_none());
        dying.join().unwrap();
    }

    /// Of a release with another format: nothing of it is taken, and it has ended before anything begins.
    #[test]
    fn whoever_hands_over_in_another_format_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        let lock = FileLock::try_acquire(&lock_path(&options.socket)).unwrap().unwrap();
        let listener = UnixListener::bind(&options.socket).unwrap();
        let other = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
            assert!(matches!(asked, Request::TakeOver { .. }), "{asked:?}");
            let message = "version 7 is wanted".to_owned();
            let answer = Response::Error { kind: ErrorKind::Invalid, message };
            write_frame(&mut &stream, &answer).unwrap();
            let (stream, _) = listener.accept().unwrap();
            let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
            assert!(matches!(asked, Request::Shutdown), "{asked:?}");
            std::thread::sleep(LOCK_INTERVAL);
            drop(lock);
            Instant::now()
        });
        assert!(acquire_alone(&options).kept.is_none());
        let taken = Instant::now();
        assert!(other.join().unwrap() <= taken, "it has ended first");
    }

    /// A release without locks leaves the lock free while it listens.
    #[test]
    fn data_process_without_lock_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        let listener = UnixListener::bind(&options.socket).unwrap();
        let other = std::thread::spawn(move || {
            loop {
                let (stream, _) = listener.accept().unwrap();
                let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
                if matches!(asked, Request::Shutdown) {
                    return;
                }
                let message = "version 1 is wanted".to_owned();
                let answer = Response::Error { kind: ErrorKind::Invalid, message };
                write_frame(&mut &stream, &answer).unwrap();
            }
        });
        assert!(acquire_alone(&options).kept.is_none());
        other.join().unwrap();
    }

    fn kept() -> Kept {
        let left = HandOver {
            version: HANDOVER_VERSION,
            lanes: 1,
            families: Vec::new(),
            offload: TunOffload::NONE,
            gso: true,
            capabilities: Vec::new(),
            generation: 7,
        };
        let files = (0..left.descriptors()).map(|_| tempfile::tempfile().unwrap().into());
        Kept { descriptors: files.collect(), left }
    }

    /// A keeper dies between its hand-over and its confirmation; the next keeper gets all
    /// descriptors.
    #[test]
    fn keeper_that_dies_in_a_hand_over_loses_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        let mut plane = acquire_alone(&options);
        let socket = options.socket.clone();
        let dying = std::thread::spawn(move || {
            let (connection, _) = plane.listener.accept().unwrap();
            let asked: Request = read_frame(&mut &connection).unwrap().unwrap();
            assert!(matches!(asked, Request::TakeOver { .. }), "{asked:?}");
            plane.kept = Some(kept());
            plane.save();
            assert!(plane.give(&connection));
        });
        let taken = acquire_alone(&options);
        assert_eq!(taken.kept.unwrap().left.generation, 7);
        assert_eq!(taken.listener.local_addr().unwrap().as_pathname(), Some(&*socket));
        dying.join().unwrap();
    }

    /// The data process dies before it accepts the connection, which the store keeps open.
    #[test]
    fn lock_that_becomes_free_during_a_request_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        let mut plane = acquire_alone(&options);
        plane.kept = Some(kept());
        plane.save();
        let copies = plane.store.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
        let mut held = FdStore::received(copies.into());
        let requesting = std::thread::spawn(move || {
            let mut attempt = Attempt::new(&options);
            request(&options.socket, &mut held, &mut attempt).is_ok()
        });
        std::thread::sleep(10 * LOCK_INTERVAL);
        assert!(!requesting.is_finished(), "The other keeper has the data plane.");
        drop(plane);
        assert!(requesting.join().unwrap(), "The lock was not taken.");
    }

    /// A keeper that has handed over its data plane gets it back when the other keeper ends.
    #[test]
    fn holder_takes_back_what_the_dead_keeper_had() {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path());
        let mut plane = acquire_alone(&options);
        let copies = plane.store.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
        let mut held = FdStore::received(copies.into());
        let waiting = std::thread::spawn(move || acquire(&options, &mut held).unwrap());
        std::thread::sleep(10 * LOCK_INTERVAL);
        assert!(!waiting.is_finished(), "The other keeper has the data plane.");
        plane.kept = Some(kept());
        plane.save();
        drop(plane);
        assert_eq!(waiting.join().unwrap().kept.unwrap().left.generation, 7);
    }
}
