//! Upgrades and rollbacks of the chart's pods under traffic: a second pod takes over on a node, and
//! processes of both pods end in every order and at every moment.

use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::checks;
use skein_lab::instance::{Container, Instance};
use skein_lab::load::transfer::Transfer;
use skein_lab::{Family, Lab, Plan};

/// Maximum time without packets after the death of any process.
const MAX_OUTAGE: Duration = Duration::from_secs(10);

/// Creates a node whose agent and data plane belong to a pod, and an ordinary node.
fn cluster() -> Result<(Instance, Cluster)> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    let pod = Instance::start_cluster(&mut cluster, "pod-0")?;
    Ok((pod, cluster))
}

#[test]
fn upgrade_by_a_second_pod_loses_no_packet() -> Result<()> {
    let (mut old, cluster) = cluster()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let before = cluster.agents[1].initiated_handshakes()?;
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 120 << 20, Some(30 << 20))?;
    let mut new = None;
    let loss = checks::pinged_while(&cluster.lab, || {
        let next = new.insert(Instance::start(&cluster.agents[0], "pod-1")?);
        next.wait_ready()?;
        ensure!(next.has_dataplane() && !old.has_dataplane(), "The data plane was not taken over.");
        let held = old.probe(true)?;
        ensure!(held.code == 0, "The pod that was replaced is not ready: {}", held.stderr);
        ensure!(old.probe_dataplane()?.code == 0, "The probe of the idle data plane fails.");
        ensure!(next.probe_dataplane()?.code == 0, "The probe of the active data plane fails.");
        old.delete();
        thread::sleep(Duration::from_millis(500));
        Ok(())
    })?;
    let received = transfer.join()?;
    let pause = received.longest_pause * 1e3;
    println!("upgrade: {loss}; longest interruption of the transfer {pause:.0} ms");
    ensure!(loss.lost == 0, "Packets were lost: {loss}");
    checks::interruption_is_bounded(&received)?;
    ensure!(
        cluster.agents[1].initiated_handshakes()? == before,
        "The sessions were not taken over."
    );
    let new = new.context("no pod")?;
    ensure!(new.probe(true)?.code == 0, "The new pod is not ready: {}", new.log_tail());
    Ok(())
}

/// Times from the start of the new pod to its deletion, milliseconds.
const DELETION_DELAYS_MS: [u64; 14] =
    [0, 20, 40, 60, 80, 100, 130, 170, 220, 300, 450, 700, 1500, 3000];

#[test]
fn pod_deleted_at_any_moment_leaves_the_old_one() -> Result<()> {
    let (old, cluster) = cluster()?;
    for delay in DELETION_DELAYS_MS {
        let loss = checks::pinged_while(&cluster.lab, || {
            let mut new = Instance::start(&cluster.agents[0], &format!("new-{delay}"))?;
            thread::sleep(Duration::from_millis(delay));
            let took_over = new.has_dataplane();
            new.delete();
            old.wait_ready()?;
            ensure!(old.has_dataplane(), "The old pod has no data plane: {}", old.log_tail());
            println!("deleted after {delay} ms, took over: {took_over}");
            thread::sleep(Duration::from_millis(300));
            Ok(())
        })?;
        println!("deleted after {delay} ms: {loss}");
        // Packets that a killed data process has received and not sent are lost.
        let log = || old.log_tail();
        ensure!(loss.lost <= 2, "Deletion after {delay} ms lost packets: {loss}\n{}", log());
    }
    Ok(())
}

/// A DaemonSet that is changed twice deletes the second pod and creates a third one.
#[test]
fn upgrades_in_quick_succession_lose_no_packet() -> Result<()> {
    let (mut old, cluster) = cluster()?;
    for (number, delay) in [0, 1, 3, 10].into_iter().enumerate() {
        let loss = checks::pinged_while(&cluster.lab, || {
            let mut second = Instance::start(&cluster.agents[0], &format!("second-{number}"))?;
            thread::sleep(Duration::from_secs(delay));
            let third = Instance::start(&cluster.agents[0], &format!("third-{number}"))?;
            second.delete();
            third.wait_ready()?;
            ensure!(third.has_dataplane(), "The third pod has no data plane: {}", third.log_tail());
            std::mem::replace(&mut old, third).delete();
            thread::sleep(Duration::from_millis(300));
            Ok(())
        })?;
        println!("two upgrades {delay} s apart: {loss}");
        ensure!(loss.lost <= 2, "Two upgrades {delay} s apart lost packets: {loss}");
    }
    old.wait_ready()
}

