//! Congestion marks (ECN) between the underlay and pods.

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Agent, Cluster, PORT};
use skein_lab::link::Offloads;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::{Family, Lab, Netns, Plan, checks};

/// Returns an IP or TCP counter of a namespace (/proc/net/netstat: a line of names, a line of
/// values).
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

/// Marks overlay datagrams that arrive on a node and match `condition`, and counts those with
/// ECT(0).
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

/// Transfers data by TCP with ECN from the first pod to the second.
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
    ensure!(ect0_datagrams(node)? > 0, "No datagram has the ECT(0) of its inner packet.");
    let marked = netstat(&b.ns, "InCEPkts")?;
    ensure!(marked == 0, "The pod received {marked} marks that no device has set.");

    mark(node, underlay, &format!("{ip} ecn ect0 numgen random mod 2 == 0"))?;
    let before = netstat(&a.ns, "TCPDeliveredCE")?;
    transfer_with_ecn(lab)?;
    let (marked, echoed) =
        (netstat(&b.ns, "InCEPkts")?, netstat(&a.ns, "TCPDeliveredCE")? - before);
    println!("{marked} marked packets reached the pod, {echoed} marks were echoed to the sender");
    ensure!(marked > 0, "No mark reached the pod.");
    ensure!(echoed > 0, "The sender has received no ECE.");
    let drops = not_ect_drops(&agents[1])?;
    ensure!(drops == 0.0, "{drops} packets were dropped, although only ECT was marked.");

    // The device marks all datagrams; pings are not ECN-capable.
    mark(node, underlay, "")?;
    let answers = ping(&a.ns, b.address(Family::V4), Ping { count: 3, ..Ping::default() })?;
    ensure!(answers.received == 0, "A marked Not-ECT packet arrived: {}", answers.text);
    let drops = not_ect_drops(&agents[1])?;
    ensure!(drops >= 3.0, "Only {drops} of 3 drops are counted.");
    node.nft("delete table inet marks")?;
    checks::all_reach_all(lab)
}

#[test]
fn node_without_ecn_ignores_marks_and_gets_no_ect() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[1].set("offload.udp_ecn", false);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, node) = (&cluster.lab, &cluster.lab.nodes[1].ns);
    mark(node, Family::V4, "")?;
    transfer_with_ecn(lab)?;
    let sent = ect0_datagrams(node)?;
    ensure!(sent == 0, "{sent} datagrams with ECT were sent to a node that ignores marks.");
    let marked = netstat(&lab.pod(1).ns, "InCEPkts")?;
    ensure!(marked == 0, "{marked} marks were copied to inner packets.");
    let drops = not_ect_drops(&cluster.agents[1])?;
    ensure!(drops == 0.0, "Marks caused {drops} drops.");
    checks::all_reach_all(lab)
}
