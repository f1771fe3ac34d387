//! Pods that claim addresses, neighbours or routes of others.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::link::advertise_router;
use skein_lab::pods::{node, runtime, up};
use skein_lab::{Netns, Pod, checks};

use crate::support::reach;

#[test]
fn spoofed_source_is_dropped_and_counted() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
    reach(&a, &b)?;
    let drops = |family: &str| -> Result<f64> {
        let label = format!("family=\"{family}\"");
        Ok(cluster.agents[0].metrics()?.sum("skein_pod_source_drops_total", &[&label]))
    };
    ensure!(drops("ipv4")? == 0.0 && drops("ipv6")? == 0.0, "A genuine packet was dropped.");
    // The address of another pod, and an unused address.
    let unused: Pod =
        Pod { ns: Netns::create("none")?, ..pod_at("10.244.1.99", "fd00:10:244:1::99")? };
    for other in [&b, &unused] {
        a.ns.ip(&format!("address add {}/32 dev eth0", other.v4))?;
        a.ns.ip(&format!("address add {}/128 dev eth0 nodad", other.v6))?;
        for (family, source, to) in [
            ("ipv4", other.v4.to_string(), IpAddr::V4(a.v4)),
            ("ipv6", other.v6.to_string(), IpAddr::V6(a.v6)),
        ] {
            let before = drops(family)?;
            let gateway = match to {
                IpAddr::V4(_) => IpAddr::from([10, 244, 2, 1]),
                IpAddr::V6(_) => "fd00:10:244:2::1".parse()?,
            };
            let _ = a.ns.sh(&format!("ping -n -c 3 -i 0.05 -W 1 -I {source} {gateway}"));
            let counted = drops(family)? - before;
            ensure!(counted >= 3.0, "Only {counted} of 3 packets from {source} are counted.");
        }
        a.ns.ip(&format!("address del {}/32 dev eth0", other.v4))?;
        a.ns.ip(&format!("address del {}/128 dev eth0", other.v6))?;
    }
    reach(&a, &b)
}

fn pod_at(v4: &str, v6: &str) -> Result<Pod> {
    Ok(Pod {
        ns: Netns::create("unused")?,
        v4: v4.parse()?,
        v6: v6.parse()?,
        host_interface: String::new(),
    })
}

/// Claims `address`, which another pod owns, from `pod`: by an ARP request with it as the sender
/// (RFC 826 lets receivers learn the sender), or by a neighbour advertisement with the override
/// flag (RFC 4861, section 4.4).
fn claim(pod: &Netns, address: IpAddr) -> Result<()> {
    use socket2::{Domain, Protocol, SockAddr, Socket, Type};
    let IpAddr::V6(v6) = address else {
        pod.ip(&format!("address add {address}/32 dev eth0"))?;
        pod.ip("route replace 169.254.1.99/32 dev eth0")?;
        // No host answers.
        let _ = pod.sh(&format!("ping -n -c 3 -i 0.1 -W 1 -I {address} 169.254.1.99"));
        pod.ip(&format!("address del {address}/32 dev eth0"))?;
        return pod.ip("route del 169.254.1.99/32 dev eth0").map(drop);
    };
    let mac = skein_lab::link::mac(pod, "eth0")?;
    let links = pod.ip("-o link show eth0")?;
    let index: u32 = links.split(':').next().context("no index")?.trim().parse()?;
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(v6.octets());
    message.extend([2, 1]);
    for byte in mac.split(':') {
        message.push(u8::from_str_radix(byte, 16)?);
    }
    pod.run(|| -> Result<()> {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        socket.set_multicast_hops_v6(255)?;
        socket.set_multicast_if_v6(index)?;
        let all = std::net::SocketAddrV6::new("ff02::1".parse()?, 0, 0, index);
        for _ in 0..4 {
            socket.send_to(&message, &SockAddr::from(all))?;
        }
        Ok(())
    })?
}

#[test]
fn no_pod_takes_another_pods_address_by_arp_or_ndp() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (first, second) = (runtime(&cluster, 0)?, runtime(&cluster, 1)?);
    let (thief, victim, b) = (first.pod("a")?, first.pod("a2")?, second.pod("b")?);
    reach(&b, &victim)?;
    let neighbours = || node(&cluster, 0).ip("neighbour show nud permanent");
    let before = neighbours()?;
    for address in [IpAddr::V4(victim.v4), IpAddr::V6(victim.v6), IpAddr::V4(b.v4)] {
        claim(&thief.ns, address)?;
    }
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let after = neighbours()?;
    ensure!(lines(&before) == lines(&after), "The entries changed from\n{before}\nto\n{after}");
    let learnt = node(&cluster, 0).ip("neighbour show")?;
    let theirs = skein_lab::link::mac(&thief.ns, "eth0")?;
    for line in learnt.lines().filter(|line| line.contains(&theirs)) {
        let own = [thief.v4.to_string(), thief.v6.to_string()];
        let address = line.split(' ').next().unwrap_or_default();
        let own = own.iter().any(|own| own == address) || address.starts_with("fe80:");
        ensure!(own, "The node has a neighbour entry with the thief's MAC address: {line}");
    }
    reach(&b, &victim)?;
    reach(&thief, &victim)
}

