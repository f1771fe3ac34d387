//! Filter for handshake messages. A lane applies the filter before a message reaches the engine:
//! the layout and mac1 can be checked without the engine and without a public-key operation.

use std::sync::Arc;

use crate::drop::DropReason;
use crate::tunnel::cookie::MacKeys;
use crate::tunnel::message::{CookieReply, Initiation, Mac1Input, Response};
use crate::wire::header::{Header, MessageType};

/// Filter that checks the layout of handshake messages and their mac1. It has the mac1 keys of this
/// node's identities. The default filter has no identity and refuses every initiation and response.
#[derive(Clone, Default)]
pub struct HandshakeFilter(Vec<Arc<MacKeys>>);

impl HandshakeFilter {
    pub(crate) fn new(identities: impl Iterator<Item = Arc<MacKeys>>) -> Self {
        Self(identities.collect())
    }

    /// Checks the layout of a handshake message, and mac1 of an initiation or response. `header` is
    /// the parsed header of `datagram`. The cost is one HMAC of the message for each identity.
    /// Messages of other types pass.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] if the layout is invalid or mac1 belongs to no identity of
    /// this node.
    pub fn check(&self, header: Header, datagram: &[u8]) -> Result<(), DropReason> {
        let mac1 = match header.kind {
            MessageType::Initiation => Initiation::parse(header, datagram)?.mac1,
            MessageType::Response => Response::parse(header, datagram)?.mac1,
            MessageType::CookieReply => return CookieReply::parse(header, datagram).map(drop),
            MessageType::Data | MessageType::Control => return Ok(()),
        };
        match self.0.iter().any(|own| is_addressed_to(own, &mac1)) {
            true => Ok(()),
            false => Err(DropReason::HandshakeInvalid),
        }
    }
}

/// Returns true if mac1 proves that the sender knows the public key of the receiver with these
/// keys.
pub(crate) fn is_addressed_to(own: &MacKeys, mac1: &Mac1Input<'_>) -> bool {
    own.verify_mac1(mac1.message, &mac1.mac1)
}
