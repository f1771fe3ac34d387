//! A library to preload (LD_PRELOAD) into an agent on kernels without IPsec: sendmmsg(2) answers as
//! the kernel does where the route to one destination goes through a transformation. Messages with
//! UDP_SEGMENT to that IPv4 address fail with EIO, all others are sent.
//!
//! The address is the number in the file that SKEIN_REFUSE_GSO names; 0 refuses nothing.

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

fn refused() -> Option<Ipv4Addr> {
    u32::try_from(number::number()).ok().filter(|bits| *bits != 0).map(Ipv4Addr::from_bits)
}

/// # Safety
///
/// As for sendmmsg(2): `message` holds valid pointers.
unsafe fn is_segmented(message: &msghdr) -> bool {
    // SAFETY: the caller's message is valid, and these walk its control buffer within its length.
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

/// # Safety
///
/// As for sendmmsg(2): `message` holds valid pointers.
unsafe fn goes_to(message: &msghdr, address: Ipv4Addr) -> bool {
    if message.msg_name.is_null() || (message.msg_namelen as usize) < size_of::<sockaddr_in>() {
        return false;
    }
    // SAFETY: not null, long enough, and read without an assumption on its alignment.
    let name = unsafe { message.msg_name.cast::<sockaddr_in>().read_unaligned() };
    let bits = u32::from_be(name.sin_addr.s_addr);
    i32::from(name.sin_family) == libc::AF_INET && bits == address.to_bits()
}

/// Stands in for the C library's.
///
/// # Safety
///
/// As for sendmmsg(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmmsg(
    socket: c_int,
    messages: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
) -> c_int {
    let mut accepted = count;
    if let Some(address) = refused() {
        // SAFETY: the caller gives `count` valid messages.
        let all = unsafe { std::slice::from_raw_parts(messages, count as usize) };
        // SAFETY: as above.
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
    // SAFETY: what the caller gave, and no more messages than that.
    unsafe { libc::syscall(libc::SYS_sendmmsg, socket, messages, accepted, flags) as c_int }
}
