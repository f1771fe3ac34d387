//! The plugin's side of the socket.

use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use rustix::process::geteuid;

use crate::frame::{self, FrameError};
use crate::protocol::{Answer, Request};

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

/// Connecting waits where the agent's backlog is full: for as long as sending may. A pod's namespace and
/// whatever its addresses are come from nobody but root or this process's own user.
fn open(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    for direction in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(socket.as_fd(), direction, Some(limit))?;
    }
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let listener = socket_peercred(&socket)?.uid;
    if !listener.is_root() && listener != geteuid() {
        let text = "what listens there is another user's";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use rustix::process::Uid;

    use super::*;

    #[test]
    fn nobody_elses_listener_is_told_anything() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let listener = UnixListener::bind(&path).unwrap();
        open(&path, Duration::from_secs(1)).unwrap();
        drop(listener.accept().unwrap());
        // Whoever connects is told who has called listen(2). Rights are each thread's own.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let nobody = Uid::from_raw(65_534);
                let set = rustix::thread::set_thread_res_uid(nobody, nobody, nobody);
                set.expect("this test needs root");
                rustix::net::listen(&listener, 4).unwrap();
            });
        });
        let error = open(&path, Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        let (mut stream, _) = listener.accept().unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0, "it was told something");
    }
}
