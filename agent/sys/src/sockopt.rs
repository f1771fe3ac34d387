//! Socket options that neither the standard library nor socket2 has.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets an option whose value is a C int.
pub(super) fn set_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: an i32 is plain data of the length that set_raw derives from its type.
    unsafe { set_raw(fd, level, name, &value) }
}

/// Gives a SO_REUSEPORT group its classic BPF program; the program's result is the index of the
/// socket, in the order in which they joined (linux/Documentation/networking/filter.rst).
pub(super) fn attach_reuseport_cbpf(
    fd: BorrowedFd<'_>,
    program: &mut [libc::sock_filter],
) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: sock_fprog is what the option takes; `filter` points at `len` instructions that are
    // borrowed until the call is over, and the kernel copies them.
    unsafe { set_raw(fd, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, &program) }
}

/// # Safety
/// `T` must be the structure that the option takes, and every pointer within it must be good for
/// the time of the call.
unsafe fn set_raw<T>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: `value` is borrowed for the call and as long as the length given; the rest is the
    // caller's promise.
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
