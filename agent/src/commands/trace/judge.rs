//! Evaluation of a trace: steps and verdict from [`Facts`], without I/O.

use std::net::IpAddr;

use serde::Serialize;
use skein_ipc::{PeerReport, PeerState};

use super::facts::{Facts, RouteResult};
use crate::status::{age, milliseconds};

/// Result of a trace.
#[derive(Debug, Serialize)]
pub(super) struct Trace {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) steps: Vec<Step>,
    /// No step stops the packet, as far as this node knows.
    pub(super) passes: bool,
    pub(super) verdict: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) grade: Grade,
    #[serde(rename = "says")]
    pub(super) detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Grade {
    /// The packet passes this step.
    Good,
    /// The packet passes this step; the detail is useful for a diagnosis.
    Note,
    /// The packet stops here.
    Bad,
}

use Grade::{Bad, Good, Note};

/// Evaluates the steps of the packet in their order. The first step with [`Bad`] is the verdict.
pub(super) fn judge(facts: &Facts) -> Trace {
    let mut steps = Steps(Vec::new());
    source(facts, &mut steps);
    route(facts, &mut steps);
    let end = match &facts.peer {
        Some((peer, outer)) => {
            overlay(facts, peer, outer.as_ref(), &mut steps);
            format!("the packet goes to {} through {}", peer.name, facts.status.interface.name)
        }
        None if facts.is_here(facts.to) => {
            steps.add("owner", Good, format!("{} belongs to this node", facts.to));
            format!("the packet stays on this node: {}", name(&facts.route))
        }
        None => {
            steps.add("owner", Note, format!("no node owns {}: not part of the overlay", facts.to));
            format!("the packet leaves the overlay by {}", name(&facts.route))
        }
    };
    firewall(facts, &mut steps);
    let stop = steps.0.iter().find(|step| step.grade == Bad);
    Trace {
        from: facts.from,
        to: facts.to,
        passes: stop.is_none(),
        verdict: match stop {
            Some(step) => format!("{}: {}", step.name, step.detail),
            None if other_chains_may_drop(facts) => {
                format!("{end}, unless rules of other programs drop it")
            }
            None => end,
        },
        steps: steps.0,
    }
}

struct Steps(Vec<Step>);

impl Steps {
    fn add(&mut self, name: &'static str, grade: Grade, detail: impl Into<String>) {
        self.0.push(Step { name, grade, detail: detail.into() });
    }
}

fn name(route: &RouteResult) -> String {
    route.link.as_ref().map_or_else(|| "no interface".to_owned(), |link| link.name.clone())
}

/// Adds the step about the sender.
fn source(facts: &Facts, steps: &mut Steps) {
    let from = facts.from;
    let mut add = |grade, detail: String| steps.add("source", grade, detail);
    match &facts.sender.lookup {
        Ok(found) if found.local => add(Good, format!("{from} is this node itself")),
        Ok(found) if found.skein && facts.is_here(from) => {
            let link = facts.sender.link.as_ref();
            let alias = link.map_or("", |link| link.alias.as_str());
            let pod = alias.strip_prefix("skein-pod:").and_then(|rest| rest.split_once(':'));
            let pod = pod.map(|(_, pod)| format!(" ({pod})")).unwrap_or_default();
            add(Good, format!("{from} is a pod of this node, at {}{pod}", name(&facts.sender)));
        }
        Ok(_) if facts.is_here(from) => match &facts.sender.link {
            // A pod that another CNI plugin has attached.
            Some(link) if link.name != facts.status.interface.name && !link.loopback => {
                add(Good, format!("{from} is in this node's pod CIDRs, at {}", link.name));
            }
            _ => {
                add(Bad, format!("{from} is in this node's pod CIDRs, but no pod has the address"))
            }
        },
        Ok(_) => {
            add(Note, format!("{from} is not a pod: its packets arrive by {}", name(&facts.sender)))
        }
        Err(error) => add(Bad, format!("the kernel has no route to {from}: {error}")),
    }
}

