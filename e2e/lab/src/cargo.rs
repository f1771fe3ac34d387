//! Runs of cargo in this workspace. All commands share one build in release mode.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process;

/// Returns the directory of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Returns a cargo command with these arguments that runs in the workspace.
pub fn command(arguments: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.args(arguments).current_dir(workspace()).stdin(Stdio::null());
    command
}

/// Runs cargo, which shows its own progress on the terminal.
///
/// # Errors
/// If cargo cannot be started, or fails.
pub fn run(arguments: &[&str]) -> Result<()> {
    let what = format!("cargo {}", arguments.join(" "));
    let status = command(arguments).status().with_context(|| format!("starting {what}"))?;
    if !status.success() {
        bail!("{what} failed");
    }
    Ok(())
}

/// Builds the agent and the plugin in release mode, unless `SKEIN_AGENT_BIN` is set.
///
/// # Errors
/// If the build fails.
pub fn build_agent() -> Result<()> {
    build_agent_with(&[])
}

/// Builds as [`build_agent`] does, but without the agent's Kubernetes client, which takes most of
/// the time of a first build. The package of `cargo e2e` is selected too, so that cargo unifies the
/// features of dependencies as in the build of `cargo e2e` itself, and compiles none a second time.
///
/// # Errors
/// If the build fails.
pub fn build_agent_without_kubernetes() -> Result<()> {
    build_agent_with(&["--package=skein-e2e", "--no-default-features"])
}

fn build_agent_with(options: &[&str]) -> Result<()> {
    if std::env::var_os("SKEIN_AGENT_BIN").is_some() {
        return Ok(());
    }
    let build = ["build", "--release", "--package=skein-agent", "--package=skein-cni", "--bins"];
    run(&[&build, options].concat())
}

/// Builds the programs of packages with the profile `dist` and without shared libraries, and
/// returns their paths in the order of the packages. Each package has a program of its own name.
///
/// # Errors
/// If the build fails or does not end within 30 minutes, or if a package has no such program.
pub fn build_static(packages: &[&str]) -> Result<Vec<PathBuf>> {
    // A build without a cache takes 15 minutes on two cores.
    const BUILD_TIMEOUT: Duration = Duration::from_secs(30 * 60);
    let target = if cfg!(target_arch = "aarch64") { "aarch64" } else { "x86_64" };
    let target = format!("{target}-unknown-linux-gnu");
    let mut build = command(&["build", "--quiet", "--profile=dist", "--bins", "--target", &target]);
    build.arg("--message-format=json-render-diagnostics");
    build.args(packages.iter().map(|package| format!("--package={package}")));
    build.env("RUSTFLAGS", "-C target-feature=+crt-static");
    let built = process::finish(&mut build, &[], BUILD_TIMEOUT)?;
    ensure!(built.code == 0, "{}", built.stderr);
    let artifact = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message["executable"].as_str()?))
    };
    let paths: Vec<_> = built.stdout.lines().filter_map(artifact).collect();
    let of = |package: &&str| {
        let found = paths.iter().find(|path| path.file_name().is_some_and(|name| name == *package));
        found.cloned().with_context(|| format!("cargo built no {package}"))
    };
    packages.iter().map(of).collect()
}
