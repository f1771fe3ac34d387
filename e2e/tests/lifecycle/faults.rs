//! What an underlay, a host and its other programs do to a network, and what comes of it: with figures.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::load::transfer::Transfer;
use skein_lab::process::Process;
use skein_lab::{Family, Lab, Plan, checks};

#[test]
fn a_host_that_was_suspended_is_back_at_once() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 100 << 20, Some(8 << 20))?;
    thread::sleep(Duration::from_secs(1));
    let pids = cluster.agents[1].pids();
    ensure!(pids.len() >= 3, "{pids:?}");
    let signal = |signal| {
        pids.iter()
            .filter_map(|&pid| Pid::from_raw(pid))
            .try_for_each(|pid| kill_process(pid, signal))
    };
    signal(Signal::STOP)?;
    let noticed = seconds_until(|| not_well(&cluster.agents[0]))?;
    // Longer than a session may be silent.
    thread::sleep(Duration::from_secs(20));
    signal(Signal::CONT)?;
    let back = seconds_until(|| Ok(checks::reaches(a, b, Family::V4).is_ok()))?;
    let received = transfer.join()?;
    println!(
        "suspended for 20 s: noticed after {:.1} s, back {back:.1} s after it went on; the transfer \
         stood for {:.1} s",
        noticed, received.longest_pause
    );
    ensure!(noticed < 5.0, "{noticed} s");
    ensure!(back < 5.0, "{back} s");
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn both_ends_may_lose_their_data_planes_at_once() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    for (what, keepers) in [("data processes", false), ("keepers, too", true)] {
        let transfer = Transfer::start(&a.ns, &b.ns, to, 60 << 20, Some(20 << 20))?;
        thread::sleep(Duration::from_secs(1));
        for agent in &cluster.agents {
            let mut pids = agent.dataplane_pids();
            if keepers {
                pids.splice(0..0, agent.keeper_pids());
            }
            for pid in pids.into_iter().filter_map(Pid::from_raw) {
                // A data process may have ended with its keeper.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let received = transfer.join()?;
        println!("{what}, of both ends at once: it stood for {:.2} s", received.longest_pause);
        ensure!(
            received.longest_pause < checks::MAX_INTERRUPTION,
            "{what}: the transfer was interrupted for {} s.",
            received.longest_pause
        );
    }
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn a_path_that_is_dead_in_one_direction_is_told_within_seconds() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let deaf = &cluster.lab.nodes[1].ns;
    let from = cluster.lab.nodes[0].underlay(Family::V4);
    // Whatever there is to send: an idle path is nobody's trouble.
    let mut sends = a.ns.command("ping");
    sends.args(["-i", "0.2", "-w", "30", &b.v4.to_string()]);
    let mut sends = Process::start(&mut sends, &cluster.lab.directory().join("ping.log"))?;
    thread::sleep(Duration::from_secs(1));
    let cut = Instant::now();
    deaf.nft(&format!(
        "add table ip deaf\nadd chain ip deaf in {{ type filter hook prerouting priority raw ; }}\n\
         add rule ip deaf in ip saddr {from} udp dport 1-65535 drop\n"
    ))?;
    for agent in &cluster.agents {
        seconds_until(|| not_well(agent))?;
        let noticed = cut.elapsed().as_secs_f64();
        let report = agent.report()?;
        let (peer, told) = (&report["peers"][0], &report["unreachable"][0]["reason"]);
        println!(
            "{}: after {noticed:.1} s {} ({})",
            agent.record.name, peer["state"], peer["reason"]
        );
        ensure!(noticed < 20.0, "The peer was unreachable after {noticed} s.");
        ensure!(peer["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{peer}");
        ensure!(*told == peer["reason"], "{told}");
        let metrics = agent.metrics()?;
        let told = metrics.sum("skein_peers", &["state=\"unreachable\""]);
        ensure!(told == 1.0, "{told} in the metrics");
        let told = metrics.sum("skein_peers_unreachable", &[]);
        ensure!(told == 1.0, "{told} in the metrics with a reason");
    }
    sends.kill();
    deaf.sh("nft delete table ip deaf")?;
    let back = seconds_until(|| Ok(checks::reaches(a, b, Family::V4).is_ok()))?;
    println!("back {back:.1} s after it could be heard again");
    ensure!(back < 10.0, "{back} s");
    checks::all_reach_all(&cluster.lab)
}

/// A cable that is out and in again, ten times within seconds, carries on where it was.
#[test]
fn a_link_that_flaps_costs_what_it_is_away() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 80 << 20, Some(8 << 20))?;
    thread::sleep(Duration::from_secs(1));
    for _ in 0..10 {
        cluster.lab.set_cable(1, false)?;
        thread::sleep(Duration::from_millis(200));
        cluster.lab.set_cable(1, true)?;
        thread::sleep(Duration::from_millis(300));
    }
    let back = checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    let received = transfer.join()?;
    println!(
        "cable out for 0.2 s, ten times in 5 s: pings answered {:.1} s after the last; the transfer stood \
         for {:.1} s at most",
        back.as_secs_f64(),
        received.longest_pause
    );
    // TCP waits ever longer before it tries again.
    ensure!(received.longest_pause < 15.0, "{} s", received.longest_pause);
    checks::all_reach_all(&cluster.lab)
}

/// There and back again, while connections go on. A node that listens on whatever address it has reckons with
/// longer headers: its MTU is less than the other's.
#[test]
fn an_endpoint_that_moves_takes_connections_with_it() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[1].set("underlay.addresses", vec!["0.0.0.0".to_owned()]);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 60 << 20, Some(10 << 20))?;
    let node = &cluster.lab.nodes[1].ns;
    node.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
    for (now, next) in [("192.0.2.2", "192.0.2.77"), ("192.0.2.77", "192.0.2.2")] {
        thread::sleep(Duration::from_millis(1500));
        node.ip(&format!("address add {next}/24 dev eth0"))?;
        node.ip(&format!("address del {now}/24 dev eth0"))?;
        let mut record = cluster.agents[1].record.clone();
        record.endpoints = vec![format!("{next}:51900")];
        cluster.agents[0].put_record(&record)?;
    }
    let received = transfer.join()?;
    println!(
        "moved there and back: the transfer stood for {:.2} s at most",
        received.longest_pause
    );
    ensure!(
        received.longest_pause < checks::MAX_INTERRUPTION,
        "The transfer was interrupted for {} s.",
        received.longest_pause
    );
    checks::all_reach_all(&cluster.lab)
}

/// Whether the agent says that something is wrong with its peer.
fn not_well(agent: &Agent) -> Result<bool> {
    Ok(agent.report()?["peers"][0]["state"] == "unreachable")
}

/// How long it takes, up to a minute.
fn seconds_until(is_so: impl Fn() -> Result<bool>) -> Result<f64> {
    Ok(checks::eventually("the change", Duration::from_secs(60), is_so)?.as_secs_f64())
}
