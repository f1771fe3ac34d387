//! Writer of Events about this node's Node, which `kubectl describe node` shows.

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

use super::request::{MANAGER, send};
use crate::control::kubernetes::backoff::random_fraction;
use crate::control::view::AgentView;

/// Type of an Event about a problem.
pub(super) const WARNING: &str = "Warning";
/// Minimum interval between two Events with the same reason.
const MIN_EVENT_INTERVAL: Duration = Duration::from_secs(600);
/// Delay after an event that the API server refused.
const RETRY_DELAY: Duration = Duration::from_secs(60);
/// Maximum delay of an Event about a problem that all nodes of a cluster observe.
const MAX_SPREAD_DELAY: Duration = Duration::from_secs(30);
/// Time for which the agent must be unready before an Event is written.
const UNREADY_DELAY: Duration = Duration::from_secs(30);

/// Last Event with one reason.
struct ReportedEvent {
    text: String,
    at: Instant,
    /// True if the problem has ended.
    over: bool,
}

/// Writer of events of this node's Node.
pub(super) struct EventWriter {
    /// Core API of Events, as kubelet uses it, because the newer API (events.k8s.io) requires
    /// different namespaces for cluster-scoped objects in different versions of Kubernetes.
    events: Api<Event>,
    agent: AgentView,
    unready_since: Option<Instant>,
    refused_since: Option<Instant>,
    /// Delay before an Event about refused records, random for each node, because all nodes refuse
    /// the same records.
    spread: Duration,
    /// Last Event of each reason.
    reported: BTreeMap<&'static str, ReportedEvent>,
    /// Time at which the API server last refused an Event.
    refused_at: Option<Instant>,
}

impl EventWriter {
    /// Returns a writer that has written nothing yet.
    pub(super) fn new(events: Api<Event>, agent: AgentView) -> Self {
        Self {
            events,
            agent,
            unready_since: None,
            refused_since: None,
            spread: MAX_SPREAD_DELAY.mul_f64(random_fraction()),
            reported: BTreeMap::new(),
            refused_at: None,
        }
    }

    /// Returns whether the agent has been unready for `duration` at least.
    pub(super) fn is_unready_for(&self, duration: Duration) -> bool {
        self.unready_since.is_some_and(|since| since.elapsed() >= duration)
    }

    /// Writes Events about changes of readiness, refused records, route conflicts, FORWARD chains
    /// and offloads. `capabilities` is `None` while the state of the data process is unknown.
    pub(super) async fn report_changes(
        &mut self,
        node: &Node,
        capabilities: Option<&[Capability]>,
        reasons: &[String],
    ) {
        match reasons.is_empty() {
            true => {
                self.unready_since = None;
                if self.reported.get("NetworkNotReady").is_some_and(|event| !event.over) {
                    self.report(node, "NetworkReady", "Normal", "pods have a network").await;
                    self.clear("NetworkNotReady");
                    self.clear("NetworkReady");
                }
            }
            false => {
                let since = *self.unready_since.get_or_insert_with(Instant::now);
                if since.elapsed() > UNREADY_DELAY {
                    let text = reasons.join("; ");
                    self.report(node, "NetworkNotReady", WARNING, &text).await;
                }
            }
        }
        let registry = self.agent.node.registry();
        match registry.rejected.first() {
            Some(refused) => {
                let since = *self.refused_since.get_or_insert_with(Instant::now);
                let origin = refused.origin.display();
                let text = match registry.rejected.len() - 1 {
                    0 => format!("{origin}: {}", refused.error),
                    more => format!("{origin}: {} (and {more} more)", refused.error),
                };
                if since.elapsed() > self.spread {
                    self.report(node, "RecordsRefused", WARNING, &text).await;
                }
            }
            None => {
                self.refused_since = None;
                self.clear("RecordsRefused");
            }
        }
        self.report_conflicts(node).await;
        match self.closed_chains().first() {
            Some(chain) => self.report(node, "ForwardDropped", WARNING, chain).await,
            None => self.clear("ForwardDropped"),
        }
        let lost: Vec<_> = capabilities
            .unwrap_or_default()
            .iter()
            .filter(|capability| capability.state == CapabilityState::Degraded)
            .map(|capability| capability.name.text())
            .collect();
        match lost.is_empty() {
            false => {
                let text = format!(
                    "offloads disabled at run time: {}. The status of the SkeinNode has the reasons.",
                    lost.join(", ")
                );
                self.report(node, "OffloadLost", WARNING, &text).await;
            }
            true => self.clear("OffloadLost"),
        }
    }

