//! Pods of the cluster whose objects a node needs: the peers that its program refers to.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::api::{LabelSelector, Operator};
use crate::model::{Action, Direction, Inventory, Peers, PodTerm, Policy, PortSpec, Ports};
use crate::program::{Set, SetKey};

use super::Engine;

/// Maximum length of a label selector in a request to the API server, in bytes.
const MAX_SELECTOR: usize = 1024;

/// A group of pods that the API server can select.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PodScope {
    /// All pods of the cluster.
    All,
    /// All pods of a namespace.
    Namespace(String),
    /// Pods of all namespaces with matching labels, as the text of a request's `labelSelector`.
    Labelled(String),
}

impl fmt::Display for PodScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all pods"),
            Self::Namespace(name) => write!(f, "pods of namespace {name}"),
            Self::Labelled(selector) => write!(f, "pods with {selector} of all namespaces"),
        }
    }
}

impl PodScope {
    /// Returns the scope of the pods with matching labels in all namespaces; all pods if a request
    /// cannot carry the selector.
    fn labelled(selector: &LabelSelector) -> Self {
        selector_text(selector).map_or(Self::All, Self::Labelled)
    }
}

/// Returns a selector in the form of a request; `None` if it is empty, too long, or contains
/// characters that labels cannot have.
fn selector_text(selector: &LabelSelector) -> Option<String> {
    let mut parts = Vec::new();
    let mut words = Vec::new();
    for (key, value) in &selector.match_labels {
        words.extend([key, value]);
        parts.push(format!("{key}={value}"));
    }
    for requirement in &selector.match_expressions {
        let key = &requirement.key;
        words.push(key);
        let list = |values: &BTreeSet<String>| {
            values.iter().map(String::as_str).collect::<Vec<_>>().join(",")
        };
        parts.push(match &requirement.operator {
            Operator::In(values) => format!("{key} in ({})", list(values)),
            Operator::NotIn(values) => format!("{key} notin ({})", list(values)),
            Operator::Exists => key.clone(),
            Operator::DoesNotExist => format!("!{key}"),
        });
        if let Operator::In(values) | Operator::NotIn(values) = &requirement.operator {
            words.extend(values);
        }
    }
    let is_label =
        |word: &&String| word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
    let text = parts.join(",");
    let is_usable = !text.is_empty() && text.len() <= MAX_SELECTOR && words.iter().all(is_label);
    is_usable.then_some(text)
}

impl Engine {
    /// Returns the scopes that contain all pods to which the program refers, besides the pods of
    /// this node; `None` if they have not changed since the last call.
    ///
    /// The program with the pods of these scopes and of this node is the same as with all pods of
    /// the cluster, as long as no two pods have the same address. Every pod of the cluster, in the
    /// form of `namespaceSelector: {}` without a pod selector, needs no scope: the pod CIDRs stand
    /// for them.
    pub fn take_demand(&mut self) -> Option<BTreeSet<PodScope>> {
        if !std::mem::take(&mut self.may_demand_change) {
            return None;
        }
        let mut terms = BTreeSet::new();
        let mut demand = BTreeSet::new();
        for set in self.program.sets.values() {
            match terms_of(set) {
                Some(of_set) => terms.extend(of_set),
                None => demand.extend([PodScope::All]),
            }
        }
        for term in terms {
            add_scopes(&self.inventory, term, &mut demand);
        }
        demand.extend(self.guarded.values().flatten().cloned());
        if demand.contains(&PodScope::All) {
            demand = BTreeSet::from([PodScope::All]);
        }
        let is_new = self.demand.as_ref() != Some(&demand);
        self.demand = Some(demand);
        self.demand.clone().filter(|_| is_new)
    }

    /// Sets the scopes whose pods have been reported completely; `None` if all pods of the cluster
    /// have been. Initially, all pods count as reported.
    ///
    /// A rule that denies or passes would let its peers' traffic through while the peers are not
    /// known. A new interface is therefore in quarantine until the peers of such rules are
    /// complete; an interface with a profile keeps the profile until then.
    pub fn set_complete(&mut self, scopes: Option<BTreeSet<PodScope>>) {
        self.complete = scopes;
        self.refresh_guarded();
    }

    /// Assigns the profiles of the interfaces that may wait for pods.
    pub(super) fn refresh_guarded(&mut self) {
        let interfaces: BTreeSet<_> = self.guarded.keys().map(|(name, _)| name.clone()).collect();
        interfaces.iter().for_each(|interface| self.refresh(interface));
    }

    /// Records the scopes without which a profile would let forbidden traffic through. Returns
    /// whether one of them is not complete.
    pub(super) fn waits(&mut self, place: &(String, Direction), policies: &[Arc<Policy>]) -> bool {
        let Some(complete) = &self.complete else { return false };
        let scopes = self.guarded_scopes(policies, place.1);
        let waits = !complete.contains(&PodScope::All) && !scopes.is_subset(complete);
        self.may_demand_change = true;
        match scopes.is_empty() {
            true => self.guarded.remove(place),
            false => self.guarded.insert(place.clone(), scopes),
        };
        waits
    }

    /// Returns the scopes of the peers that rules deny or pass.
    fn guarded_scopes(&self, policies: &[Arc<Policy>], direction: Direction) -> BTreeSet<PodScope> {
        let mut scopes = BTreeSet::new();
        let rules = policies.iter().flat_map(|policy| policy.rules(direction).unwrap_or(&[]));
        for rule in rules.filter(|rule| rule.action != Action::Accept) {
            rule.peers.terms.iter().for_each(|term| add_scopes(&self.inventory, term, &mut scopes));
            if direction == Direction::Egress && names_ports_of_all(&rule.peers, &rule.ports) {
                scopes.insert(PodScope::All);
            }
        }
        scopes
    }
}

/// Returns the terms that select the pods of a set; `None` if all pods of the cluster are members.
fn terms_of(set: &Set) -> Option<&[PodTerm]> {
    match &set.key {
        SetKey::Pods(terms) | SetKey::NamedPorts { pods: Some(terms), .. } => Some(terms),
        SetKey::NamedPorts { pods: None, .. } => None,
        SetKey::AllPods | SetKey::Blocks(_) | SetKey::Nodes(_) | SetKey::Ports(_) => Some(&[]),
    }
}

fn names_ports_of_all(peers: &Peers, ports: &Ports) -> bool {
    let is_named = |port: &PortSpec| matches!(port, PortSpec::Named(..));
    (peers.any || peers.all_pods) && matches!(ports, Ports::List(list) if list.iter().any(is_named))
}

/// Adds the scopes that contain the pods of a term.
fn add_scopes(inventory: &Inventory, term: &PodTerm, scopes: &mut BTreeSet<PodScope>) {
    if let Some(name) = term.namespace() {
        scopes.insert(PodScope::Namespace(name.to_owned()));
    } else if term.is_of_all_namespaces() {
        scopes.insert(PodScope::labelled(&term.pods));
    } else {
        let namespaces = inventory.namespaces();
        let selected =
            namespaces.filter(|(name, labels)| term.selects_namespace(name, Some(labels)));
        scopes.extend(selected.map(|(name, _)| PodScope::Namespace(name.to_owned())));
    }
}
