//! Memory that outlives the process that writes to it: a memfd whose size is sealed, seen as words that
//! may be read and written by anybody who has it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of a word.
const WORD: usize = size_of::<AtomicU64>();

/// The size can never change: a mapping would fault where the file has shrunk.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A mapping of the whole. Takes room only where something was written.
#[derive(Debug)]
pub struct SharedWords {
    file: OwnedFd,
    start: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, and all access to it is by atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Makes `words` words of zeros.
    pub fn create(words: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("skein-sessions", flags)?;
        let bytes = words.checked_mul(WORD).and_then(|bytes| u64::try_from(bytes).ok());
        ftruncate(&file, bytes.ok_or(io::ErrorKind::InvalidInput)?)?;
        fcntl_add_seals(&file, SEALS)?;
        Self::map(file, words)
    }

    /// Maps what another process has made. Refuses what is not sealed, or of another size.
    pub fn open(file: OwnedFd, words: usize) -> io::Result<Self> {
        let sealed = fcntl_get_seals(&file)?.contains(SEALS);
        if !sealed || usize::try_from(fstat(&file)?.st_size).ok() != words.checked_mul(WORD) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Self::map(file, words)
    }

    fn map(file: OwnedFd, len: usize) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap(std::ptr::null_mut(), len * WORD, access, flags, &file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, start, len })
    }

    /// All of it.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is the page-aligned begin of a mapping of `len` words that lives as long as
        // `self`; it cannot shrink, any bits are a u64, and nothing but atomics touches it.
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
        // SAFETY: the mapping is this value's own, and borrows of it have ended.
        // It fails on no mapping that mmap has given.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len * WORD) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn two_mappings_see_the_same() {
        let one = SharedWords::create(4096).unwrap();
        one.words()[4095].store(7, Relaxed);
        let two = SharedWords::open(one.as_fd().try_clone_to_owned().unwrap(), 4096).unwrap();
        assert_eq!(two.words()[4095].load(Relaxed), 7);
        two.words()[0].store(9, Relaxed);
        assert_eq!(one.words()[0].load(Relaxed), 9);
        drop(two);
        assert_eq!(one.words().len(), 4096);
        assert!(ftruncate(&one.file, 0).is_err(), "it cannot shrink under a mapping");
    }

    #[test]
    fn what_is_not_sealed_or_of_another_size_is_refused() {
        let one = SharedWords::create(64).unwrap();
        let copy = || one.as_fd().try_clone_to_owned().unwrap();
        assert!(SharedWords::open(copy(), 65).is_err());
        assert!(SharedWords::open(copy(), 64).is_ok());
        let loose = tempfile::tempfile().unwrap();
        loose.set_len(512).unwrap();
        assert!(SharedWords::open(loose.into(), 64).is_err());
    }
}
