//! Faults between runtime, plugin and agent: a hung agent, deleted sockets, lost pods, changed
//! interfaces.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use skein_lab::checks;
use skein_lab::cni::{self, attachment};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::pods::{node, prepared, runtime, up};
use skein_lab::{Family, Netns, link};

#[test]
fn status_of_hung_agent_fails_after_5_s() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let runtime = runtime(&cluster, 0)?;
    runtime.done("STATUS", None, Value::Null)?;
    let pid = cluster.agents[0].control_pid().and_then(Pid::from_raw).context("no agent")?;
    kill_process(pid, Signal::STOP)?;
    let began = Instant::now();
    let refused = runtime.refused("STATUS", None, Value::Null);
    let took = began.elapsed();
    kill_process(pid, Signal::CONT)?;
    let (code, text) = refused?;
    ensure!(
        code == 50 && text.contains("did not answer within 5 s"),
        "The plugin returned code {code}: {text}"
    );
    ensure!((5..15).contains(&took.as_secs()), "STATUS took {took:?}.");
    checks::eventually("the agent answers again", Duration::from_secs(10), || {
        Ok(runtime.done("STATUS", None, Value::Null).is_ok())
    })
    .map(drop)
}

#[test]
fn deleted_sockets_are_created_again() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let (agent, runtime) = (&cluster.agents[0], runtime(&cluster, 0)?);
    let control = agent.config["control"]["socket"].as_str().context("control.socket")?;
    for socket in [agent.cni_socket(), control] {
        fs::remove_file(socket)?;
        checks::eventually("the socket is created again", checks::EVENT_TIMEOUT, || {
            Ok(Path::new(socket).exists())
        })?;
    }
    ensure!(
        agent.status()?["ready"] == true,
        "The agent is not ready: {}",
        agent.status()?["reasons"]
    );
    let pod = runtime.pod("a")?;
    // While the socket cannot be created, the agent is not ready: no pod can start or end.
    fs::remove_file(agent.cni_socket())?;
    fs::create_dir(agent.cni_socket())?;
    checks::eventually("the reason is named", checks::EVENT_TIMEOUT, || {
        let answer = agent.http("/readyz")?;
        Ok(answer.status != 200 && answer.body.contains("cni.socket was deleted"))
    })?;
    fs::remove_dir(agent.cni_socket())?;
    checks::eventually("the agent is ready again", checks::EVENT_TIMEOUT, || {
        Ok(agent.http("/readyz")?.status == 200)
    })?;
    runtime.del("a", Some(&pod.ns))
}

#[test]
fn verbs_other_than_gc_work_without_cni_path() -> Result<()> {
    let cluster = up(1, |_| ())?;
    // The runtime sets CNI_PATH for GC only.
    let runtime = runtime(&cluster, 0)?;
    let ns = Netns::create("pathless")?;
    let path = cni::path(&ns);
    let id = Some(attachment("pathless", Some(&path)));
    let result = runtime.done("ADD", id, Value::Null)?;
    runtime.done("CHECK", id, json!({ "prevResult": result }))?;
    runtime.done("STATUS", None, Value::Null)?;
    runtime.done("DEL", id, Value::Null)?;
    runtime.done("GC", None, json!({ "cni.dev/valid-attachments": [] })).map(drop)
}

#[test]
fn gc_judges_invisible_namespaces_by_the_host_interface() -> Result<()> {
    let mut cluster = prepared(1, |agent| {
        // The agent does not see the paths that the runtime names.
        agent.prelude = Some("mount -t tmpfs tmpfs /run/netns".to_owned());
    })?;
    cluster.start()?;
    let runtime = runtime(&cluster, 0)?;
    let used = || -> Result<f64> {
        Ok(cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    };
    let (lives, renamed, lost) =
        (runtime.pod("lives")?, runtime.pod("renamed")?, runtime.pod("lost")?);
    let home = node(&cluster, 0);
    // Kernels before 6.2 rename an interface only while it is down.
    home.ip(&format!("link set {} down", renamed.host_interface))?;
    home.ip(&format!("link set {} name other0", renamed.host_interface))?;
    let lost_address = lost.v4;
    drop(lost);
    checks::eventually("the kernel removes the interface", checks::EVENT_TIMEOUT, || {
        Ok(node(&cluster, 0).interfaces()?.len() > 1
            && !node(&cluster, 0).ip("route show")?.contains(&lost_address.to_string()))
    })?;
    // The wait is longer than the interval of the agent's own collection.
    thread::sleep(Duration::from_secs(11));
    ensure!(used()? == 6.0, "{} addresses are in use instead of 6 before the GC.", used()?);
    let valid = |names: &[&str]| {
        let id = |name: &&str| json!({ "containerID": name, "ifname": "eth0" });
        json!({ "cni.dev/valid-attachments": names.iter().map(id).collect::<Vec<_>>() })
    };
    runtime.done("GC", None, valid(&["lost"]))?;
    ensure!(used()? == 6.0, "A GC that names the lost pod left {} of 6 addresses.", used()?);
    runtime.done("GC", None, valid(&[]))?;
    ensure!(used()? == 4.0, "{} addresses are in use instead of 4 after the GC.", used()?);
    // The other two attachments exist, and keep their addresses.
    let answers = ping(node(&cluster, 0), lives.address(Family::V4), Ping::default())?;
    ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    let next = runtime.pod("next")?;
    ensure!(![lives.v4, renamed.v4].contains(&next.v4), "{} was assigned twice.", next.v4);
    Ok(())
}

#[test]
fn mac_of_host_interface_is_checked_and_repaired() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (first, second) = (runtime(&cluster, 0)?, runtime(&cluster, 1)?);
    let (ns, b) = (Netns::create("a")?, second.pod("b")?);
    let result = first.add("a", &ns)?;
    let a = cni::pod(ns, &result)?;
    let (home, path) = (node(&cluster, 0), cni::path(&a.ns));
    let with = Some(attachment("a", Some(&path)));
    let previous = json!({ "prevResult": result });
    first.done("CHECK", with, previous.clone())?;
    let mac = link::mac(home, &a.host_interface)?;
    let change = || home.ip(&format!("link set {} address 02:00:00:00:00:99", a.host_interface));
    change()?;
    let (code, text) = first.refused("CHECK", with, previous.clone())?;
    ensure!(
        code == 100 && text.contains("02:00:00:00:00:99"),
        "The plugin returned code {code}: {text}"
    );
    checks::eventually("the address is repaired", Duration::from_secs(15), || {
        Ok(link::mac(home, &a.host_interface)? == mac)
    })?;
    for family in Family::BOTH {
        checks::reaches(&a, &b, family)?;
    }
    first.done("CHECK", with, previous)?;
    // A repeated ADD repairs the address, too.
    change()?;
    first.add("a", &a.ns)?;
    let repaired = link::mac(home, &a.host_interface)?;
    ensure!(repaired == mac, "The MAC address is {repaired} instead of {mac} after ADD.");
    Ok(())
}
