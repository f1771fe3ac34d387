//! Waiting for several descriptors at once, and waking a thread that waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

/// Wakes a thread from its [`Poller`] (an eventfd). Shared by `Arc`; a wake is never lost, and
/// many wakes before the thread looks are one.
#[derive(Debug)]
pub struct Waker {
    fd: OwnedFd,
}

impl Waker {
    /// Makes one that nobody has woken.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { fd })
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        // The only error is a full counter (2^64 - 2 wakes), and then it is readable already.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Makes the descriptor unreadable again; the waiting thread calls it before it looks at what
    /// it was woken for.
    pub fn drain(&self) {
        let mut count = [0; 8];
        // The only error is that nobody woke it.
        let _ = rustix::io::read(&self.fd, &mut count);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until one of its descriptors is readable, or writable where that was asked (epoll, level-triggered: what was not read to
/// the end is reported again).
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
    tokens: Vec<u32>,
}

// SAFETY: an event's data is a union that may hold a pointer; this poller stores nothing but tokens
// (integers) in it, so that moving it to another thread shares nothing.
unsafe impl Send for Poller {}

/// More than any thread polls; the rest would be reported by the next wait.
const MAX_EVENTS: usize = 64;

impl Poller {
    /// Makes one that waits for nothing.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(MAX_EVENTS),
            tokens: Vec::with_capacity(MAX_EVENTS),
        })
    }

    /// Waits for `fd` too from now on and reports it as `token`.
    pub fn add(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.into());
        Ok(epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)?)
    }

    /// Reports `fd` as `token` from now on whenever it is writable (or broken).
    pub fn add_writable(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.into());
        Ok(epoll::add(&self.epoll, fd, data, epoll::EventFlags::OUT)?)
    }

    /// Waits for `fd` no longer. Call it before the descriptor is closed.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits at most `timeout` (in whole milliseconds, rounded up; `None`: for ever) and returns
    /// the tokens of what is readable or broken; nothing at the timeout or at a signal.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<&[u32]> {
        let timeout = timeout.map(|timeout| Timespec {
            // A day and more is as good as any longer time, and fits every epoll call.
            tv_sec: timeout.as_secs().min(100_000) as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        self.poll_epoll(timeout.as_ref())?;
        Ok(&self.tokens)
    }

    /// Whether anything is readable or broken now; [`ready`](Self::ready) says what.
    pub fn poll(&mut self) -> io::Result<bool> {
        self.poll_epoll(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(!self.tokens.is_empty())
    }

    /// The tokens that the last look found.
    pub fn ready(&self) -> &[u32] {
        &self.tokens
    }

    fn poll_epoll(&mut self, timeout: Option<&Timespec>) -> io::Result<()> {
        self.events.clear();
        self.tokens.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), timeout) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.tokens.extend(self.events.iter().map(|event| event.data.u64() as u32));
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Instant;

    #[test]
    fn a_wake_from_another_thread_ends_the_wait() {
        let waker = Arc::new(Waker::new().unwrap());
        let mut poller = Poller::new().unwrap();
        poller.add(waker.as_fd(), 7).unwrap();
        let other = Arc::clone(&waker);
        let thread = thread::spawn(move || other.wake());
        assert_eq!(poller.wait(Some(Duration::from_secs(10))).unwrap(), [7]);
        thread.join().unwrap();
        // Level-triggered: still reported until drained.
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), [7]);
        waker.wake();
        waker.drain();
        assert!(poller.wait(Some(Duration::ZERO)).unwrap().is_empty());
        waker.drain();
    }

    #[test]
    fn a_timeout_below_a_millisecond_does_not_spin() {
        let mut poller = Poller::new().unwrap();
        let start = Instant::now();
        assert!(poller.wait(Some(Duration::from_micros(300))).unwrap().is_empty());
        assert!(start.elapsed() >= Duration::from_micros(300));
    }

    #[test]
    fn a_removed_descriptor_is_not_reported() {
        let (a, b) = (Waker::new().unwrap(), Waker::new().unwrap());
        let mut poller = Poller::new().unwrap();
        poller.add(a.as_fd(), 1).unwrap();
        poller.add(b.as_fd(), 2).unwrap();
        a.wake();
        b.wake();
        let mut both = poller.wait(None).unwrap().to_vec();
        both.sort();
        assert_eq!(both, [1, 2]);
        poller.remove(a.as_fd()).unwrap();
        assert_eq!(poller.wait(None).unwrap(), [2]);
    }
}
