//! Differences between programs.

use std::collections::{BTreeMap, BTreeSet};

use super::{Attribution, Chain, Element, PortMap, Program, Set, Verdict};

/// Change of an object or of an entry of an interface map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<V> {
    /// The object is new.
    Added(V),
    /// The object exists and gets another value. Only entries of interface maps are replaced.
    Replaced(V),
    /// The object is removed.
    Removed,
}

/// Changes by name.
pub type Changes<V> = BTreeMap<String, Change<V>>;

/// Changes that turn a program into another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// Sets without their elements, by name.
    pub sets: Changes<Set>,
    /// Elements by set: true if added, false if removed.
    pub elements: BTreeMap<String, BTreeMap<Element, bool>>,
    /// Counters with their attributions, by name.
    pub counters: Changes<Attribution>,
    /// Chains with their statements, by name.
    pub chains: Changes<Chain>,
    /// Port maps with their entries, by name.
    pub port_maps: Changes<PortMap>,
    /// Entries of [`Program::from`].
    pub from: Changes<Verdict>,
    /// Entries of [`Program::to`].
    pub to: Changes<Verdict>,
    /// Entries of [`Program::to_node`].
    pub to_node: Changes<Verdict>,
}

impl Difference {
    /// Returns the difference between two programs.
    pub fn between(old: &Program, new: &Program) -> Self {
        let mut elements = BTreeMap::new();
        let empty = BTreeSet::new();
        for name in old.elements.keys().chain(new.elements.keys()) {
            let [old, new] = [old, new].map(|program| program.elements.get(name).unwrap_or(&empty));
            let removed = old.difference(new).map(|element| (*element, false));
            let added = new.difference(old).map(|element| (*element, true));
            let changes: BTreeMap<_, _> = removed.chain(added).collect();
            if !changes.is_empty() {
                elements.insert(name.clone(), changes);
            }
        }
        Self {
            sets: changes(&old.sets, &new.sets),
            elements,
            counters: changes(&old.counters, &new.counters),
            chains: changes(&old.chains, &new.chains),
            port_maps: changes(&old.port_maps, &new.port_maps),
            from: changes(&old.from, &new.from),
            to: changes(&old.to, &new.to),
            to_node: changes(&old.to_node, &new.to_node),
        }
    }

    /// Returns whether nothing changes.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn changes<V: Clone + PartialEq>(
    old: &BTreeMap<String, V>,
    new: &BTreeMap<String, V>,
) -> Changes<V> {
    let mut changes = Changes::new();
    for name in old.keys().chain(new.keys()) {
        if let Some(change) = change(old.get(name), new.get(name)) {
            changes.insert(name.clone(), change);
        }
    }
    changes
}

/// Returns the change of one value; `None` if the values are equal.
pub(crate) fn change<V: Clone + PartialEq>(old: Option<&V>, new: Option<&V>) -> Option<Change<V>> {
    match (old, new) {
        (None, None) => None,
        (None, Some(new)) => Some(Change::Added(new.clone())),
        (Some(_), None) => Some(Change::Removed),
        (Some(old), Some(new)) => (old != new).then(|| Change::Replaced(new.clone())),
    }
}

impl Program {
    /// Applies a difference to the program.
    pub fn apply(&mut self, difference: &Difference) {
        apply(&mut self.sets, &difference.sets);
        for (name, changes) in &difference.elements {
            let elements = self.elements.entry(name.clone()).or_default();
            for (element, added) in changes {
                match added {
                    true => elements.insert(*element),
                    false => elements.remove(element),
                };
            }
            if elements.is_empty() {
                self.elements.remove(name);
            }
        }
        apply(&mut self.counters, &difference.counters);
        apply(&mut self.chains, &difference.chains);
        apply(&mut self.port_maps, &difference.port_maps);
        apply(&mut self.from, &difference.from);
        apply(&mut self.to, &difference.to);
        apply(&mut self.to_node, &difference.to_node);
    }
}

fn apply<V: Clone>(values: &mut BTreeMap<String, V>, changes: &Changes<V>) {
    for (name, change) in changes {
        match change {
            Change::Added(value) | Change::Replaced(value) => {
                values.insert(name.clone(), value.clone());
            }
            Change::Removed => {
                values.remove(name);
            }
        }
    }
}
