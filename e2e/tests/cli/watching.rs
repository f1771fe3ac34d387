//! Commands that show packets and states until they are interrupted: `trace`, `capture`, `top`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::agent::Cluster;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::{Family, Lab, Plan, checks, process};

use crate::support::{end, joined, json, ran, says, start};

#[test]
fn drops_are_shown_as_they_happen() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    // Masquerading would replace the foreign source of node-a's packets.
    cluster.agents[0].set("firewall.masquerade_foreign", false);
    cluster.start()?;
    joined(&cluster)?;
    let (a, b) = (&cluster.lab.nodes[0], &cluster.lab.nodes[1]);
    // The data process of node-b gets packets for 10.99.0.0/16, for which it has no peer.
    b.ns.ip("route add 10.99.0.0/16 dev skein0")?;
    // node-b drops packets of node-a with a source that node-a does not own.
    a.ns.ip("address add 10.77.0.1/32 dev lo")?;
    let log = cluster.lab.directory().join("drops");
    let mut trace = start(&cluster.agents[1], &["trace", "--drops", "--seconds", "6"], &log)?;
    checks::eventually("trace runs", checks::EVENT_TIMEOUT, || {
        Ok(trace.log_tail(5).contains("DIRECTION"))
    })?;
    let ping = "ping -n -c 2 -i 0.2 -W 1";
    let _ = cluster.lab.pod(1).ns.sh(&format!("{ping} 10.99.1.2"));
    let _ = a.ns.sh(&format!("{ping} -I 10.77.0.1 10.244.2.10"));
    let garbage = || std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"garbage", "192.0.2.2:51900");
    a.ns.run(garbage)??;
    checks::eventually("the drops are shown", checks::EVENT_TIMEOUT, || {
        let shown = trace.log_tail(100);
        Ok(["no_route", "inner_source", "outer_header"].iter().all(|reason| shown.contains(reason)))
    })?;
    ensure!(trace.exited().is_none(), "trace showed the drops only at its end.");
    ensure!(end(&mut trace)? == 0);
    let shown = trace.log_tail(100);
    says(&shown, &["no_route", "10.244.2.10 > 10.99.1.2 ICMP echo request", "inner_source"])?;
    says(&shown, &["10.77.0.1 > 10.244.2.10", "192.0.2.1:", "outer_header"])?;

    // The drops of a flood share lines, and every packet is counted.
    let log = cluster.lab.directory().join("flood");
    let flood = ["trace", "--drops", "--seconds", "5", "-o", "json"];
    let mut trace = start(&cluster.agents[1], &flood, &log)?;
    std::thread::sleep(Duration::from_millis(700));
    let send = || -> std::io::Result<()> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        (0..3000).try_for_each(|_| socket.send_to(b"garbage", "192.0.2.2:51900").map(drop))
    };
    a.ns.run(send)??;
    ensure!(end(&mut trace)? == 0);
    let text = fs::read_to_string(&log)?;
    let lines = text.lines().map(|line| Ok(serde_json::from_str::<Value>(line)?));
    let lines = lines.collect::<Result<Vec<_>>>()?;
    let of_flood = lines.iter().filter(|line| line["reason"] == "outer_header");
    let (shown, packets) = of_flood
        .fold((0, 0), |(n, sum), line| (n + 1, sum + line["packets"].as_u64().unwrap_or(0)));
    let report = cluster.agents[1].report()?;
    let drops = report["drops"].as_array().context("no drops")?;
    let counted = drops.iter().find(|drop| drop["reason"] == "outer_header");
    let counted = counted.and_then(|drop| drop["packets"].as_u64()).context("not counted")?;
    // One packet was counted before this trace.
    let expected = counted - 1;
    ensure!(
        packets == expected && shown < 1500,
        "trace showed {packets} of {expected} packets in {shown} lines."
    );
    joined(&cluster)
}

