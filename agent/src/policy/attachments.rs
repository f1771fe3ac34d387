//! Pods of this node: interfaces, and the objects that the interfaces belong to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use skein_cni_protocol::Pod as PodName;
use skein_policy::api::Labels;
use skein_policy::model::{PodId, PodInfo};

use super::objects::{ChangedPods, Objects};

/// Namespace of a pod that the runtime does not name, in static mode.
const DEFAULT_NAMESPACE: &str = "default";

/// Interface of a pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Name of the node's end of the pod's link.
    pub interface: String,
    /// Pod that the runtime named; `None` if it named none.
    pub pod: Option<PodName>,
    /// Addresses of the pod.
    pub addresses: Vec<IpAddr>,
}

/// Relation of an interface to the objects of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Identity {
    /// The interface belongs to this pod, whose object is known.
    Known(PodId),
    /// The interface belongs to this pod, which has no object and no labels (static mode).
    Unlabelled(PodId),
    /// The pod is not known, but no policy can apply to it.
    WithoutPolicies,
    /// The pod is not known: it is in quarantine.
    Unknown,
}

/// Interfaces of this node's pods.
#[derive(Debug, Default)]
pub(super) struct Attachments {
    /// True in static mode: a pod without an object has no labels.
    is_static: bool,
    attachments: BTreeMap<String, (Attachment, Identity)>,
    /// Interfaces of pods that were attached before policies were enforced for the first time on
    /// this node. Their traffic passes until the policies are known.
    pub(super) earlier: BTreeSet<String>,
}

impl Attachments {
    /// Returns a value without interfaces.
    pub(super) fn new(is_static: bool) -> Self {
        Self { is_static, ..Self::default() }
    }

    /// Adds or replaces the interface of a pod.
    pub(super) fn insert(&mut self, attachment: Attachment, objects: &mut Objects) {
        let interface = attachment.interface.clone();
        let known = self.attachments.get(&interface);
        if known.is_some_and(|(known, _)| *known == attachment) {
            return;
        }
        self.remove(&interface, objects);
        self.attachments.insert(interface.clone(), (attachment, Identity::Unknown));
        self.identify(&interface, objects);
    }

    /// Removes an interface.
    pub(super) fn remove(&mut self, interface: &str, objects: &mut Objects) {
        let Some((_, identity)) = self.attachments.remove(interface) else { return };
        self.earlier.remove(interface);
        objects.engine.detach(interface);
        self.forget(&identity, objects);
    }

    /// Returns the names of all interfaces.
    pub(super) fn interfaces(&self) -> impl Iterator<Item = &String> {
        self.attachments.keys()
    }

    /// Returns the pods in quarantine.
    pub(super) fn unknown(&self) -> impl Iterator<Item = &Attachment> {
        let unknown = |identity: &Identity| matches!(identity, Identity::Unknown);
        let all = self.attachments.values();
        all.filter(move |(_, identity)| unknown(identity)).map(|(attachment, _)| attachment)
    }

