//! Handling of handshake and control datagrams: the checks that each must pass, the cheapest first,
//! and the choice of the peer that it concerns.

use std::net::SocketAddr;
use std::time::Duration;

use super::{Engine, NO_COOKIE_RATE, NON_PEER_RATE, PER_KEY_RATE};
use crate::drop::DropReason;
use crate::time::Time;
use crate::tunnel::cookie::Mac2Check;
use crate::tunnel::counts::HandshakeResult;
use crate::tunnel::handshake::ReceivedHandshake;
use crate::tunnel::handshake_filter::is_addressed_to;
use crate::tunnel::message::{
    CookieReply, Initiation, MAX_HANDSHAKE, Response, read_initiation_payload,
};
use crate::tunnel::noise::Responder;
use crate::tunnel::peer::Peer;
use crate::tunnel::shared::{LocalIdentity, Shared};
use crate::wire::header::{Header, MessageType};

/// Number of received responses to one initiation that this node reads without a rate limit. The
/// number applies to responses from the address that the initiation was sent to, and a second time
/// to responses from all other addresses together.
const MAX_UNLIMITED_RESPONSES: u32 = 4;

impl Engine {
    /// Handles a handshake or control datagram (message types 1, 2, 3 and 5) that came from
    /// `source`. The caller gives data datagrams to the lanes. A datagram that is refused is
    /// counted ([`Engine::drops`]). The bytes of `datagram` are undefined afterwards.
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
            // Data belongs to a lane; the caller must not pass it here.
            MessageType::Data => Err(DropReason::OuterHeader),
        };
        match result {
            // The datagram may have created the first session, which needs the tick.
            Ok(()) => self.arm_tick(now),
            Err(reason) => {
                self.shared.drops.add(reason);
                if let Some(result) = handshake_result(reason) {
                    self.shared.counts.add(result);
                }
            }
        }
    }

    /// Checks an initiation, cheap checks first: the lengths, and then mac1, which proves that the
    /// sender knows this node's public key. An initiation with a valid mac2 then takes a token of
    /// the limits by address; any other initiation takes a token of the bucket for initiations
    /// without a cookie. Public-key operations follow last.
    fn on_initiation(
        &mut self,
        now: Time,
        source: SocketAddr,
        header: Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let message = Initiation::parse(header, datagram)?;
        let is_own = |own: &LocalIdentity| is_addressed_to(&own.mac_keys, &message.mac1);
        let own = self.shared.identities().position(is_own);
        let own = own.ok_or(DropReason::HandshakeInvalid)?;
        // The scope id is kept, because a link-local address needs it.
        let mut answer_to = source;
        answer_to.set_port(message.listen_port);
        let check = Mac2Check { source, answer_to, input: message.mac2_input, mac2: &message.mac2 };
        if self.cookies.verify(check, now.mono, &mut self.shared.random) {
            // A replay is recognised before the limits, so that it uses up no token of its sender.
            if self.cookies.is_granted(&message.mac2) {
                return Err(DropReason::HandshakeReplayed);
            }
            if !self.try_acquire_public_key_operation(answer_to, now.mono) {
                return Err(DropReason::HandshakeRateLimited);
            }
            self.cookies.grant(message.mac2);
        } else if !self.no_cookie_bucket.try_acquire(NO_COOKIE_RATE, now.mono) {
            self.send_cookie(now, source, answer_to, own, &message);
            return Err(DropReason::HandshakeCookieRequired);
        }

        let ephemeral = self.shared.secret();
        let mut payload = [0; MAX_HANDSHAKE];
        let own = self.shared.identities().nth(own).ok_or(DropReason::HandshakeInvalid)?;
        let own_key = *own.public();
        let (responder, length) =
            Responder::read(&own.identity, ephemeral, message.clear, message.noise, &mut payload)
                .map_err(|_| DropReason::HandshakeInvalid)?;
        let id = self.by_key.get(&responder.initiator);
        let peer = id.and_then(|id| self.peers.get_mut(id));
        let peer = peer.ok_or(DropReason::HandshakeUnknownPeer)?;
        let (timestamp, theirs) = payload
            .get(..length)
            .and_then(read_initiation_payload)
            .ok_or(DropReason::HandshakeInvalid)?;
        let key = peer.key(&responder.initiator).ok_or(DropReason::HandshakeUnknownPeer)?;
        if timestamp <= key.last_timestamp {
            return Err(DropReason::HandshakeReplayed);
        }
        key.last_timestamp = timestamp;
        let is_allowed = key.handshakes.try_acquire(PER_KEY_RATE, now.mono);
        self.shared.store.set_seen_timestamp(&responder.initiator, timestamp.wall());
        if !is_allowed {
            return Err(DropReason::HandshakeRateLimited);
        }
        let handshake = ReceivedHandshake { responder, own: own_key, theirs };
        peer.on_initiation(now, answer_to, message.sender, handshake, &mut self.shared)
    }

    /// Takes the tokens for one public-key operation. Returns false if a limit is exceeded. The
    /// caller has checked that the sender has a valid cookie and therefore receives at `answer_to`.
    /// Only a sender that receives at a peer's endpoint can use up the limit of that endpoint.
    fn try_acquire_public_key_operation(&mut self, answer_to: SocketAddr, now: Duration) -> bool {
        match self.is_endpoint(answer_to) {
            true => self.peer_endpoint_limiter.try_acquire(answer_to, now),
            false => {
                self.source_limiter.try_acquire(answer_to, now)
                    && self.non_peer_bucket.try_acquire(NON_PEER_RATE, now)
            }
        }
    }

    /// Returns true if a record names this address and port.
    fn is_endpoint(&self, address: SocketAddr) -> bool {
        let peers = self.by_address.get(&address.ip().to_canonical()).into_iter().flatten();
        let mut peers = peers.filter_map(|id| self.peers.get(id));
        peers.any(|peer| peer.recorded_endpoint(address).is_some())
    }

    /// Sends a cookie reply to an initiation. `own` is the position of the identity to which the
    /// initiation is addressed.
    fn send_cookie(
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
            own.and_then(|own| own.mac_keys.seal_cookie(&cookie, &salt, &message.mac1.mac1));
        if let Some(sealed) = sealed {
            let reply = CookieReply { salt, sealed }.to_bytes(message.sender);
            self.shared.counts.add(HandshakeResult::CookieSent);
            self.shared.transmit(answer_to, reply);
        }
    }

    fn on_response(
        &mut self,
        now: Time,
        source: SocketAddr,
        header: Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let message = Response::parse(header, datagram)?;
        let is_own = |own: &LocalIdentity| is_addressed_to(&own.mac_keys, &message.mac1);
        if !self.shared.identities().any(is_own) {
            return Err(DropReason::HandshakeInvalid);
        }
        let owner = self.shared.owner(header.receiver);
        let peer = owner.and_then(|id| self.peers.get_mut(&id));
        let peer = peer.ok_or(DropReason::HandshakeInvalid)?;
        // Responses carry no mac2. A few responses to each initiation are read; further ones share
        // the limit of initiations without a cookie.
        let tries = peer.response_tries(header.receiver, source.ip());
        if tries.ok_or(DropReason::HandshakeInvalid)? > MAX_UNLIMITED_RESPONSES
            && !self.no_cookie_bucket.try_acquire(NO_COOKIE_RATE, now.mono)
        {
            return Err(DropReason::HandshakeRateLimited);
        }
        peer.on_response(now, header.receiver, &message, &mut self.shared)
    }

    fn on_cookie_reply(
        &mut self,
        now: Time,
        header: Header,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let reply = CookieReply::parse(header, datagram)?;
        let (peer, shared) = self.owner(header.receiver).ok_or(DropReason::HandshakeInvalid)?;
        peer.on_cookie_reply(now, header.receiver, &reply, shared)
    }

    fn on_control(
        &mut self,
        now: Time,
        source: SocketAddr,
        header: Header,
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        let Some((peer, shared)) = self.owner(header.receiver) else {
            self.on_unknown_session(now, source.ip());
            return Err(DropReason::UnknownSession);
        };
        peer.on_control(now, header.receiver, datagram, shared)
    }

    /// Returns the peer that owns a local index.
    fn owner(&mut self, index: u32) -> Option<(&mut Peer, &mut Shared)> {
        let peer = self.peers.get_mut(&self.shared.owner(index)?)?;
        Some((peer, &mut self.shared))
    }
}

/// Returns the handshake result to count for a dropped message.
fn handshake_result(reason: DropReason) -> Option<HandshakeResult> {
    match reason {
        DropReason::HandshakeInvalid => Some(HandshakeResult::Invalid),
        DropReason::HandshakeUnknownPeer => Some(HandshakeResult::UnknownPeer),
        DropReason::HandshakeReplayed => Some(HandshakeResult::Replayed),
        DropReason::HandshakeRateLimited => Some(HandshakeResult::RateLimited),
        _ => None,
    }
}
