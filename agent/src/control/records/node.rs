//! The record of one node.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use skein_cni_protocol::excerpt::excerpt;
use skein_ipc::keys::{PublicKey, PublicKeys};

use super::first_host;
use crate::control::endpoint::{Endpoint, EndpointError};

/// Record of a node: its keys, endpoints and pod CIDRs. Serialized in registry.json.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Name of the node, unique in the cluster.
    pub name: String,
    /// Active public key of the node.
    pub public_key: PublicKey,
    /// Next or previous public key during a key rotation; peers accept both keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_public_key: Option<PublicKey>,
    /// Underlay addresses on which the node listens, in the order in which peers try them.
    #[serde(deserialize_with = "usable_endpoints")]
    pub endpoints: Vec<Endpoint>,
    /// Prefixes of the node's pods.
    #[serde(deserialize_with = "skein_ipc::address::canonical")]
    pub pod_cidrs: Vec<IpNet>,
    /// Addresses of the node on the overlay, inside of `pod_cidrs`; empty for the first host of
    /// each prefix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overlay_addresses: Vec<IpAddr>,
}

impl NodeRecord {
    /// Returns the public key and the second public key.
    pub fn keys(&self) -> PublicKeys {
        PublicKeys { first: self.public_key, second: self.second_public_key }
    }

    /// Returns the addresses of the node on the overlay, which are no addresses of pods.
    pub fn overlay_addresses(&self) -> Vec<IpAddr> {
        match self.overlay_addresses.is_empty() {
            true => self.pod_cidrs.iter().map(first_host).collect(),
            false => self.overlay_addresses.clone(),
        }
    }
}

/// Reads the endpoints of a stored record. Endpoints that this release refuses are left out with a
/// warning, because an earlier release may have stored them, and the rest of the file must stay
/// readable.
fn usable_endpoints<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Endpoint>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let (usable, refused) = parse_endpoints(&texts);
    if let Some((endpoint, error)) = refused.first() {
        let (endpoint, count) = (excerpt(endpoint), refused.len());
        tracing::warn!(count, first = %endpoint, %error, "endpoints of a stored node record left out");
    }
    Ok(usable)
}

/// Parses endpoints in their order. Returns those that parse, and the texts of the others with the
/// reasons.
pub(super) fn parse_endpoints(texts: &[String]) -> (Vec<Endpoint>, Vec<(&str, EndpointError)>) {
    let (mut usable, mut refused) = (Vec::with_capacity(texts.len()), Vec::new());
    for text in texts {
        match text.parse() {
            Ok(endpoint) => usable.push(endpoint),
            Err(error) => refused.push((text.as_str(), error)),
        }
    }
    (usable, refused)
}
