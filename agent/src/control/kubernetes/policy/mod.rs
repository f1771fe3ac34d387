//! Source of the policy service in Kubernetes: watches of policies, namespaces and the pods that
//! the policies of this node's pods refer to.
//!
//! The pods of this node, all policies and all namespaces are always watched. Pods of other nodes
//! are watched by need: per namespace, or by their labels over all namespaces. A watch without a
//! need ends after [`UNUSED_TIMEOUT`].

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod fake;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::Client;
use serde::de::DeserializeOwned;
use skein_policy::api::{ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, ObjectMeta, Pod};
use skein_policy::model::{PodId, PolicyId};
use tokio::sync::{mpsc, watch as watch_channel};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::watch::{Query, Receiver, Report};
use crate::policy::PolicyService;
use crate::policy::source::{
    Needs, ObjectId, PodScope, PolicyEvent, PolicyObject, PolicySink, Scope, ServiceEnded,
};

/// Time for which a watch continues after the last policy that needs it was removed.
const UNUSED_TIMEOUT: Duration = Duration::from_secs(300);
/// Interval at which unused watches are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of namespaces with a watch of their own. Beyond, one watch of all pods replaces
/// them.
const MAX_NAMESPACES: usize = 128;

/// Scopes that are watched independently of the policies.
const BASE: [Scope; 4] = [
    Scope::NetworkPolicies,
    Scope::ClusterNetworkPolicies,
    Scope::Namespaces,
    Scope::Pods(PodScope::Local),
];

/// Waits for the policy service, and follows the API server until the service ends.
pub(in crate::control::kubernetes) async fn serve(
    client: Client,
    node: String,
    mut policy: watch_channel::Receiver<Option<PolicyService>>,
) {
    let sink = match policy.wait_for(Option::is_some).await {
        Ok(service) => service.as_ref().map(PolicyService::sink),
        Err(_) => None,
    };
    if let Some(sink) = sink {
        follow(client, node, sink).await;
    }
}

/// Follows the API server until the policy service ends.
async fn follow(client: Client, node: String, sink: PolicySink) {
    let (health, mut reports) = mpsc::unbounded_channel();
    let mut needs = sink.needs();
    let mut watches = Watches::new(client, node, sink, health);
    watches.want(&BASE.into());
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        let mut is_sweep_due = false;
        tokio::select! {
            Some((scope, report)) = reports.recv() => watches.on_health(&scope, report),
            changed = needs.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            _ = sweep.tick() => is_sweep_due = true,
        }
        // The needs come first: a watch that is needed again must not end.
        watches.want(&scopes(&needs.borrow_and_update()));
        if is_sweep_due && watches.sweep(Instant::now()).await.is_err() {
            return;
        }
        if watches.publish().await.is_err() {
            return;
        }
    }
}

/// Returns the scopes to watch.
fn scopes(needs: &Needs) -> BTreeSet<Scope> {
    let mut wanted = BTreeSet::from(BASE);
    if needs.nodes {
        wanted.insert(Scope::Nodes);
    }
    let namespaces = needs.pods.iter().filter(|scope| matches!(scope, PodScope::Namespace(_)));
    match namespaces.count() > MAX_NAMESPACES {
        true => wanted.extend([Scope::Pods(PodScope::All)]),
        false => wanted.extend(needs.pods.iter().cloned().map(Scope::Pods)),
    }
    wanted
}

/// State of a scope's watch.
#[derive(Debug)]
enum Health {
    /// The list is complete.
    Complete,
    /// The API server answers.
    Connected,
    /// The objects may be outdated, for this reason.
    Failed(String),
}

/// A watch that runs.
struct Running {
    task: JoinHandle<()>,
    /// True after a complete list.
    is_complete: bool,
    /// Error of the last request; `None` if the API server has answered since.
    error: Option<String>,
    /// Time since which nothing needs the watch.
    unused_since: Option<Instant>,
}

/// The running watches and their state.
struct Watches {
    client: Client,
    /// Name of this node.
    node: String,
    sink: PolicySink,
    health: mpsc::UnboundedSender<(Scope, Health)>,
    running: BTreeMap<Scope, Running>,
    /// Last sent state of the source: `None` if no state was sent yet, `Some(None)` if the source
    /// is available, otherwise the reason why the source is unavailable.
    unavailable: Option<Option<String>>,
    /// True after [`PolicyEvent::Complete`] was sent.
    is_complete: bool,
}

