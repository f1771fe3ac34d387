//! Socket options that the standard library and socket2 do not support.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets an option whose value is an int.
pub(super) fn set_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the options of the callers take an int, and an i32 contains no pointer.
    unsafe { set_raw(fd, level, name, &value) }
}

/// Attaches a classic BPF program to an SO_REUSEPORT group (socket(7), SO_ATTACH_REUSEPORT_CBPF).
/// The result of the program is the index of the receiving socket, in the order in which the
/// sockets joined the group.
pub(super) fn attach_reuseport_cbpf(
    fd: BorrowedFd<'_>,
    program: &mut [libc::sock_filter],
) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: the option takes a sock_fprog. `filter` points to `len` instructions that are
    // borrowed for the call, and the kernel copies them.
    unsafe { set_raw(fd, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, &program) }
}

/// Sets an option whose value is a `T`.
///
/// # Safety
/// `T` must be the structure that the option takes. Every pointer in `value` must be valid during
/// the call.
unsafe fn set_raw<T>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: `value` is borrowed for the call and has the given length. The caller guarantees the
    // type of the option and the validity of pointers in `value`.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (value as *const T).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
