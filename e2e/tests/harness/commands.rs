//! Commands of `cargo e2e`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use skein_bench::Results;
use skein_lab::agent::binary;
use skein_lab::checks;
use skein_lab::process::{self, Process, tail};
use skein_lab::{PERMIT_TIMEOUT, registry};

/// Maximum time of a short command, including the wait for other laboratories.
const COMMAND_TIMEOUT: Duration = PERMIT_TIMEOUT.saturating_add(Duration::from_secs(90));

/// Starts a command with the agent under test; its output goes to the file `log`.
fn start(arguments: &[&str], log: &Path) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skein-e2e"));
    Process::start(command.args(arguments).env("SKEIN_AGENT_BIN", binary()?), log)
}

/// Waits for the end of a command, and returns its exit code and its output.
fn end(mut process: Process, limit: Duration) -> Result<(i32, String)> {
    let mut code = None;
    checks::eventually("the command has ended", limit, || {
        code = process.exited();
        Ok(code.is_some())
    })
    .with_context(|| process.log_tail(30))?;
    Ok((code.context("no exit code")?, tail(process.log(), usize::MAX)))
}

/// Returns the namespaces, directories and processes that the process `pid` has created.
fn remains(pid: i32) -> Vec<String> {
    let name = format!("skein-e2e-{pid}-");
    let mut all = registry::existing();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.extend(processes.filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    }));
    all.retain(|text| text.contains(&name));
    all
}

fn host_interfaces() -> Result<BTreeSet<std::ffi::OsString>> {
    fs::read_dir("/sys/class/net")?.map(|entry| Ok(entry?.file_name())).collect()
}

#[test]
fn demonstration_succeeds_and_leaves_nothing() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let demo = start(&["demo", "--seconds", "1"], &directory.path().join("log"))?;
    let pid = demo.pid();
    let (code, said) = end(demo, COMMAND_TIMEOUT)?;
    ensure!(code == 0, "The exit code is {code}:\n{said}");
    let rows = ["tun_uso", "tun_tso", "tun_checksum", "udp_gso", "udp_gro", "udp_ecn"];
    for rung in rows.into_iter().chain(["reuseport_steering"]) {
        let row = said.lines().find(|line| line.contains(rung)).context(rung)?;
        let is_valid = row.contains("on") || row.contains("unsupported");
        ensure!(is_valid, "{rung} is neither on nor unsupported: {row}");
    }
    let is_success = said.contains("The demonstration succeeded and removed everything");
    ensure!(is_success, "The demonstration did not succeed: {said}");
    ensure!(remains(pid).is_empty(), "The command left: {:?}", remains(pid));
    Ok(())
}

#[test]
fn interrupted_demonstration_leaves_nothing() -> Result<()> {
    let before = host_interfaces()?;
    let directory = tempfile::tempdir()?;
    let demo = start(&["demo", "--seconds", "60"], &directory.path().join("log"))?;
    let pid = demo.pid();
    let sending = || Ok(demo.log_tail(5).contains("TCP between the pods"));
    checks::eventually("traffic", COMMAND_TIMEOUT, sending).with_context(|| demo.log_tail(30))?;
    thread::sleep(Duration::from_millis(500));
    ensure!(remains(pid).len() > 8, "The laboratory is not complete: {:?}", remains(pid));
    demo.signal(Signal::INT)?;
    let (code, said) = end(demo, checks::EVENT_TIMEOUT)?;
    ensure!(code == 130, "The exit code is {code} instead of 130:\n{said}");
    let gone = || Ok(remains(pid).is_empty());
    checks::eventually("nothing is left", checks::EVENT_TIMEOUT, gone)
        .with_context(|| format!("The command left: {:?}", remains(pid)))?;
    ensure!(host_interfaces()? == before, "The interfaces of the host have changed.");
    Ok(())
}

#[test]
fn short_benchmark_writes_its_results() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let out = directory.path().join("out");
    let shown = out.to_string_lossy();
    let what = ["--only", "skein", "--works", "tcp1", "--modes", "ideal", "--out", &shown];
    let short = ["bench", "--rounds", "1", "--seconds", "1"];
    let bench = start(&[&short[..], &what].concat(), &directory.path().join("log"))?;
    let pid = bench.pid();
    let (code, said) = end(bench, COMMAND_TIMEOUT)?;
    ensure!(code == 0, "The exit code is {code}:\n{said}");
    let results: Results = serde_json::from_slice(&fs::read(out.join("results.json"))?)?;
    let is_single = results.notes.is_empty() && results.samples.len() == 1;
    ensure!(is_single, "The results are not one sample without notes: {results:?}");
    ensure!(results.samples[0].values.rate > 0.03, "The rate is too low: {results:?}");
    for file in ["results.md", "ideal.svg"] {
        let length = fs::metadata(out.join(file))?.len();
        ensure!(length > 100, "{file} has only {length} bytes.");
    }
    ensure!(remains(pid).is_empty(), "The command left: {:?}", remains(pid));
    Ok(())
}

/// One minute of the soak test, which injects a few of its faults.
#[test]
fn one_minute_of_the_soak_test_finds_no_problem() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let soak = start(&["soak", "--minutes", "1"], &directory.path().join("log"))?;
    let pid = soak.pid();
    let (code, said) = end(soak, COMMAND_TIMEOUT)?;
    ensure!(code == 0, "The exit code is {code}:\n{said}");
    for word in ["Bulk node-c to node-a", "node-b Data", "The soak test found no problem."] {
        ensure!(said.contains(word), "The output does not contain {word:?}: {said}");
    }
    ensure!(remains(pid).is_empty(), "The command left: {:?}", remains(pid));
    Ok(())
}

/// The released plugin runs on hosts with any C library or none, and kubelet starts it for every
/// pod.
#[test]
fn plugin_is_static_and_smaller_than_2_mib() -> Result<()> {
    let path = skein_lab::cargo::build_static(&["skein-cni"])?.remove(0);
    let program = fs::read(&path)?;
    ensure!(program.len() < 2 << 20, "The plugin has {} bytes.", program.len());
    ensure!(skein_lab::elf::is_static(&path)?, "The plugin needs a dynamic loader.");
    let mut version = Command::new(&path);
    version.env_clear().env("CNI_COMMAND", "VERSION");
    let output = process::run(&mut version)?;
    ensure!(output.contains("1.1.0"), "The plugin does not report CNI 1.1.0: {output}");
    Ok(())
}
