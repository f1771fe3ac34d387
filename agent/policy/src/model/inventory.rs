//! Objects of the cluster, and pods of this node with their interfaces.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::api::{
    ClusterNetworkPolicy, Defect, Labels, Namespace, NetworkPolicy, Node, Pod, Protocol,
};
use crate::ranges::{AddressRange, subtract};

use super::policy::{Policy, PolicyId};
use super::resolve::{resolve_cluster_policy, resolve_network_policy};
use super::selector::namespace_labels;

/// Namespace and name of a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodId {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
}

/// A declared port with a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NamedPort {
    /// Name of the port.
    pub name: String,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Port number.
    pub number: u16,
}

/// A pod with addresses of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInfo {
    /// Labels, shared by pods with the same labels.
    #[serde(with = "shared")]
    pub labels: Arc<Labels>,
    /// Named ports, shared by pods with the same ports.
    #[serde(with = "shared")]
    pub ports: Arc<BTreeSet<NamedPort>>,
    /// All addresses that the pod reports. If several pods report an address, the pod that started
    /// last owns it ([`Inventory::owner`]).
    pub addresses: Vec<IpAddr>,
    /// Start time of the pod, RFC 3339 in UTC. The text of a later time compares as greater.
    pub started: Option<String>,
}

/// A node: its labels and addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Labels for selectors of nodes.
    pub labels: Labels,
    /// Addresses, including overlay addresses.
    pub addresses: Vec<IpAddr>,
}

impl PodId {
    /// Returns the name of a pod object.
    pub fn of(pod: &Pod) -> Self {
        let metadata = &pod.metadata;
        Self { namespace: metadata.namespace.clone(), name: metadata.name.clone() }
    }
}

impl PodInfo {
    /// Returns the properties of a pod object; `None` for a pod on the host's network and for a pod
    /// that has ended.
    pub fn of(pod: &Pod) -> Option<Self> {
        if !pod.is_on_pod_network() {
            return None;
        }
        let named = pod.ports().filter_map(|port| {
            let name = port.name.clone()?;
            Some(NamedPort { name, protocol: port.protocol, number: port.container_port })
        });
        Some(Self {
            labels: Arc::new(pod.metadata.labels.clone()),
            ports: Arc::new(named.collect()),
            addresses: pod.addresses().collect(),
            started: pod.status.start_time.clone(),
        })
    }
}

impl NodeInfo {
    /// Returns the properties of a node object.
    pub fn of(node: &Node) -> Self {
        Self { labels: node.metadata.labels.clone(), addresses: node.addresses().collect() }
    }
}

/// Serialization of shared values as plain values.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        value: &Arc<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        T::serialize(value, serializer)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

/// Objects of the cluster, and pods of this node with their interfaces.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    namespaces: HashMap<String, Labels>,
    pods: BTreeMap<PodId, PodInfo>,
    /// Pods that report an address, by the address.
    claims: HashMap<IpAddr, BTreeSet<PodId>>,
    nodes: BTreeMap<String, NodeInfo>,
    pod_networks: Vec<AddressRange>,
    interfaces: BTreeMap<String, PodId>,
    /// Interfaces of pods to which no policy applies.
    accepted: BTreeSet<String>,
    policies: BTreeMap<PolicyId, Arc<Policy>>,
    labels: Interner<Labels>,
    ports: Interner<BTreeSet<NamedPort>>,
}

impl Inventory {
    /// Adds or replaces a namespace.
    pub fn upsert_namespace(&mut self, namespace: &Namespace) {
        self.set_namespace(&namespace.metadata.name, &namespace.metadata.labels);
    }

    /// Adds or replaces a namespace by its properties.
    pub fn set_namespace(&mut self, name: &str, labels: &Labels) {
        self.namespaces.insert(name.to_owned(), namespace_labels(name, labels));
    }

    /// Removes a namespace.
    pub fn remove_namespace(&mut self, name: &str) {
        self.namespaces.remove(name);
    }

    /// Adds or replaces a pod. A pod on the host's network and a pod that has ended are removed.
    pub fn upsert_pod(&mut self, pod: &Pod) {
        self.set_pod(PodId::of(pod), PodInfo::of(pod));
    }

    /// Adds, replaces or removes a pod.
    pub fn set_pod(&mut self, id: PodId, info: Option<PodInfo>) {
        self.remove_pod(&id);
        let Some(mut info) = info else { return };
        info.labels = self.labels.intern(info.labels);
        info.ports = self.ports.intern(info.ports);
        for address in &info.addresses {
            self.claims.entry(*address).or_default().insert(id.clone());
        }
        self.pods.insert(id, info);
    }

    /// Removes a pod.
    pub fn remove_pod(&mut self, id: &PodId) {
        let Some(info) = self.pods.remove(id) else { return };
        for address in &info.addresses {
            if let Some(claims) = self.claims.get_mut(address) {
                claims.remove(id);
                if claims.is_empty() {
                    self.claims.remove(address);
                }
            }
        }
    }

    /// Adds or replaces a node.
    pub fn upsert_node(&mut self, node: &Node) {
        self.set_node(node.metadata.name.clone(), NodeInfo::of(node));
    }

    /// Adds or replaces a node by its properties.
    pub fn set_node(&mut self, name: String, info: NodeInfo) {
        self.nodes.insert(name, info);
    }

