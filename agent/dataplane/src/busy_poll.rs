//! Adaptive busy polling. A lane polls epoll for up to `busy_poll_us` (default 50 µs; 0 under a CPU
//! quota) before it blocks, because a wake-up of an idle CPU costs several times the processing of
//! a small packet, and a request with its answer needs four wake-ups in the data plane.
//!
//! The thread yields between two polls, so that other threads of a busy CPU run. A lane starts to
//! poll when a packet ends a blocked wait within the limit, and stops after [`MAX_IDLE_POLLS`]
//! polling periods in a row without a packet. It also stops for [`CONTENTION_PAUSE`] after a yield
//! of more than [`MAX_YIELD_TIME`]: a blocked thread gets the CPU when a packet wakes it, but a
//! thread that has yielded waits for the other thread's time slice to end.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use skein_sys::poll::Poller;

use super::stats::{LaneStats, add};

/// Polling limit if the configuration has none. A pod answers a small request in less time. The
/// limit is only slightly longer than the wake-up that polling avoids.
const DEFAULT_LIMIT: Duration = Duration::from_micros(50);
/// Maximum number of polling periods in a row without a packet. The next wait then blocks at once.
const MAX_IDLE_POLLS: u8 = 8;

/// Returns the polling limit if the configuration has none: 50 µs, or 0 if a CPU quota (cgroup v2
/// `cpu.max`) applies, which polling would use up.
///
/// The first call reads the cgroup's files, to which a confined process has no access.
pub(super) fn default_limit() -> Duration {
    static DEFAULT: OnceLock<Duration> = OnceLock::new();
    *DEFAULT.get_or_init(|| {
        let quota = fs::read_to_string("/proc/self/cgroup")
            .is_ok_and(|own| has_cpu_quota(Path::new("/sys/fs/cgroup"), &own));
        if quota { Duration::ZERO } else { DEFAULT_LIMIT }
    })
}

/// Returns whether the cgroup of `own` (contents of `/proc/self/cgroup`, cgroups(7)) or one of its
/// ancestors limits CPU time.
fn has_cpu_quota(root: &Path, own: &str) -> bool {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return false };
    let limited = |group: &Path| {
        fs::read_to_string(group.join("cpu.max")).is_ok_and(|max| !max.starts_with("max"))
    };
    let own = root.join(path);
    own.ancestors().take_while(|group| group.starts_with(root)).any(limited)
}

/// Duration of a yield beyond which the CPU counts as contended.
const MAX_YIELD_TIME: Duration = Duration::from_micros(200);
/// Time without polling after a contended yield.
const CONTENTION_PAUSE: Duration = Duration::from_millis(10);

/// Polling state of one lane.
pub(super) struct BusyPoll {
    limit: Duration,
    /// Polling periods without a packet that are still allowed; 0 if the lane does not poll.
    credit: u8,
    /// End of the pause after a contended yield.
    paused_until: Option<Instant>,
}

