//! The custom resource SkeinNode: record and status of a node in the Kubernetes API. Doc comments
//! of its types are descriptions in the CustomResourceDefinition.

// Every column of the derive has a type.
#![allow(clippy::duplicated_attributes)]

use kube::{CustomResource, CustomResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use skein_cni_protocol::excerpt::message_excerpt;
use skein_ipc::{Capability, CapabilityState};

use super::super::records::{NodeRecord, RawRecord, RecordError};

/// API group of Skein's resources.
pub const GROUP: &str = "skein.network";

/// Record of the node, which other nodes read to reach it. The agent of the node writes it.
#[derive(
    CustomResource, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema,
)]
#[kube(
    group = "skein.network",
    version = "v1alpha1",
    kind = "SkeinNode",
    doc = "A node of Skein's overlay: its endpoints, public keys, pod prefixes, and status.",
    shortname = "skn",
    category = "skein",
    status = "SkeinNodeStatus",
    derive = "PartialEq",
    printcolumn(
        name = "Endpoint",
        type_ = "string",
        json_path = ".spec.endpoints[0]",
        description = "Address and UDP port of the node on the underlay."
    ),
    printcolumn(
        name = "Pod-CIDRs",
        type_ = "string",
        json_path = ".spec.podCIDRs",
        description = "Prefixes of the node's pods."
    ),
    printcolumn(
        name = "Offloads",
        type_ = "string",
        json_path = ".status.offloads",
        description = "Offload capabilities in use."
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "True if the node's pods have a network."
    ),
    printcolumn(
        name = "Version",
        type_ = "string",
        json_path = ".status.agentVersion",
        description = "Version of the agent.",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct SkeinNodeSpec {
    /// Active X25519 public key of the node: 32 bytes in base64.
    #[schemars(length(max = 44), regex(pattern = r"^[A-Za-z0-9+/]{43}=$"))]
    pub public_key: String,
    /// Next or previous public key during a key rotation. Other nodes accept both keys.
    // The field is also written as null, because a server-side apply that omits it would keep the
    // value of another field manager.
    #[schemars(length(max = 44), regex(pattern = r"^[A-Za-z0-9+/]{43}=$"))]
    pub second_public_key: Option<String>,
    /// Underlay addresses and UDP ports of the node, in the order of attempts. An IPv6 address is
    /// in brackets.
    #[schemars(length(min = 1, max = 8), inner(length(max = 80)))]
    pub endpoints: Vec<String>,
    /// Prefixes of the node's pods.
    #[serde(rename = "podCIDRs")]
    #[schemars(length(min = 1, max = 16), inner(length(max = 64)))]
    pub pod_cidrs: Vec<String>,
    /// Addresses of the node on the overlay, inside of its pod prefixes. Network policies do not
    /// count them as pods. Absent: the first host of each prefix.
    // The field is also written as null, like `second_public_key`.
    #[schemars(length(max = 16), inner(length(max = 64)))]
    pub overlay_addresses: Option<Vec<String>>,
}

/// Status of the node, which its agent writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SkeinNodeStatus {
    /// Generation of the spec that the agent read last.
    pub observed_generation: Option<i64>,
    /// Version of the agent.
    #[schemars(length(max = 128))]
    pub agent_version: Option<String>,
    /// MTU of the node's pods in bytes.
    pub mtu: Option<i32>,
    /// Offload capabilities in use: "all", "none", or their names, separated by commas.
    #[schemars(length(max = 256))]
    pub offloads: Option<String>,
    /// State of each offload capability.
    #[serde(default)]
    #[schemars(
        length(max = 32),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub capabilities: Vec<CapabilityStatus>,
    /// Conditions of the node. Ready: pods of the node have a network. PeersReachable: all peers to
    /// which the node sends respond; otherwise the message names the others. ForwardingAllowed: no
    /// chain of another program drops forwarded packets of pods.
    #[serde(default)]
    #[schemars(
        length(max = 32),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,
}

