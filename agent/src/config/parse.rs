//! Parsers of values that are strings in the configuration file.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::de::Error;
use serde::{Deserialize, Deserializer};
use skein_core::address;

use super::{Invalid, check_disjoint, check_pod_cidr};

/// Deserializes the value of `key`: an address and a port, or `off` (`None`). The error shows an
/// example with `port`.
pub(super) fn listen<'de, D: Deserializer<'de>>(
    key: &str,
    port: u16,
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "off" {
        return Ok(None);
    }
    address::parse(&text).map(Some).map_err(|_| {
        let example = format!("an address and a port (127.0.0.1:{port}) or \"off\"");
        D::Error::custom(Invalid(format!("{key} = {text:?}: use {example}")))
    })
}

/// Deserializes the value of `key`: a list of unicast or unspecified addresses.
pub(super) fn addresses<'de, D: Deserializer<'de>>(
    key: &str,
    deserializer: D,
) -> Result<Vec<IpAddr>, D::Error> {
    let parse = |text: &String| {
        let address: IpAddr = address::parse(text).map_err(|_| {
            Invalid(format!("{key}: {text:?} is not an IP address. Use an address, as 192.0.2.1."))
        })?;
        match address.is_multicast() {
            true => Err(Invalid(format!("{key}: {address}: use a unicast address"))),
            false => Ok(address),
        }
    };
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(parse).collect::<Result<_, _>>().map_err(D::Error::custom)
}

/// Deserializes a path; the empty path is `None`.
pub(super) fn path_if_any<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    Ok((!path.as_os_str().is_empty()).then_some(path))
}

/// Parses the value of `key`: disjoint prefixes of pods.
///
/// # Errors
/// A text is not a prefix, a prefix cannot be a pod CIDR, or two prefixes overlap. The error names
/// `key`.
pub(super) fn cidrs(key: &str, texts: &[String]) -> Result<Vec<IpNet>, Invalid> {
    let wrong = |error: Invalid| Invalid(format!("{key}: {error}"));
    let mut cidrs = Vec::with_capacity(texts.len());
    for text in texts {
        let cidr: IpNet = address::parse(text).map_err(|_| {
            let remedy = "Use an address and a length, as 10.1.0.0/24.";
            Invalid(format!("{key}: {text:?} is not a prefix. {remedy}"))
        })?;
        check_pod_cidr(&cidr).map_err(wrong)?;
        cidrs.push(cidr);
    }
    check_disjoint(&cidrs).map_err(wrong)?;
    Ok(cidrs)
}
