//! Entry point of the fuzz target for messages.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Request, Response, Snapshot, encode_frame, read_frame};

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/near_corpus.rs"]
mod near_corpus;

/// Reads messages of every kind.
pub fn ipc_frames(data: &[u8]) {
    frames::<Request>(data);
    frames::<Response>(data);
    frames::<Snapshot>(data);
}

/// Reads frames up to the first malformed one. A message that was read can be written and read
/// again.
///
/// # Panics
/// If a message that was read cannot be written, or cannot be read again.
pub fn frames<T: Serialize + DeserializeOwned>(mut data: &[u8]) {
    while let Ok(Some(message)) = read_frame::<T>(&mut data) {
        let frame = encode_frame(&message).expect("a message that was read fits a frame");
        let again = read_frame::<T>(&mut &frame[..]);
        assert!(again.is_ok_and(|again| again.is_some()));
    }
}

#[cfg(test)]
mod tests {
    use super::near_corpus::run_near_corpus;
    use super::*;

    #[test]
    fn inputs_near_the_corpus_fail_no_assertion() {
        run_near_corpus("ipc_frames", ipc_frames);
    }
}
