//! The codec: one JSON document a frame, each frame led by its length (u32, big endian).

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

/// The longest frame accepted, in bytes: a snapshot of 5,000 nodes takes about 2 MiB.
pub const MAX_FRAME: usize = 64 << 20;

/// So much of a frame's body is made room for at first.
const FIRST_READ: usize = 64 << 10;

/// Writes one frame.
pub fn write_frame<T: Serialize>(to: &mut impl Write, value: &T) -> io::Result<()> {
    to.write_all(&encode_frame(value)?)
}

/// The bytes of one frame.
pub fn encode_frame<T: Serialize>(value: &T) -> io::Result<Zeroizing<Vec<u8>>> {
    // It may hold a private key. A vector that grew would leave copies of it in memory.
    let mut length = Count(0);
    serde_json::to_writer(&mut length, value)?;
    let mut frame = Zeroizing::new(Vec::with_capacity(4 + length.0));
    frame.extend([0; 4]);
    serde_json::to_writer(&mut *frame, value)?;
    let length = u32::try_from(frame.len() - 4).ok().filter(|&n| n as usize <= MAX_FRAME);
    let length = length.ok_or_else(|| io::Error::other("frame too long"))?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// Counts what is written to it.
struct Count(usize);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads one frame; `None` where the other side has closed between two frames.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read(&mut length)? {
        0 => return Ok(None),
        n => from.read_exact(&mut length[n..])?,
    }
    let length = frame_length(length)?;
    // Read as it comes rather than reserve what a stranger claims. It may hold a private key: what
    // it outgrows is wiped, too.
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

/// The body's length that a frame's first four bytes announce.
pub fn frame_length(prefix: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(prefix) as usize;
    if length > MAX_FRAME {
        let text = format!("frame of {length} bytes is longer than {MAX_FRAME}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(length)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::message::Request;

    #[test]
    fn frames_round_trip_and_end_cleanly() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &Request::Hello { version: 7 }).unwrap();
        write_frame(&mut bytes, &Request::Report { peers: true }).unwrap();
        let mut from = &bytes[..];
        assert!(matches!(read_frame(&mut from).unwrap(), Some(Request::Hello { version: 7 })));
        assert!(matches!(read_frame(&mut from).unwrap(), Some(Request::Report { peers: true })));
        assert!(read_frame::<Request>(&mut from).unwrap().is_none());
    }

    #[test]
    fn bad_frames_are_errors() {
        assert!(read_frame::<Request>(&mut &[0xff, 0xff, 0xff, 0xff][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0, 0, 9, b'{'][..]).is_err());
        assert!(read_frame::<Request>(&mut &[0, 0, 0, 2, b'{', b'}'][..]).is_err());
    }

    #[test]
    fn frames_of_every_length_arrive_whole() {
        for length in [0, 1, FIRST_READ - 2, FIRST_READ, 10 * FIRST_READ + 7] {
            let sent = "x".repeat(length);
            let frame = encode_frame(&sent).unwrap();
            // As a socket gives it: in parts.
            let (head, tail) = frame.split_at(frame.len().min(100));
            assert_eq!(read_frame::<String>(&mut head.chain(tail)).unwrap(), Some(sent));
            assert!(read_frame::<String>(&mut &frame[..frame.len() - 1]).is_err(), "{length}");
        }
    }
}
