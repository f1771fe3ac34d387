//! The way from the lanes and the control socket to the session manager: bounded, and shared out so that
//! what strangers can send leaves room for what peers and the control process say.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SendError, SyncSender, TrySendError, sync_channel};

use skein_core::drop::DropReason;
use skein_core::wire::header::MessageType;

use super::manager::ToManager;

/// Messages that may wait. Those beyond are dropped and counted: whoever sent them tries again.
const LENGTH: usize = 1024;
/// Handshake messages of each type that may wait, of 3 types. Anybody can send these; control messages reach
/// the queue only where they name a session.
const OF_A_TYPE: usize = LENGTH / 4;

/// An end to send by.
#[derive(Debug, Clone)]
pub(super) struct ToManagerQueue {
    queue: SyncSender<ToManager>,
    waiting: Arc<[AtomicUsize; 3]>,
}

/// The place of a handshake message in the queue, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    waiting: Arc<[AtomicUsize; 3]>,
    of: usize,
}

/// A queue.
pub(super) fn new() -> (ToManagerQueue, Receiver<ToManager>) {
    let (queue, receiver) = sync_channel(LENGTH);
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

    /// Hands on a handshake or control message.
    pub(super) fn hand_on(
        &self,
        kind: MessageType,
        source: SocketAddr,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let place = match kind {
            MessageType::Initiation => Some(self.place(0)?),
            MessageType::Response => Some(self.place(1)?),
            MessageType::CookieReply => Some(self.place(2)?),
            MessageType::Control | MessageType::Data => None,
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
        if before < OF_A_TYPE { Ok(place) } else { Err(DropReason::ManagerQueue) }
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
    use skein_core::route::PeerId;

    #[test]
    fn a_flood_of_one_type_leaves_room_for_all_others() {
        let (queue, receiver) = new();
        let source = "192.0.2.1:5".parse().unwrap();
        let hand_on = |kind| queue.hand_on(kind, source, &[1, 2]);
        for kind in [MessageType::Initiation, MessageType::Response, MessageType::CookieReply] {
            for _ in 0..OF_A_TYPE {
                hand_on(kind).unwrap();
            }
            assert_eq!(hand_on(kind), Err(DropReason::ManagerQueue));
        }
        for _ in 0..LENGTH / 4 - 1 {
            hand_on(MessageType::Control).unwrap();
        }
        assert!(queue.tell(ToManager::WantSession(PeerId(1))));
        assert_eq!(hand_on(MessageType::Control), Err(DropReason::ManagerQueue), "it is full");
        // Whatever is taken makes room for its like.
        let taken = receiver.recv().unwrap();
        assert_eq!(hand_on(MessageType::Response), Err(DropReason::ManagerQueue));
        drop(taken);
        hand_on(MessageType::Initiation).unwrap();
        assert_eq!(hand_on(MessageType::Initiation), Err(DropReason::ManagerQueue));
    }
}
