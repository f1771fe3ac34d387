//! Exclusive locks on files (flock(2)). The owner of a lock has a role.
//!
//! The lock belongs to the open file description: a copy of the descriptor in another process keeps
//! it, and the kernel releases it when the last copy is closed, however those processes end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// An exclusive lock on a file, released when the last copy of its descriptor is closed.
#[derive(Debug)]
pub struct FileLock(File);

impl FileLock {
    /// Takes the lock on the file at `path`, which is created with mode 0600. Returns `None` while
    /// another process has the lock.
    ///
    /// # Errors
    /// An I/O error if the file cannot be opened, created or locked.
    pub fn try_acquire(path: &Path) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        loop {
            let file = options.open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // Another process may have removed the file between opening and locking.
            let locked = file.metadata()?.ino();
            if std::fs::metadata(path).is_ok_and(|found| found.ino() == locked) {
                return Ok(Some(Self(file)));
            }
        }
    }

    /// Returns the lock of a descriptor that another process has passed on.
    ///
    /// # Errors
    /// An I/O error if the descriptor is not a regular file.
    pub fn from_received(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        match file.metadata()?.is_file() {
            true => Ok(Self(file)),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Releases the lock, also where another process has a copy of the descriptor: a child has one
    /// between fork and exec.
    pub fn release(self) {
        // A lock that cannot be released is free when the last copy is closed.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }

    /// Returns the locked file.
    pub fn file(&mut self) -> &mut File {
        &mut self.0
    }
}

impl AsFd for FileLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<FileLock> for OwnedFd {
    fn from(lock: FileLock) -> Self {
        lock.0.into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lock_is_free_when_last_copy_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = FileLock::try_acquire(&path).unwrap().unwrap();
        let copy = first.as_fd().try_clone_to_owned().unwrap();
        drop(first);
        assert!(
            FileLock::try_acquire(&path).unwrap().is_none(),
            "A copy of the descriptor keeps it."
        );
        let received = FileLock::from_received(copy).unwrap();
        assert!(
            FileLock::try_acquire(&path).unwrap().is_none(),
            "A received lock is the same lock."
        );
        drop(received);
        assert!(FileLock::try_acquire(&path).unwrap().is_some(), "The lock is free.");
    }

    #[test]
    fn released_lock_is_free_although_a_copy_is_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let lock = FileLock::try_acquire(&path).unwrap().unwrap();
        let _copy = lock.as_fd().try_clone_to_owned().unwrap();
        lock.release();
        assert!(FileLock::try_acquire(&path).unwrap().is_some(), "The lock is free.");
    }

    #[test]
    fn descriptor_of_other_kind_is_refused() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(FileLock::from_received(socket.into()).is_err());
    }
}
