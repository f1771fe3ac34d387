//! Traffic between pods over the overlay: all protocols, sizes and address families.

use anyhow::{Result, ensure};
use skein_lab::agent::Cluster;
use skein_lab::checks;
use skein_lab::load::iperf::{self, Flow};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::{Family, Offloads, Plan};

fn iperf_both_ways(underlay: Family) -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), underlay)?;
    checks::all_reach_all(&cluster.lab)?;
    for (from, to) in [(0, 1), (1, 0)] {
        let (from, to) = (cluster.lab.pod(from), cluster.lab.pod(to));
        let _server = iperf::Server::start(&to.ns)?;
        for family in Family::BOTH {
            let address = to.address(family);
            for (flow, reverse) in [
                (Flow::Tcp { streams: 1 }, false),
                (Flow::Tcp { streams: 4 }, true),
                (Flow::Udp { payload: 1200, megabits: 50 }, false),
            ] {
                let outcome = iperf::run(&from.ns, address, flow, 1, reverse)?;
                let megabits = outcome.bits_per_second * 1e-6;
                ensure!(megabits > 30.0, "{flow:?} over {family} is too slow: {outcome:?}");
                let lost = outcome.lost_percent;
                ensure!(lost < 1.0, "{flow:?} over {family} lost {lost} % of its datagrams.");
            }
        }
    }
    Ok(())
}

#[test]
fn iperf3_both_ways_over_an_ipv4_underlay() -> Result<()> {
    iperf_both_ways(Family::V4)
}

#[test]
fn iperf3_both_ways_over_an_ipv6_underlay() -> Result<()> {
    iperf_both_ways(Family::V6)
}

#[test]
fn iperf3_over_an_underlay_without_segmentation_offload() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, Family::V4)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let _server = iperf::Server::start(&b.ns)?;
    for family in Family::BOTH {
        for reverse in [false, true] {
            let flow = Flow::Tcp { streams: 2 };
            let outcome = iperf::run(&a.ns, b.address(family), flow, 1, reverse)?;
            ensure!(outcome.bits_per_second > 30e6, "TCP over {family} is too slow: {outcome:?}");
        }
    }
    checks::mixed_traffic(&cluster.lab, 4 << 20)
}

#[test]
fn three_nodes_reach_each_other() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn tiny_large_and_odd_datagrams_arrive_whole() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    for family in Family::BOTH {
        // The MTU of the pods is 1420: the last two sizes fill one packet, and exceed it by one
        // byte.
        let full = if family == Family::V4 { 1420 - 28 } else { 1420 - 48 };
        for payload in [0, 1, 2, 7, 8, 9, 63, 64, 65, 511, 1023, 1200, full - 1, full, full + 1] {
            checks::datagrams_arrive(a, b, family, payload)?;
            checks::datagrams_arrive(b, a, family, payload)?;
        }
    }
    Ok(())
}

#[test]
fn fragmented_datagrams_arrive_whole() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    for family in Family::BOTH {
        for payload in [3000, 9000, 30_000, 60_000, 65_000] {
            checks::datagrams_arrive(a, b, family, payload)?;
            checks::datagrams_arrive(b, a, family, payload)?;
        }
    }
    Ok(())
}

#[test]
fn echoes_of_every_size_come_back() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    for family in Family::BOTH {
        for payload in [0, 1, 16, 500, 1372, 1373, 4000, 20_000] {
            let answers = ping(&a.ns, b.address(family), Ping { payload, ..Ping::default() })?;
            ensure!(answers.complete(), "{payload} bytes over {family} are lost: {}", answers.text);
        }
    }
    Ok(())
}

/// The node sends ICMP messages to pods with an MTU of 1500 bytes, and the pods reduce their
/// packets.
#[test]
fn packets_that_are_too_big_are_answered_with_the_right_mtu() -> Result<()> {
    let plan = Plan { pod_mtu: 1500, ..Plan::default() };
    for (underlay, mtu) in [(Family::V4, 1440), (Family::V6, 1420)] {
        let cluster = Cluster::up(&plan, underlay)?;
        let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
        checks::all_reach_all(&cluster.lab)?;
        for (family, payload) in [(Family::V4, 1500 - 28), (Family::V6, 1500 - 48)] {
            let too_big = Ping { count: 2, payload, whole: true, ..Ping::default() };
            let answers = ping(&a.ns, b.address(family), too_big)?;
            let text = &answers.text;
            ensure!(answers.received == 0, "A packet over the MTU arrived ({family}): {text}");
            let is_reported = text.to_lowercase().replace(' ', "").contains(&format!("mtu={mtu}"));
            ensure!(is_reported, "ICMP reports another MTU than {mtu} ({family}): {text}");
            // After the ICMP messages, all traffic passes.
            checks::transfer(a, b, family, 4 << 20)?;
            checks::transfer(b, a, family, 4 << 20)?;
        }
    }
    Ok(())
}

/// Both nodes may start a handshake for their first session at the same time.
#[test]
fn simultaneous_handshakes_establish_a_session() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let (there, back) = std::thread::scope(|scope| {
        let limit = checks::EVENT_TIMEOUT;
        let there = scope.spawn(move || checks::wait_until_reached(a, b, Family::V4, limit));
        let back = scope.spawn(move || checks::wait_until_reached(b, a, Family::V6, limit));
        (there.join(), back.join())
    });
    ensure!(there.is_ok_and(|r| r.is_ok()) && back.is_ok_and(|r| r.is_ok()));
    checks::mixed_traffic(&cluster.lab, 1 << 20)
}
