//! Transmission of many GSO batches with one sendmmsg(2), each batch as one UDP_SEGMENT message
//! (udp(7)).
//!
//! [`plan`] selects the messages of a call and reacts to errors, without a system call. [`gso`]
//! stores the destinations for which UDP_SEGMENT fails. This module executes a planned call.

mod gso;
mod plan;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use skein_core::drop::DropCounts;
use skein_core::wire::ecn::Ecn;
use socket2::SockAddr;

pub use gso::{GsoOff, GsoState};
pub use skein_core::offload::batch::GsoBatch;

use plan::{Message, Plan};

/// GSO batches to send, the arena with their bytes, and the first datagram to send.
#[derive(Debug, Clone, Copy)]
pub struct SendRequest<'a> {
    /// Bytes to which the parts of the batches refer.
    pub arena: &'a [u8],
    /// Batches in the order of sending.
    pub batches: &'a [GsoBatch<'a>],
    /// First datagram to send. Earlier datagrams are skipped.
    pub from: Position,
}

/// Position of a datagram in a list of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position {
    /// Index of the batch.
    pub batch: usize,
    /// Index of the datagram in the batch.
    pub segment: usize,
}

/// Result of [`Sender::send`]. Each datagram before `blocked` is counted once, in `datagrams` or in
/// `dropped`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SendOutcome {
    /// Number of datagrams that the kernel accepted.
    pub datagrams: u64,
    /// Sum of the UDP payload lengths of these datagrams, bytes.
    pub bytes: u64,
    /// Number of system calls, including failed ones.
    pub calls: u64,
    /// Number of accepted messages with more than one datagram.
    pub gso_messages: u64,
    /// Number of messages with more than one datagram that the kernel refused. Their datagrams were
    /// sent or dropped as single datagrams.
    pub fallbacks: u64,
    /// Number of dropped datagrams, for all reasons.
    pub dropped: u64,
    /// Last datagram that was longer than its route carries (EMSGSIZE).
    pub too_long: Option<TooLong>,
    /// First datagram for which the send buffer of the socket has no space (EAGAIN). This datagram
    /// and later ones are neither sent nor dropped.
    pub blocked: Option<Position>,
}

/// A datagram that is longer than this host's route to its destination carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong {
    /// Destination in the outer header.
    pub destination: SocketAddr,
    /// Length of the UDP payload in bytes.
    pub len: usize,
}

/// Sender of GSO batches. Each lane has its own sender, which reuses its buffers in every call.
#[derive(Default)]
pub struct Sender {
    plan: Plan,
    call: Call,
}

impl Sender {
    /// Returns a sender with empty buffers, which grow in the first calls.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends the datagrams of `request` in order. Each datagram is either sent once, or dropped and
    /// counted in `drops`. An error of one datagram does not affect the others. A batch with an
    /// inconsistent description, or with parts outside of the arena, is dropped completely.
    ///
    /// The function stops if the buffer of the nonblocking `socket` is full. The caller then waits
    /// until the socket is writable and repeats the call from [`SendOutcome::blocked`].
    ///
    /// `gso` contains the destinations for which UDP_SEGMENT has failed. Their batches are sent
    /// without UDP_SEGMENT for a pause. If the pause of a destination has ended at the time `now`,
    /// UDP_SEGMENT is used again.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        request: &SendRequest<'_>,
        gso: &mut GsoState,
        drops: &mut DropCounts,
        now: Instant,
    ) -> SendOutcome {
        let call = &mut self.call;
        self.plan.execute(request, gso, drops, now, |messages| {
            call.send(socket, request.arena, request.batches, messages)
        })
    }

    /// Returns the number of datagrams of each successful system call in the last
    /// [`send`](Self::send).
    pub fn datagrams_per_call(&self) -> &[u32] {
        self.plan.datagrams_per_call()
    }

    /// Returns true if the kernel refuses the ancillary data of sendmsg(2) that sets the outer ECN
    /// field, so that every datagram is Not-ECT.
    pub fn ecn_refused(&self) -> bool {
        self.plan.ecn_refused()
    }

    /// Returns the number of datagrams of each accepted message in the last [`send`](Self::send).
    pub fn segments_per_message(&self) -> &[u32] {
        self.plan.segments_per_message()
    }
}

