//! Wall clocks that jump. Handshakes carry the wall-clock time as protection against replays.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::load::transfer::Transfer;
use skein_lab::{Family, Lab, Plan};

/// Seconds of an hour.
const HOURS: i64 = 3600;

/// Offset of an agent's wall clock. The value is the path of the file that contains the offset.
struct Clock(PathBuf);

impl Clock {
    /// Gives the agent a clock of its own. Call it before the agent starts.
    fn of(agent: &mut Agent, lab: &Lab) -> Result<Self> {
        agent.preload("other_clock")?;
        let file = lab.directory().join(format!("{}.clock", agent.record.name));
        let name = file.to_string_lossy().into_owned();
        agent.environment.push(("SKEIN_CLOCK".to_owned(), name));
        let clock = Self(file);
        clock.set(0)?;
        Ok(clock)
    }

    /// Sets the offset from the true time, seconds; negative values are in the past.
    fn set(&self, seconds: i64) -> Result<()> {
        // The file is written in place, because the agent's processes have mapped it.
        let file = fs::File::options().create(true).truncate(false).write(true).open(&self.0)?;
        file.write_all_at(&seconds.to_ne_bytes(), 0).context("setting the clock")
    }
}

/// Starts two nodes, the first of which has a clock of its own.
fn with_a_clock() -> Result<(Cluster, Clock)> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    let clock = Clock::of(&mut agents[0], lab)?;
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    Ok((cluster, clock))
}

fn replayed(agent: &Agent) -> Result<f64> {
    Ok(agent.metrics()?.sum("skein_handshakes_total", &["result=\"replayed\""]))
}

#[test]
fn clock_jumps_do_not_disturb_traffic() -> Result<()> {
    let (cluster, clock) = with_a_clock()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let completed = |agent: &Agent| -> Result<f64> {
        let metrics = agent.metrics()?;
        let count = |role| {
            metrics.sum("skein_handshakes_total", &[&*format!("result=\"completed_{role}\"")])
        };
        Ok(count("initiator") + count("responder"))
    };
    let before = completed(&cluster.agents[0])?;
    let transfer = Transfer::start(&a.ns, &b.ns, to, 80 << 20, Some(10 << 20))?;
    for hours in [5, -7, 24 * 365, 0] {
        thread::sleep(Duration::from_millis(1500));
        clock.set(hours * HOURS)?;
    }
    let received = transfer.join()?;
    println!(
        "the clock jumped four times, by up to a year: longest interruption {:.0} ms",
        received.longest_pause * 1e3
    );
    checks::interruption_is_bounded(&received)?;
    // The clock of a machine that is restored from a snapshot jumps ahead. Two of the jumps are
    // ahead, by 5 hours and by a year.
    let sessions = completed(&cluster.agents[0])? - before;
    ensure!(sessions >= 2.0, "Two jumps ahead caused only {sessions} new sessions.");
    let log = fs::read_to_string(cluster.agents[0].log())?;
    let ended = log.matches("the wall clock has jumped ahead").count();
    ensure!(ended == 2, "Sessions were ended {ended} times instead of twice.");
    checks::all_reach_all(&cluster.lab)
}

/// After its start, the node knows the time of its last run only from its disk. It must initiate
/// the handshake itself, because the other node has no packet for it.
#[test]
fn handshakes_of_a_node_with_a_clock_set_back_are_accepted() -> Result<()> {
    let (mut cluster, clock) = with_a_clock()?;
    for (what, hours) in [("the same", 0), ("5 hours back", -5), ("48 hours back", -48)] {
        let code = cluster.agents[0].stop()?;
        ensure!(code == 0, "The agent ended with code {code}.");
        ensure!(cluster.agents[0].keeper_pids().is_empty(), "The data process still runs.");
        clock.set(hours * HOURS)?;
        cluster.agents[0].start()?;
        let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
        let took = checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
        println!("restarted, clock {what}: reached after {:.2} s", took.as_secs_f64());
        let replays = replayed(&cluster.agents[1])?;
        ensure!(replays == 0.0, "{replays} handshakes were refused as replays.");
    }
    // A data process whose keeper is killed starts without sessions, while the agent runs.
    clock.set(-96 * HOURS)?;
    let keepers = cluster.agents[0].keeper_pids();
    let keeper = keepers.first().and_then(|pid| Pid::from_raw(*pid)).context("no keeper")?;
    kill_process(keeper, Signal::KILL)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let took = checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    println!("data process lost, clock 96 hours back: reached after {:.2} s", took.as_secs_f64());
    let replays = replayed(&cluster.agents[1])?;
    ensure!(replays == 0.0, "{replays} handshakes were refused as replays.");
    Ok(())
}
