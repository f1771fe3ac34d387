//! Profiles in use, and the sets, counters, chains and port maps that profiles share.

use std::collections::BTreeSet;

use crate::compile::{Profile, ProfileKey, elements};
use crate::program::{Set, SetKey, Verdict};

use super::Engine;

impl Engine {
    /// Adds a user to a profile and returns the profile's verdicts for the interface maps. The
    /// first user adds the profile's sets, counters, chains and port maps to the program.
    pub(super) fn retain(&mut self, key: &ProfileKey) -> (Verdict, Option<Verdict>) {
        if let Some((profile, users)) = self.profiles.get_mut(key) {
            *users += 1;
            return (profile.entry.clone(), profile.to_node.clone());
        }
        let profile = Profile::compile(key, self.families);
        for (name, set) in &profile.sets {
            if self.is_first_use(name) {
                self.add_set(name, set);
            }
        }
        for (name, counter) in &profile.counters {
            if self.is_first_use(name) {
                self.record.counters.set(&mut self.program.counters, name, Some(counter.clone()));
            }
        }
        for (name, chain) in &profile.chains {
            if self.is_first_use(name) {
                self.record.chains.set(&mut self.program.chains, name, Some(chain.clone()));
            }
        }
        for (name, map) in &profile.port_maps {
            if self.is_first_use(name) {
                self.record.port_maps.set(&mut self.program.port_maps, name, Some(map.clone()));
            }
        }
        let verdicts = (profile.entry.clone(), profile.to_node.clone());
        self.profiles.insert(key.clone(), (profile, 1));
        verdicts
    }

    /// Removes a user from a profile. The last user removes the sets, counters, chains and port
    /// maps that no other profile uses.
    pub(super) fn release(&mut self, key: &ProfileKey) {
        let Some((_, users)) = self.profiles.get_mut(key) else { return };
        *users -= 1;
        if *users > 0 {
            return;
        }
        let Some((profile, _)) = self.profiles.remove(key) else { return };
        for name in profile.chains.keys() {
            if self.is_last_use(name) {
                self.record.chains.set(&mut self.program.chains, name, None);
            }
        }
        for name in profile.port_maps.keys() {
            if self.is_last_use(name) {
                self.record.port_maps.set(&mut self.program.port_maps, name, None);
            }
        }
        for name in profile.counters.keys() {
            if self.is_last_use(name) {
                self.record.counters.set(&mut self.program.counters, name, None);
            }
        }
        for (name, set) in &profile.sets {
            if self.is_last_use(name) {
                self.remove_set(name, set);
            }
        }
    }

    fn is_first_use(&mut self, name: &str) -> bool {
        let uses = self.uses.entry(name.to_owned()).or_default();
        *uses += 1;
        *uses == 1
    }

    fn is_last_use(&mut self, name: &str) -> bool {
        let Some(uses) = self.uses.get_mut(name) else { return false };
        *uses -= 1;
        let is_last = *uses == 0;
        if is_last {
            self.uses.remove(name);
        }
        is_last
    }

    fn add_set(&mut self, name: &str, set: &Set) {
        self.may_demand_change = true;
        self.record.sets.set(&mut self.program.sets, name, Some(set.clone()));
        match &set.key {
            SetKey::Pods(terms) | SetKey::NamedPorts { pods: Some(terms), .. } => {
                terms.iter().for_each(|term| self.members.insert(term, name.to_owned()));
            }
            SetKey::NamedPorts { pods: None, .. } => {
                self.ports_of_all.insert(name.to_owned());
            }
            SetKey::AllPods | SetKey::Blocks(_) | SetKey::Nodes(_) | SetKey::Ports(_) => {}
        }
        self.fill(name, &elements(&self.inventory, set));
    }

    fn remove_set(&mut self, name: &str, set: &Set) {
        self.may_demand_change = true;
        if let SetKey::Pods(terms) | SetKey::NamedPorts { pods: Some(terms), .. } = &set.key {
            terms.iter().for_each(|term| self.members.remove(term, &name.to_owned()));
        }
        self.ports_of_all.remove(name);
        self.fill(name, &BTreeSet::new());
        self.record.sets.set(&mut self.program.sets, name, None);
    }
}
