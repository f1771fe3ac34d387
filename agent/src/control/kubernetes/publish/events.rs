//! Events of this node's Node, as `kubectl describe node` shows them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::{Event, EventSource, Node, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use skein_ipc::{Capability, CapabilityState};
use skein_netlink::firewall::Firewall;
use skein_netlink::firewall::reconciler::FirewallStatus;
use tokio::time::Instant;

use super::request::{MANAGER, ask};
use crate::control::kubernetes::backoff::fraction;
use crate::control::view::AgentView;

/// A type of events.
pub(super) const WARNING: &str = "Warning";
/// Events of one reason come no more often than this while it lasts.
const EVENT: Duration = Duration::from_secs(600);
/// Delay after an event that the API server refused.
const RETRY_DELAY: Duration = Duration::from_secs(60);
/// How long the nodes of a cluster take to tell of what all of them see.
const SPREAD: Duration = Duration::from_secs(30);
/// How long the agent may be unready before an operator is told.
const UNREADY: Duration = Duration::from_secs(30);

struct Told {
    text: String,
    at: Instant,
    /// Whether it is so no more.
    over: bool,
}

/// Writer of events of this node's Node.
pub(super) struct EventWriter {
    /// The older API of events, as kubelet uses it: of a cluster-scoped object's the newer one wants
    /// another namespace in every few versions of Kubernetes.
    events: Api<Event>,
    agent: AgentView,
    unready_since: Option<Instant>,
    refused_since: Option<Instant>,
    /// How long records are refused before this node says so: all nodes see the same ones.
    spread: Duration,
    /// What operators were told of, by the reason.
    told: BTreeMap<&'static str, Told>,
    /// When an event was refused.
    untold: Option<Instant>,
}

impl EventWriter {
    /// Returns a writer that has written nothing yet.
    pub(super) fn new(events: Api<Event>, agent: AgentView) -> Self {
        Self {
            events,
            agent,
            unready_since: None,
            refused_since: None,
            spread: SPREAD.mul_f64(fraction()),
            told: BTreeMap::new(),
            untold: None,
        }
    }

    /// Returns whether the agent has been unready for `duration` at least.
    pub(super) fn is_unready_for(&self, duration: Duration) -> bool {
        self.unready_since.is_some_and(|since| since.elapsed() >= duration)
    }

    /// Events, as `kubectl describe node` shows them.
    pub(super) async fn tell_of_changes(
        &mut self,
        node: &Node,
        capabilities: Option<&[Capability]>,
        reasons: &[String],
    ) {
        match reasons.is_empty() {
            true => {
                self.unready_since = None;
                if self.told.get("NetworkNotReady").is_some_and(|told| !told.over) {
                    self.tell(node, "NetworkReady", "Normal", "pods have a network").await;
                    self.over("NetworkNotReady");
                    self.over("NetworkReady");
                }
            }
            false => {
                let since = *self.unready_since.get_or_insert_with(Instant::now);
                if since.elapsed() > UNREADY {
                    let text = reasons.join("; ");
                    self.tell(node, "NetworkNotReady", WARNING, &text).await;
                }
            }
        }
        let registry = self.agent.node.registry();
        match registry.rejected.first() {
            Some(refused) => {
                let since = *self.refused_since.get_or_insert_with(Instant::now);
                let file = refused.file.display();
                let more = registry.rejected.len() - 1;
                let text = format!("{file}: {} (and {more} more)", refused.error);
                if since.elapsed() > self.spread {
                    self.tell(node, "RecordsRefused", WARNING, &text).await;
                }
            }
            None => {
                self.refused_since = None;
                self.over("RecordsRefused");
            }
        }
        self.tell_of_conflicts(node).await;
        match self.closed_chains().first() {
            Some(chain) => self.tell(node, "ForwardDropped", WARNING, chain).await,
            None => self.over("ForwardDropped"),
        }
        let lost: Vec<_> = capabilities
            .unwrap_or_default()
            .iter()
            .filter(|capability| capability.state == CapabilityState::Degraded)
            .map(|capability| capability.name.as_str())
            .collect();
        match lost.is_empty() {
            false => {
                let text = format!("given up at run time: {}", lost.join(", "));
                self.tell(node, "OffloadLost", WARNING, &text).await;
            }
            true => self.over("OffloadLost"),
        }
    }

    /// Publishes an Event about the peers whose pod CIDRs another program of this node has a route
    /// to.
    async fn tell_of_conflicts(&mut self, node: &Node) {
        let conflicts = self.agent.node.interface().conflicts;
        let Some(first) = conflicts.first() else { return self.over("PeerRouteConflict") };
        let text = match conflicts.len() - 1 {
            0 => format!("{}: {}", first.peer, first.problem),
            more => format!("{}: {} (and {more} more)", first.peer, first.problem),
        };
        self.tell(node, "PeerRouteConflict", WARNING, &text).await;
    }

    fn firewall_status(&self) -> Option<FirewallStatus> {
        self.agent.firewall.borrow().as_ref().map(Firewall::status)
    }

    /// Returns the chains of other programs that drop forwarded packets of pods.
    fn closed_chains(&self) -> Vec<String> {
        self.firewall_status().map(|status| status.closed).unwrap_or_default()
    }

    /// Once while it lasts. An event that is refused holds up nothing else, and is tried again later.
    pub(super) async fn tell(&mut self, node: &Node, reason: &'static str, kind: &str, text: &str) {
        let known = self.told.get(reason);
        // Whatever a record of somebody else's says, it cannot make this node write without end.
        if known.is_some_and(|told| (!told.over && told.text == text) || told.at.elapsed() < EVENT)
            || self.untold.is_some_and(|at| at.elapsed() < RETRY_DELAY)
        {
            return;
        }
        if let Err(error) = self.event(node, reason, kind, text).await {
            tracing::warn!(reason, "cannot tell the API server: {error:#}");
            self.untold = Some(Instant::now());
            return;
        }
        let told = Told { text: text.to_owned(), at: Instant::now(), over: false };
        self.told.insert(reason, told);
    }

    pub(super) fn over(&mut self, reason: &'static str) {
        if let Some(told) = self.told.get_mut(reason) {
            told.over = true;
        }
    }

    async fn event(&self, node: &Node, reason: &str, kind: &str, text: &str) -> anyhow::Result<()> {
        let name = node.metadata.name.clone();
        let now = Some(Time(Timestamp::now()));
        let event = Event {
            metadata: ObjectMeta {
                generate_name: name.as_ref().map(|name| format!("{name}.skein-")),
                ..ObjectMeta::default()
            },
            // As kubelet does it, so that `kubectl describe node` finds them: the UID is the name.
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: name.clone(),
                uid: name.clone(),
                ..ObjectReference::default()
            },
            type_: Some(kind.to_owned()),
            reason: Some(reason.to_owned()),
            // 1024 bytes is what the API takes.
            message: Some(text.chars().take(250).collect()),
            source: Some(EventSource { component: Some(MANAGER.to_owned()), host: name }),
            first_timestamp: now.clone(),
            last_timestamp: now,
            count: Some(1),
            ..Event::default()
        };
        ask(self.events.create(&PostParams::default(), &event)).await.context("event")?;
        tracing::debug!(reason, text, "an event is written");
        Ok(())
    }
}
