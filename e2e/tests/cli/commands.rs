//! The operator's commands of `skein-agent`, run on real nodes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_lab::agent::{Agent, Cluster, binary};
use skein_lab::checks;
use skein_lab::load::ping::{Ping, ping};
use skein_lab::process::{self, Finished, Process};
use skein_lab::{Family, Lab, Plan};

/// Every node has a session with every other. A busy machine may lose a ping: that is not what is tested here.
fn joined(cluster: &Cluster) -> Result<()> {
    let pods = || (0..cluster.lab.nodes.len()).map(|node| cluster.lab.pod(node));
    for (from, to) in pods().flat_map(|from| pods().map(move |to| (from, to))) {
        for family in Family::BOTH {
            checks::wait_until_reached(from, to, family, Duration::from_secs(10))?;
        }
    }
    Ok(())
}

fn ran(finished: &Finished, code: i32) -> Result<()> {
    let (stdout, stderr) = (&finished.stdout, &finished.stderr);
    ensure!(finished.code == code, "code {} instead of {code}: {stdout}{stderr}", finished.code);
    Ok(())
}

fn json(finished: &Finished) -> Result<Value> {
    serde_json::from_str(&finished.stdout).with_context(|| finished.stdout.clone())
}

fn says(text: &str, words: &[&str]) -> Result<()> {
    words.iter().try_for_each(|word| {
        ensure!(text.contains(word), "{word:?} is not in:\n{text}");
        Ok(())
    })
}

/// A command that goes on while the test does something.
fn start(agent: &Agent, arguments: &[&str], log: &Path) -> Result<Process> {
    Process::start(&mut agent.command(arguments)?, log)
}

fn end(process: &mut Process) -> Result<i32> {
    let mut code = None;
    checks::eventually("the command has ended", Duration::from_secs(20), || {
        code = process.exited();
        Ok(code.is_some())
    })
    .with_context(|| process.log_tail(30))?;
    code.context("no exit code")
}

#[test]
fn peers_and_traces_tell_the_well_from_the_lost() -> Result<()> {
    let mut cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    joined(&cluster)?;
    let peers = ["peers", "--interval", "0.2"];
    let shown = cluster.agents[0].run_command(&peers)?;
    ran(&shown, 0)?;
    says(&shown.stdout, &["node-b", "node-c", "established", "192.0.2.3:51900"])?;
    ensure!(!shown.stdout.contains('\u{1b}'), "colours though this is no terminal");
    let one = cluster.agents[0].run_command(&[&peers[..], &["node-c", "-o", "json"]].concat())?;
    let one = json(&one)?;
    ensure!(one.as_array().is_some_and(|all| all.len() == 1), "{one}");
    ensure!(one[0]["name"] == "node-c" && one[0]["rates"].is_object(), "{one}");
    let nobody = cluster.agents[0].run_command(&["peers", "node-z"])?;
    ran(&nobody, 2)?;
    says(&nobody.stderr, &["node-z", "node-b"])?;

    let (a, b) = (cluster.lab.pod(0).v4.to_string(), cluster.lab.pod(1).v4.to_string());
    let well = cluster.agents[0].run_command(&["trace", &a, &b])?;
    ran(&well, 0)?;
    says(
        &well.stdout,
        &["source", "pod0", "node-b owns 10.244.2.0/24", "192.0.2.2:51900", "eth0"],
    )?;
    let v6 = cluster.lab.pod(1).v6.to_string();
    let node = cluster.agents[0].run_command(&["trace", "node-a", "node-b", "-o", "json"])?;
    ran(&node, 0)?;
    ensure!(json(&node)?["passes"] == true, "{}", node.stdout);
    let mixed = cluster.agents[0].run_command(&["trace", &a, &v6])?;
    ran(&mixed, 2)?;
    let foreign = cluster.agents[0].run_command(&["trace", &b, &a])?;
    ran(&foreign, 2)?;
    says(&foreign.stderr, &["run this on node-b"])?;
    let outside = cluster.agents[0].run_command(&["trace", &a, "198.51.100.9"])?;
    ran(&outside, 1)?;
    says(&outside.stderr, &["route", "198.51.100.9"])?;

    // The way there is gone.
    cluster.lab.nodes[0].ns.ip("route add blackhole 10.244.2.10/32")?;
    let lost = cluster.agents[0].run_command(&["trace", &a, &b])?;
    ran(&lost, 1)?;
    cluster.lab.nodes[0].ns.ip("route del blackhole 10.244.2.10/32")?;

    cluster.lab.set_cable(1, false)?;
    let unreachable = || {
        let _ = ping(&cluster.lab.pod(0).ns, cluster.lab.pod(1).v4.into(), Ping::default());
        Ok(cluster.agents[0].run_command(&["peers", "--interval", "0"])?.code == 1)
    };
    checks::eventually("the peer is unreachable", Duration::from_secs(30), unreachable)?;
    let lost = cluster.agents[0].run_command(&["peers", "--state", "unreachable"])?;
    ran(&lost, 1)?;
    says(&lost.stdout, &["node-b", "unreachable"])?;
    ensure!(!lost.stdout.contains("node-c"), "{}", lost.stdout);
    ran(&cluster.agents[0].run_command(&["peers", "node-c"])?, 0)?;
    let trace = cluster.agents[0].run_command(&["trace", &a, &b])?;
    ran(&trace, 1)?;
    says(&trace.stderr, &["session", "unreachable"])?;

    cluster.agents[0].stop()?;
    let away = cluster.agents[0].run_command(&["peers"])?;
    ran(&away, 1)?;
    says(&away.stderr, &["no agent answers", "is it running"])
}

