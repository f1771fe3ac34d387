//! One peer: its sessions, and what follows from the traffic through them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::drop::DropReason;
use crate::route::PeerId;
use crate::time::Time;
use crate::tunnel::cookie::{Mac, ReceiverKeys};
use crate::tunnel::counts::HandshakeResult;
use crate::tunnel::handshake::Pending;
use crate::tunnel::liveness::{Liveness, Trouble};
use crate::tunnel::message::{Control, Timestamp};
use crate::tunnel::noise::KEY_LEN;
use crate::tunnel::path::Path;
use crate::tunnel::replay::ReplayWindow;
use crate::tunnel::saved::{Kept, SavedSession};
use crate::tunnel::session::{COUNTER_REKEY, Session, SessionParams};
use crate::tunnel::shared::Shared;
use crate::tunnel::timers::{
    CONFIRM_WITHIN, REKEY_AFTER, RENEWED_AT_ONCE, RESPONDER_REKEY_AFTER, RETRY_SLACK, SESSION_LIFE,
    WANTED_FOR,
};
use crate::wire::header::{CONTROL_LANE, Flags, OVERHEAD};

/// Most sessions with one peer at a time; the oldest give way.
pub(crate) const MAX_SESSIONS: usize = 4;

/// A padded ping is no longer than this, in bytes of plaintext: jumbo frames'.
const MAX_PROBE: u16 = 9000;

/// How a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// No session: nothing was sent yet, or the last one ended unused.
    Idle,
    /// A handshake is under way.
    Connecting,
    /// A session, and answers come.
    Established,
    /// A session or a handshake, but no answer.
    Unreachable,
}

/// What lanes and reports need to know of a peer.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// Its identity.
    pub public_key: [u8; 32],
    /// Address that data is sent to: in a session, one at which the peer has answered a handshake;
    /// without a session, the first one of the record.
    pub endpoint: Option<SocketAddr>,
    /// The session to send with; the peer is known to have it too.
    pub current: Option<Arc<Session>>,
    /// A session that the peer has started: the one to send with as soon as it is confirmed
    /// ([`Session::is_confirmed`]), and where to.
    pub next: Option<(Arc<Session>, Option<SocketAddr>)>,
    /// Every session that data may come in, the current one too.
    pub receive: Vec<Arc<Session>>,
    /// How it is.
    pub state: PeerState,
    /// Why it is not well, where it is not.
    pub trouble: Option<Trouble>,
    /// Smoothed round-trip time.
    pub round_trip: Option<Duration>,
    /// When something authentic last came, by the monotonic clock.
    pub last_received: Option<Duration>,
    /// The MTU that the peer named in its last handshake, in bytes.
    pub mtu: Option<u16>,
    /// The longest plaintext that the path and the peer take, in bytes, where that is less than this node's
    /// MTU.
    pub path: Option<u16>,
}

/// A session as the engine keeps it.
pub(crate) struct Slot {
    pub(crate) session: Arc<Session>,
    /// Where the other end was when it was made.
    pub(crate) endpoint: Option<SocketAddr>,
    /// The peer's key that it was made with.
    remote: [u8; KEY_LEN],
    /// This node's; unknown of a session that was taken up.
    own: Option<[u8; KEY_LEN]>,
    /// MTU of this node that the session's handshake carried, inner bytes.
    told_mtu: u16,
    window: ReplayWindow,
    seen_tx: u64,
    seen_rx: u64,
}

impl Slot {
    pub(crate) fn new(
        session: Session,
        endpoint: Option<SocketAddr>,
        remote: [u8; KEY_LEN],
        own: Option<[u8; KEY_LEN]>,
        told_mtu: u16,
    ) -> Self {
        let window = ReplayWindow::after(session.mark(CONTROL_LANE));
        let session = Arc::new(session);
        Self { session, endpoint, remote, own, told_mtu, window, seen_tx: 0, seen_rx: 0 }
    }

    fn ends(&self) -> Duration {
        self.session.established.mono + SESSION_LIFE
    }

