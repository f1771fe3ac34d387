//! Number that a test changes while a process with a preloaded library runs: 8 bytes of a file, in
//! native byte order. The file is mapped when the library is loaded, because the data process
//! cannot open files later.

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt as _;
use std::sync::atomic::{AtomicI64, Ordering};

/// Mapped number; empty if no file is mapped.
static NUMBER: std::sync::OnceLock<&AtomicI64> = std::sync::OnceLock::new();

/// Returns the number; 0 if no file is mapped.
pub(crate) fn number() -> i64 {
    NUMBER.get().map_or(0, |number| number.load(Ordering::Relaxed))
}

/// Maps the file that the environment variable names. Has no effect if the variable is not set, or
/// if the file cannot be mapped.
pub(crate) fn map(variable: &str) {
    let Some(path) = std::env::var_os(variable) else { return };
    let Ok(path) = CString::new(path.into_vec()) else { return };
    // SAFETY: `path` ends with a zero byte.
    let file = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if file < 0 {
        return;
    }
    let (access, flags) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 8, access, flags, file, 0) };
    // SAFETY: the descriptor belongs to this function; the mapping does not need it.
    unsafe { libc::close(file) };
    if mapped != libc::MAP_FAILED {
        // SAFETY: the mapping is aligned to a page, is never unmapped, and has 8 bytes, because the
        // test writes the whole file before this process starts. All accesses are atomic.
        let _ = NUMBER.set(unsafe { &*mapped.cast::<AtomicI64>() });
    }
}
