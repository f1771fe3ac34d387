//! The time that callers pass to the core: a monotonic and a wall-clock reading.

use std::time::Duration;

/// A reading of the caller's clocks.
///
/// `mono` drives every timer. `wall` is used only for the timestamp of handshake initiations, which
/// must grow across restarts of the node so that a peer can refuse replayed initiations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Monotonic clock: time since a fixed point before the start of the process.
    pub mono: Duration,
    /// Wall clock: time since the Unix epoch.
    pub wall: Duration,
}

impl Time {
    /// Returns the monotonic time since `earlier`; zero if `earlier` is in the future.
    pub fn since(self, earlier: Time) -> Duration {
        self.mono.saturating_sub(earlier.mono)
    }

    /// Returns this time advanced by `by` on both clocks.
    #[must_use]
    pub fn after(self, by: Duration) -> Time {
        Time { mono: self.mono + by, wall: self.wall + by }
    }
}
