//! `skein-agent uninstall`: takes Skein from every node of a Kubernetes cluster.

use std::path::PathBuf;

use clap::Args;

use super::{print, runtime, seconds};
use crate::control::kubernetes::uninstall;
use crate::failure::Failure;

#[derive(Args)]
pub(crate) struct UninstallArgs {
    /// Namespace of the agents
    #[arg(long)]
    namespace: String,
    /// The agents' DaemonSet
    #[arg(long)]
    daemonset: String,
    /// A ConfigMap of the agents' Helm release, read if the DaemonSet is gone
    #[arg(long)]
    configmap: Option<String>,
    /// Uninstall also if no Helm release owns the DaemonSet
    #[arg(long)]
    without_helm: bool,
    /// Labels of its pods, as key=value,key=value
    #[arg(long)]
    selector: String,
    /// File with the manifest of a DaemonSet that cleans up a node
    #[arg(long)]
    cleanup: PathBuf,
    /// Seconds that it all may take
    #[arg(long, default_value_t = 240.0)]
    timeout: f64,
    /// Which cluster; without it that of this pod
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
}

pub(crate) fn uninstall(options: &UninstallArgs) -> Result<(), Failure> {
    let options = uninstall::Options {
        namespace: &options.namespace,
        daemonset: &options.daemonset,
        configmap: options.configmap.as_deref(),
        without_helm: options.without_helm,
        selector: &options.selector,
        cleanup: &options.cleanup,
        timeout: seconds("--timeout", options.timeout)?,
        kubeconfig: options.kubeconfig.as_deref(),
    };
    let say = |text: &str| print(&format!("{text}\n")).unwrap_or_default();
    runtime()?.block_on(uninstall::uninstall(&options, say))
}
