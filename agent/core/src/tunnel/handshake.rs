//! A peer's handshakes, from both ends.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::drop::DropReason;
use crate::time::Time;
use crate::tunnel::cookie::{COOKIE_LIFE, MAC_LEN, Mac, second_check};
use crate::tunnel::counts::HandshakeResult;
use crate::tunnel::message::{
    Accept, CookieReply, Initiation, MAX_HANDSHAKE, Offer, Response, header, initiation_clear,
    initiation_payload,
};
use crate::tunnel::noise::{Initiator, KEY_LEN, Responder, Split};
use crate::tunnel::peer::{Peer, Slot};
use crate::tunnel::saved::SavedSession;
use crate::tunnel::session::{Cipher, Session, SessionParams};
use crate::tunnel::shared::Shared;
use crate::tunnel::timers::{RETRY_FIRST, RETRY_LAST, UNREACHABLE_AFTER};
use crate::wire::header::MessageType;

/// A handshake that this node has started, or will as soon as it may.
pub(crate) struct Pending {
    /// When to send, again or at all.
    pub(crate) retry_at: Duration,
    interval: Duration,
    /// When the first initiation went out.
    first_sent: Option<Duration>,
    /// How many were sent.
    tries: usize,
    sent: Option<Sent>,
}

/// An initiation that waits for its answer.
struct Sent {
    index: u32,
    /// The key of this node that it begins with.
    own: [u8; KEY_LEN],
    /// The key of the peer that it is to.
    remote: [u8; KEY_LEN],
    /// MTU of this node that the handshake carries, inner bytes.
    mtu: u16,
    noise: Initiator,
    destination: SocketAddr,
    /// The message up to its second check, and the first check at the end of that.
    message: Vec<u8>,
    first_check: Mac,
    /// Whether a cookie has made it go out once more.
    repeated: bool,
    /// Number of responses from the address of `destination`. Each that is read costs public-key
    /// operations.
    tries: u32,
    /// Number of responses from other addresses.
    tries_elsewhere: u32,
}

impl Pending {
    /// Whether so long went without an answer that the peer counts as unreachable.
    pub(crate) fn unanswered(&self, now: Duration) -> bool {
        self.hopeless_at().is_some_and(|at| at <= now)
    }

    /// When it will be so.
    pub(crate) fn hopeless_at(&self) -> Option<Duration> {
        Some(self.first_sent? + UNREACHABLE_AFTER)
    }
}

impl Peer {
    /// Starts a handshake: now, or as soon as the last initiation is a second old.
    pub(crate) fn start_handshake(&mut self, now: Time, shared: &mut Shared) {
        let allowed = self.last_initiation.map_or(now.mono, |last| last + RETRY_FIRST);
        let interval = RETRY_FIRST;
        let retry_at = allowed.max(now.mono);
        self.pending = Some(Pending { retry_at, interval, first_sent: None, tries: 0, sent: None });
        if retry_at == now.mono {
            self.send_initiation(now, shared);
        } else {
            shared.arm(retry_at);
        }
    }

    /// The pending handshake is due. Where nobody wants it any more, that was it.
    pub(crate) fn retry_handshake(&mut self, now: Time, wanted: bool, shared: &mut Shared) {
        let Some(pending) = &mut self.pending else { return };
        let sent = pending.sent.take();
        if let Some(sent) = sent {
            shared.free_index(sent.index);
            shared.counts.add(HandshakeResult::Timeout);
            // Unless the record has changed meanwhile: then its first endpoint has its turn.
            if self.handshake_endpoint() == Some(sent.destination) {
                self.attempt = self.attempt.wrapping_add(1);
            }
        }
        if wanted {
            self.send_initiation(now, shared);
        } else {
            self.pending = None;
        }
    }

    pub(crate) fn abandon_handshake(&mut self, shared: &mut Shared) {
        if let Some(sent) = self.pending.take().and_then(|pending| pending.sent) {
            shared.free_index(sent.index);
        }
    }

    /// The peer's key that the initiation under way is to.
    pub(crate) fn pending_key(&self) -> Option<&[u8; KEY_LEN]> {
        Some(&self.pending.as_ref()?.sent.as_ref()?.remote)
    }

    /// With which of this node's keys to begin, and to which of the peer's: numbers of them. A peer that
    /// does not answer may have an old record of this node, or this node one of the peer, while keys
    /// change: then each pair has its turn at every endpoint.
    fn next_keys(&self, now: Time, tries: usize, shared: &Shared) -> (usize, usize) {
        if self.has_current() && self.live.trouble(now.mono).is_none() {
            return (0, 0);
        }
        let own = shared.identities().count();
        let turn = tries / self.endpoints.len().max(1);
        (turn % own, turn / own % self.keys.len().max(1))
    }

