//! The nftables table of a node: packets that pass the node's border, with and without the CNI
//! plugin.

use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use skein_lab::agent::{Agent, Cluster, Record};
use skein_lab::checks;
use skein_lab::cni::{self, Runtime};
use skein_lab::load::capture::Capture;
use skein_lab::load::udp::{self, Load};
use skein_lab::{Family, Lab, Netns, Plan, Pod, link, process};

/// Port of the probes in this file.
const PORT: u16 = 7400;

/// A cluster of two nodes with one pod each, attached by the CNI plugin or by hand.
struct Border {
    cluster: Cluster,
    /// Pods that the CNI plugin attached.
    attached: Vec<Pod>,
}

impl Border {
    fn up(cni: bool, change: impl Fn(&mut Agent)) -> Result<Self> {
        let lab = Lab::new(&Plan { pods: u8::from(!cni), ..Plan::default() })?;
        let mut cluster = Cluster::prepare(lab, Family::V4)?;
        for agent in &mut cluster.agents {
            if cni {
                agent.serve_pods()?;
            }
            change(agent);
        }
        cluster.start()?;
        let mut attached = Vec::new();
        if cni {
            for (agent, node) in cluster.agents.iter().zip(&cluster.lab.nodes) {
                attached.push(Runtime::new(agent, node)?.pod(&format!("pod-{}", node.index))?);
            }
        }
        let border = Self { cluster, attached };
        for family in Family::BOTH {
            checks::reaches(border.pod(0), border.pod(1), family)?;
        }
        for node in [0, 1] {
            // The agent changes the table once more when it knows the data process's ports.
            let rules = || border.node(node).sh("nft list table inet skein").unwrap_or_default();
            let complete = || Ok(!rules().contains("notrack") || rules().contains("udp sport"));
            checks::eventually("the rules name the ports", Duration::from_secs(5), complete)?;
        }
        Ok(border)
    }

    fn pod(&self, node: usize) -> &Pod {
        self.attached.get(node).unwrap_or_else(|| self.cluster.lab.pod(node))
    }

    fn node(&self, index: usize) -> &Netns {
        &self.cluster.lab.nodes[index].ns
    }

    /// A drop counter of the first node.
    fn drops(&self, name: &str, family: Family) -> Result<f64> {
        // The agent reads the counters at most once a second.
        thread::sleep(Duration::from_millis(1100));
        let family = if family == Family::V4 { "family=\"ipv4\"" } else { "family=\"ipv6\"" };
        let name = format!("skein_{name}_drops_total");
        Ok(self.cluster.agents[0].metrics()?.sum(&name, &[family]))
    }

    /// A machine on the underlay that routes pods' prefixes of the first node to that node.
    fn outsider(&self) -> Result<Netns> {
        let machine = self.cluster.lab.attach("outsider", 77)?;
        machine.sysctl("net.ipv4.ip_forward", "1")?;
        machine.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        Ok(machine)
    }

    /// Sends datagrams with the source `source` from `from`; returns whether they reach the first
    /// node's pod.
    fn spoof(&self, from: &Netns, source: IpAddr, target: IpAddr, by: IpAddr) -> Result<bool> {
        let bits = if source.is_ipv4() { 32 } else { 128 };
        let nodad = if source.is_ipv4() { "" } else { " nodad" };
        from.ip(&format!("address replace {source}/{bits} dev lo{nodad}"))?;
        from.ip(&format!("route replace {target}/{bits} via {by} src {source}"))?;
        let arrives = udp::arrives(from, &self.pod(0).ns, (target, PORT).into());
        from.ip(&format!("route del {target}/{bits}"))?;
        from.ip(&format!("address del {source}/{bits} dev lo"))?;
        arrives
    }

