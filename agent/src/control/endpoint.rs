//! Endpoints of node records as text: an address and a UDP port, and for a link-local IPv6 address
//! its interface (RFC 4007 section 11, RFC 6874 without the escapes of URIs).

use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use skein_core::address;
use skein_sys::link;

use crate::config::DEFAULT_PORT;

/// Maximum length of an interface name in bytes (IFNAMSIZ without the terminator).
const MAX_INTERFACE_NAME: usize = 15;

/// An endpoint of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint {
    /// Address and port; the scope id is 0.
    address: SocketAddr,
    /// Interface of a link-local address: its name, or its index in digits. `None` if the address
    /// is not link-local.
    interface: Option<String>,
}

/// Failure to parse an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// The text is malformed, or the address is one that no node can listen on.
    #[error("is not an address. Use the form 192.0.2.1, 192.0.2.1:51900 or [2001:db8::1]:51900.")]
    Address,
    /// The address is link-local and has no interface.
    #[error("is a link-local address without an interface. Use the form [fe80::1%eth1]:51900.")]
    NoInterface,
    /// The address has an interface but is not link-local.
    #[error(
        "names an interface, but only link-local IPv6 addresses have one. Remove the interface."
    )]
    Interface,
}

/// The interface of a link-local endpoint does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "endpoint {endpoint}: this node has no interface {interface}. Correct the record, or create the \
     interface."
)]
pub struct UnknownInterface {
    endpoint: Endpoint,
    interface: String,
}

impl Endpoint {
    /// Returns the IP address without its scope.
    pub fn ip(&self) -> IpAddr {
        self.address.ip()
    }

    /// Returns whether the address is an IPv6 address.
    pub fn is_ipv6(&self) -> bool {
        self.address.is_ipv6()
    }

    /// Returns whether the endpoint names an interface.
    pub fn has_interface(&self) -> bool {
        self.interface.is_some()
    }

    /// Returns the socket address on this host; see [`Endpoint::resolve`]. An interface that cannot
    /// be looked up counts as absent.
    ///
    /// # Errors
    /// [`UnknownInterface`] if the interface does not exist.
    pub fn on_this_host(&self) -> Result<SocketAddr, UnknownInterface> {
        self.resolve(|name| link::find(name).ok().flatten().map(|link| link.index))
    }

    /// Returns the socket address on this host, with the index of the interface as its scope id.
    /// `index_of` returns the index of an interface.
    ///
    /// # Errors
    /// [`UnknownInterface`] if the interface does not exist.
    pub fn resolve(
        &self,
        index_of: impl FnOnce(&str) -> Option<u32>,
    ) -> Result<SocketAddr, UnknownInterface> {
        let (SocketAddr::V6(address), Some(interface)) = (self.address, &self.interface) else {
            return Ok(self.address);
        };
        let index = index_of(interface).or_else(|| interface.parse().ok());
        let unknown = || UnknownInterface { endpoint: self.clone(), interface: interface.clone() };
        let scope = index.filter(|index| *index != 0).ok_or_else(unknown)?;
        Ok(SocketAddrV6::new(*address.ip(), address.port(), 0, scope).into())
    }
}

impl From<SocketAddr> for Endpoint {
    /// Converts a socket address; a scope id becomes the interface's index in digits.
    fn from(mut address: SocketAddr) -> Self {
        let mut interface = None;
        if let SocketAddr::V6(v6) = &mut address {
            interface = Some(v6.scope_id()).filter(|id| *id != 0).map(|id| id.to_string());
            v6.set_scope_id(0);
            v6.set_flowinfo(0);
        }
        Self { address, interface }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let (bare, interface) = without_interface(text).ok_or(EndpointError::Address)?;
        let address = address::parse(&bare)
            .or_else(|_| address::parse(&bare).map(|ip| SocketAddr::new(ip, DEFAULT_PORT)))
            .map_err(|_| EndpointError::Address)?;
        if !address::is_endpoint(address) {
            return Err(EndpointError::Address);
        }
        let ip = address.ip();
        let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        match (link_local, &interface) {
            (true, None) => Err(EndpointError::NoInterface),
            (false, Some(_)) => Err(EndpointError::Interface),
            _ => Ok(Self { address, interface }),
        }
    }
}

