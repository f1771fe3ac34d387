//! Links: listing, changing and deleting.

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::connection::{Netlink, NetlinkError};

/// Link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Driver kind (`tun`, `veth` …); `None` for hardware.
    pub kind: Option<String>,
    /// Alias; empty without one.
    pub alias: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// MTU of IPv6 packets in bytes (`net.ipv6.conf.<name>.mtu`), which router advertisements
    /// lower; `None` if the link has no IPv6.
    pub ipv6_mtu: Option<u32>,
    /// Length of the transmit queue in packets.
    pub txqueuelen: u32,
    /// Hardware address; empty without one.
    pub mac: Vec<u8>,
    /// True if the link is administratively up.
    pub up: bool,
    /// True if the link accepts multicast.
    pub multicast: bool,
    /// True for a loopback device.
    pub loopback: bool,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Link {
            index: message.header.index,
            up: flags.contains(LinkFlags::Up),
            multicast: flags.contains(LinkFlags::Multicast),
            loopback: flags.contains(LinkFlags::Loopback),
            ..Link::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::AfSpecUnspec(families) => link.ipv6_mtu = ipv6_mtu(&families),
                LinkAttribute::TxQueueLen(length) => link.txqueuelen = length,
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(InfoKind::Tun) => Some("tun".to_owned()),
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link
    }
}

/// Returns the IPv6 MTU from the settings of a link's address families.
fn ipv6_mtu(families: &[AfSpecUnspec]) -> Option<u32> {
    let settings = families.iter().filter_map(|family| match family {
        AfSpecUnspec::Inet6(settings) => Some(settings),
        _ => None,
    });
    settings.flatten().find_map(|setting| match setting {
        AfSpecInet6::DevConf(config) => u32::try_from(config.mtu6).ok(),
        _ => None,
    })
}

impl Link {
    /// Returns whether the link is a TUN device with this alias.
    pub fn is_tun_of(&self, alias: &str) -> bool {
        self.kind.as_deref() == Some("tun") && self.alias == alias
    }
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = self.kind.as_deref().unwrap_or("hardware");
        match self.alias.as_str() {
            "" => write!(f, "{kind}, no alias"),
            alias => write!(f, "{kind}, alias {alias:?}"),
        }
    }
}

/// Changes of a link; `None` or false keeps a property.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkChange {
    /// New name; the link must be down.
    pub name: Option<String>,
    /// New alias.
    pub alias: Option<String>,
    /// New MTU in bytes.
    pub mtu: Option<u32>,
    /// New length of the transmit queue in packets.
    pub txqueuelen: Option<u32>,
    /// New hardware address.
    pub mac: Option<[u8; 6]>,
    /// True to disable multicast.
    pub no_multicast: bool,
    /// True to set the link up.
    pub up: bool,
    /// True to set the link down.
    pub down: bool,
}

impl Netlink {
    /// Returns the link with this name; `None` if there is none.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the request for another reason.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let request = self.handle.link().get().match_name(name).execute();
        match request.try_collect::<Vec<_>>().await {
            Ok(messages) => Ok(messages.into_iter().next().map(Link::from)),
            Err(error) => {
                let error = NetlinkError::new(format_args!("look up interface {name}"), error);
                if error.errno() == Some(libc::ENODEV) { Ok(None) } else { Err(error) }
            }
        }
    }

    /// Returns all links.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the dump.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let _dump = self.dump.lock().await;
        let request = self.handle.link().get().execute();
        let links = request.map_ok(Link::from).try_collect().await;
        links.map_err(|error| NetlinkError::new("list interfaces", error))
    }

    /// Changes a link.
    ///
    /// # Errors
    /// [`NetlinkError`] if the link does not exist or the kernel refuses the change.
    pub async fn change_link(&self, index: u32, change: &LinkChange) -> Result<(), NetlinkError> {
        let mut message = LinkMessageBuilder::<LinkUnspec>::default().index(index);
        if let Some(name) = &change.name {
            message = message.name(name.clone());
        }
        if let Some(alias) = &change.alias {
            message = message.alias(alias);
        }
        if let Some(mtu) = change.mtu {
            message = message.mtu(mtu);
        }
        if let Some(length) = change.txqueuelen {
            message = message.txqueuelen(length);
        }
        if let Some(mac) = change.mac {
            message = message.address(mac.to_vec());
        }
        if change.no_multicast {
            message = message.multicast(false);
        }
        if change.up {
            message = message.up();
        }
        if change.down {
            message = message.down();
        }
        let result = self.handle.link().set(message.build()).execute().await;
        result.map_err(|error| {
            NetlinkError::new(format_args!("change interface {index} ({change:?})"), error)
        })
    }

    /// Deletes a link. A missing link is not an error.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses for another reason.
    pub async fn delete_link(&self, index: u32) -> Result<(), NetlinkError> {
        let result = self.handle.link().del(index).execute().await;
        let result = result
            .map_err(|error| NetlinkError::new(format_args!("delete interface {index}"), error));
        match result {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            result => result,
        }
    }
}

impl std::fmt::Display for LinkChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.mtu.map(|mtu| format!("mtu {mtu}")));
        parts.extend(self.txqueuelen.map(|length| format!("txqueuelen {length}")));
        parts.extend(self.mac.map(|mac| format!("mac {mac:02x?}")));
        parts.extend(self.no_multicast.then(|| "no multicast".to_owned()));
        parts.extend(self.up.then(|| "up".to_owned()));
        parts.extend(self.down.then(|| "down".to_owned()));
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests;
