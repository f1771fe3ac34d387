//! Configuration table `[kubernetes]`: the Kubernetes API as the source of node records.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Invalid;

/// Settings of the Kubernetes API as the source of node records.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kubernetes {
    /// Reads node records from SkeinNodes instead of files.
    pub enabled: bool,
    /// Kubeconfig file with cluster and user; `None`: cluster and service account of this pod.
    pub kubeconfig: Option<PathBuf>,
    /// Interface whose addresses are published as endpoints. `None` means the Node's InternalIPs.
    pub endpoint_interface: Option<String>,
    /// Key of the taint that is removed from the Node once pods have a network. `None` if no taint
    /// is removed.
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
                "kubernetes.not_ready_taint is empty. Set the key of a taint, or remove the setting."
                    .to_owned(),
            ));
        }
        Ok(())
    }
}
