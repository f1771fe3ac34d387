//! Commands that run, check, configure and remove an agent: `run`, `health`, `log-level`,
//! `cleanup`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rustix::thread::CapabilitySet;
use skein_ipc::instance::Instance;
use skein_sys::lock::FileLock;
use skein_sys::socket::connect_trusted;
use skein_sys::{confine, descriptors};

use super::{AgentArgs, ConfigArgs, hold, print, runtime};
use crate::config::Mode;
use crate::control::takeover::Start;
use crate::control::{self, Ended, agent_client, cleanup};
use crate::failure::Failure;
use crate::{http, logging};

/// Maximum time that tasks get to end after a hand-over.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// Options for the start of an agent.
#[derive(Args)]
pub(crate) struct StartArgs {
    /// Replace a running agent as soon as this agent is ready
    #[arg(long)]
    take_over: bool,
    /// Directory of the sockets of this pod. With this option, the agent is ready only while the
    /// keeper of the same pod has the data plane
    #[arg(long)]
    instance: Option<PathBuf>,
    /// Descriptor of the role's lock, passed by skein-agent hold
    #[arg(long, hide = true)]
    lock_fd: Option<i32>,
}

pub(crate) fn run(
    config: &ConfigArgs,
    mode: Option<Mode>,
    start: StartArgs,
) -> Result<(), Failure> {
    let mut config = config.load()?;
    if let Some(mode) = mode {
        config.dataplane.mode = mode;
    }
    if start.instance.is_some() && config.dataplane.mode == Mode::Spawn {
        return Err(Failure::Usage(
            "--instance: the data process runs in another container. Set dataplane.mode = \
             \"external\"."
                .to_owned(),
        ));
    }
    // Call this before a second thread starts, because the kernel stores capabilities per thread.
    let pods = if config.cni.enabled { confine::PODS } else { CapabilitySet::empty() };
    let rights = confine::drop_capabilities(confine::CONTROL.union(pods));
    let rights = rights.context("cannot drop capabilities")?;
    logging::start(&config.log);
    let shown =
        serde_json::to_string(&config).context("cannot format the configuration as JSON")?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %shown, "starting");
    for note in &config.notes {
        tracing::warn!("{note}");
    }
    tracing::info!(kept = ?rights, "capabilities dropped");
    let StartArgs { take_over, instance, lock_fd } = start;
    let lock = lock_fd.map(|fd| FileLock::from_received(descriptors::inherited(fd)?)).transpose();
    let lock =
        lock.context("cannot use the descriptor of --lock-fd, which only skein-agent hold passes")?;
    let start = Start { take_over, instance: instance.map(Instance::new), lock };
    let (takes_over, instance) = (start.takes_over(), start.instance.clone());
    let state_dir = config.state_dir.clone();
    let runtime = runtime()?;
    match runtime.block_on(control::run(config, start, http::serve))? {
        Ended::Signal => Ok(()),
        Ended::HandedOver(role) if takes_over => {
            let error = hold::become_holder(role, &state_dir, instance.as_ref());
            Err(Failure::Runtime(
                anyhow::Error::new(error).context("cannot execute skein-agent hold"),
            ))
        }
        Ended::HandedOver(role) => {
            runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
            let sent = descriptors::send(&role.connection, &[OwnedFd::from(role.lock).as_fd()]);
            Ok(sent.context("cannot send the lock of the role to the other agent")?)
        }
    }
}

#[derive(Args)]
pub(crate) struct HealthArgs {
    /// Directory of the pod's own sockets
    #[arg(long)]
    instance: PathBuf,
    /// Also fail if the agent is not ready
    #[arg(long)]
    ready: bool,
}

pub(crate) fn health(arguments: &HealthArgs) -> Result<(), Failure> {
    Ok(Instance::new(&arguments.instance).probe(connect_trusted, arguments.ready)?)
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
            "cannot remove everything:\n{}",
            cleaned.errors.join("\n")
        )));
    }
    Ok(())
}

#[derive(Args)]
pub(crate) struct LogLevelArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// error, warn, info, debug, trace, or directives for single modules [default: as configured]
    level: Option<String>,
}

pub(crate) fn log_level(arguments: &LogLevelArgs) -> Result<(), Failure> {
    let level = arguments.level.as_deref();
    if let Some(level) = level {
        logging::parse(level).map_err(|error| Failure::Usage(error.to_string()))?;
    }
    let agent = arguments.agent.agent()?;
    let answer = runtime()?.block_on(agent_client::set_log_level(agent.socket(), level));
    answer.map_err(|error| agent.failure(error))
}
