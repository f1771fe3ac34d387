//! Record of the values that parts of the program had before a change.

use std::collections::BTreeMap;

use crate::model::Direction;
use crate::program::{
    Attribution, Chain, Changes, Difference, Element, PortMap, Program, Set, Verdict, change,
};

/// Values of the changed parts of the program before the first change.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) sets: Before<Set>,
    pub(super) counters: Before<Attribution>,
    pub(super) chains: Before<Chain>,
    pub(super) port_maps: Before<PortMap>,
    /// Verdicts for forwarded packets from pods, by input interface.
    from: Before<Verdict>,
    /// Verdicts for forwarded packets to pods, by output interface.
    to: Before<Verdict>,
    /// Verdicts for packets from pods to this node, by input interface.
    to_node: Before<Verdict>,
    /// Presence of elements, by set.
    elements: BTreeMap<String, BTreeMap<Element, bool>>,
}

/// Values of one kind before the first change; `None` for a value that did not exist.
#[derive(Debug)]
pub(super) struct Before<V>(BTreeMap<String, Option<V>>);

impl<V> Default for Before<V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<V: Clone + PartialEq> Before<V> {
    /// Sets or removes a value.
    pub(super) fn set(&mut self, values: &mut BTreeMap<String, V>, name: &str, value: Option<V>) {
        let old = match value {
            Some(value) => values.insert(name.to_owned(), value),
            None => values.remove(name),
        };
        self.0.entry(name.to_owned()).or_insert(old);
    }

    fn changes(self, now: &BTreeMap<String, V>) -> Changes<V> {
        let changed = self.0.into_iter().filter_map(|(name, old)| {
            let change = change(old.as_ref(), now.get(&name))?;
            Some((name, change))
        });
        changed.collect()
    }
}

impl Record {
    /// Adds or removes an element of a set.
    pub(super) fn element(
        &mut self,
        program: &mut Program,
        set: &str,
        element: Element,
        present: bool,
    ) {
        let elements = program.elements.entry(set.to_owned()).or_default();
        let changed = if present { elements.insert(element) } else { elements.remove(&element) };
        if elements.is_empty() {
            program.elements.remove(set);
        }
        if changed {
            let before = self.elements.entry(set.to_owned()).or_default();
            before.entry(element).or_insert(!present);
        }
    }

    /// Sets or removes the verdicts of an interface. The first verdict concerns forwarded packets.
    /// The second one exists only for [`Direction::Egress`] and concerns packets to this node.
    pub(super) fn assign(
        &mut self,
        program: &mut Program,
        interface: &str,
        direction: Direction,
        verdicts: Option<(Verdict, Option<Verdict>)>,
    ) {
        let (forwarded, to_node) = match verdicts {
            Some((forwarded, to_node)) => (Some(forwarded), to_node),
            None => (None, None),
        };
        match direction {
            Direction::Ingress => self.to.set(&mut program.to, interface, forwarded),
            Direction::Egress => {
                self.from.set(&mut program.from, interface, forwarded);
                self.to_node.set(&mut program.to_node, interface, to_node);
            }
        }
    }

    /// Returns the changes up to the present program.
    pub(super) fn difference(self, now: &Program) -> Difference {
        let mut elements = BTreeMap::new();
        for (set, before) in self.elements {
            let present = now.elements.get(&set);
            let is_present =
                |element: &Element| present.is_some_and(|present| present.contains(element));
            let changed = before.into_iter().filter_map(|(element, was_present)| {
                let is_present = is_present(&element);
                (is_present != was_present).then_some((element, is_present))
            });
            let changed: BTreeMap<_, _> = changed.collect();
            if !changed.is_empty() {
                elements.insert(set, changed);
            }
        }
        Difference {
            sets: self.sets.changes(&now.sets),
            elements,
            counters: self.counters.changes(&now.counters),
            chains: self.chains.changes(&now.chains),
            port_maps: self.port_maps.changes(&now.port_maps),
            from: self.from.changes(&now.from),
            to: self.to.changes(&now.to),
            to_node: self.to_node.changes(&now.to_node),
        }
    }
}
