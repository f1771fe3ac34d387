//! The laboratory itself: its links carry packets, and everything is removed.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::checks;
use skein_lab::cni::{same, traces};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::rr;
use skein_lab::{
    Family, Lab, Netns, Offloads, PERMIT_TIMEOUT, Plan, UNDERLAY, Underlay, process, registry,
};

/// Returns the names of objects that this process has created and not removed.
fn left() -> Vec<String> {
    let own = format!("-{}-", std::process::id());
    registry::existing().into_iter().filter(|name| name.contains(&own)).collect()
}

#[test]
fn nodes_pods_and_links_carry_packets_and_are_removed() -> Result<()> {
    for (underlay, offloads) in
        [(Underlay::Direct, Offloads::Ideal), (Underlay::Switch, Offloads::Wire)]
    {
        let lab = Lab::new(&Plan { underlay, offloads, pod_mtu: 1500, ..Plan::default() })?;
        for (node, peer) in [(0, 1), (1, 0)].map(|(a, b)| (&lab.nodes[a], &lab.nodes[b])) {
            node.enable_forwarding()?;
            for family in Family::BOTH {
                let (cidr, via) = (peer.pod_cidr(family), peer.underlay(family));
                node.ns.ip(&format!("route add {cidr} via {via} dev {UNDERLAY}"))?;
            }
        }
        checks::mixed_traffic(&lab, 2 << 20)?;
        let (a, b) = (lab.pod(0), lab.pod(1));
        let to = (b.v4, 7001).into();
        let outcome = rr::run(&a.ns, &b.ns, to, Duration::from_millis(200))?;
        let count = outcome.count;
        ensure!(count > 100, "Only {count} requests were answered.");
        ensure!(outcome.latency.p99 >= outcome.latency.p50, "The percentiles are not ordered.");
    }
    ensure!(left().is_empty(), "The test left: {:?}", left());
    Ok(())
}

#[test]
fn disconnected_cable_stops_traffic_until_reconnected() -> Result<()> {
    let lab = Lab::new(&Plan { pods: 0, ..Plan::default() })?;
    let (node, to) = (&lab.nodes[0].ns, lab.nodes[1].underlay(Family::V6));
    let once = Ping { count: 1, ..Ping::default() };
    let answered = || Ok(ping(node, to, once)?.complete());
    checks::eventually("an answer", checks::EVENT_TIMEOUT, answered)?;
    lab.set_cable(1, false)?;
    ensure!(!ping(node, to, once)?.complete(), "A ping was answered without a cable.");
    lab.set_cable(1, true)?;
    checks::eventually("an answer again", checks::EVENT_TIMEOUT, answered).map(drop)
}

#[test]
fn process_in_a_namespace_ends_with_the_namespace() -> Result<()> {
    let ns = Netns::create("doomed")?;
    let mut child = ns.command("sleep").arg("1000").spawn()?;
    checks::eventually("sleep is inside", checks::EVENT_TIMEOUT, || Ok(!ns.pids().is_empty()))?;
    drop(ns);
    let ended = || Ok(child.try_wait()?.is_some());
    checks::eventually("sleep has ended", checks::EVENT_TIMEOUT, ended)?;
    ensure!(left().is_empty(), "The test left: {:?}", left());
    Ok(())
}

