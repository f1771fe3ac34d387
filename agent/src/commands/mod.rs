//! Commands of `skein-agent`, one module for each. [`crate::app`] parses the command line and calls
//! them.

pub(crate) mod bench;
pub(crate) mod capture;
pub(crate) mod capture_client;
pub(crate) mod check;
pub(crate) mod connectivity;
pub(crate) mod generate;
pub(crate) mod hold;
pub(crate) mod key;
pub(crate) mod packet;
pub(crate) mod peers;
pub(crate) mod policy;
pub(crate) mod service;
pub(crate) mod status;
pub(crate) mod sysdump;
pub(crate) mod top;
pub(crate) mod trace;
#[cfg(feature = "kubernetes")]
pub(crate) mod uninstall;

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

/// Options for the configuration file and for the settings that override it.
#[derive(Args)]
pub(crate) struct ConfigArgs {
    /// Configuration file of the agent
    #[arg(long, default_value = DEFAULT_PATH, env = "SKEIN_CONFIG")]
    config: PathBuf,
    /// Name of this node (overrides the key "name" of the configuration)
    #[arg(long, env = "SKEIN_NODE_NAME")]
    name: Option<String>,
}

impl ConfigArgs {
    /// Loads and validates the configuration.
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

/// Options that select the running agent.
#[derive(Args)]
pub(crate) struct AgentArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Control socket of the agent (overrides control.socket)
    #[arg(long)]
    socket: Option<PathBuf>,
}

impl AgentArgs {
    /// Returns the agent. The configuration is read only if `--socket` is missing.
    pub(crate) fn agent(&self) -> Result<Agent, Failure> {
        let socket = match &self.socket {
            Some(socket) => socket.clone(),
            None => self.config.load()?.control.socket,
        };
        Ok(Agent { socket })
    }
}

/// Options of a command that samples the agent's status once or twice.
#[derive(Args)]
pub(crate) struct SampleArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Seconds between the two samples for rates; 0 for one sample without rates
    #[arg(long, default_value_t = 1.0)]
    interval: f64,
}

/// Client of the agent that runs on this node.
pub(crate) struct Agent {
    socket: PathBuf,
}

impl Agent {
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Requests the agent's status.
    pub(crate) async fn status(&self) -> Result<Document, Failure> {
        agent_client::status(&self.socket).await.map_err(|error| self.failure(error))
    }

    /// Converts the error of a request to the failure of the command.
    pub(crate) fn failure(&self, error: AgentError) -> Failure {
        let shown = self.socket.display();
        match error {
            AgentError::Refused { message, .. } => Failure::Runtime(anyhow!(message)),
            AgentError::Io(error) if error.kind() == ErrorKind::PermissionDenied => {
                Failure::Privilege(format!(
                    "cannot use the control socket {shown}: {error}. Run the command as root or as the \
                     agent's user."
                ))
            }
            error => Failure::Runtime(anyhow!(
                "no agent answers on {shown}: {error}. Check that the agent runs and that this is its \
                 socket (--config, --socket)."
            )),
        }
    }
}

/// Returns the report of the data process; an error if the agent has none.
pub(crate) fn report(document: &Document) -> Result<&Report, Failure> {
    document.report.as_ref().ok_or_else(|| {
        let why = document.dataplane.error.as_deref().unwrap_or("no answer");
        Failure::Runtime(anyhow!("the data process is not available: {why}. See the agent's log."))
    })
}

/// Option for the output format.
#[derive(Args, Clone, Copy)]
pub(crate) struct OutputArgs {
    /// Format of the printed result
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Table for people
    Table,
    /// JSON for programs
    Json,
}

/// Formats `value` as indented JSON with a final line break.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    Ok(serde_json::to_string_pretty(value).context("cannot format the answer as JSON")? + "\n")
}

/// Prints `text` to standard output. A closed pipe (`| head`) is not an error.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    print_if_open(text).map(drop)
}

/// Prints `text` to standard output and returns whether the reader still accepts output (false
/// after EPIPE).
pub(crate) fn print_if_open(text: &str) -> Result<bool, Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::io("cannot write to standard output", error)),
    }
}

/// Upper bound of a time on the command line: one year.
const MAX_SECONDS: Duration = Duration::from_secs(365 * 86_400);

/// Converts seconds from the command line. `option` is the option's name for the error.
pub(crate) fn seconds(option: &str, value: f64) -> Result<Duration, Failure> {
    let time = Duration::try_from_secs_f64(value).ok().filter(|time| *time <= MAX_SECONDS);
    time.ok_or_else(|| {
        Failure::Usage(format!(
            "{option}: the value is not a valid time. Use seconds from 0 to {}.",
            MAX_SECONDS.as_secs()
        ))
    })
}

/// Starts a tokio runtime with one thread.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    // One thread is sufficient for a command and uses less memory.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("cannot start the asynchronous runtime")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_out_of_range_are_usage_errors() {
        assert_eq!(seconds("--limit", 0.5).ok(), Some(Duration::from_millis(500)));
        for wrong in [-1.0, f64::NAN, f64::INFINITY, u64::MAX as f64] {
            assert!(matches!(seconds("--limit", wrong), Err(Failure::Usage(_))), "{wrong}");
        }
    }
}
