//! How far a flow has come, for whoever watches it while it goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Counts of one flow; shared between who moves and who watches.
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
    /// So many bytes more have arrived, and they were right.
    pub fn add_received(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let now = Instant::now();
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = pauses.last.replace(now) {
            pauses.longest = pauses.longest.max(now - last);
        }
    }

    /// Bytes that have arrived.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// When the last ones came.
    pub fn last_received(&self) -> Option<Instant> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner).last
    }

    /// The longest pause that has ended since the last call.
    pub fn take_longest_pause(&self) -> Duration {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut pauses.longest)
    }

    /// Asks the flow to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_told_once_and_only_when_it_has_ended() {
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
