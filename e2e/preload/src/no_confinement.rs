//! Preloaded library (LD_PRELOAD) for an agent: seccomp(2) and landlock_create_ruleset(2), called
//! by syscall(2), fail with ENOSYS, as on a kernel without them.

use std::ffi::{c_int, c_long};

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
}

/// Replaces syscall(2) of the C library, a variadic function. Stable Rust cannot define a variadic
/// function, so this function has six fixed parameters, the maximum of a system call. On
/// Linux on x86-64 and AArch64, callers pass integers and pointers to both kinds of function in the
/// same way.
///
/// # Safety
///
/// The contract is that of syscall(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if [libc::SYS_seccomp, libc::SYS_landlock_create_ruleset].contains(&number) {
        // SAFETY: the address of this thread's errno is always valid.
        unsafe { *__errno_location() = libc::ENOSYS };
        return -1;
    }
    type Syscall = unsafe extern "C" fn(c_long, ...) -> c_long;
    // SAFETY: the name ends with a zero byte; RTLD_NEXT searches the libraries after this one.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, c"syscall".as_ptr()) };
    // SAFETY: the C library has the function, with this type.
    let next: Syscall = unsafe { std::mem::transmute(next) };
    // SAFETY: the arguments are those of the caller, who meets the contract of syscall(2).
    unsafe { next(number, a, b, c, d, e, f) }
}
