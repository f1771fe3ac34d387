//! Cargo, run from here: one build in release mode that all commands share.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The directory of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Where this workspace's programs are put: beside this one.
pub fn command(arguments: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.args(arguments).current_dir(workspace()).stdin(Stdio::null());
    command
}

/// Runs cargo with its own progress on the terminal.
pub fn run(arguments: &[&str]) -> Result<()> {
    let what = format!("cargo {}", arguments.join(" "));
    let status = command(arguments).status().with_context(|| format!("starting {what}"))?;
    if !status.success() {
        bail!("{what} failed");
    }
    Ok(())
}

/// Builds the agent and the plugin in release mode, unless `SKEIN_AGENT_BIN` names one that is to be used.
pub fn build_agent() -> Result<()> {
    if std::env::var_os("SKEIN_AGENT_BIN").is_some() {
        return Ok(());
    }
    run(&["build", "--release", "--package=skein-agent", "--package=skein-cni", "--bins"])
}