#[test]
fn comparison_of_traces_notices_leftovers() -> Result<()> {
    let (node, other) = (Netns::create("node")?, Netns::create("other")?);
    let before = traces(&node)?;
    same(&before, &traces(&node)?)?;
    let seen = |what: &str| {
        let is_seen = || Ok(same(&before, &traces(&node)?).is_err());
        checks::eventually(what, checks::EVENT_TIMEOUT, is_seen)
    };
    node.nft(
        "add table inet twice\nadd chain inet twice c\nadd rule inet twice c counter accept\n",
    )?;
    let once = traces(&node)?;
    node.sh("nft add rule inet twice c counter accept")?;
    ensure!(same(&once, &traces(&node)?).is_err(), "A second equal rule is not noticed.");
    node.sh("nft delete table inet twice")?;
    same(&before, &traces(&node)?)?;
    for (made, taken_away) in [
        ("ip link add left type veth peer name left2", "ip link delete left"),
        ("ip address add 192.0.2.7/32 dev lo", "ip address del 192.0.2.7/32 dev lo"),
        ("ip address add 192.0.2.7/31 dev lo", "ip address del 192.0.2.7/31 dev lo"),
        ("nft add table inet left", "nft delete table inet left"),
    ] {
        node.sh(made)?;
        seen(made)?;
        node.sh(taken_away)?;
        same(&before, &traces(&node)?).context(made)?;
    }
    let open = format!("exec sleep 1000 <{}", other.path().display());
    // A thread and a socket in the other namespace, of a process that runs on the node.
    let path = other.path().display().to_string();
    let python = |then: &str| {
        format!(
            "exec python3 -c 'import ctypes, os, socket, threading, time\n\
             def enter():\n  fd = os.open(\"{path}\", os.O_RDONLY)\n  \
             assert ctypes.CDLL(None).setns(fd, 0x40000000) == 0\n  os.close(fd)\n  {then}\n\
             s = []\nt = threading.Thread(target=enter)\nt.start(); time.sleep(1000)'"
        )
    };
    let thread = python("time.sleep(1000)");
    let socket = python("s.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))");
    for script in [open.as_str(), "unshare --net sleep 1000; true", &thread, &socket] {
        let mut child = node.command("sh").args(["-c", script]).spawn()?;
        seen(script)?;
        for pid in
            process::children(child.id().cast_signed()).iter().filter_map(|&p| Pid::from_raw(p))
        {
            kill_process(pid, Signal::KILL)?;
        }
        child.kill()?;
        child.wait()?;
        same(&before, &traces(&node)?).context(script.to_owned())?;
    }
    Ok(())
}

#[test]
fn failing_test_leaves_nothing() -> Result<()> {
    let failed = thread::spawn(|| {
        let _lab = Lab::new(&Plan::default());
        panic!("as a failing test does");
    });
    ensure!(failed.join().is_err());
    ensure!(left().is_empty(), "The test left: {:?}", left());
    Ok(())
}

/// Starts a command that creates a laboratory, ends it with a signal, and checks that nothing is
/// left.
fn interrupted_by(signal: Signal) -> Result<()> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_skein-e2e"))
        .args(["bench", "--only", "routed", "--works", "tcp1", "--seconds", "20"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let of_child = format!("-{}-", child.id());
    let remains = || registry::existing().into_iter().filter(|name| name.contains(&of_child));
    let up = || Ok(remains().count() > 4);
    let up = checks::eventually("a laboratory", PERMIT_TIMEOUT, up);
    let pid = Pid::from_raw(child.id().cast_signed()).context("no process id")?;
    kill_process(pid, signal)?;
    let start = Instant::now();
    let status = child.wait()?;
    up?;
    ensure!(!status.success(), "The command succeeded after a signal: {status}");
    let took = start.elapsed();
    ensure!(took < checks::EVENT_TIMEOUT, "The command needed {took:?} to end.");
    if signal == Signal::KILL {
        // After SIGKILL, the next run cleans up.
        registry::sweep();
    }
    let remains: Vec<String> = remains().collect();
    ensure!(remains.is_empty(), "The command left: {remains:?}");
    Ok(())
}

#[test]
fn interrupted_command_leaves_nothing() -> Result<()> {
    interrupted_by(Signal::INT)
}

#[test]
fn terminated_command_leaves_nothing() -> Result<()> {
    interrupted_by(Signal::TERM)
}

#[test]
fn killed_command_is_cleaned_up_by_the_next_run() -> Result<()> {
    let buffers = || std::fs::read_to_string("/proc/sys/net/core/rmem_default");
    let before = buffers()?;
    interrupted_by(Signal::KILL)?;
    ensure!(buffers()? == before, "The host's buffers changed from {before} to {}.", buffers()?);
    Ok(())
}
