//! Reception of many messages with one recvmmsg(2). With UDP_GRO, a message may contain several
//! datagrams of one sender.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use skein_core::wire::ecn::Ecn;

/// Length of the buffer of one message in bytes: the maximum that a socket with UDP_GRO delivers.
/// The kernel cuts a message that is longer than its buffer.
const BUFFER_LEN: usize = 65_536;

/// Buffer of the control messages UDP_GRO, SO_RXQ_OVFL, and IP_TOS or IPV6_TCLASS. Each contains at
/// most one int and takes 24 bytes with its header. The element type u64 gives the alignment of
/// cmsghdr.
type Control = [u64; 12];

const _: () = {
    assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());
    // SAFETY: `CMSG_SPACE` computes a size from its argument and dereferences no pointer.
    assert!(size_of::<Control>() >= 3 * unsafe { libc::CMSG_SPACE(4) } as usize);
};

/// Buffer of one control message with a sock_extended_err, followed by the address of the node that
/// caused the error (ip(7), SO_EE_OFFENDER).
type ErrorControl = [u64; 16];

/// Buffers of recvmmsg(2), allocated once. The caller calls [`Self::recv`] and then reads the
/// [`Self::message`]s, whose payloads are in [`Self::arena`].
pub struct RecvBatch {
    arena: Vec<u8>,
    addresses: Vec<libc::sockaddr_storage>,
    control: Vec<Control>,
    iovecs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    received: usize,
    /// Total number of datagrams that the kernel has dropped at the socket ([`Self::overflow`]).
    overflow: u32,
}

// SAFETY: the raw pointers in `iovecs` and `headers` point to vectors that this value owns. Each
// call of `recv` overwrites these pointers before the kernel uses them. Only methods of this value
// dereference the pointers.
unsafe impl Send for RecvBatch {}

/// Received message: a datagram, or several merged datagrams of one sender (UDP_GRO). Merged
/// datagrams have the same size, except for a shorter last one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Source address and port.
    pub source: SocketAddr,
    /// Range of the payload in [`RecvBatch::arena`].
    pub range: Range<usize>,
    /// Length in bytes of each datagram except the last one, which may be shorter. The length is at
    /// least 1, and at most the length of the message unless the message is empty. For a single
    /// datagram, the length is that of the message.
    pub segment_size: usize,
    /// ECN field of the outer header; `NotEct` if the socket does not report the field. For merged
    /// datagrams, the field is that of one of them: kernels without commit 5babae777c61 ("net: gro:
    /// add flush check in udp_gro_receive_segment") merge datagrams with different fields.
    pub ecn: Ecn,
    /// True if the kernel cut the message or its control messages (MSG_TRUNC, MSG_CTRUNC). The
    /// content must not be used.
    pub truncated: bool,
}

impl Message {
    /// Returns true if the message contains more than one datagram.
    pub fn is_merged(&self) -> bool {
        self.range.len() > self.segment_size
    }

    /// Returns the ranges of the datagrams in the arena, in order. An empty message has none.
    pub fn segments(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (end, size) = (self.range.end, self.segment_size.max(1));
        self.range.clone().step_by(size).map(move |start| start..end.min(start + size))
    }
}