#[test]
fn capture_contains_the_inner_packets_of_one_peer() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    joined(&cluster)?;
    let (a, agent) = (cluster.lab.pod(0), &cluster.agents[0]);
    let file = cluster.lab.directory().join("capture.pcap");
    let (path, log) = (file.to_string_lossy(), cluster.lab.directory().join("log"));
    let arguments = ["capture", "node-b", "--write", &path, "--seconds", "4"];
    let mut capture = start(agent, &arguments, &log)?;
    checks::eventually("capture runs", checks::EVENT_TIMEOUT, || Ok(file.exists()))?;
    std::thread::sleep(Duration::from_millis(300));
    let all = Ping { count: 5, ..Ping::default() };
    let answered = ping(&a.ns, cluster.lab.pod(1).v4.into(), all)?.received as usize;
    ping(&a.ns, cluster.lab.pod(2).v4.into(), all)?;
    checks::transfer(a, cluster.lab.pod(1), Family::V6, 200_000)?;
    ensure!(end(&mut capture)? == 0, "capture failed: {}", capture.log_tail(10));
    let read = |filter: &str| {
        let mut tcpdump = Command::new("tcpdump");
        tcpdump.args(["-n", "-r", &path]).args(filter.split(' '));
        process::run(&mut tcpdump)
    };
    let pings = read("icmp")?;
    let requests = pings.matches("10.244.1.10 > 10.244.2.10: ICMP echo request").count();
    let replies = pings.matches("10.244.2.10 > 10.244.1.10: ICMP echo reply").count();
    ensure!(
        (requests, replies) == (5, answered) && answered > 0,
        "{requests} requests and {replies} replies instead of 5 and {answered}: {pings}"
    );
    ensure!(!pings.contains("10.244.3.10"), "Packets of another peer were captured: {pings}");
    // The capture contains segments, not superpackets.
    let tcp = read("ip6 and tcp")?;
    ensure!(tcp.lines().count() > 140, "Too few segments were captured: {tcp}");
    let longest = |line: &str| line.rsplit("length ").next()?.split(':').next()?.parse().ok();
    let longest: Option<u32> = tcp.lines().filter_map(longest).max();
    let is_segment = longest.is_some_and(|bytes| (1000..1440).contains(&bytes));
    ensure!(is_segment, "The longest segment has {longest:?} bytes, not 1000 to 1439.");

    let mode = fs::metadata(&file)?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "The file has mode {mode:o} instead of 600.");

    // A capture with a limit, to standard output.
    let address = cluster.lab.pod(1).v4.to_string();
    let more = ["capture", &address, "--count", "3", "--snaplen", "28", "-o", "json"];
    let pinged_while_it_runs = |arguments: &[&str]| {
        std::thread::scope(|scope| -> Result<_> {
            let captured =
                scope.spawn(|| Ok::<_, anyhow::Error>(agent.command(arguments)?.output()?));
            checks::eventually("capture ends", Duration::from_secs(30), || {
                ping(&a.ns, cluster.lab.pod(1).v4.into(), Ping::default())?;
                Ok(captured.is_finished())
            })?;
            captured.join().ok().context("the thread panicked")?
        })
    };
    let finished = pinged_while_it_runs(&more)?;
    ensure!(finished.status.success(), "capture failed: {finished:?}");
    let length = finished.stdout.len();
    ensure!(length == 24 + 3 * (16 + 28), "3 packets of 28 bytes make {length} bytes.");
    let outcome: Value = serde_json::from_slice(&finished.stderr)?;
    ensure!(outcome["packets"] == 3, "The summary does not count 3 packets: {outcome}");
    let small = cluster.lab.directory().join("small.pcap");
    let to = small.to_string_lossy();
    let at_most = ["capture", &address, "--write", &to, "--bytes", "500"];
    pinged_while_it_runs(&at_most)?;
    let length = fs::metadata(&small)?.len();
    ensure!((100..=500).contains(&length), "The file has {length} bytes, not 100 to 500.");
    let unknown = agent.run_command(&["capture", "node-z"])?;
    ran(&unknown, 2)
}

/// A terminal (tmux session) that runs a shell script.
pub(super) struct Terminal {
    socket: String,
}