/// State of one offload capability.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CapabilityStatus {
    /// Name of the capability: tun_uso, tun_tso, tun_checksum, udp_gso, udp_gro, udp_ecn or
    /// reuseport_steering.
    #[schemars(length(max = 64))]
    pub name: String,
    /// State of the capability: on, degraded, unsupported or forced off.
    #[schemars(length(max = 32))]
    pub state: String,
    /// Reason for a state other than on.
    #[schemars(length(max = 2048))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A condition in the form of metav1.Condition.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Type of the condition.
    #[serde(rename = "type")]
    #[schemars(length(max = 316))]
    pub kind: String,
    /// Status of the condition: True, False or Unknown.
    #[schemars(length(max = 16))]
    pub status: String,
    /// Reason for the status as one word in CamelCase, for programs.
    #[schemars(length(max = 1024))]
    pub reason: String,
    /// Details of the status, for users.
    #[schemars(length(max = 32768))]
    pub message: String,
    /// Time of the last change of the status (RFC 3339).
    #[schemars(length(max = 64))]
    pub last_transition_time: String,
    /// Generation of the spec to which the condition applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Returns the CustomResourceDefinition as YAML, for `kubectl apply` and the chart.
///
/// # Errors
/// The definition cannot be serialised.
pub fn definition() -> anyhow::Result<String> {
    let text = serde_saphyr::to_string(&SkeinNode::crd())?;
    Ok(format!("# Printed by skein-agent crd: not written by hand.\n{text}"))
}

impl SkeinNode {
    /// Returns the record of the node.
    ///
    /// # Errors
    /// The error of [`SkeinNodeSpec::record`].
    pub fn record(&self) -> Result<NodeRecord, RecordError> {
        let name = self.metadata.name.clone().unwrap_or_default();
        self.spec.record(name)
    }
}

impl SkeinNodeSpec {
    /// Returns the record of the node with this name.
    ///
    /// # Errors
    /// The field with an invalid value, and the reason.
    pub fn record(&self, name: String) -> Result<NodeRecord, RecordError> {
        let SkeinNodeSpec {
            public_key,
            second_public_key,
            endpoints,
            pod_cidrs,
            overlay_addresses,
        } = self.clone();
        let record = RawRecord {
            name,
            public_key,
            second_public_key,
            endpoints,
            pod_cidrs,
            overlay_addresses: overlay_addresses.unwrap_or_default(),
        };
        record.validate()
    }
}

impl From<&Capability> for CapabilityStatus {
    fn from(capability: &Capability) -> Self {
        let Capability { name, state, reason } = capability;
        let reason = reason.as_deref().map(|reason| message_excerpt(reason).into_owned());
        Self { name: name.text().to_owned(), state: state.to_string(), reason }
    }
}

