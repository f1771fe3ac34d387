//! Answers of the control socket about policies and pods of this node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use skein_policy::model::{Direction, PodId, Policy, PolicyId, Tier};

use super::attachments::{Attachment, Attachments, Identity};
use super::describe::rule_text;
use super::objects::Objects;
use super::service::PolicyService;
use super::source::ServiceEnded;

/// Both directions, in the order of the answers.
const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// A policy, as `skein-agent policy list` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PolicySummary {
    /// Kind of the object.
    pub kind: String,
    /// Namespace of the object; empty for a ClusterNetworkPolicy.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// Tier of a ClusterNetworkPolicy, `Admin` or `Baseline`; `None` for a NetworkPolicy.
    pub tier: Option<String>,
    /// Priority of a ClusterNetworkPolicy.
    pub priority: Option<u16>,
    /// Directions that the policy concerns, `ingress` and `egress`.
    pub directions: Vec<String>,
    /// Number of pods of this node that the policy selects.
    pub pods: usize,
    /// Parts that cannot be enforced, with their fields.
    pub defects: Vec<String>,
}

/// A pod of this node, as `skein-agent policy show` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodReport {
    /// Namespace and name of the pod; empty if they are not known.
    pub pod: String,
    /// Node's end of the pod's link.
    pub interface: String,
    /// Addresses of the pod.
    pub addresses: Vec<IpAddr>,
    /// Relation of the pod to the policies.
    pub state: PodState,
    /// Labels of the pod.
    pub labels: BTreeMap<String, String>,
    /// Policies by direction: ingress, then egress.
    pub directions: Vec<DirectionReport>,
}

/// Relation of a pod to the policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// The policies are enforced.
    Enforced,
    /// The pod's object is not known, but no policy can apply to the pod.
    WithoutPolicies,
    /// The pod's object is not known: all forwarded traffic is refused.
    Quarantined,
}

/// Policies of a pod for one direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DirectionReport {
    /// The direction, `ingress` or `egress`.
    pub direction: String,
    /// True if a NetworkPolicy isolates the pod: traffic that no rule allows is refused.
    pub isolated: bool,
    /// Policies in the order of evaluation.
    pub policies: Vec<AppliedPolicy>,
}

/// A policy that applies to a pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AppliedPolicy {
    /// Kind and name of the policy.
    pub policy: String,
    /// Tier of the policy, with its priority.
    pub tier: String,
    /// Rules in words, in the order of evaluation.
    pub rules: Vec<String>,
    /// Parts that cannot be enforced.
    pub defects: Vec<String>,
}

impl PolicyService {
    /// Returns all policies.
    ///
    /// # Errors
    /// [`ServiceEnded`] if the service has ended.
    pub async fn policies(&self) -> Result<Vec<PolicySummary>, ServiceEnded> {
        self.inspect(|objects, attachments| {
            let policies = objects.engine.inventory().policies();
            policies.map(|policy| summary(policy, objects, attachments)).collect()
        })
        .await
    }

    /// Returns the interfaces of a pod of this node; empty if this node has no such pod. `name` is
    /// the name with the namespace (`default` if it is missing), or the name of an interface.
    ///
    /// # Errors
    /// [`ServiceEnded`] if the service has ended.
    pub async fn pod(&self, name: &str) -> Result<Vec<PodReport>, ServiceEnded> {
        let interface = name.to_owned();
        let wanted = match name.contains('/') {
            true => name.to_owned(),
            false => format!("default/{name}"),
        };
        self.inspect(move |objects, attachments| {
            let reports = attachments.iter().map(|(one, identity)| report(one, identity, objects));
            reports.filter(|found| found.pod == wanted || found.interface == interface).collect()
        })
        .await
    }
}

