//! Preloaded library (LD_PRELOAD) for an agent, for kernels without IPsec: sendmmsg(2) behaves as
//! if the route to one destination had an IPsec transformation. Messages with UDP_SEGMENT to this
//! IPv4 address fail with EIO, all others are sent.
//!
//! The address is the number in the file that SKEIN_REFUSE_GSO names; 0 means no address.

use std::ffi::{c_int, c_uint};
use std::net::Ipv4Addr;

use libc::{CMSG_FIRSTHDR, CMSG_NXTHDR, SOL_UDP, UDP_SEGMENT, mmsghdr, msghdr, sockaddr_in};

#[path = "support/number.rs"]
mod number;

extern "C" fn map() {
    number::map("SKEIN_REFUSE_GSO");
}

#[used]
// SAFETY: the loader calls the functions of this section once, when it loads the library.
#[unsafe(link_section = ".init_array")]
static MAP: extern "C" fn() = map;

/// Returns the address to which segmented messages fail; `None` if the number is 0.
fn refused() -> Option<Ipv4Addr> {
    u32::try_from(number::number()).ok().filter(|bits| *bits != 0).map(Ipv4Addr::from_bits)
}

/// Returns whether a message has the control message UDP_SEGMENT.
///
/// # Safety
///
/// `message` contains valid pointers, as sendmmsg(2) requires.
unsafe fn is_segmented(message: &msghdr) -> bool {
    // SAFETY: the caller's message is valid, and the macros read its control buffer within its
    // length.
    unsafe {
        let mut control = CMSG_FIRSTHDR(message);
        while let Some(header) = control.as_ref() {
            if (header.cmsg_level, header.cmsg_type) == (SOL_UDP, UDP_SEGMENT) {
                return true;
            }
            control = CMSG_NXTHDR(message, control);
        }
    }
    false
}

/// Returns whether the destination of a message is this address.
///
/// # Safety
///
/// `message` contains valid pointers, as sendmmsg(2) requires.
unsafe fn goes_to(message: &msghdr, address: Ipv4Addr) -> bool {
    if message.msg_name.is_null() || (message.msg_namelen as usize) < size_of::<sockaddr_in>() {
        return false;
    }
    // SAFETY: `msg_name` is not null and long enough (checked above); the read needs no alignment.
    let name = unsafe { message.msg_name.cast::<sockaddr_in>().read_unaligned() };
    let bits = u32::from_be(name.sin_addr.s_addr);
    i32::from(name.sin_family) == libc::AF_INET && bits == address.to_bits()
}

/// Replaces sendmmsg(2) of the C library.
///
/// # Safety
///
/// The contract is that of sendmmsg(2): `messages` points to `count` valid messages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmmsg(
    socket: c_int,
    messages: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
) -> c_int {
    let mut accepted = count;
    if let Some(address) = refused() {
        // SAFETY: `messages` points to `count` valid messages, as the contract of this function
        // requires.
        let all = unsafe { std::slice::from_raw_parts(messages, count as usize) };
        // SAFETY: each message of the caller contains valid pointers.
        let refuse =
            |m: &mmsghdr| unsafe { is_segmented(&m.msg_hdr) && goes_to(&m.msg_hdr, address) };
        let found = all.iter().position(refuse);
        accepted = found.map_or(count, |position| position as c_uint);
        if found == Some(0) {
            // SAFETY: the address of this thread's errno is always valid.
            unsafe { *libc::__errno_location() = libc::EIO };
            return -1;
        }
    }
    // SAFETY: the pointer is the caller's, and `accepted` is at most the caller's `count`.
    unsafe { libc::syscall(libc::SYS_sendmmsg, socket, messages, accepted, flags) as c_int }
}
