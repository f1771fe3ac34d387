//! Incremental compilation: each change of an object becomes a small [`Difference`].
//!
//! The caller reports every change of the cluster's objects and of this node's interfaces, and then
//! takes the difference since the last call of [`Engine::take_difference`]. Applied in order, the
//! differences give the program of [`compile`](crate::compile::compile).

mod demand;
mod profiles;
mod record;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::api::{ClusterNetworkPolicy, Defect, Labels, Namespace, NetworkPolicy, Node, Pod};
use crate::compile::{
    Families, Profile, ProfileKey, applicable, elements, pod_elements, quarantine, sort,
};
use crate::model::{Direction, Inventory, NodeInfo, PodId, PodInfo, Policy, PolicyId, TermIndex};
use crate::program::{Difference, Element, Program, SetKey};

pub use self::demand::PodScope;
use self::record::Record;

/// Both directions, in the order of assignment.
const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Incremental compiler for the pods of one node.
#[derive(Debug)]
pub struct Engine {
    inventory: Inventory,
    families: Families,
    program: Program,
    /// Earlier values of the parts of `program` that have changed since the last call of
    /// [`Engine::take_difference`].
    record: Record,
    /// Policies by subject, the [`PodTerm`](crate::model::PodTerm) that selects the pods to which a
    /// policy applies.
    subjects: TermIndex<PolicyId>,
    /// Names of the program's sets of pods and of named ports, by the terms that select the pods.
    members: TermIndex<String>,
    /// Names of the sets that contain a named port of all pods, not only of the pods that a term
    /// selects.
    ports_of_all: BTreeSet<String>,
    /// Profiles in use, with the number of their users.
    profiles: HashMap<ProfileKey, (Profile, usize)>,
    /// Profile of each interface and direction; `None` in quarantine.
    assigned: BTreeMap<(String, Direction), Option<ProfileKey>>,
    /// Number of profiles that use each set, counter, chain and port map, by its name.
    uses: HashMap<String, usize>,
    /// Scopes of pods that have been reported completely; `None` if all pods have been.
    complete: Option<BTreeSet<PodScope>>,
    /// Scopes that the profile of an interface and direction needs before its first use.
    guarded: BTreeMap<(String, Direction), BTreeSet<PodScope>>,
    /// Last result of [`Engine::take_demand`].
    demand: Option<BTreeSet<PodScope>>,
    /// True if the demand may have changed since the last call of [`Engine::take_demand`].
    may_demand_change: bool,
}

impl Engine {
    /// Creates an engine without objects.
    pub fn new(families: Families) -> Self {
        Self {
            inventory: Inventory::default(),
            families,
            program: Program::default(),
            record: Record::default(),
            subjects: TermIndex::default(),
            members: TermIndex::default(),
            ports_of_all: BTreeSet::new(),
            profiles: HashMap::new(),
            assigned: BTreeMap::new(),
            uses: HashMap::new(),
            complete: None,
            guarded: BTreeMap::new(),
            demand: None,
            may_demand_change: true,
        }
    }

    /// Returns the objects as last reported.
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Returns the present program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Returns the policies that apply to a pod of this node in a direction, in the order of
    /// evaluation; `None` while the pod or its namespace is not known.
    pub fn policies_of(&self, pod: &PodId, direction: Direction) -> Option<Vec<Arc<Policy>>> {
        applicable(&self.inventory, pod, direction)
    }

    /// Returns the changes since the last call.
    pub fn take_difference(&mut self) -> Difference {
        std::mem::take(&mut self.record).difference(&self.program)
    }

    /// Adds or replaces a pod.
    pub fn upsert_pod(&mut self, pod: &Pod) {
        self.set_pod(&PodId::of(pod), PodInfo::of(pod));
    }

    /// Removes a pod.
    pub fn remove_pod(&mut self, id: &PodId) {
        self.set_pod(id, None);
    }

    /// Adds, replaces or removes a pod by its properties.
    pub fn set_pod(&mut self, id: &PodId, info: Option<PodInfo>) {
        if self.inventory.pod(id) == info.as_ref() {
            return;
        }
        let mut addresses: BTreeSet<_> =
            info.iter().flat_map(|info| info.addresses.iter().copied()).collect();
        addresses.extend(self.addresses_of(id));
        self.around(&addresses, |inventory| inventory.set_pod(id.clone(), info));
        self.refresh_pod(id);
    }

    /// Adds or replaces a namespace.
    pub fn upsert_namespace(&mut self, namespace: &Namespace) {
        self.set_namespace(&namespace.metadata.name, &namespace.metadata.labels);
    }

    /// Adds or replaces a namespace by its properties.
    pub fn set_namespace(&mut self, name: &str, labels: &Labels) {
        self.change_namespace(name, |inventory| inventory.set_namespace(name, labels));
    }

    /// Removes a namespace.
    pub fn remove_namespace(&mut self, name: &str) {
        self.change_namespace(name, |inventory| inventory.remove_namespace(name));
    }

    /// Adds or replaces a node.
    pub fn upsert_node(&mut self, node: &Node) {
        self.set_node(node.metadata.name.clone(), NodeInfo::of(node));
    }

