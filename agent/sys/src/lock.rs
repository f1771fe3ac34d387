//! Exclusive locks on files (flock(2)), by which one process at a time has a role.
//!
//! A lock belongs to the open file description. A copy of the descriptor in another process keeps
//! the lock. The kernel releases the lock when the last copy is closed, also if a process is
//! killed.

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
    /// Acquires the lock on the file at `path` without waiting. A missing file is created with mode
    /// 0600. Returns `None` if another open file description has the lock.
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

    /// Returns the lock of a descriptor that another process has sent. The function does not check
    /// that the sender had the lock.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is not a regular file; the error of fstat(2).
    pub fn from_received(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        match file.metadata()?.is_file() {
            true => Ok(Self(file)),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Releases the lock, also if another process has a copy of the descriptor. A child process has
    /// copies between fork and exec.
    pub fn release(self) {
        // After an error, the lock is released when the last copy is closed.
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
    fn lock_is_released_with_the_last_copy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = FileLock::try_acquire(&path).unwrap().unwrap();
        let copy = first.as_fd().try_clone_to_owned().unwrap();
        drop(first);
        assert!(
            FileLock::try_acquire(&path).unwrap().is_none(),
            "a copy of the descriptor must keep the lock"
        );
        let received = FileLock::from_received(copy).unwrap();
        assert!(
            FileLock::try_acquire(&path).unwrap().is_none(),
            "a received descriptor must keep the lock"
        );
        drop(received);
        assert!(FileLock::try_acquire(&path).unwrap().is_some(), "the lock must be free");
    }

    #[test]
    fn released_lock_is_free_while_a_copy_is_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let lock = FileLock::try_acquire(&path).unwrap().unwrap();
        let _copy = lock.as_fd().try_clone_to_owned().unwrap();
        lock.release();
        assert!(FileLock::try_acquire(&path).unwrap().is_some(), "the lock must be free");
    }

    #[test]
    fn descriptor_of_other_kind_is_refused() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(FileLock::from_received(socket.into()).is_err());
    }
}
