//! `cargo e2e soak`: a long run of mixed traffic between three nodes that one fault after the other
//! befalls. What it looks for shows only with time: memory and descriptors that grow, a byte in a
//! thousand million that is wrong, a connection that does not live on.

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

use faults::{Kind, World};
use flows::Flows;
use sampler::Sampler;

/// How long, and which run.
#[derive(Debug, Args)]
pub struct Options {
    /// Minutes of traffic.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    minutes: u32,
    /// The faults' order, nodes and times come from it; a new one each time unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only these faults, to find out about one.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::ALL)]
    faults: Vec<Kind>,
    /// Keep the agents' logs in this directory.
    #[arg(long)]
    logs: Option<PathBuf>,
}

/// How long every connection may take to go on after a fault has ended.
const RECOVERY_LIMIT: Duration = Duration::from_secs(30);

/// Time between two progress lines.
const PROGRESS: Duration = Duration::from_secs(30);

/// Runs the command.
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
    println!("seed {seed}: --seed {seed} has the same faults in the same order");

    let plan = Plan { nodes: 3, offloads: Offloads::Wire, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::without_turn(&plan)?, Family::V4)?;
    cluster.verbose = false;
    // Agents are started again and again: a build meanwhile must not change what is started.
    let program = cluster.lab.directory().join("skein-agent");
    fs::copy(binary()?, &program).context("copying the agent's program")?;
    for agent in &mut cluster.agents {
        agent.program.clone_from(&program);
        // So that a node's address can change while it runs.
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
    if !report.complaints.is_empty() {
        println!("{}", cluster.logs());
        bail!("{} (seed {seed})", report.complaints.join("; "));
    }
    println!("All was right, and nothing grew.");
    Ok(())
}

fn soak(
    cluster: &mut Cluster,
    random: &mut Random,
    kinds: &[Kind],
    duration: Duration,
) -> Result<report::Report> {
    let Cluster { agents, lab, .. } = cluster;
    let mut world = World::start(agents, lab)?;
    checks::all_reach_all(lab)?;
    thread::scope(|scope| {
        let sampler = Sampler::start(scope, lab);
        let flows = Flows::start(scope, lab);
        let (events, mut complaints) = befall(&mut world, &flows, random, kinds, duration);
        let ended = flows.stop();
        let samples = sampler.stop();
        complaints.extend(world.wellness());
        Ok(report::Report::of(events, &ended, &samples, duration, complaints))
    })
}

/// What one fault did.
struct Event {
    kind: Kind,
    /// The longest pause of any connection from the fault's begin until all went on again.
    stall: Duration,
}

/// Has one fault after the other befall the nodes until the time is over; every kind before any
/// again.
fn befall(
    world: &mut World<'_>,
    flows: &Flows<'_>,
    random: &mut Random,
    kinds: &[Kind],
    duration: Duration,
) -> (Vec<Event>, Vec<String>) {
    let start = Instant::now();
    let (mut events, mut complaints) = (vec![], vec![]);
    let mut deck: Vec<Kind> = vec![];
    let mut told = start;
    // Nothing happens at first, so that the flows are at work, nor at the end.
    let mut pause = Duration::from_secs(5);
    loop {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            thread::sleep(Duration::from_millis(100));
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                println!("{}", flows.progress(start.elapsed(), events.len()));
            }
        }
        if start.elapsed() + Duration::from_secs(15) > duration {
            thread::sleep(duration.saturating_sub(start.elapsed()));
            return (events, complaints);
        }
        if deck.is_empty() {
            deck = random.shuffled(kinds.to_vec());
        }
        let Some(kind) = deck.pop() else { continue };
        let node = random.below(world.lab.nodes.len());
        flows.longest_pause();
        let done = world.befall(kind, node, random);
        let ended = Instant::now();
        let what = format!("after {} s: {kind} on node {node}", start.elapsed().as_secs());
        let mut complain = |text: String| {
            eprintln!("{} {what}: {text}", wall());
            complaints.push(format!("{what}: {text}"));
        };
        if let Err(error) = done {
            complain(format!("{error:#}"));
        }
        while let Some(name) = flows.behind(ended) {
            if let Err(error) = world.supervise() {
                complain(format!("{error:#}"));
            }
            if ended.elapsed() > RECOVERY_LIMIT {
                complain(format!("{name} has not gone on {} s later", RECOVERY_LIMIT.as_secs()));
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let stall = flows.longest_pause();
        println!("{} {what}: a connection stood for {:.1} s", wall(), stall.as_secs_f64());
        events.push(Event { kind, stall });
        pause = Duration::from_millis(3000 + random.below(5000) as u64);
    }
}

/// The time of day in UTC, as the agents' logs have it.
fn wall() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.unwrap_or_default().as_secs();
    format!("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

fn new_seed() -> Result<u64> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_ne_bytes(bytes).into())
}

/// Random numbers that a seed determines.
struct Random(Pattern);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Pattern::new(seed))
    }

    /// One from 0 to below `limit`.
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
    fn the_seed_alone_determines_the_order() {
        let order = |seed| Random::new(seed).shuffled(Kind::ALL.to_vec());
        assert_eq!(order(7), order(7));
        assert_ne!(order(7), order(8));
        let mut sorted = order(7);
        sorted.sort_unstable();
        assert_eq!(sorted, Kind::ALL);
    }
}
