//! What this node tells the API server: its SkeinNode, that its Node has a network, and what an
//! operator must know. Nothing is written that is there already.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, anyhow};
use k8s_openapi::api::core::v1::{Event, EventSource, Node, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::backoff::{Waits, fraction};
use super::client::describe;
use super::follow::{RENEW, State};
use super::own;
use super::resource::{Condition, SkeinNode, SkeinNodeSpec, SkeinNodeStatus, offloads};
use crate::control::shared::Shared;
use crate::ipc::{Capability, CapabilityState};

/// Whose fields ours are (server-side apply).
const MANAGER: &str = "skein-agent";
/// The condition of a SkeinNode that is the agent's.
const READY: &str = "Ready";
/// Namespace of the events of what has none.
const EVENTS: &str = "default";
/// A type of events.
const WARNING: &str = "Warning";
/// The agent looks at itself this often.
const LOOK: Duration = Duration::from_secs(2);
/// A status that differs in anything but readiness is written no more often than this.
const STATUS: Duration = Duration::from_secs(60);
/// Events of one reason come no more often than this while it lasts.
const EVENT: Duration = Duration::from_secs(600);
/// As long as a watch is silent, what was written may wait there to be told.
const SILENCE: Duration = Duration::from_secs(2 * RENEW as u64);
/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the nodes of a cluster take to tell of what all of them see.
const SPREAD: Duration = Duration::from_secs(30);
/// How long the agent may be unready before an operator is told.
const UNREADY: Duration = Duration::from_secs(30);

/// Keeps what this node tells up to date, for as long as somebody follows the API server.
pub(super) async fn publish(shared: Shared, client: Client, mut state: watch::Receiver<State>) {
    let mut publisher = Publisher {
        nodes: Api::all(client.clone()),
        skeinnodes: Api::all(client.clone()),
        events: Api::namespaced(client, EVENTS),
        shared,
        applied: None,
        status_written: None,
        last_status: None,
        unready_since: None,
        refused_since: None,
        spread: SPREAD.mul_f64(fraction()),
        told: BTreeMap::new(),
        untold: None,
    };
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut waits = Waits::default();
    let mut complaint = None;
    loop {
        let now = state.borrow_and_update().clone();
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
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            _ = look.tick() => {}
        }
    }
}

struct Publisher {
    shared: Shared,
    nodes: Api<Node>,
    skeinnodes: Api<SkeinNode>,
    /// The older API of events, as kubelet uses it: of a cluster-scoped object's the newer one wants
    /// another namespace in every few versions of Kubernetes.
    events: Api<Event>,
    applied: Option<Applied>,
    status_written: Option<Instant>,
    /// What was written then.
    last_status: Option<SkeinNodeStatus>,
    unready_since: Option<Instant>,
    refused_since: Option<Instant>,
    /// How long records are refused before this node says so: all nodes see the same ones.
    spread: Duration,
    /// What operators were told of, by the reason.
    told: BTreeMap<&'static str, Told>,
    /// When an event was refused.
    untold: Option<Instant>,
}

struct Told {
    text: String,
    at: Instant,
    /// Whether it is so no more.
    over: bool,
}

/// The record that was written last: the watch tells of it a little later.
struct Applied {
    spec: SkeinNodeSpec,
    owner: OwnerReference,
    /// The version that the watch had told of before.
    before: Option<String>,
    at: Instant,
}

impl Publisher {
    /// Each of these goes on where another is refused; the first error is told.
    async fn catch_up(&mut self, state: &State) -> anyhow::Result<()> {
        let Some(node) = &state.node else { return Ok(()) };
        match &state.problem {
            Some(problem) => self.tell(node, "NoRecord", WARNING, problem).await,
            None => self.over("NoRecord"),
        }
        let Some(Ok(own)) = &state.own else { return Ok(()) };
        let applied = self.apply(node, own, state.published.as_deref()).await;
        let reasons = self.shared.readiness.reasons();
        let opened = match reasons.is_empty() {
            true => self.open(node).await,
            false => Ok(()),
        };
        let dataplane = self.shared.dataplane.get();
        // Nothing is known of the data process for a moment, as when it is restarted.
        let known = dataplane.up && !dataplane.capabilities.is_empty();
        let capabilities = known.then_some(dataplane.capabilities.as_slice());
        let status = match &state.published {
            Some(published) => self.write_status(published, capabilities, &reasons).await,
            None => Ok(()),
        };
        self.tell_of_changes(node, capabilities, &reasons).await;
        applied.and(opened).and(status)
    }

