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
use skein_ipc::{Capability, CapabilityState, UnreachablePeer};
use skein_netlink::firewall::Firewall;
use skein_netlink::firewall::reconciler::FirewallStatus;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::backoff::{Waits, fraction};
use super::client::{RENEW, describe};
use super::follow::State;
use super::own;
use super::resource::{SkeinNode, SkeinNodeSpec, SkeinNodeStatus};
use super::status::{Known, falls_silent, ours, readiness_differs, status, text, unready};
use crate::control::view::AgentView;
use crate::status::DataplaneStatus;

/// Whose fields ours are (server-side apply).
const MANAGER: &str = "skein-agent";
/// Namespace of the events of what has none.
const EVENTS: &str = "default";
/// A type of events.
const WARNING: &str = "Warning";
/// The agent looks at itself this often.
const LOOK: Duration = Duration::from_secs(2);
/// A status that differs in anything but readiness is written no more often than this, but for the news that
/// peers have fallen silent, which comes no more often either.
const STATUS: Duration = Duration::from_secs(60);
/// Where a node dies all others see it: so many of them a second write that …
const PEERS_A_SECOND: f64 = 100.0;
/// … or fewer, since every agent's watch is told of every one: no more than so many events a second.
const EVENTS_A_SECOND: f64 = 20_000.0;
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
/// Delay before the record states that the agent is not ready, while the data process is unknown. A
/// restarted agent is ready sooner.
const UNKNOWN_DELAY: Duration = Duration::from_secs(5);

/// Keeps what this node tells up to date, for as long as somebody follows the API server.
pub(super) async fn publish(agent: AgentView, client: Client, mut state: watch::Receiver<State>) {
    let mut publisher = Publisher {
        nodes: Api::all(client.clone()),
        skeinnodes: Api::all(client.clone()),
        events: Api::namespaced(client, EVENTS),
        agent,
        applied: None,
        written: None,
        silent_since: None,
        silence_told: None,
        due: None,
        share: fraction(),
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
        let due = publisher.due.unwrap_or_else(|| Instant::now() + LOOK);
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = dataplane.other_unreachable_peers(&silent) => {}
            () = tokio::time::sleep_until(due) => {}
            _ = look.tick() => {}
        }
    }
}

struct Publisher {
    agent: AgentView,
    nodes: Api<Node>,
    skeinnodes: Api<SkeinNode>,
    /// The older API of events, as kubelet uses it: of a cluster-scoped object's the newer one wants
    /// another namespace in every few versions of Kubernetes.
    events: Api<Event>,
    applied: Option<Applied>,
    /// Status that was written last.
    written: Option<WrittenStatus>,
    /// Since when there are unreachable peers.
    silent_since: Option<Instant>,
    /// When it was last written that there are where none was.
    silence_told: Option<Instant>,
    /// When a status that waits may be written.
    due: Option<Instant>,
    /// This node's place among those that tell of what all see, from 0 to 1.
    share: f64,
    unready_since: Option<Instant>,
    refused_since: Option<Instant>,
    /// How long records are refused before this node says so: all nodes see the same ones.
    spread: Duration,
    /// What operators were told of, by the reason.
    told: BTreeMap<&'static str, Told>,
    /// When an event was refused.
    untold: Option<Instant>,
}

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
            return Some(written + LOOK);
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
    /// UID of the record in the API server's answer.
    uid: Option<String>,
    at: Instant,
}

impl Applied {
    /// Returns whether the written record is still on its way through the watch, so that it need
    /// not be written again. `published` is the record as the watch last reported it, `deleted` the
    /// UID of the last record whose deletion the watch reported.
    fn is_awaited(
        &self,
        spec: &SkeinNodeSpec,
        owner: &OwnerReference,
        published: Option<&SkeinNode>,
        deleted: Option<&str>,
    ) -> bool {
        let version = published.and_then(|found| found.metadata.resource_version.as_ref());
        let wait = if self.before.as_ref() == version { SILENCE } else { PATIENCE };
        let is_deleted = self.uid.is_some() && self.uid.as_deref() == deleted;
        self.spec == *spec && self.owner == *owner && !is_deleted && self.at.elapsed() < wait
    }
}

