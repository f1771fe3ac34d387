//! Progress of a flow, readable while the flow runs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Counters of one flow, which the receiver of the flow writes and any thread reads.
#[derive(Debug, Default)]
pub struct FlowProgress {
    bytes: AtomicU64,
    stop: AtomicBool,
    pauses: Mutex<Pauses>,
}

#[derive(Debug, Default)]
struct Pauses {
    last: Option<Instant>,
    longest: Duration,
}

impl FlowProgress {
    /// Adds received bytes whose content was right, and measures the pause since the last ones.
    pub fn add_received(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let now = Instant::now();
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = pauses.last.replace(now) {
            pauses.longest = pauses.longest.max(now - last);
        }
    }

    /// Returns the number of received bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns the time of the last received bytes; `None` before the first.
    pub fn last_received(&self) -> Option<Instant> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner).last
    }

    /// Returns the longest pause that ended since the last call of this function.
    pub fn take_longest_pause(&self) -> Duration {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut pauses.longest)
    }

    /// Requests that the flow ends.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Returns whether the flow was requested to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pause_is_returned_once_after_its_end() {
        let progress = FlowProgress::default();
        progress.add_received(1);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(progress.take_longest_pause(), Duration::ZERO);
        progress.add_received(2);
        assert!(progress.take_longest_pause() >= Duration::from_millis(20));
        assert_eq!((progress.bytes(), progress.take_longest_pause()), (3, Duration::ZERO));
        assert!(progress.last_received().unwrap().elapsed() < Duration::from_secs(30));
    }
}
