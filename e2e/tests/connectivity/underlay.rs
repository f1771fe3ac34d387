//! Effects of the underlay: congestion marks, a falling MTU, overflowing queues, link-local
//! addresses.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use skein_lab::agent::{Agent, Cluster, PORT};
use skein_lab::checks;
use skein_lab::link::Offloads;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::transfer::Transfer;
use skein_lab::{Family, Lab, Netns, Plan, UNDERLAY};

/// A counter of a namespace's IP or TCP (/proc/net/netstat: a line of names, a line of values).
fn netstat(ns: &Netns, name: &str) -> Result<u64> {
    let text = ns.sh("cat /proc/net/netstat")?;
    let lines: Vec<_> = text.lines().collect();
    let found = lines.chunks(2).find_map(|pair| {
        let [names, values] = pair else { return None };
        let at = names.split_whitespace().position(|word| word == name)?;
        values.split_whitespace().nth(at)?.parse().ok()
    });
    found.with_context(|| format!("no counter {name} in /proc/net/netstat"))
}

/// Marks datagrams of the overlay that arrive on a node, by `condition`; counts those with ECT(0).
fn mark(ns: &Netns, family: Family, condition: &str) -> Result<()> {
    let ip = if family == Family::V4 { "ip" } else { "ip6" };
    ns.nft(&format!(
        "table inet marks\ndelete table inet marks\ntable inet marks {{\n\
           counter ect0 {{ }}\n\
           chain in {{\n\
             type filter hook prerouting priority -400;\n\
             udp dport {PORT} {ip} ecn ect0 counter name ect0\n\
             udp dport {PORT} {condition} {ip} ecn set ce\n\
           }}\n\
         }}\n"
    ))
}

fn ect0_datagrams(ns: &Netns) -> Result<u64> {
    let text = ns.sh("nft list counter inet marks ect0")?;
    let packets = text.split_whitespace().skip_while(|word| *word != "packets").nth(1);
    packets.context("no counter")?.parse().context("not a number")
}

fn not_ect_drops(agent: &Agent) -> Result<f64> {
    Ok(agent.metrics()?.sum("skein_drops_total", &["reason=\"inner_not_ect\""]))
}

/// TCP with ECN from the first pod to the second.
fn transfer_with_ecn(lab: &Lab) -> Result<()> {
    for pod in [lab.pod(0), lab.pod(1)] {
        pod.ns.sysctl("net.ipv4.tcp_ecn", "1")?;
    }
    checks::transfer(lab.pod(0), lab.pod(1), Family::V4, 8 << 20).map(drop)
}

#[test]
fn congestion_marks_of_the_underlay_reach_tcp_in_pods() -> Result<()> {
    marks_reach_pods(Family::V4)
}

#[test]
fn congestion_marks_of_an_ipv6_underlay_reach_tcp_in_pods() -> Result<()> {
    marks_reach_pods(Family::V6)
}

fn marks_reach_pods(underlay: Family) -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, underlay)?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    let (a, b, node) = (lab.pod(0), lab.pod(1), &lab.nodes[1].ns);
    let ip = if underlay == Family::V4 { "ip" } else { "ip6" };
    // The rule marks no datagram, because no datagram has this source port.
    mark(node, underlay, "udp sport 1")?;
    transfer_with_ecn(lab)?;
    ensure!(ect0_datagrams(node)? > 0, "the inner field is copied to the outer header");
    ensure!(netstat(&b.ns, "InCEPkts")? == 0, "nobody has marked anything");

    mark(node, underlay, &format!("{ip} ecn ect0 numgen random mod 2 == 0"))?;
    let before = netstat(&a.ns, "TCPDeliveredCE")?;
    transfer_with_ecn(lab)?;
    let (marked, echoed) =
        (netstat(&b.ns, "InCEPkts")?, netstat(&a.ns, "TCPDeliveredCE")? - before);
    println!("{marked} packets came to the pod with a mark, {echoed} were echoed to the sender");
    ensure!(marked > 0, "no mark reached the pod");
    ensure!(echoed > 0, "the sender has seen no ECE");
    ensure!(not_ect_drops(&agents[1])? == 0.0, "only packets with ECT were marked");

    // The device marks all datagrams; pings are not ECN-capable.
    mark(node, underlay, "")?;
    let answers = ping(&a.ns, b.address(Family::V4), Ping { count: 3, ..Ping::default() })?;
    ensure!(answers.received == 0, "a marked Not-ECT packet arrived: {}", answers.text);
    ensure!(not_ect_drops(&agents[1])? >= 3.0, "the drops are not counted");
    node.nft("delete table inet marks")?;
    checks::all_reach_all(lab)
}

