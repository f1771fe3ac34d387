//! From what is known to steps and a verdict: pure.

use std::net::IpAddr;

use serde::Serialize;
use skein_ipc::{PeerReport, PeerState};

use super::facts::{Facts, Way};
use crate::status::{age, milliseconds};

/// A packet's way.
#[derive(Debug, Serialize)]
pub(super) struct Trace {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) steps: Vec<Step>,
    /// Whether it gets there, as far as this node can tell.
    pub(super) passes: bool,
    pub(super) verdict: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) grade: Grade,
    pub(super) says: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Grade {
    /// As it should be.
    Good,
    /// Good to know.
    Note,
    /// Here the packet ends.
    Bad,
}

use Grade::{Bad, Good, Note};

pub(super) fn judge(facts: &Facts) -> Trace {
    let mut steps = Steps(Vec::new());
    source(facts, &mut steps);
    let by = route(facts, &mut steps);
    let end = match (&facts.peer, by) {
        (Some((peer, outer)), _) => {
            overlay(facts, peer, outer.as_ref(), &mut steps);
            format!("it goes to {} through {}", peer.name, facts.status.interface.name)
        }
        (None, _) if facts.is_here(facts.to) => {
            steps.add("owner", Good, format!("{} is this node's", facts.to));
            format!("it stays on this node: {}", name(&facts.way))
        }
        (None, _) => {
            steps.add("owner", Note, format!("no node owns {}: not the overlay's", facts.to));
            format!("it leaves the overlay by {}", name(&facts.way))
        }
    };
    firewall(facts, &mut steps);
    let stop = steps.0.iter().find(|step| step.grade == Bad);
    Trace {
        from: facts.from,
        to: facts.to,
        passes: stop.is_none(),
        verdict: match stop {
            Some(step) => format!("{}: {}", step.name, step.says),
            None if others_may_drop(facts) => format!("{end}, unless rules of others drop it"),
            None => end,
        },
        steps: steps.0,
    }
}

struct Steps(Vec<Step>);

impl Steps {
    fn add(&mut self, name: &'static str, grade: Grade, says: impl Into<String>) {
        self.0.push(Step { name, grade, says: says.into() });
    }
}

fn name(way: &Way) -> String {
    way.link.as_ref().map_or_else(|| "no interface".to_owned(), |link| link.name.clone())
}

/// Who sends it.
fn source(facts: &Facts, steps: &mut Steps) {
    let from = facts.from;
    let mut add = |grade, says: String| steps.add("source", grade, says);
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
            // A pod that somebody else has attached.
            Some(link) if link.name != facts.status.interface.name && !link.loopback => {
                add(Good, format!("{from} is of this node's pod CIDRs, at {}", link.name));
            }
            _ => add(Bad, format!("{from} is of this node's pod CIDRs, but no pod has it")),
        },
        Ok(_) => add(Note, format!("{from} is no pod's: it comes by {}", name(&facts.sender))),
        Err(error) => add(Bad, format!("the kernel has no way to {from}: {error}")),
    }
}

/// Where the kernel sends it; whether that is the overlay.
fn route(facts: &Facts, steps: &mut Steps) -> bool {
    let interface = &facts.status.interface;
    let mut add = |grade, says: String| steps.add("route", grade, says);
    let found = match &facts.way.lookup {
        Err(error) => {
            add(
                Bad,
                format!(
                    "the kernel sends nothing to {to}: {error}: see ip route get {to}",
                    to = facts.to
                ),
            );
            return false;
        }
        Ok(found) => found,
    };
    if let Some(refused) = &found.refused {
        add(Bad, format!("a route of the kernel says {refused}"));
        return false;
    }
    let by = name(&facts.way);
    let via = found.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
    let mtu = found.mtu.map(|mtu| format!(", MTU {mtu}")).unwrap_or_default();
    let overlay = by == interface.name;
    match (&facts.peer, overlay) {
        (Some((peer, _)), false) => {
            let ready = if facts.status.ready { "" } else { " (the agent is not ready)" };
            add(
                Bad,
                format!(
                    "the kernel sends it by {by}{via} and not by {}, though {} owns it{ready}: \
                     look for another route (ip route get {})",
                    interface.name, peer.name, facts.to
                ),
            );
        }
        (None, true) if !facts.is_here(facts.to) => {
            add(Bad, format!("the kernel sends it by {by}, and no node owns {}", facts.to));
        }
        (None, true) => {
            add(Bad, format!("{} is this node's, but no pod has it: {by} drops it", facts.to));
        }
        _ if found.local => add(Good, "it is for this node itself".to_owned()),
        _ => add(Good, format!("by {by}{via}{mtu}")),
    }
    if let Some(link) = facts.way.link.as_ref().filter(|link| !link.up) {
        add(Bad, format!("interface {} is down", link.name));
    }
    overlay
}

