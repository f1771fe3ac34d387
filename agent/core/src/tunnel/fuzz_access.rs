//! What the fuzzers need of the tunnel's private parts.

use crate::tunnel::cookie::{MAC_LEN, ReceiverKeys};
use crate::tunnel::message::{
    Accept, Control, CookieReply, Initiation, Response, initiation_payload, read_initiation_payload,
};
use crate::wire::header::{Header, MessageType};

/// Makes the first check of a handshake message right again for the owner of `public_key`.
pub(crate) fn repair_first_check(public_key: &[u8; 32], datagram: &mut [u8]) {
    let tail = match Header::parse(datagram) {
        Ok(Header { kind: MessageType::Initiation, .. }) => 2 * MAC_LEN,
        Ok(Header { kind: MessageType::Response, .. }) => MAC_LEN,
        _ => return,
    };
    let Some(end) = datagram.len().checked_sub(tail) else { return };
    let (message, rest) = datagram.split_at_mut(end);
    if let Some(check) = rest.get_mut(..MAC_LEN) {
        check.copy_from_slice(&ReceiverKeys::new(public_key).first_check(message));
    }
}

/// Reads `data` as everything that handshakes and control messages are made of.
pub(crate) fn check_payloads(data: &[u8]) {
    if let Some(message) = Control::read(data) {
        let bytes = message.to_bytes();
        assert_eq!(Control::read(&bytes), Some(message));
        assert!(data.starts_with(&bytes));
    }
    if let Some((at, offer)) = read_initiation_payload(data) {
        let bytes = initiation_payload(at, offer);
        assert_eq!(read_initiation_payload(&bytes), Some((at, offer)));
    }
    if let Some(accept) = Accept::read(data) {
        assert_eq!(Accept::read(&accept.to_bytes()), Some(accept));
    }
    let Ok(header) = Header::parse(data) else { return };
    if let Ok(message) = Initiation::parse(header, data) {
        let parts = message.clear.len() + message.noise.len() + 2 * MAC_LEN;
        assert_eq!(parts, data.len());
        assert_eq!(message.checked.message.len() + MAC_LEN, message.before_second.len());
    }
    if let Ok(message) = Response::parse(header, data) {
        assert_eq!(message.checked.message.len() + MAC_LEN, data.len());
        assert!(message.noise.len() < message.checked.message.len());
    }
    if let Ok(reply) = CookieReply::parse(header, data)
        && header.kind == MessageType::CookieReply
    {
        assert_eq!(reply.to_bytes(header.receiver), data);
    }
}