    /// Publishes an Event about the peers whose pod CIDRs another program of this node has a route
    /// to.
    async fn report_conflicts(&mut self, node: &Node) {
        let conflicts = self.agent.node.interface().conflicts;
        let Some(first) = conflicts.first() else { return self.clear("PeerRouteConflict") };
        let text = match conflicts.len() - 1 {
            0 => format!("{}: {}", first.peer, first.problem),
            more => format!("{}: {} (and {more} more)", first.peer, first.problem),
        };
        self.report(node, "PeerRouteConflict", WARNING, &text).await;
    }

    fn firewall_status(&self) -> Option<FirewallStatus> {
        self.agent.firewall.borrow().as_ref().map(Firewall::status)
    }

    /// Returns the chains of other programs that drop forwarded packets of pods.
    fn closed_chains(&self) -> Vec<String> {
        self.firewall_status().map(|status| status.closed).unwrap_or_default()
    }

    /// Writes an Event about a problem, once while the problem lasts. A refused Event is logged and
    /// tried again after [`RETRY_DELAY`].
    pub(super) async fn report(
        &mut self,
        node: &Node,
        reason: &'static str,
        kind: &str,
        text: &str,
    ) {
        let known = self.reported.get(reason);
        // The text may come from another node's record, which must not cause an unbounded number of
        // Events.
        if known.is_some_and(|event| {
            (!event.over && event.text == text) || event.at.elapsed() < MIN_EVENT_INTERVAL
        }) || self.refused_at.is_some_and(|at| at.elapsed() < RETRY_DELAY)
        {
            return;
        }
        if let Err(error) = self.create_event(node, reason, kind, text).await {
            tracing::warn!(reason, error = format!("{error:#}"), "cannot write an Event");
            self.refused_at = Some(Instant::now());
            return;
        }
        let event = ReportedEvent { text: text.to_owned(), at: Instant::now(), over: false };
        self.reported.insert(reason, event);
    }

    /// Records that the problem with this reason has ended.
    pub(super) fn clear(&mut self, reason: &'static str) {
        if let Some(event) = self.reported.get_mut(reason) {
            event.over = true;
        }
    }

    async fn create_event(
        &self,
        node: &Node,
        reason: &str,
        kind: &str,
        text: &str,
    ) -> anyhow::Result<()> {
        let name = node.metadata.name.clone();
        let now = Some(Time(Timestamp::now()));
        let event = Event {
            metadata: ObjectMeta {
                generate_name: name.as_ref().map(|name| format!("{name}.skein-")),
                ..ObjectMeta::default()
            },
            // `kubectl describe node` finds Events whose UID is the node's name, as kubelet writes
            // them.
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: name.clone(),
                uid: name.clone(),
                ..ObjectReference::default()
            },
            type_: Some(kind.to_owned()),
            reason: Some(reason.to_owned()),
            // The API accepts 1024 bytes, and a character has up to 4.
            message: Some(text.chars().take(250).collect()),
            source: Some(EventSource { component: Some(MANAGER.to_owned()), host: name }),
            first_timestamp: now.clone(),
            last_timestamp: now,
            count: Some(1),
            ..Event::default()
        };
        send(self.events.create(&PostParams::default(), &event)).await.context("event")?;
        tracing::debug!(reason, text, "Event written");
        Ok(())
    }
}
