//! Status of this node's SkeinNode as a pure function of the agent's state. `publish` writes it.

use k8s_openapi::jiff::Timestamp;
use skein_ipc::{Capability, UnreachablePeer};
use skein_netlink::firewall::reconciler::FirewallStatus;

use super::resource::{Condition, SkeinNodeStatus, offloads};

/// Condition type: pods of the node have a network.
const READY: &str = "Ready";
/// Condition type: all peers to which the node sends respond.
const PEERS: &str = "PeersReachable";

/// Condition type: no chain of another program drops forwarded packets of pods.
const FORWARDING: &str = "ForwardingAllowed";

/// Maximum number of peers that a condition's message names.
const MAX_NAMED_PEERS: usize = 5;
/// Maximum length of a condition's message, characters.
const MAX_MESSAGE_CHARS: usize = 400;

/// Observed state of the node.
pub(super) struct ObservedState<'a> {
    /// Generation of the spec that the watch has reported.
    pub(super) generation: Option<i64>,
    pub(super) capabilities: &'a [Capability],
    /// MTU of pods, bytes.
    pub(super) mtu: u16,
    /// Reasons why the agent is not ready.
    pub(super) reasons: &'a [String],
    pub(super) unreachable: &'a [UnreachedPeer],
    /// Status of the firewall; `None` until the firewall was started.
    pub(super) firewall: Option<&'a FirewallStatus>,
}

/// A peer that the node does not reach over the overlay.
#[derive(Debug, Clone)]
pub(super) struct UnreachedPeer {
    /// Name of the node.
    pub(super) name: String,
    /// Reason, for users.
    pub(super) reason: String,
}

impl From<&UnreachablePeer> for UnreachedPeer {
    fn from(peer: &UnreachablePeer) -> Self {
        Self { name: peer.name.clone(), reason: peer.reason.to_string() }
    }
}

/// Returns the status for the observed state. `before` is the present status; the transition time
/// of an unchanged condition stays.
pub(super) fn status(
    before: Option<&SkeinNodeStatus>,
    known: &ObservedState<'_>,
    now: Timestamp,
) -> SkeinNodeStatus {
    let condition = |kind: &str, verdict: Verdict| {
        let Verdict { is, reason, message } = verdict;
        let status = is.map_or("Unknown", |is| if is { "True" } else { "False" });
        let since = before.and_then(|before| find(before, kind));
        let since = since.filter(|condition| condition.status == status);
        Condition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            last_transition_time: since
                .map_or_else(|| text(now), |same| same.last_transition_time.clone()),
            observed_generation: known.generation,
        }
    };
    let ready = match known.reasons {
        [] => Verdict::new(Some(true), "AgentReady", "pods have a network"),
        reasons => Verdict::new(Some(false), "AgentNotReady", shortened(&reasons.join("; "))),
    };
    let peers = match known.unreachable {
        [] => Verdict::new(Some(true), "NoneSilent", "all peers respond"),
        silent => Verdict::new(Some(false), "PeersUnreachable", names(silent)),
    };
    let (ready, peers) = (condition(READY, ready), condition(PEERS, peers));
    let forwarding = condition(FORWARDING, forwarding(known.firewall));
    SkeinNodeStatus {
        observed_generation: known.generation,
        agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        mtu: Some(known.mtu.into()),
        offloads: Some(offloads(known.capabilities)),
        capabilities: known.capabilities.iter().map(Into::into).collect(),
        conditions: vec![ready, peers, forwarding],
    }
}

/// Content of a condition.
struct Verdict {
    /// True if the condition holds; `None` if that is not known.
    is: Option<bool>,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn new(is: Option<bool>, reason: &'static str, message: impl Into<String>) -> Self {
        Self { is, reason, message: message.into() }
    }
}

/// Returns the content of the condition ForwardingAllowed.
fn forwarding(firewall: Option<&FirewallStatus>) -> Verdict {
    match firewall {
        Some(firewall) if !firewall.closed.is_empty() => {
            Verdict::new(Some(false), "ForwardDropped", shortened(&firewall.closed.join("; ")))
        }
        Some(firewall) if !firewall.unknown.is_empty() => {
            Verdict::new(None, "PolicyUnknown", shortened(&firewall.unknown.join("; ")))
        }
        Some(firewall) if firewall.forward_read => {
            let message = "no chain of another program drops packets of pods";
            Verdict::new(Some(true), "NoChainDrops", message)
        }
        _ => {
            let message = "the FORWARD chains of other programs have not been read";
            Verdict::new(None, "PolicyUnknown", message)
        }
    }
}

