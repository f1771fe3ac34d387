//! Shared memory that outlives the writing process: a memfd of sealed size (memfd_create(2)),
//! mapped as atomic words. Processes that have the descriptor read and write the same words.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Length of a word in bytes.
const WORD: usize = size_of::<AtomicU64>();

/// Seals that fix the size. Access to a mapping beyond the end of a shrunk file raises SIGBUS.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A mapping of a whole memfd. The kernel allocates a page at the first write to it.
#[derive(Debug)]
pub struct SharedWords {
    file: OwnedFd,
    start: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the value owns the mapping, which is not bound to a thread.
unsafe impl Send for SharedWords {}
// SAFETY: shared access is atomic only (`&[AtomicU64]`), also by other processes that map the same
// memfd. The mapping is unmapped only in `Drop`, which needs exclusive ownership.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Creates a memfd of `words` words, all 0, and maps it.
    ///
    /// # Errors
    /// `InvalidInput` if the size in bytes overflows; the error of memfd_create(2), ftruncate(2),
    /// fcntl(2) or mmap(2).
    pub fn create(words: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("skein-sessions", flags)?;
        let bytes = words.checked_mul(WORD).and_then(|bytes| u64::try_from(bytes).ok());
        ftruncate(&file, bytes.ok_or(io::ErrorKind::InvalidInput)?)?;
        fcntl_add_seals(&file, SEALS)?;
        Self::map(file, words)
    }

    /// Maps a memfd that another process created by [`Self::create`].
    ///
    /// # Errors
    /// `InvalidData` if the size of the memfd is not sealed or is not `words` words; the error of
    /// fcntl(2), fstat(2) or mmap(2).
    pub fn open(file: OwnedFd, words: usize) -> io::Result<Self> {
        let sealed = fcntl_get_seals(&file)?.contains(SEALS);
        if !sealed || usize::try_from(fstat(&file)?.st_size).ok() != words.checked_mul(WORD) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Self::map(file, words)
    }

    fn map(file: OwnedFd, len: usize) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address (no MAP_FIXED), so that the new mapping replaces
        // no other memory.
        let start = unsafe { mmap(std::ptr::null_mut(), len * WORD, access, flags, &file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, start, len })
    }

    /// Returns all words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is the page-aligned start of a mapping of `len` words, which is valid
        // while `self` is borrowed and whose file cannot shrink (sealed). Every bit pattern is a
        // valid `AtomicU64`, and all access is atomic.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl AsFd for SharedWords {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the value owns the mapping, and no borrow of it exists in `drop`.
        // munmap(2) does not fail for a range that mmap(2) returned.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len * WORD) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn two_mappings_share_their_words() {
        let one = SharedWords::create(4096).unwrap();
        one.words()[4095].store(7, Relaxed);
        let two = SharedWords::open(one.as_fd().try_clone_to_owned().unwrap(), 4096).unwrap();
        assert_eq!(two.words()[4095].load(Relaxed), 7);
        two.words()[0].store(9, Relaxed);
        assert_eq!(one.words()[0].load(Relaxed), 9);
        drop(two);
        assert_eq!(one.words().len(), 4096);
        assert!(ftruncate(&one.file, 0).is_err(), "the file must not shrink under a mapping");
    }

    #[test]
    fn unsealed_file_and_wrong_size_are_refused() {
        let one = SharedWords::create(64).unwrap();
        let copy = || one.as_fd().try_clone_to_owned().unwrap();
        assert!(SharedWords::open(copy(), 65).is_err());
        assert!(SharedWords::open(copy(), 64).is_ok());
        let loose = tempfile::tempfile().unwrap();
        loose.set_len(512).unwrap();
        assert!(SharedWords::open(loose.into(), 64).is_err());
    }
}
