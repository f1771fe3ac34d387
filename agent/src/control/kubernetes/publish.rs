//! Writer of this node's state to the Kubernetes API: spec and status of its SkeinNode (server-side
//! apply, field manager `skein-agent`), the NetworkUnavailable condition and the not-ready taint of
//! its Node, and Events on the Node. Objects that already match are not written.

mod events;
mod node;
mod record;
mod request;
mod status;

use std::time::Duration;

use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use self::events::{EventWriter, WARNING};
use self::node::NodeWriter;
use self::record::RecordWriter;
use self::status::StatusWriter;
use super::backoff::RetryBackoff;
use super::follow::State;
use super::resource::SkeinNode;
use crate::control::dataplane::ObservedDataplane;
use crate::control::view::AgentView;

/// Namespace of Events about objects without a namespace.
const EVENTS_NAMESPACE: &str = "default";
/// Interval at which the publisher compares the agent's state with the last written state.
const SELF_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Delay before the record states that the agent is not ready, while the data process is unknown. A
/// restarted agent is ready sooner.
const UNKNOWN_DELAY: Duration = Duration::from_secs(5);

/// Writes this node's state to the API server after each change, until the sender of `state` is
/// dropped.
pub(super) async fn publish(agent: AgentView, client: Client, mut state: watch::Receiver<State>) {
    let name = agent.config.name.clone();
    let taint = agent.config.kubernetes.not_ready_taint.clone();
    let skeinnodes: Api<SkeinNode> = Api::all(client.clone());
    let mut publisher = Publisher {
        record: RecordWriter::new(skeinnodes.clone(), name.clone()),
        status: StatusWriter::new(skeinnodes, agent.clone()),
        node: NodeWriter::new(Api::all(client.clone()), name, taint),
        events: EventWriter::new(Api::namespaced(client, EVENTS_NAMESPACE), agent.clone()),
        agent,
    };
    let mut self_check = tokio::time::interval(SELF_CHECK_INTERVAL);
    self_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut waits = RetryBackoff::default();
    let mut logged_error = None;
    loop {
        let now = state.borrow_and_update().clone();
        let silent = publisher.agent.dataplane.observed().report.unreachable;
        match publisher.write_changes(&now).await {
            Ok(()) => (waits, logged_error) = (RetryBackoff::default(), None),
            Err(error) => {
                let text = format!("{error:#}");
                if logged_error.as_ref() != Some(&text) {
                    tracing::warn!(error = text, "cannot write to the API server");
                    logged_error = Some(text);
                }
                // A changed state is tried at once, because the API server may accept it.
                tokio::select! {
                    changed = state.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(waits.next().unwrap_or_default()) => {}
                }
                continue;
            }
        }
        let dataplane = publisher.agent.dataplane.clone();
        let due = publisher.status.due.unwrap_or_else(|| Instant::now() + SELF_CHECK_INTERVAL);
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = dataplane.unreachable_peers_changed(&silent) => {}
            () = tokio::time::sleep_until(due) => {}
            _ = self_check.tick() => {}
        }
    }
}

/// The writers of everything that this node publishes.
struct Publisher {
    agent: AgentView,
    record: RecordWriter,
    status: StatusWriter,
    node: NodeWriter,
    events: EventWriter,
}

impl Publisher {
    /// Writes everything that differs. Each writer runs even if another one fails; the first error
    /// is returned.
    async fn write_changes(&mut self, state: &State) -> anyhow::Result<()> {
        // The deadline is reset even if nothing can be written now, because a deadline in the past
        // would cause a busy loop.
        self.status.due = None;
        let Some(node) = &state.node else { return Ok(()) };
        match &state.problem {
            Some(problem) => {
                self.events.report(node, "NoRecord", WARNING, &problem.to_string()).await;
            }
            None => self.events.clear("NoRecord"),
        }
        let applied = match &state.own {
            Some(Ok(own)) => {
                let (published, deleted) = (state.published.as_deref(), state.deleted.as_deref());
                self.record.apply(node, own, published, deleted).await
            }
            // The earlier record stays, but its status must change, because the agent is not ready.
            Some(Err(_)) => Ok(()),
            None => return Ok(()),
        };
        let reasons = self.agent.readiness.reasons();
        let opened = match reasons.is_empty() {
            true => self.node.open(node).await,
            false => Ok(()),
        };
        let ObservedDataplane { status: dataplane, report } = self.agent.dataplane.observed();
        // The state of the data process is unknown for a moment after its restart.
        let known = dataplane.up && !report.capabilities.is_empty();
        let capabilities = known.then_some(report.capabilities.as_slice());
        if known {
            self.status.set_silent(!report.unreachable.is_empty());
        }
        let unready = self.events.is_unready_for(UNKNOWN_DELAY);
        let status = match &state.published {
            Some(published) if known => self.status.write(published, Some(&report), &reasons).await,
            Some(published) if unready && !reasons.is_empty() => {
                self.status.write(published, None, &reasons).await
            }
            _ => Ok(()),
        };
        self.events.report_changes(node, capabilities, &reasons).await;
        applied.and(opened).and(status)
    }
}
