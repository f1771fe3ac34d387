//! Sending many runs of datagrams in one sendmmsg, each run as one UDP_SEGMENT message.
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
use socket2::SockAddr;

pub use gso::{GsoOff, GsoState};
pub use plan::{MAX_MESSAGE_LEN, MAX_SEGMENTS};
pub use skein_core::offload::batch::Run;

use plan::{Message, Plan};

/// Runs, the bytes that they point into, and where to begin.
#[derive(Debug, Clone, Copy)]
pub struct ToSend<'a> {
    /// The bytes.
    pub arena: &'a [u8],
    /// The runs, in the order of sending.
    pub runs: &'a [Run<'a>],
    /// What comes before this was sent, or dropped, earlier.
    pub from: Position,
}

/// A datagram of a list of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Position {
    /// Index of the run.
    pub run: usize,
    /// Index of the datagram in the run.
    pub segment: usize,
}

/// What became of the runs. Every datagram before `blocked` is in `datagrams` or in `dropped`, never
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
    /// Outer destination.
    pub destination: SocketAddr,
    /// UDP payload in bytes.
    pub len: usize,
}

/// Sends runs; keeps its buffers from call to call, one a lane.
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

    /// Sends the datagrams of the runs in order. Each is sent once, or dropped and counted in
    /// `drops`; an error of one never keeps the others from going. A run that does not fit its own
    /// description or the arena is dropped whole. A nonblocking socket whose buffer is full ends it
    /// ([`SendOutcome::blocked`]): call again from there when there is room.
    ///
    /// `now` decides when UDP_SEGMENT is tried again where it failed.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        what: &ToSend<'_>,
        gso: &mut GsoState,
        drops: &mut DropCounts,
        now: Instant,
    ) -> SendOutcome {
        let call = &mut self.call;
        self.plan.execute(what, gso, drops, now, |messages| {
            call.send(socket, what.arena, what.runs, messages)
        })
    }

    /// Datagrams that each successful call of the last [`send`](Self::send) took.
    pub fn datagrams_per_call(&self) -> &[u32] {
        self.plan.datagrams_per_call()
    }

    /// Datagrams in each message that the last [`send`](Self::send) sent.
    pub fn segments_per_message(&self) -> &[u32] {
        self.plan.segments_per_message()
    }
}

/// Control message of one u16 (the segment size), 24 bytes with its header, aligned for cmsghdr.
type Control = [u64; 3];

const _: () = {
    assert!(align_of::<Control>() >= align_of::<libc::cmsghdr>());
    // SAFETY: CMSG_SPACE only computes.
    assert!(size_of::<Control>() >= unsafe { libc::CMSG_SPACE(2) } as usize);
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
        runs: &[Run<'_>],
        messages: &[Message],
    ) -> Result<usize, i32> {
        self.gather(arena, runs, messages);
        self.point(messages);
        // SAFETY: every header points at an address and at iovecs (and, for a run, at a control
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
    fn gather(&mut self, arena: &[u8], runs: &[Run<'_>], messages: &[Message]) {
        self.addresses.clear();
        self.iovecs.clear();
        self.layout.clear();
        let mut last_run = None;
        let mut parts = Parts::default();
        for message in messages {
            let run = &runs[message.run];
            if last_run != Some(message.run) {
                last_run = Some(message.run);
                self.addresses.push(run.destination.into());
                parts = Parts::default();
            }
            let first = self.iovecs.len();
            parts.each(run.parts, message.start, message.len, |offset, len| {
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

    fn point(&mut self, messages: &[Message]) {
        self.headers.clear();
        self.control.clear();
        self.control.resize(messages.len(), [0; 3]);
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
            if let Some(segment_size) = message.gso {
                // SAFETY: CMSG_SPACE only computes.
                head.msg_controllen = unsafe { libc::CMSG_SPACE(2) } as _;
                head.msg_control = control.as_mut_ptr().cast();
                // SAFETY: msg_control points at msg_controllen writable bytes, which hold one
                // cmsghdr with two bytes of data and are aligned for it (asserted above), so
                // CMSG_FIRSTHDR is not null and CMSG_DATA lies within.
                unsafe {
                    let cmsg = libc::CMSG_FIRSTHDR(head);
                    (*cmsg).cmsg_level = libc::SOL_UDP;
                    (*cmsg).cmsg_type = libc::UDP_SEGMENT;
                    (*cmsg).cmsg_len = libc::CMSG_LEN(2) as _;
                    libc::CMSG_DATA(cmsg).cast::<u16>().write_unaligned(segment_size);
                }
            }
            self.headers.push(header);
        }
    }
}

/// Walks a run's parts: successive messages of a run lie one behind the other, so nothing is
/// walked twice.
#[derive(Default)]
struct Parts {
    part: usize,
    /// Where that part begins in the run, in bytes.
    begins: usize,
}

impl Parts {
    /// Gives the pieces of the run's bytes `start..start + len` as (offset in the arena, length).
    fn each(
        &mut self,
        parts: &[(usize, usize)],
        start: usize,
        len: usize,
        mut piece: impl FnMut(usize, usize),
    ) {
        let end = start + len;
        while let Some(&(offset, part_len)) = parts.get(self.part) {
            let part_end = self.begins + part_len;
            let (from, to) = (start.max(self.begins), end.min(part_end));
            if from < to {
                piece(offset + (from - self.begins), to - from);
            }
            if part_end > end {
                return;
            }
            self.part += 1;
            self.begins = part_end;
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
        let mut walk = Parts::default();
        let mut pieces = |start, len| {
            let mut pieces = Vec::new();
            walk.each(&parts, start, len, |offset, len| pieces.push((offset, len)));
            pieces
        };
        assert_eq!(pieces(0, 4), [(100, 4)]);
        assert_eq!(pieces(4, 6), [(104, 6)]);
        assert_eq!(pieces(10, 7), [(50, 5), (55, 2)]);
        assert_eq!(pieces(17, 3), [(57, 3)]);
    }
}
