//! The status of this node's SkeinNode: when it is written, and how often at most.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use skein_ipc::UnreachablePeer;
use skein_netlink::firewall::Firewall;
use tokio::time::Instant;

use super::request::{MANAGER, ask, skeinnode};
use crate::control::kubernetes::backoff::fraction;
use crate::control::kubernetes::resource::{SkeinNode, SkeinNodeStatus};
use crate::control::kubernetes::status::{
    Known, falls_silent, ours, readiness_differs, status, unready,
};
use crate::control::view::AgentView;
use crate::status::DataplaneStatus;

/// Delay before another readiness is written.
const READINESS_DELAY: Duration = Duration::from_secs(2);
/// A status that differs in anything but readiness is written no more often than this, but for the news that
/// peers have fallen silent, which comes no more often either.
const STATUS: Duration = Duration::from_secs(60);
/// Where a node dies all others see it: so many of them a second write that …
const PEERS_A_SECOND: f64 = 100.0;
/// … or fewer, since every agent's watch is told of every one: no more than so many events a second.
const EVENTS_A_SECOND: f64 = 20_000.0;

/// When a status may be written that says something else than the one before.
struct Due {
    /// When that one was.
    written: Option<Instant>,
    /// Whether it is the node's readiness that differs.
    readiness: bool,
    /// Where it is news that peers are silent: when this node has its turn to tell.
    silence: Option<Instant>,
    /// When there was such news before.
    silence_told: Option<Instant>,
}

impl Due {
    /// `None`: at once.
    fn at(&self) -> Option<Instant> {
        let written = self.written?;
        if self.readiness {
            return Some(written + READINESS_DELAY);
        }
        let ordinary = written + STATUS;
        let news = |turn: Instant| turn.max(self.silence_told.map_or(turn, |told| told + STATUS));
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
    /// Returns whether the status is that of `record`, not of a deleted record with the same name: a
    /// new record has no status, which is written at once.
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
    /// Since when there are unreachable peers.
    silent_since: Option<Instant>,
    /// When it was last written that there are where none was.
    silence_told: Option<Instant>,
    /// When a status that waits may be written.
    pub(super) due: Option<Instant>,
    /// This node's place among those that tell of what all see, from 0 to 1.
    share: f64,
}

impl StatusWriter {
    /// Returns a writer that has written nothing yet.
    pub(super) fn new(skeinnodes: Api<SkeinNode>, agent: AgentView) -> Self {
        Self {
            skeinnodes,
            agent,
            written: None,
            silent_since: None,
            silence_told: None,
            due: None,
            share: fraction(),
        }
    }

    /// Stores whether there are unreachable peers.
    pub(super) fn set_silent(&mut self, silent: bool) {
        self.silent_since = match silent {
            true => self.silent_since.or(Some(Instant::now())),
            false => None,
        };
    }

    /// `dataplane` is `None` while the state of the data process is unknown.
    pub(super) async fn write(
        &mut self,
        published: &SkeinNode,
        dataplane: Option<&DataplaneStatus>,
        reasons: &[String],
    ) -> anyhow::Result<()> {
        let found = published.status.clone().map(ours);
        let generation = published.metadata.generation;
        let written = self.written.as_ref().filter(|written| written.belongs_to(published));
        // What was written last is newer than what the watch has told, for a while.
        let before = written.map(|written| &written.status).or(found.as_ref());
        let status = match dataplane {
            Some(dataplane) => {
                // A peer whose pod CIDR has another program's route is not reachable over the
                // overlay either.
                let conflicts = self.agent.node.interface().conflicts.into_iter().map(|conflict| {
                    UnreachablePeer { name: conflict.peer, reason: conflict.problem }
                });
                let unreachable: Vec<_> =
                    dataplane.unreachable.iter().cloned().chain(conflicts).collect();
                let firewall = self.agent.firewall.borrow().as_ref().map(Firewall::status);
                let known = Known {
                    generation,
                    capabilities: &dataplane.capabilities,
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
        let silence = falls_silent(before, &status);
        let spread = spread(self.share, self.agent.node.registry().accepted);
        let due = Due {
            written: written.map(|written| written.at),
            readiness: readiness_differs(before, &status),
            silence: silence.then_some(self.silent_since).flatten().map(|since| since + spread),
            silence_told: self.silence_told,
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
        ask(written).await.context("status of the SkeinNode")?;
        tracing::debug!(before = ?found, now = ?status, "the SkeinNode's status is written");
        let now = Instant::now();
        let uid = published.metadata.uid.clone();
        self.written = Some(WrittenStatus { uid, status, at: now });
        if silence {
            self.silence_told = Some(now);
        }
        Ok(())
    }
}

/// How long a node waits to tell of what all nodes of the cluster see, by its place among them (0 to 1).
fn spread(share: f64, nodes: usize) -> Duration {
    let nodes = nodes as f64;
    let rate = PEERS_A_SECOND.min(EVENTS_A_SECOND / nodes.max(1.0));
    Duration::from_secs_f64(share * nodes / rate)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn news_of_all_nodes_are_spread_so_that_the_api_server_can_tell_them() {
        assert_eq!(spread(0.0, 5000), Duration::ZERO);
        assert_eq!(spread(1.0, 100), Duration::from_secs(1));
        for nodes in [200, 1000, 5000] {
            let events = (nodes * nodes) as f64 / spread(1.0, nodes).as_secs_f64();
            assert!(events < 20_001.0, "{nodes} nodes: {events} events a second");
        }
        assert_eq!(spread(0.5, 0), Duration::ZERO);
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
    fn silence_is_told_at_once_and_then_once_a_minute_at_most() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let due = |written, silence, silence_told| {
            let due = Due { written, readiness: false, silence, silence_told };
            due.at()
        };
        assert_eq!(due(None, Some(after(5)), None), None, "nothing was written yet");
        // What else changes waits; peers that fall silent do not.
        assert_eq!(due(Some(start), None, None), Some(after(60)));
        assert_eq!(due(Some(start), Some(after(5)), None), Some(after(5)));
        // One that flaps is told of a minute after the last time.
        assert_eq!(due(Some(after(70)), Some(after(75)), Some(after(10))), Some(after(75)));
        assert_eq!(due(Some(after(30)), Some(after(35)), Some(after(10))), Some(after(70)));
        let ready =
            Due { written: Some(start), readiness: true, silence: None, silence_told: None };
        assert_eq!(ready.at(), Some(start + READINESS_DELAY));
    }
}
