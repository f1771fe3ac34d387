//! Generator of docs/metrics.md from the metric families.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use prometheus::proto::{MetricFamily, MetricType};
use skein_core::drop::DropReason;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");

const HEAD: &str = "\
# Metrics

This document is generated from the code by
`SKEIN_UPDATE=1 cargo test --release -p skein-agent --lib reference`; a test fails if they differ.
Metric names and labels are stable: the changelog lists each metric that a release removes.

A counter starts at zero when its process starts, the data process or the agent. `rate()` and
`increase()` take this into account. Every series exists from the start of its process.
*Inner* packets are packets of pods as on a wire: each segment of a superpacket counts.
*Outer* packets are datagrams between nodes.
";

/// Returns the whole document as Markdown.
fn reference(families: &[MetricFamily]) -> String {
    let mut text = HEAD.to_owned();
    for (title, note, chosen) in [
        (
            "Data plane",
            "These metrics are absent while no data process answers.",
            is_dataplane_metric as fn(&str) -> bool,
        ),
        (
            "Peers",
            "These metrics exist only with `metrics.per_peer`. Each peer has its own series.",
            is_peer_metric,
        ),
        ("Agent", "", is_agent_metric),
        ("Pods", "These metrics exist only with `cni.enabled`.", is_pods_metric),
        (
            "Firewall",
            "The drop counters are absent while there is no nftables table.",
            is_firewall_metric,
        ),
        (
            "Network policies",
            "These metrics exist only if `policy.mode` is not `off`.",
            is_policy_metric,
        ),
        ("Kubernetes", "These metrics exist only with `kubernetes.enabled`.", is_kubernetes_metric),
    ] {
        let note = if note.is_empty() { String::new() } else { format!("{note}\n\n") };
        let rows = families.iter().filter(|family| chosen(family.name()));
        let rows: String = rows.map(row).collect();
        // Writing to a String cannot fail.
        let _ = write!(text, "\n## {title}\n\n{note}{TITLES}{rows}");
    }
    text + &reasons()
}

const TITLES: &str = "| metric | type | labels | description |\n|---|---|---|---|\n";

fn is_pods_metric(name: &str) -> bool {
    ["skein_cni_", "skein_ipam_", "skein_pod_"].iter().any(|start| name.starts_with(start))
}

fn is_firewall_metric(name: &str) -> bool {
    let starts = [
        "skein_firewall_",
        "skein_forward_",
        "skein_spoofed_",
        "skein_cleartext_",
        "skein_transit_",
    ];
    starts.iter().any(|start| name.starts_with(start))
}

fn is_policy_metric(name: &str) -> bool {
    name.starts_with("skein_policy_")
}

fn is_kubernetes_metric(name: &str) -> bool {
    name.starts_with("skein_kubernetes_")
}

fn is_peer_metric(name: &str) -> bool {
    name.starts_with("skein_peer_")
}

fn is_agent_metric(name: &str) -> bool {
    let starts = [
        "skein_build_",
        "skein_dataplane_",
        "skein_key_",
        "skein_node_",
        "skein_process_",
        "skein_ready",
        "skein_route_",
    ];
    starts.iter().any(|start| name.starts_with(start))
}

fn is_dataplane_metric(name: &str) -> bool {
    ![
        is_pods_metric,
        is_firewall_metric,
        is_policy_metric,
        is_kubernetes_metric,
        is_peer_metric,
        is_agent_metric,
    ]
    .iter()
    .any(|others| others(name))
}

fn row(family: &MetricFamily) -> String {
    let kind = match family.get_field_type() {
        MetricType::COUNTER => "counter",
        MetricType::HISTOGRAM => "histogram",
        _ => "gauge",
    };
    let labels = labels(family).join(", ");
    format!("| `{}` | {kind} | {labels} | {} |\n", family.name(), family.help())
}

/// Lists the labels of a family, with their values if these are the same on every node.
fn labels(family: &MetricFamily) -> Vec<String> {
    let mut names = Vec::new();
    for pair in family.get_metric().iter().flat_map(|metric| metric.get_label()) {
        if !names.contains(&pair.name()) {
            names.push(pair.name());
        }
    }
    let shown = |name: &str| match name {
        "version" | "lane" | "peer" | "cidr" | "namespace" | "policy" => format!("`{name}`"),
        "reason" if family.name() == "skein_drops_total" => {
            "`reason`: [below](#reasons-of-drops)".to_owned()
        }
        _ => {
            let pairs = family.get_metric().iter().flat_map(|metric| metric.get_label());
            let values = pairs.filter(|pair| pair.name() == name).map(|pair| pair.value());
            let values: BTreeSet<_> = values.map(|value| format!("`{value}`")).collect();
            format!("`{name}`: {}", Vec::from_iter(values).join(" "))
        }
    };
    names.into_iter().map(shown).collect()
}

fn reasons() -> String {
    let mut text =
        "\n## Reasons of drops\n\n| direction | reason | description |\n|---|---|---|\n".to_owned();
    for reason in DropReason::ALL {
        let (direction, meaning) = (reason.direction().label(), reason.meaning());
        let _ = writeln!(text, "| {direction} | `{}` | {meaning} |", reason.label());
    }
    let without_key = DropReason::ALL.iter().filter(|reason| reason.is_possible_without_key());
    text.push_str(
        "\nAny sender on the underlay can cause the following drops without a key. The alert\n\
         SkeinPacketsDropped and the verdict of the status page exclude them:\n\n",
    );
    for reason in without_key {
        let _ = writeln!(text, "- `{reason}`");
    }
    text
}

/// Compares the reasons in the alert with the code.
#[test]
fn drop_alert_excludes_drops_possible_without_key() {
    let rules = include_str!("../../../charts/skein/alerts/skein.yaml");
    let left_out = rules.split("reason!~\"").nth(1).and_then(|rest| rest.split('"').next());
    let left_out: Vec<_> = left_out.unwrap_or_default().split('|').collect();
    for reason in DropReason::ALL {
        let named = left_out.iter().any(|part| match part.strip_suffix(".+") {
            Some(start) => reason.label().starts_with(start),
            None => reason.label() == *part,
        });
        assert_eq!(named, reason.is_possible_without_key(), "{reason}");
    }
}

/// Returns the names of metrics that occur in a text.
fn named(source: &str) -> BTreeSet<&str> {
    source.split('"').filter(|part| part.starts_with("skein_") && !part.contains(' ')).collect()
}

#[test]
fn reference_matches_code() {
    let families = super::families(&super::tests::everything());
    let made = reference(&families);
    if std::env::var_os("SKEIN_UPDATE").is_some() {
        std::fs::write(PATH, &made).expect("docs/metrics.md cannot be written");
    }
    let present = std::fs::read_to_string(PATH).expect("docs/metrics.md cannot be read");
    assert!(
        present == made,
        "docs/metrics.md differs from the code. Run SKEIN_UPDATE=1 cargo test --release \
         -p skein-agent --lib reference."
    );
    let code = [
        include_str!("../metrics.rs"),
        include_str!("firewall.rs"),
        include_str!("policy.rs"),
        include_str!("../policy/metrics.rs"),
        include_str!("../cni/metrics.rs"),
        include_str!("../control/kubernetes/client.rs"),
    ];
    let all: BTreeSet<_> = code.iter().flat_map(|source| named(source)).collect();
    assert!(all.len() > 30, "The test must find the names in the sources: {all:?}");
    let shown: BTreeSet<_> = families.iter().map(MetricFamily::name).collect();
    assert_eq!(shown, all, "The reference must contain all names of the code.");
}
