//! Configuration table `[policy]`: network policies for pods.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Invalid;
use super::parse::path_if_any;

/// Effect of network policies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyMode {
    /// Policies have no effect.
    #[default]
    Off,
    /// Traffic that policies refuse is counted and logged, and passes.
    Audit,
    /// Traffic that policies refuse is dropped.
    Enforce,
}

impl PolicyMode {
    /// Returns the name of the mode in the configuration file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        }
    }
}

/// Settings of network policies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// Effect of the policies.
    pub mode: PolicyMode,
    /// Directory of files with policies, namespaces and pods (static mode); `None`: the objects of
    /// the Kubernetes API.
    pub directory: Option<PathBuf>,
}

/// Keys of the table `[policy]`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct PolicyKeys {
    mode: Option<PolicyMode>,
    #[serde(deserialize_with = "path_if_any")]
    directory: Option<PathBuf>,
}

impl PolicyKeys {
    /// Validates the table. Policies need pods of the CNI service, and a source of objects.
    pub(super) fn validate(
        self,
        serves_pods: bool,
        in_kubernetes: bool,
    ) -> Result<Policy, Invalid> {
        let Self { mode, directory } = self;
        if directory.is_some() && in_kubernetes {
            return Err(Invalid(
                "policy.directory: with kubernetes.enabled, the policies are objects of the API \
                 server. Leave policy.directory out."
                    .to_owned(),
            ));
        }
        let default = if directory.is_some() { PolicyMode::Enforce } else { PolicyMode::Off };
        let mode = mode.unwrap_or(default);
        if mode != PolicyMode::Off && !serves_pods {
            return Err(Invalid(format!(
                "policy.mode = {:?}: policies apply to pods of the CNI service only. Set cni.enabled, \
                 or leave policy.mode and policy.directory out.",
                mode.as_str()
            )));
        }
        if mode != PolicyMode::Off && directory.is_none() && !in_kubernetes {
            return Err(Invalid(format!(
                "policy.mode = {:?}: the policies have no source. Set policy.directory, or \
                 kubernetes.enabled.",
                mode.as_str()
            )));
        }
        Ok(Policy { mode, directory })
    }
}