#[test]
fn node_without_ecn_is_sent_not_ect_and_ignores_marks() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[1].set("offload.udp_ecn", false);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, node) = (&cluster.lab, &cluster.lab.nodes[1].ns);
    mark(node, Family::V4, "")?;
    transfer_with_ecn(lab)?;
    ensure!(
        ect0_datagrams(node)? == 0,
        "datagrams with ECT were sent to a node that ignores marks"
    );
    ensure!(netstat(&lab.pod(1).ns, "InCEPkts")? == 0, "a mark was propagated");
    ensure!(not_ect_drops(&cluster.agents[1])? == 0.0, "a mark has led to a drop");
    checks::all_reach_all(lab)
}

/// The MTU of the sending host's own interface falls: the kernel refuses longer datagrams, and no
/// probe is needed.
#[test]
fn underlay_mtu_that_falls_narrows_the_path_at_once() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::new(&plan)?, Family::V4)?;
    // Set, so that the overlay's own MTU does not follow the underlay's.
    cluster.agents.iter_mut().for_each(|agent| agent.set("interface.mtu", 1440));
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    let (a, b) = (lab.pod(0), lab.pod(1));
    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 80 << 20, Some(10 << 20))?;
    thread::sleep(Duration::from_secs(2));
    lab.nodes[0].ns.ip(&format!("link set {UNDERLAY} mtu 1400"))?;
    let received = transfer.join().context("the transfer over the narrow interface")?;
    println!(
        "the underlay's MTU fell: the transfer stood for {:.0} ms at most",
        received.longest_pause * 1e3
    );
    // A search by probes takes 5 seconds until it begins.
    ensure!(received.longest_pause < 4.0, "{} s", received.longest_pause);
    let log = std::fs::read_to_string(agents[0].log())?;
    ensure!(log.contains("datagram longer than the route carries"), "nothing was refused");
    // The size comes from the kernel, not from a search, which ends up to 8 bytes below.
    let found = agents[0].report()?["peers"][0]["path_mtu"].as_u64();
    ensure!(found == Some(1340), "{found:?} is not the size that the kernel reports");
    let refused = agents[0].metrics()?.sum("skein_drops_total", &["reason=\"send_too_big\""]);
    ensure!(refused > 0.0, "the refused datagrams are not counted");
    checks::transfer(a, b, Family::V4, 8 << 20)?;
    checks::transfer(b, a, Family::V4, 8 << 20).map(drop)
}

#[test]
fn drops_in_the_queue_of_the_tun_device_are_counted() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[0].set("interface.txqueuelen", 50);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, agent) = (&cluster.lab, &cluster.agents[0]);
    let drops = || Ok::<_, anyhow::Error>(agent.metrics()?.sum("skein_tun_queue_drops_total", &[]));
    // The kernel also drops packets that it sends itself while no process has the queues open.
    let before = drops()?;
    let to = SocketAddr::new(lab.pod(1).address(Family::V4), 9);
    let pid = agent.dataplane_pids().into_iter().next().and_then(Pid::from_raw);
    let pid = pid.context("no data process")?;
    kill_process(pid, Signal::STOP)?;
    let flood = || -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..1000 {
            socket.send_to(&[0; 64], to)?;
        }
        Ok(())
    };
    let flooded = lab.pod(0).ns.run(flood);
    kill_process(pid, Signal::CONT)?;
    flooded??;
    let link = lab.nodes[0].ns.sh("ip -j -s link show dev skein0")?;
    let link: serde_json::Value = serde_json::from_str(&link)?;
    let by_the_kernel = link[0]["stats64"]["tx"]["dropped"].as_f64().context("no counter")?;
    ensure!(by_the_kernel >= before + 800.0, "the queue takes 50 packets: {by_the_kernel} drops");
    // A scrape may show a report that is up to a second old.
    let same = || Ok(drops()? == by_the_kernel);
    checks::eventually("the metric has the device's counter", Duration::from_secs(5), same)?;
    let status = agent.run_command(&["status", "--interval", "0"])?;
    ensure!(status.stdout.contains("tun_queue_full"), "{}", status.stdout);
    Ok(())
}