    /// Brings the SkeinNode to what it is to be.
    async fn apply(
        &mut self,
        node: &Node,
        own: &SkeinNodeSpec,
        published: Option<&SkeinNode>,
    ) -> anyhow::Result<()> {
        let Some(owner) = own::owner(node) else { return Ok(()) };
        // Others may own it, too.
        let owned = |found: &SkeinNode| {
            let mut owners = found.metadata.owner_references.iter().flatten();
            owners.any(|found| found.uid == owner.uid)
        };
        if published.is_some_and(|found| found.spec == *own && owned(found)) {
            return Ok(());
        }
        let before = published.and_then(|found| found.metadata.resource_version.clone());
        let waits = |applied: &Applied| {
            let wait = if applied.before == before { SILENCE } else { PATIENCE };
            applied.spec == *own && applied.owner == owner && applied.at.elapsed() < wait
        };
        if self.applied.as_ref().is_some_and(waits) {
            return Ok(());
        }
        let name = &self.shared.config.name;
        let metadata = json!({ "name": name, "ownerReferences": [&owner] });
        let object = skeinnode(metadata, "spec", json!(own));
        let parameters = PatchParams::apply(MANAGER).force();
        let patch = Patch::Apply(&object);
        ask(self.skeinnodes.patch(name, &parameters, &patch)).await.context("SkeinNode")?;
        tracing::info!(endpoints = ?own.endpoints, pod_cidrs = ?own.pod_cidrs, "the SkeinNode is written");
        self.applied = Some(Applied { spec: own.clone(), owner, before, at: Instant::now() });
        Ok(())
    }

    async fn write_status(
        &mut self,
        published: &SkeinNode,
        capabilities: Option<&[Capability]>,
        reasons: &[String],
    ) -> anyhow::Result<()> {
        let Some(capabilities) = capabilities else { return Ok(()) };
        let found = published.status.clone().map(ours);
        let generation = published.metadata.generation;
        let mtu = self.shared.interface().mtu;
        // What was written last is newer than what the watch has told, for a while.
        let before = self.last_status.as_ref().or(found.as_ref());
        let status = status(before, generation, capabilities, mtu, reasons, Timestamp::now());
        if before == Some(&status) && found.as_ref() == Some(&status) {
            return Ok(());
        }
        let ready = |status: &SkeinNodeStatus| {
            status.conditions.first().map(|condition| condition.status.clone())
        };
        let urgent = before.and_then(ready) != ready(&status);
        let recent =
            self.status_written.is_some_and(|at| at.elapsed() < if urgent { LOOK } else { STATUS });
        if recent {
            return Ok(());
        }
        let name = &self.shared.config.name;
        let object = skeinnode(json!({ "name": name }), "status", json!(status));
        let parameters = PatchParams::apply(MANAGER).force();
        let patch = Patch::Apply(&object);
        let written = self.skeinnodes.patch_status(name, &parameters, &patch);
        ask(written).await.context("status of the SkeinNode")?;
        tracing::debug!(before = ?found, now = ?status, "the SkeinNode's status is written");
        (self.status_written, self.last_status) = (Some(Instant::now()), Some(status));
        Ok(())
    }

    /// Tells the scheduler that pods have a network here.
    async fn open(&self, node: &Node) -> anyhow::Result<()> {
        let name = &self.shared.config.name;
        if let Some(remaining) =
            untainted(node, self.shared.config.kubernetes.not_ready_taint.as_deref())
        {
            // The version makes it a conflict if somebody has added another meanwhile.
            let version = &node.metadata.resource_version;
            let change = json!({
                "metadata": { "resourceVersion": version },
                "spec": { "taints": remaining },
            });
            let patch = Patch::Merge(&change);
            ask(self.nodes.patch(name, &PatchParams::default(), &patch)).await.context("taint")?;
            tracing::info!("the Node's taint is removed");
        }
        if let Some(condition) = available(node, Timestamp::now()) {
            let change = json!({ "status": { "conditions": [condition] } });
            let (parameters, patch) = (PatchParams::default(), Patch::Strategic(&change));
            ask(self.nodes.patch_status(name, &parameters, &patch))
                .await
                .context("condition NetworkUnavailable")?;
        }
        Ok(())
    }

