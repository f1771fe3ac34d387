//! How long a datagram may be to reach a peer (RFC 8899), found out by padded pings: no ICMP is needed,
//! and none is believed.
//!
//! Sizes are plaintext in bytes. A path is taken for wide enough until a padded ping of that size gets no
//! answer, several times, while a short one that was sent with it does: what loses both, as a link that
//! flaps, says nothing of sizes. Then a size that passes nearly everywhere is used at once, and the longest
//! that passes is searched. What is in use is checked every few seconds, and now and then whether more
//! passes again.

use std::time::Duration;

use crate::tunnel::timers::{CONFIRMATION_TIMER, PMTU_RAISE_TIMER, PROBE_TIMEOUT, PROBE_TIMER};
use crate::wire::ip::{MIN_IPV4_MTU, MIN_IPV6_MTU};

/// Long pings without an answer, each beside a short one with an answer, until their size counts as too long:
/// more than chance makes of 10 % loss.
const MAX_PROBES: usize = 5;
/// The same where less than [`BASE_PLPMTU`] would follow, over which IPv6 has no way: a receive buffer that is full
/// for a second or two, and has room for what is short, must not do that.
const MAX_PROBES_AT_BASE: usize = 20;
/// BASE_PLPMTU of RFC 8899, section 5.1.2: in use while the largest size is searched.
const BASE_PLPMTU: u16 = MIN_IPV6_MTU;
/// MIN_PLPMTU of RFC 8899, section 5.1.2: in use if [`BASE_PLPMTU`] does not pass.
const MIN_PLPMTU: u16 = MIN_IPV4_MTU;
/// The search ends when it is as close as this.
const SEARCH_PRECISION: u16 = 8;

/// What is known of the path to one peer.
#[derive(Debug)]
pub(crate) struct PathMtu {
    /// What both ends would use.
    most: u16,
    /// What is used.
    used: u16,
    /// The longest that was found to pass since the last check …
    passes: u16,
    /// … and the shortest that was not.
    fails: u32,
    probe: Option<Probe>,
    /// When to look again, and when to try more again.
    check_at: Duration,
    raise_at: Duration,
}

#[derive(Debug)]
struct Probe {
    size: u16,
    begun: Duration,
    last: Duration,
    /// Of its pings.
    ids: Vec<u64>,
    /// Of the short pings beside them that were not answered yet, and how many were.
    beside: Vec<u64>,
    answered: usize,
}

impl PathMtu {
    pub(crate) fn new() -> Self {
        Self {
            most: 0,
            used: 0,
            passes: 0,
            fails: 0,
            probe: None,
            check_at: Duration::ZERO,
            raise_at: Duration::ZERO,
        }
    }

    /// There is a session in which `most` is the longest; `elsewhere`: the peer is at another address.
    pub(crate) fn on_session(&mut self, now: Duration, most: u16, elsewhere: bool) {
        if self.most != most || elsewhere {
            let fails = u32::from(most) + 1;
            *self = Self { most, used: most, fails, ..Self::new() };
        }
        self.check_at = now;
    }

    /// The longest that may be sent, where that is less than both ends would use.
    pub(crate) fn limit(&self) -> Option<u16> {
        (self.used < self.most).then_some(self.used)
    }

    /// Whether the last ping was not answered.
    pub(crate) fn is_waiting(&self) -> bool {
        self.probe.as_ref().is_some_and(|probe| probe.ids.len() > 1)
    }

    /// Which size to ping with now, if any; `id`: of that ping.
    pub(crate) fn ping(&mut self, now: Duration, id: u64) -> Option<u16> {
        if let Some(probe) = &self.probe {
            if now.saturating_sub(probe.last) < PROBE_TIMER {
                return None;
            }
            let grave = probe.size <= self.used && probe.size <= BASE_PLPMTU;
            let (tries, patience) = match grave {
                true => (MAX_PROBES_AT_BASE, 2 * PROBE_TIMEOUT),
                false => (MAX_PROBES, PROBE_TIMEOUT),
            };
            if probe.answered >= tries {
                let size = probe.size;
                self.failed(size);
            } else if now.saturating_sub(probe.begun) > patience {
                // Of a peer that says next to nothing nothing is learnt.
                self.probe = None;
                self.check_at = now + CONFIRMATION_TIMER;
            }
        }
        if self.probe.is_none() {
            let size = self.next(now)?;
            let (ids, beside) = (Vec::new(), Vec::new());
            self.probe = Some(Probe { size, begun: now, last: now, ids, beside, answered: 0 });
        }
        let probe = self.probe.as_mut()?;
        probe.last = now;
        probe.ids.push(id);
        Some(probe.size)
    }