#[test]
fn drops_are_shown_as_they_happen() -> Result<()> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    // Masquerading would give node-a's packets a source of its own.
    cluster.agents[0].set("firewall.masquerade_foreign", false);
    cluster.start()?;
    joined(&cluster)?;
    let (a, b) = (&cluster.lab.nodes[0], &cluster.lab.nodes[1]);
    // What node-b does not own comes to its data process, which has no peer for it.
    b.ns.ip("route add 10.99.0.0/16 dev skein0")?;
    // And what node-a sends with a source that is not its own is dropped by node-b.
    a.ns.ip("address add 10.77.0.1/32 dev lo")?;
    let log = cluster.lab.directory().join("drops");
    let mut trace = start(&cluster.agents[1], &["trace", "--drops", "--seconds", "6"], &log)?;
    checks::eventually("it listens", Duration::from_secs(5), || {
        Ok(trace.log_tail(5).contains("DIRECTION"))
    })?;
    let ping = "ping -n -c 2 -i 0.2 -W 1";
    let _ = cluster.lab.pod(1).ns.sh(&format!("{ping} 10.99.1.2"));
    let _ = a.ns.sh(&format!("{ping} -I 10.77.0.1 10.244.2.10"));
    let garbage = || std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"garbage", "192.0.2.2:51900");
    a.ns.run(garbage)??;
    checks::eventually("the drops are shown", Duration::from_secs(2), || {
        let shown = trace.log_tail(100);
        Ok(["no_route", "inner_source", "outer_header"].iter().all(|reason| shown.contains(reason)))
    })?;
    ensure!(trace.exited().is_none(), "they were shown when it had ended");
    ensure!(end(&mut trace)? == 0);
    let shown = trace.log_tail(100);
    says(&shown, &["no_route", "10.244.2.10 > 10.99.1.2 ICMP echo request", "inner_source"])?;
    says(&shown, &["10.77.0.1 > 10.244.2.10", "192.0.2.1:", "outer_header"])?;

    // A flood is not told packet by packet, but none is forgotten.
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
    // One was counted before.
    ensure!(packets == counted - 1 && shown < 1500, "{packets} of {counted} in {shown} lines");
    joined(&cluster)
}

