//! Text for `nft -f -`: one transaction that installs the table or applies a difference.
//!
//! Keys of sets are declared by expressions (`typeof ip saddr`), because nft up to 1.1.1 crashes on
//! sets that later versions have declared by name.

use std::fmt::Write as _;

use crate::model::Direction;
use crate::program::{
    Chain, Change, Changes, Difference, Family, Match, Program, Set, SetKey, Statement, Verdict,
};

/// Effect of the chain `refuse`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Refused packets are counted, logged and accepted.
    Audit,
    /// Refused packets are counted, logged and dropped.
    Enforce,
}

/// Properties of the table that do not depend on the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Name of the table, of the family inet.
    pub name: String,
    /// Prefix of the host interfaces of pods.
    pub pod_prefix: String,
    /// NFLOG group that receives refused packets.
    pub log_group: u16,
    /// Effect of refusals.
    pub mode: Mode,
}

/// Sets of every table, with their types. `self` has a pair of each pod's interface with itself;
/// `cut4` and `cut6` have the connections that a change of policies has ended.
const SETS: [(&str, &str); 3] = [
    ("self", "typeof iifname . oifname;"),
    ("cut4", "typeof ip saddr . ip daddr . meta l4proto . th sport . th dport; flags timeout;"),
    ("cut6", "typeof ip6 saddr . ip6 daddr . meta l4proto . th sport . th dport; flags timeout;"),
];
/// Verdict maps of every table, with their keys.
const MAPS: [(&str, &str); 3] = [("from", "iifname"), ("to", "oifname"), ("to_node", "iifname")];
/// Counters of every table: packets that the chain `refuse` has judged, packets of pods' interfaces
/// without a verdict, and dropped packets of connections that have ended.
const COUNTERS: [&str; 3] = ["refused", "unassigned", "cut"];
/// Base chains: name, hook, priority, key and map.
const HOOKS: [(&str, &str, &str, &str, &str); 3] = [
    ("egress", "forward", "filter - 10", "iifname", "from"),
    ("ingress", "forward", "filter - 5", "oifname", "to"),
    ("node", "input", "filter - 10", "iifname", "to_node"),
];

/// Returns the names of the sets and maps, counters and chains of every table.
pub(crate) fn fixed_sets() -> impl Iterator<Item = &'static str> {
    SETS.iter().chain(&MAPS).map(|(name, _)| *name)
}

/// Returns the names of the counters of every table.
pub(crate) fn fixed_counters() -> impl Iterator<Item = &'static str> {
    COUNTERS.into_iter()
}

/// Returns the names of the chains of every table.
pub(crate) fn fixed_chains() -> impl Iterator<Item = &'static str> {
    HOOKS.iter().map(|(name, ..)| *name).chain(["refuse"])
}

/// Returns the transaction that installs the table, which must not exist. The base chains come
/// last.
pub fn install(table: &Table, program: &Program) -> String {
    let mut text = Text::new(&table.name);
    text.foundation(table);
    text.difference(&Difference::between(&Program::default(), program));
    text.hooks(table);
    text.text
}

/// Returns the transaction that applies a difference.
pub fn apply(table: &Table, difference: &Difference) -> String {
    let mut text = Text::new(&table.name);
    text.difference(difference);
    text.text
}

/// Returns the transaction that adds and fills objects without elements of sets and of interface
/// maps. Objects that exist stay; rules of chains are replaced.
pub(crate) fn structure(table: &Table, difference: &Difference) -> String {
    let mut text = Text::new(&table.name);
    text.foundation(table);
    text.declarations(difference);
    text.chains(difference);
    text.text
}

/// Returns the transaction that adds the base chains, or replaces their rules, and then removes
/// objects.
pub(crate) fn completion(table: &Table, hooks: bool, difference: &Difference) -> String {
    let mut text = Text::new(&table.name);
    if hooks {
        text.hooks(table);
    }
    text.removals(difference);
    text.text
}

struct Text<'a> {
    table: &'a str,
    text: String,
}

impl<'a> Text<'a> {
    fn new(table: &'a str) -> Self {
        Self { table, text: String::new() }
    }

    fn line(&mut self, command: &str, name: &str, rest: &str) {
        let table = self.table;
        let family = if command.ends_with("inet") { "" } else { " inet" };
        let _ = writeln!(
            self.text,
            "{}",
            format!("{command}{family} {table} {name} {rest}").trim_end()
        );
    }