/// Nodes whose records name link-local addresses, with the interface that they belong to.
fn on_link_local_addresses(interface: &str) -> Result<Cluster> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V6)?;
    let Cluster { agents, lab, .. } = &mut cluster;
    for (index, (agent, node)) in agents.iter_mut().zip(&lab.nodes).enumerate() {
        let address = format!("fe80::aaaa:{}", index + 1);
        node.ns.ip(&format!("address add {address}/64 dev {UNDERLAY} nodad"))?;
        agent.set("underlay.addresses", vec!["::"]);
        agent.record.endpoints = vec![format!("[{address}%{interface}]:{PORT}")];
    }
    for agent in agents.iter() {
        agents.iter().try_for_each(|other| agent.put_record(&other.record))?;
    }
    cluster.start()?;
    Ok(cluster)
}

fn endpoint(agent: &Agent) -> Result<String> {
    let report = agent.report()?;
    Ok(report["peers"][0]["endpoint"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn nodes_join_over_link_local_addresses() -> Result<()> {
    let cluster = on_link_local_addresses(UNDERLAY)?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    checks::all_reach_all(lab)?;
    checks::transfer(lab.pod(0), lab.pod(1), Family::V4, 4 << 20)?;
    for agent in agents {
        let endpoint = endpoint(agent)?;
        ensure!(endpoint.starts_with("[fe80::aaaa:") && endpoint.contains('%'), "{endpoint}");
    }
    // The sessions and their scope are in memory that outlives the process.
    let handshakes =
        || agents[0].metrics().map(|m| m.sum("skein_handshakes_total", &["completed"]));
    let before = endpoint(&agents[0])?;
    let pid = agents[0].dataplane_pids().into_iter().next().and_then(Pid::from_raw);
    kill_process(pid.context("no data process")?, Signal::KILL)?;
    let back = || Ok(checks::reaches(lab.pod(0), lab.pod(1), Family::V4).is_ok());
    checks::eventually("the next data process goes on", Duration::from_secs(10), back)?;
    checks::eventually("it reports", Duration::from_secs(5), || Ok(endpoint(&agents[0]).is_ok()))?;
    ensure!(endpoint(&agents[0])? == before, "the endpoint is kept");
    ensure!(handshakes()? == 0.0, "the session is kept, without a new handshake");
    checks::all_reach_all(lab)
}

#[test]
fn endpoint_of_a_missing_interface_is_used_once_it_appears() -> Result<()> {
    let cluster = on_link_local_addresses("later0")?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    let log = std::fs::read_to_string(agents[0].log())?;
    ensure!(log.contains("this node has no interface later0"), "no complaint:\n{log}");
    ensure!(endpoint(&agents[0])?.is_empty(), "an endpoint without its interface is used");
    for node in &lab.nodes {
        node.ns.ip("link add later0 type veth peer name later1")?;
        node.ns.ip("link set later0 up")?;
    }
    let used = || Ok(endpoint(&agents[0])?.contains('%'));
    checks::eventually("the endpoint is used", Duration::from_secs(15), used)?;
    ensure!(
        agents[0].http("/readyz")?.status == 200,
        "one peer's endpoint is not the node's health"
    );
    Ok(())
}
