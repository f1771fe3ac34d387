//! Traffic between pods: senders, receivers and measurements.

pub mod capture;
pub mod flood;
pub mod http;
pub mod iperf;
pub mod pattern;
pub mod ping;
pub mod progress;
pub mod redis;
pub mod rr;
pub mod sink;
pub mod transfer;
pub mod udp;

use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Percentiles of a latency, microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latency {
    /// Median, microseconds.
    pub p50: f64,
    /// 99th percentile, microseconds.
    pub p99: f64,
}

impl Latency {
    /// Computes the percentiles of samples in nanoseconds, which are sorted in place. Returns
    /// `None` if there is no sample.
    pub fn of_nanos(samples: &mut [u64]) -> Option<Self> {
        samples.sort_unstable();
        let last = samples.len().checked_sub(1)?;
        let at = |share: f64| samples[(last as f64 * share).round() as usize] as f64 / 1000.0;
        Some(Self { p50: at(0.50), p99: at(0.99) })
    }
}

/// Returns the median, or `None` if there is no value.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
    Some((values[low] + values[high]) / 2.0)
}

/// Calls `bind`, which binds a socket to a fixed port. Tries again for 30 s while the address is in
/// use: between fork and exec, a process that another thread starts has a copy of an earlier
/// socket.
///
/// # Errors
/// If the address is still in use after 30 s, or cannot be bound for another reason.
pub fn retry_bind<S>(bind: impl Fn() -> io::Result<S>) -> io::Result<S> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match bind() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([]), None);
    }

    #[test]
    fn percentiles_of_a_hundred_and_one() {
        let mut samples: Vec<u64> = (0..=100).rev().map(|n| n * 1000).collect();
        assert_eq!(Latency::of_nanos(&mut samples).unwrap(), Latency { p50: 50.0, p99: 99.0 });
        assert_eq!(Latency::of_nanos(&mut []), None);
    }
}
