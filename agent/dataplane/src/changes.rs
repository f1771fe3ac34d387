//! Notification of connections that wait for a change of the report.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Version of the state that the control process must react to at once: the reduced path MTUs.
#[derive(Debug, Default)]
pub(super) struct Changes {
    version: Mutex<u64>,
    changed: Condvar,
}

impl Changes {
    /// Increments the version and wakes all waiting connections.
    pub(super) fn raise(&self) {
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }

    /// Waits until the version differs from `known` or `timeout` has passed. Returns the version.
    pub(super) fn wait(&self, known: u64, timeout: Duration) -> u64 {
        let version = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |version: &mut u64| *version == known;
        let waited = self.changed.wait_timeout_while(version, timeout, same);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn waiting_ends_with_a_change_or_the_timeout() {
        let changes = Changes::default();
        assert_eq!(changes.wait(0, Duration::from_millis(10)), 0);
        changes.raise();
        assert_eq!(
            changes.wait(0, Duration::from_secs(60)),
            1,
            "A change before the call must end the wait."
        );
        let long = Duration::from_secs(60);
        let start = Instant::now();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| changes.wait(1, long));
            changes.raise();
            assert_eq!(waiting.join().ok(), Some(2));
        });
        assert!(start.elapsed() < long, "The change must end the wait.");
    }
}
