//! Repair of the nftables table after changes by other programs.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use skein_lab::agent::Record;
use skein_lab::load::progress::FlowProgress;
use skein_lab::load::udp;
use skein_lab::{Family, Netns, checks, process};

use crate::border::{Border, PORT};

/// Returns the lines of the table in alphabetical order, because nft lists a chain that was added
/// later at the end, and at another place after the table was created again.
fn table_lines(node: &Netns) -> Result<Vec<String>> {
    let text = node.sh("nft --stateless list table inet skein")?;
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    Ok(lines)
}

/// `nft flush ruleset`, which Debian's nftables.service runs on a reload, opens the border until
/// the repair.
#[test]
fn table_is_restored_after_every_flush() -> Result<()> {
    const ROUNDS: usize = 20;
    for cni in [true, false] {
        let border = Border::up(cni, |_| ())?;
        let node = border.node(0);
        let mut times = Vec::new();
        let start = Instant::now();
        for damage in ["flush ruleset", "delete table inet skein", "flush chain inet skein sources"]
        {
            for _ in 0..ROUNDS / 2 {
                let before = table_lines(node)?;
                node.nft(damage)?;
                let damaged = Instant::now();
                while !table_lines(node).is_ok_and(|now| now == before) {
                    let took = damaged.elapsed();
                    ensure!(took < checks::EVENT_TIMEOUT, "The table is not restored: {damage}");
                }
                times.push(damaged.elapsed());
                thread::sleep(Duration::from_millis(60));
            }
        }
        checks::not_by_timer(times.len() as u64, start.elapsed())?;
        times.sort_unstable();
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        println!(
            "cni {cni}: restored after {median:?} (median), {worst:?} (worst of {})",
            times.len()
        );
        let log = std::fs::read_to_string(border.cluster.agents[0].log())?;
        let restored = log.matches("was changed or deleted: restored").count();
        ensure!(restored <= times.len(), "{restored} restorations for {} changes", times.len());
    }
    Ok(())
}

/// Checks that the table has its rules again, and that spoofed frames do not pass.
fn stays_closed(border: &Border, outsider: &Netns, what: &str) -> Result<()> {
    checks::eventually(what, checks::EVENT_TIMEOUT, || {
        let table = border.node(0).sh("nft list table inet skein").unwrap_or_default();
        Ok(table.contains("@cluster4 counter name \"spoofed_ipv4\" drop"))
    })?;
    let (target, source) = (border.pod(0).address(Family::V4), border.pod(1).address(Family::V4));
    let by = border.cluster.lab.nodes[0].underlay(Family::V4);
    let arrived = border.spoof(outsider, source, target, by)?;
    ensure!(!arrived, "A spoofed frame passes after: {what}.");
    Ok(())
}

/// Damage to the table by other programs: after each change, the table is repaired at once, and
/// spoofed frames are dropped again.
#[test]
fn border_is_closed_after_every_damage_to_the_table() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |_| ())?;
        let outsider = border.outsider()?;
        let start = Instant::now();
        for damage in [
            "flush table inet skein",
            "insert rule inet skein sources accept",
            "flush set inet skein cluster4",
            "delete table inet skein\nadd table inet skein { flags dormant ; }",
            "delete table inet skein\nadd table inet skein\nadd set inet skein cluster4 { type ipv6_addr ; }",
        ] {
            border.node(0).nft(damage)?;
            stays_closed(&border, &outsider, damage)?;
        }
        checks::not_by_timer(5, start.elapsed())?;
    }
    Ok(())
}

/// `iptables-restore` replaces its own tables only.
#[test]
fn border_is_closed_after_a_restore_by_iptables() -> Result<()> {
    for cni in [true, false] {
        let border = Border::up(cni, |_| ())?;
        let outsider = border.outsider()?;
        for iptables in ["iptables-nft", "iptables-legacy"] {
            let mut restore = border.node(0).command(format!("{iptables}-restore"));
            process::run_with_input(&mut restore, b"*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")?;
            stays_closed(&border, &outsider, iptables)?;
        }
    }
    Ok(())
}

/// An agent that is killed or stopped leaves the table; `cleanup` removes it.
#[test]
fn border_is_closed_without_an_agent_until_cleanup() -> Result<()> {
    for cni in [true, false] {
        let mut border = Border::up(cni, |_| ())?;
        let outsider = border.outsider()?;
        border.cluster.agents[0].kill_control();
        stays_closed(&border, &outsider, "the agent was killed")?;
        border.cluster.agents[0].start()?;
        border.cluster.agents[0].stop()?;
        stays_closed(&border, &outsider, "the agent was stopped")?;
        let finished = border.cluster.agents[0].run_command(&["cleanup"])?;
        ensure!(finished.code == 0, "cleanup failed: {}{}", finished.stdout, finished.stderr);
        let table = border.node(0).sh("nft list table inet skein");
        ensure!(table.is_err(), "cleanup leaves the table: {table:?}");
    }
    Ok(())
}

