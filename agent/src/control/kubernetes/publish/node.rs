//! Writer of the taint and the condition of this node's Node, from which the scheduler knows
//! whether pods have a network.

use anyhow::Context;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::request::send;
use crate::control::kubernetes::status::text;

/// Writer of this node's Node.
pub(super) struct NodeWriter {
    nodes: Api<Node>,
    /// Name of the node.
    name: String,
    /// Key of the taint of a node without a network; `None` if no taint is configured.
    taint: Option<String>,
}

impl NodeWriter {
    /// Returns a writer for the node `name`.
    pub(super) fn new(nodes: Api<Node>, name: String, taint: Option<String>) -> Self {
        Self { nodes, name, taint }
    }

    /// Removes the taint and sets NetworkUnavailable to False, if they say that pods have no
    /// network.
    ///
    /// # Errors
    /// An error if the API server refuses or does not answer.
    pub(super) async fn open(&self, node: &Node) -> anyhow::Result<()> {
        let name = &self.name;
        if let Some(remaining) = untainted(node, self.taint.as_deref()) {
            // With the version, the API server refuses the patch if the taints have changed
            // meanwhile.
            let version = &node.metadata.resource_version;
            let change = json!({
                "metadata": { "resourceVersion": version },
                "spec": { "taints": remaining },
            });
            let patch = Patch::Merge(&change);
            send(self.nodes.patch(name, &PatchParams::default(), &patch)).await.context("taint")?;
            tracing::info!("taint of the Node removed");
        }
        if let Some(condition) = available(node, Timestamp::now()) {
            let change = json!({ "status": { "conditions": [condition] } });
            let (parameters, patch) = (PatchParams::default(), Patch::Strategic(&change));
            send(self.nodes.patch_status(name, &parameters, &patch))
                .await
                .context("condition NetworkUnavailable")?;
        }
        Ok(())
    }
}

/// Returns the Node's taints without the one with `key`; `None` if the Node does not have it.
fn untainted(node: &Node, key: Option<&str>) -> Option<Vec<serde_json::Value>> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let stays = |taint: &&k8s_openapi::api::core::v1::Taint| Some(taint.key.as_str()) != key;
    let remaining: Vec<_> = taints.iter().filter(stays).map(|taint| json!(taint)).collect();
    (remaining.len() < taints.len()).then_some(remaining)
}

/// Returns the condition NetworkUnavailable with the status False; `None` unless another program (a
/// cloud's controller) has set it to another status.
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
    fn only_configured_taint_is_removed() {
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
    fn condition_is_set_only_if_another_program_set_it() {
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
