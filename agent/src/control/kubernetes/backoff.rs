//! Waits between tries, so that a thousand nodes do not come to the API server at once.

use std::time::{Duration, Instant};

use kube::runtime::utils::Backoff;

/// The wait after the first failure, at most; doubled with each more …
const FIRST: Duration = Duration::from_secs(1);
/// … up to this.
const LONGEST: Duration = Duration::from_secs(30);
/// Failures are forgotten after this long without one.
const FORGET: Duration = Duration::from_secs(120);

/// Longer with every failure, and never the same for two nodes.
#[derive(Debug, Default)]
pub(super) struct Waits {
    failures: u32,
    /// When the last wait was over.
    until: Option<Instant>,
}

impl Iterator for Waits {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.until.is_none_or(|until| until.elapsed() > FORGET) {
            self.failures = 0;
        }
        let longest = LONGEST.min(FIRST.saturating_mul(1 << self.failures.min(10)));
        let wait = longest.mul_f64(0.5 + 0.5 * fraction());
        self.failures += 1;
        self.until = Some(Instant::now() + wait);
        Some(wait)
    }
}

impl Backoff for Waits {
    /// A watch says that it begins before it has asked anything: its successes mean nothing. What is
    /// long ago is forgotten in any case.
    fn reset(&mut self) {}
}

/// Evenly between 0 and 1.
pub(super) fn fraction() -> f64 {
    let mut bytes = [0; 4];
    // Without random bytes the waits are merely the same everywhere.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_differ() {
        let two = || (Waits::default(), Waits::default());
        let (mut a, mut b) = two();
        let waits: Vec<_> = a.by_ref().take(40).collect();
        assert!(waits.iter().all(|wait| (FIRST / 2..=LONGEST).contains(wait)), "{waits:?}");
        assert!(waits[0] <= FIRST && waits[9] >= LONGEST / 2, "{waits:?}");
        assert_ne!(waits, b.by_ref().take(40).collect::<Vec<_>>());
        a.reset();
        assert!(a.next() >= Some(LONGEST / 2), "a watch that begins is no success");
        a.until = Instant::now().checked_sub(FORGET + FIRST);
        assert!(a.next() <= Some(FIRST));
    }
}
