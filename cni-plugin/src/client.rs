//! Client of the agent's CNI socket.

use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use rustix::process::geteuid;
use skein_cni_protocol::frame::{self, FrameError};
use skein_cni_protocol::{Request, Response};

/// Sends `request` to the agent and returns its response. The descriptor `netns` accompanies the
/// first byte (SCM_RIGHTS). `timeout` applies to each wait for the socket: connecting, sending, and
/// each read of the response.
///
/// # Errors
/// [`FrameError::Io`] if no trusted process listens at `socket`, or if the connection fails; the
/// kind `WouldBlock` is a timeout. [`FrameError::TooLong`] and [`FrameError::Json`] if the request
/// or the response does not fit a frame.
pub fn send_request(
    socket: &Path,
    request: &Request,
    netns: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> Result<Response, FrameError> {
    let frame = frame::encode(request)?;
    let mut stream = open(socket, timeout)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = netns.as_slice();
    if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(rights)) {
        return Err(io::Error::other("the control buffer has no room for a descriptor").into());
    }
    let first = [IoSlice::new(&frame)];
    let sent = sendmsg(&stream, &first, &mut control, SendFlags::NOSIGNAL);
    let sent = sent.map_err(io::Error::from)?;
    stream.write_all(&frame[sent..])?;
    frame::read(&mut stream)
}

/// Connects to the agent's socket. Waits at most `timeout` if the agent's backlog is full.
fn open(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    connect_to(&open_trusted_file(path)?, timeout)
}

/// Opens the file of the socket (`O_PATH`), which must belong to root or to the user of this
/// process, because no other user may receive a pod's namespace or choose a pod's addresses.
///
/// The function does not use the credentials of the listener (SO_PEERCRED): rustix refuses the
/// process id 0, which the agent has if the runtime is in another PID namespace.
fn open_trusted_file(path: &Path) -> io::Result<OwnedFd> {
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let owner = rustix::fs::fstat(&file)?.st_uid;
    if owner != 0 && owner != geteuid().as_raw() {
        let text = format!(
            "the socket belongs to user {owner}, expected root or user {}",
            geteuid().as_raw()
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(file)
}

/// Connects to the socket of an open file, even if its path now names another file.
fn connect_to(file: &OwnedFd, timeout: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for direction in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(socket.as_fd(), direction, Some(timeout))?;
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn socket_of_another_user_gets_no_connection() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let open = || open(&path, Duration::from_secs(1));
        assert_eq!(open().unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        open().unwrap();
        drop(listener.accept().unwrap());
        std::os::unix::fs::chown(&path, Some(65_534), None).expect("this test needs root");
        assert_eq!(open().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "the plugin must not connect to the socket");
    }

    #[test]
    fn replaced_socket_gets_no_connection_after_the_check() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let agents = UnixListener::bind(&path).unwrap();
        let file = open_trusted_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let others = UnixListener::bind(&path).unwrap();
        connect_to(&file, Duration::from_secs(1)).unwrap();
        others.set_nonblocking(true).unwrap();
        assert!(others.accept().is_err(), "the new socket at the path must get no connection");
        agents.set_nonblocking(true).unwrap();
        agents.accept().unwrap();
    }
}
