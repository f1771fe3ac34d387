//! Content of the nftables table, as text for `nft -f`.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::forward;
use crate::pod::HOST_PREFIX;

/// Settings of the table. The default has no table name and no rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Name of the table, of the family inet.
    pub table: String,
    /// Name of the overlay's interface.
    pub interface: String,
    /// UDP port of the overlay on this node.
    pub port: u16,
    /// Rules for pods whose host interfaces are Skein's; `None` without the CNI plugin.
    pub pods: Option<PodRules>,
    /// Pod CIDRs of this node.
    pub local: Vec<IpNet>,
    /// Prefixes of all pods of the cluster, this node's included.
    pub cluster: Vec<IpNet>,
    /// Underlay endpoints of the other nodes.
    pub peers: Vec<SocketAddr>,
    /// UDP source ports of the overlay's datagrams; empty until the data process has reported them.
    pub source_ports: Vec<u16>,
    /// Drop packets that have a pod's source and arrive by an interface that is not the pod's.
    pub drop_spoofed: bool,
    /// Drop packets to pods that would leave outside the tunnel.
    pub drop_cleartext: bool,
    /// Drop packets that other machines route to pods through this node.
    pub drop_transit: bool,
    /// Masquerade packets that enter the overlay with a source outside the node's pod CIDRs.
    pub masquerade_foreign: bool,
    /// Exempt the overlay's datagrams from connection tracking.
    pub notrack: bool,
}

/// Rules for pods that the CNI plugin attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRules {
    /// Masquerade packets of pods to destinations outside the cluster.
    pub masquerade: bool,
    /// Prefixes outside the cluster for which a pod keeps its own address.
    pub no_masquerade: Vec<IpNet>,
    /// Mark packets that chains of other programs must accept ([`forward`]).
    pub forward_accept: bool,
}

/// Chains that exist only if a setting asks for them.
const OPTIONAL_CHAINS: [&str; 6] =
    ["from_pods", "leaving", "outward", "passing", "transit", "untracked"];

impl Rules {
    /// Returns rules without content, which remove the table `table`.
    pub fn none(table: &str) -> Self {
        Self { table: table.to_owned(), ..Self::default() }
    }

    /// Returns rules of every kind, for a node with pods and one peer.
    pub(super) fn example() -> Self {
        let nets = |texts: [&str; 2]| texts.iter().filter_map(|text| text.parse().ok()).collect();
        let peers = ["192.0.2.2:51900", "[2001:db8::2]:51900", "192.0.2.2:4000"];
        Self {
            table: "skein".to_owned(),
            interface: "skein0".to_owned(),
            port: 51900,
            pods: Some(PodRules {
                masquerade: true,
                no_masquerade: Vec::new(),
                forward_accept: true,
            }),
            local: nets(["10.244.1.0/24", "fd00:1::/64"]),
            cluster: nets(["10.244.0.0/16", "fd00::/16"]),
            peers: peers.iter().filter_map(|text| text.parse().ok()).collect(),
            source_ports: vec![51900, 40001],
            drop_spoofed: true,
            drop_cleartext: true,
            drop_transit: true,
            masquerade_foreign: true,
            notrack: true,
        }
    }

    /// Returns whether no rule is enabled, so that no table is needed.
    pub fn is_empty(&self) -> bool {
        let any = self.drop_spoofed
            || self.drop_cleartext
            || self.drop_transit
            || self.masquerade_foreign
            || self.notrack
            || self.pods.is_some();
        !any
    }

    /// Returns the transaction that declares missing objects, empties existing ones and fills them.
    /// The counters keep their values.
    pub(super) fn text(&self) -> String {
        let table = &self.table;
        let chains = [
            ("sources", Some("type filter hook prerouting priority raw"), self.sources()),
            ("from_pods", None, self.pod_sources()),
            ("untracked", Some("type filter hook output priority raw"), self.untracked()),
            ("transit", Some("type filter hook forward priority raw"), self.transit()),
            ("leaving", Some("type filter hook postrouting priority raw"), self.leaving()),
            ("outward", Some("type nat hook postrouting priority srcnat"), self.outward()),
            ("passing", Some("type filter hook forward priority raw"), self.passing()),
        ];
        let mut text = self.declarations();
        for (chain, hook, _) in &chains {
            let hook = hook.map_or(String::new(), |hook| format!("{hook}; policy accept;"));
            let _ = writeln!(text, "add chain inet {table} {chain} {{ {hook} }}");
            let _ = writeln!(text, "flush chain inet {table} {chain}");
        }
        for (chain, _, rules) in &chains {
            for rule in rules {
                let _ = writeln!(text, "add rule inet {table} {chain} {rule}");
            }
        }
        let unused = chains
            .iter()
            .filter(|(chain, _, rules)| rules.is_empty() && OPTIONAL_CHAINS.contains(chain));
        for (chain, ..) in unused {
            let _ = writeln!(text, "delete chain inet {table} {chain}");
        }
        text
    }

