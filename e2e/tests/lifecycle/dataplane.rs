//! Control process and data process apart: who starts, keeps, loses and finds the data process.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::load::ping::{Answers, Ping, ping};
use skein_lab::load::transfer::Transfer;
use skein_lab::process::Process;
use skein_lab::{Family, Lab, Plan, Pod};

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
        ensure!(agent.keeper_pids() == [process.pid()], "another data process is at work");
    }
    let (a, b) = (lab.pod(0), lab.pod(1));
    checks::transfer(a, b, Family::V6, 4 << 20)?;
    let (before, pid) = (revision(&agents[0])?, only_dataplane(&agents[0])?);
    let answers = pinged_while(a, b, || {
        agents[0].kill_control();
        thread::sleep(Duration::from_millis(500));
        agents[0].start()
    })?;
    ensure!(answers.complete(), "{} of {} answered", answers.received, answers.sent);
    ensure!(only_dataplane(&agents[0])? == pid);
    ensure!(revision(&agents[0])? > before, "the next control process has not taken over");
    agents[0].remove_record(&agents[1].record.name)?;
    let cut = || Ok(checks::does_not_reach(a, b, Family::V4).is_ok());
    checks::eventually("a removed node is cut off", checks::EVENT_TIMEOUT, cut)?;

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
        checks::eventually(&format!("{status}"), checks::EVENT_TIMEOUT, now)
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
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
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

/// Handshakes of one result, as the data process counts them.
fn handshakes(agent: &Agent, result: &str) -> Result<u64> {
    let report = agent.report()?;
    let counts = report["handshakes"].as_array().context("no handshakes")?;
    let found = counts.iter().find(|count| count["result"] == result);
    found.and_then(|count| count["count"].as_u64()).with_context(|| format!("no {result}"))
}

/// Kills the data process; returns once another one answers.
fn kill_dataplane(agent: &Agent) -> Result<()> {
    let before = only_dataplane(agent)?;
    kill_process(Pid::from_raw(before).context("no process")?, Signal::KILL)?;
    let again =
        || Ok(only_dataplane(agent).is_ok_and(|pid| pid != before) && agent.report().is_ok());
    checks::eventually("another is at work", checks::EVENT_TIMEOUT, again).map(drop)
}

#[test]
fn a_killed_data_process_is_replaced_without_an_outage() -> Result<()> {
    const KILLS: u32 = 3;
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (ours, theirs) = (&cluster.agents[0], &cluster.agents[1]);
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let before = handshakes(theirs, "initiated")?;
    let keeper = ours.keeper_pids();
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 400 << 20, Some(40 << 20))?;
    for kill in 1..=KILLS {
        let answers = pinged_while(a, b, || kill_dataplane(ours))?;
        let lost = answers.sent - answers.received;
        println!("kill {kill} of the data process: {lost} of {} pings, one each ms", answers.sent);
        ensure!(lost <= 50, "{lost} pings lost: {}", answers.text);
    }
    let received = transfer.join()?;
    println!("the transfer stood for {:.0} ms at most", received.longest_pause * 1e3);
    ensure!(
        received.longest_pause < checks::MAX_INTERRUPTION,
        "The transfer was interrupted for {} s.",
        received.longest_pause
    );
    ensure!(ours.keeper_pids() == keeper, "the keeper was replaced, too");
    ensure!(handshakes(ours, "initiated")? == 0, "the last one has made a new session");
    ensure!(handshakes(theirs, "initiated")? == before, "the other node has made a new session");
    ensure!(ours.metrics()?.sum("skein_dataplane_restarts_total", &[]) == f64::from(KILLS));
    Ok(())
}

#[test]
fn deleted_dataplane_socket_is_created_again() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    let (a, b) = (lab.pod(0), lab.pod(1));
    let pid = only_dataplane(&agents[0])?;
    let socket = PathBuf::from(agents[0].dataplane_socket());
    let renamed = socket.with_extension("renamed");
    let damages: [&dyn Fn() -> std::io::Result<()>; 3] = [
        &|| fs::remove_file(&socket),
        &|| fs::rename(&socket, &renamed),
        // Leaves the stale socket of a process that has ended.
        &|| {
            fs::remove_file(&socket)?;
            UnixListener::bind(&socket).map(drop)
        },
    ];
    let answers = pinged_while(a, b, || {
        for damage in damages {
            damage()?;
            let connects = || Ok(UnixStream::connect(&socket).is_ok());
            let limit = Duration::from_secs(10);
            checks::eventually("the socket is created again", limit, connects)?;
            let mode = fs::metadata(&socket)?.permissions().mode() & 0o777;
            ensure!(mode == 0o600, "the socket has mode {mode:o}");
        }
        Ok(())
    })?;
    ensure!(answers.complete(), "{} of {} answered", answers.received, answers.sent);
    fs::remove_file(renamed)?;
    ensure!(only_dataplane(&agents[0])? == pid, "the data process was replaced");
    // The next data process listens on the new socket, and the next control process finds it there.
    kill_dataplane(&agents[0])?;
    ensure!(handshakes(&agents[0], "initiated")? == 0, "the next one has made a new session");
    let pid = only_dataplane(&agents[0])?;
    agents[0].kill_control();
    agents[0].start()?;
    ensure!(only_dataplane(&agents[0])? == pid, "the data process was not found");
    let code = agents[0].stop()?;
    ensure!(code == 0 && !socket.exists(), "the socket is left behind (code {code})");
    Ok(())
}

