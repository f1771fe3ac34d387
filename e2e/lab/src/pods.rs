//! Agents that serve pods, for tests that call the CNI plugin.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::agent::{Agent, Cluster};
use super::cni::Runtime;
use super::files;
use super::{Family, Lab, Netns, Plan};

/// Prepares agents that serve pods on `nodes` nodes. `change` may change each agent and its record.
///
/// # Errors
/// If the laboratory cannot be made, or the reference plugins are missing.
pub fn prepared(nodes: u8, change: impl Fn(&mut Agent)) -> Result<Cluster> {
    let lab = Lab::new(&Plan { nodes, pods: 0, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    for agent in &mut cluster.agents {
        agent.serve_pods()?;
        change(agent);
    }
    let records: Vec<_> = cluster.agents.iter().map(|agent| agent.record.clone()).collect();
    for agent in &cluster.agents {
        records.iter().try_for_each(|record| agent.put_record(record))?;
    }
    Ok(cluster)
}

/// Prepares agents like [`prepared`], and starts them.
///
/// # Errors
/// If the laboratory cannot be made, the reference plugins are missing, or an agent does not become
/// ready.
pub fn up(nodes: u8, change: impl Fn(&mut Agent)) -> Result<Cluster> {
    let mut cluster = prepared(nodes, change)?;
    cluster.start()?;
    Ok(cluster)
}

/// Returns a runtime that calls the plugin on the node with this index.
///
/// # Errors
/// If the plugin's binary is missing.
pub fn runtime(cluster: &Cluster, index: usize) -> Result<Runtime> {
    Runtime::new(&cluster.agents[index], &cluster.lab.nodes[index])
}

/// Returns the network namespace of the node with this index.
pub fn node(cluster: &Cluster, index: usize) -> &Netns {
    &cluster.lab.nodes[index].ns
}

/// Returns the path of the network configuration list that the agent writes.
pub fn list_path(agent: &Agent) -> PathBuf {
    agent.cni_directory("conf_dir").join("10-skein.conflist")
}

/// Reads the network configuration list.
///
/// # Errors
/// If the file cannot be read or is not JSON.
pub fn list(agent: &Agent) -> Result<Value> {
    let path = list_path(agent);
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

/// Replaces the network configuration list atomically, by a rename.
///
/// # Errors
/// If the file cannot be written or renamed.
pub fn put_list(agent: &Agent, list: &Value) -> Result<()> {
    files::replace(&list_path(agent), list.to_string())
}
