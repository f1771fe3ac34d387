//! Preloaded library (LD_PRELOAD) for an agent: clock_gettime(2) adds an offset to the wall clock.
//! The offset is the number of seconds in the file that SKEIN_CLOCK names. A time namespace can
//! change the monotonic clock, but not the wall clock.

use std::ffi::c_int;

use libc::{CLOCK_REALTIME, clockid_t, timespec};

#[path = "support/number.rs"]
mod number;

extern "C" fn map_offset_file() {
    number::map("SKEIN_CLOCK");
}

#[used]
// SAFETY: the loader calls the functions of this section once, when it loads the library.
#[unsafe(link_section = ".init_array")]
static MAP: extern "C" fn() = map_offset_file;

/// Replaces clock_gettime(2) of the C library.
///
/// # Safety
///
/// The contract is that of clock_gettime(2): `time` points to a valid timespec.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    // SAFETY: the caller's `time` is valid, as the contract of this function requires.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int };
    if result == 0 && clock == CLOCK_REALTIME {
        let offset = number::number();
        // SAFETY: the kernel has just written to `time` without an error, so it is valid.
        unsafe { (*time).tv_sec += offset };
    }
    result
}
