//! Packetization-layer path MTU discovery (RFC 8899) with padded pings. Sizes are plaintext bytes.
//! ICMP messages are ignored.
//!
//! Every size is assumed to pass at first. A padded ping that gets no answer is repeated, together
//! with a short ping. The size counts as too large after [`MAX_PROBES`] answers to short pings
//! without an answer to any padded ping. A size that is not larger than the size in use and not
//! larger than [`BASE_PLPMTU`] needs [`MAX_PROBES_AT_BASE`] answers to short pings instead. A
//! failure that concerns short pings, too, such as a flapping link, says nothing about sizes.
//!
//! After a size has failed, [`BASE_PLPMTU`] is used at once, and a binary search finds the largest
//! size that passes. The size in use is confirmed every [`CONFIRMATION_TIMER`]; a larger size is
//! tried every [`PMTU_RAISE_TIMER`].

use std::time::Duration;

use crate::tunnel::timers::{CONFIRMATION_TIMER, PMTU_RAISE_TIMER, PROBE_TIMEOUT, PROBE_TIMER};
use crate::wire::ip::{MIN_IPV4_MTU, MIN_IPV6_MTU};

/// Number of answered short pings after which a size counts as too large, if none of the padded
/// pings was answered (MAX_PROBES of RFC 8899, section 5.1.2). On a path that loses 10 % of the
/// datagrams of every size, chance does not explain this result.
const MAX_PROBES: usize = 5;
/// Replaces [`MAX_PROBES`] for a size that is not larger than the size in use and not larger than
/// [`BASE_PLPMTU`]. IPv6 does not work below 1280 bytes, so that a receive buffer that is full for
/// a second or two, but still has room for short datagrams, must not reduce the size.
const MAX_PROBES_AT_BASE: usize = 20;
/// BASE_PLPMTU of RFC 8899, section 5.1.2: in use while the largest size is searched.
const BASE_PLPMTU: u16 = MIN_IPV6_MTU;
/// MIN_PLPMTU of RFC 8899, section 5.1.2: in use if [`BASE_PLPMTU`] does not pass.
const MIN_PLPMTU: u16 = MIN_IPV4_MTU;
/// Precision of the search in bytes.
const SEARCH_PRECISION: u16 = 8;

/// State of the path MTU discovery towards one peer.
#[derive(Debug)]
pub(crate) struct PathMtu {
    /// Size that both nodes would use without a limit of the path (MAX_PLPMTU), bytes.
    max_plpmtu: u16,
    /// Size in use (PLPMTU), bytes.
    plpmtu: u16,
    /// Largest size that was answered since the last confirmation, bytes; 0 if none.
    largest_acked: u16,
    /// Smallest size that failed, bytes; `max_plpmtu + 1` if none.
    smallest_failed: u32,
    probe: Option<Probe>,
    /// Time at which the size in use must be confirmed (monotonic clock).
    check_at: Duration,
    /// Time at which a larger size is tried (monotonic clock); zero while no reduced size has been
    /// found.
    raise_at: Duration,
}

/// Probes of one size.
#[derive(Debug)]
struct Probe {
    size: u16,
    started: Duration,
    last_sent: Duration,
    /// Numbers of the padded pings.
    probe_ids: Vec<u64>,
    /// Numbers of the short reference pings that have no answer yet.
    reference_ids: Vec<u64>,
    /// Number of reference pings that were answered.
    references_acked: usize,
}

impl PathMtu {
    pub(crate) fn new() -> Self {
        Self {
            max_plpmtu: 0,
            plpmtu: 0,
            largest_acked: 0,
            smallest_failed: 0,
            probe: None,
            check_at: Duration::ZERO,
            raise_at: Duration::ZERO,
        }
    }

    /// Handles a new session in which the two nodes would use `max_plpmtu`. Starts again if that
    /// size has changed or if the peer has a new address (`is_new_path`).
    pub(crate) fn on_session(&mut self, now: Duration, max_plpmtu: u16, is_new_path: bool) {
        if self.max_plpmtu != max_plpmtu || is_new_path {
            let smallest_failed = u32::from(max_plpmtu) + 1;
            *self = Self { max_plpmtu, plpmtu: max_plpmtu, smallest_failed, ..Self::new() };
        }
        self.check_at = now;
    }

