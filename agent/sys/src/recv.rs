//! Receiving many datagrams, and runs of datagrams, in one recvmmsg.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use skein_core::wire::ecn::Ecn;

/// Room for one message in bytes: whatever a socket with UDP_GRO can deliver. A shorter buffer
/// would lose a run's tail in silence.
const BUFFER_LEN: usize = 65_536;

/// Room for the control messages: UDP_GRO, SO_RXQ_OVFL and IP_TOS or IPV6_TCLASS have one int each
/// at most, 24 bytes with their headers. As u64, for the alignment of cmsghdr.
type Control = [u64; 12];

const _: () = {
    assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());
    // SAFETY: CMSG_SPACE only computes.
    assert!(size_of::<Control>() >= 3 * unsafe { libc::CMSG_SPACE(4) } as usize);
};

/// Room for one sock_extended_err with the address of its sender.
type ErrorControl = [u64; 16];

/// Buffers for one recvmmsg, made once.
pub struct RecvBatch {
    arena: Vec<u8>,
    addresses: Vec<libc::sockaddr_storage>,
    control: Vec<Control>,
    iovecs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    received: usize,
    overflow: u32,
}

// SAFETY: the raw pointers in `iovecs` and `headers` are written anew at every call, from vectors
// that this value owns, and are followed only within that call.
unsafe impl Send for RecvBatch {}

/// One message: a datagram, or a run of datagrams of equal size from one sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who sent it.
    pub source: SocketAddr,
    /// Where its payload lies in [`RecvBatch::arena`].
    pub range: Range<usize>,
    /// Length of every datagram but the last in bytes: the message's length where it is a single
    /// datagram, never 0, never more than the message.
    pub segment_size: usize,
    /// ECN field of the outer header, `NotEct` if the socket does not report the field. In a run of
    /// datagrams the field is that of one of them: kernels without commit 5babae777c61 ("net: gro:
    /// add flush check in udp_gro_receive_segment") merge datagrams whose fields differ.
    pub ecn: Ecn,
    /// The kernel cut the message or what it says of it; its contents are not to be used.
    pub truncated: bool,
}

impl Message {
    /// Returns true if the message is a run of more than one datagram.
    pub fn is_merged(&self) -> bool {
        self.range.len() > self.segment_size
    }

    /// Where its datagrams lie in the arena, in order. An empty message has none.
    pub fn segments(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (end, size) = (self.range.end, self.segment_size.max(1));
        self.range.clone().step_by(size).map(move |start| start..end.min(start + size))
    }
}

impl RecvBatch {
    /// Makes room for `messages` messages a call, at least one.
    pub fn new(messages: usize) -> Self {
        let messages = messages.max(1);
        // SAFETY: sockaddr_storage is plain integers, for which zero is valid.
        let address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        Self {
            arena: vec![0; messages * BUFFER_LEN],
            addresses: vec![address; messages],
            control: vec![[0; 12]; messages],
            iovecs: Vec::with_capacity(messages),
            headers: Vec::with_capacity(messages),
            received: 0,
            overflow: 0,
        }
    }

    /// Takes what the socket has, without waiting, and returns the number of messages; WouldBlock
    /// when there is none. The messages of the last call are gone.
    pub fn recv(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.received = 0;
        self.prepare();
        let received = loop {
            // SAFETY: every header points at an address, an iovec and a control buffer of its
            // own and gives their true lengths; every iovec points at a part of the arena of its
            // own. All are owned by self, which is borrowed mutably, and none is moved before the
            // call is over. A null timeout is allowed.
            let result = unsafe {
                libc::recvmmsg(
                    socket.as_raw_fd(),
                    self.headers.as_mut_ptr(),
                    self.headers.len() as libc::c_uint,
                    libc::MSG_DONTWAIT,
                    ptr::null_mut(),
                )
            };
            match usize::try_from(result) {
                Ok(received) => break received,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        };
        self.received = received.min(self.headers.len());
        self.overflow = self.headers[..self.received]
            .iter()
            .filter_map(|header| control_values(&header.msg_hdr).overflow)
            .next_back()
            .unwrap_or(0);
        Ok(self.received)
    }

    /// The `i`th message of the last call.
    ///
    /// # Panics
    /// If the last call received fewer.
    pub fn message(&self, i: usize) -> Message {
        let header = &self.headers[..self.received][i];
        let len = (header.msg_len as usize).min(BUFFER_LEN);
        let start = i * BUFFER_LEN;
        let control = control_values(&header.msg_hdr);
        let cut = libc::MSG_TRUNC | libc::MSG_CTRUNC;
        Message {
            source: socket_address(&self.addresses[i]),
            range: start..start + len,
            segment_size: segment_size(control.segment, len),
            ecn: Ecn::from_tos(control.tos),
            truncated: header.msg_hdr.msg_flags & cut != 0,
        }
    }

    /// Every message's bytes.
    pub fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// Every message's bytes, to be decrypted in place.
    pub fn arena_mut(&mut self) -> &mut [u8] {
        &mut self.arena
    }

    /// How many datagrams the socket of the last call has lost for want of buffer since it was
    /// made, as of its newest message (SO_RXQ_OVFL; wraps at 2^32). 0 if that call failed.
    pub fn overflow(&self) -> u32 {
        self.overflow
    }

    /// Points the kernel structures at the buffers, with their full lengths, which the kernel
    /// overwrote at the last call (a control buffer that was not reset would shrink for good).
    fn prepare(&mut self) {
        self.overflow = 0;
        self.iovecs.clear();
        self.iovecs.extend(self.arena.chunks_exact_mut(BUFFER_LEN).map(|buffer| libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        }));
        self.headers.clear();
        let buffers = self.iovecs.iter_mut().zip(&mut self.addresses).zip(&mut self.control);
        self.headers.extend(buffers.map(|((iovec, address), control)| {
            // SAFETY: mmsghdr is integers and pointers, for which zero is valid. (It has padding
            // on some systems, so it cannot be written field by field.)
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_name = ptr::from_mut(address).cast();
            header.msg_hdr.msg_namelen = size_of_val(address) as libc::socklen_t;
            header.msg_hdr.msg_iov = iovec;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = size_of_val(control) as _;
            header
        }));
    }
}

