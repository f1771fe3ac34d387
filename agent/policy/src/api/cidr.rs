//! CIDRs and `ipBlock` peers.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::parsed::null_as_default;

/// An IPv4 or IPv6 prefix without host bits.
///
/// The parser accepts two forms that older API servers have stored: host bits, which are cleared,
/// and leading zeros of decimal numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr(IpNet);

/// The reason why a text is not a CIDR.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CidrError {
    /// The text is not an address and a prefix length.
    #[error("{0:?} is not a CIDR")]
    Malformed(String),
    /// The address is an IPv4-mapped IPv6 address.
    #[error("{0:?} is an IPv4-mapped IPv6 prefix: write it as an IPv4 prefix")]
    Mapped(String),
}

impl Cidr {
    /// Returns the prefix. Its host bits are zero.
    pub fn net(self) -> IpNet {
        self.0
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let malformed = || CidrError::Malformed(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(malformed)?;
        let address = match address.parse::<Ipv6Addr>() {
            Ok(v6) if v6.to_ipv4_mapped().is_some() => {
                return Err(CidrError::Mapped(text.to_owned()));
            }
            Ok(v6) => IpAddr::V6(v6),
            Err(_) => IpAddr::V4(ipv4(address).ok_or_else(malformed)?),
        };
        let length = decimal(length).ok_or_else(malformed)?;
        let net = IpNet::new(address, length).map_err(|_| malformed())?;
        Ok(Self(net.trunc()))
    }
}

/// Reads four decimal numbers, with leading zeros or without.
fn ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = text.split('.').map(decimal);
    let mut next = || octets.next().flatten();
    let address = [next()?, next()?, next()?, next()?];
    octets.next().is_none().then(|| Ipv4Addr::from(address))
}

/// Reads a decimal number of up to 255, without a sign.
fn decimal(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;

    fn try_from(text: String) -> Result<Self, CidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Peer of a NetworkPolicy by address: the addresses in `cidr` and in none of `except`.
///
/// A block with an unreadable `except` is unreadable as a whole, because the block would allow
/// more without the exception.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IpBlock {
    /// Prefix of the block.
    pub cidr: Cidr,
    /// Prefixes that this block leaves out. Other blocks may contain them.
    #[serde(default, deserialize_with = "null_as_default")]
    pub except: Vec<Cidr>,
}
