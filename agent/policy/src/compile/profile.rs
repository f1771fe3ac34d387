//! Profiles: the chains of pods to which the same policies apply.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::api::PortRange;
use crate::api::Protocol;
use crate::model::{Direction, Inventory, NamedPort, Peers, PodId, Policy, PortSpec, Ports};
use crate::program::{
    Attribution, Chain, Family, Match, PortMap, RuleRef, Set, SetKey, Statement, Verdict,
};

use super::{Families, applicable, named, ports, tiers};

/// Maximum number of port ranges that a rule compares one by one; longer lists become a set.
const MAX_INLINE_RANGES: usize = 3;

/// Input of a profile. Pods with equal keys share the profile.
#[derive(Debug, Clone)]
pub(crate) struct ProfileKey {
    /// Direction of the traffic.
    pub(crate) direction: Direction,
    /// Policies in the order of evaluation. Keys are equal if they hold the same objects.
    pub(crate) policies: Vec<Arc<Policy>>,
    /// The pod's named ports that rules for incoming traffic refer to.
    pub(crate) ports: BTreeSet<NamedPort>,
}

impl ProfileKey {
    /// Returns the key of a pod of this node; `None` while the pod or its namespace is not known.
    pub(crate) fn of(inventory: &Inventory, pod: &PodId, direction: Direction) -> Option<Self> {
        let policies = applicable(inventory, pod, direction)?;
        Self::with(inventory, pod, direction, policies)
    }

    /// Returns the key of a pod to which no policy applies.
    pub(crate) fn without_policies(direction: Direction) -> Self {
        Self { direction, policies: Vec::new(), ports: BTreeSet::new() }
    }

    /// Returns the key of a pod to which `policies` apply.
    pub(crate) fn with(
        inventory: &Inventory,
        pod: &PodId,
        direction: Direction,
        policies: Vec<Arc<Policy>>,
    ) -> Option<Self> {
        let declared = &inventory.pod(pod)?.ports;
        let mut ports = BTreeSet::new();
        if direction == Direction::Ingress && !declared.is_empty() {
            let rules = policies.iter().flat_map(|policy| policy.rules(direction).unwrap_or(&[]));
            let names: BTreeSet<_> = rules.flat_map(|rule| ports::names(&rule.ports)).collect();
            ports.extend(declared.iter().filter(|port| names.contains(&*port.name)).cloned());
        }
        Some(Self { direction, policies, ports })
    }

    /// Returns the addresses of the policies in memory, by which keys are compared.
    fn policy_pointers(&self) -> impl Iterator<Item = *const Policy> {
        self.policies.iter().map(Arc::as_ptr)
    }
}

impl PartialEq for ProfileKey {
    fn eq(&self, other: &Self) -> bool {
        self.direction == other.direction
            && self.policy_pointers().eq(other.policy_pointers())
            && self.ports == other.ports
    }
}

impl Eq for ProfileKey {}

impl Hash for ProfileKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.direction.hash(state);
        self.policy_pointers().for_each(|pointer| pointer.hash(state));
        self.ports.hash(state);
    }
}

/// Chains for one direction of pods to which the same policies apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Profile {
    /// Verdict for the interface map.
    pub(crate) entry: Verdict,
    /// Verdict for packets to this node; `None` if no policy concerns them.
    pub(crate) to_node: Option<Verdict>,
    /// Chains that the verdicts lead to, by name.
    pub(crate) chains: BTreeMap<String, Chain>,
    /// Port maps by name.
    pub(crate) port_maps: BTreeMap<String, PortMap>,
    /// Counters of the chains' statements, by name.
    pub(crate) counters: BTreeMap<String, Attribution>,
    /// Sets that the chains refer to, by name.
    pub(crate) sets: BTreeMap<String, Set>,
}

impl Profile {
    fn new(entry: Verdict) -> Self {
        Self {
            entry,
            to_node: None,
            chains: BTreeMap::new(),
            port_maps: BTreeMap::new(),
            counters: BTreeMap::new(),
            sets: BTreeMap::new(),
        }
    }

    /// Compiles the profile of a key.
    pub(crate) fn compile(key: &ProfileKey, families: Families) -> Self {
        let profile = Self::new(Verdict::Accept);
        let mut builder = Builder { key, families, profile };
        let (entry, to_node) = tiers::compile(&mut builder);
        Self { entry, to_node, ..builder.profile }
    }
}

/// Returns the profile of a pod whose policies are not known: all forwarded traffic is refused.
pub(crate) fn quarantine() -> Profile {
    Profile::new(Verdict::Refuse)
}

/// A profile under construction.
pub(super) struct Builder<'a> {
    /// Input of the profile.
    pub(super) key: &'a ProfileKey,
    families: Families,
    profile: Profile,
}

