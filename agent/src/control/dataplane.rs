//! State of the data process, as the supervisor observes it.

use std::sync::Arc;

use skein_ipc::{Capability, ReducedPath, Report, UnreachablePeer};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::history::CounterRing;
use crate::status::DataplaneStatus;

/// Parts of the last report of the data process to which the control process reacts. They may be
/// seconds old.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastReport {
    /// Offload capabilities; empty before the first report.
    pub capabilities: Vec<Capability>,
    /// Reduced path MTUs, sorted by the peers' keys.
    pub reduced_paths: Vec<ReducedPath>,
    /// Ports of the UDP sockets ([`Report::source_ports`]).
    pub source_ports: Vec<u16>,
    /// Number of peers that may not know this node's new key ([`Report::second_key_peers`]).
    pub second_key_peers: usize,
    /// Unreachable peers, sorted by name.
    pub unreachable: Vec<UnreachablePeer>,
}

/// Status and last report of the data process at one time.
#[derive(Debug, Clone, Default)]
pub struct ObservedDataplane {
    /// Status, which is part of the status document.
    pub status: DataplaneStatus,
    /// Last report.
    pub report: LastReport,
}

impl From<Report> for LastReport {
    fn from(report: Report) -> Self {
        let Report { capabilities, mut reduced_paths, unreachable, source_ports, .. } = report;
        reduced_paths.sort();
        let second_key_peers = report.second_key_peers;
        Self { capabilities, reduced_paths, source_ports, second_key_peers, unreachable }
    }
}

/// Current state of the data process, as the supervisor observes it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct DataplaneState {
    observed: watch::Sender<ObservedDataplane>,
    history: CounterRing,
    /// Wakes up the supervisor for a report.
    pub(super) report_wanted: Arc<Notify>,
}

impl DataplaneState {
    /// Returns the current status.
    pub fn status(&self) -> DataplaneStatus {
        self.observed.borrow().status.clone()
    }

    /// Returns the current status with the last report.
    pub fn observed(&self) -> ObservedDataplane {
        self.observed.borrow().clone()
    }

    /// Returns the counters of the last five minutes.
    pub fn history(&self) -> &CounterRing {
        &self.history
    }

    /// Makes the supervisor request a report now.
    pub fn request_report(&self) {
        self.report_wanted.notify_one();
    }

    /// Waits until the data process has applied `revision` or a later one.
    pub async fn wait_for_revision(&self, revision: u64) {
        let reached = |observed: &ObservedDataplane| {
            observed.status.up && observed.status.revision >= revision
        };
        // `wait_for` fails only after the sender is dropped, and `self` holds it.
        let _ = self.observed.subscribe().wait_for(reached).await;
    }

    /// Waits until `not_before`, and then until the paths with a reduced MTU differ from `known`.
    /// Returns these paths. Changes before `not_before` are returned together.
    pub async fn changed_paths(
        &self,
        known: &[ReducedPath],
        not_before: Instant,
    ) -> Vec<ReducedPath> {
        tokio::time::sleep_until(not_before).await;
        self.wait_for_report(|report| report.reduced_paths != known).await.reduced_paths
    }

    /// Waits until the data process has other ports than `known`, and returns them.
    pub async fn source_ports(&self, known: &[u16]) -> Vec<u16> {
        self.wait_for_report(|report| report.source_ports != known).await.source_ports
    }

    /// Waits until the unreachable peers or their reasons differ from `known`.
    pub async fn unreachable_peers_changed(&self, known: &[UnreachablePeer]) {
        self.wait_for_report(|report| report.unreachable != known).await;
    }

    /// Waits until the data process is up and its last report fulfils the condition. Returns the
    /// report.
    async fn wait_for_report(&self, condition: impl Fn(&LastReport) -> bool) -> LastReport {
        let fulfilled =
            |observed: &ObservedDataplane| observed.status.up && condition(&observed.report);
        let mut observed = self.observed.subscribe();
        let found = observed.wait_for(fulfilled).await.ok().map(|found| found.report.clone());
        match found {
            Some(report) => report,
            // `wait_for` fails only after the sender is dropped, and `self` holds it.
            None => std::future::pending().await,
        }
    }

    /// Stores a report of the data process.
    pub(super) fn on_report(&self, report: Report) {
        self.history.push(&report);
        let report = LastReport::from(report);
        self.observed.send_if_modified(|observed| {
            let differs = observed.report != report;
            observed.report = report;
            differs
        });
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut DataplaneStatus)) {
        self.observed.send_modify(|observed| change(&mut observed.status));
    }
}
