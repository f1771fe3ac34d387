//! Time as the core sees it: two readings that the caller took.

use std::time::Duration;

/// A moment, as the caller's clocks gave it.
///
/// `mono` drives every timer; `wall` is used for nothing but the handshake's timestamp, which must
/// grow across restarts of a node (replay of a handshake initiation is told by it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Since any fixed point in this process's life; never goes backwards.
    pub mono: Duration,
    /// Since the Unix epoch.
    pub wall: Duration,
}

impl Time {
    /// How long `earlier` is ago; zero where it lies ahead.
    pub fn since(self, earlier: Time) -> Duration {
        self.mono.saturating_sub(earlier.mono)
    }

    /// This moment, later by `by`.
    #[must_use]
    pub fn after(self, by: Duration) -> Time {
        Time { mono: self.mono + by, wall: self.wall + by }
    }
}
