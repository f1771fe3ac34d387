//! Faults of the underlay, of a host and of processes. The tests print the measured interruptions.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::load::transfer::Transfer;
use skein_lab::process::Process;
use skein_lab::{Family, Lab, Plan, checks};

#[test]
fn suspended_host_is_reached_within_5_s_after_its_return() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 100 << 20, Some(8 << 20))?;
    thread::sleep(Duration::from_secs(1));
    let pids = cluster.agents[1].pids();
    ensure!(pids.len() >= 3, "The agent has fewer than 3 processes: {pids:?}");
    let signal = |signal| {
        pids.iter()
            .filter_map(|&pid| Pid::from_raw(pid))
            .try_for_each(|pid| kill_process(pid, signal))
    };
    signal(Signal::STOP)?;
    let noticed = seconds_until(|| is_unreachable(&cluster.agents[0]))?;
    // The suspension is longer than the time after which a silent peer is unreachable.
    thread::sleep(Duration::from_secs(20));
    signal(Signal::CONT)?;
    let back = seconds_until(|| Ok(checks::reaches(a, b, Family::V4).is_ok()))?;
    let received = transfer.join()?;
    println!(
        "suspended for 20 s: noticed after {noticed:.1} s, reached {back:.1} s after the end; \
         longest interruption of the transfer {:.1} s",
        received.longest_pause
    );
    ensure!(noticed < 5.0, "The suspended peer was unreachable only after {noticed} s.");
    ensure!(back < 5.0, "The peer was reached only {back} s after the suspension.");
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn transfer_survives_loss_of_both_data_processes() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    for (what, keepers) in [("data processes", false), ("keepers and data processes", true)] {
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
        println!("{what} of both ends killed: interruption {:.2} s", received.longest_pause);
        checks::interruption_is_bounded(&received).context(what)?;
    }
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn path_dead_in_one_direction_is_reported_within_20_s() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let deaf = &cluster.lab.nodes[1].ns;
    let from = cluster.lab.nodes[0].underlay(Family::V4);
    // Pings during the fault, because an idle peer does not become unreachable.
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
        seconds_until(|| is_unreachable(agent))?;
        let noticed = cut.elapsed().as_secs_f64();
        let report = agent.report()?;
        let (peer, reason) = (&report["peers"][0], &report["unreachable"][0]["reason"]);
        println!(
            "{}: after {noticed:.1} s {} ({})",
            agent.record.name, peer["state"], peer["reason"]
        );
        ensure!(noticed < 20.0, "The peer was unreachable only after {noticed} s.");
        let has_reason = peer["reason"].as_str().is_some_and(|reason| !reason.is_empty());
        ensure!(has_reason, "The peer has no reason: {peer}");
        ensure!(
            *reason == peer["reason"],
            "The report has the reason {reason}, not that of {peer}"
        );
        let metrics = agent.metrics()?;
        let count = metrics.sum("skein_peers", &["state=\"unreachable\""]);
        ensure!(count == 1.0, "skein_peers counts {count} unreachable peers instead of 1.");
        let count = metrics.sum("skein_peers_unreachable", &[]);
        ensure!(count == 1.0, "skein_peers_unreachable is {count} instead of 1.");
    }
    sends.kill();
    deaf.sh("nft delete table ip deaf")?;
    let back = seconds_until(|| Ok(checks::reaches(a, b, Family::V4).is_ok()))?;
    println!("reached {back:.1} s after the end of the fault");
    ensure!(back < 10.0, "The peer was reached only {back} s after the end of the fault.");
    checks::all_reach_all(&cluster.lab)
}

/// A cable is disconnected ten times for 0.2 s each; sessions and connections survive.
#[test]
fn connections_survive_a_flapping_link() -> Result<()> {
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
        "cable disconnected ten times for 0.2 s: pings answered {:.1} s after the last time; longest \
         interruption of the transfer {:.1} s",
        back.as_secs_f64(),
        received.longest_pause
    );
    // TCP doubles its retransmission timeout with each retry.
    let pause = received.longest_pause;
    ensure!(pause < 15.0, "The transfer was interrupted for {pause} s.");
    checks::all_reach_all(&cluster.lab)
}

/// The node changes its address and changes it back under traffic. It listens on all addresses, so
/// it assumes the headers of IPv6, and its MTU is smaller than the other node's.
#[test]
fn connections_survive_a_moving_endpoint() -> Result<()> {
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
        "address changed twice: longest interruption of the transfer {:.2} s",
        received.longest_pause
    );
    checks::interruption_is_bounded(&received)?;
    checks::all_reach_all(&cluster.lab)
}

/// Returns whether the agent reports its first peer as unreachable.
fn is_unreachable(agent: &Agent) -> Result<bool> {
    Ok(agent.report()?["peers"][0]["state"] == "unreachable")
}

/// Waits until `is_so` is true, at most 60 s, and returns the time in seconds.
fn seconds_until(is_so: impl Fn() -> Result<bool>) -> Result<f64> {
    Ok(checks::eventually("the change", Duration::from_secs(60), is_so)?.as_secs_f64())
}
