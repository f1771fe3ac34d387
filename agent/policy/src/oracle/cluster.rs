//! Evaluation of ClusterNetworkPolicies, tier by tier.

use crate::api::{
    ClusterNetworkPolicySpec, ClusterRule, EgressPeer, IngressPeer, LabelSelector, Parsed, Pod,
    PolicyTier, Protocol, RuleAction, Subject, TransportMatch, TransportProtocol,
};

use super::select::{selects, selects_pod};
use super::{Connection, Reason, Ruling, Side, World, peer_address, serves};

/// Returns the decision of a tier; `None` if no rule matches or a rule passes the connection on.
pub(super) fn decide(
    world: &World<'_>,
    admin: bool,
    side: Side,
    subject: &Pod,
    connection: &Connection<'_>,
) -> Option<Ruling> {
    let mut policies = Vec::new();
    for policy in world.cluster_policies {
        if let Parsed::Valid(spec) = &policy.spec
            && (spec.tier == PolicyTier::Admin) == admin
            && applies(world, spec, subject)
        {
            policies.push((spec.priority, policy.metadata.name.as_str(), spec));
        }
    }
    policies.sort_by_key(|(priority, name, _)| (*priority, *name));
    for (_, name, spec) in policies {
        let evaluation = Evaluation { world, side, subject, connection };
        let matched = match side {
            Side::Ingress => evaluation.first(&spec.ingress, Evaluation::ingress_peer),
            Side::Egress => evaluation.first(&spec.egress, Evaluation::egress_peer),
        };
        if let Some((index, action)) = matched {
            let reason = Reason::ClusterRule(name.to_owned(), index);
            return match action {
                RuleAction::Accept => Some(Ruling { allowed: true, reason }),
                RuleAction::Deny => Some(Ruling { allowed: false, reason }),
                RuleAction::Pass => None,
            };
        }
    }
    None
}

fn applies(world: &World<'_>, spec: &ClusterNetworkPolicySpec, subject: &Pod) -> bool {
    match spec.subject.valid() {
        None => false,
        Some(Subject::Namespaces(namespaces)) => namespaces.valid().is_some_and(|namespaces| {
            selects_pod(world, namespaces, &LabelSelector::default(), subject)
        }),
        Some(Subject::Pods(pods)) => pods.valid().is_some_and(|pods| {
            selects_pod(world, &pods.namespace_selector, &pods.pod_selector, subject)
        }),
    }
}

/// A peer of either direction.
trait AddressPeer {
    /// Returns whether the peer is given by addresses, which have no names of ports.
    fn is_address(&self) -> bool;
}

impl AddressPeer for IngressPeer {
    fn is_address(&self) -> bool {
        false
    }
}

impl AddressPeer for EgressPeer {
    fn is_address(&self) -> bool {
        matches!(self, Self::Nodes(_) | Self::Networks(_))
    }
}

fn is_name(protocol: &TransportProtocol) -> bool {
    matches!(protocol, TransportProtocol::DestinationNamedPort(_))
}

struct Evaluation<'a> {
    world: &'a World<'a>,
    side: Side,
    subject: &'a Pod,
    connection: &'a Connection<'a>,
}

impl Evaluation<'_> {
    /// Returns position and action of the first rule that matches.
    fn first<P: AddressPeer>(
        &self,
        rules: &[Parsed<ClusterRule<P>>],
        peer_matches: fn(&Self, &P) -> bool,
    ) -> Option<(usize, RuleAction)> {
        for (index, rule) in rules.iter().enumerate() {
            let Parsed::Valid(rule) = rule else { continue };
            let strange = !rule.unknown.is_empty()
                || rule.peers.iter().any(|peer| matches!(peer, Parsed::Invalid(_)))
                || rule.protocols.iter().any(|one| matches!(one, Parsed::Invalid(_)));
            if strange && rule.action != RuleAction::Accept {
                return Some((index, RuleAction::Deny));
            }
            let peers = rule.peers.iter().filter_map(Parsed::valid);
            let matches = rule.unknown.is_empty()
                && peers.filter(|peer| peer_matches(self, peer)).any(|peer| {
                    let mut protocols = rule.protocols.iter().filter_map(Parsed::valid);
                    rule.protocols.is_empty()
                        || protocols
                            .any(|one| self.protocol(one) && !(is_name(one) && peer.is_address()))
                });
            if matches {
                return Some((index, rule.action));
            }
        }
        None
    }

    fn peer_pod(&self) -> Option<&Pod> {
        self.world.owner(peer_address(self.side, self.connection))
    }

    fn in_namespaces(&self, namespaces: &Parsed<LabelSelector>) -> bool {
        let pod = self.peer_pod().zip(namespaces.valid());
        pod.is_some_and(|(pod, namespaces)| {
            selects_pod(self.world, namespaces, &LabelSelector::default(), pod)
        })
    }

    fn ingress_peer(&self, peer: &IngressPeer) -> bool {
        match peer {
            IngressPeer::Namespaces(namespaces) => self.in_namespaces(namespaces),
            IngressPeer::Pods(pods) => {
                self.peer_pod().zip(pods.valid()).is_some_and(|(pod, both)| {
                    selects_pod(self.world, &both.namespace_selector, &both.pod_selector, pod)
                })
            }
        }
    }

    fn egress_peer(&self, peer: &EgressPeer) -> bool {
        let address = self.connection.destination;
        match peer {
            EgressPeer::Namespaces(namespaces) => self.in_namespaces(namespaces),
            EgressPeer::Pods(pods) => {
                self.peer_pod().zip(pods.valid()).is_some_and(|(pod, both)| {
                    selects_pod(self.world, &both.namespace_selector, &both.pod_selector, pod)
                })
            }
            EgressPeer::Nodes(nodes) => nodes.valid().is_some_and(|nodes| {
                self.world.nodes.iter().any(|node| {
                    selects(nodes, &node.metadata.labels)
                        && node.addresses().any(|one| one == address)
                })
            }),
            EgressPeer::Networks(networks) => {
                let mut readable = networks.iter().filter_map(Parsed::valid);
                readable.any(|network| network.net().contains(&address))
            }
        }
    }

    fn protocol(&self, entry: &TransportProtocol) -> bool {
        match entry {
            TransportProtocol::Tcp(ports) => self.transport(Protocol::Tcp, ports),
            TransportProtocol::Udp(ports) => self.transport(Protocol::Udp, ports),
            TransportProtocol::Sctp(ports) => self.transport(Protocol::Sctp, ports),
            TransportProtocol::DestinationNamedPort(name) => {
                serves(self.world, self.side, self.subject, self.connection, name)
            }
        }
    }

    fn transport(&self, protocol: Protocol, ports: &TransportMatch) -> bool {
        self.connection.transport.is_some_and(|(one, port)| {
            one == protocol
                && match &ports.destination_port {
                    None => true,
                    Some(Parsed::Invalid(_)) => false,
                    Some(Parsed::Valid(ports)) => (ports.0.start..=ports.0.end).contains(&port),
                }
        })
    }
}