/// What dies as soon as it is started is not started for ever: the agent begins anew.
#[test]
fn a_data_process_that_dies_again_and_again_is_given_up() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let agent = &cluster.agents[0];
    let keeper = agent.keeper_pids();
    for _ in 0..4 {
        kill_dataplane(agent)?;
    }
    let anew = || Ok(agent.keeper_pids().len() == 1 && agent.keeper_pids() != keeper);
    checks::eventually("another keeper is at work", Duration::from_secs(10), anew)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(10))?;
    Ok(())
}

#[test]
fn a_data_plane_is_taken_over_without_a_loss() -> Result<()> {
    let (cluster, mut processes) = external()?;
    let Cluster { agents, lab, .. } = &cluster;
    let (a, b) = (lab.pod(0), lab.pod(1));
    let before = handshakes(&agents[1], "initiated")?;
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 120 << 20, Some(30 << 20))?;
    let answers = pinged_while(a, b, || {
        for _ in 0..2 {
            let next = agents[0].take_over_dataplane()?;
            let mut old = std::mem::replace(&mut processes[0], next);
            // The first, which has taken nothing over, ends; the second waits to be ended.
            let gone = || Ok(old.exited() == Some(0) || agents[0].keeper_pids().len() == 1);
            checks::eventually("the old one is out of work", checks::EVENT_TIMEOUT, gone)?;
            thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    })?;
    let received = transfer.join()?;
    println!(
        "taken over twice: {} of {} pings (one each ms) were lost; the transfer stood for {:.0} ms at \
         most",
        answers.sent - answers.received,
        answers.sent,
        received.longest_pause * 1e3
    );
    ensure!(answers.complete(), "{} of {} answered", answers.received, answers.sent);
    ensure!(agents[0].keeper_pids() == [processes[0].pid()], "somebody else is at work");
    ensure!(handshakes(&agents[0], "initiated")? == 0, "the last one has made a new session");
    ensure!(
        handshakes(&agents[1], "initiated")? == before,
        "the other node has made a new session"
    );
    ensure!(agents[0].metrics()?.sum("skein_dataplane_restarts_total", &[]) == 2.0);

    // Where nobody is to be taken over from, it begins anew.
    processes[0].kill();
    processes[0] = agents[0].take_over_dataplane()?;
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(10))?;
    Ok(())
}

/// As a new pod does on a node beside the old one: the data process first, or the agent.
#[test]
fn an_agent_takes_the_place_of_another_and_pods_do_not_notice() -> Result<()> {
    let (mut cluster, mut processes) = external()?;
    let Cluster { agents, lab, .. } = &mut cluster;
    let (a, b) = (lab.pod(0), lab.pod(1));
    let agent = &mut agents[0];
    let waits = |process: &Process| -> Result<bool> {
        let words = std::fs::read(format!("/proc/{}/cmdline", process.pid()))?;
        Ok(words.starts_with(b"skein-agent\0hold\0"))
    };
    let answers = pinged_while(a, b, || {
        let mut first = agent.take_over()?;
        let gone = || Ok(first.exited() == Some(0));
        checks::eventually(
            "the first, which takes nothing over, ends",
            checks::EVENT_TIMEOUT,
            gone,
        )?;
        let next = agent.take_over_dataplane()?;
        let mut old = std::mem::replace(&mut processes[0], next);
        let gone = || Ok(old.exited() == Some(0));
        checks::eventually("so does its data process", checks::EVENT_TIMEOUT, gone)?;
        let mut second = agent.take_over()?;
        checks::eventually("the second waits", checks::EVENT_TIMEOUT, || waits(&second))?;
        let next = agent.take_over_dataplane()?;
        let third = std::mem::replace(&mut processes[0], next);
        let idle = || Ok(!agent.keeper_pids().contains(&third.pid()));
        checks::eventually("its data process waits", checks::EVENT_TIMEOUT, idle)?;
        ensure!(second.stop(checks::EVENT_TIMEOUT)? == 0, "it does not end when it is asked");
        Ok(())
    })?;
    ensure!(answers.complete(), "{} of {} answered", answers.received, answers.sent);
    ensure!(agent.http("/readyz")?.status == 200);
    ensure!(agent.keeper_pids() == [processes[0].pid()], "somebody else is at work");
    // Alone, too, and with settings that the data process that runs cannot take.
    agent.set("dataplane.bundling", false);
    let old = agent.replace()?;
    drop(old);
    let gone = || Ok(processes[0].exited() == Some(0));
    checks::eventually("the data process makes room", checks::EVENT_TIMEOUT, gone)?;
    processes[0] = agent.start_dataplane()?;
    agent.wait_ready()?;
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
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
    checks::eventually("it is ready", checks::EVENT_TIMEOUT, ready)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    checks::transfer(b, a, Family::V6, 1 << 20)?;
    Ok(())
}