fn summary(policy: &Policy, objects: &Objects, attachments: &Attachments) -> PolicySummary {
    let (kind, namespace, name) = match &policy.id {
        PolicyId::NetworkPolicy { namespace, name } => {
            ("NetworkPolicy", namespace.clone(), name.clone())
        }
        PolicyId::ClusterNetworkPolicy { name } => {
            ("ClusterNetworkPolicy", String::new(), name.clone())
        }
    };
    let (tier, priority) = match policy.tier {
        Tier::Admin(priority) => (Some("Admin"), Some(priority)),
        Tier::NetworkPolicy => (None, None),
        Tier::Baseline(priority) => (Some("Baseline"), Some(priority)),
    };
    let directions = DIRECTIONS.into_iter().filter(|one| policy.rules(*one).is_some());
    let inventory = objects.engine.inventory();
    let is_selected = |identity: &Identity| {
        let (Identity::Known(id) | Identity::Unlabelled(id)) = identity else { return false };
        let Some(info) = inventory.pod(id) else { return false };
        let labels = inventory.namespace(&id.namespace);
        let subject = policy.subject.as_ref();
        subject.is_some_and(|term| term.matches(&id.namespace, labels, &info.labels))
    };
    PolicySummary {
        kind: kind.to_owned(),
        namespace,
        name,
        tier: tier.map(str::to_owned),
        priority,
        directions: directions.map(|one| direction_text(one).to_owned()).collect(),
        pods: attachments.iter().filter(|(_, identity)| is_selected(identity)).count(),
        defects: defects(objects, &policy.id),
    }
}

fn report(attachment: &Attachment, identity: &Identity, objects: &Objects) -> PodReport {
    let named = attachment.pod.as_ref();
    let named = named.map(|pod| PodId { namespace: pod.namespace.clone(), name: pod.name.clone() });
    let (id, state) = match identity {
        Identity::Known(id) | Identity::Unlabelled(id) => (Some(id.clone()), PodState::Enforced),
        Identity::WithoutPolicies => (named, PodState::WithoutPolicies),
        Identity::Unknown => (named, PodState::Quarantined),
    };
    let is_enforced = state == PodState::Enforced;
    let info = id.as_ref().filter(|_| is_enforced);
    let info = info.and_then(|id| objects.engine.inventory().pod(id));
    let directions = id
        .iter()
        .filter(|_| is_enforced)
        .flat_map(|id| DIRECTIONS.map(|direction| direction_report(id, direction, objects)));
    PodReport {
        directions: directions.collect(),
        pod: id.map(|id| format!("{}/{}", id.namespace, id.name)).unwrap_or_default(),
        interface: attachment.interface.clone(),
        addresses: attachment.addresses.clone(),
        state,
        labels: info.map(|info| (*info.labels).clone()).unwrap_or_default(),
    }
}

fn direction_report(id: &PodId, direction: Direction, objects: &Objects) -> DirectionReport {
    let policies = objects.engine.policies_of(id, direction).unwrap_or_default();
    DirectionReport {
        direction: direction_text(direction).to_owned(),
        isolated: policies.iter().any(|policy| policy.tier == Tier::NetworkPolicy),
        policies: policies
            .iter()
            .map(|policy| {
                let rules = policy.rules(direction).unwrap_or_default().iter();
                AppliedPolicy {
                    policy: policy.id.to_string(),
                    tier: match policy.tier {
                        Tier::Admin(priority) => format!("Admin {priority}"),
                        Tier::NetworkPolicy => "NetworkPolicy".to_owned(),
                        Tier::Baseline(priority) => format!("Baseline {priority}"),
                    },
                    rules: rules.map(|rule| rule_text(rule, direction)).collect(),
                    defects: defects(objects, &policy.id),
                }
            })
            .collect(),
    }
}

fn defects(objects: &Objects, id: &PolicyId) -> Vec<String> {
    let defects = objects.defects.get(id).into_iter().flatten();
    defects.map(|defect| format!("{}: {}", defect.field, defect.reason)).collect()
}

fn direction_text(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}
