//! The taint and the condition of this node's Node, by which the scheduler knows that pods have a
//! network.

use anyhow::Context;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::request::ask;
use crate::control::kubernetes::status::text;

/// Writer of this node's Node.
pub(super) struct NodeWriter {
    nodes: Api<Node>,
    /// Name of the node.
    name: String,
    /// Key of the taint of a node without a network; `None` if there is none.
    taint: Option<String>,
}

impl NodeWriter {
    /// Returns a writer for the node `name`.
    pub(super) fn new(nodes: Api<Node>, name: String, taint: Option<String>) -> Self {
        Self { nodes, name, taint }
    }

    /// Tells the scheduler that pods have a network here.
    pub(super) async fn open(&self, node: &Node) -> anyhow::Result<()> {
        let name = &self.name;
        if let Some(remaining) = untainted(node, self.taint.as_deref()) {
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
}