    /// Returns the attachments with their identities.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Attachment, &Identity)> {
        self.attachments.values().map(|(attachment, identity)| (attachment, identity))
    }

    /// Returns whether the pod of an interface is in quarantine because its object is not known.
    pub(super) fn is_unknown(&self, interface: &str) -> bool {
        self.attachments.get(interface).is_some_and(|(_, id)| *id == Identity::Unknown)
    }

    /// Identifies the pods again that a change concerns.
    pub(super) fn update(&mut self, changed: &ChangedPods, objects: &mut Objects) {
        if changed.pods.is_empty() && !changed.policies {
            return;
        }
        let is_concerned = |identity: &Identity| match identity {
            // In static mode, a changed namespace object may be gone.
            Identity::Known(id) => {
                changed.pods.contains(id) || (self.is_static && changed.policies)
            }
            Identity::Unlabelled(_) | Identity::WithoutPolicies | Identity::Unknown => true,
        };
        let concerned: Vec<_> = self
            .attachments
            .iter()
            .filter(|(_, (_, identity))| is_concerned(identity))
            .map(|(interface, _)| interface.clone())
            .collect();
        concerned.iter().for_each(|interface| self.identify(interface, objects));
    }

    fn identify(&mut self, interface: &str, objects: &mut Objects) {
        let Some((attachment, old)) = self.attachments.get(interface).cloned() else { return };
        let new = self.identity(&attachment, objects);
        if new != old {
            self.forget(&old, objects);
        }
        if let Identity::Known(id) | Identity::Unlabelled(id) = &new
            && self.is_static
            && objects.engine.inventory().namespace(&id.namespace).is_none()
        {
            objects.engine.set_namespace(&id.namespace, &Labels::new());
        }
        match &new {
            Identity::Known(id) => {
                add_addresses(id, &attachment.addresses, objects);
                objects.engine.attach(interface, id.clone());
            }
            Identity::Unlabelled(id) => {
                let info = PodInfo {
                    labels: Arc::default(),
                    ports: Arc::default(),
                    addresses: attachment.addresses.clone(),
                    started: None,
                };
                objects.engine.set_pod(id, Some(info));
                objects.engine.attach(interface, id.clone());
            }
            Identity::WithoutPolicies => objects.engine.accept(interface),
            // No object has an empty namespace, so that this name stays unknown.
            Identity::Unknown => {
                let id = PodId { namespace: String::new(), name: interface.to_owned() };
                objects.engine.attach(interface, id);
            }
        }
        if let Some((_, identity)) = self.attachments.get_mut(interface) {
            *identity = new;
        }
    }

    fn identity(&self, attachment: &Attachment, objects: &Objects) -> Identity {
        let id = match &attachment.pod {
            Some(pod) => PodId { namespace: pod.namespace.clone(), name: pod.name.clone() },
            None if self.is_static => PodId {
                namespace: DEFAULT_NAMESPACE.to_owned(),
                name: attachment.interface.clone(),
            },
            None => return self.identity_by_address(attachment, objects),
        };
        let uid = attachment.pod.as_ref().and_then(|pod| pod.uid.as_deref()).unwrap_or_default();
        match objects.local.get(&id) {
            Some(pod) if pod.uid.is_empty() || uid.is_empty() || pod.uid == uid => {
                return Identity::Known(id);
            }
            // The object is that of an earlier or later pod of the same name.
            Some(_) => return Identity::Unknown,
            None => {}
        }
        if self.is_static && objects.are_policies_known() {
            return Identity::Unlabelled(id);
        }
        let is_namespace_known = objects.engine.inventory().namespace(&id.namespace).is_some();
        if objects.are_policies_known()
            && is_namespace_known
            && objects.is_without_policies(&id.namespace)
        {
            return Identity::WithoutPolicies;
        }
        self.unidentified(attachment, objects)
    }

    /// Identifies the pod of an interface that was adopted from the kernel.
    fn identity_by_address(&self, attachment: &Attachment, objects: &Objects) -> Identity {
        let inventory = objects.engine.inventory();
        let mut owners = attachment.addresses.iter().filter_map(|ip| inventory.owner(*ip));
        match owners.next() {
            Some((id, _)) if objects.local.contains_key(id) => Identity::Known(id.clone()),
            _ => self.unidentified(attachment, objects),
        }
    }

    fn unidentified(&self, attachment: &Attachment, objects: &Objects) -> Identity {
        match self.earlier.contains(&attachment.interface) && !objects.are_policies_known() {
            true => Identity::WithoutPolicies,
            false => Identity::Unknown,
        }
    }

    /// Removes the pod, or the addresses, that an identity has added to the engine.
    fn forget(&self, identity: &Identity, objects: &mut Objects) {
        if let Identity::Known(id) | Identity::Unlabelled(id) = identity {
            let info = objects.local.get(id).and_then(|pod| pod.info.clone());
            objects.engine.set_pod(id, info);
        }
    }
}

/// Gives a pod the addresses of its attachment, until its object has addresses.
fn add_addresses(id: &PodId, addresses: &[IpAddr], objects: &mut Objects) {
    let Some(info) = objects.local.get(id).and_then(|pod| pod.info.clone()) else { return };
    if info.addresses.is_empty() {
        let info = PodInfo { addresses: addresses.to_vec(), ..info };
        objects.engine.set_pod(id, Some(info));
    }
}