    /// Sources that an attacker on the underlay may choose: the other node's pod, an unused address
    /// of it, an unused address of the first node, and the nodes' addresses on the overlay.
    fn pod_sources(&self, family: Family) -> Result<Vec<IpAddr>> {
        let texts = match family {
            Family::V4 => ["10.244.2.200", "10.244.1.200", "10.244.1.1", "10.244.2.1"],
            Family::V6 => {
                ["fd00:10:244:2::c8", "fd00:10:244:1::c8", "fd00:10:244:1::1", "fd00:10:244:2::1"]
            }
        };
        let mut sources = vec![self.pod(1).address(family)];
        for text in texts {
            sources.push(text.parse()?);
        }
        Ok(sources)
    }
}

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
            checks::eventually("a spoofed frame arrives", Duration::from_secs(8), || {
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
    ensure!(!received, "the pod receives datagrams of the overlay's port");
    for family in Family::BOTH {
        checks::reaches(border.pod(0), border.pod(1), family)?;
    }
    Ok(())
}

/// Returns the lines of the table in alphabetical order: a chain that was added later is listed
/// last, and in its place after the table was created again.
fn table_lines(node: &Netns) -> Result<Vec<String>> {
    let text = node.sh("nft --stateless list table inet skein")?;
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    Ok(lines)
}

/// `nft flush ruleset`, which Debian's nftables.service runs on a reload, opens the border until
/// the repair.
#[test]
fn table_is_restored_within_100_ms_after_a_flush() -> Result<()> {
    const ROUNDS: usize = 20;
    for cni in [true, false] {
        let border = Border::up(cni, |_| ())?;
        let node = border.node(0);
        let mut times = Vec::new();
        for damage in ["flush ruleset", "delete table inet skein", "flush chain inet skein sources"]
        {
            for _ in 0..ROUNDS / 2 {
                let before = table_lines(node)?;
                node.nft(damage)?;
                let start = Instant::now();
                while !table_lines(node).is_ok_and(|now| now == before) {
                    ensure!(start.elapsed() < Duration::from_secs(5), "not restored: {damage}");
                }
                times.push(start.elapsed());
                // Far less than the agent's period of 10 s, so that the timer explains none of the
                // repairs.
                thread::sleep(Duration::from_millis(60));
            }
        }
        times.sort_unstable();
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        println!(
            "cni {cni}: restored after {median:?} (median), {worst:?} (worst of {})",
            times.len()
        );
        ensure!(median < Duration::from_millis(100), "median {median:?}, worst {worst:?}");
        let log = std::fs::read_to_string(border.cluster.agents[0].log())?;
        let restored = log.matches("was changed or deleted: restored").count();
        ensure!(restored <= times.len(), "{restored} restorations for {} changes", times.len());
    }
    Ok(())
}

/// Without `nft` the overlay works, and the status names the missing program.
#[test]
fn agent_without_nft_runs_and_reports_it() -> Result<()> {
    let lab = Lab::new(&Plan::default())?;
    let programs = lab.directory().join("programs");
    std::fs::create_dir_all(&programs)?;
    std::os::unix::fs::symlink("/sbin/ip", programs.join("ip")).context("/sbin/ip")?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    let path = programs.to_string_lossy().into_owned();
    cluster.agents[0].environment.push(("PATH".to_owned(), path));
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let status = cluster.agents[0].status()?;
    ensure!(status["firewall"]["active"] == false, "{status:#}");
    let error = status["firewall"]["error"].as_str().unwrap_or_default();
    ensure!(error.contains("install nftables"), "{error}");
    ensure!(cluster.agents[0].metrics()?.sum("skein_firewall_active", &[]) == 0.0, "still active");
    let text = cluster.agents[0].run_command(&["status", "--interval", "0"])?.stdout;
    ensure!(text.contains("not in place: no program nft"), "{text}");
    let status = cluster.agents[1].status()?;
    ensure!(status["firewall"]["active"] == true, "{status:#}");
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

/// Address of the outsider on the underlay.
fn outside(family: Family) -> Result<IpAddr> {
    let text = if family == Family::V4 { "192.0.2.77" } else { "2001:db8::4d" };
    Ok(text.parse()?)
}

/// Returns the source of datagrams to the address `to` as `at` receives them; `None` if no datagram
/// arrives.
fn source_of(from: &Netns, source: IpAddr, at: &Netns, to: IpAddr) -> Result<Option<IpAddr>> {
    request(from, source, to, at, to)
}

/// Sends datagrams from `source` to `to`, which arrive at `target` in `at`, and awaits the answer
/// to one. Returns the source that the receiver saw; `None` if no datagram or no answer arrives.
fn request(
    from: &Netns,
    source: IpAddr,
    to: IpAddr,
    at: &Netns,
    target: IpAddr,
) -> Result<Option<IpAddr>> {
    let timeout = Some(Duration::from_millis(300));
    let receiver = at.run(move || UdpSocket::bind((target, PORT)))?.context("binding")?;
    let sender = from.run(move || UdpSocket::bind((source, 0)))?.context("binding")?;
    receiver.set_read_timeout(timeout)?;
    sender.set_read_timeout(timeout)?;
    for _ in 0..10 {
        // The first datagrams may wait for a handshake or a neighbour.
        let _ = sender.send_to(b"request", (to, PORT));
        if let Ok((_, seen)) = receiver.recv_from(&mut [0; 16]) {
            receiver.send_to(b"answer", seen)?;
            if sender.recv(&mut [0; 16]).is_ok() {
                return Ok(Some(seen.ip()));
            }
        }
    }
    Ok(None)
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
    checks::eventually("the rules know the endpoint", Duration::from_secs(5), listed)?;
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

/// Damage to the table by other programs: after each change, spoofed frames are dropped again
/// within a second.
#[test]
fn border_is_closed_after_every_damage_to_the_table() -> Result<()> {
    for cni in [true, false] {
        let mut border = Border::up(cni, |_| ())?;
        let outsider = border.outsider()?;
        let target = border.pod(0).address(Family::V4);
        let by = border.cluster.lab.nodes[0].underlay(Family::V4);
        let source = border.pod(1).address(Family::V4);
        let stays_closed = |border: &Border, what: &str| -> Result<()> {
            checks::eventually(what, Duration::from_secs(1), || {
                let table = border.node(0).sh("nft list table inet skein").unwrap_or_default();
                Ok(table.contains("@cluster4 counter name \"spoofed_ipv4\" drop"))
            })?;
            let arrived = border.spoof(&outsider, source, target, by)?;
            ensure!(!arrived, "a spoofed frame passes after: {what} (cni {cni})");
            Ok(())
        };
        for damage in [
            "flush table inet skein",
            "insert rule inet skein sources accept",
            "flush set inet skein cluster4",
            "delete table inet skein\nadd table inet skein { flags dormant ; }",
            "delete table inet skein\nadd table inet skein\nadd set inet skein cluster4 { type ipv6_addr ; }",
        ] {
            border.node(0).nft(damage)?;
            stays_closed(&border, damage)?;
        }
        // `iptables-restore` replaces its own tables only.
        for iptables in ["iptables-nft", "iptables-legacy"] {
            let mut restore = border.node(0).command(format!("{iptables}-restore"));
            process::run_with_input(&mut restore, b"*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")?;
            stays_closed(&border, iptables)?;
        }
        // An agent that is killed leaves the table; the next one finds an older table with other
        // sets.
        border.cluster.agents[0].kill_control();
        stays_closed(&border, "the agent is dead")?;
        border.node(0).nft(
            "delete table inet skein\nadd table inet skein\n\
             add set inet skein cluster4 { type inet_service ; }\n\
             add chain inet skein outward { type filter hook input priority 0 ; }",
        )?;
        border.cluster.agents[0].start()?;
        stays_closed(&border, "a table of another version")?;
        border.cluster.agents[0].stop()?;
        stays_closed(&border, "the agent was stopped")?;
        let finished = border.cluster.agents[0].run_command(&["cleanup"])?;
        ensure!(finished.code == 0, "{}{}", finished.stdout, finished.stderr);
        ensure!(
            border.node(0).sh("nft list table inet skein").is_err(),
            "cleanup leaves the table"
        );
    }
    Ok(())
}

/// Variants of spoofed sources: a second network, fragments, and pods behind a bridge with
/// `bridge-nf-call-iptables`.
#[test]
fn spoofed_source_in_disguise_is_dropped() -> Result<()> {
    let border = Border::up(false, |_| ())?;
    let outsider = border.outsider()?;
    let node = border.node(0);
    // A second network of the node.
    link::veth((&outsider, "eth1"), (node, "eth1"), 1500)?;
    for (machine, address) in [(node, "198.51.100.1/24"), (&outsider, "198.51.100.77/24")] {
        machine.ip(&format!("address add {address} dev eth1"))?;
    }
    let (target, source) = (border.pod(0).address(Family::V4), border.pod(1).address(Family::V4));
    let arrived = border.spoof(&outsider, source, target, "198.51.100.1".parse()?)?;
    ensure!(!arrived, "a spoofed frame passes by a second network");
    // A datagram in fragments: each has the source, the second one no port.
    let by = border.cluster.lab.nodes[0].underlay(Family::V4);
    outsider.ip(&format!("address add {source}/32 dev lo"))?;
    outsider.ip(&format!("route add {target}/32 via {by} src {source}"))?;
    let receiver = border.pod(0).ns.run(|| UdpSocket::bind(("0.0.0.0", PORT)))??;
    receiver.set_read_timeout(Some(Duration::from_millis(300)))?;
    let sender = outsider.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    for _ in 0..3 {
        sender.send_to(&[7; 4000], (target, PORT))?;
    }
    ensure!(receiver.recv(&mut [0; 8000]).is_err(), "a spoofed datagram in fragments passes");
    drop(receiver);
    // A pod of the node behind a bridge, where bridged frames pass the IP hooks, too.
    let bridged = Netns::create("bridged")?;
    link::bridge(node, "pods0")?;
    link::veth((&bridged, "eth0"), (node, "port0"), 1420)?;
    link::enslave(node, "port0", "pods0")?;
    node.ip("address add 10.244.1.65/26 dev pods0")?;
    bridged.ip("address add 10.244.1.70/26 dev eth0")?;
    bridged.ip("route add default via 10.244.1.65")?;
    node.sysctl("net.bridge.bridge-nf-call-iptables", "1")?;
    let far = border.pod(1);
    checks::eventually("the bridged pod reaches a remote pod", Duration::from_secs(5), || {
        udp::arrives(&bridged, &far.ns, (far.v4, PORT).into())
    })?;
    ensure!(udp::arrives(&far.ns, &bridged, ("10.244.1.70".parse::<IpAddr>()?, PORT).into())?);
    let arrived = border.spoof(&outsider, "10.244.1.70".parse()?, target, by)?;
    ensure!(!arrived, "a frame with the bridged pod's source passes from the underlay");
    Ok(())
}

/// CHECK of a pod names the table that cannot be restored.
#[test]
fn check_reports_a_missing_table() -> Result<()> {
    let lab = Lab::new(&Plan { nodes: 1, pods: 0, ..Plan::default() })?;
    let programs = lab.directory().join("programs");
    let (nft, broken) = (programs.join("nft"), lab.directory().join("broken"));
    std::fs::create_dir_all(&programs)?;
    // The program fails at every change while the file exists, as with a missing kernel module.
    let script = format!(
        "#!/bin/sh\n[ -e {} ] && [ \"$1\" = -f ] && {{ echo broken >&2; exit 1; }}\n\
         exec /usr/sbin/nft \"$@\"\n",
        broken.display()
    );
    std::fs::write(&nft, script)?;
    std::fs::set_permissions(&nft, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.agents[0].serve_pods()?;
    let path = format!("{}:{}", programs.display(), std::env::var("PATH")?);
    cluster.agents[0].environment.push(("PATH".to_owned(), path));
    cluster.start()?;
    let runtime = Runtime::new(&cluster.agents[0], &cluster.lab.nodes[0])?;
    let ns = Netns::create("checked")?;
    let result = runtime.add("checked", &ns)?;
    let path = cni::path(&ns);
    let with = Some(cni::attachment("checked", Some(&path)));
    runtime.done("CHECK", with, json!({ "prevResult": result }))?;
    std::fs::write(&broken, "")?;
    cluster.lab.nodes[0].ns.nft("delete table inet skein")?;
    let (code, text) = runtime.refused("CHECK", with, json!({ "prevResult": result }))?;
    ensure!(code == 100 && text.contains("nft"), "{code} {text}");
    std::fs::remove_file(&broken)?;
    checks::eventually("CHECK succeeds again", Duration::from_secs(15), || {
        Ok(runtime.done("CHECK", with, json!({ "prevResult": result })).is_ok())
    })?;
    runtime.del("checked", Some(&ns))
}

/// Status, metrics and `check` report a FORWARD policy of drop, with the remedy. Only `check` can
/// read the policy of legacy iptables.
#[test]
fn closed_forward_chain_is_reported_with_the_remedy() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |_| ())?;
        let (node, agent) = (border.node(0), &border.cluster.agents[0]);
        let name = if cni { "skp+" } else { "skein0" };
        let chains = |state: &str, expected: f64| -> Result<()> {
            let label = format!("state=\"{state}\"");
            checks::eventually("the chains are counted", Duration::from_secs(15), || {
                Ok(agent.metrics()?.sum("skein_forward_chains", &[&label]) == expected)
            })
            .map(drop)
        };
        let check = |expected: &str| -> Result<()> {
            let text = agent.run_command(&["check"])?.stdout;
            let line = text.lines().find(|line| line.contains("forward_chains"));
            ensure!(line.is_some_and(|line| line.contains(expected)), "{expected}: {text}");
            Ok(())
        };
        chains("closed", 0.0)?;
        check(" ok ")?;
        for (iptables, state) in [("iptables-nft", "closed"), ("iptables-legacy", "unknown")] {
            node.sh(&format!("{iptables} -P FORWARD DROP"))?;
            chains(state, 1.0)?;
            let text = agent.run_command(&["status", "--interval", "0"])?.stdout;
            let line = text.lines().find(|line| line.trim().starts_with(state));
            let line = line.with_context(|| format!("no line {state}: {text}"))?;
            let remedy = match state {
                "closed" => format!("-i {name} -j ACCEPT"),
                _ => format!("{iptables} -S FORWARD"),
            };
            ensure!(line.contains(&remedy), "{line}");
            check(&format!("-A FORWARD -o {name} -j ACCEPT"))?;
            // The remedy.
            for direction in ["-i", "-o"] {
                node.sh(&format!("{iptables} -A FORWARD {direction} {name} -j ACCEPT"))?;
            }
            chains("closed", 0.0)?;
            check(" ok ")?;
            for family in Family::BOTH {
                checks::reaches(border.pod(0), border.pod(1), family)?;
            }
        }
        let check = agent.run_command(&["check"])?.stdout;
        ensure!(check.contains("the table of the node's border can be loaded"), "{check}");
    }
    Ok(())
}

/// `check` without a configuration assumes the default interface and pods of the CNI plugin, and
/// reports the assumption. An invalid configuration is reported and does not end the other probes.
#[test]
fn check_reports_a_missing_or_invalid_configuration() -> Result<()> {
    let border = Border::up(true, |_| ())?;
    let node = border.node(0);
    let program = border.cluster.agents[0].program.display().to_string();
    let line = |path: &str| -> Result<String> {
        let text = node.sh(&format!("{program} check --config {path}"))?;
        ensure!(text.contains("udp_segment"), "the other probes are missing: {text}");
        let line = text.lines().find(|line| line.contains("forward_chains"));
        Ok(line.with_context(|| text.clone())?.to_owned())
    };
    let missing = line("/nonexistent/agent.toml")?;
    ensure!(
        missing.contains("ok") && missing.contains("before installation: no chain"),
        "{missing}"
    );
    let invalid = line("/proc/version")?;
    ensure!(invalid.contains("not read: configuration /proc/version"), "{invalid}");
    Ok(())
}

/// Rules are replaced in one transaction: no spoofed frame passes while records change. After a
/// flush by another program, the number of frames that pass shows how long the border was open.
#[test]
fn spoofed_frames_pass_only_between_flush_and_repair() -> Result<()> {
    const PER_SECOND: u64 = 1000;
    let border = Border::up(true, |_| ())?;
    let outsider = border.outsider()?;
    let (target, source) = (border.pod(0).address(Family::V4), border.pod(1).address(Family::V4));
    let by = border.cluster.lab.nodes[0].underlay(Family::V4);
    outsider.ip(&format!("address add {source}/32 dev lo"))?;
    outsider.ip(&format!("route add {target}/32 via {by} src {source}"))?;
    let flood = |during: &dyn Fn() -> Result<()>| -> Result<u64> {
        let load = Load { payload: 64, rate: Some(PER_SECOND), duration: Duration::from_secs(4) };
        thread::scope(|scope| {
            let flood =
                scope.spawn(|| udp::run(&outsider, &border.pod(0).ns, (target, PORT).into(), load));
            thread::sleep(Duration::from_millis(500));
            during()?;
            let outcome = flood.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
            ensure!(outcome.sent > 2 * PER_SECOND, "{outcome:?}");
            Ok(outcome.received)
        })
    };
    let agent = &border.cluster.agents[0];
    let passed = flood(&|| {
        for number in 0..20 {
            agent.put_record(&Record::of_fleet(number)?)?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    })?;
    ensure!(passed == 0, "{passed} spoofed frames passed while the rules were replaced");
    let passed = flood(&|| border.node(0).nft("flush ruleset"))?;
    println!("the border was open for about {passed} ms after nft flush ruleset");
    ensure!(passed < PER_SECOND / 2, "{passed} spoofed frames passed after one flush");
    let passed = flood(&|| border.cluster.lab.nodes[0].ns.ip("link set skein0 down").map(drop))?;
    ensure!(passed == 0, "{passed} spoofed frames passed while skein0 was down");
    Ok(())
}
