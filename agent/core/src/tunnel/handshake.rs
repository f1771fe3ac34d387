//! The handshakes of one peer, as initiator and as responder.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::drop::DropReason;
use crate::keys::PublicKey;
use crate::time::Time;
use crate::tunnel::cookie::{COOKIE_LIFETIME, MAC_LEN, Mac, mac2};
use crate::tunnel::counts::HandshakeResult;
use crate::tunnel::message::{
    CookieReply, MAX_HANDSHAKE, Response, ResponsePayload, TransportParams, header,
    initiation_clear, initiation_payload,
};
use crate::tunnel::noise::{Initiator, Responder, TransportSecrets};
use crate::tunnel::peer::{Peer, SessionEntry};
use crate::tunnel::saved::SavedSession;
use crate::tunnel::session::{Cipher, Session, SessionParams};
use crate::tunnel::shared::Shared;
use crate::tunnel::timers::{MAX_RETRY_INTERVAL, MIN_RETRY_INTERVAL, UNREACHABLE_TIMEOUT};
use crate::wire::header::MessageType;

/// A handshake that this node has requested. Its first initiation may still have to wait for
/// [`MIN_RETRY_INTERVAL`].
pub(crate) struct PendingHandshake {
    /// Deadline of the next initiation (monotonic clock).
    pub(crate) retry_at: Duration,
    interval: Duration,
    /// Time of the first initiation (monotonic clock).
    first_sent: Option<Duration>,
    /// Number of initiations sent.
    tries: usize,
    sent: Option<SentInitiation>,
}

/// The last initiation of a pending handshake, which awaits its response.
struct SentInitiation {
    /// Local index that the response must name.
    index: u32,
    keys: KeyPair,
    /// MTU of this node that the initiation carries, inner bytes.
    mtu: u16,
    noise: Initiator,
    destination: SocketAddr,
    /// The message with mac1 at its end and without mac2.
    message: Vec<u8>,
    mac1: Mac,
    /// True if a cookie reply has caused a retransmission.
    retransmitted: bool,
    /// Number of responses from the address of `destination`. Each that is read costs public-key
    /// operations.
    tries: u32,
    /// Number of responses from other addresses.
    tries_elsewhere: u32,
}

/// The static public keys of a handshake.
#[derive(Clone, Copy)]
pub(crate) struct KeyPair {
    /// Key of this node.
    pub(crate) own: PublicKey,
    /// Key of the peer.
    pub(crate) remote: PublicKey,
}

/// The values on which both nodes agree in a handshake; a session is made of them.
struct Agreement {
    local_index: u32,
    remote_index: u32,
    cipher: Cipher,
    /// True if this node sent the initiation.
    initiator: bool,
    /// Transport parameters of the peer.
    theirs: TransportParams,
    secrets: TransportSecrets,
    /// The peer's static public key.
    remote_key: PublicKey,
    /// Address that the handshake proves; `None` if the peer's record does not name it.
    endpoint: Option<SocketAddr>,
    /// MTU of this node that the handshake carried, inner bytes.
    told_mtu: u16,
}

impl PendingHandshake {
    /// Returns true if the peer has answered no initiation for [`UNREACHABLE_TIMEOUT`].
    pub(crate) fn is_unanswered(&self, now: Duration) -> bool {
        self.unanswered_at().is_some_and(|at| at <= now)
    }

    /// Returns the time at which [`Self::is_unanswered`] becomes true.
    pub(crate) fn unanswered_at(&self) -> Option<Duration> {
        Some(self.first_sent? + UNREACHABLE_TIMEOUT)
    }

    fn sent_mut(&mut self, index: u32) -> Option<&mut SentInitiation> {
        self.sent.as_mut().filter(|sent| sent.index == index)
    }
}

impl Peer {
    /// Starts a handshake at once, or [`MIN_RETRY_INTERVAL`] after the last initiation.
    pub(crate) fn start_handshake(&mut self, now: Time, shared: &mut Shared) {
        let allowed = self.last_initiation.map_or(now.mono, |last| last + MIN_RETRY_INTERVAL);
        let interval = MIN_RETRY_INTERVAL;
        let retry_at = allowed.max(now.mono);
        self.pending =
            Some(PendingHandshake { retry_at, interval, first_sent: None, tries: 0, sent: None });
        if retry_at == now.mono {
            self.send_initiation(now, shared);
        } else {
            shared.arm(retry_at);
        }
    }