impl RecvBatch {
    /// Allocates buffers for `messages` messages per call, at least one.
    pub fn new(messages: usize) -> Self {
        let messages = messages.max(1);
        // SAFETY: sockaddr_storage consists of integers, for which zero is valid.
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

    /// Receives the queued messages of `socket` without waiting, up to the number of buffers.
    /// Returns the number of messages. The messages of the previous call are lost.
    ///
    /// # Errors
    /// `WouldBlock` if no message is queued; other errors of recvmmsg(2), except EINTR.
    pub fn recv(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.received = 0;
        self.prepare();
        let received = loop {
            // SAFETY: each header points to its own address, iovec and control buffer and contains
            // their lengths; each iovec points to its own part of the arena. `self` owns all of
            // them, is borrowed mutably, and does not move them during the call. The timeout may be
            // null.
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

    /// Returns message `i` of the last [`Self::recv`].
    ///
    /// # Panics
    /// Panics if the last call received `i` or fewer messages.
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

    /// Returns the payloads of all messages ([`Message::range`]).
    pub fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// Returns the payloads of all messages, for decryption in place.
    pub fn arena_mut(&mut self) -> &mut [u8] {
        &mut self.arena
    }

    /// Returns the number of datagrams that the socket has dropped because its receive buffer was
    /// full (SO_RXQ_OVFL). The socket is that of the last call of [`Self::recv`]. The count starts
    /// with the socket's creation and wraps at 2^32. The newest message reports the count. Returns
    /// 0 if the call failed, or if the socket has dropped no datagram.
    pub fn overflow(&self) -> u32 {
        self.overflow
    }

    /// Points the structures for recvmmsg(2) to the buffers, and sets the full length of each
    /// buffer. The kernel overwrites these lengths in each call.
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
            // SAFETY: mmsghdr consists of integers and pointers, for which zero is valid. (A struct
            // literal is impossible: some C libraries have private padding fields.)
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

/// Returns the segment size of a message of `len` bytes: `reported`, but at most `len`. Returns
/// `len` if the kernel reports no size or a size below 1. The segment size is at least 1, even if
/// `len` is 0.
fn segment_size(reported: Option<i32>, len: usize) -> usize {
    let reported = reported.and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
    reported.map_or(len, |size| size.min(len)).max(1)
}

#[derive(Default)]
struct ControlValues {
    /// Segment size in bytes (UDP_GRO).
    segment: Option<i32>,
    /// Number of datagrams that the kernel has dropped since the socket's creation (SO_RXQ_OVFL).
    overflow: Option<u32>,
    /// Type of service (IPv4) or traffic class (IPv6) of the outer header.
    tos: u8,
}

/// Reads the control messages of a message that recvmmsg(2) received.
fn control_values(header: &libc::msghdr) -> ControlValues {
    let mut found = ControlValues::default();
    // SAFETY: recvmmsg(2) has filled `header`: msg_control points to a `Control` of the same
    // `RecvBatch`, and the kernel wrote its first msg_controllen bytes, within which the CMSG
    // macros stay.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a pointer to a complete, aligned cmsghdr
    // within the buffer.
    while let Some(head) = unsafe { cmsg.as_ref() } {
        // SAFETY: `CMSG_LEN` computes a length from its argument and dereferences no pointer.
        let (byte_len, int_len) =
            unsafe { (libc::CMSG_LEN(1) as usize, libc::CMSG_LEN(4) as usize) };
        // The length's type differs between C libraries.
        #[allow(clippy::unnecessary_cast)]
        if head.cmsg_len as usize >= int_len {
            // SAFETY: the control message contains at least four bytes of data, which are read
            // unaligned.
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
            // SAFETY: the control message contains at least one byte of data.
            found.tos = unsafe { *libc::CMSG_DATA(cmsg) };
        }
        // SAFETY: `header` is valid for the CMSG macros (see CMSG_FIRSTHDR above), and `cmsg`
        // points to one of its control messages.
        cmsg = unsafe { libc::CMSG_NXTHDR(header, cmsg) };
    }
    found
}

/// Receives one message from the error queue of a socket (ip(7), IP_RECVERR). Returns the MTU in
/// bytes of a locally generated EMSGSIZE error, and `None` if the queue is empty or has another
/// error.
///
/// # Errors
/// The error of recvmsg(2), except EAGAIN.
pub(super) fn reported_mtu(socket: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let mut payload = [0u8; 1];
    let mut control: ErrorControl = [0; 16];
    let mut iovec = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: msghdr consists of integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header points to an iovec and a control buffer of this function and contains
    // their lengths.
    let received = unsafe {
        libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
    };
    if received < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
    }
    // SAFETY: recvmsg(2) has filled `header`, so that the CMSG macros stay within the control
    // buffer.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a pointer to a complete, aligned
    // cmsghdr.
    while let Some(head) = unsafe { cmsg.as_ref() } {
        // SAFETY: `CMSG_LEN` computes a length from its argument and dereferences no pointer.
        let whole = unsafe { libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as _) } as usize;
        let kind = (head.cmsg_level, head.cmsg_type);
        let of_error = kind == (libc::IPPROTO_IP, libc::IP_RECVERR)
            || kind == (libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
        // The length's type differs between C libraries.
        #[allow(clippy::unnecessary_cast)]
        if of_error && head.cmsg_len as usize >= whole {
            // SAFETY: the control message contains a complete sock_extended_err, which consists of
            // integers and is read unaligned.
            let error =
                unsafe { libc::CMSG_DATA(cmsg).cast::<libc::sock_extended_err>().read_unaligned() };
            let local = error.ee_origin == libc::SO_EE_ORIGIN_LOCAL;
            let too_long = error.ee_errno == libc::EMSGSIZE as u32;
            return Ok((local && too_long).then_some(error.ee_info));
        }
        // SAFETY: `header` is valid for the CMSG macros (see CMSG_FIRSTHDR above), and `cmsg`
        // points to one of its control messages.
        cmsg = unsafe { libc::CMSG_NXTHDR(&raw const header, cmsg) };
    }
    Ok(None)
}

fn socket_address(storage: &libc::sockaddr_storage) -> SocketAddr {
    let storage = ptr::from_ref(storage);
    // SAFETY: sockaddr_storage has the size and alignment of every address type. The address types
    // consist of integers, and all bytes are initialised.
    unsafe {
        match i32::from((*storage).ss_family) {
            libc::AF_INET6 => {
                let address = &*storage.cast::<libc::sockaddr_in6>();
                SocketAddr::V6(SocketAddrV6::new(
                    Ipv6Addr::from(address.sin6_addr.s6_addr),
                    u16::from_be(address.sin6_port),
                    // The flow label is not part of an endpoint. The scope distinguishes link-local
                    // peers.
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