/// Buffer of two control messages: the segment size (u16) and the ECN field (int). Each takes 24
/// bytes with its header. The element type u64 gives the alignment of cmsghdr.
type Control = [u64; 6];

const _: () = {
    assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());
    // SAFETY: `CMSG_SPACE` computes a size from its argument and dereferences no pointer.
    assert!(size_of::<Control>() >= unsafe { libc::CMSG_SPACE(2) + libc::CMSG_SPACE(4) } as usize);
};

/// Kernel structures of one sendmmsg(2) call.
#[derive(Default)]
struct Call {
    addresses: Vec<SockAddr>,
    iovecs: Vec<libc::iovec>,
    control: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
    /// Index of the address and end of the iovecs of each message.
    layout: Vec<(usize, usize)>,
}

// SAFETY: every call of `send` overwrites the raw pointers in `iovecs` and `headers` with pointers
// to borrowed data, and dereferences them only in that call.
unsafe impl Send for Call {}

impl Call {
    /// Executes one sendmmsg(2). Returns the number of accepted messages, or the errno of the first
    /// message.
    fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        arena: &[u8],
        batches: &[GsoBatch<'_>],
        messages: &[Message],
    ) -> Result<usize, i32> {
        self.gather(arena, batches, messages);
        self.fill_headers(messages);
        // SAFETY: each header points to an address, to iovecs and possibly to control messages in
        // vectors of `self`, which do not change during the call, and contains their lengths. The
        // iovecs point into `arena`, which is borrowed. The kernel writes only msg_len.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.headers.len() as libc::c_uint,
                // UDP sockets raise no SIGPIPE; the flag guards a caller with another socket.
                libc::MSG_NOSIGNAL as _,
            )
        };
        usize::try_from(sent).map_err(|_| {
            let error = io::Error::last_os_error();
            error.raw_os_error().unwrap_or(libc::EIO)
        })
    }

    /// Collects the addresses and iovecs. The vectors may grow here, because no header points to
    /// them yet.
    fn gather(&mut self, arena: &[u8], batches: &[GsoBatch<'_>], messages: &[Message]) {
        self.addresses.clear();
        self.iovecs.clear();
        self.layout.clear();
        let mut last_batch = None;
        let mut parts = PartCursor::default();
        for message in messages {
            let batch = &batches[message.batch];
            if last_batch != Some(message.batch) {
                last_batch = Some(message.batch);
                self.addresses.push(batch.destination.into());
                parts = PartCursor::default();
            }
            let first = self.iovecs.len();
            parts.for_each_piece(batch.parts, message.start, message.len, |offset, len| {
                // `Plan` has checked the parts. The soundness of this function does not depend on
                // that.
                if offset.checked_add(len).is_none_or(|end| end > arena.len()) {
                    return;
                }
                let base = arena.as_ptr().wrapping_add(offset).cast_mut().cast();
                match self.iovecs[first..].last_mut() {
                    // A piece that follows the previous one in the arena extends its iovec.
                    Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == base => {
                        last.iov_len += len;
                    }
                    _ => self.iovecs.push(libc::iovec { iov_base: base, iov_len: len }),
                }
            });
            self.layout.push((self.addresses.len() - 1, self.iovecs.len()));
        }
    }

    /// Writes one header per message. No vector to which a header points may grow afterwards.
    fn fill_headers(&mut self, messages: &[Message]) {
        self.headers.clear();
        self.control.clear();
        self.control.resize(messages.len(), [0; 6]);
        let mut first = 0;
        for ((message, &(address, end)), control) in
            messages.iter().zip(&self.layout).zip(&mut self.control)
        {
            // SAFETY: mmsghdr consists of integers and pointers, for which zero is valid. (A struct
            // literal is impossible: some C libraries have private padding fields.)
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            let head = &mut header.msg_hdr;
            // The pointer is mutable because recvmmsg(2) uses the same type. sendmmsg(2) does not
            // write to the address.
            head.msg_name = self.addresses[address].as_ptr().cast_mut().cast();
            head.msg_namelen = self.addresses[address].len();
            let iovecs = &mut self.iovecs[first..end];
            head.msg_iov = iovecs.as_mut_ptr();
            head.msg_iovlen = iovecs.len() as _;
            first = end;
            if message.gso.is_some() || message.ecn != Ecn::NotEct {
                let v4 = self.addresses[address].is_ipv4();
                write_control(head, control, message, v4);
            }
            self.headers.push(header);
        }
    }
}