/// Python script that sends frames with 50 sources each from a pod's eth0: ARP requests for the
/// node's address `argv[1]` and for `argv[2]`, an address behind the node; gratuitous ARP;
/// neighbour solicitations for the node's address `argv[3]`; pings to all nodes.
const NEIGHBOURS: &str = r#"
import socket, struct, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
mac = s.getsockname()[4]
v4, v6 = socket.inet_aton, lambda text: socket.inet_pton(socket.AF_INET6, text)
def arp(operation, sender, target):
    header = struct.pack("!HHBBH", 1, 0x800, 6, 4, operation)
    s.send(b"\xff" * 6 + mac + b"\x08\x06" + header + mac + v4(sender) + bytes(6) + v4(target))
def icmp(source, kind, rest):
    ends, message = v6(source) + v6("ff02::1"), bytes([kind, 0, 0, 0]) + rest
    whole = ends + struct.pack("!II", len(message), 58) + message
    total = sum(struct.unpack("!%dH" % (len(whole) // 2), whole))
    while total >> 16: total = (total >> 16) + (total & 0xffff)
    message = message[:2] + struct.pack("!H", 0xffff - total) + message[4:]
    header = struct.pack("!IHBB", 6 << 28, len(message), 58, 255)
    s.send(b"\x33\x33\0\0\0\1" + mac + b"\x86\xdd" + header + ends + message)
for i in range(50):
    arp(1, "10.244.1.%d" % (100 + i), sys.argv[1])
    arp(1, "10.244.1.%d" % (150 + i), sys.argv[2])
    arp(1, "10.244.3.%d" % i, "10.244.3.%d" % i)
    icmp("fe80::1:%x" % i, 135, bytes(4) + v6(sys.argv[3]) + bytes([1, 1]) + mac)
    icmp("fe80::2:%x" % i, 128, bytes(4))
"#;

/// Frames that a pod sends with a packet socket add no entry to the node's neighbour tables, also
/// on a node with proxy ARP.
#[test]
fn no_pod_fills_the_nodes_neighbour_tables() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let home = node(&cluster, 0);
    let pod = runtime(&cluster, 0)?.pod("a")?;
    home.sysctl("net.ipv4.conf.all.proxy_arp", "1")?;
    let key = format!("net.ipv4.conf.{}.arp_ignore", pod.host_interface);
    home.sysctl(&key, "0")?;
    checks::eventually("the setting is restored", Duration::from_secs(15), || {
        Ok(home.sh(&format!("sysctl -n {key}"))?.trim() == "8")
    })?;
    let addresses = || -> Result<BTreeSet<String>> {
        let text = home.ip(&format!("neighbour show dev {}", pod.host_interface))?;
        Ok(text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
    };
    let before = addresses()?;
    let arguments = ["-c", NEIGHBOURS, "10.244.1.1", "192.0.2.77", "fd00:10:244:1::1"];
    let done = pod.ns.command("python3").args(arguments).output()?;
    let stderr = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "The sending script failed: {stderr}");
    thread::sleep(Duration::from_millis(1100));
    let after = addresses()?;
    ensure!(after == before, "The entries changed from {before:?} to {after:?}.");
    let counted = cluster.agents[0].metrics()?.sum("skein_pod_link_local_drops_total", &[]);
    ensure!(counted >= 100.0, "Only {counted} of 100 packets are counted.");
    Ok(())
}

#[test]
fn pod_is_not_accepted_as_a_router() -> Result<()> {
    for both in [false, true] {
        let cluster = up(1, |agent| {
            agent.record.pod_cidrs.retain(|cidr| both || !cidr.contains(':'));
        })?;
        let home = node(&cluster, 0);
        let pod = runtime(&cluster, 0)?.pod("a")?;
        pod.ns.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")?;
        pod.ns.ip("address add fe80::bad/64 dev eth0 nodad")?;
        advertise_router(&pod.ns, "eth0", "2001:db8:bad::".parse()?)?;
        thread::sleep(Duration::from_millis(500));
        let routes = home.ip("-6 route show")?;
        let is_accepted = routes.contains("2001:db8:bad");
        ensure!(!is_accepted, "The node accepted a pod's advertisement: {routes}");
        let default = home.ip("-6 route show default")?;
        ensure!(!default.contains("skp"), "The node accepted a pod's advertisement: {default}");
    }
    Ok(())
}
