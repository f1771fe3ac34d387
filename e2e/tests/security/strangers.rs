//! Unauthenticated senders, removed nodes, holders of a stolen key, and eavesdroppers.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Agent, Cluster, PORT, new_key};
use skein_lab::checks;
use skein_lab::link::{advertise_router, bridge, enslave, veth};
use skein_lab::load::capture::Capture;
use skein_lab::load::pattern::Pattern;
use skein_lab::load::progress::FlowProgress;
use skein_lab::load::{retry_bind, udp};
use skein_lab::{Family, Netns, Offloads, Plan, Pod, Task};

fn dropped(agent: &Agent, reason: &str) -> Result<f64> {
    Ok(agent.metrics()?.sum("skein_drops_total", &[&format!("reason=\"{reason}\"")]))
}

#[test]
fn wrong_keys_get_no_session() -> Result<()> {
    let mut cluster = Cluster::prepare(skein_lab::Lab::new(&Plan::default())?, Family::V4)?;
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
    // Node b has the right key of node a and starts a handshake; node a does not know b's key.
    let refused = dropped(&cluster.agents[0], "handshake_unknown_peer")?;
    ensure!(refused > 0.0, "No refused handshake is counted.\n{}", cluster.logs());
    // The corrected record takes effect without a restart.
    cluster.agents[0].put_record(&cluster.agents[1].record)?;
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    Ok(())
}

/// Creates a namespace that is linked to a new interface of `node`.
fn neighbour(node: &Netns, label: &str, interface: &str) -> Result<Netns> {
    let ns = Netns::create(label)?;
    veth((&ns, "eth0"), (node, interface), 1500)?;
    ns.ip("address add fe80::bad/64 dev eth0 nodad")?;
    Ok(ns)
}

#[test]
fn advertisements_count_on_the_uplink_only() -> Result<()> {
    let mut cluster = Cluster::prepare(skein_lab::Lab::new(&Plan::default())?, Family::V4)?;
    let accept_ra = |node: &Netns, interface: &str| {
        node.sh(&format!("cat /proc/sys/net/ipv6/conf/{interface}/accept_ra"))
    };
    let uplink = "2001:db8:1::".parse()?;
    let router = {
        let node = &cluster.lab.nodes[0].ns;
        node.sysctl("net.ipv6.conf.all.forwarding", "0")?;
        let router = neighbour(node, "router", "uplink")?;
        node.sysctl("net.ipv6.conf.uplink.accept_ra", "1")?;
        let end = Instant::now() + checks::EVENT_TIMEOUT;
        while !node.ip("-6 route show default")?.contains("dev uplink proto ra") {
            ensure!(Instant::now() < end, "The node learns no route from the uplink.");
            advertise_router(&router, "eth0", uplink)?;
            thread::sleep(Duration::from_millis(100));
        }
        router
    };
    cluster.start()?;
    let node = &cluster.lab.nodes[0].ns;
    let routes = || node.ip("-6 route show");
    let learned = "default via fe80::bad dev uplink";
    ensure!(routes()?.contains(learned), "The route of the uplink is lost: {}", routes()?);
    ensure!(accept_ra(node, "uplink")?.trim() == "2", "The uplink ignores its router.");
    // Another network of the node, as another CNI plugin or a container engine creates it.
    bridge(node, "br-other")?;
    let container = neighbour(node, "container", "port")?;
    enslave(node, "port", "br-other")?;
    for interface in ["all", "default", "br-other"] {
        let value = accept_ra(node, interface)?;
        ensure!(value.trim() == "1", "accept_ra of {interface} is {value} instead of 1.");
    }
    for _ in 0..5 {
        advertise_router(&container, "eth0", "2001:db8:bad::".parse()?)?;
        advertise_router(&router, "eth0", uplink)?;
        thread::sleep(Duration::from_millis(200));
        let routes = routes()?;
        let is_unchanged = !routes.contains("2001:db8:bad");
        ensure!(is_unchanged, "A container's advertisement changed the routes: {routes}");
        let defaults = routes.lines().filter(|line| line.starts_with("default"));
        for route in defaults {
            let is_uplink = route.contains("dev uplink");
            ensure!(is_uplink, "A container's advertisement changed the routes: {routes}");
        }
        ensure!(routes.contains(learned), "The route of the uplink is lost: {routes}");
    }
    Ok(())
}

