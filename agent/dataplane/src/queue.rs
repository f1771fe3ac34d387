//! Bounded queue from the lanes and the control socket to the session manager. Each type of message
//! from the underlay has a share of the queue, and one share is reserved for the node's own
//! messages.

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

/// Number of message types from the underlay: three of the handshake, and control messages.
const MESSAGE_TYPES: usize = 4;
/// Maximum number of queued messages of each type. Further messages are dropped and counted; their
/// senders repeat them.
const MAX_QUEUED_PER_TYPE: usize = 256;
/// Maximum number of queued messages. One share is reserved for messages of the lanes and the
/// control process.
const MAX_QUEUED: usize = (MESSAGE_TYPES + 1) * MAX_QUEUED_PER_TYPE;

/// Messages to the session manager.
pub(super) enum ToManager {
    /// A lane has packets for a peer without a session.
    RequestSession(PeerId),
    /// The TUN queue of a lane is unusable.
    TunGone {
        /// Generation of the device ([`super::setup::Running::generation`]).
        generation: u32,
    },
    /// A data datagram with an unknown receiver index has arrived from this address.
    UnknownSession(IpAddr),
    /// A datagram exceeded the MTU of this host's route to its destination.
    TooLong(TooLong),
    /// Ends all sessions, because a clone of this virtual machine may continue with the same keys.
    EndSessions {
        /// Reason, for the log.
        reason: &'static str,
    },
    /// A handshake or control message.
    Datagram {
        /// Underlay source address.
        source: SocketAddr,
        /// UDP payload, at most 9216 bytes.
        datagram: Box<[u8]>,
        /// Permit of the message's type; dropped with the message.
        #[allow(dead_code, reason = "given back when it is dropped")]
        permit: QueuePermit,
    },
    /// Request of a connection of the control socket.
    Request {
        /// Request to carry out.
        request: Request,
        /// Channel for the response.
        answer: SyncSender<Response>,
    },
    /// Stops the lanes and hands over the data plane.
    HandOver {
        /// Connection of the keeper that sent [`Request::TakeOver`].
        connection: UnixStream,
        /// Channel for a refusal.
        answer: SyncSender<Response>,
    },
}

/// Sending end of the manager's queue.
#[derive(Debug, Clone)]
pub(super) struct ToManagerQueue {
    queue: SyncSender<ToManager>,
    /// Number of queued messages in each share.
    waiting: Arc<[AtomicUsize; MESSAGE_TYPES]>,
}

/// Permit of one queued message from the underlay. Drop frees the place of the message in its
/// share.
#[derive(Debug)]
pub(super) struct QueuePermit {
    waiting: Arc<[AtomicUsize; MESSAGE_TYPES]>,
    /// Index of the share in `waiting`.
    share: usize,
}

/// Creates a queue.
pub(super) fn channel() -> (ToManagerQueue, Receiver<ToManager>) {
    let (queue, receiver) = sync_channel(MAX_QUEUED);
    (ToManagerQueue { queue, waiting: Arc::default() }, receiver)
}

impl ToManagerQueue {
    /// Queues a message; waits until the queue has room.
    ///
    /// # Errors
    /// [`SendError`] if the manager has ended.
    pub(super) fn send(&self, message: ToManager) -> Result<(), SendError<ToManager>> {
        self.queue.send(message)
    }

    /// Queues a message of a lane if the queue has room. Returns whether it was queued.
    pub(super) fn try_send_own(&self, message: ToManager) -> bool {
        self.queue.try_send(message).is_ok()
    }

    /// Checks that the share of this type is not full. Another lane may fill the share before
    /// [`Self::try_enqueue`].
    ///
    /// # Errors
    /// [`DropReason::ManagerQueue`] if the share is full.
    pub(super) fn check_room(&self, kind: MessageType) -> Result<(), DropReason> {
        match self.waiting[share(kind)].load(Ordering::Relaxed) < MAX_QUEUED_PER_TYPE {
            true => Ok(()),
            false => Err(DropReason::ManagerQueue),
        }
    }

    /// Queues a handshake or control message.
    ///
    /// # Errors
    /// [`DropReason::ManagerQueue`] if the queue or the share of this type is full.
    pub(super) fn try_enqueue(
        &self,
        kind: MessageType,
        source: SocketAddr,
        datagram: impl Into<Box<[u8]>>,
    ) -> Result<(), DropReason> {
        let permit = self.acquire(share(kind))?;
        let message = ToManager::Datagram { source, datagram: datagram.into(), permit };
        match self.queue.try_send(message) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err(DropReason::ManagerQueue),
        }
    }

    fn acquire(&self, share: usize) -> Result<QueuePermit, DropReason> {
        let before = self.waiting[share].fetch_add(1, Ordering::Relaxed);
        // If the share is exceeded, dropping the permit undoes the increment.
        let permit = QueuePermit { waiting: Arc::clone(&self.waiting), share };
        if before < MAX_QUEUED_PER_TYPE { Ok(permit) } else { Err(DropReason::ManagerQueue) }
    }
}

/// Returns the index of the share for messages of this type.
fn share(kind: MessageType) -> usize {
    match kind {
        MessageType::Initiation => 0,
        MessageType::Response => 1,
        MessageType::CookieReply => 2,
        MessageType::Control | MessageType::Data => 3,
    }
}

impl Drop for QueuePermit {
    fn drop(&mut self) {
        self.waiting[self.share].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn flood_of_one_type_leaves_room_for_others() {
        let (queue, receiver) = channel();
        let source = "192.0.2.1:5".parse().unwrap();
        let try_enqueue = |kind| queue.try_enqueue(kind, source, [1, 2]);
        for kind in [
            MessageType::Control,
            MessageType::Initiation,
            MessageType::Response,
            MessageType::CookieReply,
        ] {
            for _ in 0..MAX_QUEUED_PER_TYPE {
                try_enqueue(kind).unwrap();
            }
            assert_eq!(try_enqueue(kind), Err(DropReason::ManagerQueue));
            assert_eq!(queue.check_room(kind), Err(DropReason::ManagerQueue));
        }
        for _ in 0..MAX_QUEUED_PER_TYPE {
            assert!(queue.try_send_own(ToManager::RequestSession(PeerId(1))), "One share is left.");
        }
        assert!(!queue.try_send_own(ToManager::RequestSession(PeerId(1))), "The queue is bounded.");
        // A message that is received frees a place for another one of its type.
        let taken = receiver.recv().unwrap();
        assert_eq!(try_enqueue(MessageType::Response), Err(DropReason::ManagerQueue));
        drop(taken);
        assert_eq!(queue.check_room(MessageType::Control), Ok(()), "One message was taken.");
        try_enqueue(MessageType::Control).unwrap();
        assert_eq!(try_enqueue(MessageType::Control), Err(DropReason::ManagerQueue));
    }
}
