//! Pods attached by the real plugin, as kubelet's runtime calls it, and real traffic between them.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::{Agent, Cluster};
use skein_lab::checks;
use skein_lab::cni::{self, attachment, same, traces};
use skein_lab::link::advertise_router;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::load::udp;
use skein_lab::pods::{node, prepared, runtime, up};
use skein_lab::process;
use skein_lab::{Family, Netns, Pod};

fn reach(a: &Pod, b: &Pod) -> Result<()> {
    for family in Family::BOTH {
        checks::reaches(a, b, family).with_context(|| format!("{family}"))?;
    }
    Ok(())
}

#[test]
fn pods_of_two_nodes_reach_each_other_and_go_without_a_trace() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let before = [traces(node(&cluster, 0))?, traces(node(&cluster, 1))?];
    let (first, second) = (runtime(&cluster, 0)?, runtime(&cluster, 1)?);
    let (a, a2, b) = (first.pod("a")?, first.pod("a2")?, second.pod("b")?);
    reach(&a, &b)?;
    reach(&b, &a2)?;
    reach(&a, &a2)?;
    for family in Family::BOTH {
        for (from, to) in [(&a, &b), (&b, &a), (&a, &a2)] {
            checks::transfer(from, to, family, 32 << 20)?;
            for payload in [1, 1000, 9000] {
                checks::datagrams_arrive(from, to, family, payload)?;
            }
        }
        // The node's own processes (kubelet's probes) reach its pods and those of others.
        for pod in [&a, &b] {
            let answers = ping(node(&cluster, 0), pod.address(family), Ping::default())?;
            ensure!(answers.complete(), "{}", answers.text);
        }
    }
    first.del("a", Some(&a.ns))?;
    first.del("a", Some(&a.ns))?;
    first.del("a2", None)?;
    drop(b);
    second.del("b", None)?;
    same(&before[0], &traces(node(&cluster, 0))?)?;
    same(&before[1], &traces(node(&cluster, 1))?)
}

#[test]
fn one_family_alone_works() -> Result<()> {
    for family in Family::BOTH {
        let cluster = up(2, |agent| {
            agent.record.pod_cidrs.retain(|cidr| cidr.contains(':') == (family == Family::V6));
        })?;
        let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
        checks::reaches(&a, &b, family)?;
        let unset =
            if family == Family::V4 { a.v6.is_unspecified() } else { a.v4.is_unspecified() };
        ensure!(unset, "an address of the other family");
    }
    Ok(())
}

