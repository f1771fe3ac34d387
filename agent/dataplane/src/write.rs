//! Writes to the TUN queue, with a fallback for kernels that refuse a valid superpacket.

use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use skein_core::offload::MAX_SUPERPACKET_SEGMENTS;
use skein_core::offload::coalesce::{CoalesceConfig, TunPacket};
use skein_core::offload::segment::segment;
use skein_core::offload::vnet::{self, VnetHeader};
use skein_core::wire::ip::UDP;
use skein_sys::tun::TunQueue;

/// Writer of packets to a TUN queue.
#[derive(Default)]
pub(super) struct TunWriter {
    scratch: Vec<u8>,
    /// Superpacket kinds that the kernel refused. Kernels such as 6.6.44 and 6.10.3 refuse
    /// superpackets whose last segment is short.
    refused: Refused,
    refused_at: Option<Instant>,
}

/// Time for which a refused kind of superpacket is not built.
const MERGE_RETRY_DELAY: Duration = Duration::from_secs(60);

/// Superpacket kinds that the kernel refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) tcp: bool,
    pub(super) udp: bool,
}

impl Refused {
    /// Returns `config` without the refused kinds.
    pub(super) fn limit(self, config: CoalesceConfig) -> CoalesceConfig {
        CoalesceConfig { tcp: config.tcp && !self.tcp, udp: config.udp && !self.udp, ..config }
    }
}

impl TunWriter {
    /// Writes one packet, whose payload is in `arena`. A superpacket that the kernel refuses as
    /// invalid is written segment by segment, so that no part of it is lost.
    ///
    /// # Errors
    /// The error of writev(2).
    pub(super) fn write(
        &mut self,
        tun: &TunQueue,
        arena: &[u8],
        packet: &TunPacket<'_>,
        now: Instant,
    ) -> io::Result<()> {
        match writev_packet(tun, arena, packet) {
            Err(error) if packet.segments > 1 && error.raw_os_error() == Some(libc::EINVAL) => {
                self.refused_at = Some(now);
                self.write_singly(tun, arena, packet)
            }
            other => other,
        }
    }

    /// Returns the superpacket kinds that must not be built now.
    pub(super) fn refused(&self) -> Refused {
        self.refused
    }

    /// Clears the refusals after [`MERGE_RETRY_DELAY`], so that merging is tried again.
    pub(super) fn expire_refusals(&mut self, now: Instant) {
        if self.refused_at.is_some_and(|at| now - at > MERGE_RETRY_DELAY) {
            self.clear_refusals();
        }
    }

    /// Clears all refusals.
    pub(super) fn clear_refusals(&mut self) {
        self.refused = Refused::default();
        self.refused_at = None;
    }

    fn write_singly(
        &mut self,
        tun: &TunQueue,
        arena: &[u8],
        packet: &TunPacket<'_>,
    ) -> io::Result<()> {
        self.scratch.clear();
        self.scratch.extend_from_slice(packet.header);
        for slice in packet.payload {
            self.scratch.extend_from_slice(&arena[slice.offset..slice.offset + slice.len]);
        }
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let header = VnetHeader::parse(&packet.vnet).ok_or_else(invalid)?;
        let mut segments = segment(header, &mut self.scratch).map_err(|_| invalid())?;
        match segments.ip().protocol {
            UDP => self.refused.udp = true,
            _ => self.refused.tcp = true,
        }
        let single = VnetHeader {
            flags: vnet::NEEDS_CSUM,
            csum_start: header.csum_start,
            csum_offset: header.csum_offset,
            ..VnetHeader::default()
        };
        let single = single.to_bytes();
        while let Some(segment) = segments.next_segment() {
            tun.writev(&[IoSlice::new(&single), IoSlice::new(segment)])?;
        }
        Ok(())
    }
}

/// Writes the headers and the payload slices of the packet with one writev(2).
fn writev_packet(tun: &TunQueue, arena: &[u8], packet: &TunPacket<'_>) -> io::Result<()> {
    // Each call initializes an array on the stack. The three lengths, for one packet, a typical
    // superpacket and any superpacket, keep this array short.
    match packet.payload.len() + 2 {
        0..=4 => writev_up_to::<4>(tun, arena, packet),
        5..=72 => writev_up_to::<72>(tun, arena, packet),
        _ => writev_up_to::<{ MAX_SUPERPACKET_SEGMENTS + 2 }>(tun, arena, packet),
    }
}

fn writev_up_to<const N: usize>(
    tun: &TunQueue,
    arena: &[u8],
    packet: &TunPacket<'_>,
) -> io::Result<()> {
    let mut parts = [IoSlice::new(&[]); N];
    let count = packet.payload.len() + 2;
    let parts = parts.get_mut(..count).ok_or(io::ErrorKind::InvalidInput)?;
    fill(parts, arena, packet);
    tun.writev(parts)?;
    Ok(())
}

fn fill<'a>(parts: &mut [IoSlice<'a>], arena: &'a [u8], packet: &'a TunPacket<'_>) {
    parts[0] = IoSlice::new(&packet.vnet);
    parts[1] = IoSlice::new(packet.header);
    for (part, slice) in parts[2..].iter_mut().zip(packet.payload) {
        *part = IoSlice::new(&arena[slice.offset..slice.offset + slice.len]);
    }
}