    /// A short ping goes out with the long one.
    pub(crate) fn beside(&mut self, id: u64) {
        if let Some(probe) = &mut self.probe {
            probe.beside.push(id);
        }
    }

    /// A ping was answered.
    pub(crate) fn on_pong(&mut self, id: u64) {
        if let Some(probe) = self.probe.take_if(|probe| probe.ids.contains(&id)) {
            self.passes = self.passes.max(probe.size);
            self.used = self.used.max(probe.size);
        } else if let Some(probe) = &mut self.probe
            && let Some(at) = probe.beside.iter().position(|beside| *beside == id)
        {
            probe.beside.swap_remove(at);
            probe.answered += 1;
        }
    }

    /// Handles a datagram with a plaintext of `size` bytes that this host's own route refused; no
    /// probe needs to confirm the refusal. `fits` is the longest plaintext that the route carries,
    /// if known. Without `fits` the size in use falls to [`BASE_PLPMTU`], and to [`MIN_PLPMTU`] if [`BASE_PLPMTU`] is
    /// refused, too. The search continues from there. Returns whether the size in use became
    /// shorter.
    pub(crate) fn refused(&mut self, now: Duration, size: u16, fits: Option<u16>) -> bool {
        let fits = fits.filter(|fits| *fits < size);
        let least = MIN_PLPMTU.min(self.most);
        self.fails = self.fails.min(fits.map_or(size.into(), |fits| u32::from(fits) + 1));
        self.probe.take_if(|probe| u32::from(probe.size) >= self.fails);
        if u32::from(self.used) < self.fails {
            return false;
        }
        let before = self.used;
        self.used = match fits {
            Some(fits) => fits.max(least),
            None if size > BASE_PLPMTU => BASE_PLPMTU,
            None => least,
        };
        self.passes = 0;
        self.check_at = now;
        self.used < before
    }

    fn failed(&mut self, size: u16) {
        self.probe = None;
        self.fails = size.into();
        if self.used >= size {
            self.used = if size > BASE_PLPMTU { BASE_PLPMTU } else { MIN_PLPMTU.min(self.most) };
            self.passes = 0;
        }
    }

