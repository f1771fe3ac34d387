//! Access of the fuzz entry points to private parts of the tunnel.

use crate::keys::PublicKey;
use crate::tunnel::cookie::{MAC_LEN, MacKeys};
use crate::tunnel::message::{
    Control, CookieReply, Initiation, Response, ResponsePayload, initiation_payload,
    read_initiation_payload,
};
use crate::wire::header::{Header, MessageType};

/// Recomputes mac1 of a handshake message for the owner of `public_key`.
pub(crate) fn repair_mac1(public_key: &PublicKey, datagram: &mut [u8]) {
    let tail = match Header::parse(datagram) {
        Ok(Header { kind: MessageType::Initiation, .. }) => 2 * MAC_LEN,
        Ok(Header { kind: MessageType::Response, .. }) => MAC_LEN,
        _ => return,
    };
    let Some(end) = datagram.len().checked_sub(tail) else { return };
    let (message, rest) = datagram.split_at_mut(end);
    if let Some(check) = rest.get_mut(..MAC_LEN) {
        check.copy_from_slice(&MacKeys::new(public_key).mac1(message));
    }
}

/// Parses `data` as every message and payload. Encoding a valid one must restore it.
pub(crate) fn check_payloads(data: &[u8]) {
    if let Some(message) = Control::read(data) {
        let bytes = message.to_bytes();
        assert_eq!(Control::read(&bytes), Some(message));
        assert!(data.starts_with(&bytes));
    }
    if let Some((at, params)) = read_initiation_payload(data) {
        let bytes = initiation_payload(at, params);
        assert_eq!(read_initiation_payload(&bytes), Some((at, params)));
    }
    if let Some(accept) = ResponsePayload::read(data) {
        assert_eq!(ResponsePayload::read(&accept.to_bytes()), Some(accept));
    }
    let Ok(header) = Header::parse(data) else { return };
    if let Ok(message) = Initiation::parse(header, data) {
        let parts = message.clear.len() + message.noise.len() + 2 * MAC_LEN;
        assert_eq!(parts, data.len());
        assert_eq!(message.mac1.message.len() + MAC_LEN, message.mac2_input.len());
    }
    if let Ok(message) = Response::parse(header, data) {
        assert_eq!(message.mac1.message.len() + MAC_LEN, data.len());
        assert!(message.noise.len() < message.mac1.message.len());
    }
    if let Ok(reply) = CookieReply::parse(header, data)
        && header.kind == MessageType::CookieReply
    {
        assert_eq!(reply.to_bytes(header.receiver), data);
    }
}