    /// Whether lanes have sent and received since the last look.
    fn sample(&mut self) -> (bool, bool) {
        let traffic = self.session.traffic();
        let tx = traffic.tx_packets.load(Ordering::Relaxed);
        let rx = traffic.rx_packets.load(Ordering::Relaxed);
        let grown = (tx != self.seen_tx, rx != self.seen_rx);
        (self.seen_tx, self.seen_rx) = (tx, rx);
        grown
    }

    fn end(self, shared: &mut Shared) {
        self.session.expire();
        shared.free_index(self.session.local_index);
        shared.changed = true;
    }
}

/// A key of a peer's.
pub(crate) struct PeerKey {
    pub(crate) public: [u8; KEY_LEN],
    /// What messages to it are checked by.
    pub(crate) checks: ReceiverKeys,
    /// Of the last initiation accepted from it. With the key goes what whoever stole it has said.
    pub(crate) last_timestamp: Timestamp,
}

impl PeerKey {
    fn new(public: &[u8; KEY_LEN]) -> Self {
        let checks = ReceiverKeys::new(public);
        Self { public: *public, checks, last_timestamp: Timestamp::default() }
    }
}

/// One peer. Sessions move `next` (a responder's, unconfirmed) → `current` → `previous`; an
/// initiator's begin as `current`. Data is received by all of them.
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// Its key, and a second one while it changes its key.
    pub(crate) keys: Vec<PeerKey>,
    pub(crate) view: PeerView,
    pub(crate) endpoints: Vec<SocketAddr>,
    /// Which endpoint the next handshake goes to.
    pub(crate) attempt: usize,
    pub(crate) pending: Option<Pending>,
    pub(crate) cookie: Option<(Mac, Duration)>,
    pub(crate) last_initiation: Option<Duration>,
    /// Time at which a handshake of this node first yielded to one of the peer's since an endpoint
    /// was last proved.
    deferred: Option<Duration>,
    /// When a handshake was last asked for.
    pub(crate) wanted: Option<Duration>,
    pub(crate) unknown: Option<Duration>,
    pub(crate) no_common_cipher: bool,
    pub(crate) live: Liveness,
    /// Last address at which the peer answered a handshake, and the time of that answer: the proof
    /// that the peer receives there.
    proven: Option<(SocketAddr, Duration)>,
    path: Path,
    /// Where it leads.
    path_to: Option<SocketAddr>,
    current: Option<Slot>,
    next: Option<Slot>,
    /// Oldest first.
    previous: Vec<Slot>,
}

impl Peer {
    pub(crate) fn new(id: PeerId, public_key: [u8; 32]) -> Self {
        Self {
            id,
            keys: vec![PeerKey::new(&public_key)],
            view: PeerView {
                public_key,
                endpoint: None,
                current: None,
                next: None,
                receive: Vec::new(),
                state: PeerState::Idle,
                trouble: None,
                round_trip: None,
                last_received: None,
                mtu: None,
                path: None,
            },
            endpoints: Vec::new(),
            attempt: 0,
            pending: None,
            cookie: None,
            last_initiation: None,
            deferred: None,
            wanted: None,
            unknown: None,
            no_common_cipher: false,
            live: Liveness::default(),
            proven: None,
            path: Path::new(),
            path_to: None,
            current: None,
            next: None,
            previous: Vec::new(),
        }
    }

