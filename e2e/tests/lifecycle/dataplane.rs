//! Start, loss, replacement and take-over of the data process, with and without a control process.

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

/// Starts agents whose data processes are started by the test (`dataplane.mode` is `external`).
fn external() -> Result<(Cluster, Vec<Process>)> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents.iter_mut().for_each(|agent| agent.set("dataplane.mode", "external"));
    let processes = cluster.agents.iter().map(Agent::start_dataplane).collect::<Result<_>>()?;
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    Ok((cluster, processes))
}

/// Pings 1000 times per second while `work` runs.
fn pinged_while(from: &Pod, to: &Pod, work: impl FnOnce() -> Result<()>) -> Result<Answers> {
    thread::scope(|scope| {
        let many = Ping { count: 3000, interval_ms: 1, ..Ping::default() };
        let pings = scope.spawn(move || ping(&from.ns, to.address(Family::V4), many));
        thread::sleep(Duration::from_millis(500));
        work()?;
        pings.join().ok().context("the sender panicked")?
    })
}

/// Checks that every ping was answered.
fn all_answered(answers: &Answers) -> Result<()> {
    let Answers { received, sent, .. } = answers;
    ensure!(answers.complete(), "Only {received} of {sent} pings were answered.");
    Ok(())
}

fn only_dataplane(agent: &Agent) -> Result<i32> {
    match agent.dataplane_pids()[..] {
        [pid] => Ok(pid),
        ref pids => Err(anyhow::anyhow!("there is not exactly one data process: {pids:?}")),
    }
}

fn revision(agent: &Agent) -> Result<u64> {
    agent.status()?["dataplane"]["revision"].as_u64().context("no revision")
}

#[test]
fn external_data_process_outlives_the_control_process() -> Result<()> {
    let (mut cluster, mut processes) = external()?;
    let Cluster { agents, lab, .. } = &mut cluster;
    for (agent, process) in agents.iter().zip(&processes) {
        let keepers = agent.keeper_pids();
        ensure!(keepers == [process.pid()], "Another data process is active: {keepers:?}");
    }
    let (a, b) = (lab.pod(0), lab.pod(1));
    checks::transfer(a, b, Family::V6, 4 << 20)?;
    let (before, pid) = (revision(&agents[0])?, only_dataplane(&agents[0])?);
    let answers = pinged_while(a, b, || {
        agents[0].kill_control();
        thread::sleep(Duration::from_millis(500));
        agents[0].start()
    })?;
    all_answered(&answers)?;
    ensure!(only_dataplane(&agents[0])? == pid, "The data process was replaced.");
    ensure!(revision(&agents[0])? > before, "The next control process has not taken over.");
    agents[0].remove_record(&agents[1].record.name)?;
    let cut = || Ok(checks::does_not_reach(a, b, Family::V4).is_ok());
    checks::eventually("a removed node is cut off", checks::EVENT_TIMEOUT, cut)?;

    // The agent does not stop an external data process.
    let code = agents[0].stop()?;
    ensure!(code == 0, "The agent ended with code {code}.");
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
    ensure!(why.contains("data process"), "The reason does not name the data process: {why}");
    ensure!(agent.http("/healthz")?.status == 200, "The control process is not alive.");
    let metrics = agent.metrics()?;
    for name in ["skein_ready", "skein_dataplane_up"] {
        let is_zero = metrics.0.contains(&format!("\n{name} 0\n"));
        ensure!(is_zero, "The metric {name} is not 0: {}", metrics.0);
    }
    processes[0] = agent.start_dataplane()?;
    answers(200)?;
    ensure!(agent.metrics()?.sum("skein_dataplane_restarts_total", &[]) == 1.0);
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    Ok(())
}