impl Watches {
    fn new(
        client: Client,
        node: String,
        sink: PolicySink,
        health: mpsc::UnboundedSender<(Scope, Health)>,
    ) -> Self {
        let (running, unavailable, is_complete) = (BTreeMap::new(), None, false);
        Self { client, node, sink, health, running, unavailable, is_complete }
    }

    /// Starts the watches that are missing and marks those that are not needed.
    fn want(&mut self, wanted: &BTreeSet<Scope>) {
        for (scope, running) in &mut self.running {
            match wanted.contains(scope) {
                true => running.unused_since = None,
                false => drop(running.unused_since.get_or_insert_with(Instant::now)),
            }
        }
        for scope in wanted {
            if !self.running.contains_key(scope) {
                tracing::debug!(%scope, "network policies need a watch");
                let task = self.start(scope.clone());
                let running = Running { task, is_complete: false, error: None, unused_since: None };
                self.running.insert(scope.clone(), running);
            }
        }
    }

    /// Starts the watch of a scope.
    fn start(&self, scope: Scope) -> JoinHandle<()> {
        let query = query(&scope, &self.node);
        match scope {
            Scope::NetworkPolicies => self.spawn::<NetworkPolicy>(scope, query),
            Scope::ClusterNetworkPolicies => self.spawn::<ClusterNetworkPolicy>(scope, query),
            Scope::Namespaces => self.spawn::<Namespace>(scope, query),
            Scope::Nodes => self.spawn::<Node>(scope, query),
            Scope::Pods(_) => self.spawn::<Pod>(scope, query),
        }
    }

    fn spawn<T: Watched>(&self, scope: Scope, query: Query) -> JoinHandle<()> {
        let feed = Feed { scope, sink: self.sink.clone(), health: self.health.clone() };
        let follow = watch::follow::<T, _>(self.client.clone(), query, feed);
        tokio::spawn(async move {
            let ServiceEnded = follow.await;
        })
    }

    /// Handles a report about a watch.
    fn on_health(&mut self, scope: &Scope, report: Health) {
        // The watch may have ended since.
        let Some(running) = self.running.get_mut(scope) else { return };
        match report {
            Health::Complete => running.is_complete = true,
            Health::Connected => running.error = None,
            Health::Failed(error) => running.error = Some(error),
        }
    }

    /// Ends the watches that nothing has needed for [`UNUSED_TIMEOUT`].
    async fn sweep(&mut self, now: Instant) -> Result<(), ServiceEnded> {
        let is_old = |since: Instant| now.duration_since(since) >= UNUSED_TIMEOUT;
        let unused = self.running.iter().filter(|(_, one)| one.unused_since.is_some_and(is_old));
        for scope in unused.map(|(scope, _)| scope.clone()).collect::<Vec<_>>() {
            if let Some(running) = self.running.remove(&scope) {
                running.task.abort();
                // No event of the watch may follow the end of its scope.
                let _ = running.task.await;
                tracing::debug!(%scope, "watch without a need ends");
                self.sink.send(PolicyEvent::ScopeEnded(scope)).await?;
            }
        }
        Ok(())
    }

    /// Sends the state of the source if it has changed.
    async fn publish(&mut self) -> Result<(), ServiceEnded> {
        let reason = self.running.iter().find_map(|(scope, running)| {
            let reason = match (&running.error, running.is_complete) {
                (Some(error), _) => error,
                (None, false) => "no complete list yet",
                (None, true) => return None,
            };
            Some(format!("{scope}: {reason}"))
        });
        let is_listed =
            |scope: &Scope| self.running.get(scope).is_some_and(|running| running.is_complete);
        if !self.is_complete && BASE.iter().all(is_listed) {
            self.is_complete = true;
            self.sink.send(PolicyEvent::Complete).await?;
        }
        if self.unavailable.as_ref() != Some(&reason) {
            self.unavailable = Some(reason.clone());
            self.sink.send(PolicyEvent::Unavailable(reason)).await?;
        }
        Ok(())
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.running.values().for_each(|running| running.task.abort());
    }
}

