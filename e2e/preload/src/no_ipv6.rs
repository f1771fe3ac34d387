//! Preloaded library (LD_PRELOAD) for an agent: socket(2) fails with EAFNOSUPPORT for AF_INET6, as
//! on a kernel that was started with `ipv6.disable=1`.

use std::ffi::c_int;

/// Replaces socket(2) of the C library.
///
/// # Safety
///
/// The contract is that of socket(2), which takes no pointers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    if domain == libc::AF_INET6 {
        // SAFETY: the address of this thread's errno is always valid.
        unsafe { *libc::__errno_location() = libc::EAFNOSUPPORT };
        return -1;
    }
    // SAFETY: the system call takes three integers.
    unsafe { libc::syscall(libc::SYS_socket, domain, kind, protocol) as c_int }
}
