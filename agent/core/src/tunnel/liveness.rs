//! Liveness of a peer: detection of each direction's failure, and the round-trip time.
//!
//! Traffic in both directions needs no pings. If traffic is one-sided, a node pings in two cases:
//! it sends and has received nothing for a second, or it has received data and then nothing for a
//! second. In the second case either the conversation is over, which one answer shows, or the
//! direction has failed. Unanswered pings follow each other quickly, so that the loss of a few does
//! not make the peer unreachable. A ping says for how long its sender has received nothing, from
//! which a peer that receives well learns that its own direction has failed.

use std::time::Duration;

use crate::tunnel::message::Control;
use crate::tunnel::timers::{
    DEAF_TIMEOUT, IDLE_TIMEOUT, MAX_ROUND_TRIP, PING_RETRY_INTERVAL, RTT_PING_INTERVAL,
    SILENT_PING_DELAY, UNREACHABLE_TIMEOUT,
};

/// Reason why a peer is unreachable or cannot be connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UnreachableReason {
    /// The peer's record names no endpoint that this node can use.
    NoEndpoint,
    /// Handshakes get no answer.
    NoAnswer,
    /// There is a session, but nothing arrives from the peer.
    Silent,
    /// The peer reports that it receives nothing from this node.
    Deaf,
    /// The peer offers no cipher that this node offers.
    NoCommonCipher,
}

impl UnreachableReason {
    /// All reasons.
    pub const ALL: [Self; 5] =
        [Self::NoEndpoint, Self::NoAnswer, Self::Silent, Self::Deaf, Self::NoCommonCipher];

    /// Reasons that make a peer [unreachable](crate::tunnel::PeerState::Unreachable).
    pub const OF_UNREACHABLE: [Self; 4] =
        [Self::NoAnswer, Self::Silent, Self::Deaf, Self::NoCommonCipher];

    /// Returns the value of the metric label `reason`.
    pub const fn label(self) -> &'static str {
        match self {
            UnreachableReason::NoEndpoint => "no_endpoint",
            UnreachableReason::NoAnswer => "no_answer",
            UnreachableReason::Silent => "silent",
            UnreachableReason::Deaf => "deaf",
            UnreachableReason::NoCommonCipher => "no_common_cipher",
        }
    }

    /// Returns a text for users.
    pub const fn text(self) -> &'static str {
        match self {
            UnreachableReason::NoEndpoint => "no usable endpoint in its record",
            UnreachableReason::NoAnswer => "handshakes get no answer",
            UnreachableReason::Silent => "nothing comes back",
            UnreachableReason::Deaf => "it hears nothing from this node",
            UnreachableReason::NoCommonCipher => "no cipher in common",
        }
    }
}

impl std::fmt::Display for UnreachableReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}

/// State of the liveness detection for one peer. All times are readings of the caller's monotonic
/// clock.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    /// Time of the last authentic datagram.
    pub(crate) last_received: Option<Duration>,
    /// Round-trip time, smoothed as in TCP (RFC 6298).
    pub(crate) round_trip: Option<Duration>,
    /// Time of the last data sent.
    last_sent: Option<Duration>,
    /// Start of the current silence: the first transmission since the last authentic datagram. If
    /// this node sends no data, a ping sets it to the time of the last data received. `None` while
    /// no answer is outstanding.
    unanswered_since: Option<Duration>,
    /// Time of the last data received; `None` once the end of the data has been explained by
    /// another datagram.
    last_data: Option<Duration>,
    /// Time of the last ping sent or pong received.
    last_ping: Option<Duration>,
    /// Number of the last ping.
    ping_id: u64,
    silence_reports: Option<SilenceReports>,
}

/// Reports of the peer, in its pings, that it receives nothing from this node, although every ping
/// was answered.
#[derive(Debug, Clone, Copy)]
struct SilenceReports {
    /// Time of the first report.
    first: Duration,
    /// Time of the latest report.
    last: Duration,
    /// Time at which the peer last received something, converted to this node's clock.
    last_heard: Duration,
}

impl Liveness {
    /// Handles a new session. Transmissions in the old session need no answer any more.
    pub(crate) fn on_session(&mut self, now: Duration) {
        self.unanswered_since = None;
        self.last_data = None;
        self.silence_reports = None;
        self.last_received = Some(now);
        self.last_sent = Some(now);
    }

    /// Handles an authentic control message. Some time after the last data it shows that the peer
    /// is alive.
    pub(crate) fn on_received(&mut self, now: Duration) {
        self.last_received = Some(now);
        self.unanswered_since = None;
        self.last_data =
            self.last_data.filter(|data| now.saturating_sub(*data) < SILENT_PING_DELAY / 2);
    }

