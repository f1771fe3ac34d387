//! Strangers, former members and eavesdroppers get nothing.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::checks;
use skein_e2e::lab::agent::{Agent, Cluster, PORT, new_key};
use skein_e2e::lab::{Family, Offloads, Plan};
use skein_e2e::load::capture::Capture;
use skein_e2e::load::pattern::Pattern;
use skein_e2e::load::udp;

fn dropped(agent: &Agent, reason: &str) -> Result<f64> {
    Ok(agent.metrics()?.sum("skein_drops_total", &[&format!("reason=\"{reason}\"")]))
}

#[test]
fn wrong_keys_get_no_session() -> Result<()> {
    let mut cluster = Cluster::prepare(skein_e2e::lab::Lab::new(&Plan::default())?, Family::V4)?;
    let stranger = new_key(&cluster.lab.directory().join("stranger.key"))?;
    let mut wrong = cluster.agents[1].record.clone();
    wrong.public_key = stranger;
    cluster.agents[0].put_record(&wrong)?;
    cluster.start()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    for family in Family::BOTH {
        checks::does_not_reach(a, b, family)?;
        checks::does_not_reach(b, a, family)?;
    }
    // A's key is right, so B may start a handshake with it; A knows no such key and refuses.
    let refused = dropped(&cluster.agents[0], "handshake_unknown_peer")?;
    ensure!(refused > 0.0, "no refused handshake is counted\n{}", cluster.logs());
    // With the right key it works, without a restart.
    cluster.agents[0].put_record(&cluster.agents[1].record)?;
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(6))?;
    Ok(())
}

#[test]
fn another_cluster_gets_no_session() -> Result<()> {
    let mut cluster = Cluster::prepare(skein_e2e::lab::Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[1].set("cluster_id", "another");
    cluster.start()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::does_not_reach(a, b, Family::V4)?;
    checks::does_not_reach(b, a, Family::V4)?;
    ensure!(dropped(&cluster.agents[1], "handshake_invalid")? > 0.0, "{}", cluster.logs());
    Ok(())
}

#[test]
fn a_removed_node_is_cut_off_within_a_second() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b, c) = (cluster.lab.pod(0), cluster.lab.pod(1), cluster.lab.pod(2));
    let (member, judge) = (&cluster.agents[0], &cluster.agents[1]);
    let (outcome, other) = thread::scope(|scope| -> Result<_> {
        let duration = Duration::from_secs(4);
        let removed = scope.spawn(move || checks::datagrams(a, b, Family::V4, 100, 1000, duration));
        let other = scope.spawn(move || checks::datagrams(c, b, Family::V6, 100, 1000, duration));
        thread::sleep(Duration::from_millis(1000));
        judge.remove_record(&member.record.name)?;
        let removed = removed.join().ok().context("the sender panicked")??;
        Ok((removed, other.join().ok().context("the sender panicked")??))
    })?;
    // A second before the removal, at most one after it.
    ensure!(outcome.received > 800, "{outcome:?}");
    ensure!(outcome.received < 2200, "{outcome:?}");
    ensure!(other.received == other.sent, "another node's traffic suffered: {other:?}");
    checks::does_not_reach(b, a, Family::V4)?;

    judge.put_record(&member.record)?;
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(6))?;
    Ok(())
}

/// Datagrams that look like every type of message, of every length, with random content.
fn garbage(number: u64) -> Vec<u8> {
    let mut random = [0; 4];
    Pattern::new(number).fill(&mut random);
    let length = usize::from(u16::from_be_bytes([random[0], random[1]]) % 1400);
    let mut bytes = vec![0; length];
    Pattern::new(number + 1_000_000).fill(&mut bytes);
    if let Some(first) = bytes.first_mut().filter(|_| !number.is_multiple_of(4)) {
        *first = random[2] % 7;
        bytes.iter_mut().skip(3).take(1).for_each(|reserved| *reserved = 0);
    }
    bytes
}

/// A socket that reaches addresses of this family.
fn socket(family: Family) -> Result<UdpSocket> {
    let any: IpAddr = match family {
        Family::V4 => [0; 4].into(),
        Family::V6 => [0_u16; 8].into(),
    };
    Ok(UdpSocket::bind((any, 0))?)
}

fn garbage_disturbs_nobody(underlay: Family) -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), underlay)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::all_reach_all(&cluster.lab)?;
    let stranger = cluster.lab.attach("stranger", 200)?;
    let target = SocketAddr::new(cluster.lab.nodes[1].underlay(underlay), PORT);

    let file = checks::start_transfer(a, b, Family::V4, 60_000_000, Some(30_000_000))?;
    let throw = stranger.spawn(move || {
        let socket = socket(underlay)?;
        for number in 0..20_000 {
            // ECONNREFUSED and a full queue are of no interest here.
            let _ = socket.send_to(&garbage(number), target);
            if number % 20 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    });
    throw.join()?;
    file.join()?;
    let metrics = cluster.agents[1].metrics()?;
    let counted = metrics.sum("skein_drops_total", &["direction=\"ingress\""]);
    ensure!(counted > 10_000.0, "{counted} of 20000 datagrams are counted as dropped");
    checks::mixed_traffic(&cluster.lab, 1 << 20)
}

