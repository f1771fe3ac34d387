//! Readings of CLOCK_BOOTTIME and of the wall clock.

use std::time::{Duration, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use skein_core::time::Time;

/// Returns the time since boot (CLOCK_BOOTTIME). The clock is the same for all processes, advances
/// during suspension, and cannot be set. Sessions carry such times, so that the next process can
/// compute their age.
pub(super) fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let secs = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(secs, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Returns the readings of both clocks.
pub(super) fn clock() -> Time {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Time { mono: boot_time(), wall }
}