/// Writes the control messages of `message` to `control` and makes `head` point to them. `v4` is
/// true for an IPv4 destination.
fn write_control(head: &mut libc::msghdr, control: &mut Control, message: &Message, v4: bool) {
    head.msg_control = control.as_mut_ptr().cast();
    let start: *mut u8 = control.as_mut_ptr().cast();
    let mut used = 0;
    let mut put = |level, kind, value: &[u8]| {
        let len = value.len() as libc::c_uint;
        // SAFETY: `control` has space for both control messages (asserted above) and the alignment
        // of cmsghdr. CMSG_SPACE is a multiple of that alignment, so that the second message is
        // aligned and within `control`. CMSG_DATA has space for `value.len()` bytes in its message.
        unsafe {
            let cmsg: *mut libc::cmsghdr = start.add(used).cast();
            (*cmsg).cmsg_level = level;
            (*cmsg).cmsg_type = kind;
            (*cmsg).cmsg_len = libc::CMSG_LEN(len) as _;
            libc::CMSG_DATA(cmsg).copy_from_nonoverlapping(value.as_ptr(), value.len());
            used += libc::CMSG_SPACE(len) as usize;
        }
    };
    if let Some(segment_size) = message.gso {
        put(libc::SOL_UDP, libc::UDP_SEGMENT, &segment_size.to_ne_bytes());
    }
    if message.ecn != Ecn::NotEct {
        let field = libc::c_int::from(message.ecn as u8).to_ne_bytes();
        match v4 {
            true => put(libc::IPPROTO_IP, libc::IP_TOS, &field),
            false => put(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &field),
        }
    }
    head.msg_controllen = used as _;
}

/// A cursor over the parts of a batch. The messages of a batch cover successive bytes, so that the
/// cursor only moves forward.
#[derive(Default)]
struct PartCursor {
    /// Index of the current part.
    part: usize,
    /// Offset of the current part in the batch, bytes.
    part_start: usize,
}

impl PartCursor {
    /// Calls `handle` for each contiguous piece of the bytes `start..start + len` of the batch. The
    /// arguments of `handle` are the offset of the piece in the arena and its length in bytes.
    fn for_each_piece(
        &mut self,
        parts: &[(usize, usize)],
        start: usize,
        len: usize,
        mut handle: impl FnMut(usize, usize),
    ) {
        let end = start + len;
        while let Some(&(offset, part_len)) = parts.get(self.part) {
            let part_end = self.part_start + part_len;
            let (from, to) = (start.max(self.part_start), end.min(part_end));
            if from < to {
                handle(offset + (from - self.part_start), to - from);
            }
            if part_end > end {
                return;
            }
            self.part += 1;
            self.part_start = part_end;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_split_at_ends_of_parts_and_messages() {
        let parts = [(100, 10), (0, 0), (50, 5), (55, 5)];
        let mut walk = PartCursor::default();
        let mut pieces = |start, len| {
            let mut pieces = Vec::new();
            walk.for_each_piece(&parts, start, len, |offset, len| pieces.push((offset, len)));
            pieces
        };
        assert_eq!(pieces(0, 4), [(100, 4)]);
        assert_eq!(pieces(4, 6), [(104, 6)]);
        assert_eq!(pieces(10, 7), [(50, 5), (55, 2)]);
        assert_eq!(pieces(17, 3), [(57, 3)]);
    }
}
