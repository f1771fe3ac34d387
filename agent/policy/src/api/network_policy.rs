//! The kind NetworkPolicy of networking.k8s.io/v1.

use serde::Deserialize;

use super::cidr::IpBlock;
use super::label::LabelSelector;
use super::object::ObjectMeta;
use super::parsed::Parsed;
use super::port::PolicyPort;

/// A NetworkPolicy: rules that allow traffic of the pods that the policy isolates.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NetworkPolicy {
    /// Name and namespace of the policy.
    pub metadata: ObjectMeta,
    /// Pods and rules. A policy with an unreadable specification selects no pod.
    pub spec: Parsed<NetworkPolicySpec>,
}

/// Pods and rules of a NetworkPolicy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkPolicySpec {
    /// Pods that the policy isolates. If absent, all pods of the namespace.
    pub pod_selector: Option<Parsed<LabelSelector>>,
    /// Directions that the policy isolates; see [`NetworkPolicySpec::isolates`].
    pub policy_types: Option<Parsed<Vec<Parsed<PolicyType>>>>,
    /// Rules that allow incoming traffic.
    pub ingress: Option<Parsed<Vec<Parsed<IngressRule>>>>,
    /// Rules that allow outgoing traffic.
    pub egress: Option<Parsed<Vec<Parsed<EgressRule>>>>,
}

/// Direction that a NetworkPolicy isolates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum PolicyType {
    /// Traffic to the pod.
    Ingress,
    /// Traffic from the pod.
    Egress,
}

impl NetworkPolicySpec {
    /// Returns whether the policy isolates pods in a direction.
    ///
    /// Without `policyTypes` the API server's default applies: ingress, and egress if `egress` has
    /// a rule. The default also applies to `policyTypes` without a readable entry.
    pub fn isolates(&self, direction: PolicyType) -> bool {
        let types = self.policy_types.as_ref().and_then(Parsed::valid);
        let mut types = types.into_iter().flatten().filter_map(Parsed::valid).peekable();
        if types.peek().is_some() {
            return types.any(|found| *found == direction);
        }
        match (direction, &self.egress) {
            (PolicyType::Ingress, _) => true,
            (PolicyType::Egress, Some(Parsed::Valid(rules))) => !rules.is_empty(),
            (PolicyType::Egress, rules) => rules.is_some(),
        }
    }
}

/// A rule that allows incoming traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IngressRule {
    /// Allowed sources; every source if absent or empty.
    pub from: Option<Parsed<Vec<Parsed<Peer>>>>,
    /// Allowed ports; all ports and protocols if absent or empty.
    pub ports: Option<Parsed<Vec<Parsed<PolicyPort>>>>,
}

/// A rule that allows outgoing traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressRule {
    /// Allowed destinations; every destination if absent or empty.
    pub to: Option<Parsed<Vec<Parsed<Peer>>>>,
    /// Allowed ports; all ports and protocols if absent or empty.
    pub ports: Option<Parsed<Vec<Parsed<PolicyPort>>>>,
}

/// A peer of a NetworkPolicy. A peer of an unknown type is unreadable.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawPeer")]
pub enum Peer {
    /// Addresses inside and outside the cluster.
    IpBlock(Parsed<IpBlock>),
    /// Pods of the policy's own namespace.
    Pods(Parsed<LabelSelector>),
    /// Pods of selected namespaces: those that `pods` selects, or all.
    Namespaces {
        /// Selector of the pods' namespaces.
        namespaces: Parsed<LabelSelector>,
        /// Selector of pods in these namespaces.
        pods: Option<Parsed<LabelSelector>>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPeer {
    pod_selector: Option<Parsed<LabelSelector>>,
    namespace_selector: Option<Parsed<LabelSelector>>,
    ip_block: Option<Parsed<IpBlock>>,
}

impl TryFrom<RawPeer> for Peer {
    type Error = &'static str;

    fn try_from(raw: RawPeer) -> Result<Self, Self::Error> {
        match (raw.pod_selector, raw.namespace_selector, raw.ip_block) {
            (None, None, Some(block)) => Ok(Self::IpBlock(block)),
            (Some(pods), None, None) => Ok(Self::Pods(pods)),
            (pods, Some(namespaces), None) => Ok(Self::Namespaces { namespaces, pods }),
            (None, None, None) => Err(
                "podSelector, namespaceSelector or ipBlock is missing: the peer matches nothing",
            ),
            (.., Some(_)) => Err("ipBlock cannot be combined with a selector"),
        }
    }
}
