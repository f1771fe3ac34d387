//! Descriptors that processes pass over unix sockets (SCM_RIGHTS, unix(7)) or inherit at exec.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::FdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Maximum number of descriptors in one message. The kernel's limit is 253 (SCM_MAX_FD).
const MAX_PER_MESSAGE: usize = 128;

/// Sends any number of descriptors, at most 128 per message. The receiver must know the number
/// ([`receive`]).
///
/// # Errors
/// The error of sendmsg(2), `WriteZero` if the kernel accepts no byte.
pub fn send(stream: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    for chunk in descriptors.chunks(MAX_PER_MESSAGE) {
        // The kernel delivers descriptors only with at least one byte.
        if send_with(stream, &[0], chunk)? != 1 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

/// Sends bytes with at most 128 descriptors, which accompany the first byte. Returns the number of
/// sent bytes.
///
/// # Errors
/// `InvalidInput` for more than 128 descriptors; otherwise the error of sendmsg(2).
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

/// Takes ownership of the descriptor `number`, which this process inherited at exec, and sets
/// FD_CLOEXEC. Call the function once per descriptor.
///
/// # Errors
/// `InvalidInput` if the descriptor is not open or is a standard stream; the error of fcntl(2).
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{number}");
    if number <= 2 || std::fs::read_link(path).is_err() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `number` is open (checked above) and has no other owner in this process: the parent
    // passed it at exec, and the function is called once per descriptor, at start.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Takes ownership of the unix socket `number`, which this process inherited at exec, as
/// [`inherited`].
///
/// # Errors
/// The errors of [`inherited`], and `InvalidInput` if the descriptor is not a unix socket.
pub fn inherited_socket(number: i32) -> io::Result<UnixStream> {
    let fd = inherited(number)?;
    if rustix::net::sockopt::socket_domain(&fd)? != AddressFamily::UNIX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(fd.into())
}

/// Receives `count` descriptors of [`send`] and sets FD_CLOEXEC.
///
/// # Errors
/// `UnexpectedEof` if the stream ends, `InvalidData` if a message has another number of descriptors
/// than expected, otherwise the error of recvmsg(2).
pub fn receive(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut descriptors = Vec::new();
    while descriptors.len() < count {
        let expected = (count - descriptors.len()).min(MAX_PER_MESSAGE);
        let before = descriptors.len();
        if receive_with(stream, &mut [0], &mut descriptors)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if descriptors.len() - before != expected {
            let number = descriptors.len() - before;
            let text = format!("received {number} descriptors, expected {expected}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
    }
    Ok(descriptors)
}

/// Receives bytes and appends the accompanying descriptors, with FD_CLOEXEC, to `descriptors`.
/// Returns the number of bytes, 0 at the end of the stream.
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
    fn descriptors_of_several_messages_arrive_in_order() {
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
        assert!(receive(&b, 1).is_err(), "the stream has ended");
        assert_eq!(receive(&b, 0).unwrap().len(), 0);
    }
}
