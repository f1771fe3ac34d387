//! Path MTU discovery on paths whose MTU falls without an ICMP message.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::link::Offloads;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::transfer::Transfer;
use skein_lab::{Family, Lab, Plan, UNDERLAY, checks};

/// Returns the reduced path MTU to the other node; `None` if the path MTU is not reduced.
fn path_mtu(agent: &Agent) -> Result<Option<u64>> {
    let report = agent.report()?;
    Ok(report["peers"][0]["path_mtu"].as_u64())
}

#[test]
fn reduced_path_mtu_is_found_during_a_transfer() -> Result<()> {
    becomes_narrow(Family::V4, 60)
}

#[test]
fn reduced_path_mtu_over_ipv6_is_found_during_a_transfer() -> Result<()> {
    becomes_narrow(Family::V6, 80)
}

/// Lets the switch drop long frames without a message, as a tunnel or a wrong setting on the path
/// may do. `overhead` is the size of the overlay's headers and tag over this underlay, bytes.
fn becomes_narrow(underlay: Family, overhead: u64) -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, underlay)?;
    checks::all_reach_all(&cluster.lab)?;
    let (lab, agents) = (&cluster.lab, &cluster.agents);
    let (a, b) = (lab.pod(0), lab.pod(1));
    checks::transfer(a, b, Family::V4, 4 << 20)?;
    ensure!(path_mtu(&agents[0])?.is_none(), "The path MTU is reduced before the change.");

    let to = (b.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&a.ns, &b.ns, to, 200 << 20, Some(10 << 20))?;
    thread::sleep(Duration::from_secs(2));
    lab.switch()?.ip(&format!("link set {} mtu 1400", lab.nodes[1].port()))?;
    let received = transfer.join().context("the transfer over the narrow path")?;
    println!(
        "the MTU of the path fell: longest interruption of the transfer {:.1} s",
        received.longest_pause
    );
    let pause = received.longest_pause;
    ensure!(pause < 15.0, "The transfer was interrupted for {pause} s.");

    // A bridge forwards frames that are 4 bytes longer than its MTU, because of VLAN tags.
    let found = path_mtu(&agents[0])?.context("the path MTU is not reduced")?;
    let most = 1400 - overhead;
    let is_exact = (most - 8..=most + 4).contains(&found);
    ensure!(is_exact, "The path MTU is {found} instead of {most} (-8, +4).");
    // The port also drops long frames from the node.
    let back = path_mtu(&agents[1])?;
    let is_equal = back.is_some_and(|back| back.abs_diff(found) < 16);
    ensure!(is_equal, "The path MTU back is {back:?} instead of about {found}.");
    let count = agents[0].metrics()?.sum("skein_narrow_paths", &[]);
    ensure!(count == 1.0, "{count} paths are counted instead of 1.");
    let routed = || {
        let routes = lab.nodes[0].ns.ip("route show proto 77")?;
        Ok(routes.contains(&format!("mtu {found}")))
    };
    checks::eventually("the route has the MTU", checks::EVENT_TIMEOUT, routed)?;

    // A sender that forbids fragmentation gets an ICMP message; smaller packets arrive.
    let whole = |payload| Ping { count: 3, payload, whole: true, ..Ping::default() };
    let answers = ping(&a.ns, b.address(Family::V4), whole(1380))?;
    let is_refused = answers.received == 0 && answers.text.contains("mtu");
    ensure!(is_refused, "No ICMP message refused the long packets: {}", answers.text);
    let answers = ping(&a.ns, b.address(Family::V4), whole(1280))?;
    ensure!(answers.complete(), "Not every ping was answered: {}", answers.text);
    checks::transfer(a, b, Family::V4, 8 << 20)?;
    checks::transfer(b, a, Family::V4, 8 << 20)?;
    checks::transfer(a, b, Family::V6, 1 << 20).map(drop)
}

/// The MTU of the sending host's own interface falls: the kernel refuses longer datagrams, and no
/// probe is needed.
#[test]
fn reduced_underlay_mtu_reduces_the_path_mtu_at_once() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::new(&plan)?, Family::V4)?;
    // With this setting, the overlay's MTU does not follow the underlay's.
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
        "the underlay's MTU fell: longest interruption of the transfer {:.0} ms",
        received.longest_pause * 1e3
    );
    // Discovery by probes would start only after 5 s.
    checks::interruption_is_bounded(&received)?;
    let log = std::fs::read_to_string(agents[0].log())?;
    let is_refused = log.contains("datagram longer than the route carries");
    ensure!(is_refused, "The kernel refused no datagram.");
    // The size comes from the kernel. Discovery by probes ends up to 8 bytes below it.
    let found = agents[0].report()?["peers"][0]["path_mtu"].as_u64();
    ensure!(found == Some(1340), "The path MTU is {found:?} instead of the kernel's 1340.");
    let refused = agents[0].metrics()?.sum("skein_drops_total", &["reason=\"send_too_big\""]);
    ensure!(refused > 0.0, "The refused datagrams are not counted.");
    checks::transfer(a, b, Family::V4, 8 << 20)?;
    checks::transfer(b, a, Family::V4, 8 << 20).map(drop)
}
