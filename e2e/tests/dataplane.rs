//! Control process and data process apart: who starts, keeps, loses and finds the data process.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_e2e::checks;
use skein_e2e::lab::agent::{Agent, Cluster};
use skein_e2e::lab::process::Process;
use skein_e2e::lab::{Family, Lab, Plan, Pod};
use skein_e2e::load::ping::{Answers, Ping, ping};

/// Agents whose data processes somebody else has started.
fn external() -> Result<(Cluster, Vec<Process>)> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents.iter_mut().for_each(|agent| agent.set("dataplane.mode", "external"));
    let processes = cluster.agents.iter().map(Agent::start_dataplane).collect::<Result<_>>()?;
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    Ok((cluster, processes))
}

/// Pings a thousand times a second while something is done to the agents.
fn pinged_while(from: &Pod, to: &Pod, work: impl FnOnce() -> Result<()>) -> Result<Answers> {
    thread::scope(|scope| {
        let many = Ping { count: 3000, interval_ms: 1, ..Ping::default() };
        let pings = scope.spawn(move || ping(&from.ns, to.address(Family::V4), many));
        thread::sleep(Duration::from_millis(500));
        work()?;
        pings.join().ok().context("the sender panicked")?
    })
}

fn only_dataplane(agent: &Agent) -> Result<i32> {
    match agent.dataplane_pids()[..] {
        [pid] => Ok(pid),
        ref pids => Err(anyhow::anyhow!("data processes: {pids:?}")),
    }
}

fn revision(agent: &Agent) -> Result<u64> {
    agent.status()?["dataplane"]["revision"].as_u64().context("no revision")
}

#[test]
fn an_external_data_process_outlives_the_control_process() -> Result<()> {
    let (mut cluster, mut processes) = external()?;
    let Cluster { agents, lab, .. } = &mut cluster;
    for (agent, process) in agents.iter().zip(&processes) {
        ensure!(only_dataplane(agent)? == process.pid(), "another data process is at work");
    }
    let (a, b) = (lab.pod(0), lab.pod(1));
    checks::transfer(a, b, Family::V6, 4 << 20)?;
    let before = revision(&agents[0])?;
    let answers = pinged_while(a, b, || {
        agents[0].kill_control();
        thread::sleep(Duration::from_millis(500));
        agents[0].start()
    })?;
    ensure!(answers.complete(), "{} of {} answered", answers.received, answers.sent);
    ensure!(only_dataplane(&agents[0])? == processes[0].pid());
    ensure!(revision(&agents[0])? > before, "the next control process has not taken over");
    agents[0].remove_record(&agents[1].record.name)?;
    let cut = || Ok(checks::does_not_reach(a, b, Family::V4).is_ok());
    checks::eventually("a removed node is cut off", Duration::from_secs(4), cut)?;

    // It is not the agent's to end, either.
    let code = agents[0].stop()?;
    ensure!(code == 0, "the agent ended with code {code}");
    processes[0].check_alive()
}

#[test]
fn readiness_follows_the_data_process() -> Result<()> {
    let (cluster, mut processes) = external()?;
    let agent = &cluster.agents[0];
    let answers = |status: u16| {
        let now = || Ok(agent.http("/readyz")?.status == status);
        checks::eventually(&format!("{status}"), Duration::from_secs(3), now)
    };
    answers(200)?;
    processes[0].kill();
    answers(503)?;
    let why = agent.http("/readyz")?.body;
    ensure!(why.contains("data process"), "not ready, and says: {why}");
    ensure!(agent.http("/healthz")?.status == 200, "the control process lives");
    let metrics = agent.metrics()?;
    for name in ["skein_ready", "skein_dataplane_up"] {
        ensure!(metrics.0.contains(&format!("\n{name} 0\n")), "{name}: {}", metrics.0);
    }
    processes[0] = agent.start_dataplane()?;
    answers(200)?;
    ensure!(agent.metrics()?.sum("skein_dataplane_restarts_total", &[]) == 1.0);
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(5))?;
    Ok(())
}

#[test]
fn a_data_process_that_is_to_be_kept_goes_on_without_an_agent() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("dataplane.keep_on_exit", true);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    let agent = &mut agents[0];
    let kept = only_dataplane(agent)?;
    let answers = pinged_while(lab.pod(0), lab.pod(1), || {
        let code = agent.stop()?;
        ensure!(code == 0, "the agent ended with code {code}");
        thread::sleep(Duration::from_millis(500));
        ensure!(only_dataplane(agent)? == kept, "it did not go on");
        agent.set("dataplane.keep_on_exit", false);
        agent.start()
    })?;
    ensure!(answers.complete(), "{} of {} answered", answers.received, answers.sent);
    ensure!(only_dataplane(agent)? == kept, "it was replaced");
    // The agent that is told otherwise ends it, also one that it has not started.
    agent.stop()?;
    ensure!(agent.dataplane_pids().is_empty(), "{:?} goes on", agent.dataplane_pids());
    Ok(())
}

/// One that answers no more is found out by its silence, killed, and started anew.
#[test]
fn a_data_process_that_hangs_is_replaced() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let agent = &cluster.agents[0];
    let before = only_dataplane(agent)?;
    kill_process(Pid::from_raw(before).context("no process")?, Signal::STOP)?;
    let replaced = || Ok(only_dataplane(agent).is_ok_and(|pid| pid != before));
    checks::eventually("another is at work", Duration::from_secs(20), replaced)?;
    let ready = || Ok(agent.http("/readyz")?.status == 200);
    checks::eventually("it is ready", Duration::from_secs(5), ready)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(5))?;
    checks::transfer(b, a, Family::V6, 1 << 20)?;
    Ok(())
}
