//! Readiness of descriptors (epoll(7)) and wake-ups of a waiting thread (eventfd(2)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

/// An eventfd that wakes a thread from [`Poller::wait`]. Threads share it by `Arc`. A wake-up is
/// never lost; several wake-ups before [`Self::drain`] count as one.
#[derive(Debug)]
pub struct Waker {
    fd: OwnedFd,
}

impl Waker {
    /// Creates a waker without a pending wake-up.
    ///
    /// # Errors
    /// The error of eventfd(2).
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { fd })
    }

    /// Makes the descriptor readable, which ends the wait of the thread.
    pub fn wake(&self) {
        // The only possible error is a full counter (2^64 - 2 wake-ups). The descriptor is then
        // already readable.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Resets the descriptor. The woken thread calls it before it processes the work, so that a
    /// later wake-up is not lost.
    pub fn drain(&self) {
        let mut count = [0; 8];
        // The only possible error is EAGAIN: no wake-up is pending.
        let _ = rustix::io::read(&self.fd, &mut count);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A set of descriptors with their tokens, of which [`Self::wait`] returns the ready ones. The set
/// is level-triggered, so that a descriptor with unread data is reported again.
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
    tokens: Vec<u32>,
}

// SAFETY: the type is not `Send` only because the data of an event is a union that may hold a
// pointer. This type stores only tokens (integers) in it, so that a move to another thread shares
// nothing.
unsafe impl Send for Poller {}

/// Maximum number of events of one wait. The next wait reports the rest.
const MAX_EVENTS: usize = 64;

impl Poller {
    /// Creates an empty set.
    ///
    /// # Errors
    /// The error of epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(MAX_EVENTS),
            tokens: Vec::with_capacity(MAX_EVENTS),
        })
    }

    /// Adds `fd`, which is reported as `token` while it is readable or has an error.
    ///
    /// # Errors
    /// The error of epoll_ctl(2), for example `AlreadyExists`.
    pub fn add(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.into());
        Ok(epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)?)
    }

    /// Adds `fd`, which is reported as `token` while it is writable or has an error.
    ///
    /// # Errors
    /// The error of epoll_ctl(2), for example `AlreadyExists`.
    pub fn add_writable(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.into());
        Ok(epoll::add(&self.epoll, fd, data, epoll::EventFlags::OUT)?)
    }

    /// Removes `fd`. Call it before the descriptor is closed.
    ///
    /// # Errors
    /// The error of epoll_ctl(2), for example `NotFound`.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits until a descriptor is ready and returns the tokens of the ready descriptors. Returns
    /// an empty list after `timeout`, which is rounded up to whole milliseconds, or after a signal.
    /// `None` waits without a limit.
    ///
    /// # Errors
    /// The error of epoll_wait(2), except EINTR.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<&[u32]> {
        let timeout = timeout.map(|timeout| Timespec {
            // epoll_wait(2) takes milliseconds as an int. 100,000 s fit and are as good as any
            // longer timeout. The caller repeats the wait.
            tv_sec: timeout.as_secs().min(100_000) as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        self.poll_epoll(timeout.as_ref())?;
        Ok(&self.tokens)
    }

    /// Checks the descriptors without waiting. Returns true if one is ready; [`Self::ready`] has
    /// the tokens.
    ///
    /// # Errors
    /// The error of epoll_wait(2), except EINTR.
    pub fn poll(&mut self) -> io::Result<bool> {
        self.poll_epoll(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(!self.tokens.is_empty())
    }

    /// Returns the tokens that the last [`Self::wait`] or [`Self::poll`] found.
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
    fn wake_from_another_thread_ends_the_wait() {
        let waker = Arc::new(Waker::new().unwrap());
        let mut poller = Poller::new().unwrap();
        poller.add(waker.as_fd(), 7).unwrap();
        let other = Arc::clone(&waker);
        let thread = thread::spawn(move || other.wake());
        assert_eq!(poller.wait(Some(Duration::from_secs(10))).unwrap(), [7]);
        thread.join().unwrap();
        // The set is level-triggered, so that the waker is reported until it is drained.
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), [7]);
        waker.wake();
        waker.drain();
        assert!(poller.wait(Some(Duration::ZERO)).unwrap().is_empty());
        waker.drain();
    }

    #[test]
    fn timeout_below_one_millisecond_is_waited_for() {
        let mut poller = Poller::new().unwrap();
        let start = Instant::now();
        assert!(poller.wait(Some(Duration::from_micros(300))).unwrap().is_empty());
        assert!(start.elapsed() >= Duration::from_micros(300));
    }

    #[test]
    fn removed_descriptor_is_not_reported() {
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
