//! Addresses of pods: exhaustion, reboots, lost state, full disks.
//!
//! [`traces`] lists what pods leave on a node (interfaces, routes, rules and so on); [`same`]
//! compares the list after a test with the list before.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::Agent;
use skein_lab::cni::{self, attachment, same, traces};
use skein_lab::pods::{node, prepared, runtime, up};
use skein_lab::{Netns, Pod, checks, process};

use crate::support::reach;

#[test]
fn addresses_run_out_and_come_back() -> Result<()> {
    let cluster = up(1, |agent| agent.record.pod_cidrs = vec!["10.244.1.0/29".into()])?;
    let runtime = runtime(&cluster, 0)?;
    // The /29 has six host addresses; the node has one of them.
    let pods: Vec<Pod> = (0..5).map(|n| runtime.pod(&format!("p{n}"))).collect::<Result<_>>()?;
    let addresses: BTreeSet<_> = pods.iter().map(|pod| pod.v4).collect();
    ensure!(addresses.len() == 5, "Two pods have the same address: {addresses:?}");
    let ns = Netns::create("late")?;
    let path = cni::path(&ns);
    let late = Some(attachment("late", Some(&path)));
    let (code, text) = runtime.refused("ADD", late, Value::Null)?;
    ensure!(
        code == 11 && text.contains("10.244.1.0/29"),
        "The plugin returned code {code}: {text}"
    );
    let (code, text) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(
        code == 50 && text.contains("10.244.1.0/29"),
        "The plugin returned code {code}: {text}"
    );
    let metrics = cluster.agents[0].metrics()?;
    ensure!(
        metrics.sum("skein_ipam_addresses", &["state=\"used\""]) == 5.0,
        "The number of used addresses is not 5: {}",
        metrics.0
    );
    runtime.del("p2", None)?;
    let result = runtime.add("late", &ns)?;
    let freed = pods[2].v4;
    ensure!(
        cni::addresses(&result)? == [IpAddr::V4(freed)],
        "The late pod did not get {freed}: {result}"
    );
    Ok(())
}

#[test]
fn reboot_releases_every_address() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    let used = |agent: &Agent| -> Result<f64> {
        Ok(agent.metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    };
    // Both interfaces are deleted. The namespace of `a` still exists, that of `b` does not.
    cluster.agents[0].stop()?;
    for pod in [&a, &b] {
        node(&cluster, 0).ip(&format!("link delete {}", pod.host_interface))?;
    }
    drop(b);
    cluster.agents[0].start()?;
    let count = used(&cluster.agents[0])?;
    ensure!(
        count == 2.0,
        "{count} addresses are in use instead of the 2 of the existing namespace."
    );
    cluster.agents[0].stop()?;
    let boot = cluster.lab.directory().join("boot_id");
    fs::write(&boot, "00000000-0000-4000-8000-000000000000\n")?;
    let target = "/proc/sys/kernel/random/boot_id";
    cluster.agents[0].prelude = Some(format!("mount --bind {} {target}", boot.display()));
    cluster.agents[0].start()?;
    let count = used(&cluster.agents[0])?;
    ensure!(count == 0.0, "{count} addresses are in use after a reboot.");
    let again = runtime.add("c", &a.ns)?;
    let is_reused = cni::addresses(&again)?.contains(&IpAddr::V4(a.v4));
    ensure!(!is_reused, "{} was assigned again before its quarantine ended.", a.v4);
    runtime.del("c", None)?;
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn pods_are_deleted_despite_a_full_disk() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let disk = Tmpfs::mount(&cluster.agents[0].state_directory(), "8m")?;
    cluster.start()?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let pod = runtime.pod("a")?;
    disk.fill()?;
    // The database file itself has free space for some leases.
    let mut refused = None;
    for n in 0..300 {
        let ns = Netns::create("full")?;
        let (name, path) = (format!("f{n}"), cni::path(&ns));
        let finished = runtime.call("ADD", Some(attachment(&name, Some(&path))), Value::Null)?;
        if finished.code != 0 {
            refused = Some(finished.stdout);
            break;
        }
    }
    let refused = refused.context("no ADD was refused, so the disk is not full")?;
    let error: Value = serde_json::from_str(&refused)?;
    ensure!(error["code"] == 5, "ADD did not return code 5: {refused}");
    let (code, text) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(
        code == 50 && text.contains("no space left"),
        "The plugin returned code {code}: {text}"
    );
    for name in std::iter::once("a".to_owned()).chain((0..300).map(|n| format!("f{n}"))) {
        runtime.del(&name, None)?;
    }
    same(&before, &traces(node(&cluster, 0))?)?;
    // The agent retries the deletions, and logs each failure.
    let (code, text) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(
        code == 50 && text.contains("no space left"),
        "The plugin returned code {code}: {text}"
    );
    thread::sleep(Duration::from_secs(11));
    let log = fs::read_to_string(cluster.agents[0].log())?;
    ensure!(log.contains("container a: "), "The log does not name the container.");
    disk.empty()?;
    checks::eventually("the addresses are free", Duration::from_secs(25), || {
        let used = cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]);
        Ok(used == 0.0)
    })?;
    runtime.done("STATUS", None, Value::Null)?;
    runtime.add("b", &pod.ns)?;
    runtime.del("b", None)
}

