//! The bounded queue from the lanes and the control socket to the session manager. Each type of message
//! from the underlay has a share of the queue, and one share is left for the node's own messages.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SendError, SyncSender, TrySendError, sync_channel};

use skein_core::drop::DropReason;
use skein_core::route::PeerId;
use skein_core::wire::header::MessageType;
use skein_ipc::{Request, Response};
use skein_sys::send::TooLong;

/// Number of message types that come from the underlay: three of handshakes, and control messages.
const TYPES: usize = 4;
/// Queued messages of each type. Further ones are dropped and counted; their senders repeat them.
const MAX_QUEUED_PER_TYPE: usize = 256;
/// Queued messages in all. One share is left for the lanes' own messages and the control process.
const MAX_QUEUED: usize = (TYPES + 1) * MAX_QUEUED_PER_TYPE;

/// What the manager is told.
pub(super) enum ToManager {
    /// A lane has packets for a peer without a session.
    WantSession(PeerId),
    /// A lane's TUN queue is of no more use.
    TunGone {
        /// The device's generation ([`super::setup::Running::generation`]).
        generation: u32,
    },
    /// A data packet with an unknown receiver index came from this address.
    UnknownSession(IpAddr),
    /// A datagram was longer than this host's route to its destination carries.
    TooLong(TooLong),
    /// End all sessions: a clone of this virtual machine may continue with the same keys.
    EndSessions {
        /// Reason, for the log.
        reason: &'static str,
    },
    /// A handshake or control message.
    Datagram {
        /// Outer source.
        source: SocketAddr,
        /// UDP payload.
        datagram: Box<[u8]>,
        /// Place in the share of the message's type.
        #[allow(dead_code, reason = "given back when it is dropped")]
        place: Place,
    },
    /// From the control socket.
    Request {
        /// What is asked.
        request: Request,
        /// Where the answer goes.
        answer: SyncSender<Response>,
    },
    /// Stop, and have the keeper give all to whoever is at the other end.
    HandOver {
        /// [`Request::TakeOver`] came by it.
        connection: UnixStream,
        /// Where a refusal goes.
        answer: SyncSender<Response>,
    },
}

/// An end to send by.
#[derive(Debug, Clone)]
pub(super) struct ToManagerQueue {
    queue: SyncSender<ToManager>,
    waiting: Arc<[AtomicUsize; TYPES]>,
}

/// The place of a message from the underlay in the queue, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    waiting: Arc<[AtomicUsize; TYPES]>,
    of: usize,
}

/// A queue.
pub(super) fn new() -> (ToManagerQueue, Receiver<ToManager>) {
    let (queue, receiver) = sync_channel(MAX_QUEUED);
    (ToManagerQueue { queue, waiting: Arc::default() }, receiver)
}

impl ToManagerQueue {
    /// Waits until there is room. Fails where the manager has ended.
    pub(super) fn send(&self, message: ToManager) -> Result<(), SendError<ToManager>> {
        self.queue.send(message)
    }

    /// Whether it was taken. It is not while the manager is behind, and when the process ends.
    pub(super) fn tell(&self, message: ToManager) -> bool {
        self.queue.try_send(message).is_ok()
    }

    /// Queues a handshake or control message.
    ///
    /// # Errors
    /// [`DropReason::ManagerQueue`] if the queue or the share of this type is full.
    pub(super) fn hand_on(
        &self,
        kind: MessageType,
        source: SocketAddr,
        datagram: impl Into<Box<[u8]>>,
    ) -> Result<(), DropReason> {
        let place = match kind {
            MessageType::Initiation => self.place(0)?,
            MessageType::Response => self.place(1)?,
            MessageType::CookieReply => self.place(2)?,
            MessageType::Control | MessageType::Data => self.place(3)?,
        };
        let message = ToManager::Datagram { source, datagram: datagram.into(), place };
        match self.queue.try_send(message) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err(DropReason::ManagerQueue),
        }
    }

    fn place(&self, of: usize) -> Result<Place, DropReason> {
        let before = self.waiting[of].fetch_add(1, Ordering::Relaxed);
        // Given back at once where it is one too many.
        let place = Place { waiting: Arc::clone(&self.waiting), of };
        if before < MAX_QUEUED_PER_TYPE { Ok(place) } else { Err(DropReason::ManagerQueue) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.waiting[self.of].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_type_leaves_room_for_all_others() {
        let (queue, receiver) = new();
        let source = "192.0.2.1:5".parse().unwrap();
        let hand_on = |kind| queue.hand_on(kind, source, [1, 2]);
        for kind in [
            MessageType::Control,
            MessageType::Initiation,
            MessageType::Response,
            MessageType::CookieReply,
        ] {
            for _ in 0..MAX_QUEUED_PER_TYPE {
                hand_on(kind).unwrap();
            }
            assert_eq!(hand_on(kind), Err(DropReason::ManagerQueue));
        }
        for _ in 0..MAX_QUEUED_PER_TYPE {
            assert!(queue.tell(ToManager::WantSession(PeerId(1))), "One share is left.");
        }
        assert!(!queue.tell(ToManager::WantSession(PeerId(1))), "The queue is bounded.");
        // A message that is taken makes room for another one of its type.
        let taken = receiver.recv().unwrap();
        assert_eq!(hand_on(MessageType::Response), Err(DropReason::ManagerQueue));
        drop(taken);
        hand_on(MessageType::Control).unwrap();
        assert_eq!(hand_on(MessageType::Control), Err(DropReason::ManagerQueue));
    }
}
