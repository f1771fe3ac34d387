//! `cargo e2e fuzz`: runs of the fuzz targets for a limited time.

use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use skein_lab::cargo;

/// Options of `cargo e2e fuzz`.
#[derive(Debug, Args)]
pub struct Options {
    /// Maximum seconds for each target
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Maximum number of executions of each target
    #[arg(long)]
    runs: Option<u64>,
    /// Part of the names of the targets to run
    filter: Option<String>,
}

/// Crates whose `fuzz` directories have targets.
const CRATES: [&str; 3] = ["agent/core", "cni-plugin", "agent"];

/// Runs `cargo e2e fuzz`. Installs cargo-fuzz if it is missing.
///
/// # Errors
/// If cargo-fuzz cannot be installed or run, if no target matches, or if a target finds a failure.
pub fn run(options: &Options) -> Result<()> {
    if !installed()? {
        println!("installing cargo-fuzz (cargo install cargo-fuzz)");
        cargo::run(&["install", "--locked", "cargo-fuzz"])?;
    }
    let mut all = vec![];
    for from in CRATES {
        let names = output(from, &["fuzz", "list"])?;
        let names = names.lines().map(str::trim).filter(|name| !name.is_empty());
        all.extend(names.map(|name| (from, name.to_owned())));
    }
    let wanted = |(_, name): &&(&str, String)| {
        options.filter.as_deref().is_none_or(|filter| name.contains(filter))
    };
    let targets: Vec<_> = all.iter().filter(wanted).collect();
    if targets.is_empty() {
        let names: Vec<_> = all.iter().map(|(_, name)| name.as_str()).collect();
        bail!("no fuzz target matches. The targets are: {}.", names.join(", "));
    }
    let mut failed = vec![];
    for (from, target) in &targets {
        if !fuzz(options, from, target)? {
            failed.push(target.as_str());
        }
    }
    if !failed.is_empty() {
        bail!("fuzz targets with failures: {}", failed.join(", "));
    }
    println!("Fuzz targets without a failure: {}", targets.len());
    Ok(())
}

/// Runs one target and returns whether it found no failure.
fn fuzz(options: &Options, from: &str, target: &str) -> Result<bool> {
    // New inputs are written to their own directory; the corpus of the repository is only read.
    let workspace = cargo::workspace().canonicalize().context("finding the workspace")?;
    let found = workspace.join("out/fuzz").join(target);
    std::fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
    let (found, kept) = (found.to_string_lossy(), format!("fuzz/corpus/{target}"));
    let time = format!("-max_total_time={}", options.seconds);
    // -1 means no limit.
    let runs = format!("-runs={}", options.runs.map_or(-1, u64::cast_signed));
    // No sanitizer: the fuzzed code is safe Rust, in which a sanitizer finds no fault, and each
    // execution with a sanitizer takes longer. Overflows and failed assertions panic.
    let mut arguments = vec!["fuzz", "run", "--sanitizer", "none", target, &found, &kept, "--"];
    arguments.extend([time.as_str(), &runs, "-max_len=70000", "-print_final_stats=1"]);
    let output = in_crate(from, &arguments).stdin(Stdio::null()).output();
    let output = output.context("starting cargo fuzz")?;
    let text = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => println!("{target}: {}", figures(&text)),
        false => {
            let lines: Vec<_> = text.lines().collect();
            println!("{target}:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
    Ok(output.status.success())
}

/// Returns the number of executions and their coverage of the code: edges (`cov`), and edges with
/// their counts (`ft`).
fn figures(text: &str) -> String {
    let word_after = |line: &str, name: &str| {
        let mut words = line.split_whitespace();
        words.by_ref().find(|word| *word == name)?;
        words.next().map(str::to_owned)
    };
    let last = |name: &str| text.lines().rev().find_map(|line| word_after(line, name));
    let [runs, edges, features] = ["stat::number_of_executed_units:", "cov:", "ft:"]
        .map(|name| last(name).unwrap_or_default());
    format!("{runs} executions, {edges} edges, {features} features")
}

/// Returns a command of cargo with the nightly toolchain, which the fuzzer's instrumentation needs.
fn in_crate(from: &str, arguments: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new("cargo");
    command.arg("+nightly").args(arguments).current_dir(cargo::workspace().join(from));
    // The cargo that started this process sets these variables, which would select its toolchain.
    for variable in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTC", "RUSTDOC"] {
        command.env_remove(variable);
    }
    command
}

fn installed() -> Result<bool> {
    let output = in_crate(CRATES[0], &["fuzz", "--version"]).output();
    Ok(output
        .context("cannot start cargo with the nightly toolchain. Install rustup.")?
        .status
        .success())
}

fn output(from: &str, arguments: &[&str]) -> Result<String> {
    let output = in_crate(from, arguments).output().context("starting cargo fuzz")?;
    if !output.status.success() {
        bail!(
            "cargo {} failed: {}. It needs the nightly toolchain: rustup toolchain install nightly.",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_fuzzer_output() {
        let text = "#2\tINITED cov: 5 ft: 6 corp: 1/1b\n#900\tDONE   cov: 48 ft: 77 corp: 9/61b\n\
                    Done 900 runs in 1 second(s)\nstat::number_of_executed_units: 900\n";
        assert_eq!(figures(text), "900 executions, 48 edges, 77 features");
    }
}