/// Adds the step about the kernel's route.
fn route(facts: &Facts, steps: &mut Steps) {
    let interface = &facts.status.interface;
    let mut add = |grade, detail: String| steps.add("route", grade, detail);
    let found = match &facts.route.lookup {
        Err(error) => {
            add(
                Bad,
                format!(
                    "the kernel has no route to {to}: {error}. See ip route get {to}.",
                    to = facts.to
                ),
            );
            return;
        }
        Ok(found) => found,
    };
    if let Some(refused) = &found.refused {
        add(Bad, format!("the kernel's route refuses the packet: {refused}"));
        return;
    }
    let by = name(&facts.route);
    let via = found.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
    let mtu = found.mtu.map(|mtu| format!(", MTU {mtu}")).unwrap_or_default();
    let overlay = by == interface.name;
    match (&facts.peer, overlay) {
        (Some((peer, _)), false) => {
            let ready = if facts.status.ready { "" } else { " (the agent is not ready)" };
            add(
                Bad,
                format!(
                    "the kernel sends the packet by {by}{via} and not by {}, although {} owns the \
                     destination{ready}. Find the conflicting route with ip route get {}.",
                    interface.name, peer.name, facts.to
                ),
            );
        }
        (None, true) if !facts.is_here(facts.to) => {
            add(Bad, format!("the kernel sends the packet by {by}, and no node owns {}", facts.to));
        }
        (None, true) => {
            add(
                Bad,
                format!(
                    "{} is in this node's pod CIDRs, but no pod has the address: {by} drops it",
                    facts.to
                ),
            );
        }
        _ if found.local => add(Good, "the destination is this node itself".to_owned()),
        _ => add(Good, format!("by {by}{via}{mtu}")),
    }
    if let Some(link) = facts.route.link.as_ref().filter(|link| !link.up) {
        add(Bad, format!("interface {} is down", link.name));
    }
}

fn overlay(facts: &Facts, peer: &PeerReport, outer: Option<&RouteResult>, steps: &mut Steps) {
    let cidr = peer.pod_cidrs.iter().find(|cidr| cidr.contains(&facts.to));
    let cidr = cidr.map(ToString::to_string).unwrap_or_default();
    steps.add("owner", Good, format!("{} owns {cidr}", peer.name));
    session(peer, steps);
    match (peer.endpoint, outer) {
        (Some(endpoint), Some(outer)) => underlay(facts, endpoint, outer, steps),
        _ => steps.add(
            "underlay",
            Bad,
            format!("no endpoint of {} has an address family that this node listens on", peer.name),
        ),
    }
    let mtu = facts.status.interface.mtu;
    match peer.path_mtu {
        Some(path) => steps.add(
            "size",
            Note,
            format!(
                "the path MTU is {path} bytes, less than the {mtu} bytes of the interface. Longer \
                 packets are fragmented or rejected"
            ),
        ),
        None => steps.add("size", Good, format!("packets of up to {mtu} bytes")),
    }
    match peer.gso {
        true => steps.add("batching", Good, "superpackets are sent as UDP_SEGMENT messages"),
        false => steps.add(
            "batching",
            Note,
            "each datagram is sent on its own: see udp_gso in skein-agent status",
        ),
    }
}

fn session(peer: &PeerReport, steps: &mut Steps) {
    let mut detail = peer.state.to_string();
    if let Some(seconds) = peer.handshake_age_seconds {
        detail += &format!(", keys {} old", age(seconds));
    }
    if let Some(us) = peer.rtt_us {
        detail += &format!(", round-trip time {}", milliseconds(us));
    }
    if let Some(reason) = &peer.reason {
        detail += &format!(": {reason}");
    }
    let grade = match peer.state.known() {
        Some(PeerState::Established) => Good,
        Some(PeerState::Unreachable) => Bad,
        Some(PeerState::Idle | PeerState::Connecting) | None => Note,
    };
    if peer.state == PeerState::Idle {
        detail += ": the first packet starts a handshake";
    }
    steps.add("session", grade, detail);
}