fn overlay(facts: &Facts, peer: &PeerReport, outer: Option<&Way>, steps: &mut Steps) {
    let cidr = peer.pod_cidrs.iter().find(|cidr| cidr.contains(&facts.to));
    let cidr = cidr.map(ToString::to_string).unwrap_or_default();
    steps.add("owner", Good, format!("{} owns {cidr}", peer.name));
    session(peer, steps);
    match (peer.endpoint, outer) {
        (Some(endpoint), Some(outer)) => underlay(facts, endpoint, outer, steps),
        _ => steps.add(
            "underlay",
            Bad,
            format!("no endpoint of {} is of a family that this node listens on", peer.name),
        ),
    }
    let mtu = facts.status.interface.mtu;
    match peer.path_mtu {
        Some(path) => steps.add(
            "size",
            Note,
            format!("the path carries {path} of {mtu} bytes: longer packets are split or refused"),
        ),
        None => steps.add("size", Good, format!("packets of up to {mtu} bytes")),
    }
    match peer.gso {
        true => steps.add("batching", Good, "superpackets leave as UDP_SEGMENT messages"),
        false => steps.add("batching", Note, "one datagram at a time: see udp_gso in status"),
    }
}

fn session(peer: &PeerReport, steps: &mut Steps) {
    let mut says = peer.state.to_string();
    if let Some(seconds) = peer.handshake_age_seconds {
        says += &format!(", keys {} old", age(seconds));
    }
    if let Some(us) = peer.rtt_us {
        says += &format!(", round trip {}", milliseconds(us));
    }
    if let Some(reason) = &peer.reason {
        says += &format!(": {reason}");
    }
    let grade = match peer.state {
        PeerState::Established => Good,
        PeerState::Unreachable => Bad,
        PeerState::Idle | PeerState::Connecting => Note,
    };
    if peer.state == PeerState::Idle {
        says += ": the first packet begins a handshake";
    }
    steps.add("session", grade, says);
}

fn underlay(facts: &Facts, endpoint: std::net::SocketAddr, outer: &Way, steps: &mut Steps) {
    let mut add = |grade, says: String| steps.add("underlay", grade, says);
    match &outer.lookup {
        Err(error) => add(Bad, format!("no route to the endpoint {endpoint}: {error}")),
        Ok(found) if found.refused.is_some() => {
            add(Bad, format!("a route to the endpoint {endpoint} refuses"));
        }
        Ok(_) if name(outer) == facts.status.interface.name => {
            add(Bad, format!("the way to the endpoint {endpoint} leads into the overlay itself"));
        }
        Ok(found) => {
            let via = found.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
            let mtu = outer.link.as_ref().map_or(0, |link| link.mtu);
            let mtu = found.mtu.unwrap_or(mtu);
            add(Good, format!("to {endpoint} by {}{via}, MTU {mtu}", name(outer)));
        }
    }
}

/// Whether the packet is forwarded through chains of others that drop what none of their rules lets pass.
fn others_may_drop(facts: &Facts) -> bool {
    !facts.closed.is_empty() && !facts.sender.lookup.as_ref().is_ok_and(|found| found.local)
}

/// What the firewall makes of it on this node.
fn firewall(facts: &Facts, steps: &mut Steps) {
    let mut add = |grade, says: String| steps.add("firewall", grade, says);
    let own = facts.sender.lookup.as_ref().is_ok_and(|found| found.local);
    if !own && !facts.forwarding {
        add(Bad, "the kernel forwards nothing: set interface.forwarding, or the sysctl".to_owned());
    }
    let pods = facts.setting("/cni/enabled").as_bool() == Some(true);
    match facts.table {
        Some(false) => add(
            if pods { Bad } else { Note },
            "the nftables table of Skein is not in place: skein-agent status shows the reason"
                .to_owned(),
        ),
        _ if !pods => add(Note, "pods are not served (cni.enabled): no rules of Skein".to_owned()),
        _ if own => add(Good, "this node's own packets are not forwarded".to_owned()),
        _ => {
            let inside = inside(facts, facts.to);
            let masquerade = facts.setting("/cni/masquerade").as_bool() == Some(true);
            match (facts.peer.is_some() || inside, masquerade && facts.is_here(facts.from)) {
                (true, _) => add(Good, format!("keeps its source {}", facts.from)),
                (false, true) => {
                    add(Note, "masqueraded: leaves with the node's address".to_owned())
                }
                (false, false) => add(Note, "not masqueraded: nobody may know the way back".into()),
            }
        }
    }
    if others_may_drop(facts) {
        for closed in &facts.closed {
            add(
                Note,
                format!("whether a rule there lets this packet pass is not known here: {closed}"),
            );
        }
    }
}

