//! The keeper: a small process that starts the data process and holds a copy of all its descriptors, so
//! that the kernel goes on queueing packets while there is none. When the data process dies, the next one
//! gets them, and its sessions, within milliseconds.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::handover::{Begin, ToKeeper, receive, send};
use super::server;
use crate::ipc::{
    ErrorKind, HANDOVER_VERSION, HandOver, Request, Response, read_frame, write_frame,
};
use crate::lifecycle::retire;
use crate::sys::descriptors;
use crate::sys::socket::{hung_up, is_absent, is_trusted, peer_credentials};

/// A data process that dies sooner than this after its start has gained nothing …
const STABLE: Duration = Duration::from_secs(10);
/// … and after so many of these in a row all is given up: whoever started the keeper begins anew.
const DEATHS: u32 = 3;
/// How long the other side of a hand-over may take for each step.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait before one that hung up is asked again.
const AGAIN: Duration = Duration::from_millis(10);

/// What the data process has given: its description, and the descriptors that belong to it.
struct Kept {
    left: HandOver,
    descriptors: Vec<OwnedFd>,
}

/// Keeps a data process at work until it ends in an orderly way, or is given away. `arguments` start one,
/// the number of its channel's descriptor added. `take_over`: from the one that is there, if one is.
pub(super) fn run(socket: &Path, take_over: bool, arguments: &[OsString]) -> anyhow::Result<()> {
    let taken = match take_over {
        true => take(socket)?,
        false => None,
    };
    let (listener, mut kept) = match taken {
        Some((listener, kept)) => (listener, Some(kept)),
        None => (server::bind(socket)?, None),
    };
    let mut deaths = 0;
    loop {
        let started = Instant::now();
        let (mut child, channel) = spawn(arguments)?;
        tracing::info!(pid = child.id(), takes_up = kept.is_some(), "started a data process");
        let status = match attend(&mut child, &channel, &listener, &mut kept)? {
            End::GivenAway => {
                tracing::info!("the data plane is given away");
                return match take_over {
                    true => Err(retire().into()),
                    false => Ok(()),
                };
            }
            End::Ended(status) => status,
        };
        if status.success() {
            return Ok(());
        }
        deaths = if started.elapsed() < STABLE { deaths + 1 } else { 1 };
        if kept.is_none() || deaths > DEATHS {
            bail!("the data process ended: {status}");
        }
        tracing::error!(%status, "the data process ended: the next one goes on with what it left");
    }
}