#[test]
fn the_same_again_gets_the_same_answer() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let runtime = runtime(&cluster, 0)?;
    let ns = Netns::create("again")?;
    let result = runtime.add("again", &ns)?;
    ensure!(runtime.add("again", &ns)? == result, "another answer");
    let ours = attachment("again", None);
    let path = cni::path(&ns);
    let with = Some(attachment("again", Some(&path)));
    runtime.done("CHECK", with, json!({ "prevResult": result }))?;
    // The same name in another namespace: the old attachment goes.
    let other = Netns::create("again-2")?;
    let moved = runtime.add("again", &other)?;
    ensure!(!ns.interfaces()?.contains(&"eth0".to_owned()), "two of them");
    runtime.done("DEL", Some(ours), json!({ "prevResult": moved }))?;
    // A name that the pod has already.
    ns.ip("link add eth0 type veth peer name eth9")?;
    let before = traces(node(&cluster, 0))?;
    let (code, text) = runtime.refused("ADD", with, Value::Null)?;
    ensure!(code >= 4 && text.contains("eth0"), "{code} {text}");
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn a_forged_source_is_dropped_and_counted() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
    reach(&a, &b)?;
    let forged = |family: &str| -> Result<f64> {
        let label = format!("family=\"{family}\"");
        Ok(cluster.agents[0].metrics()?.sum("skein_pod_source_drops_total", &[&label]))
    };
    ensure!(forged("ipv4")? == 0.0 && forged("ipv6")? == 0.0, "counted without a reason");
    // Another pod's address, and one of nobody.
    let stranger: Pod =
        Pod { ns: Netns::create("none")?, ..pod_at("10.244.1.99", "fd00:10:244:1::99")? };
    for other in [&b, &stranger] {
        a.ns.ip(&format!("address add {}/32 dev eth0", other.v4))?;
        a.ns.ip(&format!("address add {}/128 dev eth0 nodad", other.v6))?;
        for (family, source, to) in [
            ("ipv4", other.v4.to_string(), IpAddr::V4(a.v4)),
            ("ipv6", other.v6.to_string(), IpAddr::V6(a.v6)),
        ] {
            let before = forged(family)?;
            let gateway = match to {
                IpAddr::V4(_) => IpAddr::from([10, 244, 2, 1]),
                IpAddr::V6(_) => "fd00:10:244:2::1".parse()?,
            };
            let _ = a.ns.sh(&format!("ping -n -c 3 -i 0.05 -W 1 -I {source} {gateway}"));
            let counted = forged(family)? - before;
            ensure!(counted >= 3.0, "{counted} of 3 counted for {family} from {source}");
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

#[test]
fn a_superpacket_reaches_the_far_pod_unsplit() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
    for family in Family::BOTH {
        let counters = || -> Result<(u64, u64)> {
            let text = b.ns.ip("-s -j link show dev eth0")?;
            let link: Value = serde_json::from_str(&text)?;
            let rx = &link[0]["stats64"]["rx"];
            Ok((rx["bytes"].as_u64().context("bytes")?, rx["packets"].as_u64().context("packets")?))
        };
        let before = counters()?;
        checks::transfer(&a, &b, family, 256 << 20)?;
        let after = counters()?;
        let mean = (after.0 - before.0) / (after.1 - before.1);
        ensure!(mean > 10_000, "{mean} bytes a packet at the far pod over {family}");
    }
    Ok(())
}

#[test]
fn a_pod_can_be_deleted_while_the_agent_is_away() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    cluster.agents[0].stop()?;
    runtime.del("a", Some(&a.ns))?;
    runtime.del("a", None)?;
    ensure!(cni::spooled(&cluster.agents[0])?.len() == 1, "queued once");
    let path = cni::path(&a.ns);
    let (code, text) = runtime.refused("ADD", Some(attachment("c", Some(&path))), Value::Null)?;
    ensure!(code == 11, "{code} {text}");
    let (code, _) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(code == 50, "{code}");
    cluster.agents[0].start()?;
    checks::eventually("the deletion is done", Duration::from_secs(5), || {
        let interfaces = node(&cluster, 0).interfaces()?;
        Ok(cni::spooled(&cluster.agents[0])?.is_empty() && !interfaces.contains(&a.host_interface))
    })?;
    runtime.done("STATUS", None, Value::Null)?;
    // The other pod lived through it.
    let answers = ping(node(&cluster, 0), b.address(Family::V4), Ping::default())?;
    ensure!(answers.complete(), "{}", answers.text);
    runtime.del("b", Some(&b.ns))?;
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn addresses_run_out_and_come_back() -> Result<()> {
    let cluster = up(1, |agent| agent.record.pod_cidrs = vec!["10.244.1.0/29".into()])?;
    let runtime = runtime(&cluster, 0)?;
    // Six hosts, one of them the node's.
    let pods: Vec<Pod> = (0..5).map(|n| runtime.pod(&format!("p{n}"))).collect::<Result<_>>()?;
    let addresses: BTreeSet<_> = pods.iter().map(|pod| pod.v4).collect();
    ensure!(addresses.len() == 5, "{addresses:?}");
    let ns = Netns::create("late")?;
    let path = cni::path(&ns);
    let late = Some(attachment("late", Some(&path)));
    let (code, text) = runtime.refused("ADD", late, Value::Null)?;
    ensure!(code == 11 && text.contains("10.244.1.0/29"), "{code} {text}");
    let (code, text) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(code == 50 && text.contains("10.244.1.0/29"), "{code} {text}");
    let metrics = cluster.agents[0].metrics()?;
    ensure!(metrics.sum("skein_ipam_addresses", &["state=\"used\""]) == 5.0, "{}", metrics.0);
    runtime.del("p2", None)?;
    let result = runtime.add("late", &ns)?;
    ensure!(cni::addresses(&result)? == [IpAddr::V4(pods[2].v4)], "{result}");
    Ok(())
}

/// Forty pods at once while the control process is killed again and again: what was answered holds.
#[test]
fn killing_the_agent_loses_and_doubles_nothing() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let spaces: Vec<Netns> =
        (0..40).map(|n| Netns::create(&format!("k{n}"))).collect::<Result<_>>()?;
    let add = |ns: &Netns, name: &str| -> Result<Vec<IpAddr>> {
        // As kubelet does: again until it works.
        for _ in 0..60 {
            match runtime.add(name, ns) {
                Ok(result) => return cni::addresses(&result),
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
        cni::addresses(&runtime.add(name, ns)?)
    };
    let results = thread::scope(|scope| -> Result<Vec<Vec<IpAddr>>> {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let (spaces, add) = (&spaces, &add);
                scope.spawn(move || {
                    let mine = (0..spaces.len()).filter(|index| index % 4 == worker);
                    mine.map(|index| add(&spaces[index], &format!("k{index}")))
                        .collect::<Result<Vec<_>>>()
                })
            })
            .collect();
        for round in 0..6u64 {
            thread::sleep(Duration::from_millis(70 + round * 53));
            cluster.agents[0].kill_control();
            cluster.agents[0].launch()?;
        }
        let mut all = vec![];
        for worker in workers {
            all.extend(worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??);
        }
        Ok(all)
    })?;
    cluster.agents[0].wait_ready()?;
    let unique: BTreeSet<_> = results.iter().flatten().collect();
    ensure!(unique.len() == spaces.len() * 2, "{} addresses for 40 pods", unique.len());
    for ips in &results {
        let answers = ping(node(&cluster, 0), ips[0], Ping { count: 1, ..Ping::default() })?;
        ensure!(answers.complete(), "{}", answers.text);
    }
    let used = cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]);
    ensure!(used == 80.0, "{used} addresses in use");
    for index in 0..spaces.len() {
        runtime.del(&format!("k{index}"), None)?;
    }
    let used = cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]);
    ensure!(used == 0.0, "{used} addresses in use");
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn what_a_killed_agent_has_begun_is_finished() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    let (a_again, b_again) = (
        || runtime.add("a", &a.ns).and_then(|result| cni::addresses(&result)),
        || runtime.add("b", &b.ns).and_then(|result| cni::addresses(&result)),
    );
    let (first, second) = (a_again()?, b_again()?);
    // As if it had been killed right after the pair was made: no mark, no addresses, down.
    cluster.agents[0].kill_control();
    let unmark = ["link", "set", a.host_interface.as_str(), "down", "alias", ""];
    let unmarked = node(&cluster, 0).command("ip").args(unmark).status()?;
    ensure!(unmarked.success(), "the mark is still there");
    a.ns.ip("address flush dev eth0")?;
    a.ns.ip("link set eth0 down")?;
    // As if before: the address is reserved, and nothing is made.
    node(&cluster, 0).ip(&format!("link delete {}", b.host_interface))?;
    cluster.agents[0].start()?;
    ensure!(a_again()? == first && b_again()? == second, "other addresses");
    reach(&a, &b)?;
    for pod in ["a", "b"] {
        runtime.del(pod, None)?;
    }
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn a_reboot_frees_every_address() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    let used = |agent: &Agent| -> Result<f64> {
        Ok(agent.metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    };
    // The kernel has forgotten both; the path of one namespace is there again.
    cluster.agents[0].stop()?;
    for pod in [&a, &b] {
        node(&cluster, 0).ip(&format!("link delete {}", pod.host_interface))?;
    }
    drop(b);
    cluster.agents[0].start()?;
    ensure!(used(&cluster.agents[0])? == 2.0, "of the same boot, and its namespace lives");
    cluster.agents[0].stop()?;
    let boot = cluster.lab.directory().join("boot_id");
    fs::write(&boot, "00000000-0000-4000-8000-000000000000\n")?;
    let target = "/proc/sys/kernel/random/boot_id";
    cluster.agents[0].prelude = Some(format!("mount --bind {} {target}", boot.display()));
    cluster.agents[0].start()?;
    ensure!(used(&cluster.agents[0])? == 0.0, "{} in use", used(&cluster.agents[0])?);
    let again = runtime.add("c", &a.ns)?;
    ensure!(!cni::addresses(&again)?.contains(&IpAddr::V4(a.v4)), "reused at once");
    runtime.del("c", None)?;
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn a_waiting_deletion_spares_the_next_of_its_name() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let first = runtime.pod("again")?;
    cluster.agents[0].stop()?;
    runtime.del("again", None)?;
    let kept = cni::spooled(&cluster.agents[0])?;
    ensure!(kept.len() == 1, "{kept:?}");
    let entry = fs::read(&kept[0])?;
    cluster.agents[0].start()?;
    checks::eventually("the deletion is done", Duration::from_secs(5), || {
        Ok(cni::spooled(&cluster.agents[0])?.is_empty())
    })?;
    // As if the plugin had been slower than the agent: it is kept now, and the name comes again.
    fs::write(&kept[0], entry)?;
    let second = runtime.pod("again")?;
    ensure!(cni::spooled(&cluster.agents[0])?.is_empty(), "it still waits for the next look");
    // Longer than it takes the agent to look again.
    thread::sleep(Duration::from_secs(11));
    let answers = ping(node(&cluster, 0), IpAddr::V4(second.v4), Ping::default())?;
    ensure!(answers.complete(), "the new pod was detached: {}", answers.text);
    runtime.del("again", None)?;
    drop(first);
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn a_full_disk_keeps_no_pod_from_going() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let disk = Tmpfs::mount(&cluster.agents[0].state_directory(), "8m")?;
    cluster.start()?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let pod = runtime.pod("a")?;
    disk.fill()?;
    // The database has room in its own file at first.
    let mut refused = None;
    for n in 0..300 {
        let ns = Netns::create("full")?;
        let (name, path) = (format!("f{n}"), cni::path(&ns));
        let finished = runtime.call("ADD", Some(attachment(&name, Some(&path))), Value::Null)?;
        if finished.code != 0 {
            refused = Some(finished.stdout);
            break;
        }
    }
    let refused = refused.context("nothing was refused: the disk is not full")?;
    let error: Value = serde_json::from_str(&refused)?;
    ensure!(error["code"] == 5, "{refused}");
    let (code, text) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(code == 50 && text.contains("no space left"), "{code} {text}");
    for name in std::iter::once("a".to_owned()).chain((0..300).map(|n| format!("f{n}"))) {
        runtime.del(&name, None)?;
    }
    same(&before, &traces(node(&cluster, 0))?)?;
    // The agent looks again and again, and says so.
    let (code, text) = runtime.refused("STATUS", None, Value::Null)?;
    ensure!(code == 50 && text.contains("no space left"), "{code} {text}");
    thread::sleep(Duration::from_secs(11));
    ensure!(fs::read_to_string(cluster.agents[0].log())?.contains("container a: "), "not said");
    disk.empty()?;
    checks::eventually("the addresses are free", Duration::from_secs(25), || {
        let used = cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]);
        Ok(used == 0.0)
    })?;
    runtime.done("STATUS", None, Value::Null)?;
    runtime.add("b", &pod.ns)?;
    runtime.del("b", None)
}

