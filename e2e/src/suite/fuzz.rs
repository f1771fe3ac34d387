//! `cargo e2e fuzz`: every fuzz target for a bounded time.

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::cargo;

/// How long to fuzz, and what.
#[derive(Debug, Args)]
pub struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Only targets whose name contains this.
    filter: Option<String>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if !installed()? {
        println!("installing cargo-fuzz (cargo install cargo-fuzz)");
        cargo::run(&["install", "--locked", "cargo-fuzz"])?;
    }
    let all = output(&["fuzz", "list"])?;
    let wanted = |name: &&str| options.filter.as_deref().is_none_or(|f| name.contains(f));
    let targets: Vec<&str> = all.lines().map(str::trim).filter(|t| !t.is_empty()).collect();
    let targets: Vec<&str> = targets.into_iter().filter(wanted).collect();
    if targets.is_empty() {
        bail!(
            "no such fuzz target; there are: {}",
            all.split_whitespace().collect::<Vec<_>>().join(", ")
        );
    }
    let workspace = cargo::workspace().canonicalize().context("finding the workspace")?;
    let mut failed = vec![];
    for target in &targets {
        println!("fuzzing {target} for {} s", options.seconds);
        // What the fuzzer finds out goes to a directory of its own; the kept corpus is read only.
        let found = workspace.join("out/fuzz").join(target);
        std::fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
        let (found, kept) = (found.to_string_lossy(), format!("fuzz/corpus/{target}"));
        let limit = format!("-max_total_time={}", options.seconds);
        let mut arguments = vec!["fuzz", "run", target, &found, &kept, "--"];
        arguments.extend([limit.as_str(), "-max_len=70000", "-verbosity=0"]);
        let status = in_crate(&arguments).status().context("starting cargo fuzz")?;
        if !status.success() {
            failed.push(*target);
        }
    }
    if !failed.is_empty() {
        bail!("these targets found something: {}", failed.join(", "));
    }
    println!("{} targets, nothing found", targets.len());
    Ok(())
}

/// Cargo with the nightly toolchain, which the fuzzer's instrumentation needs.
fn in_crate(arguments: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new("cargo");
    command.arg("+nightly").args(arguments).current_dir(cargo::workspace().join("agent/core"));
    // Set by the cargo that started us, and in the way of another toolchain.
    for variable in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTC", "RUSTDOC"] {
        command.env_remove(variable);
    }
    command
}

fn installed() -> Result<bool> {
    let output = in_crate(&["fuzz", "--version"]).output();
    Ok(output.context("starting cargo (is rustup installed?)")?.status.success())
}

fn output(arguments: &[&str]) -> Result<String> {
    let output = in_crate(arguments).output().context("starting cargo fuzz")?;
    if !output.status.success() {
        bail!(
            "cargo {} failed (it needs the nightly toolchain: rustup toolchain install nightly): {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
