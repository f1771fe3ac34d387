//! What this node tells the API server: its SkeinNode, that its Node has a network, and what an
//! operator must know. Nothing is written that is there already.

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
use super::backoff::Waits;
use super::follow::State;
use super::resource::SkeinNode;
use crate::control::view::AgentView;

/// Namespace of the events of what has none.
const EVENTS: &str = "default";
/// The agent looks at itself this often.
const LOOK: Duration = Duration::from_secs(2);
/// Delay before the record states that the agent is not ready, while the data process is unknown. A
/// restarted agent is ready sooner.
const UNKNOWN_DELAY: Duration = Duration::from_secs(5);

/// Keeps what this node tells up to date, for as long as somebody follows the API server.
pub(super) async fn publish(agent: AgentView, client: Client, mut state: watch::Receiver<State>) {
    let name = agent.config.name.clone();
    let taint = agent.config.kubernetes.not_ready_taint.clone();
    let skeinnodes: Api<SkeinNode> = Api::all(client.clone());
    let mut publisher = Publisher {
        record: RecordWriter::new(skeinnodes.clone(), name.clone()),
        status: StatusWriter::new(skeinnodes, agent.clone()),
        node: NodeWriter::new(Api::all(client.clone()), name, taint),
        events: EventWriter::new(Api::namespaced(client, EVENTS), agent.clone()),
        agent,
    };
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut waits = Waits::default();
    let mut complaint = None;
    loop {
        let now = state.borrow_and_update().clone();
        let silent = publisher.agent.dataplane.get().unreachable;
        match publisher.catch_up(&now).await {
            Ok(()) => (waits, complaint) = (Waits::default(), None),
            Err(error) => {
                let text = format!("{error:#}");
                if complaint.as_ref() != Some(&text) {
                    tracing::warn!("cannot tell the API server: {text}");
                    complaint = Some(text);
                }
                // What has changed meanwhile may be taken, though this is not.
                tokio::select! {
                    changed = state.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(waits.next().unwrap_or_default()) => {}
                }
                continue;
            }
        }
        let dataplane = publisher.agent.dataplane.clone();
        let due = publisher.status.due.unwrap_or_else(|| Instant::now() + LOOK);
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = dataplane.unreachable_peers_changed(&silent) => {}
            () = tokio::time::sleep_until(due) => {}
            _ = look.tick() => {}
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
    /// Each of these goes on where another is refused; the first error is told.
    async fn catch_up(&mut self, state: &State) -> anyhow::Result<()> {
        // Also where nothing can be written now: what is past must not be waited for.
        self.status.due = None;
        let Some(node) = &state.node else { return Ok(()) };
        match &state.problem {
            Some(problem) => self.events.tell(node, "NoRecord", WARNING, problem).await,
            None => self.events.over("NoRecord"),
        }
        let applied = match &state.own {
            Some(Ok(own)) => {
                let (published, deleted) = (state.published.as_deref(), state.deleted.as_deref());
                self.record.apply(node, own, published, deleted).await
            }
            // The earlier record stays, but its status must change: the agent is not ready.
            Some(Err(_)) => Ok(()),
            None => return Ok(()),
        };
        let reasons = self.agent.readiness.reasons();
        let opened = match reasons.is_empty() {
            true => self.node.open(node).await,
            false => Ok(()),
        };
        let dataplane = self.agent.dataplane.get();
        // Nothing is known of the data process for a moment, as when it is restarted.
        let known = dataplane.up && !dataplane.capabilities.is_empty();
        let capabilities = known.then_some(dataplane.capabilities.as_slice());
        if known {
            self.status.set_silent(!dataplane.unreachable.is_empty());
        }
        let unready = self.events.is_unready_for(UNKNOWN_DELAY);
        let status = match &state.published {
            Some(published) if known => {
                self.status.write(published, Some(&dataplane), &reasons).await
            }
            Some(published) if unready && !reasons.is_empty() => {
                self.status.write(published, None, &reasons).await
            }
            _ => Ok(()),
        };
        self.events.tell_of_changes(node, capabilities, &reasons).await;
        applied.and(opened).and(status)
    }
}
