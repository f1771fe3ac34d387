//! Every duration of the protocol, in one place.

use std::time::Duration;

/// The initiator of a session that is in use makes a new one at this age.
pub const REKEY_AFTER: Duration = Duration::from_secs(120);
/// The responder does, where the initiator has not.
pub(crate) const RESPONDER_REKEY_AFTER_TIME: Duration = Duration::from_secs(135);
/// Of the sessions that were made with a key that this node has changed, one in so many is renewed at each
/// tick.
pub(crate) const RENEWAL_SPREAD_TICKS: u8 = 8;
/// A session of this age is over at both ends.
pub const SESSION_LIFE: Duration = Duration::from_secs(180);

/// An initiation without an answer is repeated after this, then ever later…
pub(crate) const MIN_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// …but never later than this.
pub(crate) const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// A handshake that nobody has wanted for so long is given up.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Retries that fall due within this are sent together, so that many peers mean few wake-ups.
pub(crate) const RETRY_SLACK: Duration = Duration::from_millis(5);
/// A session that waits for its initiator's first word is believed in for so long.
pub(crate) const CONFIRM_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the lanes' counters are looked at while there are sessions.
pub(crate) const TICK_INTERVAL: Duration = Duration::from_millis(250);
/// A peer that has not answered for so long is pinged…
pub(crate) const SILENT_PING_DELAY: Duration = Duration::from_secs(1);
/// …again and again after this, until it answers or counts as unreachable: eight times, so that where
/// 10 % is lost in each direction none is taken for dead (one in 600,000 seconds of silence)…
pub(crate) const PING_RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// …and one that answers is, for the round trip, while it is sent to.
pub(crate) const RTT_PING_INTERVAL: Duration = Duration::from_secs(10);
/// Pings stop when nothing was sent for so long.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// A peer that has not answered for so long is unreachable. With two ticks, and until an operator is told,
/// within 5 seconds.
pub(crate) const UNREACHABLE_TIMEOUT: Duration = Duration::from_millis(3000);
/// A peer that has complained for so long that it hears nothing is unreachable too: eight pings, whose
/// answers it did not hear. With the second before the first of them, as fast.
pub(crate) const DEAF_TIMEOUT: Duration = Duration::from_millis(1900);
/// The size in use on a path is checked this often, while something is sent…
pub(crate) const CONFIRMATION_TIMER: Duration = Duration::from_secs(5);
/// …and whether more passes than before, this often.
pub(crate) const PMTU_RAISE_TIMER: Duration = Duration::from_secs(60);
/// A padded ping without an answer is repeated after this. Ticks are as far apart.
pub(crate) const PROBE_TIMER: Duration = Duration::from_millis(250);
/// A peer that says nothing for so long is not asked for more.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer round trips than this are nonsense.
pub(crate) const MAX_ROUND_TRIP: Duration = Duration::from_secs(60);

/// A stranger's datagrams make no more than one handshake a peer in this time…
pub(crate) const UNKNOWN_SESSION_INTERVAL: Duration = Duration::from_secs(2);
/// …and none where the peer was heard by a session in this time.
pub(crate) const UNKNOWN_SESSION_SILENT_TIME: Duration = Duration::from_secs(10);