/// A run's segment size, whatever the kernel says.
fn segment_size(reported: Option<i32>, len: usize) -> usize {
    let reported = reported.and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
    reported.map_or(len, |size| size.min(len)).max(1)
}

#[derive(Default)]
struct ControlValues {
    segment: Option<i32>,
    overflow: Option<u32>,
    /// Type of service or traffic class of the outer header.
    tos: u8,
}

/// Reads the control messages that recvmmsg left.
fn control_values(header: &libc::msghdr) -> ControlValues {
    let mut found = ControlValues::default();
    // SAFETY: `header` is one that recvmmsg has filled: msg_control points at a Control of the
    // same RecvBatch, of which msg_controllen bytes are the kernel's, so the CMSG macros stay
    // within it.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a whole cmsghdr within the buffer, which
    // is aligned for it.
    while let Some(head) = unsafe { cmsg.as_ref() } {
        // SAFETY: CMSG_LEN only computes.
        let (byte_len, int_len) =
            unsafe { (libc::CMSG_LEN(1) as usize, libc::CMSG_LEN(4) as usize) };
        // The length's type differs between C libraries.
        #[allow(clippy::unnecessary_cast)]
        if head.cmsg_len as usize >= int_len {
            // SAFETY: the message has at least four bytes of data; they need not be aligned.
            let value = unsafe { libc::CMSG_DATA(cmsg).cast::<i32>().read_unaligned() };
            match (head.cmsg_level, head.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => found.segment = Some(value),
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => found.overflow = Some(value as u32),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => found.tos = value as u8,
                _ => {}
            }
        } else if head.cmsg_len as usize >= byte_len
            && (head.cmsg_level, head.cmsg_type) == (libc::IPPROTO_IP, libc::IP_TOS)
        {
            // SAFETY: the message has at least one byte of data.
            found.tos = unsafe { *libc::CMSG_DATA(cmsg) };
        }
        // SAFETY: as at CMSG_FIRSTHDR; `cmsg` came from it.
        cmsg = unsafe { libc::CMSG_NXTHDR(header, cmsg) };
    }
    found
}

/// Receives a message from a socket's error queue and returns the MTU in bytes that a local
/// EMSGSIZE reports (ip(7), IP_RECVERR); `None` if the queue is empty or reports another error.
///
/// # Errors
/// The error of recvmsg(2), except for an empty queue.
pub(super) fn reported_mtu(socket: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let mut payload = [0u8; 1];
    let mut control: ErrorControl = [0; 16];
    let mut iovec = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: msghdr is integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header points at an iovec and a control buffer that live until the end of this
    // function, and gives their true lengths.
    let received = unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
    };
    if received < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
    }
    // SAFETY: `header` was filled by recvmsg, so that the CMSG macros stay within the control
    // buffer.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a whole, aligned cmsghdr.
    while let Some(head) = unsafe { cmsg.as_ref() } {
        // SAFETY: CMSG_LEN only computes.
        let whole = unsafe { libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as _) } as usize;
        let kind = (head.cmsg_level, head.cmsg_type);
        let of_error = kind == (libc::IPPROTO_IP, libc::IP_RECVERR)
            || kind == (libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
        // The length's type differs between C libraries.
        #[allow(clippy::unnecessary_cast)]
        if of_error && head.cmsg_len as usize >= whole {
            // SAFETY: the message holds a whole sock_extended_err, of plain integers.
            let error =
                unsafe { libc::CMSG_DATA(cmsg).cast::<libc::sock_extended_err>().read_unaligned() };
            let local = error.ee_origin == libc::SO_EE_ORIGIN_LOCAL;
            let too_long = error.ee_errno == libc::EMSGSIZE as u32;
            return Ok((local && too_long).then_some(error.ee_info));
        }
        // SAFETY: as at CMSG_FIRSTHDR; `cmsg` came from it.
        cmsg = unsafe { libc::CMSG_NXTHDR(&raw const header, cmsg) };
    }
    Ok(None)
}

fn socket_address(storage: &libc::sockaddr_storage) -> SocketAddr {
    let storage = ptr::from_ref(storage);
    // SAFETY: sockaddr_storage has the size and the alignment of every address type, all of which
    // are plain integers, and all its bytes are initialised.
    unsafe {
        match i32::from((*storage).ss_family) {
            libc::AF_INET6 => {
                let address = &*storage.cast::<libc::sockaddr_in6>();
                SocketAddr::V6(SocketAddrV6::new(
                    Ipv6Addr::from(address.sin6_addr.s6_addr),
                    u16::from_be(address.sin6_port),
                    // Nobody answers by flow; the scope does tell link-local peers apart.
                    0,
                    address.sin6_scope_id,
                ))
            }
            _ => {
                let address = &*storage.cast::<libc::sockaddr_in>();
                SocketAddr::V4(SocketAddrV4::new(
                    Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)),
                    u16::from_be(address.sin_port),
                ))
            }
        }
    }
}
