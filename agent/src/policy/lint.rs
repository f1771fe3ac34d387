//! Checks of files with policies, without an agent.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use skein_policy::api::{NetworkPolicy, Parsed, Peer, Protocol};
use skein_policy::model::{
    Peers, Policy, PortSpec, Ports, resolve_cluster_policy, resolve_network_policy,
};

use super::directory;
use super::source::PolicyObject;

/// Port of the Domain Name System.
const DNS_PORT: u16 = 53;

/// A problem of a file or of a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Path of the file.
    pub file: String,
    /// Kind and name of the object; empty if the file cannot be read.
    pub object: String,
    /// Path of the field; empty if the problem concerns the whole object.
    pub field: String,
    /// True if a part of the file or of the policy has no effect; false for a probable mistake.
    pub error: bool,
    /// The problem and its remedy.
    pub text: String,
}

/// Checks files. Returns the findings in the order of the files.
pub fn lint(files: &[impl AsRef<Path>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut origins: BTreeMap<String, String> = BTreeMap::new();
    for path in files {
        let path = path.as_ref();
        let file = path.display().to_string();
        let mut add = |object: &str, field: &str, error: bool, text: String| {
            findings.push(Finding {
                file: file.clone(),
                object: object.to_owned(),
                field: field.to_owned(),
                error,
                text,
            });
        };
        let objects = match directory::read_objects(path) {
            Ok(objects) => objects,
            Err(error) => {
                add("", "", true, error);
                continue;
            }
        };
        for directory::Object { name, object } in objects {
            if let Some(first) = origins.get(&name) {
                add(&name, "", true, format!("ignored, because {first} has it too"));
                continue;
            }
            let (policy, defects) = match &object {
                PolicyObject::NetworkPolicy(object) => resolve_network_policy(object),
                PolicyObject::ClusterNetworkPolicy(object) => resolve_cluster_policy(object),
                _ => {
                    origins.insert(name, file.clone());
                    continue;
                }
            };
            for defect in defects {
                add(&name, &defect.field, true, defect.reason);
            }
            if let PolicyObject::NetworkPolicy(object) = &object {
                for (field, text) in mistakes(object, &policy) {
                    add(&name, &field, false, text.to_owned());
                }
            }
            origins.insert(name, file.clone());
        }
    }
    findings
}

/// Returns probable mistakes of a NetworkPolicy, with their fields.
fn mistakes(object: &NetworkPolicy, policy: &Policy) -> Vec<(String, &'static str)> {
    let mut found = Vec::new();
    let Some(spec) = object.spec.valid() else { return found };
    let egress = policy.egress.as_deref().unwrap_or_default();
    if !egress.is_empty() {
        let allows = |protocol| {
            egress.iter().any(|rule| !rule.peers.is_empty() && allows_port(&rule.ports, protocol))
        };
        if !allows(Protocol::Udp) {
            let text = "no rule allows UDP port 53: pods cannot look up names, unless another \
                        policy allows it. Allow UDP and TCP port 53 to the DNS server.";
            found.push(("spec.egress".to_owned(), text));
        } else if !allows(Protocol::Tcp) {
            let text = "UDP port 53 is allowed, but not TCP port 53, which long DNS answers need.";
            found.push(("spec.egress".to_owned(), text));
        }
    }
    let is_empty_list = matches!(&spec.egress, Some(Parsed::Valid(rules)) if rules.is_empty());
    if spec.policy_types.is_none() && is_empty_list {
        let text = "without policyTypes, an empty list isolates ingress and not egress. Set \
                    policyTypes: [Egress].";
        found.push(("spec.egress".to_owned(), text));
    }
    let ingress = spec.ingress.as_ref().and_then(Parsed::valid).into_iter().flatten();
    let ingress = ingress.map(|rule| rule.valid().and_then(|rule| rule.from.as_ref()));
    let egress = spec.egress.as_ref().and_then(Parsed::valid).into_iter().flatten();
    let egress = egress.map(|rule| rule.valid().and_then(|rule| rule.to.as_ref()));
    let ingress =
        ingress.enumerate().map(|(index, peers)| (format!("spec.ingress[{index}].from"), peers));
    let egress =
        egress.enumerate().map(|(index, peers)| (format!("spec.egress[{index}].to"), peers));
    for (field, peers) in ingress.chain(egress) {
        let peers = peers.and_then(Parsed::valid).into_iter().flatten();
        let peers: Vec<_> = peers.filter_map(Parsed::valid).collect();
        let has_pods = peers.iter().any(|peer| matches!(peer, Peer::Pods(_)));
        let has_namespaces =
            peers.iter().any(|peer| matches!(peer, Peer::Namespaces { pods: None, .. }));
        if has_pods && has_namespaces {
            let text = "podSelector and namespaceSelector in separate entries allow the pods of \
                        either. If both must hold, put them into one entry.";
            found.push((field, text));
        }
    }
    let rules = [(&policy.ingress, "ingress"), (&policy.egress, "egress")];
    for (rules, direction) in rules {
        for rule in rules.iter().flatten() {
            let is_blocks_only = Peers { blocks: Vec::new(), ..rule.peers.clone() }.is_empty();
            let is_named_only = matches!(&rule.ports, Ports::List(list) if !list.is_empty()
                && list.iter().all(|spec| matches!(spec, PortSpec::Named(..))));
            if direction == "egress" && is_blocks_only && is_named_only && !rule.peers.is_empty() {
                let text = "a named port is a port of a pod: it never matches an ipBlock. Use the \
                            port's number.";
                found.push((format!("spec.{direction}[{}].ports", rule.index), text));
            }
        }
    }
    found
}

fn allows_port(ports: &Ports, wanted: Protocol) -> bool {
    match ports {
        Ports::Any => true,
        Ports::List(list) => list.iter().any(|spec| match spec {
            PortSpec::Protocol(protocol) => *protocol == wanted,
            PortSpec::Range(protocol, range) => {
                *protocol == wanted && (range.start..=range.end).contains(&DNS_PORT)
            }
            // The name may stand for port 53.
            PortSpec::Named(protocol, _) => protocol.is_none_or(|protocol| protocol == wanted),
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Returns the fields and texts of the findings for a policy with this specification.
    fn findings(spec: &str) -> Vec<(String, bool, String)> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.yaml");
        let text = format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: a, namespace: b}}\nspec: {spec}\n"
        );
        std::fs::write(&file, text).unwrap();
        lint(&[file]).into_iter().map(|one| (one.field, one.error, one.text)).collect()
    }

    #[test]
    fn correct_policy_has_no_finding() {
        let found = findings(
            "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{protocol: UDP, port: 53}, \
             {port: 53}]}, {to: [{podSelector: {}}], ports: [{port: 80}]}]}",
        );
        assert_eq!(found, []);
    }

    #[test]
    fn usual_mistakes_are_found() {
        for (spec, field, part) in [
            ("{podSelector: {}, egress: [{ports: [{port: 443}]}]}", "spec.egress", "UDP port 53"),
            (
                "{podSelector: {}, egress: [{ports: [{protocol: UDP, port: 53}]}]}",
                "spec.egress",
                "not TCP port 53",
            ),
            ("{podSelector: {}, egress: []}", "spec.egress", "policyTypes: [Egress]"),
            (
                "{podSelector: {}, ingress: [{from: [{podSelector: {}}, {namespaceSelector: {}}]}]}",
                "spec.ingress[0].from",
                "into one entry",
            ),
            (
                "{podSelector: {}, egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}], \
                 ports: [{port: https}, {protocol: UDP, port: dns}]}]}",
                "spec.egress[0].ports",
                "port's number",
            ),
        ] {
            let found = findings(spec);
            assert!(
                found.iter().any(|(at, error, text)| at == field && !error && text.contains(part)),
                "{spec}: {found:?}"
            );
        }
    }

    #[test]
    fn unreadable_part_is_an_error_with_its_field() {
        let found =
            findings("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0/24}}]}]}");
        assert!(
            found.iter().any(|(field, error, _)| *error && field.contains("ipBlock")),
            "{found:?}"
        );
        let found = lint(&["/nonexistent/a.yaml"]);
        assert!(found[0].error && found[0].object.is_empty(), "{found:?}");
    }
}