/// Removes `%interface` from an IPv6 address, with or without brackets; `None` if the name is not a
/// valid interface name.
fn without_interface(text: &str) -> Option<(String, Option<String>)> {
    let Some((before, rest)) = text.split_once('%') else { return Some((text.to_owned(), None)) };
    let (interface, after) = match rest.split_once(']') {
        Some((interface, after)) => (interface, format!("]{after}")),
        None => (rest, String::new()),
    };
    let forbidden =
        |c: char| c == '/' || c == '%' || c == '[' || c.is_whitespace() || c.is_control();
    let valid =
        (1..=MAX_INTERFACE_NAME).contains(&interface.len()) && !interface.contains(forbidden);
    valid.then(|| (format!("{before}{after}"), Some(interface.to_owned())))
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.interface {
            Some(interface) => {
                write!(f, "[{}%{interface}]:{}", self.address.ip(), self.address.port())
            }
            None => self.address.fmt(f),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn endpoint(text: &str) -> Endpoint {
        text.parse().unwrap()
    }

    #[test]
    fn endpoint_is_read_and_written_the_same() {
        for (text, written) in [
            ("192.0.2.1", "192.0.2.1:51900"),
            ("192.0.2.1:4000", "192.0.2.1:4000"),
            ("2001:db8::1", "[2001:db8::1]:51900"),
            ("[2001:db8::1]:4000", "[2001:db8::1]:4000"),
            ("fe80::1%eth1", "[fe80::1%eth1]:51900"),
            ("[fe80::1%eth1.20]:4000", "[fe80::1%eth1.20]:4000"),
            ("[fe80::1%7]:4000", "[fe80::1%7]:4000"),
        ] {
            assert_eq!(endpoint(text).to_string(), written, "{text}");
            assert_eq!(endpoint(written), endpoint(text));
            let json = serde_json::to_string(&endpoint(text)).unwrap();
            assert_eq!(serde_json::from_str::<Endpoint>(&json).unwrap(), endpoint(text));
        }
    }

    #[test]
    fn endpoint_that_no_node_can_have_is_refused() {
        use EndpointError::{Address, Interface, NoInterface};
        for (text, error) in [
            ("", Address),
            ("node-b", Address),
            ("0.0.0.0", Address),
            ("224.0.0.1", Address),
            ("192.0.2.1:0", Address),
            ("fe80::1", NoInterface),
            ("[fe80::1]:51900", NoInterface),
            ("[fe80::1%]:51900", Address),
            ("[fe80::1%sixteen-letters!]:51900", Address),
            ("[fe80::1%a/b]:51900", Address),
            ("[fe80::1%a%b]:51900", Address),
            ("[2001:db8::1%eth1]:51900", Interface),
            ("192.0.2.1%eth1", Interface),
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(error), "{text}");
        }
    }

    #[test]
    fn scope_is_the_index_of_the_interface() {
        let index_of = |name: &str| (name == "eth1").then_some(3);
        let resolved = |text: &str| endpoint(text).resolve(index_of).map(|at| at.to_string());
        assert_eq!(resolved("[fe80::1%eth1]:51900").unwrap(), "[fe80::1%3]:51900");
        assert_eq!(resolved("[fe80::1%9]:51900").unwrap(), "[fe80::1%9]:51900");
        assert_eq!(resolved("192.0.2.1").unwrap(), "192.0.2.1:51900");
        let error = resolved("[fe80::1%eth2]:51900").unwrap_err().to_string();
        assert!(
            error.contains("[fe80::1%eth2]:51900") && error.contains("no interface"),
            "{error}"
        );
        let address = "[fe80::1%3]:51900".parse::<SocketAddr>().unwrap();
        assert_eq!(Endpoint::from(address).resolve(|_| None), Ok(address));
    }
}
