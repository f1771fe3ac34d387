//! The overlay's MTU follows the underlay's: the devices that lead to the peers, at start and at
//! run time.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::{Family, Lab, Netns, Plan};

/// Maximum time until the agent follows a change of the underlay.
const CHANGE_TIMEOUT: Duration = checks::EVENT_TIMEOUT;

/// Two nodes whose agents listen on all addresses, over a switch that carries 9000 bytes; the
/// nodes' own devices carry 1500.
fn prepare(underlay: Family) -> Result<Cluster> {
    let lab = Lab::new(&Plan { mtu: 9000, ..Plan::default() })?;
    for node in &lab.nodes {
        node.ns.ip("link set eth0 mtu 1500")?;
    }
    let mut cluster = Cluster::prepare(lab, underlay)?;
    let any = match underlay {
        Family::V4 => "0.0.0.0",
        Family::V6 => "::",
    };
    for agent in &mut cluster.agents {
        agent.set("underlay.addresses", vec![any.to_owned()]);
    }
    Ok(cluster)
}

/// Returns the MTU in the agent's status, and checks that the device has the same.
fn mtu(agent: &Agent, node: &Netns) -> Result<u64> {
    let mtu = agent.status()?["interface"]["mtu"].as_u64().context("no MTU in the status")?;
    let link = node.ip("link show skein0")?;
    ensure!(
        link.contains(&format!("mtu {mtu} ")),
        "The status has MTU {mtu}, the device another one: {link}"
    );
    Ok(mtu)
}

fn becomes(cluster: &Cluster, index: usize, expected: u64) -> Result<()> {
    let (agent, node) = (&cluster.agents[index], &cluster.lab.nodes[index].ns);
    let is = || Ok(mtu(agent, node).is_ok_and(|mtu| mtu == expected));
    checks::eventually(&format!("an MTU of {expected}"), CHANGE_TIMEOUT, is)
        .with_context(|| format!("it is {:?}", mtu(agent, node)))
        .map(drop)
}

/// Checks that a packet of `bytes` passes without fragmentation from the first node's overlay
/// address to the second's.
fn passes(cluster: &Cluster, bytes: u16) -> Result<()> {
    let node = &cluster.lab.nodes[0].ns;
    let payload = u32::from(bytes) - 28;
    let whole = Ping { count: 3, payload, whole: true, ..Ping::default() };
    let complete = || Ok(ping(node, "10.244.2.1".parse()?, whole)?.complete());
    checks::eventually(&format!("{bytes} bytes pass"), Duration::from_secs(15), complete).map(drop)
}

