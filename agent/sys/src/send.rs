//! Sending many batches of datagrams in one sendmmsg, each batch as one UDP_SEGMENT message.
//!
//! [`plan`] decides what goes into a call and what an error means, and never sees the kernel;
//! [`gso`] remembers where UDP_SEGMENT does not work; this file carries a planned call out.

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

/// Runs, the bytes that they point into, and where to begin.
#[derive(Debug, Clone, Copy)]
pub struct SendRequest<'a> {
    /// The bytes.
    pub arena: &'a [u8],
    /// The batches, in the order of sending.
    pub batches: &'a [GsoBatch<'a>],
    /// What comes before this was sent, or dropped, earlier.
    pub from: Position,
}

/// A datagram of a list of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position {
    /// Index of the batch.
    pub batch: usize,
    /// Index of the datagram in the batch.
    pub segment: usize,
}

/// What became of the batches. Every datagram before `blocked` is in `datagrams` or in `dropped`, never
/// in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SendOutcome {
    /// Datagrams that the kernel took.
    pub datagrams: u64,
    /// Their bytes, without UDP and IP headers.
    pub bytes: u64,
    /// System calls made, those that failed included.
    pub calls: u64,
    /// Messages of more than one datagram among those sent.
    pub gso_messages: u64,
    /// Messages of more than one datagram that the kernel refused and that were sent one by one.
    pub fallbacks: u64,
    /// Datagrams dropped, whatever the reason.
    pub dropped: u64,
    /// The last datagram that was longer than its route carries (EMSGSIZE).
    pub too_long: Option<TooLong>,
    /// The first datagram for which the socket's send buffer has no room; all that follow it are
    /// neither sent nor dropped.
    pub blocked: Option<Position>,
}

/// A datagram that was longer than this host's route to its destination carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong {
    /// Destination in the outer header.
    pub destination: SocketAddr,
    /// UDP payload in bytes.
    pub len: usize,
}

/// Sends batches; keeps its buffers from call to call, one a lane.
#[derive(Default)]
pub struct Sender {
    plan: Plan,
    call: Call,
}

impl Sender {
    /// Makes one; its buffers grow with the first calls.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends the datagrams of the batches in order. Each is sent once, or dropped and counted in
    /// `drops`; an error of one never keeps the others from going. A batch that does not fit its own
    /// description or the arena is dropped whole. A nonblocking socket whose buffer is full ends it
    /// ([`SendOutcome::blocked`]): call again from there when there is room.
    ///
    /// `now` decides when UDP_SEGMENT is tried again where it failed.
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

    /// Datagrams that each successful call of the last [`send`](Self::send) took.
    pub fn datagrams_per_call(&self) -> &[u32] {
        self.plan.datagrams_per_call()
    }

    /// Returns whether the kernel refuses the control message that sets the outer ECN field, so
    /// that every datagram leaves as Not-ECT.
    pub fn ecn_refused(&self) -> bool {
        self.plan.ecn_refused()
    }

    /// Datagrams in each message that the last [`send`](Self::send) sent.
    pub fn segments_per_message(&self) -> &[u32] {
        self.plan.segments_per_message()
    }
}

/// Room for two control messages, the segment size (u16) and the ECN field (int), of 24 bytes each
/// with their headers, aligned for cmsghdr.
type Control = [u64; 6];

const _: () = {
    assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());
    // SAFETY: CMSG_SPACE only computes.
    assert!(size_of::<Control>() >= unsafe { libc::CMSG_SPACE(2) + libc::CMSG_SPACE(4) } as usize);
};

/// The kernel structures of one sendmmsg.
#[derive(Default)]
struct Call {
    addresses: Vec<SockAddr>,
    iovecs: Vec<libc::iovec>,
    control: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
    /// For each message: its address, and the end of its iovecs.
    layout: Vec<(usize, usize)>,
}

