//! What a host has too little of: descriptors, CPU, memory, room in buffers and on disks.

use std::fs;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use skein_lab::agent::Cluster;
use skein_lab::cgroup::MemoryLimit;
use skein_lab::checks;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::transfer::Transfer;
use skein_lab::process::resident_bytes;
use skein_lab::{Family, Lab, Offloads, Plan};

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
    checks::eventually("it answers again", checks::EVENT_TIMEOUT, || {
        Ok(agent.http("/metrics").is_ok_and(|answer| answer.status == 200))
    })?;
    let complaints = fs::read_to_string(agent.log())?.matches("cannot accept").count();
    println!("without descriptors for seconds: {complaints} lines in the log say so");
    ensure!((1..=3).contains(&complaints), "{complaints} lines");
    checks::all_reach_all(&cluster.lab)
}

/// The smallest buffer that can be configured: what comes in a burst is lost, counted, and sent again by TCP.
#[test]
fn a_starved_receive_buffer_loses_counts_and_recovers() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::new(&plan)?, Family::V4)?;
    cluster.agents[1].set("underlay.receive_buffer", 64 << 10);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let requests = Ping { count: 100, interval_ms: 10, ..Ping::default() };
    let answers = ping(&a.ns, b.address(Family::V4), requests)?;
    let received = checks::transfer(a, b, Family::V4, 4 << 20)?;
    let back = checks::transfer(b, a, Family::V6, 4 << 20)?;
    let metrics = cluster.agents[1].metrics()?;
    let lost = metrics.sum("skein_receive_queue_overflow_total", &[]);
    println!(
        "a receive buffer of 64 KiB: {} of {} gentle pings answered; 4 MiB took {:.1} s in (standing \
         for {:.1} s at most) and {:.1} s out; the kernel dropped {lost} datagrams, and that is counted",
        answers.received, answers.sent, received.seconds, received.longest_pause, back.seconds
    );
    ensure!(answers.complete(), "{}", answers.text);
    ensure!(lost > 0.0, "nothing was lost");
    ensure!(metrics.sum("skein_peers", &["state=\"unreachable\""]) == 0.0, "the peer is away");
    ensure!(metrics.sum("skein_narrow_paths", &[]) == 0.0, "taken for a narrow path");

    let code = cluster.agents[1].stop()?;
    ensure!(code == 0, "the agent ended with code {code}");
    cluster.agents[1].set("underlay.receive_buffer", 8 << 20);
    cluster.agents[1].start()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    let whole = checks::transfer(a, b, Family::V4, 4 << 20)?;
    println!("with 8 MiB again: {:.1} s", whole.seconds);
    Ok(())
}

/// The kernel kills what exceeds its cgroup's limit: the keeper, which is in another, starts the next one.
#[test]
fn a_data_process_that_is_killed_for_its_memory_is_replaced() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let agent = &cluster.agents[1];
    let before = agent.dataplane_pids();
    let pid = *before.first().context("no data process")?;
    let used = resident_bytes(pid)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let limit = MemoryLimit::new(cluster.lab.nodes[1].ns.name(), pid, 128 << 10)?;
    // It touches more of its buffers as more is under way at once.
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 200 << 20, None)?;
    let took = checks::eventually("it is killed and replaced", Duration::from_secs(20), || {
        Ok(!agent.dataplane_pids().contains(&pid) && agent.report().is_ok())
    })?;
    let kills = limit.kills()?;
    let received = transfer.join()?;
    println!(
        "a data process of {:.1} MiB that may touch 128 KiB more: killed by the kernel ({kills} times) and \
         replaced {:.1} s later; the transfer stood for {:.0} ms at most",
        used as f64 / f64::from(1 << 20),
        took.as_secs_f64(),
        received.longest_pause * 1e3
    );
    ensure!(kills > 0, "the kernel has killed nothing");
    ensure!(
        received.longest_pause < checks::MAX_INTERRUPTION,
        "The transfer was interrupted for {} s.",
        received.longest_pause
    );
    checks::all_reach_all(&cluster.lab)
}

/// The state directory on a disk that is full: what is kept there is late, and nothing else.
#[test]
fn a_full_disk_stops_no_traffic() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    let state = cluster.agents[0].state_directory();
    fs::create_dir_all(&state)?;
    // In the mount namespace of each of its commands.
    let mount = format!("mount -t tmpfs -o size=64k,mode=0700 none {}", state.display());
    cluster.agents[0].prelude = Some(mount);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let Cluster { agents, lab, .. } = &cluster;
    let pid = agents[0].control_pid().context("no agent")?;
    let inside = format!("/proc/{pid}/root{}/rubbish", state.display());
    let full = fs::write(&inside, vec![0; 1 << 20]).err().context("the disk is not full")?;
    ensure!(full.kind() == ErrorKind::StorageFull, "{full}");

    let (a, b) = (lab.pod(0), lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 60 << 20, Some(10 << 20))?;
    thread::sleep(Duration::from_secs(1));
    let killed = agents[0].dataplane_pids();
    let pid = killed.first().and_then(|pid| Pid::from_raw(*pid)).context("no data process")?;
    kill_process(pid, Signal::KILL)?;
    let received = transfer.join()?;
    // Records take effect, though the last good ones cannot be kept.
    agents[0].remove_record(&agents[1].record.name)?;
    let cut = || Ok(checks::does_not_reach(a, b, Family::V4).is_ok());
    checks::eventually("a removed node is cut off", checks::EVENT_TIMEOUT, cut)?;
    agents[0].put_record(&agents[1].record)?;
    let back = checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    println!(
        "the disk of the state directory full: the transfer stood for {:.0} ms at most, with the data \
         process killed meanwhile; a record that came back was in force after {:.1} s",
        received.longest_pause * 1e3,
        back.as_secs_f64()
    );
    ensure!(
        received.longest_pause < checks::MAX_INTERRUPTION,
        "The transfer was interrupted for {} s.",
        received.longest_pause
    );
    ensure!(agents[0].http("/readyz")?.status == 200, "it is not ready");
    fs::remove_file(&inside)?;
    checks::all_reach_all(lab)
}
