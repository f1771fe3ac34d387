//! Requests of the publisher to the API server.

use std::time::Duration;

use anyhow::{Context, anyhow};
use kube::Resource;
use serde_json::json;

use crate::control::kubernetes::client::describe;
use crate::control::kubernetes::resource::SkeinNode;

/// Field manager of the agent's fields (server-side apply).
pub(super) const MANAGER: &str = "skein-agent";
/// Timeout of one request.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends a request.
///
/// # Errors
/// An error if the API server refuses, or does not answer within [`REQUEST_TIMEOUT`].
pub(super) async fn send<T>(request: impl Future<Output = kube::Result<T>>) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(REQUEST_TIMEOUT, request).await;
    let answer = answer.with_context(|| format!("no answer within {REQUEST_TIMEOUT:?}"))?;
    answer.map_err(|error| anyhow!(describe(&error)))
}

/// Returns a SkeinNode with the key `part` only, for a server-side apply.
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
