//! Frames: a length in four bytes, little endian, then a JSON document.

use std::io::{self, Read};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::MAX_FRAME;

/// A frame that is none.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The other side went away, or took too long.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// More than [`MAX_FRAME`] bytes.
    #[error("a document of {0} bytes: at most {MAX_FRAME} are taken")]
    TooLong(usize),
    /// Not the document that is expected.
    #[error("a document that makes no sense: {0}")]
    Json(#[from] serde_json::Error),
}

/// The bytes of a frame.
pub fn encode<T: Serialize>(document: &T) -> Result<Vec<u8>, FrameError> {
    let json = serde_json::to_vec(document)?;
    let length = u32::try_from(json.len()).ok().filter(|_| json.len() <= MAX_FRAME);
    let length = length.ok_or(FrameError::TooLong(json.len()))?;
    Ok([&length.to_le_bytes()[..], &json].concat())
}

/// The length that a frame's first four bytes announce.
pub fn length(header: [u8; 4]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    Ok(length)
}

/// Reads a frame.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<T, FrameError> {
    let mut header = [0; 4];
    from.read_exact(&mut header)?;
    let mut json = vec![0; length(header)?];
    from.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{CniError, Response};

    #[test]
    fn frames_round_trip_and_bad_ones_are_errors() {
        let refusal = CniError { code: 11, msg: "later".into(), details: String::new() };
        for answer in [Response::Done, Response::Refused(refusal)] {
            let frame = encode(&answer).unwrap();
            assert_eq!(read::<Response>(&mut &frame[..]).unwrap(), answer);
            for short in 0..frame.len() {
                assert!(matches!(read::<Response>(&mut &frame[..short]), Err(FrameError::Io(_))));
            }
        }
        assert!(matches!(length([0xff; 4]), Err(FrameError::TooLong(_))));
        assert!(matches!(read::<Response>(&mut &b"\x02\0\0\0{}"[..]), Err(FrameError::Json(_))));
        assert!(matches!(encode(&"x".repeat(MAX_FRAME)), Err(FrameError::TooLong(_))));
    }
}