    fn send_initiation(&mut self, now: Time, shared: &mut Shared) {
        let destination = self.handshake_endpoint();
        let tries = self.pending.as_ref().map_or(0, |pending| pending.tries);
        let (own, remote) = self.next_keys(now, tries, shared);
        let remote = self.keys.get(remote);
        let (Some(pending), Some(destination), Some(remote)) =
            (&mut self.pending, destination, remote)
        else {
            self.pending = None;
            return;
        };
        pending.tries += 1;
        let interval = (pending.interval + shared.jitter(pending.interval)).min(RETRY_LAST);
        pending.retry_at = now.mono + interval;
        pending.interval = (pending.interval * 3 / 2).min(RETRY_LAST);
        pending.first_sent.get_or_insert(now.mono);
        shared.arm(pending.retry_at);
        self.last_initiation = Some(now.mono);

        let index = shared.allocate_index(self.id);
        let clear = initiation_clear(index, shared.listen_port);
        let payload = initiation_payload(shared.timestamp(now), shared.offer);
        let ephemeral = shared.secret();
        let mut message = clear.to_vec();
        let own = shared.identities().nth(own).unwrap_or(&shared.own);
        let begun = Initiator::start(
            &own.identity,
            &remote.public,
            ephemeral,
            &clear,
            &payload,
            &mut message,
        );
        let own = *own.public();
        // Fails on a public key of low order, which no handshake can ever reach.
        let Ok(noise) = begun else {
            shared.free_index(index);
            shared.counts.add(HandshakeResult::Invalid);
            self.pending = None;
            return;
        };
        let first_check = remote.checks.first_check(&message);
        message.extend(first_check);
        let (remote, mtu) = (remote.public, shared.offer.mtu);
        let sent = Sent {
            index,
            own,
            remote,
            mtu,
            noise,
            destination,
            message,
            first_check,
            repeated: false,
            tries: 0,
            tries_elsewhere: 0,
        };
        shared.counts.add(HandshakeResult::Initiated);
        shared.transmit(destination, with_second_check(&self.cookie, &sent.message, now));
        pending.sent = Some(sent);
    }

    /// The peer is under load and sent a cookie instead of its response.
    pub(crate) fn on_cookie_reply(
        &mut self,
        now: Time,
        index: u32,
        reply: &CookieReply,
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let sent = self.pending.as_mut().and_then(|pending| pending.sent.as_mut());
        let sent = sent.filter(|sent| sent.index == index).ok_or(DropReason::HandshakeInvalid)?;
        let key = self.keys.iter().find(|key| key.public == sent.remote);
        let cookie = key
            .and_then(|key| key.checks.open_cookie(&reply.salt, &reply.sealed, &sent.first_check));
        self.cookie = Some((cookie.ok_or(DropReason::HandshakeInvalid)?, now.mono));
        shared.counts.add(HandshakeResult::CookieReceived);
        // Once: a peer that sends cookies on end would have us send on end.
        if !std::mem::replace(&mut sent.repeated, true) {
            let (destination, message) = (sent.destination, sent.message.clone());
            shared.transmit(destination, with_second_check(&self.cookie, &message, now));
        }
        Ok(())
    }

    /// Counts a response from `source` to the initiation with this index. Returns the number of
    /// responses so far from the address that the initiation was sent to, or from all other addresses
    /// if `source` is one of these; `None` if no such initiation is pending.
    pub(crate) fn response_tries(&mut self, index: u32, source: IpAddr) -> Option<u32> {
        let sent = self.pending.as_mut()?.sent.as_mut().filter(|sent| sent.index == index)?;
        let is_peer = sent.destination.ip().to_canonical() == source.to_canonical();
        let tries = if is_peer { &mut sent.tries } else { &mut sent.tries_elsewhere };
        *tries = tries.saturating_add(1);
        Some(*tries)
    }

    /// The peer has answered this node's handshake.
    pub(crate) fn on_response(
        &mut self,
        now: Time,
        index: u32,
        response: &Response<'_>,
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let sent = self.pending.as_mut().and_then(|pending| pending.sent.as_mut());
        let sent = sent.filter(|sent| sent.index == index).ok_or(DropReason::HandshakeInvalid)?;
        let mut payload = [0; MAX_HANDSHAKE];
        let (length, split) = sent
            .noise
            .finish(response.noise, &mut payload)
            .map_err(|_| DropReason::HandshakeInvalid)?;
        let accept = payload.get(..length).and_then(Accept::read);
        let accept = accept.filter(|accept| shared.offer.ciphers.contains(accept.cipher));
        let accept = accept.ok_or(DropReason::HandshakeInvalid)?;
        let destination = sent.destination;
        let (own, remote, told_mtu) = (sent.own, sent.remote, sent.mtu);
        let indices = (index, accept.index);
        let session = self.session(
            now,
            indices,
            (accept.cipher, true),
            accept.offer,
            split,
            (remote, Some(destination)),
            told_mtu,
            shared,
        )?;
        // The index is the session's from now on.
        self.pending = None;
        self.view.mtu = Some(accept.offer.mtu);
        shared.counts.add(HandshakeResult::CompletedInitiator);
        // Both nodes have started at once. The session of the node with the greater key wins, so
        // that exactly one of the two renews it.
        let yields = own < remote;
        let slot = Slot::new(session, Some(destination), remote, Some(own), told_mtu);
        self.install_current(now, slot, yields, shared);
        self.refresh_state(now);
        Ok(())
    }

