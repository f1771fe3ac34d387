//! Attachment of pods by the CNI plugin, and traffic of attached pods.
//!
//! [`traces`] lists what pods leave on a node (interfaces, routes, rules and so on); [`same`]
//! compares the list after a test with the list before.

use std::collections::BTreeSet;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::cni::{self, attachment, same, traces};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::udp;
use skein_lab::pods::{node, runtime, up};
use skein_lab::{Family, Netns, checks};

use crate::support::{outside, outside_address, reach};

#[test]
fn deleted_pods_of_two_nodes_leave_nothing() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let before = [traces(node(&cluster, 0))?, traces(node(&cluster, 1))?];
    let (first, second) = (runtime(&cluster, 0)?, runtime(&cluster, 1)?);
    let (a, a2, b) = (first.pod("a")?, first.pod("a2")?, second.pod("b")?);
    reach(&a, &b)?;
    reach(&b, &a2)?;
    reach(&a, &a2)?;
    for family in Family::BOTH {
        for (from, to) in [(&a, &b), (&b, &a), (&a, &a2)] {
            checks::transfer(from, to, family, 32 << 20)?;
            for payload in [1, 1000, 9000] {
                checks::datagrams_arrive(from, to, family, payload)?;
            }
        }
        // The node's own processes (kubelet's probes) reach local and remote pods.
        for pod in [&a, &b] {
            let answers = ping(node(&cluster, 0), pod.address(family), Ping::default())?;
            ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
        }
    }
    first.del("a", Some(&a.ns))?;
    first.del("a", Some(&a.ns))?;
    first.del("a2", None)?;
    drop(b);
    second.del("b", None)?;
    same(&before[0], &traces(node(&cluster, 0))?)?;
    same(&before[1], &traces(node(&cluster, 1))?)
}

#[test]
fn pods_of_one_family_reach_each_other() -> Result<()> {
    for family in Family::BOTH {
        let cluster = up(2, |agent| {
            agent.record.pod_cidrs.retain(|cidr| cidr.contains(':') == (family == Family::V6));
        })?;
        let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
        checks::reaches(&a, &b, family)?;
        let unset =
            if family == Family::V4 { a.v6.is_unspecified() } else { a.v4.is_unspecified() };
        ensure!(unset, "The pod has an address of the other family than {family}.");
    }
    Ok(())
}

#[test]
fn repeated_add_returns_the_same_result() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let runtime = runtime(&cluster, 0)?;
    let ns = Netns::create("again")?;
    let result = runtime.add("again", &ns)?;
    ensure!(runtime.add("again", &ns)? == result, "A repeated ADD returned another result.");
    let ours = attachment("again", None);
    let path = cni::path(&ns);
    let with = Some(attachment("again", Some(&path)));
    runtime.done("CHECK", with, json!({ "prevResult": result }))?;
    // An ADD of the same container in another namespace replaces the attachment.
    let other = Netns::create("again-2")?;
    let moved = runtime.add("again", &other)?;
    let is_left = ns.interfaces()?.contains(&"eth0".to_owned());
    ensure!(!is_left, "The old namespace still has its interface.");
    runtime.done("DEL", Some(ours), json!({ "prevResult": moved }))?;
    // ADD is refused if the namespace has an interface of that name.
    ns.ip("link add eth0 type veth peer name eth9")?;
    let before = traces(node(&cluster, 0))?;
    let (code, text) = runtime.refused("ADD", with, Value::Null)?;
    ensure!(code >= 4 && text.contains("eth0"), "The plugin returned code {code}: {text}");
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn superpacket_reaches_the_remote_pod_unsplit() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
    for family in Family::BOTH {
        let counters = || -> Result<(u64, u64)> {
            let text = b.ns.ip("-s -j link show dev eth0")?;
            let link: Value = serde_json::from_str(&text)?;
            let rx = &link[0]["stats64"]["rx"];
            Ok((rx["bytes"].as_u64().context("bytes")?, rx["packets"].as_u64().context("packets")?))
        };
        let before = counters()?;
        checks::transfer(&a, &b, family, 256 << 20)?;
        let after = counters()?;
        let mean = (after.0 - before.0) / (after.1 - before.1);
        ensure!(mean > 10_000, "The remote pod received {mean} bytes per packet over {family}.");
    }
    Ok(())
}

#[test]
fn container_with_a_network_gets_no_second_one() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    let before = traces(node(&cluster, 0))?;
    let path = cni::path(&a.ns);
    let second = cni::Attachment { container: "a", interface: "eth1", netns: Some(path.as_str()) };
    let (code, text) = runtime.refused("ADD", Some(second), Value::Null)?;
    ensure!(code == 4 && text.contains("default route"), "The plugin returned code {code}: {text}");
    runtime.done("DEL", Some(second), Value::Null)?;
    same(&before, &traces(node(&cluster, 0))?)?;
    reach(&a, &b)
}

#[test]
fn pods_reach_the_outside_with_the_nodes_address() -> Result<()> {
    for masquerade in [true, false] {
        let cluster = up(2, |agent| agent.set("cni.masquerade", masquerade))?;
        let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
        // The outside machine has a route to the pods. Without masquerading, its answers go to the
        // addresses of the pods and need the route.
        let outside = outside(&cluster)?;
        for family in Family::BOTH {
            let node = &cluster.lab.nodes[0];
            let target = outside_address(family)?;
            let seen = udp::source_seen(&a.ns, &outside, target)?;
            let expected = if masquerade { node.underlay(family) } else { a.address(family) };
            ensure!(seen == expected, "The outside saw {seen} instead of {expected}.");
            // Within the cluster, every pod keeps its own address.
            let seen = udp::source_seen(&a.ns, &b.ns, b.address(family))?;
            let own = a.address(family);
            ensure!(seen == own, "The remote pod saw {seen} instead of {own}.");
        }
    }
    Ok(())
}

#[test]
fn hundred_pods_are_added_and_deleted_at_once() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let spaces: Vec<Netns> =
        (0..100).map(|n| Netns::create(&format!("h{n}"))).collect::<Result<_>>()?;
    let all = thread::scope(|scope| {
        let workers: Vec<_> = spaces
            .iter()
            .enumerate()
            .map(|(index, ns)| {
                let runtime = &runtime;
                scope.spawn(move || cni::addresses(&runtime.add(&format!("h{index}"), ns)?))
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let count = all.iter().flatten().collect::<BTreeSet<_>>().len();
    ensure!(count == 200, "100 pods have {count} different addresses instead of 200.");
    thread::scope(|scope| {
        let workers: Vec<_> = (0..100)
            .map(|index| {
                let runtime = &runtime;
                scope.spawn(move || runtime.del(&format!("h{index}"), None))
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?
        })
    })?;
    same(&before, &traces(node(&cluster, 0))?)
}