    pub(crate) fn on_data_received(&mut self, now: Duration) {
        self.on_received(now);
        self.last_data = Some(now);
    }

    pub(crate) fn on_data_sent(&mut self, now: Duration) {
        self.last_sent = Some(now);
        self.unanswered_since.get_or_insert(now);
    }

    /// Handles a ping in which the peer reports a silence of `silent` milliseconds. Call
    /// [`Liveness::on_received`], too.
    pub(crate) fn on_ping(&mut self, now: Duration, silent: u32) {
        let silent = Duration::from_millis(silent.into());
        let last_heard = now.saturating_sub(silent);
        if silent < SILENT_PING_DELAY {
            self.silence_reports = None;
            return;
        }
        match &mut self.silence_reports {
            // The report concerns the same silence; the transit times of pings vary.
            Some(deaf) if last_heard <= deaf.last_heard + SILENT_PING_DELAY / 2 => deaf.last = now,
            deaf => *deaf = Some(SilenceReports { first: now, last: now, last_heard }),
        }
    }

    /// Handles a pong with the clock value `sent` of its ping. Call [`Liveness::on_received`], too.
    pub(crate) fn on_pong(&mut self, now: Duration, sent: u64) {
        self.silence_reports = None;
        // The pong carries the time of its ping, so the round-trip time is known for every pong.
        self.last_ping = Some(now);
        let Some(sample) = now.checked_sub(Duration::from_nanos(sent)) else { return };
        if sample > MAX_ROUND_TRIP {
            return;
        }
        self.round_trip = Some(match self.round_trip {
            Some(smoothed) => (smoothed * 7 + sample) / 8,
            None => sample,
        });
    }

    /// Returns true if a ping must be sent now.
    pub(crate) fn ping_due(&self, now: Duration) -> bool {
        let past = |since: Option<Duration>, by| since.is_some_and(|t| now.saturating_sub(t) >= by);
        let used = self.in_use(now);
        let heard_lately = |data| now.saturating_sub(data) < IDLE_TIMEOUT;
        if !(used || self.last_data.is_some_and(heard_lately)) {
            return false;
        }
        let interval = if self.unreachable_reason(now).is_some() {
            SILENT_PING_DELAY
        } else if past(self.silent_since(), SILENT_PING_DELAY) {
            // An answer takes a round trip.
            PING_RETRY_INTERVAL.max(self.round_trip.unwrap_or_default() * 2).min(SILENT_PING_DELAY)
        } else if used {
            RTT_PING_INTERVAL
        } else {
            return false;
        };
        self.last_ping.is_none() || past(self.last_ping, interval)
    }

    /// Returns the time since which an answer has been outstanding.
    fn silent_since(&self) -> Option<Duration> {
        self.unanswered_since.or(self.last_data)
    }

    /// Creates a ping for liveness. Returns its number and message.
    pub(crate) fn ping(&mut self, now: Duration) -> (u64, Control) {
        self.last_ping = Some(now);
        self.unanswered_since = self.silent_since().or(Some(now));
        self.probe(now)
    }

    /// Creates a ping that does not affect liveness, because it may be too long to arrive.
    pub(crate) fn probe(&mut self, now: Duration) -> (u64, Control) {
        self.ping_id += 1;
        let silent = self.last_received.map_or(0, |heard| now.saturating_sub(heard).as_millis());
        let ping = Control::Ping {
            id: self.ping_id,
            sent: u64::try_from(now.as_nanos()).unwrap_or(0),
            silent: u32::try_from(silent).unwrap_or(u32::MAX),
        };
        (self.ping_id, ping)
    }

    /// Returns true if data was sent within [`IDLE_TIMEOUT`].
    pub(crate) fn in_use(&self, now: Duration) -> bool {
        self.last_sent.is_some_and(|sent| now.saturating_sub(sent) < IDLE_TIMEOUT)
    }

    /// Returns the reason for which the peer counts as unreachable, if it does.
    pub(crate) fn unreachable_reason(&self, now: Duration) -> Option<UnreachableReason> {
        let past = |since: Option<Duration>, by| since.is_some_and(|t| now.saturating_sub(t) >= by);
        if past(self.unanswered_since, UNREACHABLE_TIMEOUT) {
            Some(UnreachableReason::Silent)
        } else if self
            .silence_reports
            .is_some_and(|deaf| deaf.last.saturating_sub(deaf.first) >= DEAF_TIMEOUT)
        {
            Some(UnreachableReason::Deaf)
        } else {
            None
        }
    }
}
