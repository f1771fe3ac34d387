//! Destinations for which UDP_SEGMENT is disabled, and their pauses.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Duration without UDP_SEGMENT after the first failure of a destination.
const MIN_PAUSE: Duration = Duration::from_secs(5);
/// Maximum duration without UDP_SEGMENT after repeated failures.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Number of messages in a row that the kernel refuses as invalid, and whose datagrams it accepts
/// singly, before UDP_SEGMENT is disabled for the destination.
const MAX_REFUSALS: u8 = 3;
/// Number of stored destinations above which destinations without an active pause are removed.
const MAX_DESTINATIONS: usize = 1_024;

/// State of UDP_SEGMENT for the sockets of a lane: disabled completely, or disabled for
/// destinations for which the kernel refuses it, for example because of IPsec or a device without
/// checksum offload.
#[derive(Debug, Default)]
pub struct GsoState {
    off: bool,
    destinations: HashMap<SocketAddr, DestinationState>,
}

/// A destination for which UDP_SEGMENT is disabled, for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GsoOff {
    /// Underlay address and port.
    pub destination: SocketAddr,
    /// End of the pause; the next batch uses UDP_SEGMENT again.
    pub until: Instant,
    /// Error of the failure that started the pause (errno(3)).
    pub errno: i32,
}

#[derive(Debug, Clone, Copy, Default)]
struct DestinationState {
    /// Number of refused messages in a row whose datagrams were accepted singly.
    refusals: u8,
    /// Duration of the last pause; zero if there was none.
    pause: Duration,
    /// End of the last pause; `None` if there was none.
    until: Option<Instant>,
    /// Error that started the last pause.
    errno: i32,
}

impl GsoState {
    /// Returns a state in which UDP_SEGMENT is enabled for every destination.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a state in which UDP_SEGMENT is disabled permanently.
    pub fn disabled() -> Self {
        Self { off: true, ..Self::default() }
    }

    /// Returns whether a batch to `destination` may be sent as one message at `now`.
    pub fn allowed(&self, destination: SocketAddr, now: Instant) -> bool {
        !self.off
            && (self.destinations.is_empty()
                || self
                    .destinations
                    .get(&destination)
                    .and_then(|state| state.until)
                    .is_none_or(|until| until <= now))
    }

    /// Returns the destinations with an active pause at `now`.
    pub fn off(&self, now: Instant) -> impl Iterator<Item = GsoOff> + '_ {
        self.destinations.iter().filter_map(move |(&destination, state)| {
            let until = state.until.filter(|&until| until > now)?;
            Some(GsoOff { destination, until, errno: state.errno })
        })
    }

    /// Disables UDP_SEGMENT for `destination`: 5 s after the first failure, twice the previous
    /// duration after each further one, at most 60 s. An accepted UDP_SEGMENT message resets the
    /// duration. `errno` is kept for reports.
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
        tracing::debug!(%destination, pause = ?state.pause, %error, "UDP_SEGMENT disabled for a destination");
    }

    /// Removes the state of the destination after an accepted message with several datagrams.
    pub(super) fn on_sent(&mut self, destination: SocketAddr) {
        if !self.destinations.is_empty() && self.destinations.remove(&destination).is_some() {
            tracing::debug!(%destination, "UDP_SEGMENT enabled again for a destination");
        }
    }

    /// Handles a message that the kernel refused as invalid, and whose datagrams it accepted
    /// singly. The third one in a row starts a pause.
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
    fn pause_doubles_up_to_60_s_and_success_resets_it() {
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
    fn three_refusals_in_a_row_start_a_pause() {
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
    fn disabled_state_allows_no_destination() {
        let (a, now) = (address(A), Instant::now());
        assert!(!GsoState::disabled().allowed(a, now));
        assert!(GsoState::new().allowed(a, now));
    }

    #[test]
    fn number_of_stored_destinations_is_bounded() {
        let mut now = Instant::now();
        let mut gso = GsoState::new();
        for port in 1..5_000 {
            gso.pause(SocketAddr::new([192, 0, 2, 1].into(), port), libc::EIO, now);
            now += Duration::from_millis(20);
        }
        assert!(gso.destinations.len() <= MAX_DESTINATIONS);
    }
}
