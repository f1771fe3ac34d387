//! `cargo e2e soak`: a long run of mixed traffic between three nodes under injected faults. It
//! finds errors that show only with time: growth of memory or descriptors, rare wrong bytes, and
//! connections that do not survive a fault.

mod faults;
mod flows;
mod report;
mod sampler;

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use skein_lab::agent::{Cluster, binary};
use skein_lab::checks;
use skein_lab::console::Console;
use skein_lab::load::pattern::Pattern;
use skein_lab::{Family, Lab, Offloads, Plan, registry};
use skein_lab::{cargo, packages};

use faults::{Fault, FaultInjector};
use flows::Flows;
use sampler::Sampler;

/// Options of `cargo e2e soak`.
#[derive(Debug, Args)]
pub struct Options {
    /// Minutes of traffic
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    minutes: u32,
    /// Seed that determines order, nodes and times of the faults (default: a random one)
    #[arg(long)]
    seed: Option<u64>,
    /// Faults to inject
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Fault::ALL)]
    faults: Vec<Fault>,
    /// Directory to which the agents' logs are copied at the end
    #[arg(long)]
    logs: Option<PathBuf>,
}

/// Maximum time until every connection continues after the end of a fault.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// Interval between two progress lines.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(30);

/// Runs `cargo e2e soak`, and prints tables.
///
/// # Errors
/// If the agents cannot be built or started, or if the run found a problem: a wrong byte, a broken
/// or stalled connection, or growth of memory or descriptors.
pub fn run(options: &Options) -> Result<()> {
    let console = Console::new();
    packages::ensure(&[packages::DEMO, packages::SOAK], &console)?;
    console.step("building skein-agent (release)");
    console.pause(cargo::build_agent)?;
    registry::prepare();
    let seed = match options.seed {
        Some(seed) => seed,
        None => new_seed()?,
    };
    drop(console);
    println!("seed {seed}. The option --seed {seed} repeats these faults in this order.");

    let plan = Plan { nodes: 3, offloads: Offloads::Wire, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::without_permit(&plan)?, Family::V4)?;
    cluster.verbose = false;
    // The faults restart agents. A build in the meantime must not change the program.
    let program = cluster.lab.directory().join("skein-agent");
    fs::copy(binary()?, &program).context("cannot copy the agent's program")?;
    for agent in &mut cluster.agents {
        agent.program.clone_from(&program);
        // Allows a node's address to change while the agent runs.
        agent.set("underlay.addresses", vec!["0.0.0.0".to_owned()]);
    }
    let duration = Duration::from_secs(60) * options.minutes;
    let report = soak(&mut cluster, &mut Random::new(seed), &options.faults, duration);
    if let Some(directory) = &options.logs {
        fs::create_dir_all(directory)?;
        for agent in &cluster.agents {
            let kept = directory.join(format!("{}.log", agent.record.name));
            fs::copy(agent.log(), &kept).with_context(|| kept.display().to_string())?;
        }
    }
    let report = report.with_context(|| format!("seed {seed}\n{}", cluster.logs()))?;
    println!("{report}");
    if !report.problems.is_empty() {
        println!("{}", cluster.logs());
        bail!("{} (seed {seed})", report.problems.join("; "));
    }
    println!("The soak test found no problem.");
    Ok(())
}

fn soak(
    cluster: &mut Cluster,
    random: &mut Random,
    faults: &[Fault],
    duration: Duration,
) -> Result<report::Report> {
    let Cluster { agents, lab, .. } = cluster;
    let mut injector = FaultInjector::start(agents, lab)?;
    checks::all_reach_all(lab)?;
    thread::scope(|scope| {
        let sampler = Sampler::start(scope, lab);
        let flows = Flows::start(scope, lab);
        let (events, mut problems) = inject_faults(&mut injector, &flows, random, faults, duration);
        let ended = flows.stop();
        let samples = sampler.stop();
        problems.extend(injector.check_health());
        Ok(report::Report::of(events, &ended, &samples, duration, problems))
    })
}

/// An injected fault and its consequence.
struct Event {
    fault: Fault,
    /// Longest pause of any connection between the start of the fault and the time at which all
    /// connections continued.
    stall: Duration,
}

/// Injects one fault after the other until `duration` is over. Every fault occurs once before any
/// fault occurs again. Returns the faults and messages about problems.
fn inject_faults(
    injector: &mut FaultInjector<'_>,
    flows: &Flows<'_>,
    random: &mut Random,
    faults: &[Fault],
    duration: Duration,
) -> (Vec<Event>, Vec<String>) {
    let start = Instant::now();
    let (mut events, mut problems) = (vec![], vec![]);
    let mut remaining: Vec<Fault> = vec![];
    let mut last_progress = start;
    // No fault in the first 5 s, so that all flows run, and none in the last 15 s.
    let mut pause = Duration::from_secs(5);
    loop {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            thread::sleep(Duration::from_millis(100));
            if last_progress.elapsed() >= PROGRESS_INTERVAL {
                last_progress = Instant::now();
                println!("{}", flows.progress(start.elapsed(), events.len()));
            }
        }
        if start.elapsed() + Duration::from_secs(15) > duration {
            thread::sleep(duration.saturating_sub(start.elapsed()));
            return (events, problems);
        }
        if remaining.is_empty() {
            remaining = random.shuffled(faults.to_vec());
        }
        let Some(fault) = remaining.pop() else { continue };
        let node = random.below(injector.lab.nodes.len());
        // Discards pauses before the fault.
        flows.take_longest_pause();
        let done = injector.inject(fault, node, random);
        let ended = Instant::now();
        let what = format!("after {} s: {fault} on node {node}", start.elapsed().as_secs());
        let mut add_problem = |text: String| {
            eprintln!("{} {what}: {text}", utc_time());
            problems.push(format!("{what}: {text}"));
        };
        if let Err(error) = done {
            add_problem(format!("{error:#}"));
        }
        while let Some(name) = flows.stalled_since(ended) {
            if let Err(error) = injector.supervise() {
                add_problem(format!("{error:#}"));
            }
            if ended.elapsed() > RECOVERY_TIMEOUT {
                add_problem(format!(
                    "{name} did not continue within {} s",
                    RECOVERY_TIMEOUT.as_secs()
                ));
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let stall = flows.take_longest_pause();
        println!("{} {what}: longest interruption {:.1} s", utc_time(), stall.as_secs_f64());
        events.push(Event { fault, stall });
        pause = Duration::from_millis(3000 + random.below(5000) as u64);
    }
}

/// Returns the time of day in UTC, as in the agents' logs.
fn utc_time() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.unwrap_or_default().as_secs();
    format!("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

fn new_seed() -> Result<u64> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(bytes).into())
}

/// Generator of random numbers that a seed determines.
struct Random(Pattern);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Pattern::new(seed))
    }

    /// Returns a number from 0 to `limit - 1`; 0 if `limit` is 0.
    fn below(&mut self, limit: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        ((u64::from_le_bytes(bytes) >> 16) % limit.max(1) as u64) as usize
    }

    fn shuffled<T>(&mut self, mut all: Vec<T>) -> Vec<T> {
        for last in (1..all.len()).rev() {
            all.swap(last, self.below(last + 1));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_determines_order_of_faults() {
        let order = |seed| Random::new(seed).shuffled(Fault::ALL.to_vec());
        assert_eq!(order(7), order(7));
        assert_ne!(order(7), order(8));
        let mut sorted = order(7);
        sorted.sort_unstable();
        assert_eq!(sorted, Fault::ALL);
    }
}
