//! Writer of the spec of this node's SkeinNode.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;

use super::request::{MANAGER, REQUEST_TIMEOUT, send, skeinnode};
use crate::control::kubernetes::client::WATCH_RENEWAL_SECONDS;
use crate::control::kubernetes::own;
use crate::control::kubernetes::resource::{SkeinNode, SkeinNodeSpec};

/// Maximum time until the watch reports a write. A watch may report nothing until its renewal.
const MAX_WATCH_SILENCE: Duration = Duration::from_secs(2 * WATCH_RENEWAL_SECONDS as u64);

/// Record that was written last, and which the watch reports with a delay.
struct Applied {
    spec: SkeinNodeSpec,
    owner: OwnerReference,
    /// Resource version that the watch had reported before the write.
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
        let wait =
            if self.before.as_ref() == version { MAX_WATCH_SILENCE } else { REQUEST_TIMEOUT };
        let is_deleted = self.uid.is_some() && self.uid.as_deref() == deleted;
        self.spec == *spec && self.owner == *owner && !is_deleted && self.at.elapsed() < wait
    }
}

/// Writer of the spec of this node's SkeinNode.
pub(super) struct RecordWriter {
    skeinnodes: Api<SkeinNode>,
    /// Name of the node.
    name: String,
    applied: Option<Applied>,
    /// True if the API server has dropped the overlay addresses of the last write, because the
    /// cluster's definition of SkeinNodes is older than the field.
    lacks_addresses: bool,
}

impl RecordWriter {
    /// Returns a writer for the node `name`, which has written nothing yet.
    pub(super) fn new(skeinnodes: Api<SkeinNode>, name: String) -> Self {
        Self { skeinnodes, name, applied: None, lacks_addresses: false }
    }

    /// Writes the SkeinNode if it differs from `own`, or if the Node does not own it.
    ///
    /// # Errors
    /// An error if the API server refuses or does not answer.
    pub(super) async fn apply(
        &mut self,
        node: &Node,
        own: &SkeinNodeSpec,
        published: Option<&SkeinNode>,
        deleted: Option<&str>,
    ) -> anyhow::Result<()> {
        let Some(owner) = own::owner(node) else { return Ok(()) };
        // The SkeinNode may have further owners.
        let owned = |found: &SkeinNode| {
            let mut owners = found.metadata.owner_references.iter().flatten();
            owners.any(|found| found.uid == owner.uid)
        };
        if published.is_some_and(|found| self.has_spec(found, own) && owned(found)) {
            // The watch has reported the write, so that a later difference is a new change.
            self.applied = None;
            return Ok(());
        }
        let waits = |applied: &Applied| applied.is_awaited(own, &owner, published, deleted);
        if self.applied.as_ref().is_some_and(waits) {
            return Ok(());
        }
        let before = published.and_then(|found| found.metadata.resource_version.clone());
        let name = &self.name;
        let metadata = json!({ "name": name, "ownerReferences": [&owner] });
        let object = skeinnode(metadata, "spec", json!(own));
        let parameters = PatchParams::apply(MANAGER).force();
        let patch = Patch::Apply(&object);
        let written = self.skeinnodes.patch(name, &parameters, &patch);
        let written = send(written).await.context("SkeinNode")?;
        self.lacks_addresses =
            own.overlay_addresses.is_some() && written.spec.overlay_addresses.is_none();
        let uid = written.metadata.uid;
        tracing::info!(endpoints = ?own.endpoints, pod_cidrs = ?own.pod_cidrs, "SkeinNode written");
        let at = Instant::now();
        self.applied = Some(Applied { spec: own.clone(), owner, before, uid, at });
        Ok(())
    }

    /// Returns whether a SkeinNode has the spec, as far as the cluster's definition allows.
    fn has_spec(&self, found: &SkeinNode, own: &SkeinNodeSpec) -> bool {
        if self.lacks_addresses && found.spec.overlay_addresses.is_none() {
            return found.spec == SkeinNodeSpec { overlay_addresses: None, ..own.clone() };
        }
        found.spec == *own
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn record_without_unknown_field_counts_as_written() {
        let url: http::Uri = "http://127.0.0.1:9".parse().unwrap();
        let client = kube::Client::try_from(kube::Config::new(url)).unwrap();
        let mut writer = RecordWriter::new(Api::all(client), "a".to_owned());
        let own = SkeinNodeSpec {
            public_key: "k".to_owned(),
            overlay_addresses: Some(vec!["10.1.0.1".to_owned()]),
            ..SkeinNodeSpec::default()
        };
        let found = |spec: &SkeinNodeSpec| SkeinNode::new("a", spec.clone());
        let old = SkeinNodeSpec { overlay_addresses: None, ..own.clone() };
        let other = SkeinNodeSpec { public_key: "l".to_owned(), ..old.clone() };
        assert!(writer.has_spec(&found(&own), &own), "The record is complete.");
        assert!(!writer.has_spec(&found(&old), &own), "The field has not been written yet.");
        writer.lacks_addresses = true;
        assert!(writer.has_spec(&found(&old), &own), "The definition does not have the field.");
        assert!(!writer.has_spec(&found(&other), &own), "The public key differs.");
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
        let node: Node =
            serde_json::from_value(json!({ "metadata": { "name": "a", "uid": "n" } })).unwrap();
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
}
