//! Frames of the agent's CNI socket: the length of the document in bytes (u32, little endian) and a
//! JSON document of at most [`MAX_FRAME`] bytes.

use std::io::{self, Read};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::MAX_FRAME;

/// Error of writing or reading a frame.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The connection failed, timed out, or ended inside a frame.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The document has this number of bytes, more than [`MAX_FRAME`].
    #[error("document has {0} bytes, at most {MAX_FRAME} are allowed")]
    TooLong(usize),
    /// The document is not JSON of the expected type.
    #[error("document is not a valid message: {0}")]
    Json(#[from] serde_json::Error),
}

/// Returns `document` as the bytes of a frame, length included.
///
/// # Errors
/// [`FrameError::Json`] if the document cannot be serialised, [`FrameError::TooLong`] above
/// [`MAX_FRAME`] bytes.
pub fn encode<T: Serialize>(document: &T) -> Result<Vec<u8>, FrameError> {
    let json = serde_json::to_vec(document)?;
    let length = u32::try_from(json.len()).ok().filter(|_| json.len() <= MAX_FRAME);
    let length = length.ok_or(FrameError::TooLong(json.len()))?;
    Ok([&length.to_le_bytes()[..], &json].concat())
}

/// Returns the length of the document in bytes from the first four bytes of a frame.
///
/// # Errors
/// [`FrameError::TooLong`] above [`MAX_FRAME`] bytes.
pub fn length(header: [u8; 4]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length));
    }
    Ok(length)
}

/// Reads one frame. The function reads no byte beyond the frame.
///
/// # Errors
/// [`FrameError::Io`] if reading fails or the stream ends early, [`FrameError::TooLong`] above
/// [`MAX_FRAME`] bytes, [`FrameError::Json`] if the document is not a valid `T`.
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
    fn frames_round_trip_and_malformed_frames_are_errors() {
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
