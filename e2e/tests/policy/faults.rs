//! Policies while the agent is killed, while it starts, and after the kernel's table was removed.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::checks::{EVENT_TIMEOUT, eventually};
use skein_lab::pods::node;
use skein_lab::{Family, Netns, Pod};

use crate::support::{
    Server, attach, directory, expect, ingress_policy, object, put, tcp, udp, up,
};

/// Sender of datagrams to a pod that a policy refuses, until it is stopped.
struct Forbidden {
    ended: Arc<AtomicBool>,
    received: Arc<AtomicUsize>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Forbidden {
    /// Starts to send from one pod to a port of another.
    fn start(from: &Pod, to: &Pod, port: u16) -> Result<Self> {
        let at = SocketAddr::new(to.address(Family::V4), port);
        let receiver = to.ns.run(|| UdpSocket::bind(("0.0.0.0", port)))??;
        receiver.set_read_timeout(Some(Duration::from_millis(20)))?;
        let sender = from.ns.run(|| UdpSocket::bind("0.0.0.0:0"))??;
        let (ended, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (end, count) = (Arc::clone(&ended), Arc::clone(&received));
        let receive = thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                if receiver.recv(&mut [0; 8]).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let end = Arc::clone(&ended);
        let send = thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                // An error of one datagram does not end the test of the next ones.
                let _ = sender.send_to(b"x", at);
                thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(Self { ended, received, threads: vec![receive, send] })
    }

    /// Stops, and checks that no datagram has arrived.
    fn end(self) -> Result<()> {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads {
            ensure!(thread.join().is_ok(), "A thread panicked.");
        }
        let received = self.received.load(Ordering::Relaxed);
        ensure!(received == 0, "{received} forbidden datagrams arrived.");
        Ok(())
    }
}

/// Starts one node with an isolated pod `web`, which the pod `client` reaches on port 80 only.
fn scene() -> Result<(Cluster, Pod, Pod)> {
    let objects = object("web", "web", None) + &object("second", "web", None);
    let policy = ingress_policy("[{ports: [{port: 80}, {protocol: UDP, port: 80}]}]");
    let cluster = up(1, &(objects + &policy))?;
    let web = attach(&cluster, 0, "web", Netns::create("web")?, &[])?;
    let client = attach(&cluster, 0, "client", Netns::create("client")?, &[])?;
    Ok((cluster, web, client))
}

#[test]
fn policy_stays_while_the_agent_is_killed_and_starts() -> Result<()> {
    let (mut cluster, web, client) = scene()?;
    let _server = Server::start(&web.ns, 80)?;
    expect(&client, &web, 80, true)?;
    let state = cluster.agents[0].state_directory().join("policy.json");
    eventually("the objects are stored", EVENT_TIMEOUT, || {
        Ok(fs::read_to_string(&state)?.contains("web"))
    })?;
    let forbidden = Forbidden::start(&client, &web, 81)?;
    for _ in 0..3 {
        cluster.agents[0].kill_control();
        expect(&client, &web, 80, true)?;
        cluster.agents[0].start()?;
        expect(&client, &web, 80, true)?;
    }
    forbidden.end()
}

#[test]
fn agent_without_its_files_enforces_the_stored_policies() -> Result<()> {
    let (mut cluster, web, client) = scene()?;
    let state = cluster.agents[0].state_directory().join("policy.json");
    eventually("the objects are stored", EVENT_TIMEOUT, || {
        Ok(fs::read_to_string(&state)?.contains("web"))
    })?;
    cluster.agents[0].kill_control();
    fs::rename(directory(&cluster.agents[0]), cluster.agents[0].directory().join("away"))?;
    // The kernel's table is lost, too, as after a reboot.
    node(&cluster, 0).sh("nft delete table inet skein-policy")?;
    cluster.agents[0].start()?;
    let second = attach(&cluster, 0, "second", Netns::create("second")?, &[])?;
    for pod in [&web, &second] {
        let (_open, _closed) = (Server::start(&pod.ns, 80)?, Server::start(&pod.ns, 81)?);
        expect(&client, pod, 80, true)?;
        expect(&client, pod, 81, false)?;
    }
    let status = cluster.agents[0].status()?["policy"].clone();
    ensure!(status["complete"] == false, "The objects are stored ones: {status}");
    ensure!(status["errors"].to_string().contains("policy.directory"), "{status}");
    Ok(())
}

#[test]
fn damaged_state_leaves_the_table_and_quarantines_new_pods() -> Result<()> {
    let (mut cluster, web, client) = scene()?;
    let agent = &cluster.agents[0];
    let state = agent.state_directory().join("policy.json");
    eventually("the objects are stored", EVENT_TIMEOUT, || Ok(state.exists()))?;
    let (shown, away) = (directory(agent), agent.directory().join("away"));
    let forbidden = Forbidden::start(&client, &web, 81)?;
    cluster.agents[0].kill_control();
    fs::write(&state, "{\"format\":1,\"policies\":[")?;
    fs::rename(&shown, &away)?;
    cluster.agents[0].launch()?;
    let late = Netns::create("late")?;
    let mut late = Some(late);
    let mut second = None;
    eventually("the pod is attached", EVENT_TIMEOUT, || {
        let ns = match late.take() {
            Some(ns) => ns,
            None => Netns::create("late")?,
        };
        second = Some(attach(&cluster, 0, "second", ns, &[])?);
        Ok(true)
    })?;
    let Some(second) = second else { anyhow::bail!("no pod") };
    let _server = Server::start(&second.ns, 80)?;
    expect(&client, &second, 80, false)?;
    let _web = Server::start(&web.ns, 80)?;
    expect(&client, &web, 80, true)?;
    let log = fs::read_to_string(cluster.agents[0].log())?;
    ensure!(log.contains("stored network policies not readable"), "The log names no damaged file.");
    fs::rename(&away, &shown)?;
    cluster.agents[0].wait_ready()?;
    let address = second.address(Family::V4);
    eventually("the pod is known", EVENT_TIMEOUT, || udp(&client.ns, address, 80))?;
    forbidden.end()
}

#[test]
fn removed_table_is_restored() -> Result<()> {
    let (cluster, web, client) = scene()?;
    let _server = Server::start(&web.ns, 81)?;
    let address = web.address(Family::V4);
    for command in ["nft flush ruleset", "nft delete table inet skein-policy"] {
        node(&cluster, 0).sh(command)?;
        let took = eventually("the table is restored", EVENT_TIMEOUT, || {
            let table = node(&cluster, 0).sh("nft list table inet skein-policy")?;
            // The base chains come last, after the entries of the interfaces.
            let chains = table.matches("hook forward").count();
            Ok(table.contains(&web.host_interface) && chains == 2)
        })?;
        println!("table restored after {} ms ({command})", took.as_millis());
        ensure!(!tcp(&client.ns, address, 81)?, "The policy is not enforced after {command}.");
    }
    Ok(())
}

#[test]
fn switched_off_mode_and_cleanup_remove_the_table() -> Result<()> {
    let (mut cluster, web, client) = scene()?;
    let _server = Server::start(&web.ns, 81)?;
    expect(&client, &web, 81, false)?;
    cluster.agents[0].stop()?;
    expect(&client, &web, 81, false)?;
    cluster.agents[0].set("policy.mode", "off");
    cluster.agents[0].start()?;
    expect(&client, &web, 81, true)?;
    let state = cluster.agents[0].state_directory().join("policy.json");
    ensure!(!state.exists(), "The stored policies of an earlier configuration are left.");
    cluster.agents[0].stop()?;
    cluster.agents[0].set("policy.mode", "enforce");
    cluster.agents[0].start()?;
    expect(&client, &web, 81, false)?;
    cluster.agents[0].stop()?;
    let done = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(done.code == 0, "{}{}", done.stdout, done.stderr);
    let rules = node(&cluster, 0).sh("nft list ruleset")?;
    ensure!(!rules.contains("skein-policy"), "cleanup left the table: {rules}");
    Ok(())
}

#[test]
fn audit_counts_and_passes() -> Result<()> {
    let (mut cluster, web, client) = scene()?;
    let _server = Server::start(&web.ns, 81)?;
    expect(&client, &web, 81, false)?;
    cluster.agents[0].stop()?;
    cluster.agents[0].set("policy.mode", "audit");
    cluster.agents[0].start()?;
    expect(&client, &web, 81, true)?;
    put(&cluster.agents[0], "extra.yaml", &object("extra", "web", None))?;
    ensure!(cluster.agents[0].status()?["policy"]["mode"] == "audit", "The status names no audit.");
    Ok(())
}
