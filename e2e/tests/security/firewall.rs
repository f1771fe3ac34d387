//! The nftables table of a node: packets that pass the node's border, with and without the CNI
//! plugin.

use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::load::capture::Capture;
use skein_lab::load::{retry_bind, udp};
use skein_lab::{Family, Netns, checks, link};

use crate::border::{Border, PORT, outside, request, source_of};

/// A plain frame with a pod's source, sent to the node's hardware address, does not reach a pod.
#[test]
fn pod_source_from_the_underlay_is_dropped_and_counted() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |_| ())?;
        let outsider = border.outsider()?;
        for family in Family::BOTH {
            let (target, by) =
                (border.pod(0).address(family), border.cluster.lab.nodes[0].underlay(family));
            let before = border.drops("spoofed_source", family)?;
            let sources = border.pod_sources(family)?;
            for source in &sources {
                let arrived = border.spoof(&outsider, *source, target, by)?;
                ensure!(!arrived, "a frame with the source {source} reached the pod (cni {cni})");
            }
            let counted = border.drops("spoofed_source", family)? - before;
            let expected = 5.0 * sources.len() as f64;
            ensure!(counted >= expected, "{counted} of {expected} drops are counted ({family})");
        }
        for family in Family::BOTH {
            checks::reaches(border.pod(0), border.pod(1), family)?;
        }
    }
    Ok(())
}

/// Counter-check of the test above: without the rule, its frames do reach the pod.
#[test]
fn pod_source_from_the_underlay_passes_if_switched_off() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |agent| {
            agent.set("firewall.drop_spoofed", false);
            agent.set("firewall.drop_transit", false);
        })?;
        let outsider = border.outsider()?;
        for family in Family::BOTH {
            let (target, by) =
                (border.pod(0).address(family), border.cluster.lab.nodes[0].underlay(family));
            let source = border.pod(1).address(family);
            // The first neighbour solicitations of a new interface may fail.
            checks::eventually("a spoofed frame arrives", checks::EVENT_TIMEOUT, || {
                border.spoof(&outsider, source, target, by)
            })
            .with_context(|| format!("source {source}, cni {cni}"))?;
        }
    }
    Ok(())
}

/// A route of another program leads a pod's address to the underlay; the packets are dropped at the
/// node's border.
#[test]
fn packet_to_a_pod_by_the_underlay_is_dropped_and_counted() -> Result<()> {
    for (cni, drop) in [(true, true), (false, true), (true, false)] {
        let border = Border::up(cni, |agent| agent.set("firewall.drop_cleartext", drop))?;
        let _outsider = border.outsider()?;
        for family in Family::BOTH {
            let target = border.pod(1).address(family);
            let (bits, by) = match family {
                Family::V4 => (32, "192.0.2.77"),
                Family::V6 => (128, "2001:db8::4d"),
            };
            let before = border.drops("cleartext", family)?;
            border.node(0).ip(&format!("route add {target}/{bits} via {by} proto static"))?;
            let capture = Capture::start(border.cluster.lab.switch()?)?;
            for from in [&border.pod(0).ns, border.node(0)] {
                // No host answers, and the node refuses its own process's datagrams.
                let _ = udp::arrives(from, &border.pod(1).ns, (target, PORT).into());
            }
            let frames = capture.stop()?;
            let bytes = match target {
                IpAddr::V4(target) => target.octets().to_vec(),
                IpAddr::V6(target) => target.octets().to_vec(),
            };
            // Neighbour discovery names no pod: the next hop is a machine of the underlay.
            let clear = frames.iter().filter(|frame| frame.contains(&bytes)).count();
            let counted = border.drops("cleartext", family)? - before;
            if drop {
                ensure!(clear == 0, "{clear} packets to {target} are on the underlay (cni {cni})");
                ensure!(counted >= 5.0, "{counted} drops are counted ({family}, cni {cni})");
            } else {
                ensure!(clear >= 5 && counted == 0.0, "{clear} captured, {counted} counted");
            }
            border.node(0).ip(&format!("route del {target}/{bits}"))?;
        }
    }
    Ok(())
}