    /// The peer has started a handshake to the identity `own`, authentic and new. `source` is where it
    /// listens.
    pub(crate) fn on_initiation(
        &mut self,
        now: Time,
        source: SocketAddr,
        initiation: &Initiation<'_>,
        (responder, own): (Responder, [u8; KEY_LEN]),
        offer: Offer,
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let Some(cipher) = offer.ciphers.choose(shared.offer.ciphers) else {
            self.no_common_cipher = true;
            self.refresh_state(now);
            shared.counts.add(HandshakeResult::NoCommonCipher);
            shared.drops.add(DropReason::HandshakeInvalid);
            return Ok(());
        };
        let index = shared.allocate_index(self.id);
        let remote = responder.initiator;
        let endpoint = self.known_endpoint(source);
        let accept = Accept { index, offer: shared.offer, cipher };
        let mut message = header(MessageType::Response, initiation.sender).to_vec();
        let session = responder
            .reply(&accept.to_bytes(), &mut message)
            .map_err(|_| DropReason::HandshakeInvalid)
            .and_then(|split| {
                let indices = (index, initiation.sender);
                self.session(
                    now,
                    indices,
                    (cipher, false),
                    offer,
                    split,
                    (remote, endpoint),
                    shared.offer.mtu,
                    shared,
                )
            });
        let session = session.inspect_err(|_| shared.free_index(index))?;
        if let Some(key) = self.key(&remote) {
            message.extend(key.checks.first_check(&message));
        }

        // Both have started at once: the greater key goes on as initiator, the other yields. It
        // still answers, so nothing is lost where the yielding one's messages are those that arrive.
        let sent = self.pending.as_ref().and_then(|pending| pending.sent.as_ref());
        let yields = sent.is_some_and(|sent| sent.own < remote);
        if yields && self.defers(now) {
            self.abandon_handshake(shared);
        }
        self.view.mtu = Some(offer.mtu);
        let slot = Slot::new(session, endpoint, remote, Some(own), shared.offer.mtu);
        self.install_next(now, slot, shared);
        self.refresh_state(now);
        shared.transmit(source, message);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn session(
        &self,
        now: Time,
        (local_index, remote_index): (u32, u32),
        (cipher, initiator): (Cipher, bool),
        theirs: Offer,
        secret: Split,
        (remote, endpoint): ([u8; KEY_LEN], Option<SocketAddr>),
        told_mtu: u16,
        shared: &mut Shared,
    ) -> Result<Session, DropReason> {
        let key = self.keys.iter().find(|key| key.public == remote);
        let timestamp = key.map(|key| key.last_timestamp).unwrap_or_default();
        let ecn = shared.offer.ecn && theirs.ecn;
        let kept = shared.memory.keep(&SavedSession {
            public_key: remote,
            life: 0,
            established: now.mono,
            local_index,
            remote_index,
            cipher,
            local_lanes: shared.offer.lanes,
            remote_lanes: theirs.lanes,
            initiator,
            endpoint,
            mtu: theirs.mtu,
            ecn,
            told_mtu,
            timestamp,
            secret: secret.clone(),
        });
        let session = Session::new(SessionParams {
            peer: self.id,
            local_index,
            remote_index,
            cipher,
            local_lanes: shared.offer.lanes,
            remote_lanes: theirs.lanes,
            established: now,
            initiator,
            life: 0,
            ecn,
            secret,
        });
        session.map(|session| session.kept_by(kept)).map_err(|_| DropReason::HandshakeInvalid)
    }
}

fn with_second_check(cookie: &Option<(Mac, Duration)>, message: &[u8], now: Time) -> Vec<u8> {
    let fresh = |(_, at): &&(Mac, Duration)| now.mono.saturating_sub(*at) < COOKIE_LIFE;
    let second = match cookie.as_ref().filter(fresh) {
        Some((cookie, _)) => second_check(cookie, message),
        None => [0; MAC_LEN],
    };
    [message, &second].concat()
}
