//! GsoBatches of sealed datagrams: consecutive datagrams to one destination that one UDP_SEGMENT message
//! can carry.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::wire::ecn::Ecn;

/// Datagrams to one destination, all but the last of one size: one UDP_SEGMENT message, or several
/// where the kernel's limits are lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GsoBatch<'a> {
    /// Outer destination.
    pub destination: SocketAddr,
    /// ECN field of the outer header, one for all datagrams.
    pub ecn: Ecn,
    /// UDP payload length in bytes of every datagram but the last, which is not empty and not
    /// longer.
    pub segment_size: usize,
    /// Number of datagrams.
    pub segments: usize,
    /// Where the bytes lie in the arena, as (offset, length), in order. A datagram may begin and
    /// end anywhere in a part; adjacent parts are sent as one.
    pub parts: &'a [(usize, usize)],
}

impl GsoBatch<'_> {
    /// No datagram at all.
    pub const EMPTY: Self = Self {
        destination: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        ecn: Ecn::NotEct,
        segment_size: 0,
        segments: 0,
        parts: &[],
    };

    /// Bytes of all datagrams.
    pub fn byte_len(&self) -> usize {
        self.parts.iter().fold(0, |len: usize, part| len.saturating_add(part.1))
    }
}

/// A sealed datagram: its run, and its place in the arena.
struct Datagram {
    run: usize,
    offset: usize,
    length: usize,
}

struct BatchState {
    destination: SocketAddr,
    ecn: Ecn,
    segment_size: usize,
    segments: usize,
    /// Range of `parts`, set by [`GsoBatches::finish`].
    first_part: usize,
    part_count: usize,
}

/// The runs of a batch, in the order in which their first datagrams were sealed.
pub(super) struct GsoBatches {
    /// Datagrams in the order of sealing.
    datagrams: Vec<Datagram>,
    runs: Vec<BatchState>,
    /// Parts of the arena as (offset, length), grouped by run.
    parts: Vec<(usize, usize)>,
}

impl GsoBatches {
    pub(super) fn new() -> Self {
        Self {
            datagrams: Vec::with_capacity(1024),
            runs: Vec::with_capacity(256),
            parts: Vec::with_capacity(1024),
        }
    }

    /// Appends a datagram of `length` bytes at `offset` of the arena to the run `open`, or to a new
    /// run if there is none or if it cannot carry the datagram. Returns the run that may grow
    /// further: `None` after a datagram shorter than its run's segments, because only the last
    /// datagram of a run may be shorter.
    pub(super) fn push(
        &mut self,
        open: Option<usize>,
        destination: SocketAddr,
        ecn: Ecn,
        offset: usize,
        length: usize,
    ) -> Option<usize> {
        let run = match open {
            Some(open) if self.runs[open].segment_size >= length && self.runs[open].ecn == ecn => {
                open
            }
            _ => {
                self.runs.push(BatchState {
                    destination,
                    ecn,
                    segment_size: length,
                    segments: 0,
                    first_part: 0,
                    part_count: 0,
                });
                self.runs.len() - 1
            }
        };
        self.runs[run].segments += 1;
        self.datagrams.push(Datagram { run, offset, length });
        (self.runs[run].segment_size == length).then_some(run)
    }

    /// Groups the datagrams by run and joins adjacent ones into parts.
    pub(super) fn finish(&mut self) {
        let mut first = 0;
        for run in &mut self.runs {
            run.first_part = first;
            run.part_count = 0;
            first += run.segments;
        }
        self.parts.clear();
        self.parts.resize(first, (0, 0));
        for datagram in &self.datagrams {
            let run = &mut self.runs[datagram.run];
            let parts = &mut self.parts[run.first_part..];
            match run.part_count.checked_sub(1).map(|last| &mut parts[last]) {
                Some((offset, length)) if *offset + *length == datagram.offset => {
                    *length += datagram.length;
                }
                _ => {
                    parts[run.part_count] = (datagram.offset, datagram.length);
                    run.part_count += 1;
                }
            }
        }
    }

    /// Returns the runs. Their parts are valid after [`GsoBatches::finish`].
    pub(super) fn iter(&self) -> impl Iterator<Item = GsoBatch<'_>> {
        self.runs.iter().map(|run| GsoBatch {
            destination: run.destination,
            ecn: run.ecn,
            segment_size: run.segment_size,
            segments: run.segments,
            parts: &self.parts[run.first_part..run.first_part + run.part_count],
        })
    }

    /// Removes all runs and keeps the memory.
    pub(super) fn clear(&mut self) {
        self.datagrams.clear();
        self.runs.clear();
    }
}