/// A small file system, unmounted when dropped.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn mount(at: &std::path::Path, size: &str) -> Result<Self> {
        fs::create_dir_all(at)?;
        let options = format!("size={size},mode=700");
        let mut mount = std::process::Command::new("mount");
        process::run(mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at))?;
        Ok(Self(at.to_owned()))
    }

    fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.0.join("ballast"))?;
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // The agent may still have files of it open.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Says from a pod that an address of another is at the pod's: by asking with it for a neighbour (RFC 826 has
/// everybody learn who asks), or by a neighbour advertisement that overrides (RFC 4861, section 4.4).
fn claim(pod: &Netns, address: IpAddr) -> Result<()> {
    use socket2::{Domain, Protocol, SockAddr, Socket, Type};
    let IpAddr::V6(v6) = address else {
        pod.ip(&format!("address add {address}/32 dev eth0"))?;
        pod.ip("route replace 169.254.1.99/32 dev eth0")?;
        // Nobody is there to answer.
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
fn no_pod_takes_anothers_address_by_arp_or_neighbour_discovery() -> Result<()> {
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
    ensure!(lines(&before) == lines(&after), "{before}\nis now\n{after}");
    let learnt = node(&cluster, 0).ip("neighbour show")?;
    let theirs = skein_lab::link::mac(&thief.ns, "eth0")?;
    for line in learnt.lines().filter(|line| line.contains(&theirs)) {
        let own = [thief.v4.to_string(), thief.v6.to_string()];
        let address = line.split(' ').next().unwrap_or_default();
        let own = own.iter().any(|own| own == address) || address.starts_with("fe80:");
        ensure!(own, "the node believes the thief: {line}");
    }
    reach(&b, &victim)?;
    reach(&thief, &victim)
}

/// Sends from a pod's eth0, with many sources: ARP requests for the address `argv[1]` of the node and
/// for `argv[2]`, which the node would forward to, gratuitous ARP, neighbour solicitations for
/// `argv[3]` of the node, and pings to all nodes.
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

/// What a pod sends with raw sockets adds no entry to the node's neighbour tables, also on a node
/// with proxy ARP.
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
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    thread::sleep(Duration::from_millis(1100));
    let after = addresses()?;
    ensure!(after == before, "{} entries, then {}: {after:?}", before.len(), after.len());
    let counted = cluster.agents[0].metrics()?.sum("skein_pod_link_local_drops_total", &[]);
    ensure!(counted >= 100.0, "{counted} of 100 packets are counted");
    Ok(())
}

#[test]
fn a_pod_is_nobodys_router() -> Result<()> {
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
        ensure!(!routes.contains("2001:db8:bad"), "the node believes a pod: {routes}");
        let default = home.ip("-6 route show default")?;
        ensure!(!default.contains("skp"), "the node believes a pod: {default}");
    }
    Ok(())
}