fn underlay(facts: &Facts, endpoint: std::net::SocketAddr, outer: &RouteResult, steps: &mut Steps) {
    let mut add = |grade, detail: String| steps.add("underlay", grade, detail);
    match &outer.lookup {
        Err(error) => add(Bad, format!("no route to the endpoint {endpoint}: {error}")),
        Ok(found) if found.refused.is_some() => {
            add(Bad, format!("the route to the endpoint {endpoint} refuses packets"));
        }
        Ok(_) if name(outer) == facts.status.interface.name => {
            add(Bad, format!("the route to the endpoint {endpoint} leads into the overlay itself"));
        }
        Ok(found) => {
            let via = found.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
            let mtu = outer.link.as_ref().map_or(0, |link| link.mtu);
            let mtu = found.mtu.unwrap_or(mtu);
            add(Good, format!("to {endpoint} by {}{via}, MTU {mtu}", name(outer)));
        }
    }
}

/// Returns whether the packet is forwarded through chains of other programs whose policy is drop.
fn other_chains_may_drop(facts: &Facts) -> bool {
    !facts.dropping_chains.is_empty()
        && !facts.sender.lookup.as_ref().is_ok_and(|found| found.local)
}

/// Adds the steps about forwarding, masquerading and the forward chains.
fn firewall(facts: &Facts, steps: &mut Steps) {
    let mut add = |grade, detail: String| steps.add("firewall", grade, detail);
    let own = facts.sender.lookup.as_ref().is_ok_and(|found| found.local);
    if !own && !facts.forwarding {
        add(
            Bad,
            "the kernel forwards no packets. Set interface.forwarding, or the sysctl.".to_owned(),
        );
    }
    let pods = facts.setting("/cni/enabled").as_bool() == Some(true);
    match facts.table {
        Some(false) => add(
            if pods { Bad } else { Note },
            "Skein's nftables table is missing: skein-agent status shows the reason".to_owned(),
        ),
        _ if !pods => {
            add(Note, "Skein has no rules for pods, because cni.enabled is false".to_owned())
        }
        _ if own => add(Good, "packets of this node itself are not forwarded".to_owned()),
        _ => {
            let inside = is_inside(facts, facts.to);
            let masquerade = facts.setting("/cni/masquerade").as_bool() == Some(true);
            match (facts.peer.is_some() || inside, masquerade && facts.is_here(facts.from)) {
                (true, _) => add(Good, format!("the packet keeps its source {}", facts.from)),
                (false, true) => {
                    add(Note, "masqueraded: the packet leaves with the node's address".to_owned())
                }
                (false, false) => add(
                    Note,
                    "not masqueraded: the destination may have no route for the answer".into(),
                ),
            }
        }
    }
    if other_chains_may_drop(facts) {
        for chain in &facts.dropping_chains {
            add(Note, format!("rules of other programs are not evaluated: {chain}"));
        }
    }
}

