//! Looking again for a moment before sleeping. What a wake-up costs (the waker's interrupt to an idle
//! CPU, the way out of idle) is several times what a small packet costs, and a request and its
//! answer pay it four times in the data plane.
//!
//! Between two looks the thread yields: whoever else wants the CPU has it, so that on a busy machine
//! polling is no more than staying in the run queue. And a lane polls only where that has paid
//! lately: one that is idle, or whose packets are far apart, sleeps. So does one that had to wait long
//! for its turn after a yield: a thread that sleeps is given the CPU when a packet wakes it, one that
//! has yielded waits until whoever has it has used up its slice.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use skein_sys::poll::Poller;

use super::stats::{LaneStats, add};

/// Where nothing is configured. Longer than a pod's answer to a small request takes, and not much
/// longer than the wake-up that it saves.
const DEFAULT_LIMIT: Duration = Duration::from_micros(50);
/// So many polls in vain after one that paid, and the next wait sleeps at once.
const MAX_IDLE_POLLS: u8 = 8;

/// How long to poll where the configuration leaves it open: not at all where a CPU quota (cgroup v2
/// `cpu.max`) would be used up by it.
///
/// The first call reads the cgroup's files; a confined process cannot.
pub(super) fn default_limit() -> Duration {
    static LIMIT: OnceLock<Duration> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        let quota = fs::read_to_string("/proc/self/cgroup")
            .is_ok_and(|own| has_cpu_quota(Path::new("/sys/fs/cgroup"), &own));
        if quota { Duration::ZERO } else { DEFAULT_LIMIT }
    })
}

/// Whether the cgroup that `own` (the contents of `/proc/self/cgroup`, cgroups(7)) names, or one that it
/// is in, limits CPU time.
fn has_cpu_quota(root: &Path, own: &str) -> bool {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return false };
    let limited = |group: &Path| {
        fs::read_to_string(group.join("cpu.max")).is_ok_and(|max| !max.starts_with("max"))
    };
    let own = root.join(path);
    own.ancestors().take_while(|group| group.starts_with(root)).any(limited)
}

/// A yield that took this long has met somebody who computes.
const MAX_YIELD_TIME: Duration = Duration::from_micros(200);
/// For so long nothing is polled after that.
const CONTENTION_PAUSE: Duration = Duration::from_millis(10);

/// See the module.
pub(super) struct BusyPoll {
    limit: Duration,
    /// Polls in vain that are left.
    credit: u8,
    /// Until when nothing is polled.
    paused_until: Option<Instant>,
}

impl BusyPoll {
    /// Polls for up to `limit`; zero for never.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, credit: 0, paused_until: None }
    }

    /// [`Poller::wait`], polling first where that has paid.
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
    fn polls_while_it_pays_and_sleeps_when_it_does_not() {
        let (waker, mut poller, stats) =
            (Waker::new().unwrap(), Poller::new().unwrap(), LaneStats::default());
        poller.add(waker.as_fd(), 3).unwrap();
        let counts = || (stats.polled.load(Relaxed), stats.slept.load(Relaxed));
        let mut busy = BusyPoll::new(Duration::from_millis(200));
        // The first sleeps, and finds that what it waited for was near.
        waker.wake();
        assert_eq!(busy.wait(&mut poller, None, &stats).unwrap(), [3]);
        assert_eq!(counts(), (0, 1));
        assert_eq!(busy.wait(&mut poller, None, &stats).unwrap(), [3]);
        assert_eq!(counts(), (1, 1));
        // Nothing comes: it polls in vain a bounded number of times, then sleeps at once.
        waker.drain();
        busy.limit = Duration::from_micros(10);
        // More often than it should take: on a busy machine it may lose its turn, which says nothing.
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
    fn it_rests_after_a_long_wait_for_its_turn() {
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
    fn switched_off_it_never_polls() {
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
    fn a_quota_of_any_group_above_counts() {
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