#[test]
fn a_container_with_a_network_gets_no_second_one() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    let before = traces(node(&cluster, 0))?;
    let path = cni::path(&a.ns);
    let second = cni::Attachment { container: "a", interface: "eth1", netns: Some(path.as_str()) };
    let (code, text) = runtime.refused("ADD", Some(second), Value::Null)?;
    ensure!(code == 4 && text.contains("default route"), "{code} {text}");
    runtime.done("DEL", Some(second), Value::Null)?;
    same(&before, &traces(node(&cluster, 0))?)?;
    reach(&a, &b)
}

#[test]
fn a_lost_state_directory_is_filled_from_the_kernel() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    cluster.agents[0].stop()?;
    fs::remove_dir_all(cluster.agents[0].state_directory())?;
    cluster.agents[0].start()?;
    let c = runtime.pod("c")?;
    ensure!(![a.v4, b.v4].contains(&c.v4) && ![a.v6, b.v6].contains(&c.v6), "given out twice");
    reach(&a, &c)?;
    let used = || -> Result<f64> {
        Ok(cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    };
    ensure!(used()? == 6.0, "{} in use", used()?);
    runtime.del("a", Some(&a.ns))?;
    ensure!(used()? == 4.0, "{} in use", used()?);
    ensure!(!node(&cluster, 0).interfaces()?.contains(&a.host_interface), "still there");
    Ok(())
}