#[test]
fn kept_data_process_runs_without_an_agent() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("dataplane.keep_on_exit", true);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    let agent = &mut agents[0];
    let kept = only_dataplane(agent)?;
    let answers = pinged_while(lab.pod(0), lab.pod(1), || {
        let code = agent.stop()?;
        ensure!(code == 0, "The agent ended with code {code}.");
        thread::sleep(Duration::from_millis(500));
        ensure!(only_dataplane(agent)? == kept, "The data process was replaced.");
        agent.set("dataplane.keep_on_exit", false);
        agent.start()
    })?;
    all_answered(&answers)?;
    ensure!(only_dataplane(agent)? == kept, "The data process was replaced.");
    // An agent without keep_on_exit stops the data process, although another agent started it.
    agent.stop()?;
    let pids = agent.dataplane_pids();
    ensure!(pids.is_empty(), "Data processes still run: {pids:?}");
    Ok(())
}

/// Returns the number of handshakes with `result` since the start of the data process.
fn handshakes(agent: &Agent, result: &str) -> Result<u64> {
    let report = agent.report()?;
    let counts = report["handshakes"].as_array().context("no handshakes")?;
    let found = counts.iter().find(|count| count["result"] == result);
    found.and_then(|count| count["count"].as_u64()).with_context(|| format!("no {result}"))
}

/// Kills the data process and waits until the next one answers.
fn kill_dataplane(agent: &Agent) -> Result<()> {
    let before = only_dataplane(agent)?;
    kill_process(Pid::from_raw(before).context("no process")?, Signal::KILL)?;
    let again =
        || Ok(only_dataplane(agent).is_ok_and(|pid| pid != before) && agent.report().is_ok());
    checks::eventually("another data process answers", checks::EVENT_TIMEOUT, again).map(drop)
}

#[test]
fn killed_data_process_is_replaced_without_an_outage() -> Result<()> {
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
        let sent = answers.sent;
        println!("kill {kill} of the data process: {lost} of {sent} pings (one per ms) lost");
        ensure!(lost <= 50, "{lost} pings were lost: {}", answers.text);
    }
    let received = transfer.join()?;
    let pause = received.longest_pause * 1e3;
    println!("longest interruption of the transfer {pause:.0} ms");
    checks::interruption_is_bounded(&received)?;
    ensure!(ours.keeper_pids() == keeper, "The keeper was replaced, too.");
    ensure!(handshakes(ours, "initiated")? == 0, "The last data process started a handshake.");
    ensure!(handshakes(theirs, "initiated")? == before, "The other node started a handshake.");
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
            ensure!(mode == 0o600, "The socket has mode {mode:o} instead of 600.");
        }
        Ok(())
    })?;
    all_answered(&answers)?;
    fs::remove_file(renamed)?;
    ensure!(only_dataplane(&agents[0])? == pid, "The data process was replaced.");
    // The next data process listens on the new socket, and the next control process finds it there.
    kill_dataplane(&agents[0])?;
    let initiated = handshakes(&agents[0], "initiated")?;
    ensure!(initiated == 0, "The next data process started {initiated} handshakes.");
    let pid = only_dataplane(&agents[0])?;
    agents[0].kill_control();
    agents[0].start()?;
    ensure!(
        only_dataplane(&agents[0])? == pid,
        "The control process did not find the data process."
    );
    let code = agents[0].stop()?;
    ensure!(code == 0 && !socket.exists(), "The socket was not removed (exit code {code}).");
    Ok(())
}

/// A keeper restarts a failing data process at most three times in a row, and exits at the next
/// failure. The agent then starts another keeper.
#[test]
fn data_process_that_ends_repeatedly_gets_another_keeper() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let agent = &cluster.agents[0];
    let keeper = agent.keeper_pids();
    for _ in 0..4 {
        kill_dataplane(agent)?;
    }
    let is_new = || Ok(agent.keeper_pids().len() == 1 && agent.keeper_pids() != keeper);
    checks::eventually("another keeper runs", Duration::from_secs(10), is_new)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(10))?;
    Ok(())
}

