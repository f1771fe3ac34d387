//! Route lookups in the kernel (RTM_GETROUTE).

use std::net::IpAddr;

use futures_util::TryStreamExt;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType,
};

use super::connection::{Netlink, NetlinkError};
use super::route::{PROTOCOL, address, mtu};

/// Result of a route lookup for one destination.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteLookup {
    /// True if the destination is an address of this machine.
    pub local: bool,
    /// Type of the route that refuses the packet (`unreachable`, `blackhole`, `prohibit`); `None`
    /// if the packet is sent.
    pub refused: Option<String>,
    /// Index of the outgoing interface.
    pub interface: Option<u32>,
    /// Next hop; `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Source address that the kernel selects for local programs.
    pub source: Option<IpAddr>,
    /// MTU of the route in bytes; `None` if the route has none of its own.
    pub mtu: Option<u32>,
    /// True if the route is Skein's.
    pub skein: bool,
}

impl RouteLookup {
    fn parse(message: &RouteMessage) -> Self {
        let header = &message.header;
        let mut lookup = Self {
            local: header.kind == RouteType::Local,
            skein: header.protocol == RouteProtocol::Other(PROTOCOL),
            mtu: mtu(message),
            refused: match header.kind {
                RouteType::Unreachable => Some("unreachable".to_owned()),
                RouteType::BlackHole => Some("blackhole".to_owned()),
                RouteType::Prohibit => Some("prohibit".to_owned()),
                RouteType::Throw => Some("throw".to_owned()),
                _ => None,
            },
            ..Self::default()
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(index) => lookup.interface = Some(*index),
                RouteAttribute::Gateway(gateway) => lookup.gateway = address(gateway),
                RouteAttribute::PrefSource(source) => lookup.source = address(source),
                _ => {}
            }
        }
        lookup
    }
}

impl Netlink {
    /// Returns the kernel's route for a packet to `to`: a packet of this machine, or a packet of
    /// the given source that arrives by the given interface.
    ///
    /// # Errors
    /// [`NetlinkError`] if the request cannot be sent, or if its answer cannot be read.
    pub async fn look_up(
        &self,
        to: IpAddr,
        incoming: Option<(IpAddr, u32)>,
    ) -> Result<RouteLookup, NetlinkError> {
        let mut message = request(to, incoming.map(|(from, _)| from))?;
        message.attributes.extend(incoming.map(|(_, interface)| RouteAttribute::Iif(interface)));
        let answer = self.answer(to, message).await?;
        Ok(RouteLookup::parse(&answer))
    }

    /// Returns the route of the routing tables (policy rules included) for packets of this machine
    /// to `to`, with all its next hops and without exceptions learnt from ICMP. `from` is the
    /// source of the packets. `None` if no route exists.
    ///
    /// # Errors
    /// [`NetlinkError`] if the request cannot be sent, or if its answer cannot be read.
    pub(super) async fn table_route(
        &self,
        to: IpAddr,
        from: Option<IpAddr>,
    ) -> Result<Option<RouteMessage>, NetlinkError> {
        let mut message = request(to, from)?;
        message.header.flags = RouteFlags::FibMatch;
        match self.answer(to, message).await {
            Ok(answer) => Ok(Some(answer)),
            // Each type of route without a next hop (unreachable, blackhole, prohibit) has its own
            // error.
            Err(error) if error.errno().is_some() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn answer(
        &self,
        to: IpAddr,
        message: RouteMessage,
    ) -> Result<RouteMessage, NetlinkError> {
        let answers = self.handle.route().get(message).execute().try_collect::<Vec<_>>().await;
        let answers = answers
            .map_err(|error| NetlinkError::new(format_args!("look up the route to {to}"), error))?;
        answers.into_iter().next().ok_or_else(|| wrong(to, "no answer".to_owned()))
    }
}

/// Returns a request for the route to `to`; `from` is the source of the packets.
///
/// # Errors
/// [`NetlinkError`] if the request cannot be encoded.
fn request(to: IpAddr, from: Option<IpAddr>) -> Result<RouteMessage, NetlinkError> {
    let bits = if to.is_ipv4() { 32 } else { 128 };
    let builder = RouteMessageBuilder::<IpAddr>::new().destination_prefix(to, bits);
    let mut message = builder.map_err(|error| wrong(to, error.to_string()))?.build();
    // These fields belong to the answer; strict checking refuses them in a request.
    message.header.table = 0;
    message.header.protocol = RouteProtocol::Unspec;
    message.header.scope = 0.into();
    message.header.kind = RouteType::Unspec;
    if let Some(from) = from {
        message.header.source_prefix_length = bits;
        message.attributes.push(RouteAttribute::Source(match from {
            IpAddr::V4(ip) => RouteAddress::Inet(ip),
            IpAddr::V6(ip) => RouteAddress::Inet6(ip),
        }));
    }
    Ok(message)
}

fn wrong(to: IpAddr, error: String) -> NetlinkError {
    NetlinkError {
        what: format!("look up the route to {to}"),
        source: std::io::Error::other(error),
    }
}
