//! Integrity of data while links fail and processes are killed.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::agent::Cluster;
use skein_lab::checks;
use skein_lab::{Family, Plan};

/// Rate of the transfers, bytes per second.
const RATE: u64 = 25_000_000;

fn sleep_ms(milliseconds: u64) {
    thread::sleep(Duration::from_millis(milliseconds));
}

#[test]
fn files_survive_a_flapping_link() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::all_reach_all(&cluster.lab)?;
    let files =
        Family::BOTH.map(|family| checks::start_transfer(a, b, family, 3 * RATE, Some(RATE)));
    for node in [0, 1, 0, 1] {
        sleep_ms(400);
        cluster.lab.set_cable(node, false)?;
        sleep_ms(200);
        cluster.lab.set_cable(node, true)?;
    }
    for file in files {
        file?.join()?;
    }
    Ok(())
}

/// The data process outlives the control process, and the next control process uses it without the
/// loss of a packet.
#[test]
fn killed_control_process_causes_no_loss() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let before: Vec<_> = cluster.agents.iter().map(|agent| agent.dataplane_pids()).collect();
    ensure!(
        before.iter().all(|pids| pids.len() == 1),
        "A node does not have exactly one data process: {before:?}"
    );

    let Cluster { agents, lab, .. } = &mut cluster;
    let (a, b) = (lab.pod(0), lab.pod(1));
    let file = checks::start_transfer(b, a, Family::V6, 4 * RATE, Some(RATE))?;
    let outcome = thread::scope(|scope| -> Result<_> {
        let duration = Duration::from_secs(4);
        let datagrams =
            scope.spawn(move || checks::datagrams(a, b, Family::V4, 200, 2000, duration));
        sleep_ms(700);
        for agent in &mut *agents {
            agent.kill_control();
        }
        sleep_ms(1000);
        for agent in &mut *agents {
            agent.start()?;
        }
        datagrams.join().ok().context("the sender panicked")?
    })?;
    file.join()?;
    let is_complete = outcome.sent > 4000 && outcome.received == outcome.sent;
    ensure!(is_complete, "Datagrams were lost: {outcome:?}");
    let after: Vec<_> = agents.iter().map(|agent| agent.dataplane_pids()).collect();
    ensure!(before == after, "The data processes changed from {before:?} to {after:?}.");
    // The data process follows the new control process.
    agents[0].remove_record(&agents[1].record.name)?;
    let cut = || Ok(checks::does_not_reach(a, b, Family::V4).is_ok());
    checks::eventually("a removed node is cut off", checks::EVENT_TIMEOUT, cut)?;
    Ok(())
}

#[test]
fn transfer_survives_killed_data_process() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::all_reach_all(&cluster.lab)?;
    for victim in [0, 1] {
        let file = checks::start_transfer(a, b, Family::V4, 3 * RATE, Some(RATE))?;
        sleep_ms(1000);
        let before = cluster.agents[victim].dataplane_pids();
        let pid = before.first().copied().and_then(Pid::from_raw).context("no data process")?;
        kill_process(pid, Signal::KILL)?;
        let received = file.join()?;
        // TCP doubles its retransmission timer while no answer arrives.
        checks::interruption_is_bounded(&received)?;
        let after = cluster.agents[victim].dataplane_pids();
        let is_replaced = after.len() == 1 && after != before;
        ensure!(is_replaced, "The data process was not replaced: {before:?}, then {after:?}");
    }
    // While both ends agree on one of the sessions that they started, a packet may be lost.
    let settled = || Ok(checks::all_reach_all(&cluster.lab).is_ok());
    checks::eventually("all reach all again", Duration::from_secs(10), settled)?;
    checks::mixed_traffic(&cluster.lab, 1 << 20)
}

#[test]
fn transfer_survives_restart_of_agents() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V6)?;
    checks::all_reach_all(&cluster.lab)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    let (a, b) = (lab.pod(0), lab.pod(1));
    let file = checks::start_transfer(a, b, Family::V4, 4 * RATE, Some(RATE))?;
    for agent in agents {
        sleep_ms(800);
        let code = agent.stop()?;
        ensure!(code == 0, "The agent ended with code {code}.");
        agent.start()?;
    }
    let received = file.join()?;
    checks::interruption_is_bounded(&received)?;
    Ok(())
}

/// A slow underlay with a short queue loses packets, and TCP over the overlay retransmits them.
#[test]
fn files_survive_a_congested_underlay() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::all_reach_all(&cluster.lab)?;
    let shape = "tc qdisc add dev eth0 root tbf rate 200mbit burst 64kb latency 2ms";
    cluster.lab.nodes[0].ns.sh(shape)?;
    for family in Family::BOTH {
        checks::transfer(a, b, family, 20 << 20)?;
        checks::transfer(b, a, family, 20 << 20)?;
    }
    Ok(())
}