/// The next agent finds an older table with other sets.
#[test]
fn table_of_another_version_is_replaced_at_the_start() -> Result<()> {
    for cni in [true, false] {
        let mut border = Border::up(cni, |_| ())?;
        let outsider = border.outsider()?;
        border.cluster.agents[0].kill_control();
        border.node(0).nft(
            "delete table inet skein\nadd table inet skein\n\
             add set inet skein cluster4 { type inet_service ; }\n\
             add chain inet skein outward { type filter hook input priority 0 ; }",
        )?;
        border.cluster.agents[0].start()?;
        stays_closed(&border, &outsider, "a table of another version")?;
    }
    Ok(())
}

/// Payload of the spoofed frames.
const PAYLOAD: usize = 64;

/// Frames that are sent before and after each change, one per millisecond.
const FRAMES: u64 = 500;

/// Two nodes and a machine on the underlay that sends frames with the source of the second node's
/// pod to the first node's pod.
struct Spoofer {
    border: Border,
    outsider: Netns,
}

impl Spoofer {
    fn up() -> Result<Self> {
        let border = Border::up(true, |_| ())?;
        let outsider = border.outsider()?;
        let (target, source) = (border.pod(0).v4, border.pod(1).v4);
        let by = border.cluster.lab.nodes[0].underlay(Family::V4);
        outsider.ip(&format!("address add {source}/32 dev lo"))?;
        outsider.ip(&format!("route add {target}/32 via {by} src {source}"))?;
        Ok(Self { border, outsider })
    }

    /// Sends spoofed frames while `during` runs; returns the number of frames that reached the pod.
    fn flood(&self, during: impl FnOnce(&FlowProgress) -> Result<()>) -> Result<u64> {
        let pod = self.border.pod(0);
        let (to, sent, passed) = ((pod.v4, PORT).into(), AtomicU64::new(0), Arc::default());
        let receiver = udp::Receiver::start_with_progress(&pod.ns, to, PAYLOAD, &passed)?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let sender = scope.spawn(|| -> Result<()> {
                let socket = self.outsider.run(|| UdpSocket::bind("0.0.0.0:0"))??;
                while !stop.load(Ordering::Relaxed) {
                    socket.send_to(&[0; PAYLOAD], to)?;
                    sent.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            });
            let more = |count| {
                let goal = sent.load(Ordering::Relaxed) + count;
                let is_sent = || Ok(sent.load(Ordering::Relaxed) >= goal);
                checks::eventually("frames are sent", checks::EVENT_TIMEOUT, is_sent)
            };
            let done = more(FRAMES).and_then(|_| during(&passed)).and_then(|()| more(FRAMES));
            stop.store(true, Ordering::Relaxed);
            sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
            done
        })?;
        Ok(receiver.stop()?.received)
    }
}

/// Rules are replaced in one transaction.
#[test]
fn no_spoofed_frame_passes_while_records_change() -> Result<()> {
    let spoofer = Spoofer::up()?;
    let agent = &spoofer.border.cluster.agents[0];
    let passed = spoofer.flood(|_| {
        for number in 0..20 {
            agent.put_record(&Record::synthetic(number)?)?;
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    })?;
    ensure!(passed == 0, "{passed} spoofed frames passed while the rules were replaced.");
    Ok(())
}

/// After a flush by another program, frames pass until the table is restored, and none afterwards.
#[test]
fn spoofed_frames_pass_only_between_flush_and_repair() -> Result<()> {
    let spoofer = Spoofer::up()?;
    let node = spoofer.border.node(0);
    let table = table_lines(node)?;
    let mut open = 0;
    let passed = spoofer.flood(|passed| {
        node.nft("flush ruleset")?;
        let is_restored = || Ok(table_lines(node).is_ok_and(|now| now == table));
        checks::eventually("the table is restored", checks::EVENT_TIMEOUT, is_restored)?;
        // Frames that passed before the repair may still wait in a queue.
        checks::eventually("no further frame passes", checks::EVENT_TIMEOUT, || {
            open = passed.bytes() / PAYLOAD as u64;
            thread::sleep(Duration::from_millis(300));
            Ok(passed.bytes() / PAYLOAD as u64 == open)
        })
        .map(drop)
    })?;
    println!("{passed} spoofed frames passed after one flush, one per millisecond");
    ensure!(passed == open, "{passed} frames passed, {open} before the repair.");
    Ok(())
}

#[test]
fn no_spoofed_frame_passes_while_the_interface_is_down() -> Result<()> {
    let spoofer = Spoofer::up()?;
    let passed = spoofer.flood(|_| spoofer.border.node(0).ip("link set skein0 down").map(drop))?;
    ensure!(passed == 0, "{passed} spoofed frames passed while skein0 was down.");
    Ok(())
}
