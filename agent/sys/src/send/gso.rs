//! Where UDP_SEGMENT works.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long a destination goes without UDP_SEGMENT after the first failure.
const MIN_PAUSE: Duration = Duration::from_secs(5);
/// How long at most, when it keeps failing.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// How many runs in a row may be refused, and then go one by one, before that counts as a failure.
const MAX_REFUSALS: u8 = 3;
/// Destinations remembered; beyond it, those whose pause is over are forgotten.
const MAX_DESTINATIONS: usize = 1_024;

/// Whether runs may leave as one UDP_SEGMENT message: a switch for the socket, and a memory of the
/// destinations where the kernel refuses (a route through IPsec, a device without checksums).
#[derive(Debug, Default)]
pub struct GsoState {
    off: bool,
    destinations: HashMap<SocketAddr, DestinationState>,
}

/// A destination without UDP_SEGMENT, for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GsoOff {
    /// The destination.
    pub destination: SocketAddr,
    /// When it is tried again.
    pub until: Instant,
    /// The error that turned it off (errno).
    pub errno: i32,
}

#[derive(Debug, Clone, Copy, Default)]
struct DestinationState {
    /// Runs refused in a row that went one by one.
    refusals: u8,
    /// The last pause; zero if there was none.
    pause: Duration,
    until: Option<Instant>,
    errno: i32,
}

impl GsoState {
    /// On everywhere.
    pub fn new() -> Self {
        Self::default()
    }

    /// Off everywhere.
    pub fn disabled() -> Self {
        Self { off: true, ..Self::default() }
    }

    /// Whether a run to `destination` may leave as one message now.
    pub fn allowed(&self, destination: SocketAddr, now: Instant) -> bool {
        !self.off
            && (self.destinations.is_empty()
                || self
                    .destinations
                    .get(&destination)
                    .and_then(|state| state.until)
                    .is_none_or(|until| until <= now))
    }

    /// The destinations where it is off at `now`.
    pub fn off(&self, now: Instant) -> impl Iterator<Item = GsoOff> + '_ {
        self.destinations.iter().filter_map(move |(&destination, state)| {
            let until = state.until.filter(|&until| until > now)?;
            Some(GsoOff { destination, until, errno: state.errno })
        })
    }

    /// Turns it off for one destination, 5 s at first, doubling to 60 s while it keeps failing.
    /// `errno` is the kernel's reason.
    pub fn pause(&mut self, destination: SocketAddr, errno: i32, now: Instant) {
        let state = self.state(destination, now);
        state.refusals = 0;
        state.pause = match state.pause {
            Duration::ZERO => MIN_PAUSE,
            pause => (pause * 2).min(MAX_PAUSE),
        };
        state.until = Some(now + state.pause);
        state.errno = errno;
        let error = io::Error::from_raw_os_error(errno);
        tracing::debug!(%destination, pause = ?state.pause, %error, "UDP_SEGMENT is off");
    }

    /// A message of several datagrams went.
    pub(super) fn on_sent(&mut self, destination: SocketAddr) {
        if !self.destinations.is_empty() && self.destinations.remove(&destination).is_some() {
            tracing::debug!(%destination, "UDP_SEGMENT works again");
        }
    }

    /// A message was refused as invalid, and all its datagrams went one by one.
    pub(super) fn on_refused(&mut self, destination: SocketAddr, errno: i32, now: Instant) {
        let state = self.state(destination, now);
        state.refusals += 1;
        if state.refusals >= MAX_REFUSALS {
            self.pause(destination, errno, now);
        }
    }

    fn state(&mut self, destination: SocketAddr, now: Instant) -> &mut DestinationState {
        if self.destinations.len() >= MAX_DESTINATIONS
            && !self.destinations.contains_key(&destination)
        {
            self.destinations.retain(|_, state| state.until.is_some_and(|until| until > now));
        }
        self.destinations.entry(destination).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "192.0.2.1:51900";
    const B: &str = "192.0.2.2:51900";

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn pauses_double_to_a_minute_and_success_forgets_them() {
        let (a, b, mut now) = (address(A), address(B), Instant::now());
        let mut gso = GsoState::new();
        for seconds in [5, 10, 20, 40, 60, 60] {
            gso.pause(a, libc::EIO, now);
            let until = now + Duration::from_secs(seconds);
            assert!(!gso.allowed(a, until - Duration::from_millis(1)));
            let off: Vec<_> = gso.off(now).collect();
            assert_eq!(off, [GsoOff { destination: a, until, errno: libc::EIO }]);
            assert!(gso.allowed(b, now));
            now = until;
            assert!(gso.allowed(a, now));
            assert_eq!(gso.off(now).count(), 0);
        }
        gso.on_sent(a);
        gso.pause(a, libc::EIO, now);
        assert!(gso.allowed(a, now + MIN_PAUSE));
    }

    #[test]
    fn three_refusals_in_a_row_turn_it_off_and_success_between_them_does_not() {
        let (a, now) = (address(A), Instant::now());
        let mut gso = GsoState::new();
        for _ in 0..5 {
            gso.on_refused(a, libc::EINVAL, now);
            gso.on_refused(a, libc::EINVAL, now);
            gso.on_sent(a);
        }
        assert!(gso.allowed(a, now));
        for _ in 0..3 {
            assert!(gso.allowed(a, now));
            gso.on_refused(a, libc::EINVAL, now);
        }
        assert!(!gso.allowed(a, now));
    }

    #[test]
    fn the_switch_holds_everywhere() {
        let (a, now) = (address(A), Instant::now());
        assert!(!GsoState::disabled().allowed(a, now));
        assert!(GsoState::new().allowed(a, now));
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut now = Instant::now();
        let mut gso = GsoState::new();
        for port in 1..5_000 {
            gso.pause(SocketAddr::new([192, 0, 2, 1].into(), port), libc::EIO, now);
            now += Duration::from_millis(20);
        }
        assert!(gso.destinations.len() <= MAX_DESTINATIONS);
    }
}
