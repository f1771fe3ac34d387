//! Requests of the publisher to the API server.

use std::time::Duration;

use anyhow::{Context, anyhow};
use kube::Resource;
use serde_json::json;

use crate::control::kubernetes::client::describe;
use crate::control::kubernetes::resource::SkeinNode;

/// Whose fields ours are (server-side apply).
pub(super) const MANAGER: &str = "skein-agent";
/// How long one request may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn ask<T>(request: impl Future<Output = kube::Result<T>>) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(PATIENCE, request).await;
    let answer = answer.with_context(|| format!("no answer within {PATIENCE:?}"))?;
    answer.map_err(|error| anyhow!(describe(&error)))
}

/// A SkeinNode with one part of it, for a server-side apply.
pub(super) fn skeinnode(
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
