//! The plugin's side of the socket.

use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use rustix::process::geteuid;
use skein_cni_protocol::frame::{self, FrameError};
use skein_cni_protocol::{Answer, Request};

/// Asks the agent; each step may take `limit`. The descriptor goes with the first byte.
pub fn ask(
    socket: &Path,
    request: &Request,
    netns: Option<BorrowedFd<'_>>,
    limit: Duration,
) -> Result<Answer, FrameError> {
    let frame = frame::encode(request)?;
    let mut stream = open(socket, limit)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = netns.as_slice();
    if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(rights)) {
        return Err(io::Error::other("no room for a descriptor").into());
    }
    let first = [IoSlice::new(&frame)];
    let sent = sendmsg(&stream, &first, &mut control, SendFlags::NOSIGNAL);
    let sent = sent.map_err(io::Error::from)?;
    stream.write_all(&frame[sent..])?;
    frame::read(&mut stream)
}

/// Connecting waits where the agent's backlog is full: for as long as sending may. The socket has to be root's or
/// this process's own user's: nobody else gets a pod's namespace, or says what its addresses are.
fn open(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for direction in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(socket.as_fd(), direction, Some(limit))?;
    }
    // Not the credentials of who listens: they are of no use (rustix refuses a process id of 0) where the
    // runtime has a PID namespace in which the agent is not.
    let owner = std::fs::metadata(path)?.uid();
    if owner != 0 && owner != geteuid().as_raw() {
        let text = "the socket is another user's";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn nobody_elses_listener_is_told_anything() {
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
        assert!(listener.accept().is_err(), "it is not even connected to");
    }
}