    /// Returns the size in use if it is smaller than the size that both nodes would use.
    pub(crate) fn reduced_mtu(&self) -> Option<u16> {
        (self.plpmtu < self.max_plpmtu).then_some(self.plpmtu)
    }

    /// Returns true if the first padded ping of a size got no answer. The next padded ping then
    /// needs a short reference ping.
    pub(crate) fn needs_reference(&self) -> bool {
        self.probe.as_ref().is_some_and(|probe| probe.probe_ids.len() > 1)
    }

    /// Returns the size of the padded ping to send now, if any. `id` is the number that this ping
    /// will have.
    pub(crate) fn poll_probe(&mut self, now: Duration, id: u64) -> Option<u16> {
        if let Some(probe) = &self.probe {
            if now.saturating_sub(probe.last_sent) < PROBE_TIMER {
                return None;
            }
            let is_at_base = probe.size <= self.plpmtu && probe.size <= BASE_PLPMTU;
            let (tries, timeout) = match is_at_base {
                true => (MAX_PROBES_AT_BASE, 2 * PROBE_TIMEOUT),
                false => (MAX_PROBES, PROBE_TIMEOUT),
            };
            if probe.references_acked >= tries {
                let size = probe.size;
                self.on_size_failed(size);
            } else if now.saturating_sub(probe.started) > timeout {
                // A peer that answers too few short pings allows no conclusion.
                self.probe = None;
                self.check_at = now + CONFIRMATION_TIMER;
            }
        }
        if self.probe.is_none() {
            let size = self.next_size(now)?;
            let (probe_ids, reference_ids) = (Vec::new(), Vec::new());
            self.probe = Some(Probe {
                size,
                started: now,
                last_sent: now,
                probe_ids,
                reference_ids,
                references_acked: 0,
            });
        }
        let probe = self.probe.as_mut()?;
        probe.last_sent = now;
        probe.probe_ids.push(id);
        Some(probe.size)
    }

    /// Stores the number of a short ping that is sent together with the padded ping.
    pub(crate) fn on_reference_sent(&mut self, id: u64) {
        if let Some(probe) = &mut self.probe {
            probe.reference_ids.push(id);
        }
    }

    /// Handles the answer to the ping with this number.
    pub(crate) fn on_pong(&mut self, id: u64) {
        if let Some(probe) = self.probe.take_if(|probe| probe.probe_ids.contains(&id)) {
            self.largest_acked = self.largest_acked.max(probe.size);
            self.plpmtu = self.plpmtu.max(probe.size);
        } else if let Some(probe) = &mut self.probe
            && let Some(at) =
                probe.reference_ids.iter().position(|reference_ids| *reference_ids == id)
        {
            probe.reference_ids.swap_remove(at);
            probe.references_acked += 1;
        }
    }

    /// Handles a datagram with a plaintext of `size` bytes that this host's own route refused; no
    /// probe needs to confirm the refusal. `fits` is the longest plaintext that the route carries,
    /// if known. Without `fits` the size in use falls to [`BASE_PLPMTU`], and to [`MIN_PLPMTU`] if
    /// [`BASE_PLPMTU`] is refused, too. The search continues from there. Returns whether the size
    /// in use became shorter.
    pub(crate) fn on_send_too_big(&mut self, now: Duration, size: u16, fits: Option<u16>) -> bool {
        let fits = fits.filter(|fits| *fits < size);
        let least = MIN_PLPMTU.min(self.max_plpmtu);
        self.smallest_failed =
            self.smallest_failed.min(fits.map_or(size.into(), |fits| u32::from(fits) + 1));
        self.probe.take_if(|probe| u32::from(probe.size) >= self.smallest_failed);
        if u32::from(self.plpmtu) < self.smallest_failed {
            return false;
        }
        let before = self.plpmtu;
        self.plpmtu = match fits {
            Some(fits) => fits.max(least),
            None if size > BASE_PLPMTU => BASE_PLPMTU,
            None => least,
        };
        self.largest_acked = 0;
        self.check_at = now;
        self.plpmtu < before
    }

