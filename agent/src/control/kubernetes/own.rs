//! Desired spec of this node's SkeinNode, as a pure function of its Node and its configuration.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, NodeSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use skein_cni_protocol::excerpt::excerpt;
use skein_core::address;
use skein_ipc::keys::PublicKeys;

use super::resource::SkeinNodeSpec;
use crate::config::{Config, check_inside, check_outside};
use crate::control::records::RecordError;
use crate::control::records::first_host;

/// Maximum number of overlay addresses in a SkeinNode.
const MAX_OVERLAY_ADDRESSES: usize = 16;

/// Returns the spec of this node's SkeinNode. `addresses` are those of
/// `kubernetes.endpoint_interface`; `None` if no interface is configured.
///
/// # Errors
/// [`RecordError`] with the cause and the remedy if the Node has no pod CIDRs, if its pod CIDRs or
/// addresses contradict `cluster_cidrs`, or if no address is usable as an endpoint.
pub(super) fn spec(
    config: &Config,
    keys: PublicKeys,
    node: &Node,
    addresses: Option<&[IpAddr]>,
) -> Result<SkeinNodeSpec, RecordError> {
    let pod_cidrs = match &config.pod_cidrs {
        Some(cidrs) => cidrs.iter().map(IpNet::to_string).collect(),
        None => pod_cidrs(node)?,
    };
    let parsed: Vec<IpNet> =
        pod_cidrs.iter().filter_map(|cidr| address::parse(cidr).ok()).collect();
    check_inside(&parsed, &config.cluster_cidrs).map_err(|error| {
        RecordError::new(format!(
            "the Node's podCIDRs: {error}. Correct the chart's podCidr and podCidrv6, or the \
             controller manager's --cluster-cidr."
        ))
    })?;
    let listens = |ip: &IpAddr| {
        let mut listening = config.underlay.addresses.iter();
        listening.any(|own| own == ip || (own.is_unspecified() && own.is_ipv4() == ip.is_ipv4()))
    };
    let candidates = match addresses {
        Some(addresses) => addresses.to_vec(),
        None => internal_ips(node),
    };
    // Addresses without a listener of Skein count as well, because other programs of the cluster
    // use them.
    let all = candidates.iter().copied().chain(internal_ips(node));
    check_outside(all, &config.cluster_cidrs).map_err(|error| {
        RecordError::new(format!(
            "an address of the Node: {error} The chart's values are podCidr and podCidrv6."
        ))
    })?;
    let endpoint = |ip: &IpAddr| SocketAddr::new(*ip, config.underlay.port).to_string();
    // A link-local address needs the name of an interface, which differs between nodes.
    let usable =
        |ip: &&IpAddr| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()) && listens(ip);
    let endpoints: Vec<_> = candidates.iter().filter(usable).map(endpoint).collect();
    if endpoints.is_empty() {
        let of = match &config.kubernetes.endpoint_interface {
            Some(interface) => format!("interface {interface}"),
            None => "its InternalIPs".to_owned(),
        };
        return Err(RecordError::new(format!(
            "no usable endpoint of this node: {of} has {}, and underlay.addresses is {:?}. Set \
             underlay.addresses or kubernetes.endpoint_interface to an address of this node.",
            excerpt(&format!("{candidates:?}")),
            config.underlay.addresses
        )));
    }
    let overlay_addresses = overlay_addresses(config, &parsed);
    Ok(SkeinNodeSpec {
        public_key: keys.first.to_string(),
        second_public_key: keys.second.map(|key| key.to_string()),
        endpoints,
        pod_cidrs,
        overlay_addresses: Some(overlay_addresses),
    })
}

/// Returns the node's addresses on the overlay, as far as they are inside of its pod CIDRs. Other
/// nodes drop packets from addresses elsewhere.
fn overlay_addresses(config: &Config, pod_cidrs: &[IpNet]) -> Vec<String> {
    let first = || pod_cidrs.iter().map(first_host).collect();
    let addresses = config.interface.addresses.clone().unwrap_or_else(first);
    let is_inside = |address: &IpAddr| pod_cidrs.iter().any(|cidr| cidr.contains(address));
    let inside = addresses.into_iter().filter(is_inside).take(MAX_OVERLAY_ADDRESSES);
    inside.map(|address| address.to_string()).collect()
}

fn pod_cidrs(node: &Node) -> Result<Vec<String>, RecordError> {
    let NodeSpec { pod_cidrs, pod_cidr, .. } = node.spec.clone().unwrap_or_default();
    // Kubernetes before 1.16 had only podCIDR.
    let cidrs = pod_cidrs.filter(|cidrs| !cidrs.is_empty());
    cidrs.or(pod_cidr.map(|cidr| vec![cidr])).ok_or_else(|| {
        RecordError::new(
            "the Node has no podCIDRs. Run kube-controller-manager with --allocate-node-cidrs and \
             --cluster-cidr, or set pod_cidrs.",
        )
    })
}

fn internal_ips(node: &Node) -> Vec<IpAddr> {
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_deref());
    let internal = addresses.unwrap_or_default().iter().filter(|a| a.type_ == "InternalIP");
    internal.filter_map(|address| address::parse(&address.address).ok()).collect()
}

