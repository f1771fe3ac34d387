//! GSO batches of sealed datagrams: consecutive datagrams to one destination that one UDP_SEGMENT
//! message can carry.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::wire::ecn::Ecn;

/// Datagrams of one size to one destination; only the last may be shorter. The kernel sends them
/// with one UDP_SEGMENT message, or with several if its limits are lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GsoBatch<'a> {
    /// Outer destination.
    pub destination: SocketAddr,
    /// ECN field of the outer header, one for all datagrams.
    pub ecn: Ecn,
    /// UDP payload length in bytes of every datagram except the last, which has at least 1 byte and
    /// at most this length.
    pub segment_size: usize,
    /// Number of datagrams.
    pub segments: usize,
    /// Parts of the arena that hold the bytes, as (offset, length) in bytes, in the order of
    /// sending. A datagram may begin and end anywhere in a part.
    pub parts: &'a [(usize, usize)],
}

impl GsoBatch<'_> {
    /// Batch without datagrams.
    pub const EMPTY: Self = Self {
        destination: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        ecn: Ecn::NotEct,
        segment_size: 0,
        segments: 0,
        parts: &[],
    };

    /// Returns the sum of the lengths of all datagrams in bytes.
    pub fn byte_len(&self) -> usize {
        self.parts.iter().fold(0, |len: usize, part| len.saturating_add(part.1))
    }
}

/// A sealed datagram: the index of its GSO batch, and its bytes in the arena.
struct Datagram {
    batch: usize,
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

/// The GSO batches of an egress batch, in the order in which their first datagrams were sealed.
pub(super) struct GsoBatches {
    /// Datagrams in the order of sealing.
    datagrams: Vec<Datagram>,
    batches: Vec<BatchState>,
    /// Parts of the arena as (offset, length), grouped by GSO batch.
    parts: Vec<(usize, usize)>,
}

impl GsoBatches {
    pub(super) fn new() -> Self {
        Self {
            datagrams: Vec::with_capacity(1024),
            batches: Vec::with_capacity(256),
            parts: Vec::with_capacity(1024),
        }
    }

    /// Appends a datagram of `length` bytes at `offset` of the arena to the batch `open`, or to a
    /// new batch if there is none or if it cannot carry the datagram. Returns the batch that may
    /// grow further: `None` after a datagram shorter than its batch's segments, because only the
    /// last datagram of a batch may be shorter.
    pub(super) fn push(
        &mut self,
        open: Option<usize>,
        destination: SocketAddr,
        ecn: Ecn,
        offset: usize,
        length: usize,
    ) -> Option<usize> {
        let batch = match open {
            Some(open)
                if self.batches[open].segment_size >= length && self.batches[open].ecn == ecn =>
            {
                open
            }
            _ => {
                self.batches.push(BatchState {
                    destination,
                    ecn,
                    segment_size: length,
                    segments: 0,
                    first_part: 0,
                    part_count: 0,
                });
                self.batches.len() - 1
            }
        };
        self.batches[batch].segments += 1;
        self.datagrams.push(Datagram { batch, offset, length });
        (self.batches[batch].segment_size == length).then_some(batch)
    }

    /// Groups the datagrams by batch and joins adjacent ones into parts.
    pub(super) fn finish(&mut self) {
        let mut first = 0;
        for batch in &mut self.batches {
            batch.first_part = first;
            batch.part_count = 0;
            first += batch.segments;
        }
        self.parts.clear();
        self.parts.resize(first, (0, 0));
        for datagram in &self.datagrams {
            let batch = &mut self.batches[datagram.batch];
            let parts = &mut self.parts[batch.first_part..];
            match batch.part_count.checked_sub(1).map(|last| &mut parts[last]) {
                Some((offset, length)) if *offset + *length == datagram.offset => {
                    *length += datagram.length;
                }
                _ => {
                    parts[batch.part_count] = (datagram.offset, datagram.length);
                    batch.part_count += 1;
                }
            }
        }
    }

    /// Returns the batches. Their parts are valid after [`GsoBatches::finish`].
    pub(super) fn iter(&self) -> impl Iterator<Item = GsoBatch<'_>> {
        self.batches.iter().map(|batch| GsoBatch {
            destination: batch.destination,
            ecn: batch.ecn,
            segment_size: batch.segment_size,
            segments: batch.segments,
            parts: &self.parts[batch.first_part..batch.first_part + batch.part_count],
        })
    }

    /// Removes all batches and keeps the memory.
    pub(super) fn clear(&mut self) {
        self.datagrams.clear();
        self.batches.clear();
    }
}
