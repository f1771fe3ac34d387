//! Limit of log lines about events that other programs can cause at any rate.

use std::time::{Duration, Instant};

/// Minimum interval of log lines about one kind of event.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Log lines about one kind of event: the first event at once, then one line per minute.
#[derive(Debug, Default)]
pub struct LogLimit {
    logged_at: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// Counts one event. Returns `None` if the event must not be logged. Otherwise, returns the
    /// number of events that were not logged since the last log line. This event is not included.
    pub fn count(&mut self, now: Instant) -> Option<u64> {
        if self.logged_at.is_some_and(|at| now.saturating_duration_since(at) < LOG_INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.logged_at = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_logged_once_per_minute_with_count() {
        let start = Instant::now();
        let mut limit = LogLimit::default();
        let logged: Vec<_> =
            (0..1500_u32).map(|n| limit.count(start + n * Duration::from_millis(100))).collect();
        assert_eq!((logged[0], logged[1], logged[599]), (Some(0), None, None));
        assert_eq!((logged[600], logged[1200]), (Some(599), Some(599)));
        assert_eq!(logged.iter().flatten().count(), 3);
    }
}
