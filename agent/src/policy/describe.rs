//! Rules of policies in words.

use skein_policy::api::{LabelSelector, Operator};
use skein_policy::model::{
    Action, Direction, NamespaceScope, Peers, PodTerm, PortSpec, Ports, Rule,
};

/// Describes a rule: action, peers, and ports.
pub(super) fn rule_text(rule: &Rule, direction: Direction) -> String {
    let action = match rule.action {
        Action::Accept => "accept",
        Action::Deny => "deny",
        Action::Pass => "pass",
    };
    let preposition = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let (peers, ports) = (peers_text(&rule.peers), ports_text(&rule.ports));
    let name = if rule.name.is_empty() { String::new() } else { format!(" ({})", rule.name) };
    format!("rule {}{name}: {action} {preposition} {peers}, {ports}", rule.index)
}

fn peers_text(peers: &Peers) -> String {
    if peers.any {
        return "every address".to_owned();
    }
    let mut texts = Vec::new();
    texts.extend(peers.all_pods.then(|| "all pods".to_owned()));
    texts.extend(peers.terms.iter().map(term_text));
    texts.extend(peers.blocks.iter().map(ToString::to_string));
    texts.extend(peers.nodes.iter().map(|selector| match selector.is_empty() {
        true => "all nodes".to_owned(),
        false => format!("nodes with {}", selector_text(selector)),
    }));
    match texts.is_empty() {
        true => "no address".to_owned(),
        false => texts.join(" or "),
    }
}

fn term_text(term: &PodTerm) -> String {
    let pods = match term.pods.is_empty() {
        true => "pods".to_owned(),
        false => format!("pods with {}", selector_text(&term.pods)),
    };
    match &term.namespaces {
        NamespaceScope::Named(name) => format!("{pods} in namespace {name}"),
        NamespaceScope::Labelled(selector) if selector.is_empty() => {
            format!("{pods} in all namespaces")
        }
        NamespaceScope::Labelled(selector) => {
            format!("{pods} in namespaces with {}", selector_text(selector))
        }
    }
}

/// Returns a selector in the notation of kubectl.
fn selector_text(selector: &LabelSelector) -> String {
    let list = |values: &std::collections::BTreeSet<String>| {
        values.iter().map(String::as_str).collect::<Vec<_>>().join(",")
    };
    let equal = selector.match_labels.iter().map(|(key, value)| format!("{key}={value}"));
    let others = selector.match_expressions.iter().map(|one| match &one.operator {
        Operator::In(values) => format!("{} in ({})", one.key, list(values)),
        Operator::NotIn(values) => format!("{} notin ({})", one.key, list(values)),
        Operator::Exists => one.key.clone(),
        Operator::DoesNotExist => format!("!{}", one.key),
    });
    equal.chain(others).collect::<Vec<_>>().join(",")
}

fn ports_text(ports: &Ports) -> String {
    let entry = |spec: &PortSpec| match spec {
        PortSpec::Protocol(protocol) => format!("all {} ports", protocol.as_str()),
        PortSpec::Range(protocol, range) => format!("{} {range}", protocol.as_str()),
        PortSpec::Named(Some(protocol), name) => format!("{} {name}", protocol.as_str()),
        PortSpec::Named(None, name) => format!("port {name}"),
    };
    match ports {
        Ports::Any => "every protocol".to_owned(),
        Ports::List(list) if list.is_empty() => "no port".to_owned(),
        Ports::List(list) => list.iter().map(entry).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;
    use skein_policy::model::resolve_network_policy;

    use super::*;

    #[test]
    fn rule_is_described_with_peers_and_ports() {
        let policy = json!({
            "metadata": { "name": "web", "namespace": "shop" },
            "spec": {
                "podSelector": {},
                "ingress": [{
                    "from": [
                        { "podSelector": { "matchLabels": { "app": "a" } } },
                        { "namespaceSelector": { "matchExpressions": [
                            { "key": "team", "operator": "NotIn", "values": ["x", "y"] },
                        ] } },
                        { "ipBlock": { "cidr": "192.0.2.0/31" } },
                    ],
                    "ports": [{ "port": 80 }, { "protocol": "UDP", "port": "dns" }],
                }],
            },
        });
        let (policy, _) = resolve_network_policy(&serde_json::from_value(policy).unwrap());
        let text = rule_text(&policy.ingress.unwrap()[0], Direction::Ingress);
        assert_eq!(
            text,
            "rule 0: accept from pods with app=a in namespace shop or pods in namespaces with team \
             notin (x,y) or 192.0.2.0-192.0.2.1, tcp 80, udp dns"
        );
    }
}