    /// Events, as `kubectl describe node` shows them.
    async fn tell_of_changes(
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
        let registry = self.shared.registry();
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

    /// Once while it lasts. An event that is refused holds up nothing else, and is tried again later.
    async fn tell(&mut self, node: &Node, reason: &'static str, kind: &str, text: &str) {
        let known = self.told.get(reason);
        // Whatever a record of somebody else's says, it cannot make this node write without end.
        if known.is_some_and(|told| (!told.over && told.text == text) || told.at.elapsed() < EVENT)
            || self.untold.is_some_and(|at| at.elapsed() < STATUS)
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

    fn over(&mut self, reason: &'static str) {
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

async fn ask<T>(request: impl Future<Output = kube::Result<T>>) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(PATIENCE, request).await;
    let answer = answer.with_context(|| format!("no answer within {PATIENCE:?}"))?;
    answer.map_err(|error| anyhow!(describe(&error)))
}

/// A SkeinNode with one part of it, for a server-side apply.
fn skeinnode(
    metadata: serde_json::Value,
    part: &str,
    value: serde_json::Value,
) -> serde_json::Value {
    json!({
        "apiVersion": SkeinNode::api_version(&()),
        "kind": SkeinNode::kind(&()),
        "metadata": metadata,
        part: value,
    })
}

/// What of a status the agent writes: others may have conditions there, too.
fn ours(mut status: SkeinNodeStatus) -> SkeinNodeStatus {
    status.conditions.retain(|condition| condition.kind == READY);
    status
}

/// What the SkeinNode is to say of the node.
fn status(
    before: Option<&SkeinNodeStatus>,
    generation: Option<i64>,
    capabilities: &[Capability],
    mtu: u16,
    reasons: &[String],
    now: Timestamp,
) -> SkeinNodeStatus {
    let ready = if reasons.is_empty() { "True" } else { "False" };
    let before = before.and_then(|status| status.conditions.first());
    let since = before.filter(|condition| condition.status == ready);
    let condition = Condition {
        kind: READY.to_owned(),
        status: ready.to_owned(),
        reason: if reasons.is_empty() { "AgentReady" } else { "AgentNotReady" }.to_owned(),
        message: if reasons.is_empty() {
            "pods have a network".to_owned()
        } else {
            reasons.join("; ")
        },
        last_transition_time: since
            .map_or_else(|| text(now), |same| same.last_transition_time.clone()),
        observed_generation: generation,
    };
    SkeinNodeStatus {
        observed_generation: generation,
        agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        mtu: Some(mtu.into()),
        offloads: Some(offloads(capabilities)),
        capabilities: capabilities.iter().map(Into::into).collect(),
        conditions: vec![condition],
    }
}

/// In whole seconds, as the API has times.
fn text(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

/// The Node's taints without that one; `None` where it is not there.
fn untainted(node: &Node, key: Option<&str>) -> Option<Vec<serde_json::Value>> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let stays = |taint: &&k8s_openapi::api::core::v1::Taint| Some(taint.key.as_str()) != key;
    let remaining: Vec<_> = taints.iter().filter(stays).map(|taint| json!(taint)).collect();
    (remaining.len() < taints.len()).then_some(remaining)
}

/// The condition NetworkUnavailable, where somebody (a cloud's controller) has set it and waits for a
/// network.
fn available(node: &Node, now: Timestamp) -> Option<serde_json::Value> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    let mut unavailable = conditions.iter().filter(|c| c.type_ == "NetworkUnavailable");
    unavailable.next().filter(|condition| condition.status != "False")?;
    Some(json!({
        "type": "NetworkUnavailable",
        "status": "False",
        "reason": "SkeinIsUp",
        "message": "Skein is running on this node",
        "lastTransitionTime": text(now),
        "lastHeartbeatTime": text(now),
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn node(value: serde_json::Value) -> Node {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn only_our_taint_is_removed() {
        let taint = |key: &str| json!({ "key": key, "effect": "NoSchedule" });
        let with = |keys: &[&str]| {
            let taints: Vec<_> = keys.iter().map(|key| taint(key)).collect();
            node(json!({ "spec": { "taints": taints } }))
        };
        let remaining = untainted(&with(&["a", "ours", "b"]), Some("ours")).unwrap();
        assert_eq!(remaining, [taint("a"), taint("b")]);
        assert_eq!(untainted(&with(&["a"]), Some("ours")), None);
        assert_eq!(untainted(&with(&["a"]), None), None);
        assert_eq!(untainted(&Node::default(), Some("ours")), None);
    }

    #[test]
    fn the_network_is_said_to_be_there_only_where_somebody_waits() {
        let with = |status: &str| {
            let condition = json!({ "type": "NetworkUnavailable", "status": status });
            node(json!({ "status": { "conditions": [condition] } }))
        };
        let now = Timestamp::UNIX_EPOCH;
        assert_eq!(available(&with("True"), now).unwrap()["status"], "False");
        assert_eq!(available(&with("False"), now), None);
        assert_eq!(available(&Node::default(), now), None);
    }

    #[test]
    fn a_status_that_says_the_same_is_the_same() {
        let capability = |state| Capability { name: "udp_gso".into(), state, reason: None };
        let (on, off) =
            ([capability(CapabilityState::On)], [capability(CapabilityState::Degraded)]);
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let first = status(None, Some(1), &on, 1440, &[], at(1));
        assert_eq!(first.conditions[0].last_transition_time, "1970-01-01T00:00:01Z");
        assert_eq!(status(Some(&first), Some(1), &on, 1440, &[], at(9)), first);
        let ill = status(Some(&first), Some(1), &on, 1440, &["why".into()], at(9));
        assert_eq!(ill.conditions[0].last_transition_time, "1970-01-01T00:00:09Z");
        assert_eq!(
            (ill.conditions[0].status.as_str(), ill.offloads.as_deref()),
            ("False", Some("all"))
        );
        let off = status(Some(&first), Some(1), &off, 1440, &[], at(9));
        assert_eq!(off.offloads.as_deref(), Some("none"));
    }
}
