//! Scarce resources of a host: descriptors, CPU, memory, socket buffers, disk space.

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
fn busy_cpu_loses_no_packet() -> Result<()> {
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
        "with two busy threads per core: {} of {} pings answered, in {:.1} ms; 64 MiB took {:.1} s",
        answers.received,
        answers.sent,
        answers.mean_ms.unwrap_or_default(),
        received.seconds
    );
    ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    Ok(())
}

#[test]
fn traffic_continues_without_free_descriptors() -> Result<()> {
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
    ensure!(agent.http("/healthz").is_err(), "The limit has no effect.");
    let requests = Ping { count: 100, interval_ms: 10, ..Ping::default() };
    let answers = ping(&a.ns, b.address(Family::V4), requests)?;
    ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    checks::transfer(a, b, Family::V4, 32 << 20)?;
    limit(1024)?;
    checks::eventually("the agent answers again", checks::EVENT_TIMEOUT, || {
        Ok(agent.http("/metrics").is_ok_and(|answer| answer.status == 200))
    })?;
    let complaints = fs::read_to_string(agent.log())?.matches("cannot accept").count();
    println!("the log has {complaints} lines about missing descriptors");
    ensure!((1..=3).contains(&complaints), "The log has {complaints} lines instead of 1 to 3.");
    checks::all_reach_all(&cluster.lab)
}

/// The smallest receive buffer that can be configured loses datagrams of a burst. They are counted,
/// and TCP retransmits them.
#[test]
fn losses_of_a_small_receive_buffer_are_counted() -> Result<()> {
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
        "receive buffer of 64 KiB: {} of {} slow pings answered; 4 MiB took {:.1} s to the node \
         (longest interruption {:.1} s) and {:.1} s from the node; {lost} dropped datagrams counted",
        answers.received, answers.sent, received.seconds, received.longest_pause, back.seconds
    );
    ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    ensure!(lost > 0.0, "No datagram was lost, so the buffer was not too small.");
    let unreachable = metrics.sum("skein_peers", &["state=\"unreachable\""]);
    ensure!(unreachable == 0.0, "The losses made the peer unreachable.");
    let reduced = metrics.sum("skein_narrow_paths", &[]);
    ensure!(reduced == 0.0, "The losses reduced the path MTU.");

    let code = cluster.agents[1].stop()?;
    ensure!(code == 0, "The agent ended with code {code}.");
    cluster.agents[1].set("underlay.receive_buffer", 8 << 20);
    cluster.agents[1].start()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    let whole = checks::transfer(a, b, Family::V4, 4 << 20)?;
    println!("with 8 MiB again: {:.1} s", whole.seconds);
    Ok(())
}

/// The kernel kills a data process that exceeds the memory limit of its cgroup; the keeper, which
/// is in another cgroup, restarts it.
#[test]
fn data_process_killed_for_its_memory_is_replaced() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let agent = &cluster.agents[1];
    let before = agent.dataplane_pids();
    let pid = *before.first().context("no data process")?;
    let used = resident_bytes(pid)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let limit = MemoryLimit::new(cluster.lab.nodes[1].ns.name(), pid, 128 << 10)?;
    // A transfer at full speed makes the data process use more of its buffers.
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 200 << 20, None)?;
    let took = checks::eventually("the data process is replaced", Duration::from_secs(20), || {
        Ok(!agent.dataplane_pids().contains(&pid) && agent.report().is_ok())
    })?;
    let kills = limit.kills()?;
    let received = transfer.join()?;
    println!(
        "data process of {:.1} MiB with a limit 128 KiB higher: killed by the kernel {kills} times, \
         replaced after {:.1} s; longest interruption of the transfer {:.0} ms",
        used as f64 / f64::from(1 << 20),
        took.as_secs_f64(),
        received.longest_pause * 1e3
    );
    ensure!(kills > 0, "The kernel killed no process.");
    checks::interruption_is_bounded(&received)?;
    checks::all_reach_all(&cluster.lab)
}

/// The state directory is on a full disk: state cannot be stored, but traffic and changes of
/// records are not affected.
#[test]
fn full_disk_does_not_stop_traffic() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    let state = cluster.agents[0].state_directory();
    fs::create_dir_all(&state)?;
    // Each process of the agent mounts it in its own mount namespace.
    let mount = format!("mount -t tmpfs -o size=64k,mode=0700 none {}", state.display());
    cluster.agents[0].prelude = Some(mount);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let Cluster { agents, lab, .. } = &cluster;
    let pid = agents[0].control_pid().context("no agent")?;
    let inside = format!("/proc/{pid}/root{}/rubbish", state.display());
    let full = fs::write(&inside, vec![0; 1 << 20]).err().context("the disk is not full")?;
    ensure!(full.kind() == ErrorKind::StorageFull, "The write failed for another reason: {full}");

    let (a, b) = (lab.pod(0), lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 60 << 20, Some(10 << 20))?;
    thread::sleep(Duration::from_secs(1));
    let killed = agents[0].dataplane_pids();
    let pid = killed.first().and_then(|pid| Pid::from_raw(*pid)).context("no data process")?;
    kill_process(pid, Signal::KILL)?;
    let received = transfer.join()?;
    // Changed records take effect, although the last good records cannot be stored.
    agents[0].remove_record(&agents[1].record.name)?;
    let cut = || Ok(checks::does_not_reach(a, b, Family::V4).is_ok());
    checks::eventually("a removed node is cut off", checks::EVENT_TIMEOUT, cut)?;
    agents[0].put_record(&agents[1].record)?;
    let back = checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    println!(
        "full disk of the state directory, data process killed: longest interruption of the \
         transfer {:.0} ms; a record that was added again was active after {:.1} s",
        received.longest_pause * 1e3,
        back.as_secs_f64()
    );
    checks::interruption_is_bounded(&received)?;
    ensure!(agents[0].http("/readyz")?.status == 200, "The agent is not ready.");
    fs::remove_file(&inside)?;
    checks::all_reach_all(lab)
}
