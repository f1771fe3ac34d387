//! The table `[kubernetes]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Invalid;

/// The Kubernetes API as the source of node records.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kubernetes {
    /// Whether the records are SkeinNodes, and not files.
    pub enabled: bool,
    /// Which cluster, and as whom; `None`: that of this pod, by its service account.
    pub kubeconfig: Option<PathBuf>,
    /// The interface whose addresses the other nodes send to; `None`: the Node's InternalIPs.
    pub endpoint_interface: Option<String>,
    /// Key of a taint that is removed from the Node once pods have a network.
    pub not_ready_taint: Option<String>,
}

impl Kubernetes {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        let impossible = |name: &&str| !(1..=15).contains(&name.len()) || name.contains('/');
        if let Some(name) = self.endpoint_interface.as_deref().filter(impossible) {
            return Err(Invalid(format!(
                "kubernetes.endpoint_interface = {name:?}: use the name of a network interface"
            )));
        }
        if self.not_ready_taint.as_deref().is_some_and(str::is_empty) {
            return Err(Invalid(
                "kubernetes.not_ready_taint is empty: give a taint's key, or leave it out"
                    .to_owned(),
            ));
        }
        Ok(())
    }
}
