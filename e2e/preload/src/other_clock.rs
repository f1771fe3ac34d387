//! A library to preload (LD_PRELOAD) into an agent: clock_gettime(2) gives a wall clock that is
//! wrong by as many seconds as the file says that SKEIN_CLOCK names. Time namespaces have a
//! monotonic clock of their own only.

use std::ffi::c_int;

use libc::{CLOCK_REALTIME, clockid_t, timespec};

#[path = "support/number.rs"]
mod number;

extern "C" fn map() {
    number::map("SKEIN_CLOCK");
}

#[used]
// SAFETY: the loader calls the functions of this section once, when it loads the library.
#[unsafe(link_section = ".init_array")]
static MAP: extern "C" fn() = map;

/// Stands in for the C library's.
///
/// # Safety
///
/// As for clock_gettime(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    // SAFETY: what the caller gave.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int };
    if result == 0 && clock == CLOCK_REALTIME {
        let offset = number::number();
        // SAFETY: the kernel has just written there.
        unsafe { (*time).tv_sec += offset };
    }
    result
}