/// A machine of the underlay that routes pods' prefixes to a node reaches no pod, neither of that
/// node nor of another, and no answer crosses the underlay in clear. With the switch off it does: a
/// router or a load balancer may send to pods' addresses.
#[test]
fn node_is_no_gateway_to_pods_for_the_underlay() -> Result<()> {
    for (cni, drop) in [(true, true), (false, true), (true, false), (false, false)] {
        let border = Border::up(cni, |agent| agent.set("firewall.drop_transit", drop))?;
        let outsider = border.outsider()?;
        for family in Family::BOTH {
            let (own, by) = (outside(family)?, border.cluster.lab.nodes[0].underlay(family));
            for node in &border.cluster.lab.nodes {
                outsider.ip(&format!("route replace {} via {by}", node.pod_cidr(family)))?;
            }
            for node in [0, 1] {
                let pod = border.pod(node);
                let target = pod.address(family);
                let before = border.drops("transit", family)?;
                let capture = Capture::start(border.cluster.lab.switch()?)?;
                let seen = request(&outsider, own, target, &pod.ns, target)?;
                // The capture may lag behind the last answer.
                thread::sleep(Duration::from_millis(100));
                let frames = capture.stop()?;
                let answers = frames.iter().filter(|frame| frame.contains(b"answer")).count();
                let counted = border.drops("transit", family)? - before;
                let case =
                    format!("{target}, cni {cni}: {seen:?}, {answers} answers, {counted} counted");
                if drop {
                    ensure!(seen.is_none() && answers == 0, "an outsider reaches {case}");
                    ensure!(counted >= 10.0, "not every drop is counted: {case}");
                } else {
                    ensure!(seen.is_some() && answers > 0, "switched off, to {case}");
                    ensure!(counted == 0.0, "switched off, to {case}");
                }
            }
        }
    }
    Ok(())
}

/// The rule of the test above spares translated connections (a NodePort, a hostPort) and answers to
/// pods that keep their own address outside the cluster.
#[test]
fn translated_connections_and_answers_reach_pods() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |agent| agent.set("cni.masquerade", false))?;
        let outsider = border.outsider()?;
        for family in Family::BOTH {
            let (own, node) = (outside(family)?, border.cluster.lab.nodes[0].underlay(family));
            let word = if family == Family::V4 { "ip" } else { "ip6" };
            let cidr = border.cluster.lab.nodes[0].pod_cidr(family);
            outsider.ip(&format!("route replace {cidr} via {node}"))?;
            for pod in [border.pod(0), border.pod(1)] {
                let target = pod.address(family);
                border.node(0).nft(&format!(
                    "add table {word} ports\ndelete table {word} ports\nadd table {word} ports\n\
                     add chain {word} ports pre {{ type nat hook prerouting priority dstnat ; }}\n\
                     add rule {word} ports pre {word} daddr {node} udp dport {PORT} dnat to {target}"
                ))?;
                let seen = request(&outsider, own, node, &pod.ns, target)?;
                ensure!(seen.is_some(), "a port of the node does not lead to {target} (cni {cni})");
            }
            let pod = border.pod(0);
            let source = pod.address(family);
            let seen = request(&pod.ns, source, own, &outsider, own)?;
            ensure!(seen == Some(source), "{source} gets no answer as {seen:?} (cni {cni})");
        }
    }
    Ok(())
}

/// A NAT rule for the overlay's port, as portmap adds it for a hostPort, does not apply to the
/// overlay's datagrams.
#[test]
fn host_port_takes_none_of_the_overlays_datagrams() -> Result<()> {
    let border = Border::up(true, |_| ())?;
    let target = border.pod(0).v4;
    border.node(0).nft(&format!(
        "add table ip ports\n\
         add chain ip ports pre {{ type nat hook prerouting priority dstnat ; }}\n\
         add rule ip ports pre udp dport 51900 fib daddr type local dnat to {target}"
    ))?;
    border.node(0).sh("conntrack -F")?;
    let received = udp::arrives(border.node(1), &border.pod(0).ns, ("192.0.2.1:51900").parse()?)?;
    ensure!(!received, "The pod receives datagrams of the overlay's port.");
    for family in Family::BOTH {
        checks::reaches(border.pod(0), border.pod(1), family)?;
    }
    Ok(())
}