    /// Gives up the initiation that is due for a retry. Sends another one to the next endpoint if
    /// the handshake is still `requested`, and ends the handshake otherwise.
    pub(crate) fn retry_handshake(&mut self, now: Time, requested: bool, shared: &mut Shared) {
        let Some(pending) = &mut self.pending else { return };
        if let Some(sent) = pending.sent.take() {
            shared.free_index(sent.index);
            shared.counts.add(HandshakeResult::Timeout);
            // If the record has changed meanwhile, the next initiation goes to its first endpoint.
            if self.handshake_endpoint() == Some(sent.destination) {
                self.attempt = self.attempt.wrapping_add(1);
            }
        }
        if requested {
            self.send_initiation(now, shared);
        } else {
            self.pending = None;
        }
    }

    /// Ends the pending handshake and frees its index.
    pub(crate) fn abandon_handshake(&mut self, shared: &mut Shared) {
        if let Some(sent) = self.pending.take().and_then(|pending| pending.sent) {
            shared.free_index(sent.index);
        }
    }

    /// Returns the peer's key to which the pending initiation is addressed.
    pub(crate) fn pending_key(&self) -> Option<&PublicKey> {
        Some(&self.pending.as_ref()?.sent.as_ref()?.keys.remote)
    }

    /// Selects the positions of this node's and of the peer's key for the next initiation. While
    /// keys are rotated, either node may know an old record of the other. Each pair of keys is
    /// therefore tried at every endpoint of a peer that does not answer.
    fn next_keys(&self, now: Time, tries: usize, shared: &Shared) -> (usize, usize) {
        if self.has_current() && self.live.unreachable_reason(now.mono).is_none() {
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
        let interval = (pending.interval + shared.jitter(pending.interval)).min(MAX_RETRY_INTERVAL);
        pending.retry_at = now.mono + interval;
        pending.interval = (pending.interval * 3 / 2).min(MAX_RETRY_INTERVAL);
        pending.first_sent.get_or_insert(now.mono);
        shared.arm(pending.retry_at);
        self.last_initiation = Some(now.mono);

        let index = shared.allocate_index(self.id);
        let clear = initiation_clear(index, shared.listen_port);
        let payload = initiation_payload(shared.timestamp(now), shared.params);
        let ephemeral = shared.secret();
        let mut message = clear.to_vec();
        let own = shared.identities().nth(own).unwrap_or(&shared.own);
        let started = Initiator::start(
            &own.identity,
            &remote.public,
            ephemeral,
            &clear,
            &payload,
            &mut message,
        );
        let keys = KeyPair { own: *own.public(), remote: remote.public };
        // Fails for a public key of low order, with which no handshake can succeed.
        let Ok(noise) = started else {
            shared.free_index(index);
            shared.counts.add(HandshakeResult::Invalid);
            self.pending = None;
            return;
        };
        let mac1 = remote.mac_keys.mac1(&message);
        message.extend(mac1);
        let sent = SentInitiation {
            index,
            keys,
            mtu: shared.params.mtu,
            noise,
            destination,
            message,
            mac1,
            retransmitted: false,
            tries: 0,
            tries_elsewhere: 0,
        };
        shared.counts.add(HandshakeResult::Initiated);
        shared.transmit(destination, with_mac2(&self.cookie, &sent.message, now));
        pending.sent = Some(sent);
    }

    /// Handles a cookie reply, which means that the peer is under load. Retransmits the initiation
    /// with mac2.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] if no initiation with this index is pending, or if the
    /// cookie does not decrypt.
    pub(crate) fn on_cookie_reply(
        &mut self,
        now: Time,
        index: u32,
        reply: &CookieReply,
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let sent = self.pending.as_mut().and_then(|pending| pending.sent_mut(index));
        let sent = sent.ok_or(DropReason::HandshakeInvalid)?;
        let key = self.keys.iter().find(|key| key.public == sent.keys.remote);
        let cookie =
            key.and_then(|key| key.mac_keys.open_cookie(&reply.salt, &reply.sealed, &sent.mac1));
        self.cookie = Some((cookie.ok_or(DropReason::HandshakeInvalid)?, now.mono));
        shared.counts.add(HandshakeResult::CookieReceived);
        // At most one retransmission: otherwise a peer could make this node send without end.
        if !std::mem::replace(&mut sent.retransmitted, true) {
            let (destination, message) = (sent.destination, sent.message.clone());
            shared.transmit(destination, with_mac2(&self.cookie, &message, now));
        }
        Ok(())
    }

    /// Counts a response from `source` to the initiation with this index. Returns the number of
    /// responses so far from the address that the initiation was sent to, or from all other
    /// addresses if `source` is one of these; `None` if no such initiation is pending.
    pub(crate) fn response_tries(&mut self, index: u32, source: IpAddr) -> Option<u32> {
        let sent = self.pending.as_mut()?.sent_mut(index)?;
        let is_peer = sent.destination.ip().to_canonical() == source.to_canonical();
        let tries = if is_peer { &mut sent.tries } else { &mut sent.tries_elsewhere };
        *tries = tries.saturating_add(1);
        Some(*tries)
    }

    /// Handles the response to the initiation with this index, and installs the session.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] if no such initiation is pending, if the Noise message does
    /// not decrypt, or if the payload is malformed or names a cipher that this node does not offer.
    pub(crate) fn on_response(
        &mut self,
        now: Time,
        index: u32,
        response: &Response<'_>,
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let sent = self.pending.as_mut().and_then(|pending| pending.sent_mut(index));
        let sent = sent.ok_or(DropReason::HandshakeInvalid)?;
        let mut payload = [0; MAX_HANDSHAKE];
        let (length, secrets) = sent
            .noise
            .finish(response.noise, &mut payload)
            .map_err(|_| DropReason::HandshakeInvalid)?;
        let payload = payload.get(..length).and_then(ResponsePayload::read);
        let payload = payload.filter(|payload| shared.params.ciphers.contains(payload.cipher));
        let payload = payload.ok_or(DropReason::HandshakeInvalid)?;
        let (keys, endpoint, told_mtu) = (sent.keys, Some(sent.destination), sent.mtu);
        let agreement = Agreement {
            local_index: index,
            remote_index: payload.index,
            cipher: payload.cipher,
            initiator: true,
            theirs: payload.params,
            secrets,
            remote_key: keys.remote,
            endpoint,
            told_mtu,
        };
        let session = self.session(now, agreement, shared)?;
        // The session owns the index from here on, so the pending handshake must not free it.
        self.pending = None;
        self.view.mtu = Some(payload.params.mtu);
        shared.counts.add(HandshakeResult::CompletedInitiator);
        // If both nodes have initiated at the same time, the session of the node with the greater
        // key wins, so that exactly one of the two renews it.
        let yields = keys.own < keys.remote;
        let entry = SessionEntry::new(session, endpoint, keys.remote, Some(keys.own), told_mtu);
        self.install_current(now, entry, yields, shared);
        self.refresh_state(now);
        Ok(())
    }

    /// Handles an authentic initiation that is newer than all earlier initiations: installs a
    /// session and sends the response to `source`, the address at which the peer listens.
    /// `handshake` contains the key of this node to which the initiation is addressed, and the
    /// transport parameters of the peer.
    ///
    /// # Errors
    /// [`DropReason::HandshakeInvalid`] if the response or the session cannot be made.
    pub(crate) fn on_initiation(
        &mut self,
        now: Time,
        source: SocketAddr,
        remote_index: u32,
        handshake: ReceivedHandshake,
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let ReceivedHandshake { responder, own, theirs } = handshake;
        let Some(cipher) = theirs.ciphers.choose(shared.params.ciphers) else {
            self.no_common_cipher = true;
            self.refresh_state(now);
            shared.counts.add(HandshakeResult::NoCommonCipher);
            shared.drops.add(DropReason::HandshakeInvalid);
            return Ok(());
        };
        let index = shared.allocate_index(self.id);
        let remote = responder.initiator;
        let endpoint = self.known_endpoint(source);
        let told_mtu = shared.params.mtu;
        let payload = ResponsePayload { index, params: shared.params, cipher };
        let mut message = header(MessageType::Response, remote_index).to_vec();
        let session = responder
            .reply(&payload.to_bytes(), &mut message)
            .map_err(|_| DropReason::HandshakeInvalid)
            .and_then(|secrets| {
                let agreement = Agreement {
                    local_index: index,
                    remote_index,
                    cipher,
                    initiator: false,
                    theirs,
                    secrets,
                    remote_key: remote,
                    endpoint,
                    told_mtu,
                };
                self.session(now, agreement, shared)
            });
        let session = session.inspect_err(|_| shared.free_index(index))?;
        if let Some(key) = self.key(&remote) {
            message.extend(key.mac_keys.mac1(&message));
        }

        // If both nodes have initiated at the same time, the node with the lesser key abandons its
        // handshake. Both respond, so that one handshake completes even if only the messages of the
        // yielding node arrive.
        let sent = self.pending.as_ref().and_then(|pending| pending.sent.as_ref());
        let yields = sent.is_some_and(|sent| sent.keys.own < remote);
        if yields && self.defers(now) {
            self.abandon_handshake(shared);
        }
        self.view.mtu = Some(theirs.mtu);
        let entry = SessionEntry::new(session, endpoint, remote, Some(own), told_mtu);
        self.install_next(now, entry, shared);
        self.refresh_state(now);
        shared.transmit(source, message);
        Ok(())
    }

    fn session(
        &self,
        now: Time,
        agreement: Agreement,
        shared: &mut Shared,
    ) -> Result<Session, DropReason> {
        let key = self.keys.iter().find(|key| key.public == agreement.remote_key);
        let timestamp = key.map(|key| key.last_timestamp).unwrap_or_default();
        let ecn = shared.params.ecn && agreement.theirs.ecn;
        let slot = shared.store.insert(&SavedSession {
            public_key: agreement.remote_key,
            epoch: 0,
            established: now.mono,
            local_index: agreement.local_index,
            remote_index: agreement.remote_index,
            cipher: agreement.cipher,
            local_lanes: shared.params.lanes,
            remote_lanes: agreement.theirs.lanes,
            initiator: agreement.initiator,
            endpoint: agreement.endpoint,
            mtu: agreement.theirs.mtu,
            ecn,
            told_mtu: agreement.told_mtu,
            timestamp,
            secrets: agreement.secrets.clone(),
        });
        let session = Session::new(SessionParams {
            peer: self.id,
            local_index: agreement.local_index,
            remote_index: agreement.remote_index,
            cipher: agreement.cipher,
            local_lanes: shared.params.lanes,
            remote_lanes: agreement.theirs.lanes,
            established: now,
            initiator: agreement.initiator,
            epoch: 0,
            ecn,
            secrets: agreement.secrets,
        });
        session.map(|session| session.with_slot(slot)).map_err(|_| DropReason::HandshakeInvalid)
    }
}

/// An initiation that has been read and proved authentic.
pub(crate) struct ReceivedHandshake {
    pub(crate) responder: Responder,
    /// Key of this node to which the initiation is addressed.
    pub(crate) own: PublicKey,
    /// Transport parameters of the peer.
    pub(crate) theirs: TransportParams,
}

/// Appends mac2 to a message that ends with mac1: zeros if there is no cookie of at most
/// [`COOKIE_LIFETIME`].
fn with_mac2(cookie: &Option<(Mac, Duration)>, message: &[u8], now: Time) -> Vec<u8> {
    let is_fresh = |(_, at): &&(Mac, Duration)| now.mono.saturating_sub(*at) < COOKIE_LIFETIME;
    let mac2 = match cookie.as_ref().filter(is_fresh) {
        Some((cookie, _)) => mac2(cookie, message),
        None => [0; MAC_LEN],
    };
    [message, &mac2].concat()
}
