//! Comparison of the table in the kernel with a program.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use skein_netlink::nftables::{Element, Objects};

use crate::program::{Change, Changes, Difference, Program, Verdict};
use crate::render::{fixed_chains, fixed_counters, fixed_sets};

use super::Installed;
use super::encode::{self, INTERFACE_MAPS, REFUSE, Step, Unit, steps};
use super::error::EnforceError;
use super::kernel::Kernel;

/// Prefix of the names of port maps.
const PORT_MAP_PREFIX: &str = "v_";
/// Prefix of the names of anonymous sets, which belong to a rule.
const ANONYMOUS_PREFIX: &str = "__";

/// Fingerprints of the rules of chains that Skein has written, by the name of the chain.
#[derive(Debug, Default)]
pub(super) struct Rules(HashMap<String, u64>);

impl Rules {
    /// Forgets all chains, so that the next installation writes their rules again.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Remembers the rules of all chains of the table.
    pub(super) fn remember(&mut self, objects: &Objects) {
        let chains = objects.chains.iter();
        self.0 = chains.map(|(name, rules)| (name.clone(), fingerprint(rules))).collect();
    }

    /// Remembers the rules of chains that were not known before.
    pub(super) fn remember_new(&mut self, objects: &Objects) {
        for (name, rules) in &objects.chains {
            if !self.0.contains_key(name) {
                self.0.insert(name.clone(), fingerprint(rules));
            }
        }
        self.0.retain(|name, _| objects.chains.contains_key(name));
    }

    /// Returns whether a chain exists with the rules that Skein has written.
    fn is_intact(&self, objects: &Objects, chain: &str) -> bool {
        let rules = objects.chains.get(chain);
        rules.is_some_and(|rules| self.0.get(chain) == Some(&fingerprint(rules)))
    }
}

fn fingerprint(rules: &[Vec<u8>]) -> u64 {
    let mut hasher = DefaultHasher::new();
    rules.hash(&mut hasher);
    hasher.finish()
}

/// Changes that make the table equal to a program, in the order of their application.
#[derive(Debug)]
pub(super) struct Plan {
    /// True if the table does not exist.
    pub(super) is_absent: bool,
    /// Objects to add and chains to write. `None` if no object of the program is missing, all its
    /// chains are intact, the table is not dormant, its fixed sets and counters exist, and its
    /// chain [`REFUSE`] is intact.
    pub(super) structure: Option<Difference>,
    /// Changes of the elements of sets, then of the verdicts of interfaces.
    pub(super) steps: Vec<Step>,
    /// True if the rules of base chains must be written.
    pub(super) hooks: bool,
    /// Objects to remove.
    pub(super) removals: Difference,
}

impl Plan {
    /// Reads the table and compares it with the program.
    ///
    /// # Errors
    /// `Netlink` or `Timeout` if the table cannot be read.
    pub(super) async fn new(
        kernel: &mut Kernel,
        rules: &Rules,
        program: &Program,
    ) -> Result<Self, EnforceError> {
        let table = kernel.table().to_owned();
        let objects = kernel.with(move |connection| connection.objects(&table)).await?;
        let is_absent = objects.is_none();
        let objects = objects.unwrap_or_default();
        let mut added = missing(&objects, program);
        added.chains.retain(|name, _| !rules.is_intact(&objects, name));
        let is_complete = !objects.dormant
            && fixed_sets().all(|set| objects.sets.contains(set))
            && fixed_counters().all(|counter| objects.counters.contains_key(counter))
            && rules.is_intact(&objects, REFUSE);
        let mut base_chains = fixed_chains().filter(|chain| *chain != REFUSE);
        let hooks = !base_chains.all(|chain| rules.is_intact(&objects, chain));
        let elements = present_elements(kernel, &objects, program).await?;
        Ok(Self {
            is_absent,
            steps: all_steps(elements, program),
            structure: (!is_complete || !added.is_empty()).then_some(added),
            hooks,
            removals: superfluous(&objects, program),
        })
    }

    /// Returns the result of the installation that executes the plan.
    pub(super) fn outcome(&self) -> Installed {
        let nothing = self.structure.is_none()
            && self.steps.is_empty()
            && !self.hooks
            && self.removals.is_empty();
        match (self.is_absent, nothing) {
            (true, _) => Installed::Created,
            (false, true) => Installed::Unchanged,
            (false, false) => Installed::Repaired,
        }
    }
}

/// Returns the program's objects that the kernel lacks, and all chains of the program. The caller
/// then leaves out the chains whose rules are intact in the kernel.
fn missing(objects: &Objects, program: &Program) -> Difference {
    fn added<V: Clone>(
        wanted: &BTreeMap<String, V>,
        exists: impl Fn(&String) -> bool,
    ) -> Changes<V> {
        let missing = wanted.iter().filter(|(name, _)| !exists(name));
        missing.map(|(name, value)| (name.clone(), Change::Added(value.clone()))).collect()
    }
    Difference {
        sets: added(&program.sets, |name| objects.sets.contains(name)),
        counters: added(&program.counters, |name| objects.counters.contains_key(name)),
        chains: added(&program.chains, |_| false),
        port_maps: added(&program.port_maps, |name| objects.sets.contains(name)),
        ..Difference::default()
    }
}