    fn on_size_failed(&mut self, size: u16) {
        self.probe = None;
        self.smallest_failed = size.into();
        if self.plpmtu >= size {
            self.plpmtu =
                if size > BASE_PLPMTU { BASE_PLPMTU } else { MIN_PLPMTU.min(self.max_plpmtu) };
            self.largest_acked = 0;
        }
    }

    /// Returns the next size to probe; `None` if the current knowledge is sufficient.
    fn next_size(&mut self, now: Duration) -> Option<u16> {
        if self.check_at > now {
            return None;
        }
        // If the minimum has failed, too, there is no smaller size to probe.
        let is_at_minimum =
            self.plpmtu <= MIN_PLPMTU && self.smallest_failed <= u32::from(MIN_PLPMTU);
        if self.largest_acked < self.plpmtu && !is_at_minimum {
            return Some(self.plpmtu);
        }
        let room = self.smallest_failed.saturating_sub(u32::from(self.largest_acked));
        if !is_at_minimum
            && self.largest_acked < self.max_plpmtu
            && room > u32::from(SEARCH_PRECISION)
        {
            // If no size has failed, the largest one passes most likely.
            return match self.smallest_failed > u32::from(self.max_plpmtu) {
                true => Some(self.max_plpmtu),
                false => u16::try_from(u32::from(self.largest_acked) + room / 2).ok(),
            };
        }
        // The search is complete. The next confirmation starts with no acknowledged size.
        self.check_at = now + CONFIRMATION_TIMER;
        self.largest_acked = 0;
        if self.plpmtu < self.max_plpmtu {
            if self.raise_at <= now {
                // `raise_at` is zero at the end of the first search: only the next attempt is
                // scheduled. Later, the failed size is forgotten, so that larger sizes are tried.
                let is_due = self.raise_at > Duration::ZERO;
                self.raise_at = now + PMTU_RAISE_TIMER;
                if is_due {
                    self.smallest_failed = u32::from(self.max_plpmtu) + 1;
                }
            }
        } else {
            self.raise_at = Duration::ZERO;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ticks every 250 ms for `seconds` over a path that carries `width` bytes. Returns the sizes
    /// that were sent.
    fn run(path: &mut PathMtu, now: &mut Duration, seconds: u64, width: u16) -> Vec<u16> {
        let mut sent = Vec::new();
        for _ in 0..seconds * 4 {
            *now += Duration::from_millis(250);
            let id = now.as_millis() as u64;
            if let Some(size) = path.poll_probe(*now, id) {
                sent.push(size);
                if path.needs_reference() {
                    path.on_reference_sent(id + 1);
                    path.on_pong(id + 1);
                }
                if size <= width {
                    path.on_pong(id);
                }
            }
        }
        sent
    }

    #[test]
    fn unreduced_path_is_confirmed_every_few_seconds() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        let sent = run(&mut path, &mut now, 60, 1440);
        assert_eq!(path.reduced_mtu(), None);
        assert!((10..=14).contains(&sent.len()) && sent.iter().all(|s| *s == 1440), "{sent:?}");
    }

    #[test]
    fn silent_peer_does_not_reduce_path_mtu() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        for id in 0..200 {
            now += Duration::from_millis(250);
            path.poll_probe(now, 2 * id);
            path.on_reference_sent(2 * id + 1);
        }
        assert_eq!(path.reduced_mtu(), None);
    }