    /// Its keys, the first one first.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &[u8; KEY_LEN]> {
        self.keys.iter().map(|key| &key.public)
    }

    pub(crate) fn key(&mut self, public: &[u8; KEY_LEN]) -> Option<&mut PeerKey> {
        self.keys.iter_mut().find(|key| key.public == *public)
    }

    /// Whether it is sent to in a session that this key of this node made.
    pub(crate) fn uses(&self, own: &[u8; KEY_LEN]) -> bool {
        self.current.as_ref().is_some_and(|slot| slot.own.as_ref() == Some(own))
    }

    /// Takes the keys of its record, the first one first. What was made with others ends.
    pub(crate) fn set_keys(&mut self, keys: &[[u8; KEY_LEN]], shared: &mut Shared) {
        if self.keys().eq(keys) {
            return;
        }
        let mut before = std::mem::take(&mut self.keys);
        let taken = keys.iter().map(|key| {
            let known = before.iter().position(|known| known.public == *key);
            known.map_or_else(|| PeerKey::new(key), |at| before.swap_remove(at))
        });
        self.keys = taken.collect();
        if let Some(first) = keys.first() {
            self.view.public_key = *first;
        }
        if self.pending_key().is_some_and(|key| !keys.contains(key)) {
            self.abandon_handshake(shared);
        }
        self.end_where(|slot| !keys.contains(&slot.remote), shared);
        shared.changed = true;
    }

    /// Replaces the endpoints of the peer's record. The current address stays in use until the peer
    /// has answered a handshake at a new endpoint, because a record does not prove that the peer
    /// receives there.
    pub(crate) fn set_endpoints(
        &mut self,
        now: Time,
        endpoints: Vec<SocketAddr>,
        shared: &mut Shared,
    ) {
        if endpoints == self.endpoints {
            return;
        }
        self.endpoints = endpoints;
        self.attempt = 0;
        if self.endpoints.is_empty() {
            self.proven = None;
        }
        self.update_endpoint(now.mono, shared);
        // The time of the last initiation concerns the previous addresses only.
        self.last_initiation = None;
        if let Some(pending) = &mut self.pending {
            pending.retry_at = now.mono;
            shared.arm(now.mono);
        }
        self.prove_endpoint(now, shared);
    }

    /// Updates the address that data is sent to.
    fn update_endpoint(&mut self, now: Duration, shared: &mut Shared) {
        let age = |at| now.saturating_sub(at);
        let endpoint = match self.current {
            Some(_) => self.proven.filter(|(_, at)| age(*at) < SESSION_LIFE).map(|(to, _)| to),
            None => self.handshake_endpoint(),
        };
        if self.view.endpoint != endpoint {
            self.view.endpoint = endpoint;
            shared.changed = true;
        }
    }

    /// Returns the address that the next handshake is sent to.
    pub(crate) fn handshake_endpoint(&self) -> Option<SocketAddr> {
        match self.endpoints.len() {
            0 => self.proven.map(|(endpoint, _)| endpoint),
            n => self.endpoints.get(self.attempt % n).copied(),
        }
    }

    /// Starts a handshake if data is sent to no address, to one that the record does not name, or
    /// to one whose proof is about to end.
    fn prove_endpoint(&mut self, now: Time, shared: &mut Shared) {
        let renewed = |at| now.mono.saturating_sub(at) < RESPONDER_REKEY_AFTER;
        let (proven, endpoints) = (self.proven, &self.endpoints);
        let is_good = proven.is_some_and(|(to, at)| renewed(at) && endpoints.contains(&to));
        if self.current.is_some() && !endpoints.is_empty() && !is_good {
            self.wanted = Some(now.mono);
            self.begin_handshake(now, shared);
        }
    }

    /// Returns the endpoint of the peer's record with this address and port.
    pub(crate) fn recorded_endpoint(&self, address: SocketAddr) -> Option<SocketAddr> {
        let ip = address.ip().to_canonical();
        let scope = |address: &SocketAddr| match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(v6) => v6.scope_id(),
        };
        let is_same = |known: &&SocketAddr| {
            known.ip().to_canonical() == ip
                && known.port() == address.port()
                && scope(known) == scope(&address)
        };
        self.endpoints.iter().find(is_same).copied()
    }

    /// Returns the recorded endpoint for an address that a response is sent to; the address itself
    /// if the record names no endpoints.
    pub(crate) fn known_endpoint(&self, address: SocketAddr) -> Option<SocketAddr> {
        match self.endpoints.is_empty() {
            true => Some(address),
            false => self.recorded_endpoint(address),
        }
    }

    /// Installs a session that this node initiated; the peer already has it. `yields`: both nodes
    /// have started at once, and the peer's session wins if the peer confirms it.
    pub(crate) fn install_current(
        &mut self,
        now: Time,
        slot: Slot,
        yields: bool,
        shared: &mut Shared,
    ) {
        self.previous.extend(self.current.take());
        if !yields {
            self.previous.extend(self.next.take());
        }
        self.make_current(now, slot, shared);
        // The peer waits for it: nothing is sent to us in this session before.
        self.ping(now, shared);
    }

    /// A session that the peer started; it may not have our answer yet.
    pub(crate) fn install_next(&mut self, now: Time, slot: Slot, shared: &mut Shared) {
        // A lane knows already that the peer has the one before: there is no way back to an older one.
        if self.next.as_ref().is_some_and(|next| next.session.is_confirmed()) {
            self.confirm_next(now, shared);
        }
        self.previous.extend(self.next.take());
        self.next = Some(slot);
        self.sessions_changed(shared);
    }

    fn confirm_next(&mut self, now: Time, shared: &mut Shared) {
        let Some(slot) = self.next.take() else { return };
        self.previous.extend(self.current.take());
        shared.counts.add(HandshakeResult::CompletedResponder);
        // If the session proves no endpoint of the record, a handshake of this node must prove one.
        if self.known_of(&slot).is_some() {
            self.abandon_handshake(shared);
        }
        self.make_current(now, slot, shared);
    }

    fn make_current(&mut self, now: Time, slot: Slot, shared: &mut Shared) {
        if let Some(endpoint) = self.known_of(&slot) {
            self.proven = Some((endpoint, slot.session.established.mono));
            self.deferred = None;
            let there = self.endpoints.iter().position(|e| Some(*e) == slot.endpoint);
            self.attempt = there.unwrap_or(self.attempt);
        }
        self.current = Some(slot);
        self.wanted = None;
        self.no_common_cipher = false;
        self.live.on_session(now.mono);
        self.update_endpoint(now.mono, shared);
        self.begin_path(now, shared);
        self.sessions_changed(shared);
        if self.view.endpoint.is_none_or(|to| !self.endpoints.contains(&to)) {
            self.prove_endpoint(now, shared);
        }
    }

    /// Handles a change of this node's MTU. [`Self::tick`] starts a handshake that notifies the
    /// peer.
    pub(crate) fn on_own_mtu(&mut self, now: Time, shared: &mut Shared) {
        if self.current.is_some() {
            self.begin_path(now, shared);
        }
    }

    /// The path is to be looked at: there are new keys, or the peer is elsewhere.
    fn begin_path(&mut self, now: Time, shared: &mut Shared) {
        let theirs = self.view.mtu.unwrap_or(shared.offer.mtu);
        let most = theirs.min(shared.offer.mtu).min(MAX_PROBE);
        let elsewhere = self.path_to != self.view.endpoint;
        self.path_to = self.view.endpoint;
        self.path.on_session(now.mono, most, elsewhere);
        self.show_path(shared);
    }

    /// Takes up a session of the process before; [`Peer::settle`] finds its place.
    pub(crate) fn resume(
        &mut self,
        saved: SavedSession,
        kept: Box<dyn Kept>,
        established: Time,
        shared: &mut Shared,
    ) -> bool {
        let (index, endpoint, mtu) = (saved.local_index, saved.endpoint, saved.mtu);
        let timestamp = saved.timestamp;
        let session = Session::new(SessionParams {
            peer: self.id,
            local_index: index,
            remote_index: saved.remote_index,
            cipher: saved.cipher,
            local_lanes: saved.local_lanes,
            remote_lanes: saved.remote_lanes,
            established,
            initiator: saved.initiator,
            life: saved.life,
            ecn: saved.ecn && shared.offer.ecn,
            secret: saved.secret,
        });
        let Ok(session) = session else { return false };
        if !shared.claim_index(index, self.id) {
            return false;
        }
        self.view.mtu = Some(mtu);
        // A session that an earlier release kept does not say.
        let told_mtu = if saved.told_mtu == 0 { shared.offer.mtu } else { saved.told_mtu };
        if let Some(key) = self.key(&saved.public_key) {
            key.last_timestamp = key.last_timestamp.max(timestamp);
        }
        self.previous.push(Slot::new(
            session.kept_by(Some(kept)),
            endpoint,
            saved.public_key,
            None,
            told_mtu,
        ));
        true
    }

    /// Finds out which of the sessions taken up to send with: the newest that the peer is known to have.
    pub(crate) fn settle(&mut self, now: Time, shared: &mut Shared) {
        self.previous.sort_by_key(|slot| slot.session.established);
        let confirmed = self.previous.iter().rposition(|slot| slot.session.is_confirmed());
        self.next = match self.previous.len() {
            0 => None,
            all if confirmed == Some(all - 1) => None,
            _ => self.previous.pop(),
        };
        match confirmed {
            Some(at) => {
                let slot = self.previous.remove(at);
                self.make_current(now, slot, shared);
            }
            None => self.sessions_changed(shared),
        }
        self.refresh_state(now);
    }

    /// Where a session was made, unless the record has changed while the handshake was under way.
    fn known_of(&self, slot: &Slot) -> Option<SocketAddr> {
        slot.endpoint.filter(|there| self.endpoints.is_empty() || self.endpoints.contains(there))
    }

    fn sessions_changed(&mut self, shared: &mut Shared) {
        let in_use = usize::from(self.current.is_some()) + usize::from(self.next.is_some());
        let excess = (in_use + self.previous.len()).saturating_sub(MAX_SESSIONS);
        self.previous.drain(..excess).for_each(|slot| slot.end(shared));
        self.view.current = self.current.as_ref().map(|slot| slot.session.clone());
        let next = self.next.as_ref();
        let present = self.view.endpoint.filter(|_| self.current.is_some());
        self.view.next = next.map(|slot| (slot.session.clone(), self.known_of(slot).or(present)));
        self.view.receive = self.slots().map(|slot| slot.session.clone()).collect();
        shared.changed = true;
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.current.iter().chain(&self.next).chain(&self.previous)
    }

    fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.current.iter_mut().chain(&mut self.next).chain(&mut self.previous)
    }

    pub(crate) fn has_current(&self) -> bool {
        self.current.is_some()
    }

    pub(crate) fn has_sessions(&self) -> bool {
        self.slots().next().is_some()
    }

    /// Returns true if there is a session to send with, and an address to send to.
    pub(crate) fn can_send(&self) -> bool {
        self.view.current.is_some() && self.view.endpoint.is_some()
    }

    /// Ends everything at once.
    pub(crate) fn end(&mut self, shared: &mut Shared) {
        self.abandon_handshake(shared);
        let slots = [self.current.take(), self.next.take()].into_iter().flatten();
        slots.chain(self.previous.drain(..)).for_each(|slot| slot.end(shared));
        self.sessions_changed(shared);
    }

    fn end_what_is_over(&mut self, now: Time, shared: &mut Shared) {
        self.end_where(|slot| slot.ends() <= now.mono, shared);
    }

    fn end_where(&mut self, over: impl Fn(&Slot) -> bool, shared: &mut Shared) {
        let over = |slot: &mut Slot| over(slot);
        let ended: Vec<Slot> = self
            .previous
            .extract_if(.., over)
            .chain(self.current.take_if(over))
            .chain(self.next.take_if(over))
            .collect();
        if !ended.is_empty() {
            ended.into_iter().for_each(|slot| slot.end(shared));
            self.sessions_changed(shared);
        }
    }

    /// The next moment at which something is due, but for ticks.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let retry = self.pending.as_ref().map(|pending| pending.retry_at);
        // Where there is no session there are no ticks to notice it.
        let connecting = self.view.state == PeerState::Connecting;
        let hopeless = self.pending.as_ref().filter(|_| connecting).and_then(Pending::hopeless_at);
        let proof = self.proven.filter(|_| self.can_send()).map(|(_, at)| at + SESSION_LIFE);
        self.slots().map(Slot::ends).chain(retry).chain(hopeless).chain(proof).min()
    }

    /// Does what is due. `tick`: it is also time to look at the lanes' counters.
    pub(crate) fn on_time(&mut self, now: Time, tick: bool, shared: &mut Shared) {
        self.end_what_is_over(now, shared);
        self.update_endpoint(now.mono, shared);
        if tick && self.has_sessions() {
            self.tick(now, shared);
        }
        if self.pending.as_ref().is_some_and(|p| p.retry_at <= now.mono + RETRY_SLACK) {
            let wanted = self.wanted.is_some_and(|at| now.mono.saturating_sub(at) < WANTED_FOR);
            self.retry_handshake(now, wanted, shared);
        }
        self.refresh_state(now);
    }

    fn tick(&mut self, now: Time, shared: &mut Shared) {
        let (mut sent, mut received) = (false, false);
        for slot in self.slots_mut() {
            let (tx, rx) = slot.sample();
            sent |= tx;
            received |= rx;
        }
        if sent {
            self.live.on_sent(now.mono);
        }
        if received {
            self.live.on_data(now.mono);
        }
        if self.next.as_ref().is_some_and(|next| next.session.is_confirmed()) {
            self.confirm_next(now, shared);
        }
        let Some(current) = &self.current else {
            // Asked for while the peer's own handshake was about to give us a session.
            if self.wanted.is_some_and(|at| now.mono.saturating_sub(at) < WANTED_FOR) {
                self.begin_handshake(now, shared);
            }
            return;
        };
        let session = &current.session;
        let limit = if session.initiator { REKEY_AFTER } else { RESPONDER_REKEY_AFTER };
        let old =
            now.since(session.established) >= limit || session.counters_used() >= COUNTER_REKEY;
        // Only a few sessions are renewed at a time, because a changed key or MTU may concern a
        // thousand peers.
        let other_key = match current.own {
            Some(own) => own != *shared.own.public(),
            None => shared.second.is_some(),
        };
        let old = old || other_key && shared.chance(RENEWED_AT_ONCE);
        // Renews sessions without traffic, too: packets longer than the peer's known MTU are
        // refused before they reach the engine.
        let other_mtu = current.told_mtu != shared.offer.mtu && shared.chance(RENEWED_AT_ONCE);
        if other_mtu || old && (sent || received) || sent && self.live.trouble(now.mono).is_some() {
            self.wanted = Some(now.mono);
            self.begin_handshake(now, shared);
        }
        if sent || received {
            self.prove_endpoint(now, shared);
        }
        if self.live.ping_due(now.mono) {
            self.ping(now, shared);
        }
        if self.live.in_use(now.mono) {
            self.probe_path(now, shared);
        }
    }

    fn probe_path(&mut self, now: Time, shared: &mut Shared) {
        let (id, ping) = self.live.probe(now.mono);
        if let Some(size) = self.path.ping(now.mono, id) {
            if self.path.is_waiting() {
                // So that what is lost by its size is told from what is lost by chance.
                let (id, short) = self.live.ping(now.mono);
                self.path.beside(id);
                self.send_control(short, shared);
            }
            self.send_padded(ping, usize::from(size), shared);
        }
        self.show_path(shared);
    }

    /// Handles a datagram with a plaintext of `size` bytes that this host's route to `destination`
    /// refused; see [`Path::refused`].
    pub(crate) fn on_refused(
        &mut self,
        now: Time,
        destination: SocketAddr,
        size: u16,
        fits: Option<u16>,
        shared: &mut Shared,
    ) -> bool {
        let narrower = self.path_to == Some(destination) && self.path.refused(now.mono, size, fits);
        self.show_path(shared);
        narrower
    }

    fn show_path(&mut self, shared: &mut Shared) {
        // A peer whose own MTU is less takes no more, whatever the path carries.
        let theirs = self.view.mtu.filter(|mtu| *mtu < shared.offer.mtu);
        let found = self.path.limit().or(theirs);
        if self.view.path != found {
            self.view.path = found;
            shared.changed = true;
        }
    }

    /// Starts a handshake unless one is pending, or the peer has just started a session that it has
    /// to confirm.
    pub(crate) fn begin_handshake(&mut self, now: Time, shared: &mut Shared) {
        let fresh = |slot: &Slot| now.since(slot.session.established) < CONFIRM_WITHIN;
        let gives_way = self.next.as_ref().is_some_and(fresh) && self.defers(now);
        if self.pending.is_none() && !gives_way {
            self.start_handshake(now, shared);
        }
    }

    /// Returns true while a handshake of this node yields to one of the peer's: for
    /// [`CONFIRM_WITHIN`], and only once until a session has proved an endpoint. A recorded
    /// initiation is indistinguishable from one of the peer's, and may be repeated.
    pub(crate) fn defers(&mut self, now: Time) -> bool {
        let since = *self.deferred.get_or_insert(now.mono);
        now.mono.saturating_sub(since) < CONFIRM_WITHIN
    }

    fn ping(&mut self, now: Time, shared: &mut Shared) {
        let (_, ping) = self.live.ping(now.mono);
        self.send_control(ping, shared);
    }

    fn send_control(&self, message: Control, shared: &mut Shared) {
        self.send_padded(message, 0, shared);
    }

    /// Sends a message with zeros behind it, up to that length of the plaintext.
    fn send_padded(&self, message: Control, length: usize, shared: &mut Shared) {
        let (Some(slot), Some(endpoint)) = (&self.current, self.view.endpoint) else { return };
        let Some(sender) = slot.session.sender(CONTROL_LANE) else { return };
        let mut plaintext = message.to_bytes();
        plaintext.resize(plaintext.len().max(length), 0);
        let mut out = vec![0; plaintext.len() + OVERHEAD];
        match sender.seal(Flags::default(), &plaintext, &mut out) {
            Ok(_) => shared.transmit(endpoint, out),
            Err(reason) => shared.drops.add(reason),
        }
    }

    /// A control message in the session with this index.
    pub(crate) fn on_control(
        &mut self,
        now: Time,
        index: u32,
        datagram: &mut [u8],
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let found = self.slots_mut().find(|slot| slot.session.local_index == index);
        let slot = found.ok_or(DropReason::UnknownSession)?;
        if slot.ends() <= now.mono {
            return Err(DropReason::SessionExpired);
        }
        let receiver = slot.session.receiver(CONTROL_LANE).ok_or(DropReason::WrongLane)?;
        let (header, plaintext) = receiver.open(datagram)?;
        let message = Control::read(plaintext);
        slot.window.check_and_set(header.counter)?;
        slot.session.set_highest(CONTROL_LANE, slot.window.highest());

        self.live.on_heard(now.mono);
        if let Some(next) = self.next.as_ref().filter(|next| next.session.local_index == index) {
            next.session.confirm();
            self.confirm_next(now, shared);
        }
        match message {
            Some(Control::Ping { id, sent, silent }) => {
                self.live.on_ping(now.mono, silent);
                self.send_control(Control::Pong { id, sent }, shared);
            }
            Some(Control::Pong { id, sent }) => {
                self.live.on_pong(now.mono, sent);
                self.path.on_pong(id);
                self.show_path(shared);
            }
            // Of a later release.
            None => {}
        }
        self.refresh_state(now);
        Ok(())
    }

    /// Brings the view's state up to date.
    pub(crate) fn refresh_state(&mut self, now: Time) {
        let unanswered = self.pending.as_ref().is_some_and(|p| p.unanswered(now.mono));
        let sends_with = self.current.as_ref().filter(|_| self.view.endpoint.is_some());
        let (state, trouble) = match (sends_with, &self.pending) {
            (Some(_), _) => match self.live.trouble(now.mono) {
                Some(trouble) => (PeerState::Unreachable, Some(trouble)),
                None => (PeerState::Established, None),
            },
            (None, Some(_)) if unanswered => (PeerState::Unreachable, Some(Trouble::NoAnswer)),
            (None, Some(_)) => (PeerState::Connecting, None),
            (None, None) if self.next.is_some() => (PeerState::Connecting, None),
            (None, None) if self.endpoints.is_empty() => {
                (PeerState::Idle, Some(Trouble::NoEndpoint))
            }
            (None, None) => (PeerState::Idle, None),
        };
        let no_cipher = self.current.is_none() && self.no_common_cipher;
        self.view.state = state;
        self.view.trouble = if no_cipher { Some(Trouble::NoCommonCipher) } else { trouble };
        self.view.round_trip = self.live.round_trip;
        self.view.last_received = self.live.heard;
    }
}