/// A container that a test kills: index of its pod, of which the second has taken over, and its
/// kind.
type Victim = (usize, Container);

const VICTIMS: [Victim; 4] = [
    (0, Container::Agent),
    (0, Container::Dataplane),
    (1, Container::Agent),
    (1, Container::Dataplane),
];

/// Returns all orders of the victims.
fn orders() -> Vec<[Victim; 4]> {
    let mut orders = Vec::new();
    let all = 0..VICTIMS.len();
    for a in all.clone() {
        for b in all.clone().filter(|b| *b != a) {
            for c in all.clone().filter(|c| ![a, b].contains(c)) {
                let last = 6 - a - b - c;
                orders.push([a, b, c, last].map(|victim| VICTIMS[victim]));
            }
        }
    }
    orders
}

/// Restarts each container that has ended, as kubelet does.
#[test]
fn deaths_in_every_order_cause_a_bounded_outage() -> Result<()> {
    let (mut old, cluster) = cluster()?;
    let mut worst = Duration::ZERO;
    for (number, order) in orders().into_iter().enumerate() {
        let mut pods = [old, Instance::start(&cluster.agents[0], &format!("pod-{}", number + 1))?];
        pods[1].wait_ready()?;
        let loss = checks::pinged_while(&cluster.lab, || {
            for (pod, container) in order {
                pods[pod].kill(container);
                thread::sleep(Duration::from_millis(100));
                pods[pod].run(container)?;
                thread::sleep(Duration::from_millis(100));
            }
            thread::sleep(Duration::from_millis(800));
            Ok(())
        })?;
        println!("{order:?}: {loss}");
        let logs = || format!("{}\n---\n{}", pods[0].log_tail(), pods[1].log_tail());
        ensure!(
            loss.longest <= MAX_OUTAGE,
            "{order:?}: The outage was too long: {loss}\n{}",
            logs()
        );
        worst = worst.max(loss.longest);
        // The pod that has the data plane is the next old one.
        let ready = |pods: &[Instance; 2]| -> Result<Option<usize>> {
            for (index, pod) in pods.iter().enumerate() {
                if pod.has_dataplane() && pod.probe(true)?.code == 0 {
                    return Ok(Some(index));
                }
            }
            Ok(None)
        };
        let is_ready = || Ok(ready(&pods)?.is_some());
        checks::eventually(
            "one pod is ready with the data plane",
            Duration::from_secs(20),
            is_ready,
        )
        .with_context(logs)?;
        let [first, second] = pods;
        let (mut gone, kept) =
            if first.has_dataplane() { (second, first) } else { (first, second) };
        gone.delete();
        old = kept;
        old.wait_ready()?;
    }
    println!("the longest time without packets: {} ms", worst.as_millis());
    Ok(())
}

/// Two containers are killed at the same time, in all six combinations.
#[test]
fn simultaneous_deaths_cause_a_bounded_outage() -> Result<()> {
    let (mut old, cluster) = cluster()?;
    let pairs: [[usize; 2]; 6] = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];
    for (number, pair) in pairs.into_iter().enumerate() {
        let mut pods = [old, Instance::start(&cluster.agents[0], &format!("pod-{}", number + 1))?];
        pods[1].wait_ready()?;
        let victims = pair.map(|index| VICTIMS[index]);
        let loss = checks::pinged_while(&cluster.lab, || {
            victims.iter().for_each(|(pod, container)| pods[*pod].kill(*container));
            thread::sleep(Duration::from_millis(100));
            victims.iter().try_for_each(|(pod, container)| pods[*pod].run(*container))?;
            thread::sleep(Duration::from_secs(1));
            Ok(())
        })?;
        println!("{victims:?}: {loss}");
        ensure!(loss.longest <= MAX_OUTAGE, "{victims:?}: The outage was too long: {loss}");
        let [mut first, second] = pods;
        first.delete();
        old = second;
        old.wait_ready()?;
    }
    Ok(())
}

