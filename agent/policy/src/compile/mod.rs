//! The compiler: inventory to [`Program`].

mod membership;
mod ports;
mod profile;
mod tiers;

use std::sync::Arc;

use crate::model::{Direction, Inventory, Mutation, PodId, PodTerm, Policy, Tier, mutated};
use crate::program::{Program, Set};

pub(crate) use membership::{elements, pod_elements};
pub(crate) use profile::{Profile, ProfileKey, quarantine};

/// Address families of the node. The compiler emits nothing for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Families {
    /// True if pods have IPv4 addresses.
    pub v4: bool,
    /// True if pods have IPv6 addresses.
    pub v6: bool,
}

impl Families {
    /// Both families, for dual-stack nodes.
    pub const BOTH: Self = Self { v4: true, v6: true };
}

/// Compiles the whole program for this node.
pub fn compile(inventory: &Inventory, families: Families) -> Program {
    let mut program = Program::default();
    for (interface, pod) in inventory.interfaces() {
        for direction in [Direction::Ingress, Direction::Egress] {
            let profile = profile_of(inventory, pod, direction, families);
            install(&mut program, interface, direction, &profile);
        }
    }
    for interface in inventory.accepted() {
        for direction in [Direction::Ingress, Direction::Egress] {
            let profile = Profile::compile(&ProfileKey::without_policies(direction), families);
            install(&mut program, interface, direction, &profile);
        }
    }
    for (name, set) in &program.sets {
        let elements = elements(inventory, set);
        if !elements.is_empty() {
            program.elements.insert(name.clone(), elements);
        }
    }
    program
}

/// Compiles the profile of a pod of this node for a direction.
fn profile_of(
    inventory: &Inventory,
    pod: &PodId,
    direction: Direction,
    families: Families,
) -> Profile {
    match ProfileKey::of(inventory, pod, direction) {
        Some(key) => Profile::compile(&key, families),
        None => quarantine(),
    }
}

fn install(program: &mut Program, interface: &str, direction: Direction, profile: &Profile) {
    let entry = profile.entry.clone();
    match direction {
        Direction::Ingress => program.to.insert(interface.to_owned(), entry),
        Direction::Egress => program.from.insert(interface.to_owned(), entry),
    };
    if let Some(verdict) = &profile.to_node {
        program.to_node.insert(interface.to_owned(), verdict.clone());
    }
    program.chains.extend(profile.chains.clone());
    program.port_maps.extend(profile.port_maps.clone());
    program.counters.extend(profile.counters.clone());
    program.sets.extend(profile.sets.clone());
}

/// Returns the policies that apply to a pod in a direction, in the order of evaluation; `None`
/// while the pod or its namespace is not known.
pub(crate) fn applicable(
    inventory: &Inventory,
    pod: &PodId,
    direction: Direction,
) -> Option<Vec<Arc<Policy>>> {
    let info = inventory.pod(pod)?;
    let namespace_labels = inventory.namespace(&pod.namespace)?;
    let selects =
        |term: &PodTerm| term.matches(&pod.namespace, Some(namespace_labels), &info.labels);
    let applies = |policy: &&Arc<Policy>| {
        policy.rules(direction).is_some() && policy.subject.as_ref().is_some_and(selects)
    };
    let mut policies: Vec<_> = inventory.policies().filter(applies).cloned().collect();
    sort(&mut policies);
    Some(policies)
}

/// Sorts policies into the order of evaluation.
pub(crate) fn sort(policies: &mut [Arc<Policy>]) {
    policies.sort_by(|a, b| (a.tier, &a.id).cmp(&(b.tier, &b.id)));
}

/// Policies of a profile by tier.
pub(crate) struct Tiers<'a> {
    /// Policies of the tier Admin.
    pub(crate) admin: Vec<&'a Policy>,
    /// NetworkPolicies; a pod with one is isolated.
    pub(crate) network: Vec<&'a Policy>,
    /// Policies of the tier Baseline; they apply to pods that are not isolated.
    pub(crate) baseline: Vec<&'a Policy>,
}

impl<'a> Tiers<'a> {
    fn of(policies: &'a [Arc<Policy>]) -> Self {
        let of = |wanted: fn(Tier) -> bool| {
            policies.iter().map(|policy| &**policy).filter(|one| wanted(one.tier)).collect()
        };
        let network: Vec<_> = of(|tier| tier == Tier::NetworkPolicy);
        let mut baseline = of(|tier| matches!(tier, Tier::Baseline(_)));
        // Only tests activate mutations, which are deliberate faults.
        if !network.is_empty() && !mutated(Mutation::BaselineForIsolated) {
            baseline.clear();
        }
        Self { admin: of(|tier| matches!(tier, Tier::Admin(_))), network, baseline }
    }
}

/// Returns the set with its name.
pub(crate) fn named(set: Set) -> (String, Set) {
    (crate::program::set_name(&set), set)
}
