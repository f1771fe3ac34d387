//! Objects of the cluster by the lists that contain them, and the engine that they feed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::{Deserialize, Serialize};
use skein_policy::api::{Defect, Pod};
use skein_policy::compile::Families;
use skein_policy::engine::Engine;
use skein_policy::model::{PodId, PodInfo, PolicyId};

use super::source::{ObjectId, PodScope, PolicyEvent, PolicyObject, Scope};

/// A pod that can be a pod of this node, from the scope [`PodScope::Local`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LocalPod {
    /// Identity of the object; empty if it has none.
    pub(super) uid: String,
    /// Properties of the pod; `None` for a pod on the host's network and for a pod that has ended.
    pub(super) info: Option<PodInfo>,
}

/// Applies the events of a source to the engine.
///
/// The scope [`PodScope::Local`] takes precedence for the pods that it contains, because watches
/// have no common order.
#[derive(Debug)]
pub(super) struct Objects {
    pub(super) engine: Engine,
    /// Pods by scope. A pod of the engine that is in no other scope is in `All`, whose set is empty
    /// to save memory.
    pub(super) scopes: BTreeMap<PodScope, BTreeSet<PodId>>,
    /// Pods of the scope `Local`.
    pub(super) local: BTreeMap<PodId, LocalPod>,
    /// Pods of other scopes that are also in the scope `Local`.
    others: HashMap<PodId, PodInfo>,
    /// Lists that are not complete, with the objects received since their start.
    lists: HashMap<Scope, HashSet<ObjectId>>,
    /// Scopes that the source has listed.
    listed: HashSet<Scope>,
    /// Scopes of pods other than `Local` that an earlier agent has stored, and that the source has
    /// not listed. They end when nothing needs them.
    pub(super) stored: BTreeSet<PodScope>,
    /// True if rules that deny or pass wait for the scopes of their peers.
    awaits_scopes: bool,
    /// True after the source's first [`PolicyEvent::Complete`].
    pub(super) complete: bool,
    /// True if the objects of an earlier agent were restored.
    pub(super) restored: bool,
    /// Parts of policies that cannot be enforced, by policy.
    pub(super) defects: BTreeMap<PolicyId, Vec<Defect>>,
    /// Parts of the source that cannot be read, with their errors.
    pub(super) unreadable: BTreeMap<String, String>,
    /// Reason why the source's objects may be outdated.
    pub(super) unavailable: Option<String>,
    /// Pods of the scope `Local` that have changed since the last [`Objects::take_changed`].
    changed: BTreeSet<PodId>,
    /// True if a policy or a namespace has changed since the last [`Objects::take_changed`].
    policies_changed: bool,
}

/// Changes that concern pods of this node.
#[derive(Debug, Default)]
pub(super) struct ChangedPods {
    /// Pods of the scope `Local` that are new, changed or gone.
    pub(super) pods: BTreeSet<PodId>,
    /// True if a policy or a namespace is new, changed or gone.
    pub(super) policies: bool,
}

impl Objects {
    /// Returns the objects of a cluster without objects.
    pub(super) fn new(families: Families) -> Self {
        Self {
            engine: Engine::new(families),
            scopes: BTreeMap::new(),
            local: BTreeMap::new(),
            others: HashMap::new(),
            lists: HashMap::new(),
            listed: HashSet::new(),
            stored: BTreeSet::new(),
            awaits_scopes: false,
            complete: false,
            restored: false,
            defects: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            unavailable: None,
            changed: BTreeSet::new(),
            policies_changed: false,
        }
    }