    /// The size to try next; `None`: all is known for now.
    fn next(&mut self, now: Duration) -> Option<u16> {
        if self.check_at > now {
            return None;
        }
        // Nothing less could be used.
        let bottom = self.used <= MIN_PLPMTU && self.fails <= u32::from(MIN_PLPMTU);
        if self.passes < self.used && !bottom {
            return Some(self.used);
        }
        let room = self.fails.saturating_sub(u32::from(self.passes));
        if !bottom && self.passes < self.most && room > u32::from(SEARCH_PRECISION) {
            // What was never tried is most likely the whole.
            return match self.fails > u32::from(self.most) {
                true => Some(self.most),
                false => u16::try_from(u32::from(self.passes) + room / 2).ok(),
            };
        }
        // Known: the next look begins anew.
        self.check_at = now + CONFIRMATION_TIMER;
        self.passes = 0;
        if self.used < self.most {
            if self.raise_at <= now {
                // The first time, what has just been found out need not be tried again.
                let again = self.raise_at > Duration::ZERO;
                self.raise_at = now + PMTU_RAISE_TIMER;
                if again {
                    self.fails = u32::from(self.most) + 1;
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

    /// Ticks four times a second for that long, over a path of that width; what was sent.
    fn run(path: &mut PathMtu, now: &mut Duration, seconds: u64, width: u16) -> Vec<u16> {
        let mut sent = Vec::new();
        for _ in 0..seconds * 4 {
            *now += Duration::from_millis(250);
            let id = now.as_millis() as u64;
            if let Some(size) = path.ping(*now, id) {
                sent.push(size);
                if path.is_waiting() {
                    path.beside(id + 1);
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
        assert_eq!(path.limit(), None);
        assert!((10..=14).contains(&sent.len()) && sent.iter().all(|s| *s == 1440), "{sent:?}");
    }

    #[test]
    fn silent_peer_does_not_reduce_path_mtu() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        for id in 0..200 {
            now += Duration::from_millis(250);
            path.ping(now, 2 * id);
            path.beside(2 * id + 1);
        }
        assert_eq!(path.limit(), None);
    }

    #[test]
    fn new_endpoint_resets_path_mtu() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        run(&mut path, &mut now, 20, 1000);
        let found = path.limit();
        assert!(found.is_some_and(|found| (992..=1000).contains(&found)), "{found:?}");
        path.on_session(now, 1440, false);
        assert_eq!(path.limit(), found, "new keys lead by the same way");
        path.on_session(now, 1440, true);
        assert_eq!(path.limit(), None);
    }

    #[test]
    fn refusal_by_local_route_reduces_path_mtu_at_once() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        run(&mut path, &mut now, 10, 1440);
        assert!(path.refused(now, 1440, Some(1340)), "the path becomes narrower");
        assert!(!path.refused(now, 1440, Some(1340)), "that is known");
        assert_eq!(path.limit(), Some(1340), "the route's own size is used without a search");
        let sent = run(&mut path, &mut now, 20, 1340);
        assert_eq!(path.limit(), Some(1340));
        assert!(sent.iter().all(|size| *size <= 1340), "nothing longer is tried: {sent:?}");
        run(&mut path, &mut now, 150, 1440);
        assert_eq!(path.limit(), None, "a route that is wider again is noticed");
    }

    #[test]
    fn refusal_without_size_falls_to_base_and_searches() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        path.refused(now, 1440, None);
        assert_eq!(path.limit(), Some(BASE_PLPMTU));
        run(&mut path, &mut now, 20, 1400);
        assert!(path.limit().is_some_and(|limit| (1392..=1400).contains(&limit)));
        path.refused(now, 1280, None);
        assert_eq!(path.limit(), Some(MIN_PLPMTU), "less than the base is used at once, too");
    }

    #[test]
    fn refused_probe_keeps_size_in_use() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        path.refused(now, 1440, Some(1300));
        run(&mut path, &mut now, 10, 1300);
        // A reported size above the refused size is ignored.
        path.refused(now, 1440, Some(1440));
        path.refused(now, 1320, Some(1300));
        assert_eq!(path.limit(), Some(1300));
    }

    #[test]
    fn short_loss_does_not_lower_mtu_below_1280() {
        let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
        path.on_session(now, 1440, true);
        run(&mut path, &mut now, 30, 1300);
        assert!(path.limit().is_some_and(|limit| (1292..=1300).contains(&limit)));
        // It is seconds until the base itself is asked for.
        run(&mut path, &mut now, 8, 200);
        assert_eq!(path.limit(), Some(BASE_PLPMTU));
        run(&mut path, &mut now, 30, 1300);
        assert!(path.limit().is_some_and(|limit| limit >= BASE_PLPMTU), "{:?}", path.limit());
        run(&mut path, &mut now, 20, 1000);
        assert!(path.limit().is_some_and(|limit| limit <= 1000), "{:?}", path.limit());
    }

    proptest! {
        #[test]
        fn path_mtu_follows_narrower_and_wider_paths(
            most in 576u16..9000, narrow in 576u16..9000, wide in 576u16..9000,
        ) {
            let (mut path, mut now) = (PathMtu::new(), Duration::from_secs(9));
            path.on_session(now, most, true);
            run(&mut path, &mut now, 10, most);
            prop_assert_eq!(path.limit(), None);
            // What is too long is not used any more after a check and its pings …
            run(&mut path, &mut now, 8, narrow);
            let used = path.limit().unwrap_or(most);
            prop_assert!(used <= narrow || used == BASE_PLPMTU, "{} used of {}", used, narrow);
            // … and soon all that passes is.
            run(&mut path, &mut now, 30, narrow);
            let used = path.limit().unwrap_or(most);
            prop_assert!(used <= narrow && used + SEARCH_PRECISION >= narrow.min(most), "{} of {}", used, narrow);
            // A path that becomes wider is noticed within two minutes.
            let wide = wide.max(narrow);
            run(&mut path, &mut now, 150, wide);
            let used = path.limit().unwrap_or(most);
            prop_assert!(used <= wide && used + SEARCH_PRECISION >= wide.min(most), "{} of {}", used, wide);
        }
    }
}
