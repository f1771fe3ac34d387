//! State of the policy service, for the status document and the metrics.

use serde::{Deserialize, Serialize};

use crate::config::PolicyMode;

/// State of the network policies on this node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyStatus {
    /// Effect of the policies.
    pub mode: PolicyMode,
    /// True if the kernel's table has the last revision.
    pub active: bool,
    /// Number of changes since the agent started.
    pub revision: u64,
    /// Seconds since the last change of the kernel's table; `None` before the first one.
    pub last_commit_age_seconds: Option<f64>,
    /// True if the objects are those of complete lists; false if they are stored ones or missing.
    pub complete: bool,
    /// True if the source is complete and up to date.
    #[serde(default)]
    pub source_up: bool,
    /// Number of policies of both kinds.
    pub policies: usize,
    /// Number of interfaces of pods of this node.
    pub interfaces: usize,
    /// Interfaces in quarantine, whose pods are not known, with the pods' names.
    pub quarantined: Vec<String>,
    /// Number of chains of policies in the kernel's table.
    #[serde(default)]
    pub chains: usize,
    /// Number of sets in the kernel's table.
    #[serde(default)]
    pub sets: usize,
    /// Number of elements of these sets.
    #[serde(default)]
    pub elements: usize,
    /// Number of parts of policies and files that cannot be read.
    #[serde(default)]
    pub unenforceable: usize,
    /// Failures, each with the object or part that it concerns.
    pub errors: Vec<String>,
}
