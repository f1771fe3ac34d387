//! What runs for long, and what it is told: `run`, `log-level`, `hold`, `cleanup`, `uninstall`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use rustix::thread::CapabilitySet;

use super::{AgentArgs, ConfigArgs, print, runtime, seconds};
use crate::config::Mode;
use crate::control::kubernetes::uninstall;
use crate::control::{self, Ended, cleanup, server};
use crate::failure::Failure;
use crate::lifecycle::{self, Signals};
use crate::logging;
use crate::sys::confine;

pub(crate) fn run(config: &ConfigArgs, mode: Option<Mode>, take_over: bool) -> Result<(), Failure> {
    let mut config = config.load()?;
    if let Some(mode) = mode {
        config.dataplane.mode = mode;
    }
    // Before there is a second thread: the kernel keeps rights for each.
    let pods = if config.cni.enabled { confine::PODS } else { CapabilitySet::empty() };
    let rights = confine::give_up(confine::CONTROL.union(pods));
    let rights = rights.context("cannot give up capabilities")?;
    logging::start(&config.log);
    let shown = serde_json::to_string(&config).context("cannot print the configuration")?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %shown, "starting");
    for note in &config.notes {
        tracing::warn!("{note}");
    }
    tracing::info!(capabilities = ?rights, "capabilities given up but for these");
    match runtime()?.block_on(control::run(config, take_over))? {
        Ended::Asked => Ok(()),
        // The kernel closes all that this process has, and whoever started it sees no end of it.
        Ended::GaveWay if take_over => Err(Failure::Runtime(lifecycle::retire().into())),
        Ended::GaveWay => Ok(()),
    }
}

pub(crate) fn hold() -> Result<(), Failure> {
    runtime()?.block_on(async {
        Signals::take().context("cannot take signals")?.end().await;
        Ok(())
    })
}

pub(crate) fn clean(config: &ConfigArgs, state: bool) -> Result<(), Failure> {
    let config = config.load()?;
    logging::start(&config.log);
    let cleaned = runtime()?.block_on(cleanup::cleanup(&config, state))?;
    let mut text: String = cleaned.removed.iter().map(|what| format!("removed {what}\n")).collect();
    if cleaned.removed.is_empty() && cleaned.errors.is_empty() {
        text.push_str("nothing to remove\n");
    }
    print(&text)?;
    if !cleaned.errors.is_empty() {
        return Err(Failure::Runtime(anyhow::anyhow!(
            "not everything could be removed:\n{}",
            cleaned.errors.join("\n")
        )));
    }
    Ok(())
}

#[derive(Args)]
pub(crate) struct LogLevelArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// error, warn, info, debug, trace, or a filter of these; without it as configured
    level: Option<String>,
}

pub(crate) fn log_level(arguments: &LogLevelArgs) -> Result<(), Failure> {
    let level = arguments.level.as_deref();
    if let Some(level) = level {
        logging::parse(level).map_err(Failure::Usage)?;
    }
    let agent = arguments.agent.agent()?;
    let answer = runtime()?.block_on(server::ask_for_level(agent.socket(), level));
    let answer = answer.map_err(|error| agent.no_answer(&error))?;
    answer.map_err(|error| Failure::Runtime(anyhow::anyhow!(error)))
}

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