#[test]
fn a_capture_holds_the_inner_packets_of_a_peer() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    joined(&cluster)?;
    let (a, agent) = (cluster.lab.pod(0), &cluster.agents[0]);
    let file = cluster.lab.directory().join("capture.pcap");
    let (path, log) = (file.to_string_lossy(), cluster.lab.directory().join("log"));
    let arguments = ["capture", "node-b", "--write", &path, "--seconds", "4"];
    let mut capture = start(agent, &arguments, &log)?;
    checks::eventually("it listens", Duration::from_secs(5), || Ok(file.exists()))?;
    std::thread::sleep(Duration::from_millis(300));
    let all = Ping { count: 5, ..Ping::default() };
    let answered = ping(&a.ns, cluster.lab.pod(1).v4.into(), all)?.received as usize;
    ping(&a.ns, cluster.lab.pod(2).v4.into(), all)?;
    checks::transfer(a, cluster.lab.pod(1), Family::V6, 200_000)?;
    ensure!(end(&mut capture)? == 0, "{}", capture.log_tail(10));
    let read = |filter: &str| {
        let mut tcpdump = Command::new("tcpdump");
        tcpdump.args(["-n", "-r", &path]).args(filter.split(' '));
        process::run(&mut tcpdump)
    };
    let pings = read("icmp")?;
    let requests = pings.matches("10.244.1.10 > 10.244.2.10: ICMP echo request").count();
    let replies = pings.matches("10.244.2.10 > 10.244.1.10: ICMP echo reply").count();
    ensure!((requests, replies) == (5, answered) && answered > 0, "{pings}");
    ensure!(!pings.contains("10.244.3.10"), "another peer's packets: {pings}");
    // Segments, not superpackets.
    let tcp = read("ip6 and tcp")?;
    ensure!(tcp.lines().count() > 140, "{tcp}");
    let longest = |line: &str| line.rsplit("length ").next()?.split(':').next()?.parse().ok();
    let longest: Option<u32> = tcp.lines().filter_map(longest).max();
    ensure!(longest.is_some_and(|bytes| (1000..1440).contains(&bytes)), "{longest:?}");

    let mode = fs::metadata(&file)?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "others may read what pods say: {mode:o}");

    // Bounded, and to standard output.
    let address = cluster.lab.pod(1).v4.to_string();
    let more = ["capture", &address, "--count", "3", "--snaplen", "28", "-o", "json"];
    let pinged_while_it_runs = |arguments: &[&str]| {
        std::thread::scope(|scope| -> Result<_> {
            let captured =
                scope.spawn(|| Ok::<_, anyhow::Error>(agent.command(arguments)?.output()?));
            checks::eventually("it has seen enough", Duration::from_secs(30), || {
                ping(&a.ns, cluster.lab.pod(1).v4.into(), Ping::default())?;
                Ok(captured.is_finished())
            })?;
            captured.join().ok().context("it panicked")?
        })
    };
    let finished = pinged_while_it_runs(&more)?;
    ensure!(finished.status.success(), "{finished:?}");
    ensure!(finished.stdout.len() == 24 + 3 * (16 + 28), "{} bytes", finished.stdout.len());
    let outcome: Value = serde_json::from_slice(&finished.stderr)?;
    ensure!(outcome["packets"] == 3, "{outcome}");
    let small = cluster.lab.directory().join("small.pcap");
    let to = small.to_string_lossy();
    let at_most = ["capture", &address, "--write", &to, "--bytes", "500"];
    pinged_while_it_runs(&at_most)?;
    let length = fs::metadata(&small)?.len();
    ensure!((100..=500).contains(&length), "{length} bytes");
    let nobody = agent.run_command(&["capture", "node-z"])?;
    ran(&nobody, 2)
}

/// A terminal of its own, which shows what a shell makes of some lines.
struct Terminal {
    socket: String,
}