#[test]
fn namespaces_that_went_without_a_word_are_collected() -> Result<()> {
    let mut cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let (a, b) = (runtime.pod("a")?, runtime.pod("b")?);
    // As after a reboot: the namespace is gone, the state is kept.
    cluster.agents[0].stop()?;
    drop(a);
    // Its interface was deleted by hand, but the namespace lives: its address stays.
    node(&cluster, 0).ip(&format!("link delete {}", b.host_interface))?;
    cluster.agents[0].start()?;
    let used = || -> Result<f64> {
        Ok(cluster.agents[0].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    };
    checks::eventually("a is collected", Duration::from_secs(5), || Ok(used()? == 2.0))?;
    let c = runtime.pod("c")?;
    ensure!(c.v4 != b.v4, "the address of a living namespace was given out");
    let path = cni::path(&b.ns);
    let with = Some(attachment("b", Some(&path)));
    let previous = json!({ "prevResult": {
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "eth0", "sandbox": path }],
        "ips": [{ "address": format!("{}/32", b.v4), "interface": 0 }],
    }});
    let (code, text) = runtime.refused("CHECK", with, previous)?;
    ensure!(code >= 3, "{code} {text}");
    // GC names neither: b lives and stays, c as well.
    let none = json!({ "cni.dev/valid-attachments": [] });
    runtime.done("GC", None, none.clone())?;
    ensure!(used()? == 4.0, "{} in use", used()?);
    drop(b);
    runtime.done("GC", None, none)?;
    checks::eventually("b is collected", Duration::from_secs(5), || Ok(used()? == 2.0))?;
    runtime.del("c", None)?;
    same(&before, &traces(node(&cluster, 0))?)
}

