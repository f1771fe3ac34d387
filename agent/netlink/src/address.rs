//! Addresses of links.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope,
};

use super::connection::{Netlink, NetlinkError};

/// Address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Index of the link.
    pub index: u32,
    /// The address with its prefix length.
    pub net: IpNet,
    /// True for a link-local address (fe80::/10).
    pub link_local: bool,
    message: AddressMessage,
}

impl Address {
    fn parse(message: AddressMessage) -> Option<Self> {
        let find = |local: bool| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        // On a point-to-point link IFA_ADDRESS is the far end; IFA_LOCAL is the own address.
        let ip: IpAddr = find(true).or_else(|| find(false))?;
        Some(Self {
            index: message.header.index,
            net: IpNet::new(ip, message.header.prefix_len).ok()?,
            link_local: message.header.scope == AddressScope::Link,
            message,
        })
    }
}

impl Netlink {
    /// Returns the addresses of the link with `index`, or of all links.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the dump.
    pub async fn addresses(&self, index: Option<u32>) -> Result<Vec<Address>, NetlinkError> {
        let _dump = self.dump.lock().await;
        let mut request = self.handle.address().get();
        request.message_mut().header.index = index.unwrap_or(0);
        let messages = request.execute().try_collect::<Vec<_>>().await;
        let messages = messages.map_err(|error| NetlinkError::new("list addresses", error))?;
        let addresses = messages.into_iter().filter_map(Address::parse);
        Ok(addresses.filter(|address| index.is_none_or(|index| index == address.index)).collect())
    }

    /// Adds an address. An address that already exists is not an error.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the address.
    pub async fn add_address(&self, index: u32, net: IpNet) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(index, net.addr(), net.prefix_len());
        if net.addr().is_ipv6() {
            // The link has no other host, so duplicate address detection is useless, and routes
            // need the address as their source at once.
            let flags = AddressAttribute::Flags(AddressFlags::Nodad);
            request.message_mut().attributes.push(flags);
        }
        let result = request.execute().await;
        let result = result.map_err(|error| {
            NetlinkError::new(format_args!("add address {net} to interface {index}"), error)
        });
        match result {
            Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    /// Removes an address. A missing address is not an error.
    ///
    /// # Errors
    /// [`NetlinkError`] if the kernel refuses the request.
    pub(crate) async fn delete_address(&self, address: &Address) -> Result<(), NetlinkError> {
        let result = self.handle.address().del(address.message.clone()).execute().await;
        let result = result.map_err(|error| {
            NetlinkError::new(format_args!("remove address {}", address.net), error)
        });
        match result {
            Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            result => result,
        }
    }
}
