//! State of the data process, as the supervisor observes it.

use std::sync::Arc;

use skein_ipc::{ReducedPath, Report, UnreachablePeer};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::history::CounterRing;
use crate::status::DataplaneStatus;

/// Current state of the data process, as the supervisor observes it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct DataplaneState {
    status: watch::Sender<DataplaneStatus>,
    history: CounterRing,
    /// Wakes up the supervisor for a report.
    pub(super) report_wanted: Arc<Notify>,
}

impl DataplaneState {
    /// Returns the current state.
    pub fn get(&self) -> DataplaneStatus {
        self.status.borrow().clone()
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
        let reached = |status: &DataplaneStatus| status.up && status.revision >= revision;
        // `wait_for` fails only after the sender is dropped, and `self` holds it.
        let _ = self.status.subscribe().wait_for(reached).await;
    }

    /// Waits until `not_before`, and then until the paths with a reduced MTU differ from `known`.
    /// Returns these paths. Changes before `not_before` are returned together.
    pub async fn changed_paths(
        &self,
        known: &[ReducedPath],
        not_before: Instant,
    ) -> Vec<ReducedPath> {
        tokio::time::sleep_until(not_before).await;
        let mut status = self.status.subscribe();
        // `wait_for` fails only after the sender is dropped, and `self` holds it.
        match status.wait_for(|status| status.up && status.narrow != known).await {
            Ok(status) => status.narrow.clone(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until the data process has other ports than `known`, and returns them.
    pub async fn source_ports(&self, known: &[u16]) -> Vec<u16> {
        let mut status = self.status.subscribe();
        let differ = |status: &DataplaneStatus| status.up && status.source_ports != known;
        // `wait_for` fails only after the sender is dropped, and `self` holds it.
        match status.wait_for(differ).await {
            Ok(status) => status.source_ports.clone(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until the unreachable peers or their reasons differ from `known`.
    pub async fn unreachable_peers_changed(&self, known: &[UnreachablePeer]) {
        let differ = |status: &DataplaneStatus| status.up && status.unreachable != known;
        // `wait_for` fails only after the sender is dropped, and `self` holds it.
        let _ = self.status.subscribe().wait_for(differ).await;
    }

    /// Stores a report of the data process.
    pub(super) fn on_report(&self, report: Report) {
        self.history.push(&report);
        let Report {
            capabilities,
            reduced_paths: mut narrow,
            unreachable,
            second_key_peers,
            source_ports,
            ..
        } = report;
        narrow.sort();
        self.status.send_if_modified(|status| {
            let differs = status.capabilities != capabilities
                || status.narrow != narrow
                || status.source_ports != source_ports
                || status.unreachable != unreachable;
            (status.capabilities, status.narrow) = (capabilities, narrow);
            status.unreachable = unreachable;
            status.source_ports = source_ports;
            status.second_key_peers = second_key_peers;
            differs
        });
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut DataplaneStatus)) {
        self.status.send_modify(change);
    }
}
