//! Token buckets, and a bounded table of them by source.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// How often a full table is looked through.
const SWEEP: Duration = Duration::from_millis(100);

/// How fast something may happen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// In the long run.
    pub(crate) per_second: u32,
    /// At once, after a pause.
    pub(crate) burst: u32,
}

impl Rate {
    const fn cost(self) -> Duration {
        Duration::from_nanos(1_000_000_000 / self.per_second as u64)
    }

    const fn full(self) -> Duration {
        Duration::from_nanos(1_000_000_000 / self.per_second as u64 * self.burst as u64)
    }
}

/// A token bucket whose level is kept as the time it took to fill.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    level: Duration,
    at: Duration,
}

impl Bucket {
    /// A full bucket.
    pub(crate) const fn new(rate: Rate, now: Duration) -> Self {
        Self { level: rate.full(), at: now }
    }

    /// Takes one token, if there is one.
    pub(crate) fn take(&mut self, rate: Rate, now: Duration) -> bool {
        self.level = self.level_at(rate, now);
        self.at = now;
        match self.level.checked_sub(rate.cost()) {
            Some(rest) => {
                self.level = rest;
                true
            }
            None => false,
        }
    }

    fn level_at(&self, rate: Rate, now: Duration) -> Duration {
        (self.level + now.saturating_sub(self.at)).min(rate.full())
    }
}

/// One bucket a source address; IPv6 sources count by their /64, where they are not known.
#[derive(Debug)]
pub(crate) struct Sources {
    rate: Rate,
    /// Whether each address is a host of its own.
    hosts: bool,
    capacity: usize,
    buckets: BTreeMap<u128, Bucket>,
    swept: Option<Duration>,
}

impl Sources {
    /// At most `capacity` sources are remembered; beyond that, new ones are refused.
    pub(crate) const fn new(rate: Rate, capacity: usize) -> Self {
        Self { rate, hosts: false, capacity, buckets: BTreeMap::new(), swept: None }
    }

    /// The same for addresses that are known to be hosts': those of one /64 are apart.
    pub(crate) fn of_hosts(rate: Rate, capacity: usize) -> Self {
        Self { hosts: true, ..Self::new(rate, capacity) }
    }

    /// Takes one token of `source`'s bucket, if there is one.
    pub(crate) fn take(&mut self, source: IpAddr, now: Duration) -> bool {
        let (rate, key) = (self.rate, key(source, self.hosts));
        if self.buckets.len() >= self.capacity && !self.buckets.contains_key(&key) {
            // Not for each that is refused: it takes time.
            if self.swept.is_some_and(|at| now.saturating_sub(at) < SWEEP) {
                return false;
            }
            self.swept = Some(now);
            // A bucket that is full again says no more than one that is not there.
            self.buckets.retain(|_, bucket| bucket.level_at(rate, now) < rate.full());
            if self.buckets.len() >= self.capacity {
                return false;
            }
        }
        self.buckets.entry(key).or_insert(Bucket::new(rate, now)).take(rate, now)
    }
}

fn key(source: IpAddr, host: bool) -> u128 {
    match source.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) if host => v6.to_bits(),
        IpAddr::V6(v6) => v6.to_bits() >> 64 << 64,
    }
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
    fn a_bucket_fills_in_time_and_never_overflows() {
        let mut bucket = Bucket::new(RATE, ms(0));
        assert_eq!([(); 4].map(|()| bucket.take(RATE, ms(0))), [true, true, true, false]);
        assert!(!bucket.take(RATE, ms(99)));
        assert!(bucket.take(RATE, ms(100)));
        assert!(!bucket.take(RATE, ms(100)));
        assert_eq!([(); 4].map(|()| bucket.take(RATE, ms(99_999))), [true, true, true, false]);
        assert!(!bucket.take(RATE, ms(5)), "a clock that goes back gives nothing");
    }

    #[test]
    fn sources_are_apart_and_bounded() {
        let mut sources = Sources::new(RATE, 2);
        let a: IpAddr = "192.0.2.1".parse().unwrap();
        let mapped: IpAddr = "::ffff:192.0.2.1".parse().unwrap();
        let b: IpAddr = "2001:db8::1".parse().unwrap();
        let same_net: IpAddr = "2001:db8::2".parse().unwrap();
        let c: IpAddr = "192.0.2.3".parse().unwrap();
        assert!(sources.take(a, ms(0)) && sources.take(mapped, ms(0)) && sources.take(a, ms(0)));
        assert!(!sources.take(mapped, ms(0)));
        assert!(sources.take(b, ms(0)) && sources.take(b, ms(0)) && sources.take(same_net, ms(0)));
        assert!(!sources.take(same_net, ms(0)));
        assert!(!sources.take(c, ms(0)), "the table is full");
        assert!(sources.take(c, ms(300)), "and empties");
        assert_eq!(sources.buckets.len(), 1);
        let mut hosts = Sources::of_hosts(RATE, 2);
        assert!((0..3).all(|_| hosts.take(b, ms(0))) && !hosts.take(b, ms(0)));
        assert!(hosts.take(same_net, ms(0)), "a host of its own");
    }
}
