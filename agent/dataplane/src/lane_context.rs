//! What the packet path of a lane shares between its two directions.

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

/// Minimum interval between two reports of a lane about datagrams that were too long for their
/// route.
const TOO_LONG_INTERVAL: Duration = Duration::from_millis(20);
/// How often one lane reports datagrams of unknown sessions.
const UNKNOWN_SESSION_INTERVAL: Duration = Duration::from_millis(100);

/// What the packet path of a lane needs beside its two halves.
pub(super) struct LaneContext {
    /// Number of this lane.
    pub(super) index: u8,
    /// Number of lanes of this node.
    pub(super) lanes: u8,
    /// Counters.
    pub(super) stats: Arc<LaneStats>,
    /// Sockets to send from, one a family.
    pub(super) send_sockets: Vec<SendSocket>,
    /// For whoever looks.
    pub(super) tap: Arc<Tap>,
    /// Whether somebody looked at packets when this round began.
    pub(super) captured: bool,
    pub(super) published: Arc<TablesHandle>,
    pub(super) tables_version: u64,
    /// The manager's queue.
    pub(super) manager: ToManagerQueue,
    pub(super) now: Instant,
    pub(super) age_clock: Duration,
    pub(super) unknown_session_reported: Option<Instant>,
    pub(super) too_long_reported: Cell<Option<Instant>>,
}

/// A socket to send from.
pub(super) struct SendSocket {
    /// Whether it is of IPv4.
    pub v4: bool,
    /// Itself; nonblocking.
    pub(super) socket: UdpSocket,
}

impl LaneContext {
    /// The time at which this round began.
    pub(super) fn now(&self) -> Instant {
        self.now
    }

    /// Returns the time since boot at which this round began, the clock of the sessions' ages.
    pub(super) fn age_clock(&self) -> Duration {
        self.age_clock
    }

    /// Tells whoever looks of a drop.
    #[inline]
    pub(super) fn report_drop(
        &self,
        reason: DropReason,
        outer: Option<SocketAddr>,
        bytes: Bytes<'_>,
    ) {
        self.tap.dropped(reason, PacketRef { lane: Some(self.index), outer, bytes, packets: 1 });
    }

    /// The tables in force, if they are not those that this lane has.
    pub(super) fn newer_tables(&mut self) -> Option<Arc<Tables>> {
        let version = self.published.version();
        if version == self.tables_version {
            return None;
        }
        self.tables_version = version;
        Some(self.published.load())
    }

    /// Reports a datagram that was too long for its route to the manager, which reduces the peer's
    /// path MTU.
    pub(super) fn report_too_long(&self, datagram: TooLong) {
        let due = |at: Instant| self.now - at >= TOO_LONG_INTERVAL;
        if self.too_long_reported.get().is_none_or(due)
            && self.manager.try_send_own(ToManager::TooLong(datagram))
        {
            self.too_long_reported.set(Some(self.now));
        }
    }

    /// Notes that `source` sent a datagram of a session that is not known here.
    pub(super) fn report_unknown_session(&mut self, source: IpAddr) {
        if self.unknown_session_reported.is_none_or(|t| self.now - t >= UNKNOWN_SESSION_INTERVAL) {
            self.unknown_session_reported = Some(self.now);
            self.manager.try_send_own(ToManager::UnknownSession(source));
        }
    }
}