    /// Applies an event to the engine.
    pub(super) fn apply(&mut self, event: PolicyEvent) {
        match event {
            PolicyEvent::Upsert(object) => self.upsert(object),
            PolicyEvent::Remove(id) => self.remove(id),
            PolicyEvent::Retain(id) => {
                if let Some(seen) = self.lists.get_mut(&scope_of(&id)) {
                    seen.insert(id);
                }
            }
            PolicyEvent::ListStarted(scope) => {
                self.lists.insert(scope, HashSet::new());
            }
            PolicyEvent::ListComplete(scope) => self.complete_list(scope),
            PolicyEvent::ScopeEnded(scope) => self.end_scope(&scope),
            PolicyEvent::Complete => self.complete_source(),
            PolicyEvent::Unavailable(reason) => {
                if let Some(reason) =
                    reason.as_ref().filter(|new| self.unavailable.as_ref() != Some(*new))
                {
                    tracing::warn!(reason, "network policies may be outdated");
                }
                self.unavailable = reason;
            }
            PolicyEvent::Unreadable(part, Some(error)) => {
                if self.unreadable.get(&part) != Some(&error) {
                    tracing::error!("network policies: {part}: {error}");
                }
                self.unreadable.insert(part, error);
            }
            PolicyEvent::Unreadable(part, None) => {
                if self.unreadable.remove(&part).is_some() {
                    tracing::info!("network policies: {part}: readable again");
                }
            }
        }
    }

    /// Returns the changes since the last call.
    pub(super) fn take_changed(&mut self) -> ChangedPods {
        let pods = std::mem::take(&mut self.changed);
        ChangedPods { pods, policies: std::mem::take(&mut self.policies_changed) }
    }

    /// Returns whether the policies are those of a complete list or of the stored state.
    pub(super) fn are_policies_known(&self) -> bool {
        self.complete || self.restored
    }

    /// Returns whether no policy can apply to a pod of a namespace: the namespace has no
    /// NetworkPolicy, and the cluster has no ClusterNetworkPolicy.
    pub(super) fn is_without_policies(&self, namespace: &str) -> bool {
        !self.engine.inventory().policies().any(|policy| match &policy.id {
            PolicyId::NetworkPolicy { namespace: of, .. } => of == namespace,
            PolicyId::ClusterNetworkPolicy { .. } => true,
        })
    }

    fn upsert(&mut self, object: PolicyObject) {
        let (scope, id) = match &object {
            PolicyObject::NetworkPolicy(policy) => {
                let metadata = &policy.metadata;
                let (namespace, name) = (metadata.namespace.clone(), metadata.name.clone());
                let id = PolicyId::NetworkPolicy { namespace, name };
                (Scope::NetworkPolicies, ObjectId::Policy(id))
            }
            PolicyObject::ClusterNetworkPolicy(policy) => {
                let id = PolicyId::ClusterNetworkPolicy { name: policy.metadata.name.clone() };
                (Scope::ClusterNetworkPolicies, ObjectId::Policy(id))
            }
            PolicyObject::Namespace(namespace) => {
                let name = namespace.metadata.name.clone();
                (Scope::Namespaces, ObjectId::Namespace(name))
            }
            PolicyObject::Node(node) => (Scope::Nodes, ObjectId::Node(node.metadata.name.clone())),
            PolicyObject::Pod(scope, pod) => {
                let id = ObjectId::Pod(scope.clone(), PodId::of(pod));
                (Scope::Pods(scope.clone()), id)
            }
        };
        if let Some(seen) = self.lists.get_mut(&scope) {
            seen.insert(id.clone());
        }
        match (object, id) {
            (PolicyObject::NetworkPolicy(policy), ObjectId::Policy(id)) => {
                let defects = self.engine.upsert_network_policy(&policy);
                self.set_defects(id, defects);
            }
            (PolicyObject::ClusterNetworkPolicy(policy), ObjectId::Policy(id)) => {
                let defects = self.engine.upsert_cluster_policy(&policy);
                self.set_defects(id, defects);
            }
            (PolicyObject::Namespace(namespace), _) => {
                self.policies_changed = true;
                self.engine.upsert_namespace(&namespace);
            }
            (PolicyObject::Node(node), _) => self.engine.upsert_node(&node),
            (PolicyObject::Pod(scope, pod), _) => self.upsert_pod(scope, &pod),
            // An identifier of another kind cannot belong to the policy.
            (PolicyObject::NetworkPolicy(_) | PolicyObject::ClusterNetworkPolicy(_), _) => {}
        }
    }