/// Returns the removal of the kernel's objects that the program lacks.
fn superfluous(objects: &Objects, program: &Program) -> Difference {
    let mut removals = Difference::default();
    let fixed: BTreeSet<_> = fixed_sets().collect();
    for name in &objects.sets {
        let is_wanted = fixed.contains(name.as_str())
            || program.sets.contains_key(name)
            || program.port_maps.contains_key(name);
        if is_wanted || name.starts_with(ANONYMOUS_PREFIX) {
            continue;
        }
        match name.starts_with(PORT_MAP_PREFIX) {
            true => drop(removals.port_maps.insert(name.clone(), Change::Removed)),
            false => drop(removals.sets.insert(name.clone(), Change::Removed)),
        }
    }
    for name in objects.chains.keys() {
        if !program.chains.contains_key(name) && !fixed_chains().any(|fixed| fixed == name) {
            removals.chains.insert(name.clone(), Change::Removed);
        }
    }
    for name in objects.counters.keys() {
        if !program.counters.contains_key(name) && !fixed_counters().any(|fixed| fixed == name) {
            removals.counters.insert(name.clone(), Change::Removed);
        }
    }
    removals
}

/// Returns the elements of the program's sets and maps that exist in the kernel.
async fn present_elements(
    kernel: &mut Kernel,
    objects: &Objects,
    program: &Program,
) -> Result<BTreeMap<String, Vec<Element>>, EnforceError> {
    let names = program.sets.keys().chain(program.port_maps.keys()).map(String::as_str);
    let names = names.chain(INTERFACE_MAPS).filter(|name| objects.sets.contains(*name));
    let names: Vec<_> = names.map(str::to_owned).collect();
    let table = kernel.table().to_owned();
    kernel
        .with(move |connection| {
            let mut all = BTreeMap::new();
            for name in names {
                if let Some(elements) = connection.elements(&table, &name)? {
                    all.insert(name, elements);
                }
            }
            Ok(all)
        })
        .await
}

/// Returns the changes of all elements: of sets and port maps, then of interface maps. New port
/// maps are filled by the transaction that creates them.
fn all_steps(mut present: BTreeMap<String, Vec<Element>>, program: &Program) -> Vec<Step> {
    let mut all = Vec::new();
    for name in program.sets.keys() {
        let elements = present.remove(name).unwrap_or_default();
        let wanted = program.elements_of(name).map(encode::unit).collect();
        all.extend(steps(name, encode::units(elements), wanted));
    }
    for (name, map) in &program.port_maps {
        if let Some(elements) = present.remove(name) {
            all.extend(steps(name, encode::units(elements), encode::port_map(map)));
        }
    }
    for map in INTERFACE_MAPS {
        let elements = present.remove(map).unwrap_or_default();
        all.extend(steps(map, encode::units(elements), encode::interfaces(program, map)));
    }
    all
}

/// Returns the changes of elements that apply a difference; `None` if the difference changes other
/// objects, too.
pub(super) fn element_steps(difference: &Difference) -> Option<Vec<Step>> {
    let Difference { sets, elements, counters, chains, port_maps, from, to, to_node } = difference;
    if !(sets.is_empty() && counters.is_empty() && chains.is_empty() && port_maps.is_empty()) {
        return None;
    }
    let mut all = Vec::new();
    for (set, changes) in elements {
        let units = |wanted: bool| -> BTreeSet<Unit> {
            let changes = changes.iter().filter(|(_, added)| **added == wanted);
            changes.map(|(element, _)| encode::unit(element)).collect()
        };
        all.extend(steps(set, units(false), units(true)));
    }
    for (map, changes) in [("from", from), ("to", to), ("to_node", to_node)] {
        all.extend(
            changes.iter().map(|(interface, change)| interface_step(map, interface, change)),
        );
    }
    all.extend(from.iter().filter_map(|(interface, change)| pair_step(interface, change)));
    Some(all)
}

/// Returns the change of an entry of an interface map.
fn interface_step(map: &str, name: &str, change: &Change<Verdict>) -> Step {
    // The kernel ignores the verdict of an element to remove.
    let old = || Some(encode::interface(name, &Verdict::Accept));
    let (removed, added) = match change {
        Change::Added(verdict) => (None, Some(encode::interface(name, verdict))),
        Change::Replaced(verdict) => (old(), Some(encode::interface(name, verdict))),
        Change::Removed => (old(), None),
    };
    Step { set: map.to_owned(), removed, added }
}

/// Returns the change of the set `self` for an interface of a pod; `None` if the interface stays.
/// The set has a pair of each interface with itself, and matches packets of a pod to that pod.
fn pair_step(name: &str, change: &Change<Verdict>) -> Option<Step> {
    let (removed, added) = match change {
        Change::Added(_) => (None, Some(encode::pair(name))),
        Change::Removed => (Some(encode::pair(name)), None),
        Change::Replaced(_) => return None,
    };
    Some(Step { set: "self".to_owned(), removed, added })
}