    #[test]
    fn new_endpoint_resets_path_mtu() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        run(&mut path, &mut now, 20, 1000);
        let found = path.reduced_mtu();
        assert!(found.is_some_and(|found| (992..=1000).contains(&found)), "{found:?}");
        path.on_session(now, 1440, false);
        assert_eq!(
            path.reduced_mtu(),
            found,
            "A rekey to the same endpoint must keep the path MTU."
        );
        path.on_session(now, 1440, true);
        assert_eq!(path.reduced_mtu(), None);
    }

    #[test]
    fn refusal_by_local_route_reduces_path_mtu_at_once() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        run(&mut path, &mut now, 10, 1440);
        assert!(
            path.on_send_too_big(now, 1440, Some(1340)),
            "The refusal must reduce the path MTU."
        );
        assert!(
            !path.on_send_too_big(now, 1440, Some(1340)),
            "A known refusal must change nothing."
        );
        assert_eq!(
            path.reduced_mtu(),
            Some(1340),
            "The size of the route must be used without a search."
        );
        let sent = run(&mut path, &mut now, 20, 1340);
        assert_eq!(path.reduced_mtu(), Some(1340));
        assert!(sent.iter().all(|size| *size <= 1340), "No larger size may be tried: {sent:?}");
        run(&mut path, &mut now, 150, 1440);
        assert_eq!(path.reduced_mtu(), None, "A wider route must be detected.");
    }

    #[test]
    fn refusal_without_size_falls_to_base_and_searches() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        path.on_send_too_big(now, 1440, None);
        assert_eq!(path.reduced_mtu(), Some(BASE_PLPMTU));
        run(&mut path, &mut now, 20, 1400);
        assert!(path.reduced_mtu().is_some_and(|limit| (1392..=1400).contains(&limit)));
        path.on_send_too_big(now, 1280, None);
        assert_eq!(
            path.reduced_mtu(),
            Some(MIN_PLPMTU),
            "A refusal of the base must be used at once."
        );
    }

    #[test]
    fn refused_probe_keeps_size_in_use() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        path.on_send_too_big(now, 1440, Some(1300));
        run(&mut path, &mut now, 10, 1300);
        // A reported size above the refused size is ignored.
        path.on_send_too_big(now, 1440, Some(1440));
        path.on_send_too_big(now, 1320, Some(1300));
        assert_eq!(path.reduced_mtu(), Some(1300));
    }

    #[test]
    fn short_loss_does_not_lower_mtu_below_1280() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        run(&mut path, &mut now, 30, 1300);
        assert!(path.reduced_mtu().is_some_and(|limit| (1292..=1300).contains(&limit)));
        // The base is not probed in the first seconds.
        run(&mut path, &mut now, 8, 200);
        assert_eq!(path.reduced_mtu(), Some(BASE_PLPMTU));
        run(&mut path, &mut now, 30, 1300);
        assert!(
            path.reduced_mtu().is_some_and(|limit| limit >= BASE_PLPMTU),
            "{:?}",
            path.reduced_mtu()
        );
        run(&mut path, &mut now, 20, 1000);
        assert!(path.reduced_mtu().is_some_and(|limit| limit <= 1000), "{:?}", path.reduced_mtu());
    }

    proptest! {
        #[test]
        fn path_mtu_follows_narrower_and_wider_paths(
            most in 576u16..9000, narrow in 576u16..9000, wide in 576u16..9000,
        ) {
            let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
            path.on_session(now, most, true);
            run(&mut path, &mut now, 10, most);
            prop_assert_eq!(path.reduced_mtu(), None);
            // A size that is too large is out of use after its confirmation and its probes.
            run(&mut path, &mut now, 8, narrow);
            let used = path.reduced_mtu().unwrap_or(most);
            prop_assert!(used <= narrow || used == BASE_PLPMTU, "{} used of {}", used, narrow);
            // The largest size that passes is in use soon.
            run(&mut path, &mut now, 30, narrow);
            let used = path.reduced_mtu().unwrap_or(most);
            prop_assert!(used <= narrow && used + SEARCH_PRECISION >= narrow.min(most), "{} of {}", used, narrow);
            // A path that becomes wider is noticed within two minutes.
            let wide = wide.max(narrow);
            run(&mut path, &mut now, 150, wide);
            let used = path.reduced_mtu().unwrap_or(most);
            prop_assert!(used <= wide && used + SEARCH_PRECISION >= wide.min(most), "{} of {}", used, wide);
        }
    }
}