/// Returns the status of the SkeinNode while the agent is not ready and the data process is
/// unknown; the rest of `before` stays.
pub(super) fn unready(
    before: Option<&SkeinNodeStatus>,
    generation: Option<i64>,
    reasons: &[String],
    now: Timestamp,
) -> SkeinNodeStatus {
    let (capabilities, unreachable, firewall) = (&[], &[], None);
    let known = ObservedState { generation, capabilities, mtu: 0, reasons, unreachable, firewall };
    let SkeinNodeStatus { observed_generation, agent_version, mut conditions, .. } =
        status(before, &known, now);
    conditions.retain(|condition| condition.kind == READY);
    let others = before.into_iter().flat_map(|before| &before.conditions);
    conditions.extend(others.filter(|condition| condition.kind != READY).cloned());
    let before = before.cloned().unwrap_or_default();
    SkeinNodeStatus { observed_generation, agent_version, conditions, ..before }
}

/// Returns the names and reasons of the first unreachable peers, and the number of further ones.
fn names(silent: &[UnreachedPeer]) -> String {
    let each =
        silent.iter().take(MAX_NAMED_PEERS).map(|peer| format!("{} ({})", peer.name, peer.reason));
    let text = shortened(&each.collect::<Vec<_>>().join(", "));
    match silent.len().saturating_sub(MAX_NAMED_PEERS) {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// Returns the first [`MAX_MESSAGE_CHARS`] characters.
fn shortened(text: &str) -> String {
    match text.chars().count() > MAX_MESSAGE_CHARS {
        true => text.chars().take(MAX_MESSAGE_CHARS).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

fn find<'a>(status: &'a SkeinNodeStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|condition| condition.kind == kind)
}

/// Returns the status without conditions of other programs.
pub(super) fn own_conditions(mut status: SkeinNodeStatus) -> SkeinNodeStatus {
    status
        .conditions
        .retain(|condition| [READY, PEERS, FORWARDING].contains(&condition.kind.as_str()));
    status
}

/// Returns whether the condition Ready differs.
pub(super) fn readiness_differs(before: Option<&SkeinNodeStatus>, now: &SkeinNodeStatus) -> bool {
    let ready = |status| find(status, READY).map(|condition| condition.status.as_str());
    before.and_then(ready) != ready(now)
}

/// Returns whether `now` reports unreachable peers and `before` does not.
pub(super) fn peers_became_unreachable(
    before: Option<&SkeinNodeStatus>,
    now: &SkeinNodeStatus,
) -> bool {
    let is_false =
        |status| find(status, PEERS).is_some_and(|condition| condition.status == "False");
    is_false(now) && !before.is_some_and(is_false)
}

/// Returns the time in whole seconds, as the API represents times.
pub(super) fn text(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_ipc::{CapabilityName, CapabilityState};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn known<'a>(
        capabilities: &'a [Capability],
        reasons: &'a [String],
        unreachable: &'a [UnreachedPeer],
    ) -> ObservedState<'a> {
        ObservedState {
            generation: Some(1),
            capabilities,
            mtu: 1440,
            reasons,
            unreachable,
            firewall: None,
        }
    }

    fn udp_gso(state: CapabilityState) -> Capability {
        Capability { name: CapabilityName::UdpGso.into(), state: state.into(), reason: None }
    }

    fn silent(name: &str) -> UnreachedPeer {
        UnreachedPeer { name: name.into(), reason: "nothing comes back".into() }
    }

    #[test]
    fn transition_time_changes_with_the_status_only() {
        let (on, off) = ([udp_gso(CapabilityState::On)], [udp_gso(CapabilityState::Degraded)]);
        let first = status(None, &known(&on, &[], &[]), at(1));
        assert_eq!(first.conditions[0].last_transition_time, "1970-01-01T00:00:01Z");
        assert_eq!(status(Some(&first), &known(&on, &[], &[]), at(9)), first);
        let ill = status(Some(&first), &known(&on, &["why".into()], &[]), at(9));
        assert_eq!(ill.conditions[0].last_transition_time, "1970-01-01T00:00:09Z");
        assert_eq!(
            ill.conditions[1], first.conditions[1],
            "the condition of the peers is unchanged"
        );
        assert_eq!(
            (ill.conditions[0].status.as_str(), ill.offloads.as_deref()),
            ("False", Some("all"))
        );
        assert!(
            readiness_differs(Some(&first), &ill) && !peers_became_unreachable(Some(&first), &ill)
        );
        let off = status(Some(&first), &known(&off, &[], &[]), at(9));
        assert_eq!(off.offloads.as_deref(), Some("none"));
    }

    #[test]
    fn closed_forward_chain_is_a_condition_with_the_remedy() {
        let forwarding = |closed: &[String]| {
            // A closed chain counts more than one with an unknown policy.
            let unknown = closed.iter().map(|_| "chain FORWARD of iptables-legacy".to_owned());
            let (closed, unknown) = (closed.to_vec(), unknown.collect());
            forwarding_condition(Some(FirewallStatus {
                closed,
                unknown,
                forward_read: true,
                ..FirewallStatus::default()
            }))
        };
        assert_eq!(forwarding(&[]).status, "True");
        let closed = forwarding(&["chain ip filter FORWARD drops: set it".to_owned()]);
        assert_eq!((&*closed.status, &*closed.reason), ("False", "ForwardDropped"));
        assert!(closed.message.ends_with("set it"), "{closed:?}");
        assert!(forwarding(&["x".repeat(900)]).message.chars().count() <= MAX_MESSAGE_CHARS + 1);
    }

    fn forwarding_condition(firewall: Option<FirewallStatus>) -> Condition {
        let known = ObservedState { firewall: firewall.as_ref(), ..known(&[], &[], &[]) };
        find(&status(None, &known, at(1)), "ForwardingAllowed").cloned().unwrap()
    }

    #[test]
    fn unreadable_forward_policy_is_unknown_with_the_reason() {
        let legacy = "chain FORWARD of iptables-legacy is in use".to_owned();
        let unknown = forwarding_condition(Some(FirewallStatus {
            unknown: vec![legacy.clone()],
            forward_read: true,
            ..FirewallStatus::default()
        }));
        assert_eq!((&*unknown.status, &*unknown.reason), ("Unknown", "PolicyUnknown"));
        assert_eq!(unknown.message, legacy);
    }

    #[test]
    fn forward_policy_before_the_first_reading_is_unknown() {
        for firewall in [None, Some(FirewallStatus::default())] {
            let unknown = forwarding_condition(firewall);
            assert_eq!((&*unknown.status, &*unknown.reason), ("Unknown", "PolicyUnknown"));
            assert!(unknown.message.contains("have not been read"), "{unknown:?}");
        }
    }

    #[test]
    fn unready_agent_changes_its_readiness_only() {
        let on = [udp_gso(CapabilityState::On)];
        let well = status(None, &known(&on, &[], &[silent("node-b")]), at(1));
        let ill = unready(Some(&well), Some(2), &["why".into()], at(9));
        let (ready, peers) = (&ill.conditions[0], &ill.conditions[1]);
        assert_eq!((ready.status.as_str(), ready.message.as_str()), ("False", "why"));
        assert_eq!(ready.last_transition_time, "1970-01-01T00:00:09Z");
        assert_eq!(*peers, well.conditions[1]);
        assert_eq!((ill.mtu, &ill.capabilities), (well.mtu, &well.capabilities));
        assert_eq!(unready(Some(&ill), Some(2), &["why".into()], at(20)), ill);
        let first = unready(None, Some(1), &["why".into()], at(1));
        assert_eq!((first.conditions.len(), first.mtu), (1, None));
    }

    #[test]
    fn silent_peers_are_named_with_the_reason() {
        let well = status(None, &known(&[], &[], &[]), at(1));
        assert_eq!(
            (well.conditions[1].kind.as_str(), well.conditions[1].status.as_str()),
            ("PeersReachable", "True")
        );
        let one = [silent("node-b")];
        let ill = status(Some(&well), &known(&[], &[], &one), at(5));
        let condition = &ill.conditions[1];
        assert_eq!((condition.status.as_str(), &*condition.reason), ("False", "PeersUnreachable"));
        assert_eq!(condition.message, "node-b (nothing comes back)");
        assert_eq!(condition.last_transition_time, "1970-01-01T00:00:05Z");
        assert!(
            peers_became_unreachable(Some(&well), &ill) && peers_became_unreachable(None, &ill)
        );
        assert!(!readiness_differs(Some(&well), &ill));
        // Another unreachable peer is neither a transition nor urgent.
        let two = [silent("node-b"), silent("node-c")];
        let more = status(Some(&ill), &known(&[], &[], &two), at(9));
        assert_eq!(more.conditions[1].last_transition_time, "1970-01-01T00:00:05Z");
        assert!(!peers_became_unreachable(Some(&ill), &more));
        assert!(!peers_became_unreachable(Some(&ill), &well), "a recovery is not urgent");
    }

    #[test]
    fn many_unreachable_peers_give_a_short_message() {
        let all: Vec<_> = (0..1000).map(|n| silent(&format!("node-{n}"))).collect();
        let text = names(&all);
        assert!(text.ends_with("node-4 (nothing comes back) and 995 more"), "{text}");
        let long = vec![silent(&"é".repeat(253)); 7];
        let text = names(&long);
        assert!(
            text.chars().count() < MAX_MESSAGE_CHARS + 20 && text.ends_with("… and 2 more"),
            "{text}"
        );
    }
}