/// Returns whether packets of pods to `address` keep their source address.
fn is_inside(facts: &Facts, address: IpAddr) -> bool {
    let mut nets = facts.nets("/cluster_cidrs");
    nets.extend(facts.nets("/cni/no_masquerade"));
    facts.is_here(address)
        || facts.owner(address).is_some()
        || nets.iter().any(|net| net.contains(&address))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::status::tests::{document, peer};
    use skein_ipc::Report;
    use skein_netlink::link::Link;
    use skein_netlink::lookup::RouteLookup;

    fn route_by(name: &str, lookup: RouteLookup) -> RouteResult {
        let link = Link { name: name.to_owned(), up: true, mtu: 1500, ..Link::default() };
        RouteResult { lookup: Ok(lookup), link: Some(link) }
    }

    /// Returns facts of a packet from a pod of this node to a pod of node-b that passes.
    fn passing() -> Facts {
        let other = peer("node-b", PeerState::Established);
        let mut status = document(0);
        status.ready = true;
        status.interface.name = "skein0".to_owned();
        status.interface.mtu = 1440;
        status.interface.local_cidrs = vec!["10.1.0.0/24".parse().unwrap()];
        status.report = Some(Report { peers: vec![other.clone()], ..Report::default() });
        status.config = json!({ "cni": { "enabled": true, "masquerade": true } });
        let skein = RouteLookup { skein: true, ..RouteLookup::default() };
        Facts {
            from: "10.1.0.2".parse().unwrap(),
            to: "10.2.0.3".parse().unwrap(),
            sender: route_by("skp1", skein.clone()),
            route: route_by("skein0", skein),
            peer: Some((other, Some(route_by("eth0", RouteLookup::default())))),
            forwarding: true,
            table: Some(true),
            dropping_chains: Vec::new(),
            status,
        }
    }

    fn stops(facts: &Facts, step: &str, word: &str) {
        let trace = judge(facts);
        assert!(!trace.passes, "{trace:?}");
        assert!(trace.verdict.starts_with(step) && trace.verdict.contains(word), "{trace:?}");
    }

    #[test]
    fn packet_to_peer_passes() {
        let trace = judge(&passing());
        assert!(trace.passes && trace.verdict.contains("to node-b through skein0"), "{trace:?}");
        assert!(trace.steps.iter().all(|step| step.grade == Good), "{trace:?}");
    }

    #[test]
    fn verdict_names_step_that_stops_packet() {
        let mut facts = passing();
        facts.peer.as_mut().unwrap().0 = peer("node-b", PeerState::Unreachable);
        stops(&facts, "session", "handshakes get no answer");
        let mut facts = passing();
        facts.route = route_by("eth0", RouteLookup::default());
        stops(&facts, "route", "by eth0 and not by skein0");
        let mut facts = passing();
        facts.route.lookup = Err(std::io::Error::other("Network is unreachable"));
        stops(&facts, "route", "unreachable");
        let mut facts = passing();
        facts.peer.as_mut().unwrap().1 = Some(route_by("skein0", RouteLookup::default()));
        stops(&facts, "underlay", "into the overlay itself");
        let mut facts = passing();
        facts.sender = route_by("skein0", RouteLookup::default());
        stops(&facts, "source", "no pod has the address");
        let mut facts = passing();
        facts.forwarding = false;
        stops(&facts, "firewall", "forwards no packets");
        let mut facts = passing();
        facts.route.link.as_mut().unwrap().up = false;
        stops(&facts, "route", "skein0 is down");
    }

    #[test]
    fn dropping_chain_of_other_program_is_a_note() {
        let mut facts = passing();
        facts.dropping_chains = vec!["chain ip filter FORWARD drops".to_owned()];
        let trace = judge(&facts);
        let noted =
            |step: &Step| step.grade == Note && step.detail.contains("not evaluated: chain");
        assert!(trace.passes && trace.steps.iter().any(noted), "{trace:?}");
        assert!(trace.verdict.ends_with("unless rules of other programs drop it"), "{trace:?}");
        // Packets of this node itself do not pass forward chains.
        facts.sender = route_by("lo", RouteLookup { local: true, ..RouteLookup::default() });
        let own = judge(&facts);
        assert!(!own.verdict.contains("unless") && !own.steps.iter().any(noted), "{own:?}");
    }

    #[test]
    fn sender_on_peer_is_remote() {
        let mut facts = passing();
        assert!(facts.remote_sender().is_none());
        facts.sender = route_by("skein0", RouteLookup { skein: true, ..RouteLookup::default() });
        facts.from = "10.2.0.9".parse().unwrap();
        assert_eq!(facts.remote_sender().unwrap().name, "node-b");
        let endpoint = facts.status.report.as_ref().unwrap().peers[0].endpoint.unwrap();
        facts.from = endpoint.ip();
        assert_eq!(facts.remote_sender().unwrap().name, "node-b");
        // A client outside of the cluster, whose packets this node forwards.
        facts.from = "198.51.100.7".parse().unwrap();
        assert!(facts.remote_sender().is_none());
    }

    #[test]
    fn packet_to_the_outside_is_masqueraded() {
        let mut facts = passing();
        facts.to = "198.51.100.7".parse().unwrap();
        facts.route = route_by("eth0", RouteLookup::default());
        facts.peer = None;
        let trace = judge(&facts);
        assert!(trace.passes && trace.verdict.contains("by eth0"), "{trace:?}");
        assert!(trace.steps.iter().any(|step| step.detail.contains("masqueraded")), "{trace:?}");
    }
}