    /// Returns the declarations of the table, its counters and its sets.
    fn declarations(&self) -> String {
        let table = &self.table;
        let mut text = format!("add table inet {table}\n");
        for counter in ["forged", "spoofed", "cleartext", "transit"] {
            for family in ["ipv4", "ipv6"] {
                let _ = writeln!(text, "add counter inet {table} {counter}_{family}");
            }
        }
        let _ = writeln!(text, "add counter inet {table} link_local");
        let mut inside = self.cluster.clone();
        inside.extend(self.pods.iter().flat_map(|pods| &pods.no_masquerade));
        for (name, nets) in
            [("local", &self.local), ("cluster", &self.cluster), ("inside", &inside)]
        {
            for v4 in [true, false] {
                let nets = nets.iter().filter(|net| net.addr().is_ipv4() == v4);
                let kind = format!("{}; flags interval; auto-merge;", address_type(v4));
                self.set(&mut text, name, v4, &kind, nets.map(ToString::to_string).collect());
            }
        }
        for v4 in [true, false] {
            let peers = || self.peers.iter().filter(|peer| peer.is_ipv4() == v4);
            let kind = address_type(v4);
            let mut nodes: Vec<IpAddr> = peers().map(SocketAddr::ip).collect();
            nodes.sort_unstable();
            nodes.dedup();
            let nodes = nodes.iter().map(ToString::to_string).collect();
            self.set(&mut text, "nodes", v4, &format!("{kind};"), nodes);
            let endpoint = |peer: &SocketAddr| format!("{} . {}", peer.ip(), peer.port());
            let endpoints = peers().map(endpoint).collect();
            self.set(&mut text, "peers", v4, &format!("{kind} . udp dport;"), endpoints);
        }
        text
    }

    fn set(&self, text: &mut String, name: &str, v4: bool, kind: &str, elements: Vec<String>) {
        let set = format!("inet {} {name}{}", self.table, if v4 { 4 } else { 6 });
        let _ = writeln!(text, "add set {set} {{ {kind} }}\nflush set {set}");
        if !elements.is_empty() {
            let _ = writeln!(text, "add element {set} {{ {} }}", elements.join(", "));
        }
    }

    /// Prerouting: input interfaces that are valid for each source.
    fn sources(&self) -> Vec<String> {
        let mut rules = Vec::new();
        if self.notrack {
            rules.push(format!("udp dport {} fib daddr type local notrack", self.port));
        }
        if self.pods.is_some() {
            rules.push(format!("iifname \"{HOST_PREFIX}*\" goto from_pods"));
        }
        if !self.drop_spoofed {
            return rules;
        }
        rules.push("iifname \"lo\" accept".to_owned());
        // The data process has checked that the source belongs to the peer.
        rules.push(format!("iifname \"{}\" accept", self.interface));
        if self.pods.is_none() {
            // Pods' interfaces can have any name, so the rule asks the routing table: `fib` has no
            // result if the route to the source does not lead to the input interface.
            for (family, number) in [("ip", 4), ("ip6", 6)] {
                let check = format!("{family} saddr @local{number}");
                rules.push(format!(
                    "{check} fib saddr . iif oif missing counter name spoofed_ipv{number} drop"
                ));
                rules.push(format!("{check} accept"));
            }
        }
        for (family, number) in [("ip", 4), ("ip6", 6)] {
            rules.push(format!(
                "{family} saddr @cluster{number} counter name spoofed_ipv{number} drop"
            ));
        }
        rules
    }

    /// Packets from pods' host interfaces: a pod sends from its own addresses only.
    fn pod_sources(&self) -> Vec<String> {
        if self.pods.is_none() {
            return Vec::new();
        }
        // The lookup with the input interface finds a pod's own addresses only. Both ends of a
        // pod's link have permanent neighbour entries, so a pod needs no neighbour discovery. An
        // answer to another link-local source would need an entry, too.
        [
            "icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, \
             nd-neighbor-advert, nd-redirect } counter name link_local drop",
            "ip6 saddr { ::, fe80::/10 } counter name link_local drop",
            "meta nfproto ipv4 fib saddr . iif oif missing counter name forged_ipv4 drop",
            "meta nfproto ipv6 fib saddr . iif oif missing counter name forged_ipv6 drop",
        ]
        .map(str::to_owned)
        .into()
    }