#[test]
fn what_somebody_deletes_by_hand_is_put_back() -> Result<()> {
    let cluster = up(2, |_| ())?;
    let (first, second) = (runtime(&cluster, 0)?, runtime(&cluster, 1)?);
    let (a, b) = (first.pod("a")?, second.pod("b")?);
    reach(&a, &b)?;
    let home = node(&cluster, 0);
    home.ip(&format!("route delete {}/32", a.v4))?;
    home.ip(&format!("-6 route delete {}/128", a.v6))?;
    home.ip(&format!("neighbour delete {} dev {}", a.v4, a.host_interface))?;
    home.sh("nft delete table inet skein")?;
    checks::eventually("it is put back", Duration::from_secs(15), || {
        Ok(ping(&a.ns, b.address(Family::V4), Ping { count: 1, ..Ping::default() })?.complete()
            && home.sh("nft list table inet skein").is_ok())
    })?;
    reach(&a, &b)
}

/// A machine that is no node and knows the way to the pods of the first one; [`outside_address`] has its own.
fn outside(cluster: &Cluster) -> Result<Netns> {
    let machine = cluster.lab.attach("outside", 77)?;
    let node = &cluster.lab.nodes[0];
    for family in Family::BOTH {
        let (cidr, by) = (node.pod_cidr(family), node.underlay(family));
        machine.ip(&format!("route add {cidr} via {by}"))?;
    }
    Ok(machine)
}

fn outside_address(family: Family) -> Result<IpAddr> {
    Ok(match family {
        Family::V4 => IpAddr::from([192, 0, 2, 77]),
        Family::V6 => "2001:db8::4d".parse()?,
    })
}

#[test]
fn pods_reach_the_outside_by_the_nodes_address() -> Result<()> {
    for masquerade in [true, false] {
        let cluster = up(2, |agent| agent.set("cni.masquerade", masquerade))?;
        let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
        // The way back, too, where the pod's own address shows.
        let outside = outside(&cluster)?;
        for family in Family::BOTH {
            let node = &cluster.lab.nodes[0];
            let target = outside_address(family)?;
            let seen = udp::source_seen(&a.ns, &outside, target)?;
            let expected = if masquerade { node.underlay(family) } else { a.address(family) };
            ensure!(seen == expected, "{seen} instead of {expected} over {family}");
            // Within the cluster every pod keeps its own.
            let seen = udp::source_seen(&a.ns, &b.ns, b.address(family))?;
            ensure!(seen == a.address(family), "{seen} within the cluster");
        }
    }
    Ok(())
}

#[test]
fn the_plugin_is_installed_when_the_agent_can_serve_and_cleaned_up() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let directory = cluster.agents[0].state_directory();
    let directory = directory.parent().context("no parent")?.to_owned();
    let (plugin, list) =
        (directory.join("bin/skein-cni"), directory.join("net.d/10-skein.conflist"));
    cluster.start()?;
    checks::eventually(
        "the configuration is there",
        Duration::from_secs(5),
        || Ok(list.is_file()),
    )?;
    ensure!(plugin.is_file(), "no binary");
    let conflist: Value = serde_json::from_slice(&fs::read(&list)?)?;
    ensure!(conflist["plugins"][0]["type"] == "skein-cni", "{conflist}");
    let pod = runtime(&cluster, 0)?.pod("a")?;
    ensure!(node(&cluster, 0).interfaces()?.contains(&pod.host_interface), "no interface");
    cluster.agents[0].stop()?;
    ensure!(list.is_file(), "a restart must not make nodes NotReady");
    let finished = cluster.agents[0].run_command(&["cleanup", "--state"])?;
    ensure!(finished.code == 0, "{}{}", finished.stdout, finished.stderr);
    ensure!(!list.exists() && !plugin.exists(), "still installed: {}", finished.stdout);
    let interfaces = node(&cluster, 0).interfaces()?;
    ensure!(!interfaces.iter().any(|name| name.starts_with("skp")), "{interfaces:?}");
    ensure!(node(&cluster, 0).sh("nft list table inet skein").is_err(), "the table is left");
    Ok(())
}

