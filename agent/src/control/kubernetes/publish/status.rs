//! Writer of the status of this node's SkeinNode, with bounds on the rate of writes.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use skein_netlink::firewall::Firewall;
use tokio::time::Instant;

use super::request::{MANAGER, send, skeinnode};
use crate::control::dataplane::LastReport;
use crate::control::kubernetes::backoff::random_fraction;
use crate::control::kubernetes::resource::{SkeinNode, SkeinNodeStatus};
use crate::control::kubernetes::status::{
    ObservedState, UnreachedPeer, own_conditions, peers_became_unreachable, readiness_differs,
    status, unready,
};
use crate::control::view::AgentView;

/// Minimum interval before a status with another readiness is written.
const READINESS_DELAY: Duration = Duration::from_secs(2);
/// Minimum interval between two writes of a status that does not differ in readiness. The first
/// status with unreachable peers is written earlier, at most once in this interval.
const MIN_STATUS_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of status writes per second in a cluster, after a failure that all nodes observe.
const MAX_WRITES_PER_SECOND: f64 = 100.0;
/// Maximum number of watch events per second in a cluster. Each write causes one event for each
/// agent.
const MAX_WATCH_EVENTS_PER_SECOND: f64 = 20_000.0;

/// Times that determine when a changed status may be written.
struct Due {
    /// Time of the last write.
    written: Option<Instant>,
    /// True if the readiness differs.
    readiness: bool,
    /// Turn of this node to report unreachable peers; `None` unless the status is the first one
    /// with any.
    silence: Option<Instant>,
    /// Time of the last write that reported unreachable peers for the first time.
    silence_written: Option<Instant>,
}

impl Due {
    /// Returns the time at which the status may be written; `None` for at once.
    fn at(&self) -> Option<Instant> {
        let written = self.written?;
        if self.readiness {
            return Some(written + READINESS_DELAY);
        }
        let ordinary = written + MIN_STATUS_INTERVAL;
        let news = |turn: Instant| {
            turn.max(self.silence_written.map_or(turn, |last| last + MIN_STATUS_INTERVAL))
        };
        Some(self.silence.map_or(ordinary, |turn| news(turn).min(ordinary)))
    }
}

/// A status that was written.
struct WrittenStatus {
    /// UID of the record.
    uid: Option<String>,
    status: SkeinNodeStatus,
    at: Instant,
}

impl WrittenStatus {
    /// Returns whether the status is that of `record`, not of a deleted record with the same name:
    /// a new record has no status, which is written at once.
    fn belongs_to(&self, record: &SkeinNode) -> bool {
        self.uid == record.metadata.uid
    }
}

/// Writer of the status of this node's SkeinNode.
pub(super) struct StatusWriter {
    skeinnodes: Api<SkeinNode>,
    agent: AgentView,
    /// Status that was written last.
    written: Option<WrittenStatus>,
    /// Time since which peers are unreachable.
    silent_since: Option<Instant>,
    /// Time of the last write that reported unreachable peers for the first time.
    silence_written: Option<Instant>,
    /// Time at which a delayed status may be written.
    pub(super) due: Option<Instant>,
    /// Random position of this node in the write window, uniform in 0 to 1. It delays a status
    /// write about a failure that all nodes observe.
    position: f64,
}

impl StatusWriter {
    /// Returns a writer that has written nothing yet.
    pub(super) fn new(skeinnodes: Api<SkeinNode>, agent: AgentView) -> Self {
        Self {
            skeinnodes,
            agent,
            written: None,
            silent_since: None,
            silence_written: None,
            due: None,
            position: random_fraction(),
        }
    }

    /// Stores whether there are unreachable peers.
    pub(super) fn set_silent(&mut self, silent: bool) {
        self.silent_since = match silent {
            true => self.silent_since.or(Some(Instant::now())),
            false => None,
        };
    }

