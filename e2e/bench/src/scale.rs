//! `cargo e2e scale`: memory, start time and time of a change with different numbers of node
//! records.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;

use skein_lab::agent::{Agent, Cluster, Record};
use skein_lab::console::Console;
use skein_lab::load::median;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::process;
use skein_lab::{Family, Lab, Plan};
use skein_lab::{cargo, packages};

/// Options of `cargo e2e scale`.
#[derive(Debug, Args)]
pub struct Options {
    /// Numbers of node records to measure, in addition to those of the two nodes
    #[arg(long, value_delimiter = ',', default_value = "0,1000,5000")]
    records: Vec<u32>,
    /// Number of changes of one record, during 1000 pings per second between the pods
    #[arg(long, default_value_t = 10)]
    changes: u32,
}

/// Text of the log line that the agent writes when every lane has the changed records.
const APPLIED_LOG_TEXT: &str = "change applied";

/// Maximum time until a changed record is applied.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Result for one number of records.
struct Outcome {
    records: u32,
    /// Time from the start of the agent until it is ready.
    start: Duration,
    /// Resident memory of the control process, bytes.
    control: u64,
    /// Resident memory of the data process, bytes.
    data: u64,
    /// Time from the change of a record until every lane has it, median, milliseconds.
    change_ms: f64,
    /// CPU time of the control process and the data process for one change, milliseconds.
    change_cpu_ms: f64,
    sent: u32,
    lost: u32,
    /// Longest round-trip time of the pings, milliseconds.
    slowest_ms: f64,
}

/// Runs `cargo e2e scale`: measures, and prints a table.
///
/// # Errors
/// If the agents cannot be built or started, or if a changed record is not applied within 10 s.
pub fn run(options: &Options) -> Result<()> {
    let console = Console::new();
    packages::ensure(&[packages::DEMO], &console)?;
    console.step("building skein-agent (release)");
    console.pause(cargo::build_agent)?;
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY);
    table.set_header([
        "records",
        "start s",
        "control RSS MiB",
        "data RSS MiB",
        "change ms",
        "CPU ms per change",
        "pings lost",
        "slowest ping ms",
    ]);
    for &records in &options.records {
        console.step(&format!("{records} records"));
        let outcome = measure(records, options.changes)?;
        table.add_row([
            outcome.records.to_string(),
            format!("{:.2}", outcome.start.as_secs_f64()),
            (outcome.control >> 20).to_string(),
            (outcome.data >> 20).to_string(),
            format!("{:.0}", outcome.change_ms),
            format!("{:.1}", outcome.change_cpu_ms),
            format!("{} of {}", outcome.lost, outcome.sent),
            format!("{:.2}", outcome.slowest_ms),
        ]);
    }
    drop(console);
    println!("{table}");
    Ok(())
}

fn measure(count: u32, changes: u32) -> Result<Outcome> {
    let lab = Lab::new(&Plan::default())?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.verbose = false;
    let fleet = (0..count).map(Record::synthetic).collect::<Result<Vec<_>>>()?;
    if !fleet.is_empty() {
        let path = cluster.agents[0].records_directory().join("fleet.toml");
        fs::write(path, Record::all_to_toml(&fleet))?;
    }
    cluster.agents[1].start()?;
    let began = Instant::now();
    cluster.agents[0].start()?;
    let start = began.elapsed();
    let (a, b) = (&cluster.lab.nodes[0].pods[0], &cluster.lab.nodes[1].pods[0]);
    skein_lab::checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(5))?;

    let agent = &cluster.agents[0];
    // The pings last one second per change. All changes end before the last ping.
    let count_pings = 1_000 * changes;
    let (from, to) = (&a.ns, b.address(Family::V4));
    let pings = Ping { count: count_pings, interval_ms: 1, ..Ping::default() };
    let (answers, took, cpu) = thread::scope(|scope| {
        let pinging = scope.spawn(move || ping(from, to, pings));
        let changed = change(agent, changes);
        let answers = pinging.join().map_err(|_| anyhow::anyhow!("the pings panicked"))??;
        let (took, cpu) = changed?;
        anyhow::Ok((answers, took, cpu))
    })?;
    let slowest = answers.text.lines().find(|line| line.starts_with("rtt"));
    let slowest = slowest.and_then(|line| line.split('=').nth(1)?.trim().split('/').nth(2));
    let data = *agent.dataplane_pids().first().context("no data process")?;
    Ok(Outcome {
        records: count,
        start,
        control: process::resident_bytes(agent.control_pid().context("no control process")?)?,
        data: process::resident_bytes(data)?,
        change_ms: median(took).unwrap_or(0.0),
        change_cpu_ms: cpu * 1e3 / f64::from(changes.max(1)),
        sent: answers.sent,
        lost: answers.sent - answers.received,
        slowest_ms: slowest.and_then(|text| text.parse().ok()).unwrap_or(0.0),
    })
}

/// Changes one record `changes` times. Returns the time of each change in milliseconds and the
/// agent's CPU time in seconds.
fn change(agent: &Agent, changes: u32) -> Result<(Vec<f64>, f64)> {
    // A request for the status would cost more CPU time than the change, so the log is read.
    let applied = || anyhow::Ok(fs::read_to_string(agent.log())?.matches(APPLIED_LOG_TEXT).count());
    let mut changing = Record::synthetic(60_000)?;
    let before = process::cpu_seconds(&agent.pids());
    let mut took = vec![];
    for number in 0..changes {
        let old = applied()?;
        changing.endpoints = vec![format!("198.51.100.{}:51900", 1 + number % 200)];
        agent.put_record(&changing)?;
        let start = Instant::now();
        while applied()? == old {
            thread::sleep(Duration::from_millis(2));
            if start.elapsed() > CHANGE_TIMEOUT {
                bail!("a changed record was not applied within {} s", CHANGE_TIMEOUT.as_secs());
            }
        }
        took.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok((took, process::cpu_seconds(&agent.pids()) - before))
}
