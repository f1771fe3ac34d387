//! The kind ClusterNetworkPolicy of policy.networking.k8s.io/v1alpha2.

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::cidr::Cidr;
use super::label::LabelSelector;
use super::object::ObjectMeta;
use super::parsed::{Parsed, null_as_default};
use super::port::Port;

/// A ClusterNetworkPolicy: an ordered list of rules for pods of any namespace.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ClusterNetworkPolicy {
    /// Name of the policy.
    pub metadata: ObjectMeta,
    /// Pods and rules. A policy with an unreadable specification selects no pod.
    pub spec: Parsed<ClusterNetworkPolicySpec>,
}

/// Pods and rules of a ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ClusterNetworkPolicySpec {
    /// Tier of the policy.
    pub tier: PolicyTier,
    /// Position in the tier.
    pub priority: Priority,
    /// Pods that the policy applies to.
    pub subject: Parsed<Subject>,
    /// Rules for incoming traffic; the first match decides.
    #[serde(default, deserialize_with = "null_as_default")]
    pub ingress: Vec<Parsed<ClusterRule<IngressPeer>>>,
    /// Rules for outgoing traffic; the first match decides.
    #[serde(default, deserialize_with = "null_as_default")]
    pub egress: Vec<Parsed<ClusterRule<EgressPeer>>>,
}

/// Tier of a ClusterNetworkPolicy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum PolicyTier {
    /// The tier before NetworkPolicies.
    Admin,
    /// The tier for pods that no NetworkPolicy isolates.
    Baseline,
}

/// Priority in a tier, 0 to 1000. Lower values come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "i64")]
pub struct Priority(pub u16);

/// A priority is not between 0 and 1000.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("priority {0} is not between 0 and 1000")]
pub struct PriorityError(i64);

impl TryFrom<i64> for Priority {
    type Error = PriorityError;

    fn try_from(value: i64) -> Result<Self, PriorityError> {
        let valid = u16::try_from(value).ok().filter(|priority| *priority <= 1000);
        valid.map(Self).ok_or(PriorityError(value))
    }
}

/// Pods that a ClusterNetworkPolicy applies to. Pods on the host's network are never subjects.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Subject {
    /// All pods of the selected namespaces.
    Namespaces(Parsed<LabelSelector>),
    /// Selected pods of the selected namespaces.
    Pods(Parsed<NamespacedPod>),
}

/// Pods that two selectors select together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamespacedPod {
    /// Selector of the pods' namespaces.
    #[serde(default, deserialize_with = "null_as_default")]
    pub namespace_selector: LabelSelector,
    /// Selector of pods in these namespaces.
    #[serde(default, deserialize_with = "null_as_default")]
    pub pod_selector: LabelSelector,
}

/// A rule of a ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterRule<P> {
    /// Name for reports; empty if absent.
    pub name: String,
    /// Verdict for traffic that matches.
    pub action: RuleAction,
    /// Peers, `from` or `to`. A rule without a peer matches nothing.
    pub peers: Vec<Parsed<P>>,
    /// Protocols and ports; every protocol if empty.
    pub protocols: Vec<Parsed<TransportProtocol>>,
    /// Names of fields of a later version of the API.
    pub unknown: Vec<String>,
}

/// Peer type of one direction.
trait ClusterPeer: DeserializeOwned {
    /// Name of the rule's field that lists the peers.
    const FIELD: &'static str;
}

impl ClusterPeer for IngressPeer {
    const FIELD: &'static str = "from";
}

impl ClusterPeer for EgressPeer {
    const FIELD: &'static str = "to";
}

#[allow(private_bounds)]
impl<'de, P: ClusterPeer> Deserialize<'de> for ClusterRule<P> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Removes a field and reads its value. An absent field reads as `null`.
        fn take<T: DeserializeOwned, E: Error>(
            fields: &mut Map<String, Value>,
            name: &str,
        ) -> Result<T, E> {
            let value = fields.remove(name).unwrap_or_default();
            T::deserialize(value).map_err(|error| E::custom(format!("{name}: {error}")))
        }
        let mut fields = Map::deserialize(deserializer)?;
        Ok(Self {
            name: take::<Option<_>, _>(&mut fields, "name")?.unwrap_or_default(),
            action: take(&mut fields, "action")?,
            peers: take::<Option<_>, _>(&mut fields, P::FIELD)?.unwrap_or_default(),
            protocols: take::<Option<_>, _>(&mut fields, "protocols")?.unwrap_or_default(),
            unknown: fields.into_iter().map(|(name, _)| name).collect(),
        })
    }
}

impl<P> ClusterRule<P> {
    /// Returns whether all parts of the rule are of known types.
    ///
    /// A rule with a part of an unknown type fails closed: if the action is `Accept`, the part
    /// matches nothing; otherwise the rule denies all traffic.
    pub fn is_understood(&self) -> bool {
        self.unknown.is_empty()
            && self.peers.iter().all(|peer| peer.valid().is_some())
            && self.protocols.iter().all(|protocol| protocol.valid().is_some())
    }
}

/// Verdict of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum RuleAction {
    /// Accepts the traffic in this direction; no later policy is evaluated.
    Accept,
    /// Drops the traffic; no later policy is evaluated.
    Deny,
    /// Skips the rest of the tier.
    Pass,
}

/// A source in a rule. A peer of an unknown type is unreadable.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum IngressPeer {
    /// All pods of the selected namespaces.
    Namespaces(Parsed<LabelSelector>),
    /// Selected pods of the selected namespaces.
    Pods(Parsed<NamespacedPod>),
}

/// A destination in a rule. A peer of an unknown type is unreadable; domain names are one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum EgressPeer {
    /// All pods of the selected namespaces.
    Namespaces(Parsed<LabelSelector>),
    /// Selected pods of the selected namespaces.
    Pods(Parsed<NamespacedPod>),
    /// All addresses of the selected nodes (experimental channel).
    Nodes(Parsed<LabelSelector>),
    /// Addresses, which may belong to pods, too.
    Networks(Vec<Parsed<Cidr>>),
}

/// Protocol and destination ports of a rule. An entry of an unknown type is unreadable.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TransportProtocol {
    /// TCP with these destination ports.
    Tcp(TransportMatch),
    /// UDP with these destination ports.
    Udp(TransportMatch),
    /// SCTP with these destination ports.
    Sctp(TransportMatch),
    /// Ports that the destination pod has declared under this name, with their protocols
    /// (experimental channel).
    DestinationNamedPort(String),
}

/// Ports of a protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TransportMatch {
    /// Destination ports; all ports if absent.
    pub destination_port: Option<Parsed<Port>>,
}