    /// Writes the status if it differs and a write is due; otherwise sets `due`. `report` is `None`
    /// while the state of the data process is unknown.
    ///
    /// # Errors
    /// An error if the API server refuses or does not answer.
    pub(super) async fn write(
        &mut self,
        published: &SkeinNode,
        report: Option<&LastReport>,
        reasons: &[String],
    ) -> anyhow::Result<()> {
        let found = published.status.clone().map(own_conditions);
        let generation = published.metadata.generation;
        let written = self.written.as_ref().filter(|written| written.belongs_to(published));
        // The last written status may be newer than the one that the watch has reported.
        let before = written.map(|written| &written.status).or(found.as_ref());
        let status = match report {
            Some(report) => {
                // A peer whose pod CIDR has another program's route is not reachable over the
                // overlay either.
                let conflicts = self.agent.node.interface().conflicts.into_iter().map(|conflict| {
                    UnreachedPeer { name: conflict.peer, reason: conflict.problem }
                });
                let unreachable: Vec<_> =
                    report.unreachable.iter().map(Into::into).chain(conflicts).collect();
                let firewall = self.agent.firewall.borrow().as_ref().map(Firewall::status);
                let known = ObservedState {
                    generation,
                    capabilities: &report.capabilities,
                    mtu: self.agent.node.interface().mtu,
                    reasons,
                    unreachable: &unreachable,
                    firewall: firewall.as_ref(),
                };
                status(before, &known, Timestamp::now())
            }
            None => unready(before, generation, reasons, Timestamp::now()),
        };
        if before == Some(&status) && found.as_ref() == Some(&status) {
            return Ok(());
        }
        let silence = peers_became_unreachable(before, &status);
        let spread = spread_delay(self.position, self.agent.node.registry().accepted);
        let due = Due {
            written: written.map(|written| written.at),
            readiness: readiness_differs(before, &status),
            silence: silence.then_some(self.silent_since).flatten().map(|since| since + spread),
            silence_written: self.silence_written,
        };
        if let Some(at) = due.at().filter(|at| *at > Instant::now()) {
            self.due = Some(at);
            return Ok(());
        }
        let name = &self.agent.config.name;
        let object = skeinnode(json!({ "name": name }), "status", json!(status));
        let parameters = PatchParams::apply(MANAGER).force();
        let patch = Patch::Apply(&object);
        let written = self.skeinnodes.patch_status(name, &parameters, &patch);
        send(written).await.context("status of the SkeinNode")?;
        tracing::debug!(before = ?found, now = ?status, "status of the SkeinNode written");
        let now = Instant::now();
        let uid = published.metadata.uid.clone();
        self.written = Some(WrittenStatus { uid, status, at: now });
        if silence {
            self.silence_written = Some(now);
        }
        Ok(())
    }
}

/// Returns the delay of a write about a failure that all nodes observe, for a node at `position` (0
/// to 1) in a cluster of `nodes`.
fn spread_delay(position: f64, nodes: usize) -> Duration {
    let nodes = nodes as f64;
    let rate = MAX_WRITES_PER_SECOND.min(MAX_WATCH_EVENTS_PER_SECOND / nodes.max(1.0));
    Duration::from_secs_f64(position * nodes / rate)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn writes_of_all_nodes_stay_below_event_rate() {
        assert_eq!(spread_delay(0.0, 5000), Duration::ZERO);
        assert_eq!(spread_delay(1.0, 100), Duration::from_secs(1));
        for nodes in [200, 1000, 5000] {
            let events = (nodes * nodes) as f64 / spread_delay(1.0, nodes).as_secs_f64();
            assert!(events < 20_001.0, "{nodes} nodes: {events} events per second");
        }
        assert_eq!(spread_delay(0.5, 0), Duration::ZERO);
    }

    #[test]
    fn status_of_a_deleted_record_is_not_that_of_the_next() {
        let record = |uid: &str| -> SkeinNode {
            serde_json::from_value(json!({
                "metadata": { "name": "a", "uid": uid },
                "spec": { "publicKey": "k", "endpoints": [], "podCIDRs": [] },
            }))
            .unwrap()
        };
        let status = unready(None, Some(1), &[], Timestamp::now());
        let written = WrittenStatus { uid: Some("first".to_owned()), status, at: Instant::now() };
        assert!(written.belongs_to(&record("first")));
        assert!(!written.belongs_to(&record("second")), "The next record has no status yet.");
    }

    #[test]
    fn unreachable_peers_are_written_once_per_minute_at_most() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let due = |written, silence, silence_written| {
            let due = Due { written, readiness: false, silence, silence_written };
            due.at()
        };
        assert_eq!(due(None, Some(after(5)), None), None, "nothing was written yet");
        // Unreachable peers are written at the node's turn, other changes after a minute.
        assert_eq!(due(Some(start), None, None), Some(after(60)));
        assert_eq!(due(Some(start), Some(after(5)), None), Some(after(5)));
        // A flapping peer is written again a minute after the last time.
        assert_eq!(due(Some(after(70)), Some(after(75)), Some(after(10))), Some(after(75)));
        assert_eq!(due(Some(after(30)), Some(after(35)), Some(after(10))), Some(after(70)));
        let ready =
            Due { written: Some(start), readiness: true, silence: None, silence_written: None };
        assert_eq!(ready.at(), Some(start + READINESS_DELAY));
    }
}