impl Terminal {
    pub(super) fn open(directory: &Path, script: &str) -> Result<Self> {
        // A name of its own: the server of an earlier terminal may still be ending.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("tmux-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let terminal = Self { socket: directory.join(name).to_string_lossy().into_owned() };
        terminal.tmux(&["new-session", "-d", "-x", "110", "-y", "30", script])?;
        Ok(terminal)
    }

    pub(super) fn tmux(&self, arguments: &[&str]) -> Result<String> {
        let mut tmux = Command::new("tmux");
        process::run(tmux.args(["-f", "/dev/null", "-S", &self.socket]).args(arguments))
    }

    pub(super) fn shows(&self, word: &str) -> Result<()> {
        let mut screen = String::new();
        checks::eventually(word, Duration::from_secs(20), || {
            screen = self.tmux(&["capture-pane", "-p"])?;
            Ok(screen.contains(word))
        })
        .map(drop)
        .with_context(|| screen.clone())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]);
    }
}

#[test]
fn top_refreshes_and_restores_the_terminal() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    joined(&cluster)?;
    let agent = &cluster.agents[0];
    let once = agent.run_command(&["top", "--interval", "0.3"])?;
    ran(&once, 0)?;
    says(&once.stdout, &["PKTS/CALL", "INNER/OUTER", "node-b"])?;
    let sample = json(&agent.run_command(&["top", "-o", "json", "--interval", "0.3"])?)?;
    ensure!(
        sample["peers"][0]["name"] == "node-b" && sample["in"].is_object(),
        "The sample is incomplete: {sample}"
    );

    for key in ["q", "C-c"] {
        let top = process::describe(&agent.command(&["top", "--interval", "0.3"])?);
        let script = format!("echo before; {top}; echo ended $?; stty -a; sleep 60");
        let terminal = Terminal::open(cluster.lab.directory(), &script)?;
        terminal.shows("PKTS/CALL")?;
        let more = Ping { count: 20, ..Ping::default() };
        ping(&cluster.lab.pod(0).ns, cluster.lab.pod(1).v4.into(), more)?;
        terminal.shows("established")?;
        let first = terminal.tmux(&["capture-pane", "-p"])?;
        checks::eventually("top refreshes", Duration::from_secs(10), || {
            ping(&cluster.lab.pod(0).ns, cluster.lab.pod(1).v4.into(), Ping::default())?;
            Ok(terminal.tmux(&["capture-pane", "-p"])? != first)
        })?;
        ensure!(!first.contains("before"), "top did not use the alternate screen: {first}");
        terminal.tmux(&["send-keys", key])?;
        terminal.shows("ended 0")?;
        terminal.shows("speed")?;
        let screen = terminal.tmux(&["capture-pane", "-p"])?;
        says(&screen, &["before", " icanon", " echo "])?;
        ensure!(!screen.contains("PKTS/CALL"), "top left its output on the screen: {screen}");
        // Only the alternate screen has a hidden cursor.
        let cursor = terminal.tmux(&["display-message", "-p", "#{cursor_flag}"])?;
        ensure!(cursor.trim() == "1", "The cursor is hidden after top has ended.");
    }

    // The output has colours only on a terminal, and only without NO_COLOR.
    for (setting, coloured) in [("COLOURS=any", true), ("NO_COLOR=1", false)] {
        let peers = process::describe(&agent.command(&["peers"])?);
        let script = format!("export {setting}; {peers}; echo ended $?; sleep 60");
        let terminal = Terminal::open(cluster.lab.directory(), &script)?;
        terminal.shows("ended 0")?;
        let screen = terminal.tmux(&["capture-pane", "-p", "-e"])?;
        ensure!(screen.contains("established"), "The peer is not shown: {screen}");
        let is_coloured = screen.contains('\x1b');
        ensure!(is_coloured == coloured, "{setting}: colours are {is_coloured}: {screen:?}");
    }
    let piped = agent.run_command(&["peers"])?;
    ensure!(!piped.stdout.contains('\x1b'), "The output to a pipe has colours: {piped:?}");
    Ok(())
}