    /// Adds or replaces a node by its properties.
    pub fn set_node(&mut self, name: String, info: NodeInfo) {
        self.inventory.set_node(name, info);
        self.refill(|key| matches!(key, SetKey::Nodes(_)));
    }

    /// Removes a node.
    pub fn remove_node(&mut self, name: &str) {
        self.inventory.remove_node(name);
        self.refill(|key| matches!(key, SetKey::Nodes(_)));
    }

    /// Sets the pod CIDRs of the cluster; see [`Inventory::set_pod_networks`].
    pub fn set_pod_networks(&mut self, networks: &[IpNet], excluded: &[IpAddr]) {
        self.inventory.set_pod_networks(networks, excluded);
        self.refill(|key| *key == SetKey::AllPods);
    }

    /// Adds or replaces a NetworkPolicy. Returns the parts that cannot be enforced.
    pub fn upsert_network_policy(&mut self, object: &NetworkPolicy) -> Vec<Defect> {
        let namespace = object.metadata.namespace.clone();
        let id = PolicyId::NetworkPolicy { namespace, name: object.metadata.name.clone() };
        let old = self.inventory.policy(&id).cloned();
        let (id, defects) = self.inventory.upsert_network_policy(object);
        self.change_policy(&id, old);
        defects
    }

    /// Adds or replaces a ClusterNetworkPolicy. Returns the parts that cannot be enforced.
    pub fn upsert_cluster_policy(&mut self, object: &ClusterNetworkPolicy) -> Vec<Defect> {
        let id = PolicyId::ClusterNetworkPolicy { name: object.metadata.name.clone() };
        let old = self.inventory.policy(&id).cloned();
        let (id, defects) = self.inventory.upsert_cluster_policy(object);
        self.change_policy(&id, old);
        defects
    }

    /// Adds or replaces a resolved policy, for example one that was stored.
    pub fn set_policy(&mut self, policy: Policy) {
        let id = policy.id.clone();
        let old = self.inventory.policy(&id).cloned();
        self.inventory.set_policy(Arc::new(policy));
        self.change_policy(&id, old);
    }

    /// Removes a policy.
    pub fn remove_policy(&mut self, id: &PolicyId) {
        let old = self.inventory.policy(id).cloned();
        self.inventory.remove_policy(id);
        self.change_policy(id, old);
    }

    /// Assigns an interface to a pod of this node. Unknown pods are put into quarantine: all their
    /// forwarded traffic is refused.
    pub fn attach(&mut self, interface: &str, pod: PodId) {
        self.inventory.attach(interface, pod);
        self.refresh(interface);
    }

    /// Assigns an interface to an unknown pod of this node to which no policy applies. All its
    /// traffic is accepted until the next call for the interface.
    pub fn accept(&mut self, interface: &str) {
        self.inventory.accept(interface);
        for direction in DIRECTIONS {
            self.assign(interface, direction, Some(ProfileKey::without_policies(direction)));
        }
    }

    /// Removes the interface of a pod.
    pub fn detach(&mut self, interface: &str) {
        self.inventory.detach(interface);
        self.may_demand_change = true;
        for direction in DIRECTIONS {
            let place = (interface.to_owned(), direction);
            self.guarded.remove(&place);
            let old = self.assigned.remove(&place);
            self.record.assign(&mut self.program, interface, direction, None);
            if let Some(Some(key)) = old {
                self.release(&key);
            }
        }
    }

    fn addresses_of(&self, id: &PodId) -> impl Iterator<Item = IpAddr> {
        self.inventory.pod(id).into_iter().flat_map(|info| info.addresses.iter().copied())
    }

    /// Changes the inventory, and the elements that pods with these addresses contribute to sets.
    fn around(&mut self, addresses: &BTreeSet<IpAddr>, change: impl FnOnce(&mut Inventory)) {
        let before = self.contributions(addresses);
        change(&mut self.inventory);
        let after = self.contributions(addresses);
        for (set, element) in before.difference(&after) {
            self.record.element(&mut self.program, set, *element, false);
        }
        for (set, element) in after.difference(&before) {
            self.record.element(&mut self.program, set, *element, true);
        }
    }

    /// Returns the elements that the pods with these addresses contribute to sets, each with the
    /// name of its set. Elements with other addresses of these pods are left out.
    fn contributions(&self, addresses: &BTreeSet<IpAddr>) -> BTreeSet<(String, Element)> {
        let mut found = BTreeSet::new();
        let owners = addresses.iter().filter_map(|address| self.inventory.owner(*address));
        for (id, info) in owners.collect::<BTreeMap<_, _>>() {
            let labels = self.inventory.namespace(&id.namespace);
            let selected = self.members.matching(&id.namespace, labels, &info.labels);
            let names: BTreeSet<_> = selected.chain(&self.ports_of_all).collect();
            for name in names {
                let Some(set) = self.program.sets.get(name) else { continue };
                for element in pod_elements(&self.inventory, set, id, info) {
                    if element.address().is_some_and(|address| addresses.contains(&address)) {
                        found.insert((name.clone(), element));
                    }
                }
            }
        }
        found
    }

