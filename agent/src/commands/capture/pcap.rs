//! Writer of the pcap file format, version 2.4 with nanoseconds (draft-ietf-opsawg-pcap).

use std::io::{self, BufWriter, Write};

use skein_ipc::capture::CapturedPacket;

/// Magic number of a file whose timestamps have nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
/// Link type of packets that start with the IP header.
const LINKTYPE_RAW: u32 = 101;
const FILE_HEADER_BYTES: u64 = 24;
const PACKET_HEADER_BYTES: u64 = 16;

pub(super) struct Pcap<W: Write> {
    to: BufWriter<W>,
    length: u64,
}

impl<W: Write> Pcap<W> {
    /// Writes the file header.
    pub(super) fn begin(to: W, snaplen: u32) -> io::Result<Self> {
        let mut to = BufWriter::new(to);
        to.write_all(&MAGIC.to_le_bytes())?;
        to.write_all(&2_u16.to_le_bytes())?;
        to.write_all(&4_u16.to_le_bytes())?;
        for field in [0, 0, snaplen, LINKTYPE_RAW] {
            to.write_all(&u32::to_le_bytes(field))?;
        }
        to.flush()?;
        Ok(Self { to, length: FILE_HEADER_BYTES })
    }

    /// Number of bytes written, headers included.
    pub(super) fn len(&self) -> u64 {
        self.length
    }

    /// Returns the number of bytes after the next packet.
    pub(super) fn length_with(&self, seen: &CapturedPacket) -> u64 {
        self.length + PACKET_HEADER_BYTES + seen.bytes.len() as u64
    }

    /// Writes a packet with its header.
    pub(super) fn write(&mut self, seen: &CapturedPacket) -> io::Result<()> {
        let seconds = u32::try_from(seen.time_ns / 1_000_000_000).unwrap_or(u32::MAX);
        let nanos = (seen.time_ns % 1_000_000_000) as u32;
        // The data process copies at most 65,535 bytes of a packet.
        let captured = seen.bytes.len() as u32;
        for field in [seconds, nanos, captured, seen.length] {
            self.to.write_all(&field.to_le_bytes())?;
        }
        self.to.write_all(&seen.bytes)?;
        self.length = self.length_with(seen);
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_core::drop::Direction;
    use skein_ipc::capture::PacketKind;

    #[test]
    fn file_has_headers_of_pcap_2_4() {
        let seen = CapturedPacket {
            time_ns: 3_000_000_007,
            lane: Some(0),
            kind: PacketKind::Forwarded(Direction::Egress.into()),
            outer: None,
            inner: true,
            packets: 1,
            length: 1400,
            bytes: vec![0x45, 1, 2],
        };
        let mut bytes = Vec::new();
        let mut pcap = Pcap::begin(&mut bytes, 96).unwrap();
        pcap.write(&seen).unwrap();
        pcap.flush().unwrap();
        assert_eq!(pcap.len(), 24 + 16 + 3);
        drop(pcap);
        assert_eq!(bytes.len(), 43);
        assert_eq!(bytes[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
        assert_eq!(bytes[16..24], [96, 0, 0, 0, 101, 0, 0, 0]);
        assert_eq!(bytes[24..36], [3, 0, 0, 0, 7, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[36..40], 1400_u32.to_le_bytes());
    }
}
