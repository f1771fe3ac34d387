//! Wall clocks that jump. Handshakes carry the time, so that an old one is not taken twice.

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

const HOURS: i64 = 3600;

/// An agent's wall clock, wrong by what the file says.
struct Clock(PathBuf);

impl Clock {
    /// To be called before the agent starts.
    fn of(agent: &mut Agent, lab: &Lab) -> Result<Self> {
        agent.preload("other_clock")?;
        let file = lab.directory().join(format!("{}.clock", agent.record.name));
        let name = file.to_string_lossy().into_owned();
        agent.environment.push(("SKEIN_CLOCK".to_owned(), name));
        let clock = Self(file);
        clock.set(0)?;
        Ok(clock)
    }

    /// Seconds ahead of the truth, or behind it.
    fn set(&self, seconds: i64) -> Result<()> {
        // In place: the agent's processes have mapped the file.
        let file = fs::File::options().create(true).truncate(false).write(true).open(&self.0)?;
        file.write_all_at(&seconds.to_ne_bytes(), 0).context("setting the clock")
    }
}

/// Two nodes, the first of which has a clock of its own.
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
fn a_clock_that_jumps_disturbs_nothing() -> Result<()> {
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
        "the clock set by hours and a year, four times: the transfer stood for {:.0} ms at most",
        received.longest_pause * 1e3
    );
    ensure!(
        received.longest_pause < checks::MAX_INTERRUPTION,
        "The transfer was interrupted for {} s.",
        received.longest_pause
    );
    // A machine that was restored from a snapshot has a clock that jumps ahead. Two of the jumps are
    // ahead: by 5 hours, and by a year.
    let sessions = completed(&cluster.agents[0])? - before;
    ensure!(sessions >= 2.0, "{sessions} new sessions after two jumps ahead");
    let log = fs::read_to_string(cluster.agents[0].log())?;
    let ended = log.matches("the wall clock has jumped ahead").count();
    ensure!(ended == 2, "sessions were ended {ended} times");
    checks::all_reach_all(&cluster.lab)
}

/// All that the node knows of its time before is on its disk. It has to begin by itself: the other has
/// nothing to say to it.
#[test]
fn a_node_that_starts_with_a_clock_set_back_is_heard() -> Result<()> {
    let (mut cluster, clock) = with_a_clock()?;
    for (what, hours) in [("the same", 0), ("5 hours back", -5), ("48 hours back", -48)] {
        let code = cluster.agents[0].stop()?;
        ensure!(code == 0, "the agent ended with code {code}");
        ensure!(cluster.agents[0].keeper_pids().is_empty(), "its data process goes on");
        clock.set(hours * HOURS)?;
        cluster.agents[0].start()?;
        let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
        let took = checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
        println!("started anew, its clock {what}: heard after {:.2} s", took.as_secs_f64());
        ensure!(replayed(&cluster.agents[1])? == 0.0, "its handshakes were taken for replays");
    }
    // A data process that is lost altogether begins anew, too, while the agent goes on.
    clock.set(-96 * HOURS)?;
    let keepers = cluster.agents[0].keeper_pids();
    let keeper = keepers.first().and_then(|pid| Pid::from_raw(*pid)).context("no keeper")?;
    kill_process(keeper, Signal::KILL)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let took = checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    println!(
        "its data process lost, its clock 96 hours back: heard after {:.2} s",
        took.as_secs_f64()
    );
    ensure!(replayed(&cluster.agents[1])? == 0.0, "its handshakes were taken for replays");
    Ok(())
}