    /// Output: the overlay's datagrams are not tracked. The rules match the source port, too: a
    /// record may name an address and port of another service, and datagrams of other programs to
    /// that service need their entries (NAT, stateful filters).
    fn untracked(&self) -> Vec<String> {
        if !self.notrack || self.source_ports.is_empty() {
            return Vec::new();
        }
        let ports: Vec<_> = self.source_ports.iter().map(u16::to_string).collect();
        let ours = format!("udp sport {{ {} }}", ports.join(", "));
        vec![
            format!("{ours} ip daddr . udp dport @peers4 notrack"),
            format!("{ours} ip6 daddr . udp dport @peers6 notrack"),
        ]
    }

    /// Forward: the node is no gateway to pods for other machines. Packets of a connection that a
    /// pod began, or that the node translates (a NodePort, a hostPort), pass.
    fn transit(&self) -> Vec<String> {
        if !self.drop_transit {
            return Vec::new();
        }
        let mut rules = vec![format!("iifname \"{}\" accept", self.interface)];
        match self.pods {
            Some(_) => rules.push(format!("iifname \"{HOST_PREFIX}*\" accept")),
            // Pods' interfaces can have any name. With `drop_spoofed`, the chain `sources` has
            // checked the input interface.
            None => rules
                .extend(["ip saddr @local4 accept", "ip6 saddr @local6 accept"].map(Into::into)),
        }
        rules.extend(
            [
                "iifname \"lo\" accept",
                "ct state established,related accept",
                "ct status dnat accept",
            ]
            .map(Into::into),
        );
        for (family, number) in [("ip", 4), ("ip6", 6)] {
            rules.push(format!(
                "{family} daddr @cluster{number} counter name transit_ipv{number} drop"
            ));
        }
        rules
    }

    /// Postrouting: packets to pods leave by the tunnel or by a pod's interface only.
    fn leaving(&self) -> Vec<String> {
        if !self.drop_cleartext {
            return Vec::new();
        }
        let mut rules = vec!["oifname \"lo\" accept".to_owned()];
        rules.push(format!("oifname \"{}\" accept", self.interface));
        match self.pods {
            Some(_) => rules.push(format!("oifname \"{HOST_PREFIX}*\" accept")),
            // Pods' interfaces can have any name.
            None => rules
                .extend(["ip daddr @local4 accept", "ip6 daddr @local6 accept"].map(Into::into)),
        }
        for (family, number) in [("ip", 4), ("ip6", 6)] {
            rules.push(format!(
                "{family} daddr @cluster{number} counter name cleartext_ipv{number} drop"
            ));
        }
        rules
    }

    /// Postrouting: source NAT for pods and for foreign sources on the overlay.
    fn outward(&self) -> Vec<String> {
        let mut rules = Vec::new();
        let families = [("ip", 4, true), ("ip6", 6, false)];
        if self.masquerade_foreign {
            for (family, number, v4) in families {
                // Without an overlay address of the family, masquerading has no source address.
                if self.local.iter().any(|net| net.addr().is_ipv4() == v4) {
                    rules.push(format!(
                        "oifname \"{}\" {family} saddr != @local{number} masquerade fully-random",
                        self.interface
                    ));
                }
            }
        }
        let masquerade = self.pods.as_ref().is_some_and(|pods| pods.masquerade);
        // Outside the tunnel, the receiving node drops a pod's source.
        let to_nodes = self.drop_spoofed;
        if !masquerade && !to_nodes {
            return rules;
        }
        rules.push(format!("oifname \"{}\" accept", self.interface));
        if self.pods.is_some() {
            rules.push(format!("oifname \"{HOST_PREFIX}*\" accept"));
        }
        for (family, number, _) in families {
            let from_pods = format!("{family} saddr @local{number}");
            if to_nodes {
                rules.push(format!(
                    "{from_pods} {family} daddr @nodes{number} masquerade fully-random"
                ));
            }
            if masquerade {
                rules.push(format!(
                    "{from_pods} {family} daddr != @inside{number} masquerade fully-random"
                ));
            }
        }
        rules
    }