#[test]
fn a_missing_plugin_of_the_chain_keeps_the_node_from_being_ready() -> Result<()> {
    let mut cluster = prepared(1, |_| ())?;
    let bin = cluster.agents[0].cni_directory("bin_dir");
    let list = cluster.agents[0].cni_directory("conf_dir").join("10-skein.conflist");
    let (portmap, away) = (bin.join("portmap"), bin.join("portmap.away"));
    fs::rename(&portmap, &away)?;
    cluster.agents[0].launch()?;
    let reason = |agent: &Agent| -> Result<Option<String>> {
        let answer = agent.http("/readyz")?;
        Ok((answer.status != 200).then_some(answer.body))
    };
    let named = |agent: &Agent| {
        checks::eventually("the plugin is named", Duration::from_secs(25), || {
            let reason = reason(agent)?.unwrap_or_default();
            Ok(reason.contains("portmap") && reason.contains(&*bin.to_string_lossy()))
        })
    };
    named(&cluster.agents[0])?;
    // Longer than it takes the agent to look again.
    thread::sleep(Duration::from_secs(11));
    named(&cluster.agents[0])?;
    ensure!(!list.exists(), "the runtime would start pods that fail");
    fs::rename(&away, &portmap)?;
    checks::eventually("it is ready by itself", Duration::from_secs(15), || {
        Ok(reason(&cluster.agents[0])?.is_none() && list.is_file())
    })?;
    runtime(&cluster, 0)?.pod("a")?;
    // From now on running pods need the configuration to be deleted.
    fs::remove_file(&portmap)?;
    named(&cluster.agents[0])?;
    ensure!(list.is_file(), "the configuration was taken away");
    runtime(&cluster, 0)?.del("a", None)
}

