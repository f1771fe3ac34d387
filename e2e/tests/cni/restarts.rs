//! Pods that are added and deleted while the agent stops, is stopped, or starts.
//!
//! [`traces`] lists what pods leave on a node (interfaces, routes, rules and so on); [`same`]
//! compares the list after a test with the list before.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Result, ensure};
use serde_json::Value;
use skein_lab::cni::{self, attachment, same, traces};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::pods::{node, runtime, up};
use skein_lab::{Family, Netns, checks};

use crate::support::reach;

#[test]
fn pod_is_deleted_while_the_agent_is_stopped() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    cluster.agents[0].stop()?;
    runtime.del("a", Some(&a.ns))?;
    runtime.del("a", None)?;
    let spooled = cni::spooled(&cluster.agents[0])?;
    ensure!(spooled.len() == 1, "The spool does not have exactly one entry: {spooled:?}");
    let path = cni::path(&a.ns);
    let (code, text) = runtime.refused("ADD", Some(attachment("c", Some(&path))), Value::Null)?;
    ensure!(code == 11, "ADD returned code {code} instead of 11: {text}");
    let (code, text) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(code == 50, "STATUS returned code {code} instead of 50: {text}");
    cluster.agents[0].start()?;
    checks::eventually("the deletion is done", checks::EVENT_TIMEOUT, || {
        let interfaces = node(&cluster, 0).interfaces()?;
        Ok(cni::spooled(&cluster.agents[0])?.is_empty() && !interfaces.contains(&a.host_interface))
    })?;
    runtime.done("STATUS", None, Value::Null)?;
    // The other pod is not affected.
    let answers = ping(node(&cluster, 0), b.address(Family::V4), Ping::default())?;
    ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    runtime.del("b", Some(&b.ns))?;
    same(&before, &traces(node(&cluster, 0))?)
}

/// Forty pods are added at once while the control process is killed six times. Every answered ADD
/// has addresses of its own, and every pod is reachable.
#[test]
fn killed_agent_loses_no_address_and_assigns_none_twice() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let spaces: Vec<Netns> =
        (0..40).map(|n| Netns::create(&format!("k{n}"))).collect::<Result<_>>()?;
    let add = |ns: &Netns, name: &str| -> Result<Vec<IpAddr>> {
        // kubelet, too, repeats ADD until it succeeds.
        for _ in 0..60 {
            match runtime.add(name, ns) {
                Ok(result) => return cni::addresses(&result),
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
        cni::addresses(&runtime.add(name, ns)?)
    };
    let results = thread::scope(|scope| -> Result<Vec<Vec<IpAddr>>> {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let (spaces, add) = (&spaces, &add);
                scope.spawn(move || {
                    let mine = (0..spaces.len()).filter(|index| index % 4 == worker);
                    mine.map(|index| add(&spaces[index], &format!("k{index}")))
                        .collect::<Result<Vec<_>>>()
                })
            })
            .collect();
        for round in 0..6u64 {
            thread::sleep(Duration::from_millis(70 + round * 53));
            cluster.agents[0].kill_control();
            cluster.agents[0].launch()?;
        }
        let mut all = vec![];
        for worker in workers {
            all.extend(worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??);
        }
        Ok(all)
    })?;
    cluster.agents[0].wait_ready()?;
    let unique: BTreeSet<_> = results.iter().flatten().collect();
    let count = unique.len();
    ensure!(count == spaces.len() * 2, "40 pods have {count} different addresses, not 80.");
    for ips in &results {
        let answers = ping(node(&cluster, 0), ips[0], Ping { count: 1, ..Ping::default() })?;
        ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    }
    let used = cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]);
    ensure!(used == 80.0, "{used} addresses are in use instead of 80.");
    for index in 0..spaces.len() {
        runtime.del(&format!("k{index}"), None)?;
    }
    let used = cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]);
    ensure!(used == 0.0, "{used} addresses are in use after the deletion of all pods.");
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn attachment_of_a_killed_agent_is_completed() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    let (a_again, b_again) = (
        || runtime.add("a", &a.ns).and_then(|result| cni::addresses(&result)),
        || runtime.add("b", &b.ns).and_then(|result| cni::addresses(&result)),
    );
    let (first, second) = (a_again()?, b_again()?);
    // State of an agent that was killed after the creation of the veth pair: no alias, no
    // addresses, interfaces down.
    cluster.agents[0].kill_control();
    let unmark = ["link", "set", a.host_interface.as_str(), "down", "alias", ""];
    let unmarked = node(&cluster, 0).command("ip").args(unmark).status()?;
    ensure!(unmarked.success(), "The alias of the interface was not removed.");
    a.ns.ip("address flush dev eth0")?;
    a.ns.ip("link set eth0 down")?;
    // State before the creation of the veth pair: the addresses are reserved.
    node(&cluster, 0).ip(&format!("link delete {}", b.host_interface))?;
    cluster.agents[0].start()?;
    ensure!(a_again()? == first, "A repeated ADD of pod a returned other addresses.");
    ensure!(b_again()? == second, "A repeated ADD of pod b returned other addresses.");
    reach(&a, &b)?;
    for pod in ["a", "b"] {
        runtime.del(pod, None)?;
    }
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn pending_deletion_does_not_detach_the_next_pod_of_its_name() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let first = runtime.pod("again")?;
    cluster.agents[0].stop()?;
    runtime.del("again", None)?;
    let kept = cni::spooled(&cluster.agents[0])?;
    ensure!(kept.len() == 1, "The spool does not have exactly one entry: {kept:?}");
    let entry = fs::read(&kept[0])?;
    cluster.agents[0].start()?;
    checks::eventually("the deletion is done", checks::EVENT_TIMEOUT, || {
        Ok(cni::spooled(&cluster.agents[0])?.is_empty())
    })?;
    // State of a plugin that writes its entry after the agent has read the spool, before a pod of
    // the same name is added.
    fs::write(&kept[0], entry)?;
    let second = runtime.pod("again")?;
    let spooled = cni::spooled(&cluster.agents[0])?;
    ensure!(spooled.is_empty(), "ADD left the entry of its attachment in the spool: {spooled:?}");
    // The wait is longer than the interval in which the agent reads the spool (10 s).
    thread::sleep(Duration::from_secs(11));
    let answers = ping(node(&cluster, 0), IpAddr::V4(second.v4), Ping::default())?;
    ensure!(answers.complete(), "The new pod was detached: {}", answers.text);
    runtime.del("again", None)?;
    drop(first);
    same(&before, &traces(node(&cluster, 0))?)
}
