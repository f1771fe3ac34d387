//! Prometheus metrics of the plugin's requests.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};
use skein_cni_protocol::{Command, Response};

const VERBS: [&str; 5] = ["add", "del", "check", "gc", "status"];
/// Upper bounds of the histogram in seconds, from the time of a few netlink requests up to 10 s.
const DURATION_BUCKETS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10.0];

/// Result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Refused,
    /// The request did not finish before the server's timeout. The runtime's next request for the
    /// attachment completes or undoes it.
    Late,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Done, Self::Refused, Self::Late];

    /// Returns the result of a request that was answered in time.
    pub(super) fn of(answer: &Response) -> Self {
        match answer {
            Response::Refused(_) => Self::Refused,
            Response::Attached(_) | Response::Done => Self::Done,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Late => "late",
        }
    }
}

/// Counters and durations of the plugin's requests.
#[derive(Debug, Clone)]
pub(crate) struct Requests {
    total: IntCounterVec,
    seconds: HistogramVec,
}

impl Requests {
    /// Returns metrics whose series are all at zero.
    ///
    /// # Errors
    /// A Prometheus error if the definition of a metric is invalid.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let total = IntCounterVec::new(
            Opts::new(
                "skein_cni_requests_total",
                "Requests of the CNI plugin by verb and result; `late` if not finished within 25 s.",
            ),
            &["verb", "result"],
        )?;
        let seconds = HistogramVec::new(
            HistogramOpts::new(
                "skein_cni_request_duration_seconds",
                "Duration of a request of the CNI plugin in the agent, in seconds.",
            )
            .buckets(DURATION_BUCKETS.to_vec()),
            &["verb"],
        )?;
        for verb in VERBS {
            seconds.with_label_values(&[verb]);
            for outcome in Outcome::ALL {
                total.with_label_values(&[verb, outcome.label()]);
            }
        }
        Ok(Self { total, seconds })
    }

    /// Counts a request that took the time `took`.
    pub(super) fn count(&self, verb: &str, outcome: Outcome, took: Duration) {
        self.total.with_label_values(&[verb, outcome.label()]).inc();
        self.seconds.with_label_values(&[verb]).observe(took.as_secs_f64());
    }

    /// Returns the metric families for a scrape.
    pub(crate) fn families(&self) -> Vec<MetricFamily> {
        let mut families = self.total.collect();
        families.extend(self.seconds.collect());
        families
    }
}

/// Returns the value of the label `verb` for a command.
pub(super) fn verb(command: &Command) -> &'static str {
    match command {
        Command::Add(_) => VERBS[0],
        Command::Del(_) => VERBS[1],
        Command::Check(_) => VERBS[2],
        Command::Gc(_) => VERBS[3],
        Command::Status => VERBS[4],
    }
}