#[test]
fn mtu_without_default_route_survives_restarts() -> Result<()> {
    let mut cluster = prepare(Family::V4)?;
    let node = cluster.lab.nodes[0].ns.name().to_owned();
    // An interface of pods of another network, with a smaller MTU than the overlay.
    cluster.lab.nodes[0].ns.ip_batch(&[
        "link add dev skp0123456789 mtu 1280 type bridge".to_owned(),
        "link set skp0123456789 up".to_owned(),
    ])?;
    cluster.start()?;
    for _ in 0..4 {
        becomes(&cluster, 0, 1440)?;
        cluster.agents[0].stop()?;
        cluster.agents[0].start().with_context(|| format!("on {node}"))?;
    }
    becomes(&cluster, 0, 1440)?;
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn mtu_with_multipath_default_route_survives_restarts() -> Result<()> {
    let mut cluster = prepare(Family::V4)?;
    cluster.lab.nodes[0].ns.ip_batch(&[
        "link add dev mgmt mtu 1400 type bridge".to_owned(),
        "link set mgmt up".to_owned(),
        "address add 198.51.100.1/24 dev mgmt".to_owned(),
        "route add default nexthop via 198.51.100.254 nexthop via 192.0.2.254".to_owned(),
    ])?;
    cluster.start()?;
    let peer = cluster.agents[1].record.clone();
    for _ in 0..3 {
        becomes(&cluster, 0, 1440)?;
        // Without peers, the smaller MTU of the two next hops counts.
        cluster.agents[0].remove_record(&peer.name)?;
        becomes(&cluster, 0, 1340)?;
        cluster.agents[0].stop()?;
        cluster.agents[0].start()?;
        becomes(&cluster, 0, 1340)?;
        cluster.agents[0].put_record(&peer)?;
    }
    becomes(&cluster, 0, 1440)?;
    passes(&cluster, 1440)
}

#[test]
fn mtu_follows_path_to_peers_not_management_network() -> Result<()> {
    let mut cluster = prepare(Family::V4)?;
    let node = cluster.lab.nodes[0].ns.name().to_owned();
    for (mtu, expected) in [(1400, 1440), (9000, 1440)] {
        let ns = &cluster.lab.nodes[0].ns;
        ns.ip_batch(&[
            format!("link add dev mgmt mtu {mtu} type bridge"),
            "link set mgmt up".to_owned(),
            "address add 198.51.100.1/24 dev mgmt".to_owned(),
            "route add default via 198.51.100.254".to_owned(),
        ])?;
        cluster.start().with_context(|| format!("on {node}"))?;
        becomes(&cluster, 0, expected)?;
        passes(&cluster, 1440)?;
        for agent in &mut cluster.agents {
            agent.stop()?;
        }
        cluster.lab.nodes[0].ns.ip("link del mgmt")?;
    }
    Ok(())
}

#[test]
fn mtu_follows_addresses_and_routes_that_come_late() -> Result<()> {
    let mut cluster = prepare(Family::V4)?;
    let ns = &cluster.lab.nodes[0].ns;
    // State before an answer of DHCP.
    ns.ip_batch(&["address flush dev eth0".to_owned(), "link set eth0 mtu 9000".to_owned()])?;
    cluster.lab.nodes[1].ns.ip("link set eth0 mtu 9000")?;
    cluster.start()?;
    becomes(&cluster, 0, 1440)?;
    let log = std::fs::read_to_string(cluster.agents[0].log())?;
    ensure!(
        log.contains("no device leads to a peer"),
        "The log does not report the missing device: {log}"
    );
    becomes(&cluster, 1, 8940)?;
    cluster.lab.nodes[0].ns.ip_batch(&[
        "address add 192.0.2.1/24 dev eth0".to_owned(),
        "route add default via 192.0.2.254".to_owned(),
    ])?;
    becomes(&cluster, 0, 8940)?;
    passes(&cluster, 8940)?;
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn mtu_raised_and_lowered_at_run_time_is_followed() -> Result<()> {
    raised_and_lowered(Family::V4, 60)
}

#[test]
fn mtu_over_ipv6_raised_and_lowered_is_followed() -> Result<()> {
    raised_and_lowered(Family::V6, 80)
}

/// Changes the MTU of the underlay's devices several times, and checks that the overlay's MTU
/// follows. `overhead` is the size of the overlay's headers and tag over
/// this underlay, bytes.
fn raised_and_lowered(underlay: Family, overhead: u16) -> Result<()> {
    let mut cluster = prepare(underlay)?;
    cluster.start()?;
    for device in [1500, 9000, 1400, 4000, 1500] {
        for node in &cluster.lab.nodes {
            node.ns.ip(&format!("link set eth0 mtu {device}"))?;
        }
        let expected = device - overhead;
        becomes(&cluster, 0, expected.into())?;
        becomes(&cluster, 1, expected.into())?;
        passes(&cluster, expected)?;
        checks::all_reach_all(&cluster.lab)?;
        // Each node knows the other's MTU, so no path MTU counts as reduced.
        for agent in &cluster.agents {
            let wide = || Ok(agent.report()?["peers"][0]["path_mtu"].is_null());
            checks::eventually("the path is as wide as the nodes", CHANGE_TIMEOUT, wide)?;
        }
    }
    Ok(())
}

/// Waits for an MTU of 1280 bytes on the first node, with the problem in the status.
fn becomes_minimum(cluster: &Cluster) -> Result<()> {
    becomes(cluster, 0, 1280)?;
    let status = cluster.agents[0].status()?;
    let problem = status["interface"]["mtu_problem"].as_str().unwrap_or_default();
    for words in ["1240", "IPv6 pod CIDRs", "eth0, 1300 bytes"] {
        ensure!(problem.contains(words), "The problem does not contain {words:?}: {problem}");
    }
    ensure!(status["ready"] == true, "The node is not ready because of a small MTU to one peer.");
    checks::all_reach_all(&cluster.lab)
}

/// The record of one node determines which underlay devices the other nodes use for their MTU. A
/// record with an endpoint behind a device with a small MTU must not prevent the start of other
/// agents.
#[test]
fn small_underlay_mtu_leaves_minimum_mtu_and_is_reported() -> Result<()> {
    let mut cluster = prepare(Family::V4)?;
    cluster.lab.nodes[0].ns.ip("link set eth0 mtu 1300")?;
    cluster.start()?;
    becomes_minimum(&cluster)?;
    cluster.lab.nodes[0].ns.ip("link set eth0 mtu 1400")?;
    becomes(&cluster, 0, 1340)?;
    let problem = cluster.agents[0].status()?["interface"]["mtu_problem"].take();
    ensure!(problem.is_null(), "The problem is still reported: {problem}");
    checks::all_reach_all(&cluster.lab)?;
    cluster.lab.nodes[0].ns.ip("link set eth0 mtu 1300")?;
    becomes_minimum(&cluster)?;
    let log = std::fs::read_to_string(cluster.agents[0].log())?;
    ensure!(log.contains("eth0, 1300 bytes"), "The log does not name the device: {log}");
    Ok(())
}
