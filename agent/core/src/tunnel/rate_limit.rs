//! Token buckets, and a bounded table of token buckets by source address.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Minimum interval between two searches of a full table for buckets to remove.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// Rate of a token bucket.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Sustained rate, tokens per second.
    pub per_second: u32,
    /// Capacity of the bucket, tokens.
    pub burst: u32,
}

impl Rate {
    const fn token_time(self) -> Duration {
        Duration::from_nanos(1_000_000_000 / self.per_second as u64)
    }

    const fn fill_time(self) -> Duration {
        Duration::from_nanos(1_000_000_000 / self.per_second as u64 * self.burst as u64)
    }
}

/// A token bucket. Its level is stored as the time that filling it to this level takes.
#[derive(Debug, Clone, Copy)]
pub struct TokenBucket {
    level: Duration,
    at: Duration,
}

impl TokenBucket {
    /// Creates a full bucket.
    pub const fn new(rate: Rate, now: Duration) -> Self {
        Self { level: rate.fill_time(), at: now }
    }

    /// Takes a token if there is one. `now` is a monotonic time.
    pub fn try_acquire(&mut self, rate: Rate, now: Duration) -> bool {
        self.level = self.level_at(rate, now);
        self.at = now;
        match self.level.checked_sub(rate.token_time()) {
            Some(rest) => {
                self.level = rest;
                true
            }
            None => false,
        }
    }

    fn level_at(&self, rate: Rate, now: Duration) -> Duration {
        (self.level + now.saturating_sub(self.at)).min(rate.fill_time())
    }
}

/// Token buckets by source: one for each IPv4 address and IPv6 /64 prefix, or one for each address
/// and port.
#[derive(Debug)]
pub(crate) struct PerSourceLimiter {
    rate: Rate,
    /// True if each address and port has its own bucket.
    endpoints: bool,
    capacity: usize,
    buckets: BTreeMap<(u128, u16), TokenBucket>,
    swept: Option<Duration>,
}

impl PerSourceLimiter {
    /// Creates a limiter with one bucket per IPv4 address and IPv6 /64 prefix. When `capacity`
    /// buckets are in use, new sources are refused.
    pub(crate) const fn new(rate: Rate, capacity: usize) -> Self {
        Self { rate, endpoints: false, capacity, buckets: BTreeMap::new(), swept: None }
    }

    /// Creates a limiter with one bucket per address and port, for endpoints that are known to
    /// belong to nodes.
    pub(crate) fn per_endpoint(rate: Rate, capacity: usize) -> Self {
        Self { endpoints: true, ..Self::new(rate, capacity) }
    }

    pub(crate) fn try_acquire(&mut self, source: SocketAddr, now: Duration) -> bool {
        let (rate, key) = (self.rate, key(source, self.endpoints));
        if self.buckets.len() >= self.capacity && !self.buckets.contains_key(&key) {
            // The search takes time, so not every refused source may cause one.
            if self.swept.is_some_and(|at| now.saturating_sub(at) < SWEEP_INTERVAL) {
                return false;
            }
            self.swept = Some(now);
            // A full bucket carries no information: removing it does not change a later decision.
            self.buckets.retain(|_, bucket| bucket.level_at(rate, now) < rate.fill_time());
            if self.buckets.len() >= self.capacity {
                return false;
            }
        }
        self.buckets.entry(key).or_insert(TokenBucket::new(rate, now)).try_acquire(rate, now)
    }
}

fn key(source: SocketAddr, endpoint: bool) -> (u128, u16) {
    let address = match source.ip().to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) if endpoint => v6.to_bits(),
        IpAddr::V6(v6) => v6.to_bits() >> 64 << 64,
    };
    (address, if endpoint { source.port() } else { 0 })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { per_second: 10, burst: 3 };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn bucket_refills_up_to_its_capacity() {
        let mut bucket = TokenBucket::new(RATE, ms(0));
        assert_eq!([(); 4].map(|()| bucket.try_acquire(RATE, ms(0))), [true, true, true, false]);
        assert!(!bucket.try_acquire(RATE, ms(99)));
        assert!(bucket.try_acquire(RATE, ms(100)));
        assert!(!bucket.try_acquire(RATE, ms(100)));
        assert_eq!(
            [(); 4].map(|()| bucket.try_acquire(RATE, ms(99_999))),
            [true, true, true, false]
        );
        assert!(!bucket.try_acquire(RATE, ms(5)), "A clock that goes back must give no tokens.");
    }

    #[test]
    fn sources_have_separate_buckets_up_to_capacity() {
        let mut sources = PerSourceLimiter::new(RATE, 2);
        let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), 51900);
        let (a, mapped, c) = (at("192.0.2.1"), at("::ffff:192.0.2.1"), at("192.0.2.3"));
        let (b, same_net) = (at("2001:db8::1"), at("2001:db8::2"));
        let same_host = SocketAddr::new(a.ip(), 7);
        assert!(sources.try_acquire(a, ms(0)) && sources.try_acquire(mapped, ms(0)));
        assert!(sources.try_acquire(same_host, ms(0)), "Ports of one address share a bucket.");
        assert!(!sources.try_acquire(mapped, ms(0)));
        assert!(
            sources.try_acquire(b, ms(0))
                && sources.try_acquire(b, ms(0))
                && sources.try_acquire(same_net, ms(0))
        );
        assert!(!sources.try_acquire(same_net, ms(0)));
        assert!(!sources.try_acquire(c, ms(0)), "A full table must refuse a new source.");
        assert!(sources.try_acquire(c, ms(300)), "Full buckets must make room for a new source.");
        assert_eq!(sources.buckets.len(), 1);
        let mut endpoints = PerSourceLimiter::per_endpoint(RATE, 3);
        assert!(
            (0..3).all(|_| endpoints.try_acquire(b, ms(0))) && !endpoints.try_acquire(b, ms(0))
        );
        assert!(endpoints.try_acquire(same_net, ms(0)), "An address is a source of its own.");
        let other_port = SocketAddr::new(b.ip(), 7);
        assert!(endpoints.try_acquire(other_port, ms(0)), "A port is a source of its own.");
    }
}
