//! Entry point of the fuzz target for messages.

use self::frames::frames;
use crate::{Request, Response, Snapshot, encode_frame, read_frame};

#[path = "../../fuzz/frames.rs"]
mod frames;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/corpus_mutations.rs"]
mod corpus_mutations;

/// Reads messages of every kind.
pub fn ipc_frames(data: &[u8]) {
    frames::<Request>(data);
    frames::<Response>(data);
    frames::<Snapshot>(data);
}

#[cfg(test)]
mod tests {
    use super::corpus_mutations::run_corpus_and_mutations;
    use super::*;

    #[test]
    fn fuzz_targets_accept_corpora_and_mutations() {
        run_corpus_and_mutations("ipc_frames", ipc_frames);
    }
}