/// Whether a pod keeps its address on the way to `address`.
fn inside(facts: &Facts, address: IpAddr) -> bool {
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
    use skein_netlink::lookup::Lookup;

    fn way(name: &str, lookup: Lookup) -> Way {
        let link = Link { name: name.to_owned(), up: true, mtu: 1500, ..Link::default() };
        Way { lookup: Ok(lookup), link: Some(link) }
    }

    /// A pod of this node sends to one of node-b's, and all is well.
    fn well() -> Facts {
        let other = peer("node-b", PeerState::Established);
        let mut status = document(0);
        status.ready = true;
        status.interface.name = "skein0".to_owned();
        status.interface.mtu = 1440;
        status.interface.local_cidrs = vec!["10.1.0.0/24".parse().unwrap()];
        status.report = Some(Report { peers: vec![other.clone()], ..Report::default() });
        status.config = json!({ "cni": { "enabled": true, "masquerade": true } });
        let skein = Lookup { skein: true, ..Lookup::default() };
        Facts {
            from: "10.1.0.2".parse().unwrap(),
            to: "10.2.0.3".parse().unwrap(),
            sender: way("skp1", skein.clone()),
            way: way("skein0", skein),
            peer: Some((other, Some(way("eth0", Lookup::default())))),
            forwarding: true,
            table: Some(true),
            closed: Vec::new(),
            status,
        }
    }

    fn stops(facts: &Facts, step: &str, word: &str) {
        let trace = judge(facts);
        assert!(!trace.passes, "{trace:?}");
        assert!(trace.verdict.starts_with(step) && trace.verdict.contains(word), "{trace:?}");
    }

    #[test]
    fn a_packet_to_another_node_passes() {
        let trace = judge(&well());
        assert!(trace.passes && trace.verdict.contains("to node-b through skein0"), "{trace:?}");
        assert!(trace.steps.iter().all(|step| step.grade == Good), "{trace:?}");
    }

    #[test]
    fn what_stops_it_is_named() {
        let mut facts = well();
        facts.peer.as_mut().unwrap().0 = peer("node-b", PeerState::Unreachable);
        stops(&facts, "session", "no answer for 7 s");
        let mut facts = well();
        facts.way = way("eth0", Lookup::default());
        stops(&facts, "route", "by eth0 and not by skein0");
        let mut facts = well();
        facts.way.lookup = Err("Network is unreachable".to_owned());
        stops(&facts, "route", "unreachable");
        let mut facts = well();
        facts.peer.as_mut().unwrap().1 = Some(way("skein0", Lookup::default()));
        stops(&facts, "underlay", "into the overlay itself");
        let mut facts = well();
        facts.sender = way("skein0", Lookup::default());
        stops(&facts, "source", "no pod has it");
        let mut facts = well();
        facts.forwarding = false;
        stops(&facts, "firewall", "forwards nothing");
        let mut facts = well();
        facts.way.link.as_mut().unwrap().up = false;
        stops(&facts, "route", "skein0 is down");
    }

    #[test]
    fn a_chain_of_somebody_that_may_drop_it_is_noted() {
        let mut facts = well();
        facts.closed = vec!["chain ip filter FORWARD drops".to_owned()];
        let trace = judge(&facts);
        let noted = |step: &Step| step.grade == Note && step.says.contains("not known here: chain");
        assert!(trace.passes && trace.steps.iter().any(noted), "{trace:?}");
        assert!(trace.verdict.ends_with("unless rules of others drop it"), "{trace:?}");
        // This node's own packets do not pass there.
        facts.sender = way("lo", Lookup { local: true, ..Lookup::default() });
        let own = judge(&facts);
        assert!(!own.verdict.contains("unless") && !own.steps.iter().any(noted), "{own:?}");
    }

    #[test]
    fn other_nodes_senders_are_foreign() {
        let mut facts = well();
        assert!(facts.foreign().is_none());
        facts.sender = way("skein0", Lookup { skein: true, ..Lookup::default() });
        facts.from = "10.2.0.9".parse().unwrap();
        assert_eq!(facts.foreign().unwrap().name, "node-b");
        let endpoint = facts.status.report.as_ref().unwrap().peers[0].endpoint.unwrap();
        facts.from = endpoint.ip();
        assert_eq!(facts.foreign().unwrap().name, "node-b");
        // A client from outside, whose packets come by here.
        facts.from = "198.51.100.7".parse().unwrap();
        assert!(facts.foreign().is_none());
    }

    #[test]
    fn a_packet_to_the_outside_is_masqueraded() {
        let mut facts = well();
        facts.to = "198.51.100.7".parse().unwrap();
        facts.way = way("eth0", Lookup::default());
        facts.peer = None;
        let trace = judge(&facts);
        assert!(trace.passes && trace.verdict.contains("by eth0"), "{trace:?}");
        assert!(trace.steps.iter().any(|step| step.says.contains("masqueraded")), "{trace:?}");
    }
}