// SAFETY: the raw pointers in `iovecs` and `headers` are written anew at every call, from what is
// borrowed then, and are followed only within that call.
unsafe impl Send for Call {}

impl Call {
    /// One sendmmsg. Returns how many messages went; an error is that of the first.
    fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        arena: &[u8],
        batches: &[GsoBatch<'_>],
        messages: &[Message],
    ) -> Result<usize, i32> {
        self.gather(arena, batches, messages);
        self.fill_headers(messages);
        // SAFETY: every header points at an address and at iovecs (and, for a batch, at a control
        // message) in vectors of self that are not touched until the call is over, and gives their
        // true lengths; the iovecs point into `arena`, which is borrowed. The kernel writes
        // nothing but msg_len.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.headers.len() as libc::c_uint,
                // A peer that refuses must not raise SIGPIPE (UDP does not; it costs nothing).
                libc::MSG_NOSIGNAL as _,
            )
        };
        usize::try_from(sent).map_err(|_| {
            let error = io::Error::last_os_error();
            error.raw_os_error().unwrap_or(libc::EIO)
        })
    }

    /// Collects the addresses and the iovecs; nothing points at them yet, so they may grow.
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
                // The plan has checked this; a pointer beyond the arena must be impossible here.
                if offset.checked_add(len).is_none_or(|end| end > arena.len()) {
                    return;
                }
                let base = arena.as_ptr().wrapping_add(offset).cast_mut().cast();
                match self.iovecs[first..].last_mut() {
                    // Adjacent in the arena: one piece.
                    Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == base => {
                        last.iov_len += len;
                    }
                    _ => self.iovecs.push(libc::iovec { iov_base: base, iov_len: len }),
                }
            });
            self.layout.push((self.addresses.len() - 1, self.iovecs.len()));
        }
    }

    fn fill_headers(&mut self, messages: &[Message]) {
        self.headers.clear();
        self.control.clear();
        self.control.resize(messages.len(), [0; 6]);
        let mut first = 0;
        for ((message, &(address, end)), control) in
            messages.iter().zip(&self.layout).zip(&mut self.control)
        {
            // SAFETY: mmsghdr is integers and pointers, for which zero is valid. (It has padding
            // on some systems, so it cannot be written field by field.)
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            let head = &mut header.msg_hdr;
            // The kernel does not write to it; the type is shared with recvmmsg.
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

/// Writes the control messages of a message into `control` and points `head` at them.
fn write_control(head: &mut libc::msghdr, control: &mut Control, message: &Message, v4: bool) {
    head.msg_control = control.as_mut_ptr().cast();
    let start: *mut u8 = control.as_mut_ptr().cast();
    let mut used = 0;
    let mut put = |level, kind, value: &[u8]| {
        let len = value.len() as libc::c_uint;
        // SAFETY: `control` has room for both messages (asserted above) and is aligned for cmsghdr;
        // CMSG_SPACE is a multiple of that alignment, so the second one is aligned, too, and
        // within. CMSG_DATA lies `value.len()` bytes or more before the end of the message.
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

/// Walks a batch's parts: successive messages of a batch lie one behind the other, so nothing is
/// walked twice.
#[derive(Default)]
struct PartCursor {
    part: usize,
    /// Where that part part_start in the batch, in bytes.
    part_start: usize,
}

impl PartCursor {
    /// Gives the pieces of the batch's bytes `start..start + len` as (offset in the arena, length).
    fn for_each_piece(
        &mut self,
        parts: &[(usize, usize)],
        start: usize,
        len: usize,
        mut piece: impl FnMut(usize, usize),
    ) {
        let end = start + len;
        while let Some(&(offset, part_len)) = parts.get(self.part) {
            let part_end = self.part_start + part_len;
            let (from, to) = (start.max(self.part_start), end.min(part_end));
            if from < to {
                piece(offset + (from - self.part_start), to - from);
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
    fn pieces_follow_the_parts_and_split_where_a_message_ends() {
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
