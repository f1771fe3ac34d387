//! What the plugin asked for and how it went, for Prometheus.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};
use skein_cni::protocol::{Answer, Command};

const VERBS: [&str; 5] = ["add", "del", "check", "gc", "status"];
const RESULTS: [&str; 2] = ["done", "refused"];
/// Upper bounds in seconds: what a kernel alone needs, up to where a runtime gives up.
const SECONDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10.0];

/// Counters of requests.
#[derive(Debug, Clone)]
pub(super) struct Requests {
    total: IntCounterVec,
    seconds: HistogramVec,
}

impl Requests {
    /// All series at zero.
    pub(super) fn new() -> prometheus::Result<Self> {
        let total = IntCounterVec::new(
            Opts::new(
                "skein_cni_requests_total",
                "Requests of the CNI plugin, by verb and result.",
            ),
            &["verb", "result"],
        )?;
        let seconds = HistogramVec::new(
            HistogramOpts::new(
                "skein_cni_request_duration_seconds",
                "How long the agent took for a request of the CNI plugin.",
            )
            .buckets(SECONDS.to_vec()),
            &["verb"],
        )?;
        for verb in VERBS {
            seconds.with_label_values(&[verb]);
            for result in RESULTS {
                total.with_label_values(&[verb, result]);
            }
        }
        Ok(Self { total, seconds })
    }

    /// Counts one request.
    pub(super) fn count(&self, verb: &str, answer: &Answer, took: Duration) {
        let result = match answer {
            Answer::Refused(_) => RESULTS[1],
            Answer::Attached(_) | Answer::Done => RESULTS[0],
        };
        self.total.with_label_values(&[verb, result]).inc();
        self.seconds.with_label_values(&[verb]).observe(took.as_secs_f64());
    }

    /// For a scrape.
    pub(super) fn families(&self) -> Vec<MetricFamily> {
        let mut families = self.total.collect();
        families.extend(self.seconds.collect());
        families
    }
}

/// The label of a command.
pub(super) fn verb(command: &Command) -> &'static str {
    match command {
        Command::Add(_) => VERBS[0],
        Command::Del(_) => VERBS[1],
        Command::Check(_) => VERBS[2],
        Command::Gc(_) => VERBS[3],
        Command::Status => VERBS[4],
    }
}
