//! Descriptors that go from one process to another over a unix socket (SCM_RIGHTS, unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::FdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The kernel passes at most 253 (SCM_MAX_FD) with one message.
const MAX_PER_MESSAGE: usize = 128;

/// Sends descriptors; the other side knows how many.
pub fn send(stream: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    for chunk in descriptors.chunks(MAX_PER_MESSAGE) {
        // Descriptors travel with a byte.
        if send_with(stream, &[0], chunk)? != 1 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

/// Sends bytes with at most 128 descriptors. Returns the number of bytes that were sent; the
/// descriptors went with the first one.
///
/// # Errors
/// `InvalidInput` if there are more descriptors, otherwise the error of sendmsg(2).
pub fn send_with(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PER_MESSAGE))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(rustix::io::retry_on_intr(|| {
        sendmsg(&socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
    })?)
}

/// Returns the inherited descriptor `number`. No child process inherits it.
///
/// # Errors
/// An error if the descriptor is not open, or is one of the standard streams.
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{number}");
    if number <= 2 || std::fs::read_link(path).is_err() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it is open, and nothing in this process has opened it: it was there at the start.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Returns the unix socket that this process has inherited as descriptor `number`. No child process
/// inherits it.
///
/// # Errors
/// An error if the descriptor is not open, is one of the standard streams, or is not a unix socket.
pub fn inherited_socket(number: i32) -> io::Result<UnixStream> {
    let fd = inherited(number)?;
    if rustix::net::sockopt::socket_domain(&fd)? != AddressFamily::UNIX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(fd.into())
}

/// Receives `count` descriptors, all closed on exec.
pub fn receive(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut descriptors = Vec::new();
    while descriptors.len() < count {
        let expected = (count - descriptors.len()).min(MAX_PER_MESSAGE);
        let before = descriptors.len();
        if receive_with(stream, &mut [0], &mut descriptors)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if descriptors.len() - before != expected {
            let text = format!("{} descriptors came, not {expected}", descriptors.len() - before);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
    }
    Ok(descriptors)
}

/// Receives bytes, and adds the descriptors that come with them, all closed on exec. Returns the
/// number of bytes, 0 at the end of the stream.
///
/// # Errors
/// The error of recvmsg(2).
pub fn receive_with(
    socket: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PER_MESSAGE))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let into = &mut [IoSliceMut::new(buffer)];
        recvmsg(&socket, into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    Ok(received.bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn descriptors_arrive_in_their_order() {
        let (a, b) = UnixStream::pair().unwrap();
        let files: Vec<_> = (0..300u32)
            .map(|number| {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&number.to_le_bytes()).unwrap();
                file.rewind().unwrap();
                file
            })
            .collect();
        let all: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send(&a, &all).unwrap();
        for (number, fd) in receive(&b, 300).unwrap().into_iter().enumerate() {
            let mut bytes = [0; 4];
            std::fs::File::from(fd).read_exact(&mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes) as usize, number);
        }
        drop(a);
        assert!(receive(&b, 1).is_err(), "nobody sends any more");
        assert_eq!(receive(&b, 0).unwrap().len(), 0);
    }
}