    fn upsert_pod(&mut self, scope: PodScope, pod: &Pod) {
        let (id, info) = (PodId::of(pod), PodInfo::of(pod));
        if scope == PodScope::Local {
            if !self.local.contains_key(&id)
                && let Some(other) = self.engine.inventory().pod(&id)
            {
                self.others.insert(id.clone(), other.clone());
            }
            let uid = pod.metadata.uid.clone();
            self.engine.set_pod(&id, info.clone());
            self.local.insert(id.clone(), LocalPod { uid, info });
            self.changed.insert(id);
            return;
        }
        let is_all = scope == PodScope::All;
        let members = self.scopes.entry(scope).or_default();
        if !is_all {
            members.insert(id.clone());
        }
        match (self.local.contains_key(&id), info) {
            (false, info) => self.engine.set_pod(&id, info),
            (true, Some(info)) => drop(self.others.insert(id, info)),
            (true, None) => drop(self.others.remove(&id)),
        }
    }

    fn remove(&mut self, id: ObjectId) {
        match id {
            ObjectId::Policy(id) => {
                self.engine.remove_policy(&id);
                self.set_defects(id, Vec::new());
            }
            ObjectId::Namespace(name) => {
                self.policies_changed = true;
                self.engine.remove_namespace(&name);
            }
            ObjectId::Node(name) => self.engine.remove_node(&name),
            ObjectId::Pod(PodScope::Local, id) => {
                if self.local.remove(&id).is_some() {
                    let other = self.others.remove(&id);
                    self.engine.set_pod(&id, other);
                    self.changed.insert(id);
                }
            }
            ObjectId::Pod(scope, id) => {
                if let Some(members) = self.scopes.get_mut(&scope) {
                    members.remove(&id);
                }
                // An object leaves a scope of labels when its labels change.
                let is_member = |(of, members): (&PodScope, &BTreeSet<PodId>)| {
                    *of != scope && (*of == PodScope::All || members.contains(&id))
                };
                if self.scopes.iter().any(is_member) {
                    return;
                }
                match self.local.contains_key(&id) {
                    true => drop(self.others.remove(&id)),
                    false => self.engine.set_pod(&id, None),
                }
            }
        }
    }

    fn set_defects(&mut self, id: PolicyId, defects: Vec<Defect>) {
        self.policies_changed = true;
        let known = self.defects.get(&id).map_or(&[][..], Vec::as_slice);
        for defect in defects.iter().filter(|new| !known.contains(new)) {
            tracing::warn!("part of a network policy cannot be enforced: {defect}");
        }
        match defects.is_empty() {
            true => self.defects.remove(&id),
            false => self.defects.insert(id, defects),
        };
    }

    fn complete_list(&mut self, scope: Scope) {
        // A list that has not started says nothing about absent objects.
        let Some(seen) = self.lists.remove(&scope) else { return };
        for id in self.objects_of(&scope) {
            if !seen.contains(&id) {
                self.remove(id);
            }
        }
        match &scope {
            Scope::Pods(PodScope::All) => {
                // The list contains the pods of all stored scopes.
                for stored in std::mem::take(&mut self.stored) {
                    self.end_scope(&Scope::Pods(stored));
                }
            }
            Scope::Pods(pods) => drop(self.stored.remove(pods)),
            _ => {}
        }
        self.listed.insert(scope);
        self.report_scopes();
    }

    /// Makes new pods wait for the scopes of peers that rules deny or pass.
    pub(super) fn await_scopes(&mut self) {
        self.awaits_scopes = true;
        self.report_scopes();
    }

