//! Acquisition of a data plane by a keeper. The keeper acquires the lock of the data plane if the
//! lock is free, or requests the data plane from the keeper that holds the lock.

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
/// Delay of a keeper without descriptors. The lock must have been free for this time before this
/// keeper acquires the lock. Meanwhile a keeper that holds descriptors makes several attempts
/// ([`LOCK_INTERVAL`]), and therefore acquires the lock first.
const NON_HOLDER_DELAY: Duration = Duration::from_millis(50);
/// Delay before a refused request for the data plane is repeated.
const REQUEST_DELAY: Duration = Duration::from_secs(1);

/// Acquires the data plane. If another keeper has the data plane, there are three cases. A keeper
/// that has handed over the data plane waits for the lock without a limit. A keeper with
/// `--take-over` requests the hand-over. Any other keeper waits for the lock for 5 s.
///
/// # Errors
/// An error if another keeper has the data plane and does not hand it over within 5 s, or if the
/// lock, the store or the socket cannot be used.
pub(super) fn acquire(options: &Options, held: &mut Option<FdStore>) -> anyhow::Result<Plane> {
    let mut attempt = LockAttempts::new(options);
    let until = Instant::now() + HANDOVER_TIMEOUT;
    let holds = held.is_some();
    loop {
        if let Some(lock) = attempt.try_lock(held.is_some())? {
            return Plane::open(lock, held.take(), options);
        }
        if !holds && options.take_over {
            match request(&options.socket, held, &mut attempt) {
                Ok(lock) => return Plane::open(lock, held.take(), options),
                Err(error) if !error.may_repeat_at_once() || Instant::now() > until => {
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

/// Waits for a reason to acquire the data plane, and acquires the data plane. One reason is a
/// request of the agent. The other reason is a free lock, if this keeper has handed over the data
/// plane before. Returns `None` after SIGTERM.
///
/// # Errors
/// An error if the lock, the store, the socket or the instance's socket cannot be used. A refused
/// request is logged and repeated.
pub(super) fn acquire_on_request(
    options: &Options,
    activation: &mut Activation,
    held: &mut Option<FdStore>,
) -> anyhow::Result<Option<Plane>> {
    let mut attempt = LockAttempts::new(options);
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
                Err(error) if error.may_repeat_at_once() => {}
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

/// State of a series of attempts to acquire the lock of the data plane.
struct LockAttempts {
    path: PathBuf,
    /// True if the options let this keeper take over from other keepers ([`Options::takes_over`]).
    /// The value does not depend on the attempts.
    takes_over: bool,
    /// Time since which every attempt has found the lock free.
    free_since: Option<Instant>,
}

impl LockAttempts {
    fn new(options: &Options) -> Self {
        let path = lock_path(&options.socket);
        Self { path, takes_over: options.takes_over(), free_since: None }
    }

    /// Acquires the lock if the lock is free. `holds` is true if this keeper holds descriptors. If
    /// keepers take over from each other (`takes_over`), a keeper without descriptors acquires only
    /// a lock that has been free for [`NON_HOLDER_DELAY`].
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
        Ok(lock.filter(|_| holds || !self.takes_over || since.elapsed() >= NON_HOLDER_DELAY))
    }
}

/// Errors of a request for the data plane.
#[derive(Debug)]
enum RequestError {
    /// The connection failed.
    Io(io::Error),
    /// The data process has answered with an error, for example because it belongs to a release
    /// with another version of the hand-over.
    Refused(ErrorKind, String),
}

impl From<io::Error> for RequestError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl RequestError {
    /// Returns true if the request can be repeated at once. The data process has exited or is
    /// exiting, so that the lock becomes free, or its keeper starts the next data process.
    fn may_repeat_at_once(&self) -> bool {
        match self {
            Self::Io(error) => is_disconnect(error) || is_no_listener(error),
            // `request` has stopped the data process that gave this answer.
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

/// Requests the data plane from the data process that listens on `socket`, and returns the lock.
/// Puts the received descriptor store into `held`. The store stays there even if the hand-over
/// fails because the previous keeper exits before it confirms. Stops a data process that cannot
/// hand over.
///
/// While no answer has arrived, the function also tries the lock and returns the lock once the lock
/// is free. A data process that exits before it accepts the connection would otherwise be noticed
/// only after the timeout, because the descriptor store of this keeper contains the listening
/// socket, so the kernel keeps the connection open.
///
/// # Errors
/// [`RequestError::Io`] if the connection fails or the answer is malformed,
/// [`RequestError::Refused`] with the answer of the data process.
fn request(
    socket: &Path,
    held: &mut Option<FdStore>,
    attempt: &mut LockAttempts,
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
    // Wait until the previous keeper confirms that it has given up the data plane. If no
    // confirmation arrives, the previous keeper either continues with the data plane, or has exited
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
