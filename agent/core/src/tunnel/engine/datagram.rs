//! Handshake and control datagrams: the checks that they pass, the cheapest first, and the peer that
//! handles each.

use std::net::SocketAddr;
use std::time::Duration;

use super::{ELSEWHERE, Engine, UNVERIFIED};
use crate::drop::DropReason;
use crate::time::Time;
use crate::tunnel::counts::HandshakeResult;
use crate::tunnel::message::{
    Checked, CookieReply, Initiation, MAX_HANDSHAKE, Response, read_initiation_payload,
};
use crate::tunnel::noise::Responder;
use crate::tunnel::peer::Peer;
use crate::tunnel::shared::{Own, Shared};
use crate::wire::header::{Header, MessageType};

/// Responses to one initiation that are read without a rate limit: this number from the address that
/// the initiation was sent to, and the same number from all other addresses together.
const MAX_RESPONSE_TRIES: u32 = 4;

impl Engine {
    /// A handshake or control datagram (types 1, 2, 3 and 5) that came from `source`. What is wrong
    /// with it is counted. Its bytes are of no use afterwards.
    pub fn handle_datagram(&mut self, now: Time, source: SocketAddr, datagram: &mut [u8]) {
        let header = match Header::parse(datagram) {
            Ok(header) => header,
            Err(reason) => return self.shared.drops.add(reason),
        };
        let result = match header.kind {
            MessageType::Initiation => self.on_initiation(now, source, header, datagram),
            MessageType::Response => self.on_response(now, source, header, datagram),
            MessageType::CookieReply => self.on_cookie_reply(now, header, datagram),
            MessageType::Control => self.on_control(now, source, header, datagram),
            // A lane's: it should never have come here.
            MessageType::Data => Err(DropReason::OuterHeader),
        };
        match result {
            // There may be a first session now.
            Ok(()) => self.arm_tick(now),
            Err(reason) => {
                self.shared.drops.add(reason);
                if let Some(result) = handshake_result(reason) {
                    self.shared.counts.add(result);
                }
            }
        }
    }

    /// The cheapest checks come first: lengths, the first check (does the sender know us?), the
    /// second or a bucket (is it who it says, or are we idle?), and only then public keys.
    pub(super) fn on_initiation(
        &mut self,
        now: Time,
        source: SocketAddr,
        header: Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let message = Initiation::parse(header, datagram)?;
        // To whom it is.
        let own = self.shared.identities().position(|own| is_to(own, &message.checked));
        let own = own.ok_or(DropReason::HandshakeInvalid)?;
        // The scope stays, because a link-local address needs it.
        let mut answer_to = source;
        answer_to.set_port(message.listen_port);
        let random = &mut self.shared.random;
        let checked = (message.before_second, &message.second);
        if self.cookies.verify(source, answer_to, checked, now.mono, random) {
            // A replay is recognised before the limits, so that it uses up no token of its sender.
            if self.cookies.is_granted(&message.second) {
                return Err(DropReason::HandshakeReplayed);
            }
            if !self.may_cost_public_key_operation(answer_to, now.mono) {
                return Err(DropReason::HandshakeRateLimited);
            }
            self.cookies.grant(message.second);
        } else if !self.unverified.take(UNVERIFIED, now.mono) {
            self.send_cookie(now, source, answer_to, own, &message);
            return Err(DropReason::HandshakeCookieRequired);
        }

        let ephemeral = self.shared.secret();
        let mut payload = [0; MAX_HANDSHAKE];
        let own = self.shared.identities().nth(own).ok_or(DropReason::HandshakeInvalid)?;
        let to = *own.public();
        let (responder, length) =
            Responder::read(&own.identity, ephemeral, message.clear, message.noise, &mut payload)
                .map_err(|_| DropReason::HandshakeInvalid)?;
        let id = self.by_key.get(&responder.initiator);
        let peer = id.and_then(|id| self.peers.get_mut(id));
        let peer = peer.ok_or(DropReason::HandshakeUnknownPeer)?;
        let (timestamp, offer) = payload
            .get(..length)
            .and_then(read_initiation_payload)
            .ok_or(DropReason::HandshakeInvalid)?;
        let key = peer.key(&responder.initiator).ok_or(DropReason::HandshakeUnknownPeer)?;
        if timestamp <= key.last_timestamp {
            return Err(DropReason::HandshakeReplayed);
        }
        key.last_timestamp = timestamp;
        self.shared.memory.set_seen_timestamp(&responder.initiator, timestamp.wall());
        peer.on_initiation(now, answer_to, &message, (responder, to), offer, &mut self.shared)
    }