    /// Forward: marks for the accept rules in chains of other programs.
    fn passing(&self) -> Vec<String> {
        if !self.pods.as_ref().is_some_and(|pods| pods.forward_accept) {
            return Vec::new();
        }
        let mark = format!("meta mark set meta mark | {}", forward::MARK);
        vec![
            format!("oifname != \"{HOST_PREFIX}*\" accept"),
            format!("ct state established,related {mark}"),
            format!("ct status dnat {mark}"),
        ]
    }
}

/// Returns the key type of a set of addresses as an expression. nft 1.1.2 and later describe a key
/// that is declared by name (`type ipv4_addr`) in a form that crashes nft up to 1.1.1, which other
/// programs of the node may use.
fn address_type(v4: bool) -> &'static str {
    if v4 { "typeof ip saddr" } else { "typeof ip6 saddr" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_controls_its_own_rules() {
        let all = Rules::example().text();
        let count = |text: &str, word: &str| text.matches(word).count();
        for (rules, gone, chain) in [
            (Rules { drop_spoofed: false, ..Rules::example() }, "counter name spoofed", None),
            (
                Rules { drop_cleartext: false, ..Rules::example() },
                "counter name cleartext",
                Some("leaving"),
            ),
            (
                Rules { drop_transit: false, ..Rules::example() },
                "counter name transit",
                Some("transit"),
            ),
            (Rules { masquerade_foreign: false, ..Rules::example() }, "saddr != @local", None),
            (Rules { notrack: false, ..Rules::example() }, "notrack", Some("untracked")),
            (Rules { pods: None, ..Rules::example() }, "counter name forged", Some("from_pods")),
        ] {
            let text = rules.text();
            assert!(count(&all, gone) > 0 && count(&text, gone) == 0, "{gone}: {text}");
            let others = [
                "counter name spoofed",
                "counter name cleartext",
                "counter name transit",
                "notrack",
            ];
            for other in others.into_iter().filter(|other| *other != gone) {
                assert!(
                    count(&text, other) >= 2,
                    "The setting of {gone} must not remove {other}: {text}"
                );
            }
            if let Some(chain) = chain {
                assert!(text.contains(&format!("delete chain inet skein {chain}\n")), "{text}");
            }
        }
        assert_eq!(count(&all, "delete chain"), 0, "{all}");
    }

    #[test]
    fn sets_are_readable_by_older_versions_of_nft() {
        let text = Rules::example().text();
        let sets: Vec<_> = text.lines().filter(|line| line.starts_with("add set")).collect();
        assert_eq!(sets.len(), 10, "{text}");
        for set in sets {
            assert!(set.contains("{ typeof ip"), "nft 1.1.2 describes the key by its name: {set}");
        }
    }

    #[test]
    fn datagrams_from_the_overlays_ports_are_untracked() {
        let text = Rules::example().text();
        let output: Vec<_> = text.lines().filter(|line| line.contains(" untracked ")).collect();
        let rules_of = |text: &[&str]| text.iter().filter(|line| line.contains("notrack")).count();
        assert_eq!(rules_of(&output), 2, "{text}");
        for rule in output.iter().filter(|line| line.contains("notrack")) {
            assert!(rule.contains("udp sport { 51900, 40001 } ip"), "{rule}");
        }
        let unknown = Rules { source_ports: Vec::new(), ..Rules::example() }.text();
        assert!(!unknown.contains("@peers4 notrack"), "no port is known: {unknown}");
    }

    #[test]
    fn overlay_masquerade_needs_a_local_prefix_of_the_family() {
        let local = vec!["10.244.1.0/24".parse().unwrap_or_default()];
        let text = Rules { local, ..Rules::example() }.text();
        assert!(text.contains("ip saddr != @local4") && !text.contains("ip6 saddr != @local6"));
    }

    #[test]
    fn pods_are_masqueraded_to_nodes_without_cni_masquerade() {
        let mut rules = Rules::example();
        if let Some(pods) = &mut rules.pods {
            pods.masquerade = false;
        }
        let text = rules.text();
        assert!(text.contains("ip daddr @nodes4 masquerade"), "{text}");
        assert!(!text.contains("@inside4 masquerade"), "{text}");
        rules.drop_spoofed = false;
        assert!(
            !rules.text().contains("@nodes4 masquerade"),
            "Without the drop, nodes need no masquerading."
        );
    }

    #[test]
    fn rules_without_settings_are_empty() {
        let off = Rules {
            pods: None,
            drop_spoofed: false,
            drop_cleartext: false,
            drop_transit: false,
            masquerade_foreign: false,
            notrack: false,
            ..Rules::example()
        };
        assert!(off.is_empty() && !Rules::example().is_empty());
        assert!(!Rules { notrack: true, ..off }.is_empty());
    }
}