#[test]
fn wrong_configuration_takes_nothing_over() -> Result<()> {
    let (mut old, mut cluster) = cluster()?;
    // A port that another program uses.
    let port: SocketAddr = "127.0.0.1:10250".parse()?;
    let _other = cluster.lab.nodes[0].ns.run(move || TcpListener::bind(port))??;
    let right = cluster.agents[0].config.clone();
    let record = cluster.agents[0].record.pod_cidrs[0].clone();
    let wrong: [(&str, &str, toml::Value, Option<i32>, &str); 5] = [
        ("malformed", "cluster_cidrs", vec!["10.999.0.0/16"].into(), Some(2), "10.999.0.0/16"),
        ("foreign", "cluster_cidrs", vec!["172.20.0.0/16"].into(), Some(2), "outside of"),
        // The value contains the node's own prefix, but not those of the other nodes.
        ("narrow", "cluster_cidrs", vec![record, "fd00::/8".into()].into(), None, "would refuse"),
        ("port", "metrics.listen", "127.0.0.1:10250".into(), Some(5), "10250"),
        ("udp", "underlay.port", 10251.into(), Some(5), "10251"),
    ];
    let udp: SocketAddr = "0.0.0.0:10251".parse()?;
    let _datagrams = cluster.lab.nodes[0].ns.run(move || std::net::UdpSocket::bind(udp))??;
    for (name, key, value, code, reason) in wrong {
        cluster.agents[0].config = right.clone();
        cluster.agents[0].set(key, value);
        let loss = checks::pinged_while(&cluster.lab, || {
            let mut new = Instance::start(&cluster.agents[0], name)?;
            let is_reported = || -> Result<bool> {
                let said = new.probe(true)?.stderr;
                Ok(said.contains(reason) || new.log()?.contains(reason))
            };
            checks::eventually(name, Duration::from_secs(10), is_reported)
                .with_context(|| new.log_tail())?;
            thread::sleep(Duration::from_secs(1));
            let ended = new.exited(Container::Agent);
            ensure!(ended == code, "{name}: The agent's exit is {ended:?}: {}", new.log_tail());
            let is_running = new.exited(Container::Dataplane).is_none();
            ensure!(is_running, "{name}: The data plane has ended: {}", new.log_tail());
            ensure!(new.probe(true)?.code != 0, "{name}: The new pod is ready.");
            if code.is_none() {
                let said = new.probe(true)?.stderr;
                ensure!(
                    said.contains(reason),
                    "{name}: The probe does not name the reason: {said}"
                );
                ensure!(new.probe(false)?.code == 0, "{name}: The liveness probe fails.");
            }
            let is_kept = !new.has_dataplane() && old.has_dataplane();
            ensure!(is_kept, "{name}: The new pod took over the data plane.");
            let probe = old.probe(true)?;
            ensure!(probe.code == 0, "{name}: The old pod is not ready: {}", probe.stderr);
            new.delete();
            thread::sleep(Duration::from_millis(300));
            Ok(())
        })?;
        println!("{name}: {loss}");
        ensure!(loss.lost == 0, "{name}: Packets were lost: {loss}");
        let log = old.log()?;
        ensure!(
            !log.contains("handing over to another agent"),
            "{name}: The old agent handed over: {log}"
        );
        let started = log.matches("started a data process").count();
        ensure!(started == 1, "{name}: {started} data processes were started: {log}");
    }
    ensure!(old.exited(Container::Agent).is_none() && old.exited(Container::Dataplane).is_none());
    Ok(())
}

/// A pod that waits with a wrong value takes over when the records change.
#[test]
fn waiting_pod_takes_over_when_records_fit() -> Result<()> {
    let (mut old, mut cluster) = cluster()?;
    let record = cluster.agents[0].record.pod_cidrs[0].clone();
    let other = cluster.agents[1].record.name.clone();
    cluster.agents[0].set("cluster_cidrs", vec![record, "fd00::/8".into()]);
    let new = Instance::start(&cluster.agents[0], "pod-1")?;
    let waits = || Ok(new.probe(true)?.stderr.contains("would refuse"));
    checks::eventually("the new pod waits", Duration::from_secs(10), waits)?;
    cluster.agents[0].remove_record(&other)?;
    new.wait_ready()?;
    old.delete();
    let start = Instant::now();
    new.wait_ready()?;
    let took = start.elapsed();
    ensure!(new.has_dataplane(), "No data plane after {took:?}: {}", new.log_tail());
    Ok(())
}