    /// Returns true if the sender of a valid cookie, who receives at `answer_to`, may cause a
    /// public-key operation. Only a sender that receives at a peer's endpoint can use up the limit
    /// of that endpoint.
    pub(super) fn may_cost_public_key_operation(
        &mut self,
        answer_to: SocketAddr,
        now: Duration,
    ) -> bool {
        match self.is_endpoint(answer_to) {
            true => self.verified_peers.take(answer_to, now),
            false => self.verified.take(answer_to, now) && self.elsewhere.take(ELSEWHERE, now),
        }
    }

    /// Returns true if a record names this address and port.
    pub(super) fn is_endpoint(&self, address: SocketAddr) -> bool {
        let peers = self.by_address.get(&address.ip().to_canonical()).into_iter().flatten();
        let mut peers = peers.filter_map(|id| self.peers.get(id));
        peers.any(|peer| peer.recorded_endpoint(address).is_some())
    }

    pub(super) fn send_cookie(
        &mut self,
        now: Time,
        source: SocketAddr,
        answer_to: SocketAddr,
        own: usize,
        message: &Initiation<'_>,
    ) {
        let random = &mut self.shared.random;
        let cookie = self.cookies.cookie(source, answer_to, now.mono, random);
        let mut salt = [0; _];
        random(&mut salt);
        let own = self.shared.identities().nth(own);
        let sealed =
            own.and_then(|own| own.keys.seal_cookie(&cookie, &salt, &message.checked.first));
        if let Some(sealed) = sealed {
            let reply = CookieReply { salt, sealed }.to_bytes(message.sender);
            self.shared.counts.add(HandshakeResult::CookieSent);
            self.shared.transmit(answer_to, reply);
        }
    }

    pub(super) fn on_response(
        &mut self,
        now: Time,
        source: SocketAddr,
        header: Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let message = Response::parse(header, datagram)?;
        if !self.shared.identities().any(|own| is_to(own, &message.checked)) {
            return Err(DropReason::HandshakeInvalid);
        }
        let owner = self.shared.owner(header.receiver);
        let peer = owner.and_then(|id| self.peers.get_mut(&id));
        let peer = peer.ok_or(DropReason::HandshakeInvalid)?;
        // Responses carry no second check (mac2). A few responses to each initiation are read;
        // further ones share the limit of initiations without a cookie.
        let tries = peer.response_tries(header.receiver, source.ip());
        if tries.ok_or(DropReason::HandshakeInvalid)? > MAX_RESPONSE_TRIES
            && !self.unverified.take(UNVERIFIED, now.mono)
        {
            return Err(DropReason::HandshakeRateLimited);
        }
        peer.on_response(now, header.receiver, &message, &mut self.shared)
    }

    pub(super) fn on_cookie_reply(
        &mut self,
        now: Time,
        header: Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let reply = CookieReply::parse(header, datagram)?;
        let (peer, shared) = self.owner(header.receiver).ok_or(DropReason::HandshakeInvalid)?;
        peer.on_cookie_reply(now, header.receiver, &reply, shared)
    }

    pub(super) fn on_control(
        &mut self,
        now: Time,
        source: SocketAddr,
        header: Header,
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        let Some((peer, shared)) = self.owner(header.receiver) else {
            self.unknown_session(now, source.ip());
            return Err(DropReason::UnknownSession);
        };
        peer.on_control(now, header.receiver, datagram, shared)
    }

    pub(super) fn owner(&mut self, index: u32) -> Option<(&mut Peer, &mut Shared)> {
        let peer = self.peers.get_mut(&self.shared.owner(index)?)?;
        Some((peer, &mut self.shared))
    }
}

/// Whether a message's first check says that it is to this identity.
fn is_to(own: &Own, checked: &Checked<'_>) -> bool {
    own.keys.verify_first_check(checked.message, &checked.first)
}

fn handshake_result(reason: DropReason) -> Option<HandshakeResult> {
    match reason {
        DropReason::HandshakeInvalid => Some(HandshakeResult::Invalid),
        DropReason::HandshakeUnknownPeer => Some(HandshakeResult::UnknownPeer),
        DropReason::HandshakeReplayed => Some(HandshakeResult::Replayed),
        DropReason::HandshakeRateLimited => Some(HandshakeResult::RateLimited),
        _ => None,
    }
}
