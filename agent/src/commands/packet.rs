//! Description of a captured packet in one line.

use std::fmt::Write;

use skein_core::wire::header::{Header, MessageType};
use skein_core::wire::ip::{IpHeader, TCP, UDP};
use skein_ipc::capture::CapturedPacket;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Describes addresses, ports, type and length of a captured packet. Empty if nothing is known.
pub(crate) fn describe(seen: &CapturedPacket) -> String {
    let mut text = match (seen.inner, seen.bytes.is_empty()) {
        (_, true) => String::new(),
        (true, false) => inner(&seen.bytes),
        (false, false) => outer(&seen.bytes),
    };
    if seen.length > 0 {
        let _ = write!(text, ", {} bytes", seen.length);
    }
    if seen.packets > 1 {
        let _ = write!(text, ", {} packets", seen.packets);
    }
    text.trim_start_matches(", ").to_owned()
}

fn inner(bytes: &[u8]) -> String {
    let Some(ip) = parse_truncated(bytes) else { return "not an IP packet".to_owned() };
    let (source, destination) = (ip.source, ip.destination);
    let plain = |what: String| format!("{source} > {destination} {what}");
    // Later fragments and truncated packets have no transport header.
    let Some((protocol, at)) = ip.transport(bytes) else {
        return plain("fragment".to_owned());
    };
    let byte = |n: usize| bytes.get(at + n).copied();
    let port = |n: usize| Some(u16::from_be_bytes([byte(n)?, byte(n + 1)?]));
    match (protocol, port(0), port(2)) {
        (TCP | UDP, Some(from), Some(to)) => {
            let name = if protocol == TCP { "TCP" } else { "UDP" };
            let from = std::net::SocketAddr::new(source, from);
            let to = std::net::SocketAddr::new(destination, to);
            let flags = byte(13).filter(|_| protocol == TCP).map(tcp_flags).unwrap_or_default();
            format!("{from} > {to} {name}{flags}")
        }
        (ICMP | ICMPV6, _, _) => {
            let version = if protocol == ICMP { "ICMP" } else { "ICMPv6" };
            let kind = match (protocol, byte(0)) {
                (ICMP, Some(8)) | (ICMPV6, Some(128)) => "echo request".to_owned(),
                (ICMP, Some(0)) | (ICMPV6, Some(129)) => "echo reply".to_owned(),
                (ICMP, Some(3)) | (ICMPV6, Some(1)) => "unreachable".to_owned(),
                (ICMPV6, Some(2)) => "packet too big".to_owned(),
                (_, Some(kind)) => format!("type {kind}"),
                (_, None) => String::new(),
            };
            plain(format!("{version} {kind}"))
        }
        _ => plain(format!("protocol {protocol}")),
    }
}

/// Parses the IP header of a truncated packet. The length field is adapted to the bytes present.
fn parse_truncated(bytes: &[u8]) -> Option<IpHeader> {
    let mut head = bytes.to_vec();
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    match head.first()? >> 4 {
        4 => head.get_mut(2..4)?.copy_from_slice(&length.to_be_bytes()),
        6 => head.get_mut(4..6)?.copy_from_slice(&length.saturating_sub(40).to_be_bytes()),
        _ => {}
    }
    IpHeader::parse(&head)
}

fn tcp_flags(flags: u8) -> String {
    let names = [(2, "SYN"), (16, "ACK"), (1, "FIN"), (4, "RST"), (8, "PSH")];
    let set: Vec<_> =
        names.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect();
    format!(" {}", set.join("+"))
}

fn outer(bytes: &[u8]) -> String {
    match Header::parse(bytes) {
        Err(_) => "no Skein header".to_owned(),
        Ok(header) => match header.kind {
            MessageType::Data => format!(
                "data, lane {}, receiver {:#010x}, counter {}",
                header.lane, header.receiver, header.counter
            ),
            kind => format!("{kind:?}").to_lowercase(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_core::drop::Direction;
    use skein_ipc::capture::PacketKind;

    fn seen(inner: bool, bytes: &[u8]) -> CapturedPacket {
        CapturedPacket {
            time_ns: 0,
            lane: Some(0),
            kind: PacketKind::Forwarded(Direction::Egress.into()),
            outer: None,
            inner,
            packets: 1,
            length: 1400,
            bytes: bytes.to_vec(),
        }
    }

    fn v4(protocol: u8, transport: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        // The length field exceeds the captured bytes.
        packet[2..4].copy_from_slice(&1400_u16.to_be_bytes());
        packet[9] = protocol;
        packet[12..20].copy_from_slice(&[10, 1, 0, 2, 10, 2, 0, 3]);
        packet.extend(transport);
        packet
    }

    #[test]
    fn inner_packet_is_described_by_addresses_and_ports() {
        let tcp = [0, 80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12, 0, 0, 0, 0, 0, 0];
        let text = describe(&seen(true, &v4(6, &tcp)));
        assert_eq!(text, "10.1.0.2:80 > 10.2.0.3:256 TCP SYN+ACK, 1400 bytes");
        let text = describe(&seen(true, &v4(1, &[8, 0, 0, 0, 0, 0, 0, 0])));
        assert_eq!(text, "10.1.0.2 > 10.2.0.3 ICMP echo request, 1400 bytes");
        let text = describe(&seen(true, &v4(47, &[])));
        assert_eq!(text, "10.1.0.2 > 10.2.0.3 protocol 47, 1400 bytes");
    }

    #[test]
    fn truncated_or_invalid_packet_is_described() {
        for bytes in [v4(6, &[]), v4(17, &[0, 80]), v4(1, &[]), vec![0x45], vec![0x60; 10], vec![9]]
        {
            assert!(!describe(&seen(true, &bytes)).is_empty());
            assert!(!describe(&seen(false, &bytes)).is_empty());
        }
        assert_eq!(describe(&CapturedPacket { length: 0, ..seen(false, &[]) }), "");
    }
}