    /// Writes the objects that do not depend on the program, except for the base chains.
    fn foundation(&mut self, table: &Table) {
        self.line("add table inet", "", "");
        for counter in COUNTERS {
            self.line("add counter", counter, "");
        }
        for (set, kind) in SETS {
            self.line("add set", set, &format!("{{ {kind} }}"));
        }
        for (map, key) in MAPS {
            self.line("add map", map, &format!("{{ typeof {key} : verdict; }}"));
        }
        let group = table.log_group;
        let verdict = match table.mode {
            Mode::Audit => "accept",
            Mode::Enforce => "drop",
        };
        let log = format!("limit rate 50/second log prefix \"skein\" group {group} snaplen 96");
        self.fill("refuse", "", &["counter name refused", &log, verdict]);
    }

    /// Writes the base chains.
    fn hooks(&mut self, table: &Table) {
        let prefix = &table.pod_prefix;
        for (chain, hook, priority, key, map) in HOOKS {
            let hook = format!("{{ type filter hook {hook} priority {priority}; policy accept; }}");
            let others = format!("{key} != \"{prefix}*\" accept");
            let dispatch = format!("{key} vmap @{map}");
            let is_forwarded = map != "to_node";
            let mut rules = vec![&*others];
            if is_forwarded {
                // Replies of pods to their own node always pass, so that only forwarded connections
                // are cut.
                rules.extend([
                    "ct state established ip saddr . ip daddr . meta l4proto . th sport . th dport \
                     @cut4 counter name cut drop",
                    "ct state established ip6 saddr . ip6 daddr . meta l4proto . th sport . th \
                     dport @cut6 counter name cut drop",
                ]);
            }
            rules.extend([
                // A policy that is made stricter applies to the original direction of open
                // connections.
                "ct state related accept",
                "ct direction reply ct state established accept",
                &*dispatch,
            ]);
            if is_forwarded {
                rules.push("counter name unassigned goto refuse");
            }
            self.fill(chain, &hook, &rules);
        }
    }

    /// Writes a chain with exactly these rules.
    fn fill(&mut self, chain: &str, hook: &str, rules: &[&str]) {
        self.line("add chain", chain, hook);
        self.line("flush chain", chain, "");
        for rule in rules {
            self.line("add rule", chain, rule);
        }
    }

    /// Writes additions in the order of their references, then the verdicts of interfaces, then
    /// removals in the opposite order.
    fn difference(&mut self, difference: &Difference) {
        self.declarations(difference);
        self.elements(difference);
        self.chains(difference);
        let maps =
            [("from", &difference.from), ("to", &difference.to), ("to_node", &difference.to_node)];
        for (map, changes) in maps {
            self.interfaces(map, changes);
        }
        self.removals(difference);
    }

    /// Writes the counters and sets that are added.
    fn declarations(&mut self, difference: &Difference) {
        for name in added(&difference.counters).map(|(name, _)| name) {
            self.line("add counter", name, "");
        }
        for (name, set) in added(&difference.sets) {
            self.line("add set", name, &format!("{{ {} }}", set_type(set)));
        }
    }

    fn elements(&mut self, difference: &Difference) {
        let removed_set = |name: &str| difference.sets.get(name) == Some(&Change::Removed);
        for (name, elements) in difference.elements.iter().filter(|(name, _)| !removed_set(name)) {
            for (command, wanted) in [("delete element", false), ("add element", true)] {
                let elements = elements.iter().filter(|(_, added)| **added == wanted);
                let elements: Vec<_> = elements.map(|(element, _)| element.to_string()).collect();
                if !elements.is_empty() {
                    self.line(command, name, &format!("{{ {} }}", elements.join(", ")));
                }
            }
        }
    }

    /// Adds chains and port maps: empty chains first, because rules and maps refer to chains.
    fn chains(&mut self, difference: &Difference) {
        for (name, _) in added(&difference.chains) {
            self.line("add chain", name, "");
            self.line("flush chain", name, "");
        }
        for (name, map) in added(&difference.port_maps) {
            self.line("add map", name, "{ typeof meta l4proto . th dport : verdict; }");
            let entry = |((protocol, port), chain): (&(crate::api::Protocol, u16), &String)| {
                format!("{} . {port} : jump {chain}", protocol.as_str())
            };
            let entries: Vec<_> = map.chains.iter().map(entry).collect();
            self.line("add element", name, &format!("{{ {} }}", entries.join(", ")));
        }
        for (name, chain) in added(&difference.chains) {
            for rule in &chain.statements {
                self.line("add rule", name, &statement(chain, rule));
            }
        }
    }