impl Terminal {
    fn open(directory: &Path, script: &str) -> Result<Self> {
        let terminal = Self { socket: directory.join("tmux").to_string_lossy().into_owned() };
        terminal.tmux(&["new-session", "-d", "-x", "110", "-y", "30", script])?;
        Ok(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Result<String> {
        let mut tmux = Command::new("tmux");
        process::run(tmux.args(["-f", "/dev/null", "-S", &self.socket]).args(arguments))
    }

    fn shows(&self, word: &str) -> Result<()> {
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
fn top_refreshes_and_leaves_the_terminal_as_it_was() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    joined(&cluster)?;
    let agent = &cluster.agents[0];
    let once = agent.run_command(&["top", "--interval", "0.3"])?;
    ran(&once, 0)?;
    says(&once.stdout, &["PKTS/CALL", "INNER/OUTER", "node-b"])?;
    let sample = json(&agent.run_command(&["top", "-o", "json", "--interval", "0.3"])?)?;
    ensure!(sample["peers"][0]["name"] == "node-b" && sample["in"].is_object(), "{sample}");

    for key in ["q", "C-c"] {
        let top = process::describe(&agent.command(&["top", "--interval", "0.3"])?);
        let script = format!("echo before; {top}; echo ended $?; stty -a; sleep 60");
        let terminal = Terminal::open(cluster.lab.directory(), &script)?;
        terminal.shows("PKTS/CALL")?;
        let more = Ping { count: 20, ..Ping::default() };
        ping(&cluster.lab.pod(0).ns, cluster.lab.pod(1).v4.into(), more)?;
        terminal.shows("established")?;
        let first = terminal.tmux(&["capture-pane", "-p"])?;
        checks::eventually("it refreshes", Duration::from_secs(10), || {
            ping(&cluster.lab.pod(0).ns, cluster.lab.pod(1).v4.into(), Ping::default())?;
            Ok(terminal.tmux(&["capture-pane", "-p"])? != first)
        })?;
        ensure!(!first.contains("before"), "the screen that was there is drawn over: {first}");
        terminal.tmux(&["send-keys", key])?;
        terminal.shows("ended 0")?;
        terminal.shows("speed")?;
        let screen = terminal.tmux(&["capture-pane", "-p"])?;
        says(&screen, &["before", " icanon", " echo "])?;
        ensure!(!screen.contains("PKTS/CALL"), "{screen}");
        // It is the other screen that has a hidden cursor.
        let cursor = terminal.tmux(&["display-message", "-p", "#{cursor_flag}"])?;
        ensure!(cursor.trim() == "1", "the cursor is hidden");
    }

    // Colours are for terminals, and for those who want them.
    for (setting, coloured) in [("COLOURS=any", true), ("NO_COLOR=1", false)] {
        let peers = process::describe(&agent.command(&["peers"])?);
        let script = format!("export {setting}; {peers}; echo ended $?; sleep 60");
        let terminal = Terminal::open(cluster.lab.directory(), &script)?;
        terminal.shows("ended 0")?;
        let screen = terminal.tmux(&["capture-pane", "-p", "-e"])?;
        ensure!(screen.contains("established"), "{screen}");
        ensure!(screen.contains('\x1b') == coloured, "{setting}: {screen:?}");
    }
    let piped = agent.run_command(&["peers"])?;
    ensure!(!piped.stdout.contains('\x1b'), "{piped:?}");
    Ok(())
}

#[test]
fn bench_measures_over_the_overlay_and_beside_it() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    joined(&cluster)?;
    let log = cluster.lab.directory().join("serve");
    let mut serve = start(&cluster.agents[1], &["bench", "--serve", "--limit", "60"], &log)?;
    let mut told = String::new();
    checks::eventually("it answers", Duration::from_secs(10), || {
        told = serve.log_tail(5);
        Ok(told.contains("--token"))
    })?;
    // What it says is what is to be typed.
    let line = told.lines().find(|line| line.contains("--token")).context("no line")?;
    let words: Vec<&str> = line.split_whitespace().skip(1).collect();
    ensure!(words[..2] == ["bench", "node-b"], "{line}");
    let agent = &cluster.agents[0];
    let measured =
        agent.run_command(&[&words[..], &["--seconds", "0.3", "-o", "json"]].concat())?;
    ran(&measured, 0)?;
    let outcome = json(&measured)?;
    for way in ["overlay", "beside"] {
        for quantity in ["upload_bits_per_second", "download_bits_per_second"] {
            ensure!(outcome[way][quantity].as_f64() > Some(1e6), "{way} {quantity}: {outcome}");
        }
        ensure!(outcome[way]["round_trip_p50_us"].as_f64() > Some(1.0), "{way}: {outcome}");
        ensure!(outcome[way]["udp_received_per_second"].as_f64() > Some(100.0), "{way}: {outcome}");
    }
    // A terminal shows how far it is, and the result alone in the end.
    let shown = process::describe(&agent.command(&[&words[..], &["--seconds", "0.7"]].concat())?);
    let script = format!("{shown}; echo ended $?; sleep 60");
    let terminal = Terminal::open(cluster.lab.directory(), &script)?;
    terminal.shows("beside: ")?;
    terminal.shows("ended 0")?;
    let screen = terminal.tmux(&["capture-pane", "-p"])?;
    ensure!(!screen.contains("beside: ") && screen.contains("round trip"), "{screen}");

    let huge = agent.run_command(&["bench", "--serve", "--limit", "18446744073709551615"])?;
    ran(&huge, 2)?;
    says(&huge.stderr, &["--limit"])?;
    let wrong = ["bench", "node-b", "--token", "guessed", "--seconds", "0.3"];
    let refused = agent.run_command(&wrong)?;
    ran(&refused, 2)?;
    says(&refused.stderr, &["token"])?;

    // EACCES of the kernel is no word on the token.
    cluster.lab.nodes[0].ns.ip("route add prohibit 10.244.2.77")?;
    let there = [&words[..], &["--address", "10.244.2.77", "--overlay-only"]].concat();
    let prohibited = agent.run_command(&there)?;
    ran(&prohibited, 1)?;
    says(&prohibited.stderr, &["Permission denied"])?;

    // A firewall that lets through what the overlay needs only.
    cluster.lab.nodes[1].ns.nft(
        "table inet t { chain c { type filter hook input priority 0; \
         iifname eth0 tcp dport 51901 drop; }; }",
    )?;
    let table = agent.run_command(&[&words[..], &["--seconds", "0.2"]].concat())?;
    ran(&table, 0)?;
    says(&table.stdout, &["nothing was measured beside the overlay", "firewall", "round trip"])?;
    serve.stop(Duration::from_secs(5)).map(drop)
}

#[test]
fn connectivity_without_kubernetes_is_of_this_nodes_peers() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    let agent = &cluster.agents[0];
    let test = agent.run_command(&["connectivity-test"])?;
    ran(&test, 0)?;
    says(&test.stdout, &["node-b", "node-c", "2 of 2 pairs are well"])?;
    cluster.lab.set_cable(1, false)?;
    let mut command = agent.command(&["connectivity-test", "-o", "json"])?;
    let test = process::finish(&mut command, &[], Duration::from_secs(60))?;
    ran(&test, 1)?;
    let matrix = json(&test)?;
    let pairs = matrix["pairs"].as_array().context("no pairs")?;
    for pair in pairs {
        ensure!(pair["ok"] == (pair["to"] == "node-c"), "{pair}");
        // ICMP by both families, small and full; all of them are shown where they fail.
        ensure!(pair["probed"] == 4, "{pair}");
        let shown = pair["probes"].as_array().map_or(0, Vec::len);
        ensure!(shown == if pair["ok"] == true { 0 } else { 4 }, "{pair}");
    }
    ensure!(pairs.len() == 2, "{matrix}");
    says(&test.stderr, &["1 of 2 pairs fail"])
}

#[test]
fn a_sysdump_holds_what_is_needed_and_no_secret() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    joined(&cluster)?;
    let agent = &cluster.agents[0];
    let file = cluster.lab.directory().join("dump.tar.gz");
    let path = file.to_string_lossy().into_owned();
    let dumped = agent.run_command(&["sysdump", &path, "-o", "json"])?;
    ran(&dumped, 0)?;
    let entries = json(&dumped)?["entries"].as_array().context("no entries")?.len();
    ensure!(entries > 30, "{entries} entries");
    use std::os::unix::fs::PermissionsExt as _;
    ensure!(fs::metadata(&file)?.permissions().mode() & 0o777 == 0o600);
    let unpacked = cluster.lab.directory().join("unpacked");
    fs::create_dir_all(&unpacked)?;
    let mut tar = Command::new("tar");
    process::run(tar.arg("-xzf").arg(&file).arg("-C").arg(&unpacked).arg("--strip-components=1"))?;
    let read =
        |name: &str| fs::read_to_string(unpacked.join(name)).with_context(|| name.to_owned());
    says(&read("status.json")?, &["node-b", "established"])?;
    says(&read("metrics.txt")?, &["skein_inner_packets_total"])?;
    says(&read("network/routes4.txt")?, &["10.244.2.0/24 dev skein0"])?;
    says(&read("network/netlink.txt")?, &["skein0", "10.244.2.0/24"])?;
    says(&read("records/node-b.toml")?, &["192.0.2.2:51900"])?;
    says(&read("machine/sysctls.txt")?, &["net.ipv4.ip_forward = 1"])?;
    says(&read("contents.txt")?, &["status.json"])?;
    for name in ["config.json", "check.json", "machine/proc/version", "network/links.txt"] {
        ensure!(!read(name)?.is_empty(), "{name} is empty");
    }

