//! Entry points of the fuzz targets for the keeper's messages and for uevents.

use skein_ipc::{encode_frame, read_frame};

use self::frames::frames;
use crate::handover::{Answer, StartMessage, ToKeeper};
use crate::vm_generation::is_new_generation;

#[path = "../../fuzz/frames.rs"]
mod frames;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/corpus_mutations.rs"]
mod corpus_mutations;

/// Reads messages between a keeper and its data process. A message that was read can be written and
/// read again.
pub fn ipc_frames(data: &[u8]) {
    frames::<StartMessage>(data);
    frames::<ToKeeper>(data);
    frames::<Answer>(data);
}

/// Reads a uevent. A message that counts as an announcement contains one.
pub fn uevents(message: &[u8]) {
    let key = b"NEW_VMGENID=1";
    let named = message.windows(key.len()).any(|window| window == key);
    assert!(named || !is_new_generation(message));
}

#[cfg(test)]
mod tests {
    use super::corpus_mutations::run_corpus_and_mutations;
    use super::*;

    #[test]
    fn fuzz_targets_accept_corpora_and_mutations() {
        run_corpus_and_mutations("ipc_frames", ipc_frames);
        run_corpus_and_mutations("uevents", uevents);
    }
}