/// Returns the capabilities in use: "all", "none", or their names, separated by commas.
pub fn offloads(capabilities: &[Capability]) -> String {
    let on: Vec<&str> = capabilities
        .iter()
        .filter(|capability| capability.state == CapabilityState::On)
        .map(|capability| capability.name.text())
        .collect();
    match on.len() {
        0 => "none".to_owned(),
        all if all == capabilities.len() => "all".to_owned(),
        _ => on.join(","),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use skein_ipc::CapabilityName;

    use super::*;

    #[test]
    fn resource_is_read_as_record_and_error_names_the_field() {
        let mut node = SkeinNode::new(
            "node-a",
            SkeinNodeSpec {
                public_key: "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=".into(),
                second_public_key: None,
                endpoints: vec!["192.0.2.1:51900".into(), "[2001:db8::1]:51900".into()],
                pod_cidrs: vec!["10.1.0.0/24".into(), "fd00::/64".into()],
                overlay_addresses: None,
            },
        );
        let record = node.record().unwrap();
        assert_eq!((record.name.as_str(), record.endpoints.len()), ("node-a", 2));
        let first: [std::net::IpAddr; 2] =
            ["10.1.0.1", "fd00::1"].map(|address| address.parse().unwrap());
        assert_eq!(record.overlay_addresses(), first);
        node.spec.overlay_addresses = Some(vec!["10.1.0.9".into()]);
        let named = node.record().unwrap().overlay_addresses();
        assert_eq!(named, ["10.1.0.9".parse::<std::net::IpAddr>().unwrap()]);
        node.spec.overlay_addresses = Some(vec!["10.2.0.9".into()]);
        assert!(node.record().unwrap_err().to_string().contains("overlay_addresses"));
        node.spec.overlay_addresses = None;
        node.spec.pod_cidrs = vec!["10.1.0.0".into()];
        assert!(node.record().unwrap_err().to_string().contains("pod_cidrs"));
    }

    #[test]
    fn mapped_addresses_of_a_resource_are_ipv4() {
        let spec = |endpoint: &str, cidr: &str| SkeinNodeSpec {
            public_key: "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=".into(),
            second_public_key: None,
            endpoints: vec![endpoint.into()],
            pod_cidrs: vec![cidr.into()],
            overlay_addresses: None,
        };
        let record = |endpoint, cidr| spec(endpoint, cidr).record("node-a".into());
        let mapped = record("[::ffff:192.0.2.1]:51900", "::ffff:10.1.0.0/120").unwrap();
        assert_eq!(mapped, record("192.0.2.1:51900", "10.1.0.0/24").unwrap());
        assert!(record("[::ffff:239.1.1.1]:51900", "10.1.0.0/24").is_err());
    }

    #[test]
    fn definition_has_names_columns_and_status() {
        let text = definition().unwrap();
        for word in ["skeinnodes", "podCIDRs", "Pod-CIDRs", "Offloads", "Cluster", "subresources"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    /// Calls `check` with each schema below `schema` and the keys that lead to it.
    fn schemas(
        path: &str,
        schema: &serde_json::Value,
        check: &mut dyn FnMut(&str, &serde_json::Value),
    ) {
        check(path, schema);
        let properties = schema["properties"].as_object().into_iter().flatten();
        for (name, schema) in properties {
            schemas(&format!("{path}.{name}"), schema, check);
        }
        if let Some(items) = schema.get("items") {
            schemas(&format!("{path}[]"), items, check);
        }
    }

    #[test]
    fn strings_and_lists_of_the_definition_are_bounded() {
        let definition = serde_json::to_value(SkeinNode::crd()).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let mut bounded = Vec::new();
        schemas("", schema, &mut |path, schema| {
            let limit = match schema["type"].as_str() {
                Some("string") => "maxLength",
                Some("array") => "maxItems",
                Some("object" | "integer") => return,
                other => panic!("{path} has the type {other:?}."),
            };
            assert!(schema[limit].is_u64(), "{path} has no {limit}: {schema}");
            bounded.push(path.to_owned());
        });
        for path in [".spec.publicKey", ".spec.endpoints[]", ".status.conditions[].message"] {
            assert!(bounded.iter().any(|found| found == path), "{path}: {bounded:?}");
        }
    }

    #[test]
    fn longest_endpoint_and_prefix_fit_the_definition() {
        let address = "[1111:2222:3333:4444:5555:6666:255.255.255.255%interface-of-15]:65535";
        assert!(address.len() <= 80);
        assert!("1111:2222:3333:4444:5555:6666:255.255.255.255/128".len() <= 64);
    }

    #[test]
    fn error_of_a_huge_value_is_short() {
        let huge = "x".repeat(1 << 20);
        let good = SkeinNodeSpec {
            public_key: "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=".into(),
            second_public_key: None,
            endpoints: vec!["192.0.2.1:51900".into()],
            pod_cidrs: vec!["10.1.0.0/24".into()],
            overlay_addresses: None,
        };
        let specs = [
            SkeinNodeSpec { public_key: huge.clone(), ..good.clone() },
            SkeinNodeSpec { second_public_key: Some(huge.clone()), ..good.clone() },
            SkeinNodeSpec { endpoints: vec![huge.clone()], ..good.clone() },
            SkeinNodeSpec { pod_cidrs: vec![huge.clone()], ..good.clone() },
            SkeinNodeSpec { overlay_addresses: Some(vec![huge.clone()]), ..good.clone() },
        ];
        let records = specs.iter().map(|spec| spec.record("node-a".into()));
        for record in records.chain([good.record(huge.clone())]) {
            let error = record.unwrap_err().to_string();
            assert!(error.len() < 1_500, "{} bytes", error.len());
        }
        let reason = Some(huge);
        let (name, state) = (CapabilityName::TunUso.into(), CapabilityState::ForcedOff.into());
        let capability = Capability { name, state, reason };
        assert!(CapabilityStatus::from(&capability).reason.unwrap().len() < 2_048);
    }

    #[test]
    fn offloads_are_all_none_or_their_names() {
        let with = |states: &[CapabilityState]| {
            let named = states.iter().zip([CapabilityName::TunUso, CapabilityName::UdpGso]);
            offloads(&Vec::from_iter(named.map(|(&state, name)| Capability {
                name: name.into(),
                state: state.into(),
                reason: None,
            })))
        };
        use CapabilityState::{On, Unsupported};
        assert_eq!(with(&[On, On]), "all");
        assert_eq!(with(&[On, Unsupported]), "tun_uso");
        assert_eq!(with(&[Unsupported, Unsupported]), "none");
    }
}
