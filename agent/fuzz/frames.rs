//! Property of framed messages that the fuzz targets of several crates check. Each crate includes
//! this file by its path, beside its imports of `encode_frame` and `read_frame`.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{encode_frame, read_frame};

/// Reads frames up to the first malformed one. A message that was read can be written and read
/// again.
///
/// # Panics
/// If a message that was read cannot be written, or cannot be read again.
pub(super) fn frames<T: Serialize + DeserializeOwned>(mut data: &[u8]) {
    while let Ok(Some(message)) = read_frame::<T>(&mut data) {
        let frame = encode_frame(&message).expect("a message that was read fits a frame");
        let again = read_frame::<T>(&mut &frame[..]);
        assert!(again.is_ok_and(|again| again.is_some()));
    }
}
