//! Entry points of the fuzz targets for the keeper's messages and for uevents.

use serde::Serialize;
use serde::de::DeserializeOwned;
use skein_ipc::{encode_frame, read_frame};

use crate::handover::{Answer, StartMessage, ToKeeper};
use crate::vm_generation::is_new_generation;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/near_corpus.rs"]
mod near_corpus;

/// Reads messages between a keeper and its data process. A message that was read can be written and
/// read again.
pub fn ipc_frames(data: &[u8]) {
    frames::<StartMessage>(data);
    frames::<ToKeeper>(data);
    frames::<Answer>(data);
}

fn frames<T: Serialize + DeserializeOwned>(mut data: &[u8]) {
    while let Ok(Some(message)) = read_frame::<T>(&mut data) {
        let frame = encode_frame(&message).expect("a message that was read fits a frame");
        let again = read_frame::<T>(&mut &frame[..]);
        assert!(again.is_ok_and(|again| again.is_some()));
    }
}

/// Reads a uevent. A message that counts as an announcement contains one.
pub fn uevents(message: &[u8]) {
    let key = b"NEW_VMGENID=1";
    let named = message.windows(key.len()).any(|window| window == key);
    assert!(named || !is_new_generation(message));
}

#[cfg(test)]
mod tests {
    use super::near_corpus::run_near_corpus;
    use super::*;

    #[test]
    fn inputs_near_the_corpus_fail_no_assertion() {
        run_near_corpus("ipc_frames", ipc_frames);
        run_near_corpus("uevents", uevents);
    }
}
