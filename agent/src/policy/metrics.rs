//! Values of the service for the metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts};
use skein_policy::model::{Direction, PolicyId};
use skein_policy::program::{Attribution, Program};

use super::status::PolicyStatus;

/// Maximum number of series with packets. The packets of further policies are summed up.
const MAX_SERIES: usize = 1000;
/// Upper bounds of the histogram in seconds, from a few netlink requests up to runs of `nft`.
const DURATION_BUCKETS: [f64; 9] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5];

/// Values for a scrape.
#[derive(Debug, Clone, Default)]
pub struct PolicyMetrics {
    /// State of the service.
    pub status: PolicyStatus,
    /// Families of the commits.
    pub commits: Vec<MetricFamily>,
    /// Packets by policy; `None` if the counters cannot be read.
    pub packets: Option<Vec<PolicyPackets>>,
}

/// Packets that met the rules of a policy, or that were refused because of its isolation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyPackets {
    /// Namespace of the policy; empty for a ClusterNetworkPolicy.
    pub namespace: String,
    /// Name of the policy; `several` if a counter belongs to several policies, and `other` for all
    /// policies beyond the maximum number of series.
    pub policy: String,
    /// Direction of the packets, `ingress` or `egress`.
    pub direction: &'static str,
    /// `rule` for packets that met a rule, `isolated` for refused packets that met none.
    pub reason: &'static str,
    /// Number of packets.
    pub packets: u64,
}

/// Returns the packets of a program's counters by policy, in the order of their names.
pub(super) fn packets(program: &Program, counters: &BTreeMap<String, u64>) -> Vec<PolicyPackets> {
    let mut sums: BTreeMap<_, u64> = BTreeMap::new();
    for (name, attribution) in &program.counters {
        let (direction, reason, policies): (_, _, Vec<&PolicyId>) = match attribution {
            Attribution::Rules(direction, rules) => {
                (direction, "rule", rules.iter().map(|rule| &rule.policy).collect())
            }
            Attribution::Isolated(direction, policies) => {
                (direction, "isolated", policies.iter().collect())
            }
        };
        let direction = match direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        let is_one = policies.windows(2).all(|pair| pair[0] == pair[1]);
        let (namespace, policy) = match policies.first().filter(|_| is_one) {
            Some(PolicyId::NetworkPolicy { namespace, name }) => (&**namespace, &**name),
            Some(PolicyId::ClusterNetworkPolicy { name }) => ("", &**name),
            None => ("", "several"),
        };
        let count = counters.get(name).copied().unwrap_or_default();
        *sums.entry((namespace, policy, direction, reason)).or_default() += count;
    }
    let mut others: BTreeMap<_, u64> = BTreeMap::new();
    let mut packets = Vec::new();
    for ((namespace, policy, direction, reason), count) in sums {
        // Four series are left for the sums.
        if packets.len() + 4 < MAX_SERIES {
            let (namespace, policy) = (namespace.to_owned(), policy.to_owned());
            packets.push(PolicyPackets { namespace, policy, direction, reason, packets: count });
        } else {
            *others.entry((direction, reason)).or_default() += count;
        }
    }
    packets.extend(others.into_iter().map(|((direction, reason), packets)| PolicyPackets {
        namespace: String::new(),
        policy: "other".to_owned(),
        direction,
        reason,
        packets,
    }));
    packets
}

/// Counters and durations of the commits.
#[derive(Debug, Clone)]
pub(crate) struct Commits {
    total: IntCounterVec,
    seconds: Histogram,
}

impl Commits {
    /// Returns metrics whose series are all at zero.
    ///
    /// # Errors
    /// A Prometheus error if the definition of a metric is invalid.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let total = IntCounterVec::new(
            Opts::new(
                "skein_policy_commits_total",
                "Changes of the kernel's table of network policies by result.",
            ),
            &["result"],
        )?;
        let seconds = Histogram::with_opts(
            HistogramOpts::new(
                "skein_policy_commit_seconds",
                "Duration of a successful change of the kernel's table of network policies, in seconds.",
            )
            .buckets(DURATION_BUCKETS.to_vec()),
        )?;
        for result in ["done", "failed"] {
            total.with_label_values(&[result]);
        }
        Ok(Self { total, seconds })
    }

    /// Counts a change that took the time `took`.
    pub(super) fn count(&self, is_done: bool, took: Duration) {
        let result = if is_done { "done" } else { "failed" };
        self.total.with_label_values(&[result]).inc();
        if is_done {
            self.seconds.observe(took.as_secs_f64());
        }
    }

    /// Returns the metric families for a scrape.
    pub(crate) fn families(&self) -> Vec<MetricFamily> {
        let mut families = self.total.collect();
        families.extend(self.seconds.collect());
        families
    }
}

#[cfg(test)]
mod tests {
    use skein_policy::program::RuleRef;

    use super::*;

    fn rule(name: &str) -> RuleRef {
        let (namespace, name) = ("shop".to_owned(), name.to_owned());
        let policy = PolicyId::NetworkPolicy { namespace, name };
        RuleRef { policy, index: 0, name: String::new() }
    }

    #[test]
    fn packets_are_summed_by_policy_and_series_are_bounded() {
        let mut program = Program::default();
        let mut counters = BTreeMap::new();
        let mut add = |name: String, rules: Vec<RuleRef>| {
            counters.insert(name.clone(), 2);
            program.counters.insert(name, Attribution::Rules(Direction::Ingress, rules));
        };
        add("first".to_owned(), vec![rule("a")]);
        add("second".to_owned(), vec![rule("a")]);
        add("both".to_owned(), vec![rule("a"), rule("b")]);
        for index in 0..2000 {
            add(format!("n{index}"), vec![rule(&format!("p{index:04}"))]);
        }
        let found = packets(&program, &counters);
        assert_eq!(found.len(), MAX_SERIES - 3);
        let of =
            |policy: &str| found.iter().find(|one| one.policy == policy).map(|one| one.packets);
        assert_eq!(of("a"), Some(4));
        assert_eq!(of("several"), Some(2));
        let sum: u64 = found.iter().map(|one| one.packets).sum();
        assert_eq!(sum, 2 * 2003, "No packet may be lost.");
        assert_eq!(of("other"), Some(2 * (2000 - 994)));
    }
}