/// A small file system in memory, which is unmounted when the value is dropped.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn mount(at: &std::path::Path, size: &str) -> Result<Self> {
        fs::create_dir_all(at)?;
        let options = format!("size={size},mode=700");
        let mut mount = std::process::Command::new("mount");
        process::run(mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at))?;
        Ok(Self(at.to_owned()))
    }

    fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.0.join("ballast"))?;
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // A lazy unmount, because the agent may still have open files on it.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn lost_leases_are_restored_from_the_interfaces() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    cluster.agents[0].stop()?;
    fs::remove_dir_all(cluster.agents[0].state_directory())?;
    cluster.agents[0].start()?;
    let c = runtime.pod("c")?;
    let is_new = ![a.v4, b.v4].contains(&c.v4) && ![a.v6, b.v6].contains(&c.v6);
    ensure!(is_new, "An address was assigned twice: {} or {}.", c.v4, c.v6);
    reach(&a, &c)?;
    let used = || -> Result<f64> {
        Ok(cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    };
    ensure!(used()? == 6.0, "{} addresses are in use instead of 6.", used()?);
    runtime.del("a", Some(&a.ns))?;
    ensure!(used()? == 4.0, "{} addresses are in use instead of 4.", used()?);
    let is_left = node(&cluster, 0).interfaces()?.contains(&a.host_interface);
    ensure!(!is_left, "The interface {} was not deleted.", a.host_interface);
    Ok(())
}

#[test]
fn leases_of_deleted_namespaces_are_collected() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    // As after a reboot, the namespace is gone and the lease is still stored.
    cluster.agents[0].stop()?;
    drop(a);
    // The interface is deleted, but the namespace exists: the lease stays.
    node(&cluster, 0).ip(&format!("link delete {}", b.host_interface))?;
    cluster.agents[0].start()?;
    let used = || -> Result<f64> {
        Ok(cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    };
    checks::eventually("the lease of a is deleted", checks::EVENT_TIMEOUT, || Ok(used()? == 2.0))?;
    let c = runtime.pod("c")?;
    ensure!(c.v4 != b.v4, "The address of an existing namespace was assigned again.");
    let path = cni::path(&b.ns);
    let with = Some(attachment("b", Some(&path)));
    let previous = json!({ "prevResult": {
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "eth0", "sandbox": path }],
        "ips": [{ "address": format!("{}/32", b.v4), "interface": 0 }],
    }});
    let (code, text) = runtime.refused("CHECK", with, previous)?;
    ensure!(code >= 3, "CHECK returned code {code}: {text}");
    // A GC that names no attachment keeps the attachments of existing namespaces: b and c.
    let none = json!({ "cni.dev/valid-attachments": [] });
    runtime.done("GC", None, none.clone())?;
    ensure!(used()? == 4.0, "{} addresses are in use instead of 4.", used()?);
    drop(b);
    runtime.done("GC", None, none)?;
    checks::eventually("the lease of b is deleted", checks::EVENT_TIMEOUT, || Ok(used()? == 2.0))?;
    runtime.del("c", None)?;
    same(&before, &traces(node(&cluster, 0))?)
}