#[test]
fn data_plane_is_taken_over_without_loss() -> Result<()> {
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
            // The first keeper was started without `--take-over`, and exits after the hand-over.
            // The second keeper was started with the option, and stays without a data process.
            let gone = || Ok(old.exited() == Some(0) || agents[0].keeper_pids().len() == 1);
            checks::eventually("the old data process is idle", checks::EVENT_TIMEOUT, gone)?;
            thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    })?;
    let received = transfer.join()?;
    println!(
        "two take-overs: {} of {} pings (one per ms) lost; longest interruption of the transfer \
         {:.0} ms",
        answers.sent - answers.received,
        answers.sent,
        received.longest_pause * 1e3
    );
    all_answered(&answers)?;
    let keepers = agents[0].keeper_pids();
    ensure!(keepers == [processes[0].pid()], "Another data process is active: {keepers:?}");
    let initiated = handshakes(&agents[0], "initiated")?;
    ensure!(initiated == 0, "The last data process started {initiated} handshakes.");
    let initiated = handshakes(&agents[1], "initiated")?;
    ensure!(initiated == before, "The other node started a handshake.");
    ensure!(agents[0].metrics()?.sum("skein_dataplane_restarts_total", &[]) == 2.0);

    // Without a process to take over from, a data process starts without sessions.
    processes[0].kill();
    processes[0] = agents[0].take_over_dataplane()?;
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(10))?;
    Ok(())
}

/// An agent and a data process take over separately, in both orders, like the containers of a new
/// pod.
#[test]
fn agent_takes_over_from_another_without_loss() -> Result<()> {
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
        checks::eventually("the first agent ends", checks::EVENT_TIMEOUT, gone)?;
        let next = agent.take_over_dataplane()?;
        let mut old = std::mem::replace(&mut processes[0], next);
        let gone = || Ok(old.exited() == Some(0));
        checks::eventually("the first data process ends", checks::EVENT_TIMEOUT, gone)?;
        let mut second = agent.take_over()?;
        checks::eventually("the second agent waits", checks::EVENT_TIMEOUT, || waits(&second))?;
        let next = agent.take_over_dataplane()?;
        let third = std::mem::replace(&mut processes[0], next);
        let idle = || Ok(!agent.keeper_pids().contains(&third.pid()));
        checks::eventually("the second data process waits", checks::EVENT_TIMEOUT, idle)?;
        let code = second.stop(checks::EVENT_TIMEOUT)?;
        ensure!(code == 0, "The waiting agent ended with code {code}.");
        Ok(())
    })?;
    all_answered(&answers)?;
    ensure!(agent.http("/readyz")?.status == 200, "The agent is not ready.");
    let keepers = agent.keeper_pids();
    ensure!(keepers == [processes[0].pid()], "Another data process is active: {keepers:?}");
    // Only the agent is replaced. Its settings need a new data process, so that the running one
    // ends.
    agent.set("dataplane.bundling", false);
    let old = agent.replace()?;
    drop(old);
    let gone = || Ok(processes[0].exited() == Some(0));
    checks::eventually("the old data process ends", checks::EVENT_TIMEOUT, gone)?;
    processes[0] = agent.start_dataplane()?;
    agent.wait_ready()?;
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    Ok(())
}

/// A data process that does not answer requests is killed and restarted.
#[test]
fn data_process_that_hangs_is_replaced() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let agent = &cluster.agents[0];
    let before = only_dataplane(agent)?;
    kill_process(Pid::from_raw(before).context("no process")?, Signal::STOP)?;
    let replaced = || Ok(only_dataplane(agent).is_ok_and(|pid| pid != before));
    checks::eventually("another data process runs", Duration::from_secs(20), replaced)?;
    let ready = || Ok(agent.http("/readyz")?.status == 200);
    checks::eventually("the agent is ready", checks::EVENT_TIMEOUT, ready)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    checks::transfer(b, a, Family::V6, 1 << 20)?;
    Ok(())
}
