//! Session state that belongs to one lane: replay windows, the rate limit of control messages, and
//! traffic counts.

use std::sync::Arc;
use std::time::Duration;

use skein_core::drop::DropReason;
use skein_core::tunnel::rate_limit::{Rate, TokenBucket};
use skein_core::tunnel::replay::ReplayWindow;
use skein_core::tunnel::session::{Receiver, Session};
use skein_core::wire::header::{CONTROL_LANE, Header};

/// Rate of control messages of one session that a lane passes to the session manager. The protocol
/// needs fewer than 16 per second.
pub(super) const CONTROL_RATE: Rate = Rate { per_second: 64, burst: 64 };

/// Receive state of one lane of this node for a session. There is a replay window for each lane of
/// the peer. All datagrams from one lane of the peer are steered to the same lane of this node, so
/// that no other lane needs the window.
pub(super) struct RxSession {
    pub(super) session: Arc<Session>,
    windows: Vec<Option<Box<ReplayWindow>>>,
    control_window: Option<Box<ReplayWindow>>,
    control_bucket: TokenBucket,
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

impl RxSession {
    /// Creates the state without replay windows. A window is allocated when the first datagram from
    /// a lane of the peer arrives.
    pub(super) fn new(session: &Arc<Session>) -> Self {
        Self {
            session: Arc::clone(session),
            windows: (0..session.remote_lanes).map(|_| None).collect(),
            control_window: None,
            control_bucket: TokenBucket::new(CONTROL_RATE, Duration::ZERO),
            packets: 0,
            bytes: 0,
        }
    }

    /// Decrypts a data datagram in place, checks its counter against the replay window of the
    /// peer's lane, and confirms the session. `now` is the time since boot.
    ///
    /// # Errors
    /// The reason of the drop: the peer has no such lane, the session is 180 s old, the datagram is
    /// not authentic, or its counter was received before.
    #[inline]
    pub(super) fn open_data(
        &mut self,
        now: Duration,
        header: Header,
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        receiver(&self.session, header.lane, now)?.open(datagram)?;
        let window = self.windows.get_mut(usize::from(header.lane)).ok_or(DropReason::WrongLane)?;
        let begin = || Box::new(ReplayWindow::after(self.session.next_counter(header.lane)));
        let window = window.get_or_insert_with(begin);
        window.check_and_set(header.counter)?;
        // Only a new highest counter changes the stored value.
        let next = window.next_counter();
        if next == header.counter.saturating_add(1) {
            self.session.set_next_counter(header.lane, next);
        }
        self.session.confirm();
        Ok(())
    }

    /// Decrypts a control message in place, and checks that it is authentic, new, and within
    /// [`CONTROL_RATE`]. Spoofed and replayed messages do not reach the session manager and use up
    /// no part of the rate. `now` is the time since boot.
    ///
    /// # Errors
    /// The reason of the drop; [`DropReason::ManagerQueue`] if the rate is exceeded.
    pub(super) fn check_control(
        &mut self,
        now: Duration,
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        let (header, _) = receiver(&self.session, CONTROL_LANE, now)?.open(datagram)?;
        let begin = || Box::new(ReplayWindow::after(self.session.next_counter(CONTROL_LANE)));
        self.control_window.get_or_insert_with(begin).check_and_set(header.counter)?;
        match self.control_bucket.try_acquire(CONTROL_RATE, now) {
            true => Ok(()),
            false => Err(DropReason::ManagerQueue),
        }
    }
}

/// Returns the receiving half of a lane of the peer. `now` is the time since boot.
///
/// # Errors
/// [`DropReason::WrongLane`] if the peer has no such lane, [`DropReason::SessionExpired`] if the
/// session is 180 s old.
pub(super) fn receiver(
    session: &Session,
    lane: u8,
    now: Duration,
) -> Result<&Receiver, DropReason> {
    let receiver = session.receiver(lane).ok_or(DropReason::WrongLane)?;
    // The manager ends old sessions, but it may be blocked.
    match session.is_expired_at(now) {
        true => Err(DropReason::SessionExpired),
        false => Ok(receiver),
    }
}