    fn change_namespace(&mut self, name: &str, change: impl FnOnce(&mut Inventory)) {
        let pods = self.inventory.pods_of(name);
        let addresses = pods.flat_map(|(_, info)| info.addresses.iter().copied()).collect();
        self.around(&addresses, change);
        self.may_demand_change = true;
        self.refresh_where(|pod| pod.namespace == name);
        self.refresh_guarded();
    }

    /// Compiles the profiles of the pods that a policy applies to, or has applied to.
    fn change_policy(&mut self, id: &PolicyId, old: Option<Arc<Policy>>) {
        let new = self.inventory.policy(id).cloned();
        if let (Some(old), Some(new)) = (&old, &new)
            && old == new
        {
            // The keys of profiles compare policies by pointer. The old object must stay, because
            // equal policies in two objects would have two profiles.
            self.inventory.set_policy(Arc::clone(old));
            return;
        }
        let subject = |policy: &Option<Arc<Policy>>| policy.as_ref()?.subject.clone();
        let terms = [subject(&old), subject(&new)];
        if let Some(term) = &terms[0] {
            self.subjects.remove(term, id);
        }
        if let Some(term) = &terms[1] {
            self.subjects.insert(term, id.clone());
        }
        let concerned: Vec<_> = self
            .inventory
            .interfaces()
            .iter()
            .filter(|(_, pod)| {
                let labels = self.inventory.namespace(&pod.namespace);
                self.inventory.pod(pod).is_some_and(|info| {
                    let terms = terms.iter().flatten();
                    terms.clone().any(|term| term.matches(&pod.namespace, labels, &info.labels))
                })
            })
            .map(|(interface, _)| interface.clone())
            .collect();
        concerned.iter().for_each(|interface| self.refresh(interface));
    }

    fn refresh_pod(&mut self, id: &PodId) {
        self.refresh_where(|pod| pod == id);
    }

    fn refresh_where(&mut self, concerned: impl Fn(&PodId) -> bool) {
        let interfaces = self.inventory.interfaces().iter();
        let concerned = interfaces.filter(|(_, pod)| concerned(pod));
        let interfaces: Vec<_> = concerned.map(|(interface, _)| interface.clone()).collect();
        interfaces.iter().for_each(|interface| self.refresh(interface));
    }

    /// Assigns the profiles of an interface's pod.
    fn refresh(&mut self, interface: &str) {
        let Some(pod) = self.inventory.interfaces().get(interface).cloned() else { return };
        for direction in DIRECTIONS {
            let mut key = self.key(&pod, direction);
            let place = (interface.to_owned(), direction);
            let policies = key.as_ref().map(|key| key.policies.clone()).unwrap_or_default();
            if self.waits(&place, &policies) {
                if matches!(self.assigned.get(&place), Some(Some(_))) {
                    continue;
                }
                key = None;
            }
            self.assign(interface, direction, key);
        }
    }

    /// Assigns a profile to an interface; quarantine if there is no key.
    fn assign(&mut self, interface: &str, direction: Direction, key: Option<ProfileKey>) {
        let place = (interface.to_owned(), direction);
        if self.assigned.get(&place) == Some(&key) {
            return;
        }
        // The new profile is added first, so that sets, counters, chains and port maps that both
        // profiles use stay in the program.
        let verdicts = match &key {
            Some(key) => self.retain(key),
            None => (quarantine().entry, None),
        };
        self.record.assign(&mut self.program, interface, direction, Some(verdicts));
        if let Some(Some(old)) = self.assigned.insert(place, key) {
            self.release(&old);
        }
    }

    /// Returns the key of a pod's profile; `None` while the pod or its namespace is not known.
    fn key(&self, pod: &PodId, direction: Direction) -> Option<ProfileKey> {
        let info = self.inventory.pod(pod)?;
        let labels = self.inventory.namespace(&pod.namespace)?;
        let ids = self.subjects.matching(&pod.namespace, Some(labels), &info.labels);
        let policies = ids.filter_map(|id| self.inventory.policy(id));
        let mut policies: Vec<_> =
            policies.filter(|policy| policy.rules(direction).is_some()).cloned().collect();
        sort(&mut policies);
        ProfileKey::with(&self.inventory, pod, direction, policies)
    }

    /// Sets the elements of all sets of a kind again.
    fn refill(&mut self, is_concerned: impl Fn(&SetKey) -> bool) {
        let concerned = self.program.sets.iter().filter(|(_, set)| is_concerned(&set.key));
        let sets: Vec<_> = concerned.map(|(name, set)| (name.clone(), set.clone())).collect();
        for (name, set) in sets {
            self.fill(&name, &elements(&self.inventory, &set));
        }
    }

    /// Makes the elements of a set equal to `wanted`.
    fn fill(&mut self, name: &str, wanted: &BTreeSet<Element>) {
        let present: BTreeSet<_> = self.program.elements_of(name).copied().collect();
        for element in present.difference(wanted) {
            self.record.element(&mut self.program, name, *element, false);
        }
        for element in wanted.difference(&present) {
            self.record.element(&mut self.program, name, *element, true);
        }
    }
}