#[test]
fn another_cluster_gets_no_session() -> Result<()> {
    let mut cluster = Cluster::prepare(skein_lab::Lab::new(&Plan::default())?, Family::V4)?;
    cluster.agents[1].set("cluster_id", "another");
    cluster.start()?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::does_not_reach(a, b, Family::V4)?;
    checks::does_not_reach(b, a, Family::V4)?;
    let invalid = dropped(&cluster.agents[1], "handshake_invalid")?;
    ensure!(invalid > 0.0, "No refused handshake is counted.\n{}", cluster.logs());
    Ok(())
}

/// Datagrams of the node arrive until its record is removed, and none after the peer has left the
/// report of the node that reads the change.
#[test]
fn removed_node_is_cut_off() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b, c) = (cluster.lab.pod(0), cluster.lab.pod(1), cluster.lab.pod(2));
    let (member, judge) = (&cluster.agents[0], &cluster.agents[1]);
    let to = (b.address(Family::V4), 7000).into();
    let arrived = Arc::<FlowProgress>::default();
    let receiver = udp::Receiver::start_with_progress(&b.ns, to, 100, &arrived)?;
    let stop = AtomicBool::new(false);
    let (late, other) = thread::scope(|scope| -> Result<_> {
        let sender = scope.spawn(|| -> Result<()> {
            let socket = a.ns.run(|| udp::bind_for(to))??;
            while !stop.load(Ordering::Relaxed) {
                // A refusal of an earlier datagram is reported here.
                let _ = socket.send_to(&[7; 100], to);
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        let duration = Duration::from_secs(4);
        let other = scope.spawn(move || checks::datagrams(c, b, Family::V6, 100, 1000, duration));
        let removed = || -> Result<u64> {
            let come = || Ok(arrived.bytes() > 100 * 500);
            checks::eventually("datagrams arrive", checks::EVENT_TIMEOUT, come)?;
            judge.remove_record(&member.record.name)?;
            let gone = || Ok(judge.report()?["peers"].as_array().map(Vec::len) == Some(1));
            checks::eventually("the peer is removed", checks::EVENT_TIMEOUT, gone)?;
            // Datagrams that passed before may still wait in a queue.
            let quiet = || {
                let before = arrived.bytes();
                thread::sleep(Duration::from_millis(300));
                Ok(arrived.bytes() == before)
            };
            checks::eventually("no further datagram arrives", checks::EVENT_TIMEOUT, quiet)?;
            let before = arrived.bytes();
            thread::sleep(Duration::from_secs(1));
            Ok(arrived.bytes() - before)
        };
        let late = removed();
        stop.store(true, Ordering::Relaxed);
        sender.join().ok().context("the sender panicked")??;
        Ok((late?, other.join().ok().context("the sender panicked")??))
    })?;
    receiver.stop()?;
    ensure!(late == 0, "{late} bytes of the removed node arrived.");
    ensure!(other.received == other.sent, "Another node lost datagrams: {other:?}");
    checks::does_not_reach(b, a, Family::V4)?;

    judge.put_record(&member.record)?;
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    Ok(())
}

/// Starts a connection that sends without a pause until no byte has arrived for ten seconds. The
/// task returns the time of the last byte; `arrived` counts the bytes.
fn connection(
    from: &Pod,
    to: &Pod,
    port: u16,
    arrived: &Arc<FlowProgress>,
) -> Result<Task<Instant>> {
    let at = SocketAddr::new(to.address(Family::V4), port);
    let listener = to.ns.run(|| retry_bind(|| TcpListener::bind(at)))??;
    let mut sender = from.ns.run(|| TcpStream::connect_timeout(&at, checks::EVENT_TIMEOUT))??;
    let (mut receiver, _) = listener.accept()?;
    thread::spawn(move || {
        while sender.write_all(&[7; 100]).is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
    });
    receiver.set_read_timeout(Some(Duration::from_secs(10)))?;
    let arrived = Arc::clone(arrived);
    Ok(to.ns.spawn(move || {
        let mut last = Instant::now();
        while let Ok(length @ 1..) = receiver.read(&mut [0; 4096]) {
            arrived.add_received(length as u64);
            last = Instant::now();
        }
        Ok(last)
    }))
}

#[test]
fn connections_of_a_removed_node_end_in_both_directions() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    let (a, b, c) = (cluster.lab.pod(0), cluster.lab.pod(1), cluster.lab.pod(2));
    let (member, judge) = (&cluster.agents[0], &cluster.agents[1]);
    checks::wait_until_reached(a, b, Family::V4, checks::EVENT_TIMEOUT)?;
    let others = checks::start_transfer(c, b, Family::V6, 8 << 20, Some(2 << 20))?;
    let arrived = [Arc::default(), Arc::default()];
    let ends = [connection(a, b, 7001, &arrived[0])?, connection(b, a, 7002, &arrived[1])?];
    let both = || Ok(arrived.iter().all(|way| way.bytes() > 10_000));
    checks::eventually("both connections carry bytes", checks::EVENT_TIMEOUT, both)?;
    let removed = Instant::now();
    judge.remove_record(&member.record.name)?;
    for (end, way) in ends.into_iter().zip(["from the removed node", "to the removed node"]) {
        let last = end.join()?;
        let after = last.saturating_duration_since(removed);
        println!(
            "the last byte {way} arrived {:.0} ms after the removal of the record",
            after.as_secs_f64() * 1e3
        );
        ensure!(after < checks::EVENT_TIMEOUT, "Bytes {way} still arrived after {after:?}.");
    }
    others.join().context("the connection of another node failed")?;
    Ok(())
}

/// Node d has the stolen key of node a, and claims the pod CIDRs of the nodes a and c. Node b
/// accepts packets with sources of node a only.
#[test]
fn stolen_key_gives_access_as_its_node_only() -> Result<()> {
    let mut cluster =
        Cluster::prepare(skein_lab::Lab::new(&Plan { nodes: 4, ..Plan::default() })?, Family::V4)?;
    let stolen = fs::read(cluster.lab.directory().join("node-a/node.key"))?;
    let others: Vec<_> = cluster.agents[..3].iter().map(|agent| agent.record.clone()).collect();
    for agent in &cluster.agents[..3] {
        agent.remove_record("node-d")?;
    }
    let thief = &mut cluster.agents[3];
    fs::write(cluster.lab.directory().join("node-d/node.key"), stolen)?;
    // The record of the thief has the pod CIDRs of node a and of node c.
    thief.remove_record("node-a")?;
    thief.remove_record("node-c")?;
    thief.record.public_key = others[0].public_key.clone();
    thief.record.pod_cidrs = [&others[0].pod_cidrs[..], &others[2].pod_cidrs[..]].concat();
    thief.put_record(&thief.record)?;
    // A thief switches off the firewall rules of its own node.
    for rule in ["drop_spoofed", "drop_cleartext", "drop_transit", "masquerade_foreign"] {
        thief.set(&format!("firewall.{rule}"), false);
    }
    cluster.start()?;
    let (b, c, d) = (cluster.lab.pod(1), cluster.lab.pod(2), cluster.lab.pod(3));
    checks::reaches(b, c, Family::V4)?;
    let victim = &cluster.agents[1];

    // A transfer between two other nodes is not disturbed.
    let transfer = checks::start_transfer(b, c, Family::V4, 16 << 20, Some(8 << 20))?;
    let node = &cluster.lab.nodes[3].ns;
    node.sysctl("net.ipv4.conf.all.rp_filter", "0")?;
    node.sysctl(&format!("net.ipv4.conf.{}.rp_filter", d.host_interface), "0")?;
    let of_a = Ipv4Addr::new(10, 244, 1, 77);
    for source in [of_a, c.v4] {
        d.ns.ip(&format!("address add {source}/32 dev eth0"))?;
    }
    let at = SocketAddr::new(b.v4.into(), 7003);
    let receiver = udp::Receiver::start(&b.ns, at, 100)?;
    let before = dropped(victim, "inner_source")?;
    let load = udp::Load { payload: 100, rate: Some(100), duration: Duration::from_secs(1) };
    let send =
        |source: Ipv4Addr| d.ns.run(|| udp::send(&UdpSocket::bind((source, 0))?, at, load))?;
    let as_another = send(c.v4)?.0;
    // The agent reads the counters at most once per second.
    thread::sleep(Duration::from_millis(1200));
    let after = dropped(victim, "inner_source")?;
    ensure!(after > before, "No packet with a source of node c was dropped; is there a session?");
    let as_itself = send(of_a)?.0;
    let outcome = receiver.stop()?;
    println!(
        "{as_another} datagrams sent as a pod of node c, {} dropped; {as_itself} sent as a pod of \
         node a, {} arrived",
        after - before,
        outcome.received
    );
    ensure!(outcome.received > 0, "The thief cannot send as node a: {outcome:?}");
    ensure!(outcome.received <= as_itself, "The thief sends as another node: {outcome:?}");
    transfer.join().context("the transfer between two other nodes failed")?;
    // Packets to node a go to the endpoints of its record.
    checks::does_not_reach(b, d, Family::V4)
}

/// Creates a datagram with random content and length; three of four have a valid message type.
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

/// Binds a socket to any address and port of the family.
fn socket(family: Family) -> Result<UdpSocket> {
    let any: IpAddr = match family {
        Family::V4 => [0; 4].into(),
        Family::V6 => [0_u16; 8].into(),
    };
    Ok(UdpSocket::bind((any, 0))?)
}

fn garbage_does_not_disturb_traffic(underlay: Family) -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), underlay)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::all_reach_all(&cluster.lab)?;
    let stranger = cluster.lab.attach("stranger", 200)?;
    let target = SocketAddr::new(cluster.lab.nodes[1].underlay(underlay), PORT);

    let file = checks::start_transfer(a, b, Family::V4, 60_000_000, Some(30_000_000))?;
    let throw = stranger.spawn(move || {
        let socket = socket(underlay)?;
        for number in 0..20_000 {
            // Send errors such as ECONNREFUSED and ENOBUFS are ignored.
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
    ensure!(counted > 10_000.0, "Only {counted} of 20000 datagrams are counted as dropped.");
    checks::mixed_traffic(&cluster.lab, 1 << 20)
}

#[test]
fn garbage_at_the_port_does_not_disturb_traffic() -> Result<()> {
    garbage_does_not_disturb_traffic(Family::V4)
}

#[test]
fn garbage_at_the_port_does_not_disturb_traffic_over_ipv6() -> Result<()> {
    garbage_does_not_disturb_traffic(Family::V6)
}

fn replays_are_dropped(underlay: Family) -> Result<()> {
    // Without GSO and GRO on the underlay, every datagram is captured as one frame.
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
    let captured = datagrams.len() as u64;
    ensure!(captured >= sent, "Only {captured} of {sent} datagrams were captured.");

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
    let received = outcome.received;
    ensure!(received == sent, "The pod received {received} datagrams instead of {sent}.");
    let replays = count(&cluster.agents[1])? - before;
    ensure!(replays >= sent as f64, "Only {replays} of {sent} replays are counted.");
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
    // Content of the first datagram, as the sender creates it.
    let mut content = [0; 64];
    Pattern::new(0).fill(&mut content);
    let overlay = frames.iter().filter(|f| f.udp().is_some_and(|(port, _)| port == PORT)).count();
    ensure!(overlay > 10, "Only {overlay} datagrams of the overlay were captured.");
    let leaks = frames.iter().any(|frame| frame.contains(&content));
    ensure!(!leaks, "The underlay carries the payload in clear text.");
    for address in [a.v4.octets(), b.v4.octets()] {
        let seen = frames.iter().any(|frame| frame.contains(&address));
        ensure!(!seen, "The underlay carries the address of a pod in clear text.");
    }
    Ok(())
}

/// A node may send for its own pods only.
#[test]
fn packets_with_a_foreign_source_are_dropped() -> Result<()> {
    let lab = skein_lab::Lab::new(&Plan { nodes: 3, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    // The sending node's own rules would drop or change the packets.
    for rule in ["drop_spoofed", "drop_transit", "masquerade_foreign"] {
        cluster.agents[0].set(&format!("firewall.{rule}"), false);
    }
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b, c) = (cluster.lab.pod(0), cluster.lab.pod(1), cluster.lab.pod(2));
    let node = &cluster.lab.nodes[0].ns;
    node.sysctl("net.ipv4.conf.all.rp_filter", "0")?;
    node.sysctl(&format!("net.ipv4.conf.{}.rp_filter", a.host_interface), "0")?;
    a.ns.ip(&format!("address add {}/32 dev eth0", c.v4))?;
    a.ns.ip(&format!("address add {}/128 dev eth0 nodad", c.v6))?;
    for family in Family::BOTH {
        let before = dropped(&cluster.agents[1], "inner_source")?;
        let spoof =
            a.ns.command("ping")
                .args(["-n", "-c", "3", "-i", "0.05", "-W", "1", "-I"])
                .args([c.address(family).to_string(), b.address(family).to_string()])
                .output()?;
        ensure!(!spoof.status.success(), "A spoofed ping was answered ({family}).");
        let counted = || Ok(dropped(&cluster.agents[1], "inner_source")? - before >= 3.0);
        checks::eventually("3 drops are counted", checks::EVENT_TIMEOUT, counted)?;
    }
    Ok(())
}

/// A node delivers packets to its own pods only, and forwards none to other nodes or networks.
#[test]
fn packets_for_foreign_destinations_are_dropped() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    let (first, second) = (cluster.lab.pod(0), cluster.lab.pod(1));
    checks::wait_until_reached(first, second, Family::V4, checks::EVENT_TIMEOUT)?;
    let (sender, receiver) = (&cluster.agents[0], &cluster.agents[1]);
    // The sender's record of node b has the pod CIDRs of node c and a further network.
    let mut record = receiver.record.clone();
    record.pod_cidrs.push("10.99.0.0/24".to_owned());
    let of_c = &cluster.agents[2].record;
    record.pod_cidrs.extend(of_c.pod_cidrs.iter().cloned());
    sender.remove_record(&of_c.name)?;
    sender.put_record(&record)?;
    let (a, c) = (cluster.lab.pod(0), cluster.lab.pod(2));
    let routed = || Ok(cluster.lab.nodes[0].ns.ip("route show proto 77")?.contains("10.99.0.0/24"));
    checks::eventually("the route", checks::EVENT_TIMEOUT, routed)?;
    for to in ["10.99.0.5".to_owned(), c.v4.to_string()] {
        let before = dropped(receiver, "inner_destination")?;
        let pings =
            a.ns.command("ping").args(["-n", "-c", "3", "-i", "0.05", "-W", "1", &to]).output()?;
        ensure!(!pings.status.success(), "A node without {to} forwarded a ping to it.");
        // The agent reads the counters at most once per second.
        let counted = || Ok(dropped(receiver, "inner_destination")? - before >= 3.0);
        checks::eventually("3 drops are counted", checks::EVENT_TIMEOUT, counted)?;
    }
    Ok(())
}