/// Sources outside the node's pod CIDRs reach a remote pod, with the node's address on the overlay.
#[test]
fn foreign_sources_reach_a_remote_pod() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |agent| agent.set("cni.masquerade", false))?;
        let outsider = border.outsider()?;
        for family in Family::BOTH {
            let target = border.pod(1).address(family);
            let (node, overlay, own) = match family {
                Family::V4 => ("192.0.2.1", "10.244.1.1", "192.0.2.77"),
                Family::V6 => ("2001:db8::1", "fd00:10:244:1::1", "2001:db8::4d"),
            };
            let overlay: IpAddr = overlay.parse()?;
            // A process of the node that is bound to the node's address.
            let seen = source_of(border.node(0), node.parse()?, &border.pod(1).ns, target)?;
            ensure!(seen == Some(overlay), "a process of the node is seen as {seen:?} (cni {cni})");
            // An outside client whose packets the node translates to the remote pod.
            let service: IpAddr = match family {
                Family::V4 => "198.51.100.1".parse()?,
                Family::V6 => "2001:db8:5::1".parse()?,
            };
            let (word, bits) = if family == Family::V4 { ("ip", 32) } else { ("ip6", 128) };
            border.node(0).nft(&format!(
                "add table {word} service\n\
                 add chain {word} service pre {{ type nat hook prerouting priority dstnat ; }}\n\
                 add chain {word} service out {{ type nat hook output priority -100 ; }}\n\
                 add rule {word} service pre {word} daddr {service} dnat to {target}\n\
                 add rule {word} service out {word} daddr {service} dnat to {target}"
            ))?;
            outsider.ip(&format!("route replace {service}/{bits} via {node}"))?;
            border.node(0).ip(&format!("route replace {service}/{bits} dev eth0"))?;
            let seen = request(&outsider, own.parse()?, service, &border.pod(1).ns, target)?;
            ensure!(seen == Some(overlay), "an outside client is seen as {seen:?} (cni {cni})");
            // A process of the node that connects to the service.
            let seen = request(border.node(0), node.parse()?, service, &border.pod(1).ns, target)?;
            ensure!(seen == Some(overlay), "a client of the node is seen as {seen:?} (cni {cni})");
            // A pod keeps its address on the way to a remote pod, and has its node's outside the
            // tunnel.
            let pod = border.pod(0);
            let seen = udp::source_seen(&pod.ns, &border.pod(1).ns, target)?;
            ensure!(seen == pod.address(family), "a pod is seen as {seen}");
            // The records of the laboratory have endpoints of IPv4 only.
            if family == Family::V4 {
                let other = border.cluster.lab.nodes[1].underlay(family);
                let seen = udp::source_seen(&pod.ns, border.node(1), other)?;
                ensure!(seen == node.parse::<IpAddr>()?, "node-b sees a pod as {seen} (cni {cni})");
            }
        }
    }
    Ok(())
}

/// The overlay's datagrams have no entries in the nodes' conntrack tables, unless the setting is
/// off.
#[test]
fn overlay_flows_have_no_conntrack_entries() -> Result<()> {
    for (cni, notrack) in [(true, true), (false, true), (false, false)] {
        let border = Border::up(cni, |agent| agent.set("firewall.notrack", notrack))?;
        for node in [0, 1] {
            // The first datagrams are sent before the agent knows the data process's ports.
            border.node(node).sh("conntrack -F")?;
        }
        for family in Family::BOTH {
            checks::transfer(border.pod(0), border.pod(1), family, 1 << 20)?;
        }
        for node in [0, 1] {
            let entries = border.node(node).sh("conntrack -L -p udp")?;
            let ours = entries.lines().filter(|line| line.contains("dport=51900")).count();
            ensure!((ours == 0) == notrack, "{ours} entries with notrack = {notrack}: {entries}");
            // The inner flows are tracked: masquerading needs their entries.
            let inner = border.node(node).sh("conntrack -L -p tcp")?;
            ensure!(inner.contains("10.244."), "no entry of a pod's flow: {inner}");
        }
    }
    Ok(())
}

