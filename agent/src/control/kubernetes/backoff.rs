//! Random delays between attempts, so that the nodes of a cluster do not send requests to the API
//! server at the same time.

use std::time::{Duration, Instant};

use kube::runtime::utils::Backoff;

/// Maximum delay after the first failure; it doubles with each further failure.
const FIRST_DELAY: Duration = Duration::from_secs(1);
/// Upper bound of all delays.
const MAX_DELAY: Duration = Duration::from_secs(30);
/// Time without a failure after which the delay starts again at [`FIRST_DELAY`].
const RESET_INTERVAL: Duration = Duration::from_secs(120);

/// Iterator of delays: each is uniform between half of the current maximum and the maximum, which
/// doubles with each failure.
#[derive(Debug, Default)]
pub(super) struct RetryBackoff {
    failures: u32,
    /// End of the last delay.
    until: Option<Instant>,
}

impl Iterator for RetryBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.until.is_none_or(|until| until.elapsed() > RESET_INTERVAL) {
            self.failures = 0;
        }
        let longest = MAX_DELAY.min(FIRST_DELAY.saturating_mul(1 << self.failures.min(10)));
        let wait = longest.mul_f64(0.5 + 0.5 * random_fraction());
        self.failures += 1;
        self.until = Some(Instant::now() + wait);
        Some(wait)
    }
}

impl Backoff for RetryBackoff {
    /// Does nothing, because a watch reports its start as a success before it has sent a request.
    /// The delay starts again after [`RESET_INTERVAL`].
    fn reset(&mut self) {}
}

/// Returns a random number, uniform between 0 and 1.
pub(super) fn random_fraction() -> f64 {
    let mut bytes = [0; 4];
    // Without random bytes the delays of all nodes are equal, which is harmless.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_and_differ() {
        let two = || (RetryBackoff::default(), RetryBackoff::default());
        let (mut a, mut b) = two();
        let waits: Vec<_> = a.by_ref().take(40).collect();
        assert!(waits.iter().all(|wait| (FIRST_DELAY / 2..=MAX_DELAY).contains(wait)), "{waits:?}");
        assert!(waits[0] <= FIRST_DELAY && waits[9] >= MAX_DELAY / 2, "{waits:?}");
        assert_ne!(waits, b.by_ref().take(40).collect::<Vec<_>>());
        a.reset();
        assert!(a.next() >= Some(MAX_DELAY / 2), "the start of a watch must not reset the delay");
        a.until = Instant::now().checked_sub(RESET_INTERVAL + FIRST_DELAY);
        assert!(a.next() <= Some(FIRST_DELAY));
    }
}
