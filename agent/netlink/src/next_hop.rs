//! Devices of a route's next hops: a single next hop, a multipath route (RTA_MULTIPATH), or nexthop
//! objects (RTA_NH_ID).

use std::collections::BTreeMap;
use std::io;

use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, bind, recv, send, socket};
use skein_sys::link;

use super::connection::{Netlink, NetlinkError};

/// linux/rtnetlink.h: answer to a request for nexthop objects.
const RTM_NEWNEXTHOP: u16 = 104;
/// linux/rtnetlink.h: request for nexthop objects.
const RTM_GETNEXTHOP: u16 = 106;
/// linux/netlink.h: end of a dump.
const NLMSG_DONE: u16 = 3;
/// linux/netlink.h: NLM_F_REQUEST and NLM_F_DUMP.
const REQUEST_DUMP: u16 = 0x301;
/// linux/nexthop.h: id of an object.
const NHA_ID: u16 = 1;
/// linux/nexthop.h: objects of a group, 8 bytes each.
const NHA_GROUP: u16 = 2;
/// linux/nexthop.h: index of the device.
const NHA_OIF: u16 = 5;
/// Bytes of a `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// Bytes of a `struct nhmsg`.
const NHMSG_LEN: usize = 8;

impl Netlink {
    /// Returns the indices of the devices by which packets of a route leave. Empty if the route
    /// names none.
    ///
    /// # Errors
    /// [`NetlinkError`] if the route names only a nexthop object and the kernel does not list these
    /// objects.
    pub(super) fn devices(&self, route: &RouteMessage) -> Result<Vec<u32>, NetlinkError> {
        let devices = named_devices(route);
        let object = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::NhId(id) => Some(*id),
            _ => None,
        });
        // With net.ipv4.nexthop_compat_mode = 0 the kernel reports only the object.
        match object.filter(|_| devices.is_empty()) {
            None => Ok(devices),
            Some(id) => Objects::list().map(|objects| objects.devices(id)).map_err(|source| {
                NetlinkError { what: format!("look up nexthop object {id}"), source }
            }),
        }
    }
}

/// Returns the indices of the devices that the route itself names.
pub(super) fn named_devices(route: &RouteMessage) -> Vec<u32> {
    let mut devices = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => devices.push(*index),
            RouteAttribute::MultiPath(hops) => {
                devices.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    devices
}

/// The nexthop objects of the network namespace of this thread.
#[derive(Debug, Default)]
struct Objects {
    /// Device of each object that has one.
    devices: BTreeMap<u32, u32>,
    /// Members of each group.
    groups: BTreeMap<u32, Vec<u32>>,
}

impl Objects {
    fn list() -> io::Result<Self> {
        // NETLINK_ROUTE is 0, the default protocol.
        let socket = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        let mut request = Vec::with_capacity(HEADER_LEN + NHMSG_LEN);
        request.extend(((HEADER_LEN + NHMSG_LEN) as u32).to_ne_bytes());
        request.extend(RTM_GETNEXTHOP.to_ne_bytes());
        request.extend(REQUEST_DUMP.to_ne_bytes());
        request.resize(HEADER_LEN + NHMSG_LEN, 0);
        send(&socket, &request, SendFlags::empty())?;
        let mut objects = Self::default();
        let mut buffer = vec![0; 64 << 10];
        loop {
            // The kernel has answered by the time that the request was sent.
            let (_, length) = recv(&socket, &mut buffer[..], RecvFlags::DONTWAIT)?;
            if objects.read(&buffer[..length])? {
                return Ok(objects);
            }
        }
    }

    /// Reads messages of a dump; returns true at its end.
    fn read(&mut self, mut bytes: &[u8]) -> io::Result<bool> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        while bytes.len() >= HEADER_LEN {
            let length = u32_at(bytes, 0).ok_or_else(invalid)? as usize;
            let kind = u16_at(bytes, 4).ok_or_else(invalid)?;
            let message = bytes.get(..length).ok_or_else(invalid)?;
            match kind {
                NLMSG_DONE => return Ok(true),
                RTM_NEWNEXTHOP => {
                    self.add(message.get(HEADER_LEN + NHMSG_LEN..).ok_or_else(invalid)?);
                }
                _ => return Err(invalid()),
            }
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(false)
    }

    fn add(&mut self, attributes: &[u8]) {
        let values: BTreeMap<_, _> = link::attributes(attributes).collect();
        let number = |kind| values.get(&kind).and_then(|value| u32_at(value, 0));
        let Some(id) = number(NHA_ID) else { return };
        self.devices.extend(number(NHA_OIF).map(|device| (id, device)));
        let members = values
            .get(&NHA_GROUP)
            .map(|group| group.chunks_exact(8).filter_map(|member| u32_at(member, 0)).collect());
        self.groups.extend(members.map(|members| (id, members)));
    }

    /// Returns the devices of an object, or of the members of a group. Members of a group are never
    /// groups.
    fn devices(&self, id: u32) -> Vec<u32> {
        let members = self.groups.get(&id).into_iter().flatten();
        members.chain([&id]).filter_map(|id| self.devices.get(id)).copied().collect()
    }
}

/// Fuzzing entry point: reads `data` as a dump of nexthop objects.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_next_hops(data: &[u8]) {
    let mut objects = Objects::default();
    let _ = objects.read(data);
    let ids: Vec<_> = objects.devices.keys().chain(objects.groups.keys()).copied().collect();
    for id in ids {
        let members = objects.groups.get(&id).map_or(0, Vec::len);
        assert!(objects.devices(id).len() <= members + 1);
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
