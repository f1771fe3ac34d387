//! Timeouts and intervals of the protocol.

use std::time::Duration;

/// Age at which the initiator of a session in use starts a new handshake (WireGuard paper, section
/// 6.1).
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age at which the responder starts a new handshake if the initiator has not: 15 s after
/// [`REKEY_AFTER_TIME`], so that both nodes rarely start at the same time.
pub(crate) const RESPONDER_REKEY_AFTER_TIME: Duration = Duration::from_secs(135);
/// Mean number of ticks over which sessions are renewed after a change of this node's key or MTU:
/// at each tick a session is renewed with the probability 1 / `RENEWAL_SPREAD_TICKS`.
pub(crate) const RENEWAL_SPREAD_TICKS: u8 = 8;
/// Age at which a session ends at both nodes (WireGuard paper, section 6.1, `Reject-After-Time`).
pub const SESSION_LIFETIME: Duration = Duration::from_secs(180);

/// Minimum time between two initiations to a peer. Retries start with this interval plus up to a
/// quarter of it at random; each later interval is longer by half, up to [`MAX_RETRY_INTERVAL`].
pub(crate) const MIN_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time between two initiations of a handshake.
pub(crate) const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Time since the last request after which retries of a handshake stop.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Retries that are due within this time are sent together, which limits the wake-ups of a node
/// with many peers.
pub(crate) const RETRY_SLACK: Duration = Duration::from_millis(5);
/// Time for which a node waits for the peer's session before it starts a handshake of its own.
pub(crate) const CONFIRM_TIMEOUT: Duration = Duration::from_secs(1);

/// Interval at which the engine reads the sessions' traffic counters while there are sessions.
pub(crate) const TICK_INTERVAL: Duration = Duration::from_millis(250);
/// Time without an answer after which a peer is pinged. An unreachable peer is pinged at this
/// interval.
pub(crate) const SILENT_PING_DELAY: Duration = Duration::from_secs(1);
/// Minimum interval of pings to a silent peer. The interval is max(250 ms, 2 × RTT), at most 1 s.
/// At 250 ms, 8 pings fit before [`UNREACHABLE_TIMEOUT`]: with 10 % loss per direction all 8 fail
/// with probability 0.19^8 ≈ 1.7 · 10^-6.
pub(crate) const PING_RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// Interval of pings to a peer that answers and to which data is sent. They measure the round-trip
/// time.
pub(crate) const RTT_PING_INTERVAL: Duration = Duration::from_secs(10);
/// Time since the last data sent after which a session counts as idle, so that no more pings or
/// probes are sent.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Time without an answer after which a peer counts as unreachable. Two ticks and the publication
/// of the state follow, so that an operator knows within 5 s.
pub(crate) const UNREACHABLE_TIMEOUT: Duration = Duration::from_millis(3000);
/// Time between the first and the latest ping in which a peer reports that it receives nothing from
/// this node. After this time the peer counts as unreachable. The value is 100 ms less than 8
/// intervals of [`PING_RETRY_INTERVAL`]. The peer sends the first of these pings after
/// [`SILENT_PING_DELAY`] (1 s), so that the detection takes about as long as
/// [`UNREACHABLE_TIMEOUT`].
pub(crate) const DEAF_TIMEOUT: Duration = Duration::from_millis(1900);
/// Interval at which the path MTU in use is confirmed while data is sent (RFC 8899, section 5.1.1).
pub(crate) const CONFIRMATION_TIMER: Duration = Duration::from_secs(5);
/// Interval at which a larger path MTU is tried again (RFC 8899, section 5.1.1).
pub(crate) const PMTU_RAISE_TIMER: Duration = Duration::from_secs(60);
/// Time after which an unanswered probe is repeated (RFC 8899, section 5.1.1); equal to
/// [`TICK_INTERVAL`].
pub(crate) const PROBE_TIMER: Duration = Duration::from_millis(250);
/// Time after which the probes of a size are abandoned without a result, because the peer answers
/// too few short pings. The time is twice as long for a probe that is not larger than the path MTU
/// in use and not larger than 1280 bytes.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum plausible round-trip time; longer samples are ignored.
pub(crate) const MAX_ROUND_TRIP: Duration = Duration::from_secs(60);

/// Minimum interval between the handshakes that datagrams of unknown sessions cause with one peer.
pub(crate) const UNKNOWN_SESSION_INTERVAL: Duration = Duration::from_secs(2);
/// Minimum time since the last authentic datagram of a peer before a datagram of an unknown session
/// causes a handshake with that peer.
pub(crate) const UNKNOWN_SESSION_SILENT_TIME: Duration = Duration::from_secs(10);
