//! Descriptor store of a node: descriptors and sessions of the data plane, queued in the kernel for
//! all keepers.
//!
//! The store is a pair of connected sockets. One set of descriptors is queued in it as an unread
//! message: a description ([`HandOver`]), then the listening socket, then the described
//! descriptors. Every keeper that has had the data plane holds both sockets. Only the owner of the
//! data plane's lock ([`skein_sys::lock`]) reads or writes them. Therefore a set is always current:
//! the keeper that acquires the lock continues with it, and a removed set leaves no copy that would
//! occupy the device or the port.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use skein_sys::descriptors;

use super::handover::{HandOver, receive, send};

/// State that a data process has sent to its keeper: a description and the described descriptors.
#[derive(Debug)]
pub(super) struct StoredFds {
    pub(super) state: HandOver,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Store of at most one set of descriptors.
#[derive(Debug)]
pub(super) struct FdStore {
    write: UnixStream,
    read: UnixStream,
    /// True if this keeper has stored a set that is still in the store.
    filled: bool,
}

impl FdStore {
    /// Length of [`FdStore::descriptors`].
    pub(super) const DESCRIPTORS: usize = 2;

    /// Creates an empty store.
    ///
    /// # Errors
    /// The kernel's error if the socket pair cannot be created.
    pub(super) fn create() -> io::Result<Self> {
        let (write, read) = UnixStream::pair()?;
        // O_NONBLOCK belongs to the open file description, so it applies in every process.
        write.set_nonblocking(true)?;
        read.set_nonblocking(true)?;
        Ok(Self { write, read, filled: false })
    }

    /// Opens the store from the descriptors that another keeper has sent; `None` if there are fewer
    /// than two.
    pub(super) fn received(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let mut sockets = descriptors.into_iter().map(UnixStream::from);
        Some(Self { write: sockets.next()?, read: sockets.next()?, filled: false })
    }

    /// Returns the descriptors that give another keeper access to the store.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; Self::DESCRIPTORS] {
        [self.write.as_fd(), self.read.as_fd()]
    }

    /// Replaces the set. A keeper that is killed during the call leaves a complete set.
    ///
    /// # Errors
    /// The error of the socket; the store is empty then.
    pub(super) fn put(&mut self, listener: &UnixListener, stored: &StoredFds) -> io::Result<()> {
        let mut all = vec![listener.as_fd()];
        all.extend(stored.descriptors.iter().map(AsFd::as_fd));
        let put = send(&self.write, &stored.state, &all);
        match put {
            Ok(()) if !std::mem::replace(&mut self.filled, true) => {}
            // The previous set is queued before the new one.
            Ok(()) => drop(self.receive()),
            Err(_) => self.clear(),
        }
        put
    }

    /// Removes and returns the set. `None` if the store is empty or cannot be read.
    pub(super) fn take(&mut self) -> Option<(UnixListener, StoredFds)> {
        let mut last = None;
        while let Some(set) = self.receive() {
            last = Some(set);
        }
        // The rest of a partial set would be read as the start of the next one.
        self.clear();
        last
    }

    /// Removes the set.
    pub(super) fn clear(&mut self) {
        self.filled = false;
        while matches!((&self.read).read(&mut [0; 4096]), Ok(1..)) {}
    }

    /// Receives the oldest set in the store; `None` if the store is empty or its content is
    /// invalid.
    fn receive(&self) -> Option<(UnixListener, StoredFds)> {
        let state: HandOver = receive(&self.read).ok()??;
        let mut all = descriptors::receive(&self.read, 1 + state.descriptor_count()).ok()?;
        let listener = all.remove(0).into();
        Some((listener, StoredFds { state, descriptors: all }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::handover::Family;
    use super::*;
    use skein_ipc::HANDOVER_VERSION;
    use skein_sys::tun::TunOffload;

    fn stored(lanes: u8) -> StoredFds {
        let state = HandOver {
            version: HANDOVER_VERSION,
            lanes,
            families: vec![Family { v4: true, gro: true }],
            offload: TunOffload::NONE,
            gso: true,
            capabilities: Vec::new(),
            generation: 0,
        };
        let descriptors =
            (0..state.descriptor_count()).map(|_| tempfile::tempfile().unwrap().into());
        StoredFds { descriptors: descriptors.collect(), state }
    }

    fn listener() -> UnixListener {
        UnixListener::bind(tempfile::tempdir().unwrap().path().join("s")).unwrap()
    }

    /// Opens `store` through copies of its descriptors, as another keeper opens it.
    fn open_as_another_keeper(store: &FdStore) -> FdStore {
        let copies = store.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
        FdStore::received(copies.into()).unwrap()
    }

    #[test]
    fn last_set_is_found_by_another_keeper() {
        let mut store = FdStore::create().unwrap();
        let mut another = open_as_another_keeper(&store);
        assert!(another.take().is_none(), "An empty store has no set.");
        for lanes in [1, 64, 2, 3] {
            store.put(&listener(), &stored(lanes)).unwrap();
        }
        drop(store);
        let (_, found) = another.take().unwrap();
        assert_eq!((found.state.lanes, found.descriptors.len()), (3, 2 + 3 + 7));
        assert!(another.take().is_none(), "A set that was taken out is not in the store.");
        another.put(&listener(), &found).unwrap();
        assert_eq!(another.take().unwrap().1.state.lanes, 3);
    }

    #[test]
    fn removed_set_leaves_no_copy() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut store = FdStore::create().unwrap();
        let mut stored = stored(1);
        stored.descriptors[0] = theirs.into();
        store.put(&listener(), &stored).unwrap();
        drop(stored);
        ours.set_nonblocking(true).unwrap();
        assert!((&ours).read(&mut [0]).is_err(), "The store keeps the other end open.");
        store.clear();
        assert_eq!((&ours).read(&mut [0]).unwrap(), 0, "The other end is closed.");
    }

    #[test]
    fn set_written_in_part_is_ignored() {
        let mut store = FdStore::create().unwrap();
        store.put(&listener(), &stored(2)).unwrap();
        let third = stored(3);
        send(&store.write, &third.state, &[listener().as_fd()]).unwrap();
        let mut another = open_as_another_keeper(&store);
        assert_eq!(another.take().unwrap().1.state.lanes, 2);
        assert!(another.take().is_none(), "The partial set must be removed.");
    }
}