    /// Removes a node.
    pub fn remove_node(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// Adds or replaces a NetworkPolicy. Returns the parts that cannot be enforced.
    pub fn upsert_network_policy(&mut self, object: &NetworkPolicy) -> (PolicyId, Vec<Defect>) {
        self.insert_policy(resolve_network_policy(object))
    }

    /// Adds or replaces a ClusterNetworkPolicy. Returns the parts that cannot be enforced.
    pub fn upsert_cluster_policy(
        &mut self,
        object: &ClusterNetworkPolicy,
    ) -> (PolicyId, Vec<Defect>) {
        self.insert_policy(resolve_cluster_policy(object))
    }

    fn insert_policy(&mut self, resolved: (Policy, Vec<Defect>)) -> (PolicyId, Vec<Defect>) {
        let (policy, defects) = resolved;
        let id = policy.id.clone();
        self.set_policy(Arc::new(policy));
        (id, defects)
    }

    /// Adds or replaces a resolved policy.
    pub(crate) fn set_policy(&mut self, policy: Arc<Policy>) {
        self.policies.insert(policy.id.clone(), policy);
    }

    /// Removes a policy.
    pub fn remove_policy(&mut self, id: &PolicyId) {
        self.policies.remove(id);
    }

    /// Sets the pod CIDRs of the cluster, and the addresses in them that are not pods' (overlay
    /// addresses of nodes).
    pub fn set_pod_networks(&mut self, networks: &[IpNet], excluded: &[IpAddr]) {
        let networks = networks.iter().copied().map(AddressRange::from).collect();
        self.pod_networks = subtract(networks, excluded.iter().copied().map(Into::into).collect());
    }

    /// Assigns the host's end of a pod's link to a pod of this node.
    pub fn attach(&mut self, interface: &str, pod: PodId) {
        self.accepted.remove(interface);
        self.interfaces.insert(interface.to_owned(), pod);
    }

    /// Assigns the host's end of a pod's link to an unknown pod to which no policy applies.
    pub fn accept(&mut self, interface: &str) {
        self.interfaces.remove(interface);
        self.accepted.insert(interface.to_owned());
    }

    /// Removes an interface of a pod.
    pub fn detach(&mut self, interface: &str) {
        self.accepted.remove(interface);
        self.interfaces.remove(interface);
    }

    /// Returns the labels of a namespace; `None` if the namespace is not known.
    pub fn namespace(&self, name: &str) -> Option<&Labels> {
        self.namespaces.get(name)
    }

    /// Returns the known namespaces with their labels.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, &Labels)> {
        self.namespaces.iter().map(|(name, labels)| (name.as_str(), labels))
    }

    /// Returns a pod of the pod network.
    pub fn pod(&self, id: &PodId) -> Option<&PodInfo> {
        self.pods.get(id)
    }

    /// Returns all pods of the pod network.
    pub fn pods(&self) -> impl Iterator<Item = (&PodId, &PodInfo)> {
        self.pods.iter()
    }

    /// Returns the pods of a namespace.
    pub fn pods_of(&self, namespace: &str) -> impl Iterator<Item = (&PodId, &PodInfo)> {
        let first = PodId { namespace: namespace.to_owned(), name: String::new() };
        self.pods.range(first..).take_while(move |(id, _)| id.namespace == namespace)
    }

    /// Returns the owner of an address: of the pods that have the address, the pod that started
    /// last.
    pub fn owner(&self, address: IpAddr) -> Option<(&PodId, &PodInfo)> {
        let claims = self.claims.get(&address)?.iter();
        let known = claims.filter_map(|id| self.pods.get_key_value(id));
        known.max_by(|(a, first), (b, second)| (&first.started, a).cmp(&(&second.started, b)))
    }

    /// Returns all nodes by name.
    pub fn nodes(&self) -> &BTreeMap<String, NodeInfo> {
        &self.nodes
    }

    /// Returns the addresses of pods: the pod CIDRs without the excluded addresses.
    pub fn pod_networks(&self) -> &[AddressRange] {
        &self.pod_networks
    }

    /// Returns the interfaces of this node's pods, without the accepted ones.
    pub fn interfaces(&self) -> &BTreeMap<String, PodId> {
        &self.interfaces
    }

    /// Returns the addresses of this node's pods, with their interfaces.
    pub fn local_addresses(&self) -> HashMap<IpAddr, &str> {
        let mut local = HashMap::new();
        for (interface, pod) in &self.interfaces {
            let addresses = self.pods.get(pod).into_iter().flat_map(|info| &info.addresses);
            let owned = addresses.filter(|one| self.owner(**one).is_some_and(|(id, _)| id == pod));
            local.extend(owned.map(|address| (*address, interface.as_str())));
        }
        local
    }

    /// Returns the interfaces of pods to which no policy applies.
    pub fn accepted(&self) -> &BTreeSet<String> {
        &self.accepted
    }

    /// Returns a policy of either kind.
    pub fn policy(&self, id: &PolicyId) -> Option<&Arc<Policy>> {
        self.policies.get(id)
    }

    /// Returns all policies of both kinds.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }
}

/// Values that are stored once.
#[derive(Debug, Clone)]
struct Interner<T> {
    values: HashSet<Arc<T>>,
    /// Number of values at which unused ones are removed.
    sweep_at: usize,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), sweep_at: 64 }
    }
}

impl<T: Eq + std::hash::Hash> Interner<T> {
    fn intern(&mut self, value: Arc<T>) -> Arc<T> {
        if let Some(present) = self.values.get(&value) {
            return Arc::clone(present);
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|value| Arc::strong_count(value) > 1);
            self.sweep_at = (self.values.len() * 2).max(64);
        }
        self.values.insert(Arc::clone(&value));
        value
    }
}
