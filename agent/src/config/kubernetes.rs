//! The table `[kubernetes]` as it is written, and its way to a valid [`Kubernetes`].

use std::path::PathBuf;

use serde::Deserialize;

use super::{Invalid, Kubernetes};

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct KubernetesTable {
    enabled: bool,
    kubeconfig: Option<PathBuf>,
    endpoint_interface: Option<String>,
    not_ready_taint: Option<String>,
}

impl KubernetesTable {
    pub(super) fn validate(self) -> Result<Kubernetes, Invalid> {
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
        Ok(Kubernetes {
            enabled: self.enabled,
            kubeconfig: self.kubeconfig,
            endpoint_interface: self.endpoint_interface,
            not_ready_taint: self.not_ready_taint,
        })
    }
}
