//! `skein-agent uninstall`: removes Skein from every node of a Kubernetes cluster.

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
    /// Name of the agents' DaemonSet
    #[arg(long)]
    daemonset: String,
    /// ConfigMap of the agents' Helm release, read if the DaemonSet does not exist
    #[arg(long)]
    configmap: Option<String>,
    /// Uninstall also if no Helm release owns the DaemonSet
    #[arg(long)]
    without_helm: bool,
    /// Labels of the DaemonSet's pods, as key=value,key=value
    #[arg(long)]
    selector: String,
    /// Path of the manifest (YAML) of the DaemonSet that removes Skein from the nodes
    #[arg(long)]
    cleanup: PathBuf,
    /// Timeout of the whole command in seconds
    #[arg(long, default_value_t = 240.0)]
    timeout: f64,
    /// Kubeconfig file of the cluster [default: the cluster of this pod]
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
    let report = |text: &str| print(&format!("{text}\n")).unwrap_or_default();
    runtime()?.block_on(uninstall::uninstall(&options, report))
}
