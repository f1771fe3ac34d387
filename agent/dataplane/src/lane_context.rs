//! State of a lane that its sending and its receiving half share.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use skein_core::drop::DropReason;
use skein_sys::send::TooLong;

use super::queue::{ToManager, ToManagerQueue};
use super::stats::LaneStats;
use super::tables::{Tables, TablesHandle};
use super::tap::{Bytes, PacketRef, Tap};

/// Minimum interval between two reports of a lane about datagrams that exceed the MTU of their
/// route.
const TOO_LONG_INTERVAL: Duration = Duration::from_millis(20);
/// Minimum interval between two reports of a lane about datagrams of unknown sessions.
const UNKNOWN_SESSION_INTERVAL: Duration = Duration::from_millis(100);

/// State of a lane that both of its halves use.
pub(super) struct LaneContext {
    /// Lane number.
    pub(super) index: u8,
    /// Number of lanes of the node.
    pub(super) lanes: u8,
    /// Counters that reports read.
    pub(super) stats: Arc<LaneStats>,
    /// Send sockets, one for each address family.
    pub(super) send_sockets: Vec<SendSocket>,
    /// Packet tap for `capture` and `trace --drops`.
    pub(super) tap: Arc<Tap>,
    /// True if a subscriber of the tap wanted copies of packets at the start of this round.
    pub(super) captured: bool,
    pub(super) published: Arc<TablesHandle>,
    pub(super) tables_version: u64,
    /// Queue of the session manager.
    pub(super) manager: ToManagerQueue,
    pub(super) now: Instant,
    /// Start of this round as time since boot, the clock of session ages.
    pub(super) age_clock: Duration,
    pub(super) unknown_session_reported: Option<Instant>,
    pub(super) too_long_reported: Cell<Option<Instant>>,
}

/// UDP socket from which a lane sends.
pub(super) struct SendSocket {
    /// True for IPv4, false for IPv6.
    pub v4: bool,
    /// The nonblocking send socket.
    pub(super) socket: UdpSocket,
}

impl LaneContext {
    /// Returns the start of this round (monotonic clock).
    pub(super) fn now(&self) -> Instant {
        self.now
    }

    /// Returns the start of this round as time since boot, the clock of session ages.
    pub(super) fn age_clock(&self) -> Duration {
        self.age_clock
    }

    /// Reports a drop to the tap.
    #[inline]
    pub(super) fn report_drop(
        &self,
        reason: DropReason,
        outer: Option<SocketAddr>,
        bytes: Bytes<'_>,
    ) {
        self.tap.dropped(reason, PacketRef { lane: Some(self.index), outer, bytes, packets: 1 });
    }

    /// Returns the current tables if the lane has not adopted them yet.
    pub(super) fn newer_tables(&mut self) -> Option<Arc<Tables>> {
        let version = self.published.version();
        if version == self.tables_version {
            return None;
        }
        self.tables_version = version;
        Some(self.published.load())
    }

    /// Reports a datagram that exceeds the MTU of its route to the manager, which reduces the
    /// peer's path MTU. At most one report per [`TOO_LONG_INTERVAL`] is sent.
    pub(super) fn report_too_long(&self, datagram: TooLong) {
        let due = |at: Instant| self.now - at >= TOO_LONG_INTERVAL;
        if self.too_long_reported.get().is_none_or(due)
            && self.manager.try_send_own(ToManager::TooLong(datagram))
        {
            self.too_long_reported.set(Some(self.now));
        }
    }

    /// Reports `source`, which sent a datagram of an unknown session, to the manager. At most one
    /// report per [`UNKNOWN_SESSION_INTERVAL`] is sent.
    pub(super) fn report_unknown_session(&mut self, source: IpAddr) {
        if self.unknown_session_reported.is_none_or(|t| self.now - t >= UNKNOWN_SESSION_INTERVAL) {
            self.unknown_session_reported = Some(self.now);
            self.manager.try_send_own(ToManager::UnknownSession(source));
        }
    }
}
