//! Entry point of the fuzz target for messages.

use self::frames::frames;
use crate::{Request, Response, Snapshot, encode_frame, read_frame};

#[path = "../../fuzz/frames.rs"]
mod frames;

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

#[cfg(test)]
mod tests {
    use super::near_corpus::run_near_corpus;
    use super::*;

    #[test]
    fn inputs_near_the_corpus_fail_no_assertion() {
        run_near_corpus("ipc_frames", ipc_frames);
    }
}
