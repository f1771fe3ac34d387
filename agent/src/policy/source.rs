//! Input of the policy service: objects of the cluster as events of a source.
//!
//! A source is a set of lists and watches (Kubernetes) or a directory of files (static mode). Each
//! list has a [`Scope`]. A source sends, for each scope:
//!
//! 1. [`PolicyEvent::ListStarted`], all objects as [`PolicyEvent::Upsert`], and
//!    [`PolicyEvent::ListComplete`], which removes the objects of the scope that the list does not
//!    contain. A list that breaks off removes nothing; the source starts it again.
//! 2. [`PolicyEvent::Upsert`] and [`PolicyEvent::Remove`] for each change after the list.
//! 3. [`PolicyEvent::ScopeEnded`] if it stops to watch the scope.
//!
//! After the first lists of all scopes that it needs, the source sends [`PolicyEvent::Complete`],
//! which removes stored objects of scopes that the source has not listed.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use skein_policy::api::{ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod};
use skein_policy::engine;
use skein_policy::model::{PodId, PolicyId};
use tokio::sync::{mpsc, watch};

/// An event of a source.
#[derive(Debug, Clone)]
pub enum PolicyEvent {
    /// An object is new or has changed.
    Upsert(PolicyObject),
    /// An object does not exist any more.
    Remove(ObjectId),
    /// An object of a list exists, but its present version cannot be read: its last readable
    /// version stays.
    Retain(ObjectId),
    /// The list of a scope begins.
    ListStarted(Scope),
    /// The list of a scope is complete: objects of the scope that are not in the list do not exist.
    ListComplete(Scope),
    /// The source does not watch the scope any more.
    ScopeEnded(Scope),
    /// The first lists of all needed scopes are complete.
    Complete,
    /// State of the source: `None` if the source is connected, otherwise the reason why its objects
    /// may be outdated.
    Unavailable(Option<String>),
    /// A part of the source that cannot be read, by its name (a file, or kind and name of an
    /// object), with the error; `None` if the part is readable again. The last readable content of
    /// the part stays effective.
    Unreadable(String, Option<String>),
}

/// An object of the cluster.
#[derive(Debug, Clone)]
pub enum PolicyObject {
    /// A NetworkPolicy.
    NetworkPolicy(Box<NetworkPolicy>),
    /// A ClusterNetworkPolicy.
    ClusterNetworkPolicy(Box<ClusterNetworkPolicy>),
    /// A namespace.
    Namespace(Box<Namespace>),
    /// A node.
    Node(Box<Node>),
    /// A pod, with the scope of the list or watch that contains it. A pod can be in several scopes.
    Pod(PodScope, Box<Pod>),
}

/// Name of an object of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectId {
    /// A policy of either kind.
    Policy(PolicyId),
    /// Name of a namespace.
    Namespace(String),
    /// Name of a node.
    Node(String),
    /// A pod, in one of its scopes. A pod is removed with its last scope.
    Pod(PodScope, PodId),
}

/// A list of objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// All NetworkPolicies.
    NetworkPolicies,
    /// All ClusterNetworkPolicies.
    ClusterNetworkPolicies,
    /// All namespaces.
    Namespaces,
    /// All nodes.
    Nodes,
    /// Pods.
    Pods(PodScope),
}

/// A list of pods.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PodScope {
    /// Pods of this node.
    Local,
    /// Pods of a namespace.
    Namespace(String),
    /// Pods of all namespaces with matching labels, as the text of a request's `labelSelector`.
    Labelled(String),
    /// All pods of the cluster.
    All,
}

impl PodScope {
    /// Returns the scope in the form of the engine; `None` for the pods of this node.
    pub(super) fn peers(&self) -> Option<engine::PodScope> {
        match self {
            Self::Local => None,
            Self::Namespace(name) => Some(engine::PodScope::Namespace(name.clone())),
            Self::Labelled(selector) => Some(engine::PodScope::Labelled(selector.clone())),
            Self::All => Some(engine::PodScope::All),
        }
    }
}

impl From<engine::PodScope> for PodScope {
    fn from(scope: engine::PodScope) -> Self {
        match scope {
            engine::PodScope::Namespace(name) => Self::Namespace(name),
            engine::PodScope::Labelled(selector) => Self::Labelled(selector),
            engine::PodScope::All => Self::All,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NetworkPolicies => f.write_str("NetworkPolicies"),
            Self::ClusterNetworkPolicies => f.write_str("ClusterNetworkPolicies"),
            Self::Namespaces => f.write_str("Namespaces"),
            Self::Nodes => f.write_str("Nodes"),
            Self::Pods(PodScope::Local) => f.write_str("pods of this node"),
            Self::Pods(PodScope::Namespace(name)) => write!(f, "pods of namespace {name}"),
            Self::Pods(PodScope::Labelled(selector)) => write!(f, "pods with {selector}"),
            Self::Pods(PodScope::All) => f.write_str("all pods"),
        }
    }
}

/// Objects beyond policies, namespaces and the pods of this node that the present policies of local
/// pods refer to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Scopes that contain all pods that policies select as peers.
    pub pods: BTreeSet<PodScope>,
    /// True if a policy selects nodes.
    pub nodes: bool,
    /// Pods of this node in quarantine, because the source has not sent them. A source can request
    /// them one by one.
    pub unknown_pods: BTreeSet<PodId>,
}

/// Sender of the events of a source, and receiver of its needs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PolicySink {
    pub(super) events: mpsc::Sender<PolicyEvent>,
    pub(super) needs: watch::Receiver<Needs>,
}

impl PolicySink {
    /// Sends an event. Waits while the service has a backlog of events.
    ///
    /// # Errors
    /// [`ServiceEnded`] if the policy service has ended, which ends the source too.
    pub async fn send(&self, event: PolicyEvent) -> Result<(), ServiceEnded> {
        self.events.send(event).await.map_err(|_| ServiceEnded)
    }

    /// Returns the receiver of the objects that policies refer to. The value changes with the
    /// policies, the namespaces and the pods of this node.
    pub fn needs(&self) -> watch::Receiver<Needs> {
        self.needs.clone()
    }
}

/// Error of a request to a policy service that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the policy service has ended")]
pub struct ServiceEnded;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a sink without a service, the events that it receives, and the sender of the needs.
    pub(crate) fn sink() -> (PolicySink, mpsc::Receiver<PolicyEvent>, watch::Sender<Needs>) {
        let (sender, events) = mpsc::channel(16);
        let (needs_sender, needs) = watch::channel(Needs::default());
        (PolicySink { events: sender, needs }, events, needs_sender)
    }
}
