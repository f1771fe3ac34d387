//! Sessions for unit tests of several modules.

use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::session::{Cipher, SessionParams, TransportSecrets};

/// Returns the parameters of a session of peer 1 with one lane and the index 7 at both ends,
/// established at time 0.
pub(crate) fn session_params(initiator: bool) -> SessionParams {
    SessionParams {
        peer: PeerId(1),
        local_index: 7,
        remote_index: 7,
        cipher: Cipher::Aes256Gcm,
        local_lanes: 1,
        remote_lanes: 1,
        established: Time::default(),
        initiator,
        epoch: 0,
        ecn: false,
        secrets: TransportSecrets::new([1; 32], [2; 32]),
    }
}
