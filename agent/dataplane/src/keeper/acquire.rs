//! Acquisition of a data plane: by its lock, or by a request to the keeper that has it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use skein_ipc::{ErrorKind, HANDOVER_VERSION, Request, Response, read_frame, write_frame};
use skein_sys::descriptors;
use skein_sys::lock::FileLock;
use skein_sys::socket::{is_disconnect, is_no_listener, make_directory};

use super::client::{HANDOVER_TIMEOUT, connect, shut_down};
use super::plane::Plane;
use crate::activation::Activation;
use crate::fd_store::FdStore;
use crate::options::{Options, lock_path};

/// Interval at which a waiting keeper tries to acquire the data plane's lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);
/// Time for which the lock must be free before a keeper without descriptors acquires it: several
/// attempts of the keepers that hold descriptors.
const HOLDER_DELAY: Duration = Duration::from_millis(50);
/// Delay before a refused request for the data plane is repeated.
const REQUEST_DELAY: Duration = Duration::from_secs(1);

/// Acquires the data plane: at once, or, if this keeper has handed it over, when the lock is free.
///
/// # Errors
/// An error if another keeper has the data plane and does not hand it over within 5 s, or if the
/// lock, the store or the socket cannot be used.
pub(super) fn acquire(options: &Options, held: &mut Option<FdStore>) -> anyhow::Result<Plane> {
    let mut attempt = LockAttempt::new(options);
    let until = Instant::now() + HANDOVER_TIMEOUT;
    let holds = held.is_some();
    loop {
        if let Some(lock) = attempt.try_lock(held.is_some())? {
            return Plane::open(lock, held.take(), options);
        }
        if !holds && options.take_over {
            match request(&options.socket, held, &mut attempt) {
                Ok(lock) => return Plane::open(lock, held.take(), options),
                Err(error) if !error.is_transient() || Instant::now() > until => {
                    return Err(error.into_error(&options.socket));
                }
                Err(error) => tracing::debug!(
                    ?error,
                    "data process closed the connection, repeating the request"
                ),
            }
        } else if !holds && Instant::now() > until {
            bail!(
                "another keeper has the data plane of {}. Stop it, or set dataplane.socket to \
                 another path.",
                options.socket.display()
            );
        }
        std::thread::sleep(LOCK_INTERVAL);
    }
}

/// Acquires the data plane when the agent requests it, or, if this keeper has handed it over, when
/// the lock is free. Returns `None` after SIGTERM.
///
/// # Errors
/// An error if the lock, the store, the socket or the instance's socket cannot be used. A refused
/// request is logged and repeated.
pub(super) fn acquire_on_request(
    options: &Options,
    activation: &mut Activation,
    held: &mut Option<FdStore>,
) -> anyhow::Result<Option<Plane>> {
    let mut attempt = LockAttempt::new(options);
    let mut next_request = Instant::now();
    while !activation.is_terminated() {
        let requested = activation.is_requested();
        if (requested || held.is_some())
            && let Some(lock) = attempt.try_lock(held.is_some())?
        {
            return Plane::open(lock, held.take(), options).map(Some);
        }
        if requested && Instant::now() >= next_request {
            match request(&options.socket, held, &mut attempt) {
                Ok(lock) => return Plane::open(lock, held.take(), options).map(Some),
                Err(error) if error.is_transient() => {}
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

/// Repeated attempts to acquire the lock of the data plane.
struct LockAttempt {
    path: PathBuf,
    takes_over: bool,
    /// Time since which every attempt has found the lock free.
    free_since: Option<Instant>,
}

impl LockAttempt {
    fn new(options: &Options) -> Self {
        let path = lock_path(&options.socket);
        Self { path, takes_over: options.takes_over(), free_since: None }
    }

    /// Acquires the lock if it is free. Keepers that hold descriptors (`holds`) come first: the
    /// others wait for [`HOLDER_DELAY`].
    ///
    /// # Errors
    /// An error if the lock file or its directory cannot be used.
    fn try_lock(&mut self, holds: bool) -> anyhow::Result<Option<FileLock>> {
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

/// Errors of a request for the data plane.
#[derive(Debug)]
enum RequestError {
    /// The connection failed.
    Io(io::Error),
    /// The data process refuses the hand-over, or belongs to a release with another version of it.
    Refused(ErrorKind, String),
}

impl From<io::Error> for RequestError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl RequestError {
    /// Returns whether to repeat the request at once: the data process has exited and its socket
    /// will close, or its keeper is starting the next one.
    fn is_transient(&self) -> bool {
        match self {
            Self::Io(error) => is_disconnect(error) || is_no_listener(error),
            // `request` has stopped this data process.
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

/// Requests the data plane from the data process that listens on `socket`. Stores the received
/// descriptor store in `held`, even if the other keeper exits before it confirms the hand-over.
/// Stops a data process that cannot hand over.
///
/// Returns the lock, too, if it becomes free while the request is not answered: the store of this
/// keeper keeps the listening socket open, so the connection to a process that exits before it
/// accepts does not close.
///
/// # Errors
/// [`RequestError::Io`] if the connection fails or the answer is malformed,
/// [`RequestError::Refused`] with the answer of the data process.
fn request(
    socket: &Path,
    held: &mut Option<FdStore>,
    attempt: &mut LockAttempt,
) -> Result<FileLock, RequestError> {
    let mut stream = connect(socket)?;
    write_frame(&mut stream, &Request::TakeOver { version: HANDOVER_VERSION })?;
    let deadline = Instant::now() + HANDOVER_TIMEOUT;
    while !is_readable(&stream, LOCK_INTERVAL)? && Instant::now() < deadline {
        let lock = attempt.try_lock(held.is_some());
        if let Some(lock) = lock.map_err(|error| io::Error::other(format!("{error:#}")))? {
            return Ok(lock);
        }
    }
    let answer = read_frame(&mut stream)?;
    match answer.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))? {
        Response::HandOver => {}
        // The data process belongs to a release with another version of the hand-over, or has no
        // snapshot.
        Response::Error { kind: kind @ ErrorKind::Invalid, message } => {
            tracing::warn!(message, "cannot take over, stopping the previous data process");
            shut_down(socket)?;
            return Err(RequestError::Refused(kind, message));
        }
        Response::Error { kind, message } => return Err(RequestError::Refused(kind, message)),
        _ => return Err(invalid("the answer belongs to another request").into()),
    }
    let mut all = descriptors::receive(&stream, 1 + FdStore::DESCRIPTORS)?;
    let lock = FileLock::from_received(all.remove(0))?;
    let store = FdStore::received(all).ok_or_else(|| invalid("descriptors are missing"))?;
    *held = Some(store);
    stream.write_all(&[0])?;
    // Without this confirmation, the other keeper continues with the data plane, or it has exited
    // and the lock becomes free.
    stream.read_exact(&mut [0])?;
    tracing::info!(socket = %socket.display(), "data plane taken over");
    Ok(lock)
}

/// Waits until the connection is readable, at most `timeout`.
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

#[cfg(test)]
mod tests;