enum End {
    Ended(ExitStatus),
    GivenAway,
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

/// Serves one data process until it has ended.
fn attend(
    child: &mut Child,
    channel: &UnixStream,
    listener: &UnixListener,
    kept: &mut Option<Kept>,
) -> anyhow::Result<End> {
    let mut all = vec![listener.as_fd()];
    let left = kept.as_ref().map(|kept| {
        all.extend(kept.descriptors.iter().map(AsFd::as_fd));
        kept.left.clone()
    });
    // One that dies before it has read this is seen below.
    let begun = send(channel, &Begin { left }, &all);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.context("the data process has no process id")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the data process")?;
    let mut listens = begun.is_ok();
    loop {
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        if listens {
            fds.push(PollFd::new(channel, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.context("cannot wait for the data process")?,
        };
        let (ended, told) =
            (!fds[0].revents().is_empty(), fds.get(1).is_some_and(|fd| !fd.revents().is_empty()));
        // What it said last counts, too.
        if told {
            match take_message(channel, kept) {
                Ok(None) => {}
                Ok(Some(connection)) => {
                    let given = kept.as_ref().is_some_and(|kept| give(&connection, listener, kept));
                    // It has stopped in either case.
                    let _ = child.kill();
                    let status = child.wait().context("cannot wait for the data process")?;
                    // The other one begins only now: no two processes may seal in one session.
                    let given = given && (&connection).write_all(&[0]).is_ok();
                    return Ok(if given { End::GivenAway } else { End::Ended(status) });
                }
                Err(_) => listens = false,
            }
        } else if ended {
            let status = child.wait().context("cannot wait for the data process")?;
            return Ok(End::Ended(status));
        }
    }
}

/// Takes what the data process says; the connection to give all to, where it wants that.
fn take_message(channel: &UnixStream, kept: &mut Option<Kept>) -> io::Result<Option<UnixStream>> {
    let message = receive(channel)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    match message {
        ToKeeper::Keep { left } => {
            let descriptors = descriptors::receive(channel, left.descriptors())?;
            *kept = Some(Kept { left, descriptors });
        }
        ToKeeper::Snapshot => {
            let later = descriptors::receive(channel, 1)?.pop();
            if let (Some(kept), Some(later)) = (kept, later) {
                kept.descriptors[0] = later;
            }
        }
        ToKeeper::Forget => *kept = None,
        ToKeeper::GiveAway => {
            return Ok(descriptors::receive(channel, 1)?.pop().map(UnixStream::from));
        }
    }
    Ok(None)
}

/// Gives all to the keeper at the other end; whether it says that it has it.
fn give(connection: &UnixStream, listener: &UnixListener, kept: &Kept) -> bool {
    let give = || -> io::Result<()> {
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.set_write_timeout(Some(PATIENCE))?;
        let mut all = vec![listener.as_fd()];
        all.extend(kept.descriptors.iter().map(AsFd::as_fd));
        send(connection, &Response::HandOver { left: Box::new(kept.left.clone()) }, &all)?;
        (&*connection).read_exact(&mut [0])
    };
    let given = give();
    if let Err(error) = &given {
        tracing::error!(%error, "whoever wanted the data plane does not take it");
    }
    given.is_ok()
}

/// Takes all from the data process that listens; `None` where none does, or where what it has is of
/// another version: it has ended then.
fn take(socket: &Path) -> anyhow::Result<Option<(UnixListener, Kept)>> {
    let shown = socket.display();
    let failed = || format!("the data process on {shown} does not hand over");
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = match ask(socket) {
            Ok(answer) => answer,
            Err(error) if is_absent(&error) => return Ok(None),
            // It has just died, and its socket with it in a moment; or its keeper starts the next one.
            Err(error) if hung_up(&error) && Instant::now() < until => {
                tracing::debug!(%error, "the data process hung up: asking again");
                std::thread::sleep(AGAIN);
                continue;
            }
            Err(error) => return Err(error).with_context(failed),
        };
        return match answer {
            Answer::Taken(listener, kept) => {
                tracing::info!(socket = %shown, "taken over from the data process before");
                Ok(Some((listener, kept)))
            }
            // Of a release that has other hand-overs, or none.
            Answer::Refused(ErrorKind::Invalid, message) => {
                tracing::warn!(
                    message,
                    "cannot take over: the data process before is ended instead"
                );
                end(socket).with_context(failed)?;
                Ok(None)
            }
            Answer::Refused(_, message) => bail!("{}: {message}", failed()),
        };
    }
}

enum Answer {
    Taken(UnixListener, Kept),
    Refused(ErrorKind, String),
}

/// Asks whoever listens for all that it has.
fn ask(socket: &Path) -> io::Result<Answer> {
    let mut stream = connect(socket)?;
    write_frame(&mut stream, &Request::TakeOver { version: HANDOVER_VERSION })?;
    let left = match read_frame(&mut stream)?.ok_or(io::ErrorKind::UnexpectedEof)? {
        Response::HandOver { left } => *left,
        Response::Error { kind, message } => return Ok(Answer::Refused(kind, message)),
        _ => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer to another request"));
        }
    };
    let mut all = descriptors::receive(&stream, 1 + left.descriptors())?;
    let listener = all.remove(0).into();
    stream.write_all(&[0])?;
    // Without its word it goes on with all that, by itself.
    stream.read_exact(&mut [0])?;
    Ok(Answer::Taken(listener, Kept { left, descriptors: all }))
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    if !is_trusted(peer_credentials(&stream)?.uid) {
        let text = "what listens there is another user's";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A data process that was killed, as another one sees it: its socket takes connections until the
    /// kernel has closed it.
    #[test]
    fn whoever_dies_while_it_is_asked_is_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("dataplane.sock");
        assert!(take(&socket).unwrap().is_none(), "there is no socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let dying = std::thread::spawn(move || {
            // One is closed with what it asked unread, one that was read, and one never accepted.
            drop(listener.accept().unwrap());
            let (stream, _) = listener.accept().unwrap();
            let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
            assert!(matches!(asked, Request::TakeOver { version: HANDOVER_VERSION }), "{asked:?}");
            drop(stream);
            std::thread::sleep(3 * AGAIN);
        });
        assert!(take(&socket).unwrap().is_none());
        dying.join().unwrap();
        assert!(take(&socket).unwrap().is_none(), "a stale socket");
    }

    /// Of a release with another format: nothing of it is taken, and it has ended before anything begins.
    #[test]
    fn whoever_hands_over_in_another_format_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("dataplane.sock");
        let listener = UnixListener::bind(&socket).unwrap();
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
            std::thread::sleep(AGAIN);
            Instant::now()
        });
        assert!(take(&socket).unwrap().is_none());
        let taken = Instant::now();
        assert!(other.join().unwrap() <= taken, "it has ended first");
    }
}
