//! The commands of `skein-agent`, one a module. [`crate::app`] parses the command line and calls them.

pub(crate) mod bench;
pub(crate) mod capture;
pub(crate) mod check;
pub(crate) mod connectivity;
pub(crate) mod generate;
pub(crate) mod hold;
pub(crate) mod key;
pub(crate) mod packet;
pub(crate) mod peers;
pub(crate) mod service;
pub(crate) mod status;
pub(crate) mod sysdump;
pub(crate) mod top;
pub(crate) mod trace;
#[cfg(feature = "kubernetes")]
pub(crate) mod uninstall;
pub(crate) mod watching;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use skein_ipc::Report;

use crate::config::{Config, DEFAULT_PATH};
use crate::control::agent_client::{self, AgentError};
use crate::failure::Failure;
use crate::status::Document;

/// Where the configuration is, and what of it the command line overrides.
#[derive(Args)]
pub(crate) struct ConfigArgs {
    /// The agent's configuration
    #[arg(long, default_value = DEFAULT_PATH, env = "SKEIN_CONFIG")]
    config: PathBuf,
    /// Name of this node (overrides name)
    #[arg(long, env = "SKEIN_NODE_NAME")]
    name: Option<String>,
}

impl ConfigArgs {
    pub(crate) fn load(&self) -> Result<Config, Failure> {
        Config::load(&self.config, self.name.as_deref())
    }

    /// Loads the configuration; `None` if the file does not exist.
    pub(crate) fn load_if_present(&self) -> Result<Option<Config>, Failure> {
        match self.config.try_exists() {
            Ok(false) => Ok(None),
            _ => self.load().map(Some),
        }
    }
}

/// How to find the agent that runs.
#[derive(Args)]
pub(crate) struct AgentArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// The agent's socket (overrides control.socket)
    #[arg(long)]
    socket: Option<PathBuf>,
}

impl AgentArgs {
    pub(crate) fn agent(&self) -> Result<Agent, Failure> {
        let socket = match &self.socket {
            Some(socket) => socket.clone(),
            None => self.config.load()?.control.socket,
        };
        Ok(Agent { socket })
    }
}

/// How to look at it, once or twice.
#[derive(Args)]
pub(crate) struct LookArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Seconds between the two looks that rates are computed from; 0: one look, no rates
    #[arg(long, default_value_t = 1.0)]
    interval: f64,
}

/// The agent that runs on this node.
pub(crate) struct Agent {
    socket: PathBuf,
}

impl Agent {
    /// Path of its control socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its status.
    pub(crate) async fn status(&self) -> Result<Document, Failure> {
        agent_client::status(&self.socket).await.map_err(|error| self.failure(error))
    }

    /// Returns the failure of a command whose request failed.
    pub(crate) fn failure(&self, error: AgentError) -> Failure {
        let shown = self.socket.display();
        match error {
            AgentError::Refused { message, .. } => Failure::Runtime(anyhow!(message)),
            AgentError::Io(error) if error.kind() == ErrorKind::PermissionDenied => {
                Failure::Privilege(format!(
                    "{shown} is for root and the agent's own user: {error}: run as root"
                ))
            }
            error => Failure::Runtime(anyhow!(
                "no agent answers on {shown}: {error}: is it running, and is this its socket \
                 (--config, --socket)?"
            )),
        }
    }
}

/// What the data process reports, where it is there.
pub(crate) fn report(document: &Document) -> Result<&Report, Failure> {
    document.report.as_ref().ok_or_else(|| {
        let why = document.dataplane.error.as_deref().unwrap_or("it does not answer");
        Failure::Runtime(anyhow!("the data process is away: {why}: see the agent's log"))
    })
}

/// The form of what a command prints.
#[derive(Args, Clone, Copy)]
pub(crate) struct OutputArgs {
    /// Form of the output
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

pub(crate) fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    Ok(serde_json::to_string_pretty(value).context("cannot print the answer")? + "\n")
}

/// Prints; a reader that has enough (`| head`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    show(text).map(drop)
}

/// The same; says whether there is a reader still.
pub(crate) fn show(text: &str) -> Result<bool, Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::io("cannot print the answer", error)),
    }
}

/// The longest time that can be asked for: a year.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// A number of seconds from the command line.
pub(crate) fn seconds(option: &str, value: f64) -> Result<Duration, Failure> {
    let time = Duration::try_from_secs_f64(value).ok().filter(|time| *time <= LONGEST);
    time.ok_or_else(|| {
        Failure::Usage(format!(
            "{option}: use a number of seconds, from 0 to {}",
            LONGEST.as_secs()
        ))
    })
}

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    // One thread is enough for what is done here, and keeps the process small.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("cannot start the runtime")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_those_that_a_clock_can_hold() {
        assert_eq!(seconds("--limit", 0.5).ok(), Some(Duration::from_millis(500)));
        for wrong in [-1.0, f64::NAN, f64::INFINITY, u64::MAX as f64] {
            assert!(matches!(seconds("--limit", wrong), Err(Failure::Usage(_))), "{wrong}");
        }
    }
}