impl Publisher {
    /// Each of these goes on where another is refused; the first error is told.
    async fn catch_up(&mut self, state: &State) -> anyhow::Result<()> {
        // Also where nothing can be written now: what is past must not be waited for.
        self.due = None;
        let Some(node) = &state.node else { return Ok(()) };
        match &state.problem {
            Some(problem) => self.tell(node, "NoRecord", WARNING, problem).await,
            None => self.over("NoRecord"),
        }
        let applied = match &state.own {
            Some(Ok(own)) => {
                let (published, deleted) = (state.published.as_deref(), state.deleted.as_deref());
                self.apply(node, own, published, deleted).await
            }
            // The earlier record stays, but its status must change: the agent is not ready.
            Some(Err(_)) => Ok(()),
            None => return Ok(()),
        };
        let reasons = self.agent.readiness.reasons();
        let opened = match reasons.is_empty() {
            true => self.open(node).await,
            false => Ok(()),
        };
        let dataplane = self.agent.dataplane.get();
        // Nothing is known of the data process for a moment, as when it is restarted.
        let known = dataplane.up && !dataplane.capabilities.is_empty();
        let capabilities = known.then_some(dataplane.capabilities.as_slice());
        if known {
            self.silent_since = match dataplane.unreachable.is_empty() {
                true => None,
                false => self.silent_since.or(Some(Instant::now())),
            };
        }
        let unready = self.unready_since.is_some_and(|since| since.elapsed() >= UNKNOWN_DELAY);
        let status = match &state.published {
            Some(published) if known => {
                self.write_status(published, Some(&dataplane), &reasons).await
            }
            Some(published) if unready && !reasons.is_empty() => {
                self.write_status(published, None, &reasons).await
            }
            _ => Ok(()),
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
        deleted: Option<&str>,
    ) -> anyhow::Result<()> {
        let Some(owner) = own::owner(node) else { return Ok(()) };
        // Others may own it, too.
        let owned = |found: &SkeinNode| {
            let mut owners = found.metadata.owner_references.iter().flatten();
            owners.any(|found| found.uid == owner.uid)
        };
        if published.is_some_and(|found| found.spec == *own && owned(found)) {
            // The watch has reported the write: a later difference is a new change.
            self.applied = None;
            return Ok(());
        }
        let waits = |applied: &Applied| applied.is_awaited(own, &owner, published, deleted);
        if self.applied.as_ref().is_some_and(waits) {
            return Ok(());
        }
        let before = published.and_then(|found| found.metadata.resource_version.clone());
        let name = &self.agent.config.name;
        let metadata = json!({ "name": name, "ownerReferences": [&owner] });
        let object = skeinnode(metadata, "spec", json!(own));
        let parameters = PatchParams::apply(MANAGER).force();
        let patch = Patch::Apply(&object);
        let written = self.skeinnodes.patch(name, &parameters, &patch);
        let uid = ask(written).await.context("SkeinNode")?.metadata.uid;
        tracing::info!(endpoints = ?own.endpoints, pod_cidrs = ?own.pod_cidrs, "the SkeinNode is written");
        let at = Instant::now();
        self.applied = Some(Applied { spec: own.clone(), owner, before, uid, at });
        Ok(())
    }

    /// `dataplane` is `None` while the state of the data process is unknown.
    async fn write_status(
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
                let firewall = self.firewall_status();
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

    /// Tells the scheduler that pods have a network here.
    async fn open(&self, node: &Node) -> anyhow::Result<()> {
        let name = &self.agent.config.name;
        if let Some(remaining) =
            untainted(node, self.agent.config.kubernetes.not_ready_taint.as_deref())
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

/// The Node's taints without that one; `None` where it is not there.
fn untainted(node: &Node, key: Option<&str>) -> Option<Vec<serde_json::Value>> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let stays = |taint: &&k8s_openapi::api::core::v1::Taint| Some(taint.key.as_str()) != key;
    let remaining: Vec<_> = taints.iter().filter(stays).map(|taint| json!(taint)).collect();
    (remaining.len() < taints.len()).then_some(remaining)
}

/// How long a node waits to tell of what all nodes of the cluster see, by its place among them (0 to 1).
fn spread(share: f64, nodes: usize) -> Duration {
    let nodes = nodes as f64;
    let rate = PEERS_A_SECOND.min(EVENTS_A_SECOND / nodes.max(1.0));
    Duration::from_secs_f64(share * nodes / rate)
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
    fn deleted_record_is_written_again_at_once() {
        let record = |uid: &str, version: &str| -> SkeinNode {
            serde_json::from_value(json!({
                "metadata": { "name": "a", "uid": uid, "resourceVersion": version },
                "spec": { "publicKey": "k", "endpoints": [], "podCIDRs": [] },
            }))
            .unwrap()
        };
        let found = record("first", "1");
        let node = node(json!({ "metadata": { "name": "a", "uid": "n" } }));
        let owner = own::owner(&node).unwrap();
        let applied = |before: Option<&str>, seconds| Applied {
            spec: found.spec.clone(),
            owner: owner.clone(),
            before: before.map(str::to_owned),
            uid: Some("first".to_owned()),
            at: Instant::now() - Duration::from_secs(seconds),
        };
        let awaited = |applied: &Applied, published: Option<&SkeinNode>, deleted| {
            applied.is_awaited(&found.spec, &owner, published, deleted)
        };
        let created = applied(None, 0);
        assert!(awaited(&created, None, None), "The watch has not reported the record yet.");
        assert!(awaited(&created, None, Some("another")), "Another record was deleted.");
        assert!(!awaited(&created, None, Some("first")), "The record was deleted.");
        let changed = applied(Some("1"), 11);
        assert!(awaited(&changed, Some(&found), None), "The watch may be silent.");
        let edited = record("first", "2");
        assert!(!awaited(&changed, Some(&edited), None), "The watch reports another change.");
        assert!(!awaited(&applied(Some("1"), 121), Some(&found), None), "The watch is late.");
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
        assert_eq!(ready.at(), Some(start + LOOK));
    }
}
