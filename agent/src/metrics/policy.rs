//! Metric families of the network policies.

use prometheus::proto::MetricFamily;

use super::family::{Family, Kind};
use crate::policy::PolicyMetrics;

pub(super) fn families(metrics: &PolicyMetrics) -> Vec<MetricFamily> {
    let status = &metrics.status;
    let flag = |value: bool| f64::from(u8::from(value));
    let gauge = |name, help, value: f64| {
        let mut family = Family::new(name, help, Kind::Gauge);
        family.add(&[], value);
        family.finish()
    };
    let mut pods = Family::new(
        "skein_policy_pods",
        "Pods of this node by state; `quarantined` pods are not known, and their forwarded traffic is refused.",
        Kind::Gauge,
    );
    let quarantined = status.quarantined.len();
    pods.add(&[("state", "enforced")], status.interfaces.saturating_sub(quarantined) as f64);
    pods.add(&[("state", "quarantined")], quarantined as f64);
    let mut age = Family::new(
        "skein_policy_last_commit_age_seconds",
        "Age of the last change of the kernel's table, in seconds; absent before the first one.",
        Kind::Gauge,
    );
    if let Some(seconds) = status.last_commit_age_seconds {
        age.add(&[], seconds);
    }
    let mut packets = Family::new(
        "skein_policy_packets_total",
        "Packets by policy: `rule` met a rule, `isolated` were refused because they met none. At most 1000 \
         series; the rest is summed up as the policy `other`. `several` is the sum of merged rules.",
        Kind::Counter,
    );
    for one in metrics.packets.iter().flatten() {
        let labels = [
            ("namespace", &*one.namespace),
            ("policy", &*one.policy),
            ("direction", one.direction),
            ("reason", one.reason),
        ];
        packets.add(&labels, one.packets as f64);
    }
    let mut families = metrics.commits.clone();
    families.extend([
        gauge(
            "skein_policy_active",
            "1 if the kernel's table has the current policies, 0 if not.",
            flag(status.active),
        ),
        gauge(
            "skein_policy_source_up",
            "1 if the source of the policies is complete and up to date, 0 if stored policies are enforced.",
            flag(status.source_up),
        ),
        gauge("skein_policy_policies", "Policies of both kinds.", status.policies as f64),
        pods.finish(),
        gauge("skein_policy_chains", "Chains of policies in the kernel's table.", status.chains as f64),
        gauge("skein_policy_sets", "Sets in the kernel's table.", status.sets as f64),
        gauge("skein_policy_elements", "Elements of these sets.", status.elements as f64),
        gauge(
            "skein_policy_unenforceable",
            "Parts of policies and of files that cannot be read and have no effect.",
            status.unenforceable as f64,
        ),
        age.finish(),
        packets.finish(),
    ]);
    families
}