impl Builder<'_> {
    /// Returns a verdict with the effect of `statements`. If the first statement has neither a
    /// condition nor a counter, the function returns the verdict of this statement and adds no
    /// chain. Otherwise, and for a [`Verdict::Dispatch`], the function adds a chain and returns a
    /// verdict that continues in the chain.
    pub(super) fn chain(&mut self, statements: Vec<Statement>) -> Verdict {
        if let Some(first) = statements.first()
            && first.matches.is_empty()
            && first.counter.is_none()
            && !matches!(first.verdict, Verdict::Dispatch(_))
        {
            return first.verdict.clone();
        }
        Verdict::Goto(self.add_chain(statements))
    }

    /// Adds a chain and returns its name.
    pub(super) fn add_chain(&mut self, statements: Vec<Statement>) -> String {
        let chain = Chain { direction: self.key.direction, statements };
        let name = chain.name();
        self.profile.chains.insert(name.clone(), chain);
        name
    }

    /// Adds a port map and returns its name.
    pub(super) fn port_map(&mut self, chains: BTreeMap<(Protocol, u16), String>) -> String {
        let map = PortMap { chains };
        let name = map.name();
        self.profile.port_maps.insert(name.clone(), map);
        name
    }

    /// Returns a port list in canonical form.
    pub(super) fn canonical(&self, list: &Ports) -> Ports {
        ports::canonical(list, self.key.direction, &self.key.ports)
    }

    /// Returns the statements of rules with the same peers, canonical ports and verdict.
    pub(super) fn statements(
        &mut self,
        rules: Vec<RuleRef>,
        peers: &Peers,
        ports: &Ports,
        verdict: &Verdict,
    ) -> Vec<Statement> {
        let alternatives = self.alternatives(peers, ports);
        if alternatives.is_empty() {
            return Vec::new();
        }
        let counter = self.counter(Attribution::Rules(self.key.direction, rules));
        let statement = |matches| Statement {
            matches,
            counter: Some(counter.clone()),
            verdict: verdict.clone(),
        };
        alternatives.into_iter().map(statement).collect()
    }

    /// Adds a counter and returns its name.
    pub(super) fn counter(&mut self, attribution: Attribution) -> String {
        let name = attribution.counter();
        self.profile.counters.insert(name.clone(), attribution);
        name
    }

    /// Returns lists of conditions; a packet matches the rule if it meets all conditions of one.
    fn alternatives(&mut self, peers: &Peers, ports: &Ports) -> Vec<Vec<Match>> {
        let (plain, names) = self.port_matches(ports);
        let peer_matches = if plain.is_empty() { Vec::new() } else { self.peer_matches(peers) };
        let mut alternatives = Vec::new();
        for peer in &peer_matches {
            for port in &plain {
                alternatives.push([peer, port].into_iter().flatten().cloned().collect());
            }
        }
        let everywhere = peers.any || peers.all_pods;
        if !everywhere && peers.terms.is_empty() {
            return alternatives;
        }
        for (protocol, name) in names {
            let pods = (!everywhere).then(|| peers.terms.clone());
            let key = SetKey::NamedPorts { pods, protocol, name };
            for family in self.families() {
                let set = self.set(key.clone(), Some(family));
                alternatives.push(vec![Match::NamedPort(family, set)]);
            }
        }
        alternatives
    }

    /// Returns the conditions of the peers; `None` stands for every peer.
    fn peer_matches(&mut self, peers: &Peers) -> Vec<Option<Match>> {
        if peers.any {
            return vec![None];
        }
        let mut matches = Vec::new();
        for family in self.families() {
            let mut keys = Vec::new();
            if peers.all_pods {
                keys.push(SetKey::AllPods);
            }
            if !peers.terms.is_empty() {
                keys.push(SetKey::Pods(peers.terms.clone()));
            }
            let blocks = peers.blocks.iter().filter(|range| Family::of(range.first) == family);
            let blocks: Vec<_> = blocks.copied().collect();
            if !blocks.is_empty() {
                keys.push(SetKey::Blocks(blocks));
            }
            if !peers.nodes.is_empty() {
                keys.push(SetKey::Nodes(peers.nodes.clone()));
            }
            for key in keys {
                matches.push(Some(Match::Peer(family, self.set(key, Some(family)))));
            }
        }
        matches
    }

    /// Returns the conditions of the ports, `None` for every protocol, and the names that depend on
    /// the destination pod.
    #[allow(clippy::type_complexity)]
    fn port_matches(
        &mut self,
        ports: &Ports,
    ) -> (Vec<Option<Match>>, Vec<(Option<Protocol>, String)>) {
        let Ports::List(list) = ports else { return (vec![None], Vec::new()) };
        let (mut matches, mut names) = (Vec::new(), Vec::new());
        let mut ranges: BTreeMap<Protocol, Vec<PortRange>> = BTreeMap::new();
        for entry in list {
            match entry {
                PortSpec::Protocol(protocol) => matches.push(Some(Match::Protocol(*protocol))),
                PortSpec::Range(protocol, range) => {
                    ranges.entry(*protocol).or_default().push(*range);
                }
                PortSpec::Named(protocol, name) => names.push((*protocol, name.clone())),
            }
        }
        for (protocol, ranges) in ranges {
            if ranges.len() > MAX_INLINE_RANGES {
                let set = self.set(SetKey::Ports(ranges), None);
                matches.push(Some(Match::PortSet(protocol, set)));
            } else {
                let ranges = ranges.into_iter();
                matches.extend(ranges.map(|range| Some(Match::Port(protocol, range))));
            }
        }
        (matches, names)
    }

    fn families(&self) -> Vec<Family> {
        let all = [(self.families.v4, Family::V4), (self.families.v6, Family::V6)];
        all.into_iter().filter_map(|(present, family)| present.then_some(family)).collect()
    }

    fn set(&mut self, key: SetKey, family: Option<Family>) -> String {
        let (name, set) = named(Set { key, family });
        self.profile.sets.insert(name.clone(), set);
        name
    }
}