/// Returns the Node as the owner of its SkeinNode, which Kubernetes deletes together with the Node.
pub(super) fn owner(node: &Node) -> Option<OwnerReference> {
    Some(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone()?,
        uid: node.metadata.uid.clone()?,
        ..OwnerReference::default()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_ipc::keys::PublicKey;

    fn node(cidrs: &[&str], ips: &[&str]) -> Node {
        let addresses =
            ips.iter().map(|ip| serde_json::json!({"type": "InternalIP", "address": ip}));
        serde_json::from_value(serde_json::json!({
            "metadata": { "name": "node-a", "uid": "u" },
            "spec": { "podCIDRs": cidrs },
            "status": { "addresses": Vec::from_iter(addresses) },
        }))
        .unwrap()
    }

    fn config(more: &str) -> Config {
        let text = format!("name = 'node-a'\n{more}\n[kubernetes]\nenabled = true");
        Config::parse(&text).unwrap()
    }

    #[test]
    fn spec_follows_from_node_and_configuration() {
        let node = node(&["10.1.0.0/24", "fd00:1::/64"], &["192.0.2.1", "2001:db8::1"]);
        let both = "[underlay]\naddresses = ['0.0.0.0', '::']\nport = 4000";
        let all = spec(&config(both), PublicKey([1; 32]).into(), &node, None).unwrap();
        assert_eq!(all.endpoints, ["192.0.2.1:4000", "[2001:db8::1]:4000"]);
        assert_eq!(all.pod_cidrs, ["10.1.0.0/24", "fd00:1::/64"]);
        let v4 = config("[underlay]\naddresses = ['0.0.0.0']");
        assert_eq!(
            spec(&v4, PublicKey([1; 32]).into(), &node, None).unwrap().endpoints,
            ["192.0.2.1:51900"]
        );
        let elsewhere: IpAddr = "198.51.100.7".parse().unwrap();
        let there = spec(&v4, PublicKey([1; 32]).into(), &node, Some(&[elsewhere])).unwrap();
        assert_eq!(there.endpoints, ["198.51.100.7:51900"]);
        let configured =
            spec(&config("pod_cidrs = ['10.9.0.0/16']"), PublicKey([1; 32]).into(), &node, None);
        assert_eq!(configured.unwrap().pod_cidrs, ["10.9.0.0/16"]);
        assert_eq!(all.overlay_addresses.unwrap(), ["10.1.0.1", "fd00:1::1"]);
        let addresses = config("[interface]\naddresses = ['10.1.0.7', '192.0.2.7']");
        let own = spec(&addresses, PublicKey([1; 32]).into(), &node, None).unwrap();
        assert_eq!(own.overlay_addresses.unwrap(), ["10.1.0.7"]);
        assert_eq!(owner(&node).unwrap().uid, "u");
    }

    #[test]
    fn mapped_addresses_of_a_node_are_ipv4() {
        let v4 = config("[underlay]\naddresses = ['0.0.0.0']");
        let key = PublicKey([1; 32]).into();
        let mapped = spec(&v4, key, &node(&["10.1.0.0/24"], &["::ffff:192.0.2.1"]), None).unwrap();
        assert_eq!(mapped.endpoints, ["192.0.2.1:51900"]);
    }

    #[test]
    fn error_names_missing_pod_cidrs_or_endpoint() {
        let key = PublicKeys::from(PublicKey([1; 32]));
        let text =
            spec(&config(""), key, &node(&[], &["192.0.2.1"]), None).unwrap_err().to_string();
        assert!(text.contains("--allocate-node-cidrs"), "{text}");
        let text =
            spec(&config(""), key, &node(&["10.1.0.0/24"], &[]), None).unwrap_err().to_string();
        assert!(text.contains("InternalIPs"), "{text}");
        let bound = config("[underlay]\naddresses = ['192.0.2.9']");
        assert!(spec(&bound, key, &node(&["10.1.0.0/24"], &["192.0.2.1"]), None).is_err());
        let cluster = config("cluster_cidrs = ['10.0.0.0/8']");
        let elsewhere = node(&["10.1.0.0/24", "fd00:1::/64"], &["192.0.2.1"]);
        let text = spec(&cluster, key, &elsewhere, None).unwrap_err().to_string();
        assert!(text.contains("fd00:1::/64 is outside of") && text.contains("podCidrv6"), "{text}");
    }

    #[test]
    fn node_address_inside_cluster_cidrs_is_refused() {
        let key = PublicKeys::from(PublicKey([1; 32]));
        let cluster = config("cluster_cidrs = ['10.0.0.0/8']");
        let node = node(&["10.1.0.0/24"], &["10.200.0.1"]);
        let text = spec(&cluster, key, &node, None).unwrap_err().to_string();
        assert!(text.contains("10.200.0.1 lies in cluster_cidrs (10.0.0.0/8)"), "{text}");
        let endpoint: IpAddr = "192.0.2.1".parse().unwrap();
        let text = spec(&cluster, key, &node, Some(&[endpoint])).unwrap_err().to_string();
        assert!(text.contains("10.200.0.1 lies in"), "The InternalIP counts as well: {text}");
    }
}