    let key = fs::read_to_string(cluster.lab.directory().join("node-a/node.key"))?;
    let base64 = key.trim().trim_end_matches('=');
    let raw = decode(key.trim())?;
    let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
    let forms = [base64.as_bytes(), hex.as_bytes(), hex.to_uppercase().as_bytes(), &raw]
        .map(<[u8]>::to_vec);
    let mut tar = Command::new("tar");
    let all = tar.args(["-xzOf", &path]).output()?.stdout;
    ensure!(all.len() > 10_000, "{} bytes", all.len());
    for form in &forms {
        ensure!(!all.windows(form.len()).any(|part| part == *form), "the private key is in it");
    }
    let again = agent.run_command(&["sysdump", &path])?;
    ran(&again, 2)?;
    says(&again.stderr, &["is there already"])
}

/// Base64 by the system's own program.
fn decode(text: &str) -> Result<Vec<u8>> {
    use std::io::Write as _;
    use std::process::Stdio;
    let mut base64 = Command::new("base64");
    let mut child = base64.arg("-d").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("no stdin")?.write_all(text.as_bytes())?;
    let raw = child.wait_with_output()?.stdout;
    ensure!(raw.len() == 32, "{} bytes", raw.len());
    Ok(raw)
}

#[test]
fn shells_take_the_completions_and_man_the_pages() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let completions =
        |shell: &str| process::run(Command::new(binary()?).args(["completions", shell]));
    let bash = completions("bash")?;
    process::run_with_input(Command::new("bash").arg("-n"), bash.as_bytes())?;
    // As a user has it: what begins with `pe` is `peers`.
    let script = format!(
        "{bash}\nCOMP_WORDS=(skein-agent pe); COMP_CWORD=1; _skein__agent skein-agent pe skein-agent\n\
         printf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let offered = process::run_with_input(&mut Command::new("bash"), script.as_bytes())?;
    ensure!(offered.trim() == "peers", "{offered}");
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        says(&completions(shell)?, &["peers", "sysdump"])?;
    }
    let pages = directory.path().to_string_lossy().into_owned();
    process::run(Command::new(binary()?).args(["man", &pages]))?;
    let mut names: Vec<_> = fs::read_dir(&pages)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    for name in ["skein-agent.1", "skein-agent-peers.1", "skein-agent-capture.1"] {
        ensure!(names.iter().any(|page| page == name), "{name} is not among {names:?}");
    }
    ensure!(!names.iter().any(|page| page.contains("hold")), "hidden: {names:?}");
    for name in &names {
        let mut mandoc = Command::new("mandoc");
        let lint = process::finish(
            mandoc.args(["-T", "lint", "-W", "error"]).arg(directory.path().join(name)),
            &[],
            Duration::from_secs(10),
        )?;
        ensure!(lint.code == 0, "{name}: {}{}", lint.stdout, lint.stderr);
    }
    let mut mandoc = Command::new("mandoc");
    let page = process::run(mandoc.args(["-T", "ascii"]).arg(directory.path().join(&names[0])))?;
    says(&page, &["skein"])
}
