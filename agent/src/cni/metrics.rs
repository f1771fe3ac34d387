//! What the plugin asked for and how it went, for Prometheus.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};
use skein_cni_protocol::{Command, Response};

const VERBS: [&str; 5] = ["add", "del", "check", "gc", "status"];
/// Upper bounds in seconds: what a kernel alone needs, up to where a runtime gives up.
const SECONDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10.0];

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Refused,
    /// The server had no more patience; what becomes of it is for the runtime's next request.
    Late,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Done, Self::Refused, Self::Late];

    /// Of an answer that was given in time.
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

/// Counters of requests.
#[derive(Debug, Clone)]
pub(crate) struct Requests {
    total: IntCounterVec,
    seconds: HistogramVec,
}

impl Requests {
    /// All series at zero.
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
            .buckets(SECONDS.to_vec()),
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

    /// Counts one request.
    pub(super) fn count(&self, verb: &str, outcome: Outcome, took: Duration) {
        self.total.with_label_values(&[verb, outcome.label()]).inc();
        self.seconds.with_label_values(&[verb]).observe(took.as_secs_f64());
    }

    /// For a scrape.
    pub(crate) fn families(&self) -> Vec<MetricFamily> {
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