/// Returns the request of a scope.
fn query(scope: &Scope, node: &str) -> Query {
    let pods = || Query { path: "/api/v1/pods".to_owned(), ..Query::default() };
    match scope {
        Scope::NetworkPolicies => Query {
            path: "/apis/networking.k8s.io/v1/networkpolicies".to_owned(),
            ..Query::default()
        },
        Scope::ClusterNetworkPolicies => Query {
            path: "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies".to_owned(),
            optional: true,
            ..Query::default()
        },
        Scope::Namespaces => {
            Query { path: "/api/v1/namespaces".to_owned(), metadata_only: true, ..Query::default() }
        }
        Scope::Nodes => Query { path: "/api/v1/nodes".to_owned(), ..Query::default() },
        Scope::Pods(PodScope::Local) => {
            Query { fields: Some(format!("spec.nodeName={node}")), ..pods() }
        }
        Scope::Pods(PodScope::Namespace(name)) => {
            Query { path: format!("/api/v1/namespaces/{name}/pods"), ..Query::default() }
        }
        Scope::Pods(PodScope::Labelled(selector)) => {
            Query { labels: Some(selector.clone()), ..pods() }
        }
        Scope::Pods(PodScope::All) => Query { paged: true, ..pods() },
    }
}

/// An object of a watched kind.
trait Watched: DeserializeOwned + Send + 'static {
    /// Returns the object as a part of the scope.
    fn object(self, scope: &Scope) -> PolicyObject;

    /// Returns the name of an object of the scope.
    fn id(metadata: ObjectMeta, scope: &Scope) -> ObjectId;
}

/// Returns the scope of pods.
fn pod_scope(scope: &Scope) -> PodScope {
    match scope {
        Scope::Pods(pods) => pods.clone(),
        _ => PodScope::All,
    }
}

impl Watched for NetworkPolicy {
    fn object(self, _: &Scope) -> PolicyObject {
        PolicyObject::NetworkPolicy(Box::new(self))
    }

    fn id(metadata: ObjectMeta, _: &Scope) -> ObjectId {
        let ObjectMeta { namespace, name, .. } = metadata;
        ObjectId::Policy(PolicyId::NetworkPolicy { namespace, name })
    }
}

impl Watched for ClusterNetworkPolicy {
    fn object(self, _: &Scope) -> PolicyObject {
        PolicyObject::ClusterNetworkPolicy(Box::new(self))
    }

    fn id(metadata: ObjectMeta, _: &Scope) -> ObjectId {
        ObjectId::Policy(PolicyId::ClusterNetworkPolicy { name: metadata.name })
    }
}

impl Watched for Namespace {
    fn object(self, _: &Scope) -> PolicyObject {
        PolicyObject::Namespace(Box::new(self))
    }

    fn id(metadata: ObjectMeta, _: &Scope) -> ObjectId {
        ObjectId::Namespace(metadata.name)
    }
}

impl Watched for Node {
    fn object(self, _: &Scope) -> PolicyObject {
        PolicyObject::Node(Box::new(self))
    }

    fn id(metadata: ObjectMeta, _: &Scope) -> ObjectId {
        ObjectId::Node(metadata.name)
    }
}

impl Watched for Pod {
    fn object(self, scope: &Scope) -> PolicyObject {
        PolicyObject::Pod(pod_scope(scope), Box::new(self))
    }

    fn id(metadata: ObjectMeta, scope: &Scope) -> ObjectId {
        let ObjectMeta { namespace, name, .. } = metadata;
        ObjectId::Pod(pod_scope(scope), PodId { namespace, name })
    }
}

/// Sends the reports of a scope's watch to the policy service.
struct Feed {
    scope: Scope,
    sink: PolicySink,
    health: mpsc::UnboundedSender<(Scope, Health)>,
}

impl<T: Watched> Receiver<T> for Feed {
    type Error = ServiceEnded;

    async fn receive(&mut self, report: Report<T>) -> Result<(), ServiceEnded> {
        let scope = &self.scope;
        let health = |health| drop(self.health.send((scope.clone(), health)));
        let event = match report {
            Report::ListStarted => PolicyEvent::ListStarted(scope.clone()),
            Report::Upsert(object) => PolicyEvent::Upsert(object.object(scope)),
            Report::Remove(metadata) => PolicyEvent::Remove(T::id(metadata, scope)),
            Report::Unreadable(metadata, error) => {
                let part = format!("{scope}: {}/{}", metadata.namespace, metadata.name);
                self.sink.send(PolicyEvent::Retain(T::id(metadata, scope))).await?;
                PolicyEvent::Unreadable(part, Some(error))
            }
            Report::ListComplete => {
                // The service must receive the end of the list before the state of the source,
                // which `health` may change.
                self.sink.send(PolicyEvent::ListComplete(scope.clone())).await?;
                health(Health::Complete);
                return Ok(());
            }
            Report::Connected => {
                health(Health::Connected);
                return Ok(());
            }
            Report::Failed(error) => {
                health(Health::Failed(error));
                return Ok(());
            }
        };
        self.sink.send(event).await
    }
}
