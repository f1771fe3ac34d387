//! `cargo e2e`'s own commands, run as people run them.

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
use skein_lab::{TURN_TIMEOUT, registry};

/// How long a command may take that does its work in seconds, once no other laboratory is in its way.
const LIMIT: Duration = TURN_TIMEOUT.saturating_add(Duration::from_secs(90));

/// Starts a command with the agent that is under test, its output in a file.
fn start(arguments: &[&str], log: &Path) -> Result<Process> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skein-e2e"));
    Process::start(command.args(arguments).env("SKEIN_AGENT_BIN", binary()?), log)
}

/// Waits for its end; its exit code and all that it said.
fn end(mut process: Process, limit: Duration) -> Result<(i32, String)> {
    let mut code = None;
    checks::eventually("the command has ended", limit, || {
        code = process.exited();
        Ok(code.is_some())
    })
    .with_context(|| process.log_tail(30))?;
    Ok((code.context("no exit code")?, tail(process.log(), usize::MAX)))
}

/// Names of namespaces, directories and processes of a laboratory's process.
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
fn the_demonstration_runs_to_its_end_and_leaves_nothing() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let demo = start(&["demo", "--seconds", "1"], &directory.path().join("log"))?;
    let pid = demo.pid();
    let (code, said) = end(demo, LIMIT)?;
    ensure!(code == 0, "exit code {code}:\n{said}");
    let rows = ["tun_uso", "tun_tso", "tun_checksum", "udp_gso", "udp_gro", "udp_ecn"];
    for rung in rows.into_iter().chain(["reuseport_steering"]) {
        let row = said.lines().find(|line| line.contains(rung)).context(rung)?;
        ensure!(row.contains("on") || row.contains("unsupported"), "{row}");
    }
    ensure!(said.contains("The demonstration succeeded and removed everything"), "{said}");
    ensure!(remains(pid).is_empty(), "left behind: {:?}", remains(pid));
    Ok(())
}

#[test]
fn an_interrupted_demonstration_leaves_nothing() -> Result<()> {
    let before = host_interfaces()?;
    let directory = tempfile::tempdir()?;
    let demo = start(&["demo", "--seconds", "60"], &directory.path().join("log"))?;
    let pid = demo.pid();
    let sending = || Ok(demo.log_tail(5).contains("TCP between the pods"));
    checks::eventually("traffic", LIMIT, sending).with_context(|| demo.log_tail(30))?;
    thread::sleep(Duration::from_millis(500));
    ensure!(remains(pid).len() > 8, "it is not at work: {:?}", remains(pid));
    demo.signal(Signal::INT)?;
    let (code, said) = end(demo, checks::EVENT_TIMEOUT)?;
    ensure!(code == 130, "exit code {code}:\n{said}");
    let gone = || Ok(remains(pid).is_empty());
    checks::eventually("nothing is left", checks::EVENT_TIMEOUT, gone)
        .with_context(|| format!("left behind: {:?}", remains(pid)))?;
    ensure!(host_interfaces()? == before, "interfaces of the host have changed");
    Ok(())
}

#[test]
fn a_short_benchmark_writes_its_results() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let out = directory.path().join("out");
    let shown = out.to_string_lossy();
    let what = ["--only", "skein", "--works", "tcp1", "--modes", "ideal", "--out", &shown];
    let short = ["bench", "--rounds", "1", "--seconds", "1"];
    let bench = start(&[&short[..], &what].concat(), &directory.path().join("log"))?;
    let pid = bench.pid();
    let (code, said) = end(bench, LIMIT)?;
    ensure!(code == 0, "exit code {code}:\n{said}");
    let results: Results = serde_json::from_slice(&fs::read(out.join("results.json"))?)?;
    ensure!(results.notes.is_empty() && results.samples.len() == 1, "{results:?}");
    ensure!(results.samples[0].values.rate > 0.03, "{results:?}");
    for file in ["results.md", "ideal.svg"] {
        ensure!(fs::metadata(out.join(file))?.len() > 100, "{file} is too short");
    }
    ensure!(remains(pid).is_empty(), "left behind: {:?}", remains(pid));
    Ok(())
}

/// An hour of it is `cargo e2e soak`; this has a handful of its faults.
#[test]
fn a_minute_of_the_soak_finds_nothing_wrong() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let soak = start(&["soak", "--minutes", "1"], &directory.path().join("log"))?;
    let pid = soak.pid();
    let (code, said) = end(soak, LIMIT)?;
    ensure!(code == 0, "exit code {code}:\n{said}");
    for word in ["Bulk node-c to node-a", "node-b Data", "The soak test found no problem."] {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    ensure!(remains(pid).is_empty(), "left behind: {:?}", remains(pid));
    Ok(())
}

/// As it is shipped: kubelet starts it for every pod, on hosts with any C library or none.
#[test]
fn the_plugin_is_static_and_small() -> Result<()> {
    let path = skein_lab::cargo::build_static(&["skein-cni"])?.remove(0);
    let program = fs::read(&path)?;
    ensure!(program.len() < 2 << 20, "{} bytes", program.len());
    ensure!(skein_lab::elf::is_static(&path)?, "The plugin needs a dynamic loader.");
    let mut version = Command::new(&path);
    version.env_clear().env("CNI_COMMAND", "VERSION");
    ensure!(process::run(&mut version)?.contains("1.1.0"), "it does not run");
    Ok(())
}