#[test]
fn garbage_at_the_port_disturbs_nobody() -> Result<()> {
    garbage_disturbs_nobody(Family::V4)
}

#[test]
fn garbage_at_the_port_disturbs_nobody_over_ipv6() -> Result<()> {
    garbage_disturbs_nobody(Family::V6)
}

fn replays_are_dropped(underlay: Family) -> Result<()> {
    // On a wire, so that every datagram is captured as one.
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, underlay)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::all_reach_all(&cluster.lab)?;
    let capture = Capture::start(cluster.lab.switch()?)?;
    let at = SocketAddr::new(b.address(Family::V4), 7000);
    let receiver = udp::Receiver::start(&b.ns, at, 100)?;
    let load = udp::Load { payload: 100, rate: Some(1000), duration: Duration::from_millis(800) };
    let (sent, _) =
        a.ns.run(|| -> Result<_> { udp::send(&UdpSocket::bind("0.0.0.0:0")?, at, load) })??;
    let frames = capture.stop()?;
    let datagrams: Vec<Vec<u8>> = frames
        .iter()
        .filter_map(|frame| frame.udp().filter(|(port, _)| *port == PORT))
        .map(|(_, payload)| payload.to_vec())
        .collect();
    ensure!(datagrams.len() as u64 >= sent, "{} captured of {sent}", datagrams.len());

    let count = |agent: &Agent| -> Result<f64> {
        Ok(dropped(agent, "replayed")? + dropped(agent, "replay_window")?)
    };
    let before = count(&cluster.agents[1])?;
    let file = checks::start_transfer(b, a, Family::V6, 20_000_000, Some(20_000_000))?;
    let stranger = cluster.lab.attach("stranger", 200)?;
    let target = SocketAddr::new(cluster.lab.nodes[1].underlay(underlay), PORT);
    stranger
        .spawn(move || {
            let socket = socket(underlay)?;
            for (number, datagram) in datagrams.iter().chain(&datagrams).enumerate() {
                let _ = socket.send_to(datagram, target);
                if number % 20 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(())
        })
        .join()?;
    file.join()?;
    let outcome = receiver.stop()?;
    ensure!(outcome.received == sent, "{sent} sent, {} received", outcome.received);
    let replays = count(&cluster.agents[1])? - before;
    ensure!(replays >= sent as f64, "{replays} replays counted of at least {sent}");
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn replayed_datagrams_are_dropped() -> Result<()> {
    replays_are_dropped(Family::V4)
}

#[test]
fn replayed_datagrams_are_dropped_over_ipv6() -> Result<()> {
    replays_are_dropped(Family::V6)
}

#[test]
fn nothing_readable_crosses_the_underlay() -> Result<()> {
    let plan = Plan { offloads: Offloads::Wire, ..Plan::default() };
    let cluster = Cluster::up(&plan, Family::V4)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let capture = Capture::start(cluster.lab.switch()?)?;
    for family in Family::BOTH {
        checks::datagrams_arrive(a, b, family, 300)?;
    }
    let frames = capture.stop()?;
    // The content of the first datagram, as the sender makes it.
    let mut content = [0; 64];
    Pattern::new(0).fill(&mut content);
    let overlay = frames.iter().filter(|f| f.udp().is_some_and(|(port, _)| port == PORT)).count();
    ensure!(overlay > 10, "{overlay} datagrams of the overlay are captured");
    ensure!(!frames.iter().any(|frame| frame.contains(&content)), "clear text on the underlay");
    for address in [a.v4.octets(), b.v4.octets()] {
        let seen = frames.iter().any(|frame| frame.contains(&address));
        ensure!(!seen, "a pod's address on the underlay");
    }
    Ok(())
}

/// A node may send for its own pods only.
#[test]
fn packets_with_a_foreign_source_are_dropped() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b, c) = (cluster.lab.pod(0), cluster.lab.pod(1), cluster.lab.pod(2));
    let node = &cluster.lab.nodes[0].ns;
    node.sysctl("net.ipv4.conf.all.rp_filter", "0")?;
    node.sysctl(&format!("net.ipv4.conf.{}.rp_filter", a.host_interface), "0")?;
    a.ns.ip(&format!("address add {}/32 dev eth0", c.v4))?;
    let before = dropped(&cluster.agents[1], "inner_source")?;
    let spoof =
        a.ns.command("ping")
            .args(["-n", "-c", "3", "-i", "0.05", "-W", "1", "-I"])
            .args([c.v4.to_string(), b.v4.to_string()])
            .output()?;
    ensure!(!spoof.status.success(), "a spoofed ping was answered");
    let after = dropped(&cluster.agents[1], "inner_source")?;
    ensure!(after >= before + 3.0, "{before} drops before, {after} after");
    Ok(())
}