/// A record lists the address and port of a service of the cluster, as a stolen node may: datagrams
/// of other programs to the service keep their entries, without which no NAT rule applies to them.
#[test]
fn service_that_a_record_lists_stays_reachable() -> Result<()> {
    let border = Border::up(true, |_| {})?;
    let node = border.node(0);
    let mut record = border.cluster.agents[1].record.clone();
    record.endpoints.push(format!("198.51.100.53:{PORT}"));
    border.cluster.agents[0].put_record(&record)?;
    let listed = || Ok(node.sh("nft list table inet skein")?.contains("198.51.100.53 . "));
    checks::eventually("the rules know the endpoint", checks::EVENT_TIMEOUT, listed)?;
    node.nft(
        "add table ip service\n\
         add chain ip service out { type nat hook output priority -100 ; }\n\
         add rule ip service out ip daddr 198.51.100.53 dnat to 192.0.2.2",
    )?;
    node.ip("route add 198.51.100.53 dev eth0")?;
    let (from, service, server) = ("192.0.2.1", "198.51.100.53", "192.0.2.2");
    let seen = request(node, from.parse()?, service.parse()?, border.node(1), server.parse()?)?;
    ensure!(seen == Some(from.parse()?), "the client of the service is seen as {seen:?}");
    Ok(())
}

#[test]
fn spoofed_source_by_a_second_network_is_dropped() -> Result<()> {
    let border = Border::up(false, |_| ())?;
    let (outsider, node) = (border.outsider()?, border.node(0));
    link::veth((&outsider, "eth1"), (node, "eth1"), 1500)?;
    for (machine, address) in [(node, "198.51.100.1/24"), (&outsider, "198.51.100.77/24")] {
        machine.ip(&format!("address add {address} dev eth1"))?;
    }
    let (target, source) = (border.pod(0).address(Family::V4), border.pod(1).address(Family::V4));
    let arrived = border.spoof(&outsider, source, target, "198.51.100.1".parse()?)?;
    ensure!(!arrived, "A spoofed frame passes by a second network.");
    Ok(())
}

/// Each fragment has the source, the second one no port.
#[test]
fn spoofed_source_in_fragments_is_dropped() -> Result<()> {
    let border = Border::up(false, |_| ())?;
    let outsider = border.outsider()?;
    let (target, source) = (border.pod(0).address(Family::V4), border.pod(1).address(Family::V4));
    let by = border.cluster.lab.nodes[0].underlay(Family::V4);
    outsider.ip(&format!("address add {source}/32 dev lo"))?;
    outsider.ip(&format!("route add {target}/32 via {by} src {source}"))?;
    let receiver = border.pod(0).ns.run(|| retry_bind(|| UdpSocket::bind(("0.0.0.0", PORT))))??;
    receiver.set_read_timeout(Some(Duration::from_millis(300)))?;
    let sender = outsider.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    for _ in 0..3 {
        sender.send_to(&[7; 4000], (target, PORT))?;
    }
    let received = receiver.recv(&mut [0; 8000]);
    ensure!(received.is_err(), "A spoofed datagram in fragments passes: {received:?}");
    Ok(())
}

/// Bridged frames pass the IP hooks, too, with `bridge-nf-call-iptables`.
#[test]
fn spoofed_source_of_a_bridged_pod_is_dropped() -> Result<()> {
    let border = Border::up(false, |_| ())?;
    let (outsider, node) = (border.outsider()?, border.node(0));
    let target = border.pod(0).address(Family::V4);
    let by = border.cluster.lab.nodes[0].underlay(Family::V4);
    let bridged = Netns::create("bridged")?;
    link::bridge(node, "pods0")?;
    link::veth((&bridged, "eth0"), (node, "port0"), 1420)?;
    link::enslave(node, "port0", "pods0")?;
    node.ip("address add 10.244.1.65/26 dev pods0")?;
    bridged.ip("address add 10.244.1.70/26 dev eth0")?;
    bridged.ip("route add default via 10.244.1.65")?;
    node.sysctl("net.bridge.bridge-nf-call-iptables", "1")?;
    let far = border.pod(1);
    checks::eventually("the bridged pod reaches a remote pod", checks::EVENT_TIMEOUT, || {
        udp::arrives(&bridged, &far.ns, (far.v4, PORT).into())
    })?;
    ensure!(udp::arrives(&far.ns, &bridged, ("10.244.1.70".parse::<IpAddr>()?, PORT).into())?);
    let arrived = border.spoof(&outsider, "10.244.1.70".parse()?, target, by)?;
    ensure!(!arrived, "A frame with the bridged pod's source passes from the underlay.");
    Ok(())
}
