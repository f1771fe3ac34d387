//! Look-up of one interface by name over rtnetlink (rtnetlink(7), RTM_GETLINK).
//!
//! The look-up precedes TUNSETIFF, which would create a missing device, change the flags of another
//! program's device, or attach to a device in use. The response is parsed by offsets, so that the
//! data process does not need a netlink library.

use std::io::{self, Read, Write};

use socket2::{Domain, Protocol, Socket, Type};

/// Properties of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Kind of the driver (IFLA_INFO_KIND), for example `tun` or `veth`; `None` for hardware and
    /// loopback.
    pub kind: Option<String>,
    /// Properties of a TUN or TAP device; `None` for other kinds.
    pub tun: Option<TunLink>,
    /// Number of packets that the device dropped on transmission since its creation (`tx_dropped`).
    /// A TUN device drops packets while the queue that a process reads is full.
    pub tx_dropped: u64,
}

/// Properties of a TUN or TAP device (IFLA_TUN_* of linux/if_link.h).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TunLink {
    /// True for a TAP device, whose packets have an Ethernet header.
    pub tap: bool,
    /// True if packets begin with four bytes of packet information (not IFF_NO_PI).
    pub packet_information: bool,
    /// True if packets begin with a virtio_net_hdr (IFF_VNET_HDR).
    pub vnet_header: bool,
    /// True if the device remains while no process has it open (IFF_PERSIST).
    pub persistent: bool,
    /// True if several queues are allowed (IFF_MULTI_QUEUE).
    pub multi_queue: bool,
    /// Number of queues that processes have attached, including disabled ones.
    pub queues: u32,
}

/// Length of struct nlmsghdr in bytes.
const NLMSG_HEADER: usize = 16;
/// Length of struct ifinfomsg in bytes.
const IFINFO: usize = 16;
/// Offset in bytes of `tx_dropped` in struct rtnl_link_stats64 (linux/if_link.h).
const TX_DROPPED: usize = 7 * 8;

/// Looks up the interface `name` in the network namespace of the calling thread. Returns `None` if
/// it does not exist.
///
/// # Errors
/// `InvalidData` if the response is too short; the kernel's error, or the error of the socket.
pub fn find(name: &str) -> io::Result<Option<Link>> {
    let mut socket = Socket::new(
        Domain::from(libc::AF_NETLINK),
        Type::RAW,
        Some(Protocol::from(libc::NETLINK_ROUTE)),
    )?;
    socket.write_all(&request(name))?;
    let mut answer = vec![0; 64 << 10];
    let len = socket.read(&mut answer)?;
    parse(&answer[..len])
}

fn request(name: &str) -> Vec<u8> {
    let attribute = 4 + name.len() + 1;
    let len = NLMSG_HEADER + IFINFO + attribute.next_multiple_of(4);
    let mut bytes = Vec::with_capacity(len);
    // struct nlmsghdr: length, type, flags, sequence number, port
    bytes.extend((len as u32).to_ne_bytes());
    bytes.extend(libc::RTM_GETLINK.to_ne_bytes());
    bytes.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    bytes.extend([0; 8]);
    // struct ifinfomsg: index 0, so that the kernel uses IFLA_IFNAME
    bytes.extend([0; IFINFO]);
    bytes.extend((attribute as u16).to_ne_bytes());
    bytes.extend(libc::IFLA_IFNAME.to_ne_bytes());
    bytes.extend(name.as_bytes());
    bytes.resize(len, 0);
    bytes
}

/// Parses a response of the kernel.
pub(crate) fn parse(answer: &[u8]) -> io::Result<Option<Link>> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "response of rtnetlink is too short");
    let kind = answer.get(4..6).map(u16_at).ok_or_else(short)?;
    let body = answer.get(NLMSG_HEADER..).ok_or_else(short)?;
    if i32::from(kind) == libc::NLMSG_ERROR {
        let code = body.get(..4).map(u32_at).ok_or_else(short)? as i32;
        return match code.wrapping_neg() {
            libc::ENODEV => Ok(None),
            code => Err(io::Error::from_raw_os_error(code)),
        };
    }
    let index = body.get(4..8).map(u32_at).ok_or_else(short)?;
    let mut link = Link { index, ..Link::default() };
    for (kind, value) in attributes(body.get(IFINFO..).ok_or_else(short)?) {
        match kind {
            libc::IFLA_LINKINFO => parse_info(value, &mut link),
            libc::IFLA_STATS64 => {
                let dropped = value.get(TX_DROPPED..).and_then(<[u8]>::first_chunk);
                link.tx_dropped = dropped.map_or(0, |bytes| u64::from_ne_bytes(*bytes));
            }
            _ => {}
        }
    }
    Ok(Some(link))
}

fn parse_info(info: &[u8], link: &mut Link) {
    for (kind, value) in attributes(info) {
        match kind {
            libc::IFLA_INFO_KIND => {
                let text = value.split(|&byte| byte == 0).next().unwrap_or_default();
                link.kind = Some(String::from_utf8_lossy(text).into_owned());
            }
            // The kernel writes the kind before the data.
            libc::IFLA_INFO_DATA if link.kind.as_deref() == Some("tun") => {
                link.tun = Some(parse_tun(value));
            }
            _ => {}
        }
    }
}

fn parse_tun(data: &[u8]) -> TunLink {
    let mut tun = TunLink::default();
    for (kind, value) in attributes(data) {
        let flag = value.first().is_some_and(|&byte| byte != 0);
        let count = value.get(..4).map_or(0, u32_at);
        // IFLA_TUN_* of linux/if_link.h, which libc does not define: TYPE 3, PI 4, VNET_HDR 5,
        // PERSIST 6, MULTI_QUEUE 7, NUM_QUEUES 8, NUM_DISABLED_QUEUES 9.
        match kind {
            3 => tun.tap = value.first().is_some_and(|&kind| i32::from(kind) == libc::IFF_TAP),
            4 => tun.packet_information = flag,
            5 => tun.vnet_header = flag,
            6 => tun.persistent = flag,
            7 => tun.multi_queue = flag,
            8 | 9 => tun.queues = tun.queues.saturating_add(count),
            _ => {}
        }
    }
    tun
}

/// Returns the kind and the value of each netlink attribute in `bytes`, up to the first malformed
/// one.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes.get(..2)?));
        let kind = u16_at(bytes.get(2..4)?) & libc::NLA_TYPE_MASK as u16;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8]) -> u16 {
    bytes.first_chunk().map_or(0, |bytes| u16::from_ne_bytes(*bytes))
}

fn u32_at(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn find_returns_loopback_and_no_missing_interface() {
        let loopback = find("lo").unwrap().unwrap();
        assert!(loopback.index > 0);
        assert_eq!(loopback.tun, None);
        assert_eq!(find("no-such-link").unwrap(), None);
    }

    proptest! {
        #[test]
        fn arbitrary_response_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