    /// Reports the scopes with known pods to the engine.
    fn report_scopes(&mut self) {
        if !self.awaits_scopes {
            return;
        }
        let listed = self.listed.iter().filter_map(|scope| match scope {
            Scope::Pods(pods) => pods.peers(),
            _ => None,
        });
        let known = listed.chain(self.stored.iter().filter_map(PodScope::peers)).collect();
        self.engine.set_complete(Some(known));
    }

    /// Ends the stored scopes that nothing needs. Call it when the pods of this node are known and
    /// the source is complete.
    pub(super) fn end_stored(&mut self, needed: &BTreeSet<PodScope>) {
        let unneeded: Vec<_> = self.stored.difference(needed).cloned().collect();
        for scope in unneeded {
            self.stored.remove(&scope);
            self.end_scope(&Scope::Pods(scope));
        }
    }

    fn end_scope(&mut self, scope: &Scope) {
        self.lists.remove(scope);
        self.listed.remove(scope);
        let objects = self.objects_of(scope);
        if let Scope::Pods(pods) = scope {
            self.scopes.remove(pods);
        }
        objects.into_iter().for_each(|id| self.remove(id));
        self.report_scopes();
    }

    fn complete_source(&mut self) {
        let all = [
            Scope::NetworkPolicies,
            Scope::ClusterNetworkPolicies,
            Scope::Namespaces,
            Scope::Nodes,
            Scope::Pods(PodScope::Local),
        ];
        let stale: Vec<_> = all.into_iter().filter(|scope| !self.listed.contains(scope)).collect();
        stale.iter().for_each(|scope| self.end_scope(scope));
        self.complete = true;
        self.policies_changed = true;
    }

    /// Returns the names of the known objects of a scope.
    fn objects_of(&self, scope: &Scope) -> Vec<ObjectId> {
        let inventory = self.engine.inventory();
        let policies = |network: bool| {
            let ids = inventory.policies().map(|policy| policy.id.clone());
            let of_kind =
                move |id: &PolicyId| matches!(id, PolicyId::NetworkPolicy { .. }) == network;
            ids.filter(of_kind).map(ObjectId::Policy).collect()
        };
        match scope {
            Scope::NetworkPolicies => policies(true),
            Scope::ClusterNetworkPolicies => policies(false),
            Scope::Namespaces => {
                let names = inventory.namespaces().map(|(name, _)| name.to_owned());
                names.map(ObjectId::Namespace).collect()
            }
            Scope::Nodes => inventory.nodes().keys().cloned().map(ObjectId::Node).collect(),
            Scope::Pods(PodScope::Local) => {
                let ids = self.local.keys().cloned();
                ids.map(|id| ObjectId::Pod(PodScope::Local, id)).collect()
            }
            Scope::Pods(PodScope::All) => {
                let is_all =
                    |id: &&PodId| !self.scopes.values().any(|members| members.contains(*id));
                let others = self.others.keys();
                let plain = inventory.pods().map(|(id, _)| id);
                let plain = plain.filter(|id| !self.local.contains_key(*id));
                let ids = plain.chain(others).filter(is_all).cloned();
                ids.map(|id| ObjectId::Pod(PodScope::All, id)).collect()
            }
            Scope::Pods(pods) => {
                let ids = self.scopes.get(pods).into_iter().flatten().cloned();
                ids.map(|id| ObjectId::Pod(pods.clone(), id)).collect()
            }
        }
    }
}

/// Returns the scope of an object.
fn scope_of(id: &ObjectId) -> Scope {
    match id {
        ObjectId::Policy(PolicyId::NetworkPolicy { .. }) => Scope::NetworkPolicies,
        ObjectId::Policy(PolicyId::ClusterNetworkPolicy { .. }) => Scope::ClusterNetworkPolicies,
        ObjectId::Namespace(_) => Scope::Namespaces,
        ObjectId::Node(_) => Scope::Nodes,
        ObjectId::Pod(scope, _) => Scope::Pods(scope.clone()),
    }
}