impl BusyPoll {
    /// Creates the state for polling periods of up to `limit`; 0 disables polling.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, credit: 0, paused_until: None }
    }

    /// Waits as [`Poller::wait`] does. A polling period precedes the wait while `credit` is above
    /// 0. Returns the tokens of the ready descriptors.
    ///
    /// # Errors
    /// The error of epoll_wait(2).
    pub(super) fn wait<'a>(
        &mut self,
        poller: &'a mut Poller,
        timeout: Option<Duration>,
        stats: &LaneStats,
    ) -> io::Result<&'a [u32]> {
        if self.limit.is_zero() {
            add(&stats.slept, 1);
            return poller.wait(timeout);
        }
        let began = Instant::now();
        if self.paused_until.is_some_and(|until| began < until) {
            add(&stats.slept, 1);
            return poller.wait(timeout);
        }
        if self.credit > 0 {
            let mut before = began;
            loop {
                if poller.poll()? {
                    self.credit = MAX_IDLE_POLLS;
                    add(&stats.polled, 1);
                    return Ok(poller.ready());
                }
                let now = Instant::now();
                if now - before > MAX_YIELD_TIME {
                    self.paused_until = Some(now + CONTENTION_PAUSE);
                }
                if now - began >= self.limit {
                    self.credit -= 1;
                    break;
                }
                before = now;
                std::thread::yield_now();
            }
        }
        let asleep = self.credit == 0;
        add(&stats.slept, 1);
        poller.wait(timeout)?;
        if asleep && began.elapsed() < self.limit {
            self.credit = MAX_IDLE_POLLS;
        }
        Ok(poller.ready())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_sys::poll::Waker;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn polling_stops_after_periods_without_packets() {
        let (waker, mut poller, stats) =
            (Waker::new().unwrap(), Poller::new().unwrap(), LaneStats::default());
        poller.add(waker.as_fd(), 3).unwrap();
        let counts = || (stats.polled.load(Relaxed), stats.slept.load(Relaxed));
        let mut busy = BusyPoll::new(Duration::from_millis(200));
        // The first wait blocks, and the event arrives within the limit.
        waker.wake();
        assert_eq!(busy.wait(&mut poller, None, &stats).unwrap(), [3]);
        assert_eq!(counts(), (0, 1));
        assert_eq!(busy.wait(&mut poller, None, &stats).unwrap(), [3]);
        assert_eq!(counts(), (1, 1));
        // Without events, polling stops after a bounded number of periods.
        waker.drain();
        busy.limit = Duration::from_micros(10);
        // More rounds than necessary: on a busy machine, a contended yield pauses polling and uses
        // up no credit.
        for _ in 0..50 * u32::from(MAX_IDLE_POLLS) {
            let nothing: [u32; 0] = [];
            let short = Some(Duration::from_millis(1));
            busy.paused_until = None;
            assert_eq!(busy.wait(&mut poller, short, &stats).unwrap(), nothing);
            if busy.credit == 0 {
                break;
            }
        }
        assert_eq!(busy.credit, 0);
        assert!(counts().0 == 1 && counts().1 > u64::from(MAX_IDLE_POLLS), "{:?}", counts());
    }

    #[test]
    fn polling_pauses_after_a_contended_yield() {
        let (waker, mut poller, stats) =
            (Waker::new().unwrap(), Poller::new().unwrap(), LaneStats::default());
        poller.add(waker.as_fd(), 3).unwrap();
        waker.wake();
        let mut busy = BusyPoll::new(Duration::from_millis(200));
        busy.credit = MAX_IDLE_POLLS;
        busy.paused_until = Some(Instant::now() + Duration::from_secs(60));
        assert_eq!(busy.wait(&mut poller, None, &stats).unwrap(), [3]);
        assert_eq!((stats.polled.load(Relaxed), stats.slept.load(Relaxed)), (0, 1));
        busy.paused_until = Some(Instant::now());
        assert_eq!(busy.wait(&mut poller, None, &stats).unwrap(), [3]);
        assert_eq!((stats.polled.load(Relaxed), stats.slept.load(Relaxed)), (1, 1));
    }

    #[test]
    fn limit_of_zero_disables_polling() {
        let (waker, mut poller, stats) =
            (Waker::new().unwrap(), Poller::new().unwrap(), LaneStats::default());
        poller.add(waker.as_fd(), 3).unwrap();
        waker.wake();
        let mut busy = BusyPoll::new(Duration::ZERO);
        for _ in 0..3 {
            assert_eq!(busy.wait(&mut poller, None, &stats).unwrap(), [3]);
        }
        assert_eq!(stats.polled.load(Relaxed), 0);
    }

    #[test]
    fn cpu_quota_of_an_ancestor_is_found() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("pods/one");
        fs::create_dir_all(&pod).unwrap();
        let own = "1:name=systemd:/x\n0::/pods/one\n";
        assert!(!has_cpu_quota(root.path(), own));
        fs::write(pod.join("cpu.max"), "max 100000\n").unwrap();
        assert!(!has_cpu_quota(root.path(), own));
        fs::write(root.path().join("pods/cpu.max"), "50000 100000\n").unwrap();
        assert!(has_cpu_quota(root.path(), own));
        assert!(!has_cpu_quota(root.path(), "0::/\n"));
        assert!(!has_cpu_quota(root.path(), "1:cpu:/pods/one\n"));
    }
}
