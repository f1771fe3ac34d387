//! Codec of the data plane's socket: each frame is the length of its body in bytes (u32, big
//! endian) and a JSON document.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

/// Maximum length of a frame's body in bytes. A snapshot of 5,000 nodes takes about 2 MiB.
pub const MAX_FRAME: usize = 64 << 20;

/// Size of the first buffer for a frame's body in bytes.
const FIRST_READ: usize = 64 << 10;

/// Writes `value` as one frame.
///
/// # Errors
/// An I/O error of `to`, or an error of [`encode_frame`].
pub fn write_frame<T: Serialize>(to: &mut impl Write, value: &T) -> io::Result<()> {
    to.write_all(&encode_frame(value)?)
}

/// Returns `value` as the bytes of one frame, length included. The buffer is wiped on drop.
///
/// # Errors
/// `value` cannot be serialised as JSON, or the body is longer than [`MAX_FRAME`].
pub fn encode_frame<T: Serialize>(value: &T) -> io::Result<Zeroizing<Vec<u8>>> {
    // The document may contain a private key, and a vector that grows leaves copies in freed
    // memory. The buffer is therefore allocated once, with its final size.
    let mut length = ByteCounter(0);
    serde_json::to_writer(&mut length, value)?;
    let mut frame = Zeroizing::new(Vec::with_capacity(4 + length.0));
    frame.extend([0; 4]);
    serde_json::to_writer(&mut *frame, value)?;
    let length = u32::try_from(frame.len() - 4).ok().filter(|&n| n as usize <= MAX_FRAME);
    let length = length.ok_or_else(|| too_long(frame.len() - 4))?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// A writer that counts bytes and stores none.
struct ByteCounter(usize);

impl Write for ByteCounter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads one frame. Returns `None` if the stream ends between two frames. Buffers are wiped.
///
/// # Errors
/// An I/O error of `from`, `UnexpectedEof` if the stream ends inside a frame, `InvalidData` if the
/// length is above [`MAX_FRAME`] or the body is not a JSON document of type `T`.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read(&mut length)? {
        0 => return Ok(None),
        n => from.read_exact(&mut length[n..])?,
    }
    let length = frame_length(length)?;
    // The buffer grows with the received bytes, because the announced length is not trusted. The
    // document may contain a private key, so each outgrown buffer is wiped.
    let mut body = Zeroizing::new(Vec::new());
    while body.len() < length {
        let start = body.len();
        let end = length.min((2 * start).max(FIRST_READ));
        let mut larger = Zeroizing::new(vec![0; end]);
        larger[..start].copy_from_slice(&body);
        from.read_exact(&mut larger[start..])?;
        body = larger;
    }
    Ok(Some(serde_json::from_slice(&body)?))
}

/// Returns the length of a frame's body in bytes from the first four bytes of the frame.
///
/// # Errors
/// `InvalidData` if the length is above [`MAX_FRAME`].
pub fn frame_length(prefix: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(prefix) as usize;
    if length > MAX_FRAME {
        return Err(too_long(length));
    }
    Ok(length)
}

fn too_long(length: usize) -> io::Error {
    let text = format!("frame has {length} bytes, at most {MAX_FRAME} are allowed");
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::message::Request;

    #[test]
    fn frames_round_trip_and_closed_stream_is_none() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &Request::Hello { version: 7 }).unwrap();
        write_frame(&mut bytes, &Request::Report { peers: true }).unwrap();
        let mut from = &bytes[..];
        assert!(matches!(read_frame(&mut from).unwrap(), Some(Request::Hello { version: 7 })));
        assert!(matches!(read_frame(&mut from).unwrap(), Some(Request::Report { peers: true })));
        assert!(read_frame::<Request>(&mut from).unwrap().is_none());
    }

    #[test]
    fn malformed_frames_are_errors() {
        assert!(read_frame::<Request>(&mut &[0xff, 0xff, 0xff, 0xff][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0, 0, 9, b'{'][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0, 0, 2, b'{', b'}'][..]).is_err());
    }

    #[test]
    fn frame_in_parts_is_read_whole() {
        for length in [0, 1, FIRST_READ - 2, FIRST_READ, 10 * FIRST_READ + 7] {
            let sent = "x".repeat(length);
            let frame = encode_frame(&sent).unwrap();
            // A socket may return a frame in several parts.
            let (head, tail) = frame.split_at(frame.len().min(100));
            assert_eq!(read_frame::<String>(&mut head.chain(tail)).unwrap(), Some(sent));
            assert!(read_frame::<String>(&mut &frame[..frame.len() - 1]).is_err(), "{length}");
        }
    }
}
