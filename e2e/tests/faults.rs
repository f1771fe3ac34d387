//! What an underlay, a host and its other programs do to a network, and what comes of it: with figures.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use skein_e2e::checks;
use skein_e2e::lab::agent::{Agent, Cluster};
use skein_e2e::lab::link::Offloads;
use skein_e2e::lab::process::Process;
use skein_e2e::lab::{Family, Plan};
use skein_e2e::load::ping::{Ping, ping};
use skein_e2e::load::transfer::Transfer;

/// The MTU of the path to the other node, where the agent knows of a smaller one.
fn path_mtu(agent: &Agent) -> Result<Option<u64>> {
    let report = agent.report()?;
    Ok(report["peers"][0]["path_mtu"].as_u64())
}

/// Frames that are too long vanish in the switch, without a word: a tunnel or a wrong setting on the way.
#[test]
fn a_path_that_becomes_narrow_is_found_out_and_transfers_go_on() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    let (a, b) = (lab.pod(0), lab.pod(1));
    checks::transfer(a, b, Family::V4, 4 << 20)?;
    ensure!(path_mtu(&agents[0])?.is_none(), "the path is as wide as the link");

    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 200 << 20, Some(10 << 20))?;
    thread::sleep(Duration::from_secs(2));
    lab.switch()?.ip(&format!("link set {} mtu 1400", lab.nodes[1].port()))?;
    let received = transfer.join().context("the transfer over the narrow path")?;
    println!(
        "the path became narrow: the transfer stood for {:.1} s at most",
        received.longest_pause
    );
    ensure!(received.longest_pause < 15.0, "{} s", received.longest_pause);

    // 1400 less 60 for the overlay; a bridge lets frames pass that are 4 bytes longer, for a VLAN's tag.
    let found = path_mtu(&agents[0])?.context("the path counts as wide")?;
    ensure!((1332..=1344).contains(&found), "{found}");
    // The port takes nothing longer from its cable, either.
    ensure!(path_mtu(&agents[1])?.is_some_and(|back| back.abs_diff(found) < 16), "the way back");
    ensure!(agents[0].metrics()?.sum("skein_narrow_paths", &[]) == 1.0);
    let routed = || {
        let routes = lab.nodes[0].ns.ip("route show proto 77")?;
        Ok(routes.contains(&format!("mtu {found}")))
    };
    checks::eventually("the route says so", Duration::from_secs(5), routed)?;

    // Whoever forbids fragments is told, and what fits arrives.
    let whole = |payload| Ping { count: 3, payload, whole: true, ..Ping::default() };
    let answers = ping(&a.ns, b.address(Family::V4), whole(1380))?;
    ensure!(answers.received == 0 && answers.text.contains("mtu"), "{}", answers.text);
    let answers = ping(&a.ns, b.address(Family::V4), whole(1280))?;
    ensure!(answers.complete(), "{}", answers.text);
    checks::transfer(a, b, Family::V4, 8 << 20)?;
    checks::transfer(b, a, Family::V4, 8 << 20)?;
    checks::transfer(a, b, Family::V6, 1 << 20).map(drop)
}

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
    let noticed = seconds_until(|| not_well(&cluster.agents[0]));
    // Longer than a session may be silent.
    thread::sleep(Duration::from_secs(20));
    signal(Signal::CONT)?;
    let back = seconds_until(|| Ok(checks::reaches(a, b, Family::V4).is_ok()))?;
    let received = transfer.join()?;
    println!(
        "suspended for 20 s: noticed after {:.1} s, back {back:.1} s after it went on; the transfer \
         stood for {:.1} s",
        noticed?, received.longest_pause
    );
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
        ensure!(received.longest_pause < 8.0, "{what}: {} s", received.longest_pause);
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
    deaf.nft(&format!(
        "add table ip deaf\nadd chain ip deaf in {{ type filter hook prerouting priority raw ; }}\n\
         add rule ip deaf in ip saddr {from} udp dport 1-65535 drop\n"
    ))?;
    // Whatever there is to send: an idle path is nobody's trouble.
    let mut sends = a.ns.command("ping");
    sends.args(["-i", "0.2", "-w", "20", &b.v4.to_string()]);
    let mut sends = Process::start(&mut sends, &cluster.lab.directory().join("ping.log"))?;
    for agent in &cluster.agents {
        let noticed = seconds_until(|| not_well(agent))?;
        let report = agent.report()?;
        let peer = &report["peers"][0];
        println!(
            "{}: after {noticed:.1} s {} ({})",
            agent.record.name, peer["state"], peer["reason"]
        );
        ensure!(noticed < 10.0, "{noticed} s");
        ensure!(peer["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{peer}");
        let told = agent.metrics()?.sum("skein_peers", &["state=\"unreachable\""]);
        ensure!(told == 1.0, "{told} in the metrics");
    }
    sends.kill();
    deaf.sh("nft delete table ip deaf")?;
    let back = seconds_until(|| Ok(checks::reaches(a, b, Family::V4).is_ok()))?;
    println!("back {back:.1} s after it could be heard again");
    ensure!(back < 10.0, "{back} s");
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn others_that_want_the_whole_cpu_cost_time_and_no_packet() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let stop = AtomicBool::new(false);
    let (answers, received) = thread::scope(|scope| -> Result<_> {
        for _ in 0..2 * thread::available_parallelism()?.get() {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let load = || -> Result<_> {
            let requests = Ping { count: 300, interval_ms: 10, ..Ping::default() };
            let answers = ping(&a.ns, b.address(Family::V4), requests)?;
            Ok((answers, checks::transfer(a, b, Family::V4, 64 << 20)?))
        };
        let done = load();
        stop.store(true, Ordering::Relaxed);
        done
    })?;
    println!(
        "two busy threads a core beside it: {} of {} pings answered, in {:.1} ms; 64 MiB took {:.1} s",
        answers.received,
        answers.sent,
        answers.mean_ms.unwrap_or_default(),
        received.seconds
    );
    ensure!(answers.complete(), "{}", answers.text);
    Ok(())
}

#[test]
fn without_descriptors_to_spare_traffic_goes_on() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let agent = &cluster.agents[0];
    let limit = |current: u64| -> Result<()> {
        for pid in agent.pids().into_iter().filter_map(Pid::from_raw) {
            let maximum = getrlimit(Resource::Nofile).maximum;
            let current = Some(current);
            prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum })?;
        }
        Ok(())
    };
    limit(4)?;
    ensure!(agent.http("/healthz").is_err(), "the limit has no effect");
    let requests = Ping { count: 100, interval_ms: 10, ..Ping::default() };
    let answers = ping(&a.ns, b.address(Family::V4), requests)?;
    ensure!(answers.complete(), "{}", answers.text);
    checks::transfer(a, b, Family::V4, 32 << 20)?;
    limit(1024)?;
    checks::eventually("it answers again", Duration::from_secs(5), || {
        Ok(agent.http("/metrics").is_ok_and(|answer| answer.status == 200))
    })?;
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
