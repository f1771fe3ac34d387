//! JSON documents of the CNI specification 1.1.0: the result of an ADD (section 5) and errors.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The newest version that these types describe.
pub const VERSION: &str = "1.1.0";

/// The result of a successful ADD, and what later plugins and CHECK get as `prevResult`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddResult {
    /// Version of the document: the one that the configuration asked for.
    pub cni_version: String,
    /// Interfaces that were made, on the host and in the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Addresses that were assigned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    /// Routes that were added in the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Name resolution for the container.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Hardware address as `aa:bb:cc:dd:ee:ff`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// MTU in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Path of the network namespace; empty for the host's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

/// An address of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// Address and prefix length.
    pub address: IpNet,
    /// Gateway, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into [`AddResult::interfaces`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// Path MTU in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// Name resolution, as in resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Servers in the order of their preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Domains to search.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// An error, printed on standard output with a non-zero exit code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Error {
    /// Version of the document.
    pub cni_version: String,
    /// What kind of error; see [`ErrorCode`].
    pub code: u32,
    /// One line.
    pub msg: String,
    /// More of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

/// Well-known error codes (section "Error" of the specification); 100 and above are a plugin's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// The version of the configuration is not supported.
    IncompatibleVersion = 1,
    /// A field of the configuration is not supported.
    UnsupportedField = 2,
    /// The container is unknown or does not exist.
    UnknownContainer = 3,
    /// Environment variables are missing or invalid.
    InvalidEnvironment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// The input could not be decoded.
    Decoding = 6,
    /// The network configuration is invalid.
    InvalidNetworkConfig = 7,
    /// Try again later.
    TryAgainLater = 11,
    /// The plugin cannot serve an ADD (STATUS).
    NotAvailable = 50,
    /// The plugin cannot serve an ADD, and running containers have limited connectivity (STATUS).
    NotAvailableLimited = 51,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The example of the specification's section on results, less what Skein does not produce.
    const RESULT: &str = r#"{
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "eth0", "mac": "99:88:77:66:55:44", "mtu": 1440, "sandbox": "/run/netns/x"}],
        "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}],
        "dns": {"nameservers": ["10.1.0.1"]}
    }"#;

    #[test]
    fn results_round_trip() {
        let result: AddResult = serde_json::from_str(RESULT).unwrap();
        assert_eq!(result.ips[0].address, "10.1.0.5/16".parse().unwrap());
        let again: serde_json::Value = serde_json::to_value(&result).unwrap();
        assert_eq!(again, serde_json::from_str::<serde_json::Value>(RESULT).unwrap());
    }

    #[test]
    fn empty_parts_are_left_out() {
        let result = AddResult { cni_version: VERSION.to_owned(), ..Default::default() };
        assert_eq!(serde_json::to_string(&result).unwrap(), r#"{"cniVersion":"1.1.0"}"#);
    }

    #[test]
    fn bad_results_are_errors() {
        for text in
            [r#"{}"#, r#"{"cniVersion":1}"#, r#"{"cniVersion":"1.1.0","ips":[{"address":"x"}]}"#]
        {
            assert!(serde_json::from_str::<AddResult>(text).is_err(), "{text}");
        }
    }
}