/// What Docker and ufw do to every other packet of a node.
#[test]
fn others_chains_that_drop_let_pods_pass() -> Result<()> {
    let mut cluster = up(2, |agent| {
        // The second node is told to leave others' chains alone.
        let accept = agent.record.name == "node-a";
        agent.set("cni.forward_accept", accept);
    })?;
    let (a, b) = (runtime(&cluster, 0)?.pod("a")?, runtime(&cluster, 1)?.pod("b")?);
    let a2 = runtime(&cluster, 0)?.pod("a2")?;
    reach(&a, &b)?;
    let chains = ["ip filter FORWARD", "ip6 filter FORWARD"];
    // As a service that is started anew does: at no moment is the chain without its policy.
    let close = |home: &Netns| -> Result<()> {
        chains.iter().try_for_each(|chain| {
            let table = chain.trim_end_matches(" FORWARD");
            let hook = "{ type filter hook forward priority 0 ; policy drop ; }";
            // Somebody's own rule, which stays in force.
            let text = format!(
                "add table {table}\nadd chain {chain} {hook}\nflush chain {chain}\n\
                 add rule {chain} udp dport 7777 drop\n"
            );
            home.nft(&text)
        })
    };
    // What is no pod's and comes beside the overlay.
    let outside = outside(&cluster)?;
    // The outside's way to a pod by a hostPort.
    node(&cluster, 0).nft(&format!(
        "add table ip ports\nadd chain ip ports pre {{ type nat hook prerouting priority dstnat ; }}\n\
         add rule ip ports pre udp dport 8080 dnat to {}:8080\n",
        a.v4
    ))?;
    let filtered = |open: bool| -> Result<()> {
        let udp = |from: &Netns, at: &Pod, to: IpAddr, port: u16| {
            udp::arrives(from, &at.ns, (to, port).into())
        };
        let underlay = cluster.lab.nodes[0].underlay(Family::V4);
        for family in Family::BOTH {
            let (inside, target) = (a.address(family), b.address(family));
            ensure!(udp(&a.ns, &b, target, 7778)? == open, "among pods");
            ensure!(!udp(&a.ns, &b, target, 7777)?, "somebody's drop");
            ensure!(!udp(&outside, &a, inside, 7778)?, "from anybody");
            let asks = ping(&a.ns, outside_address(family)?, Ping { count: 2, ..Ping::default() })?;
            ensure!(asks.complete() == open, "a pod asks the outside: {}", asks.text);
        }
        ensure!(udp(&outside, &a, underlay, 8080)? == open, "a hostPort");
        Ok(())
    };
    let other = node(&cluster, 1);
    close(other)?;
    checks::eventually("the log says what helps", Duration::from_secs(15), || {
        let log = fs::read_to_string(cluster.agents[1].log())?;
        Ok(log.contains("chain ip6 filter FORWARD drops") && log.contains("-i skp+ -j ACCEPT"))
    })?;
    for family in Family::BOTH {
        checks::does_not_reach(&a, &b, family)?;
    }
    ensure!(!other.sh("nft list ruleset")?.contains("skein: pods"), "not asked for");
    chains.iter().try_for_each(|chain| other.sh(&format!("nft delete chain {chain}")).map(drop))?;

    let home = node(&cluster, 0);
    let ours = || -> Result<Vec<usize>> {
        let count = |chain: &&str| {
            let text = home.sh(&format!("nft list chain {chain}"))?;
            let rules: Vec<_> =
                text.lines().map(str::trim).filter(|l| l.contains("skp*")).collect();
            ensure!(text.rfind("drop") < text.find("skp*"), "before somebody's own: {text}");
            Ok(rules.len())
        };
        chains.iter().map(count).collect()
    };
    close(home)?;
    for _ in 0..2 {
        checks::eventually("the rules are there", Duration::from_secs(15), || {
            Ok(ours()? == [3, 3])
        })?;
        for pod in [&b, &a2] {
            reach(&a, pod)?;
            reach(pod, &a)?;
        }
        // They are readable by iptables, too, and those that are there are not made again.
        for iptables in ["iptables-nft", "ip6tables-nft"] {
            let said = home.sh(&format!("{iptables} -S FORWARD"))?;
            for rule in [
                "-P FORWARD DROP",
                "-A FORWARD -i skp+ ",
                "-A FORWARD -i skein0 -o skp+ ",
                "-A FORWARD -o skp+ -m mark --mark 0x100000/0x100000 ",
            ] {
                ensure!(said.contains(rule), "{said}");
            }
            let mut rules = said.lines().filter(|line| line.contains("skp+"));
            ensure!(rules.all(|rule| rule.contains("--comment \"skein: pods\"")), "{said}");
            // As a service does that keeps rules over a restart.
            let saved = home.sh(&format!("{iptables}-save"))?;
            let mut restore = home.command(format!("{iptables}-restore"));
            process::run_with_input(&mut restore, saved.as_bytes())?;
        }
        thread::sleep(Duration::from_secs(11));
        ensure!(ours()? == [3, 3], "{:?}", ours()?);
        filtered(true)?;
        // Whoever reloads his firewall takes them away.
        close(home)?;
    }
    checks::eventually("they are put back", Duration::from_secs(15), || Ok(ours()? == [3, 3]))?;
    // They stay behind what is added later.
    for chain in chains {
        home.sh(&format!("nft add rule {chain} udp dport 7778 drop"))?;
    }
    checks::eventually("they go behind it", Duration::from_secs(15), || Ok(ours().is_ok()))?;
    ensure!(ours()? == [3, 3] && !udp::arrives(&a.ns, &b.ns, (b.v4, 7778).into())?);
    // Not wanted any more, and wanted again.
    for accept in [false, true] {
        cluster.agents[0].stop()?;
        cluster.agents[0].set("cni.forward_accept", accept);
        cluster.agents[0].start()?;
        let rules = node(&cluster, 0).sh("nft list chain ip filter FORWARD")?;
        ensure!(rules.contains("skp*") == accept, "{rules}");
        if !accept {
            filtered(false)?;
        }
    }
    cluster.agents[0].stop()?;
    let finished = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(finished.code == 0, "{}{}", finished.stdout, finished.stderr);
    let rules = node(&cluster, 0).sh("nft list ruleset")?;
    ensure!(!rules.contains("skp") && rules.contains("7777"), "{rules}");
    Ok(())
}

#[test]
fn a_hundred_pods_at_once() -> Result<()> {
    let cluster = up(1, |_| ())?;
    let before = traces(node(&cluster, 0))?;
    let runtime = runtime(&cluster, 0)?;
    let spaces: Vec<Netns> =
        (0..100).map(|n| Netns::create(&format!("h{n}"))).collect::<Result<_>>()?;
    let all = thread::scope(|scope| {
        let workers: Vec<_> = spaces
            .iter()
            .enumerate()
            .map(|(index, ns)| {
                let runtime = &runtime;
                scope.spawn(move || cni::addresses(&runtime.add(&format!("h{index}"), ns)?))
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    ensure!(all.iter().flatten().collect::<BTreeSet<_>>().len() == 200, "doubled");
    thread::scope(|scope| {
        let workers: Vec<_> = (0..100)
            .map(|index| {
                let runtime = &runtime;
                scope.spawn(move || runtime.del(&format!("h{index}"), None))
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?
        })
    })?;
    same(&before, &traces(node(&cluster, 0))?)
}