    fn interfaces(&mut self, map: &str, changes: &Changes<Verdict>) {
        for (interface, change) in changes {
            let key = format!("\"{interface}\"");
            if !matches!(change, Change::Added(_)) {
                self.line("delete element", map, &format!("{{ {key} }}"));
            }
            if let Change::Added(verdict) | Change::Replaced(verdict) = change {
                self.line("add element", map, &format!("{{ {key} : {} }}", verdict_text(verdict)));
            }
            let command = match change {
                Change::Added(_) => "add element",
                Change::Removed => "delete element",
                Change::Replaced(_) => continue,
            };
            if map == "from" {
                self.line(command, "self", &format!("{{ {key} . {key} }}"));
            }
        }
    }

    /// Removes objects. Rules are flushed first, so that no reference is left.
    fn removals(&mut self, difference: &Difference) {
        for name in removed(&difference.chains) {
            self.line("flush chain", name, "");
        }
        for name in removed(&difference.port_maps) {
            self.line("delete map", name, "");
        }
        for name in removed(&difference.chains) {
            self.line("delete chain", name, "");
        }
        for name in removed(&difference.sets) {
            self.line("delete set", name, "");
        }
        for name in removed(&difference.counters) {
            self.line("delete counter", name, "");
        }
    }
}

fn added<V>(changes: &Changes<V>) -> impl Iterator<Item = (&String, &V)> {
    changes.iter().filter_map(|(name, change)| match change {
        Change::Added(value) | Change::Replaced(value) => Some((name, value)),
        Change::Removed => None,
    })
}

fn removed<V>(changes: &Changes<V>) -> impl Iterator<Item = &String> {
    let removed = changes.iter().filter(|(_, change)| matches!(change, Change::Removed));
    removed.map(|(name, _)| name)
}

/// Returns the key type of a set, and flags.
fn set_type(set: &Set) -> String {
    let address = match set.family {
        Some(Family::V6) => "ip6 daddr",
        Some(Family::V4) | None => "ip daddr",
    };
    match set.key {
        SetKey::Pods(_) | SetKey::Nodes(_) => format!("typeof {address};"),
        SetKey::AllPods | SetKey::Blocks(_) => format!("typeof {address}; flags interval;"),
        SetKey::NamedPorts { .. } => format!("typeof {address} . meta l4proto . th dport;"),
        SetKey::Ports(_) => "typeof th dport; flags interval;".to_owned(),
    }
}

/// Returns a rule in nft's notation.
fn statement(chain: &Chain, statement: &Statement) -> String {
    let mut words: Vec<String> =
        statement.matches.iter().map(|condition| condition_text(chain, condition)).collect();
    if let Some(counter) = &statement.counter {
        words.push(format!("counter name {counter}"));
    }
    words.push(verdict_text(&statement.verdict));
    words.join(" ")
}

fn condition_text(chain: &Chain, condition: &Match) -> String {
    let family = |family: &Family| match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    match condition {
        Match::Peer(of, set) => {
            let field = match chain.direction {
                Direction::Ingress => "saddr",
                Direction::Egress => "daddr",
            };
            format!("{} {field} @{set}", family(of))
        }
        Match::Protocol(protocol) => format!("meta l4proto {}", protocol.as_str()),
        Match::Port(protocol, range) => format!("{} dport {range}", protocol.as_str()),
        Match::PortSet(protocol, set) => format!("{} dport @{set}", protocol.as_str()),
        Match::NamedPort(of, set) => {
            format!("{} daddr . meta l4proto . th dport @{set}", family(of))
        }
        Match::Hairpin => "iifname . oifname @self".to_owned(),
    }
}

fn verdict_text(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".to_owned(),
        Verdict::Refuse => "goto refuse".to_owned(),
        Verdict::Goto(chain) => format!("goto {chain}"),
        Verdict::Dispatch(map) => format!("meta l4proto . th dport vmap @{map}"),
    }
}
