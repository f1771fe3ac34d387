//! Pods, namespaces and nodes, with the fields that policies refer to.

use std::net::IpAddr;

use serde::Deserialize;

use super::label::Labels;
use super::parsed::{Parsed, null_as_default};
use super::port::Protocol;

/// Name, labels and identity of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectMeta {
    /// Name of the object.
    pub name: String,
    /// Namespace of the object; empty if the kind has none.
    #[serde(default, deserialize_with = "null_as_default")]
    pub namespace: String,
    /// Labels of the object.
    #[serde(default, deserialize_with = "null_as_default")]
    pub labels: Labels,
    /// Identity of the object; a later object with the same name has another one. Empty if the
    /// object does not come from an API server.
    #[serde(default, deserialize_with = "null_as_default")]
    pub uid: String,
    /// Version of the object; empty if it does not come from an API server.
    #[serde(default, deserialize_with = "null_as_default")]
    pub resource_version: String,
}

/// A namespace with its labels.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Namespace {
    /// Name and labels.
    pub metadata: ObjectMeta,
}

/// A node with its labels and addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Node {
    /// Name and labels.
    pub metadata: ObjectMeta,
    /// Observed state of the node.
    #[serde(default, deserialize_with = "null_as_default")]
    pub status: NodeStatus,
}

/// Observed state of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct NodeStatus {
    /// Addresses of the node. The caller adds the node's overlay addresses.
    #[serde(default, deserialize_with = "null_as_default")]
    pub addresses: Vec<NodeAddress>,
}

/// An address of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct NodeAddress {
    /// An IP address or a host name.
    pub address: String,
}

impl Node {
    /// Returns the node's IP addresses, without host names.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.status.addresses.iter().filter_map(|entry| entry.address.parse().ok())
    }
}

/// A pod with the fields that policies refer to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Pod {
    /// Name, namespace and labels.
    pub metadata: ObjectMeta,
    /// Configuration of network and containers.
    #[serde(default, deserialize_with = "null_as_default")]
    pub spec: PodSpec,
    /// Observed state of the pod.
    #[serde(default, deserialize_with = "null_as_default")]
    pub status: PodStatus,
}

/// Configuration of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// True if the pod uses the network of its node.
    #[serde(default, deserialize_with = "null_as_default")]
    pub host_network: bool,
    /// Containers that run for the pod's life.
    #[serde(default, deserialize_with = "null_as_default")]
    pub containers: Vec<Container>,
    /// Containers that start before the others; sidecars continue to run.
    #[serde(default, deserialize_with = "null_as_default")]
    pub init_containers: Vec<Container>,
}

/// A container with its ports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Restart policy of an init container; `Always` makes it a sidecar.
    pub restart_policy: Option<String>,
    /// Ports that the container declares.
    #[serde(default, deserialize_with = "null_as_default")]
    pub ports: Vec<Parsed<ContainerPort>>,
}

/// A declared port of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// Name, unique within the container.
    pub name: Option<String>,
    /// Number of the port.
    pub container_port: u16,
    /// Protocol of the port.
    #[serde(default, deserialize_with = "null_as_default")]
    pub protocol: Protocol,
}

/// Observed state of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Phase of the pod's life.
    #[serde(default, deserialize_with = "null_as_default")]
    pub phase: String,
    /// Addresses of the pod. They stay in the object after the pod's end.
    #[serde(default, rename = "podIPs", deserialize_with = "null_as_default")]
    pub pod_ips: Vec<PodIp>,
    /// Time at which kubelet has accepted the pod, RFC 3339 in UTC.
    pub start_time: Option<String>,
}

/// An address of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct PodIp {
    /// Text form of the address.
    pub ip: String,
}

impl Pod {
    /// Returns whether the pod has addresses of its own in the pod network: it uses no host
    /// network, and its containers have not ended for good.
    pub fn is_on_pod_network(&self) -> bool {
        !self.spec.host_network && !["Succeeded", "Failed"].contains(&&*self.status.phase)
    }

    /// Returns the pod's addresses. An entry that is not an address is left out.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.status.pod_ips.iter().filter_map(|entry| entry.ip.parse().ok())
    }

    /// Returns the readable declared ports of containers and sidecars.
    pub fn ports(&self) -> impl Iterator<Item = &ContainerPort> {
        let is_sidecar =
            |container: &&Container| container.restart_policy.as_deref() == Some("Always");
        let sidecars = self.spec.init_containers.iter().filter(is_sidecar);
        self.spec
            .containers
            .iter()
            .chain(sidecars)
            .flat_map(|container| &container.ports)
            .filter_map(Parsed::valid)
    }
}
