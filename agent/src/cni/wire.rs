//! Frames of `skein_cni_protocol` on a tokio socket, with one descriptor (SCM_RIGHTS).

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{SendFlags, send};
use serde::Serialize;
use serde::de::DeserializeOwned;
use skein_cni_protocol::frame::{self, FrameError};
use skein_sys::descriptors::receive_with;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Reads one frame and the first descriptor that came with it; further descriptors are closed.
///
/// # Errors
/// [`FrameError`] if the connection ends or fails, if the frame is too long, or if it does not
/// parse.
pub(super) async fn receive<T: DeserializeOwned>(
    stream: &UnixStream,
) -> Result<(T, Option<OwnedFd>), FrameError> {
    let mut descriptor = None;
    let mut header = [0; 4];
    fill(stream, &mut header, &mut descriptor).await?;
    let mut document = vec![0; frame::length(header)?];
    fill(stream, &mut document, &mut descriptor).await?;
    Ok((serde_json::from_slice(&document)?, descriptor))
}

/// Writes one frame.
///
/// # Errors
/// An I/O error if the document is too long for a frame, or if the connection fails.
pub(super) async fn reply<T: Serialize>(stream: &UnixStream, document: &T) -> io::Result<()> {
    let frame = frame::encode(document).map_err(io::Error::other)?;
    let mut rest = &frame[..];
    while !rest.is_empty() {
        let write = || Ok(send(stream, rest, SendFlags::NOSIGNAL)?);
        let sent = stream.async_io(Interest::WRITABLE, write).await?;
        rest = &rest[sent..];
    }
    Ok(())
}

async fn fill(
    stream: &UnixStream,
    mut buffer: &mut [u8],
    descriptor: &mut Option<OwnedFd>,
) -> io::Result<()> {
    while !buffer.is_empty() {
        let read = || {
            let mut received = Vec::new();
            let length = receive_with(stream, buffer, &mut received)?;
            for fd in received {
                // A descriptor after the first one is dropped, which closes it.
                descriptor.get_or_insert(fd);
            }
            Ok(length)
        };
        match stream.async_io(Interest::READABLE, read).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => buffer = &mut buffer[length..],
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_cni_protocol::{Command, Request, Response, VERSION};
    use skein_sys::descriptors::send_with;
    use std::io::Write;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::os::unix::net::UnixStream as Blocking;

    fn pair() -> (Blocking, UnixStream) {
        let (plugin, agent) = Blocking::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        (plugin, UnixStream::from_std(agent).unwrap())
    }

    fn frame(document: &[u8]) -> Vec<u8> {
        [&u32::try_from(document.len()).unwrap().to_le_bytes()[..], document].concat()
    }

    #[tokio::test]
    async fn request_in_pieces_is_read_with_its_descriptor() {
        let (mut plugin, agent) = pair();
        let request = Request { protocol: VERSION, command: Command::Status };
        let bytes = frame(&serde_json::to_vec(&request).unwrap());
        let file = tempfile::tempfile().unwrap();
        send_with(&plugin, &bytes[..1], &[file.as_fd()]).unwrap();
        let thread = std::thread::spawn(move || {
            for byte in &bytes[1..] {
                plugin.write_all(&[*byte]).unwrap();
            }
            plugin
        });
        let (received, descriptor) = receive::<Request>(&agent).await.unwrap();
        assert_eq!(received, request);
        let identity = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(identity(descriptor.unwrap().as_fd()), identity(file.as_fd()));
        let mut plugin = thread.join().unwrap();
        reply(&agent, &Response::Done).await.unwrap();
        let mut answer = [0; 10];
        io::Read::read_exact(&mut plugin, &mut answer).unwrap();
        assert_eq!(&answer, b"\x06\0\0\0\"done\"");
    }

    #[tokio::test]
    async fn bad_frames_are_errors_and_stray_descriptors_are_closed() {
        let cases: [(&[u8], &str); 4] = [
            (b"\x05\0\0\0{}", "end of file"),
            (b"\xff\xff\xff\x7f", "at most"),
            (b"\x02\0\0\0{}", "not a valid message"),
            (b"\x03\0\0\0\xff\xfe{", "not a valid message"),
        ];
        for (bytes, expected) in cases {
            let (plugin, agent) = pair();
            let (mut reader, writer) = io::pipe().unwrap();
            let writers = [writer.as_fd(), writer.as_fd(), writer.as_fd()];
            send_with(&plugin, bytes, &writers).unwrap();
            drop((plugin, writer));
            let error = receive::<Request>(&agent).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            drop(agent);
            let mut nothing = Vec::new();
            // Blocks forever if a writer is still open.
            io::Read::read_to_end(&mut reader, &mut nothing).unwrap();
        }
    }
}
