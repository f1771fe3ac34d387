//! The operator's commands of `skein-agent`, run on real nodes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Cluster, binary};
use skein_lab::load::ping::{Ping, ping};
use skein_lab::{Family, Plan, checks, process};

use crate::support::{joined, json, ran, says, start};
use crate::watching::Terminal;

#[test]
fn peers_and_trace_show_which_peers_are_reachable() -> Result<()> {
    let mut cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    joined(&cluster)?;
    let peers = ["peers", "--interval", "0.2"];
    let shown = cluster.agents[0].run_command(&peers)?;
    ran(&shown, 0)?;
    says(&shown.stdout, &["node-b", "node-c", "established", "192.0.2.3:51900"])?;
    ensure!(!shown.stdout.contains('\u{1b}'), "The output to a pipe has colours.");
    let one = cluster.agents[0].run_command(&[&peers[..], &["node-c", "-o", "json"]].concat())?;
    let one = json(&one)?;
    let count = one.as_array().map_or(0, Vec::len);
    ensure!(count == 1, "The output has {count} peers instead of 1: {one}");
    let has_rates = one[0]["name"] == "node-c" && one[0]["rates"].is_object();
    ensure!(has_rates, "The output does not have the rates of node-c: {one}");
    let unknown = cluster.agents[0].run_command(&["peers", "node-z"])?;
    ran(&unknown, 2)?;
    says(&unknown.stderr, &["node-z", "node-b"])?;

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
    ensure!(json(&node)?["passes"] == true, "The trace does not pass: {}", node.stdout);
    let mixed = cluster.agents[0].run_command(&["trace", &a, &v6])?;
    ran(&mixed, 2)?;
    let foreign = cluster.agents[0].run_command(&["trace", &b, &a])?;
    ran(&foreign, 2)?;
    says(&foreign.stderr, &["Run this command on node-b"])?;
    let outside = cluster.agents[0].run_command(&["trace", &a, "198.51.100.9"])?;
    ran(&outside, 1)?;
    says(&outside.stderr, &["route", "198.51.100.9"])?;

    // A blackhole route replaces the route to the pod.
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
    ensure!(!lost.stdout.contains("node-c"), "node-c is shown, too: {}", lost.stdout);
    ran(&cluster.agents[0].run_command(&["peers", "node-c"])?, 0)?;
    let trace = cluster.agents[0].run_command(&["trace", &a, &b])?;
    ran(&trace, 1)?;
    says(&trace.stderr, &["session", "unreachable"])?;

    cluster.agents[0].stop()?;
    let stopped = cluster.agents[0].run_command(&["peers"])?;
    ran(&stopped, 1)?;
    says(&stopped.stderr, &["no agent answers", "Check that the agent runs"])
}

#[test]
fn bench_measures_overlay_and_underlay() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    joined(&cluster)?;
    let log = cluster.lab.directory().join("serve");
    let mut serve = start(&cluster.agents[1], &["bench", "--serve", "--limit", "60"], &log)?;
    let mut output = String::new();
    checks::eventually("bench --serve shows a command", Duration::from_secs(10), || {
        output = serve.log_tail(5);
        Ok(output.contains("--token"))
    })?;
    // The output contains the command for the other node.
    let line = output.lines().find(|line| line.contains("--token")).context("no command")?;
    let words: Vec<&str> = line.split_whitespace().skip(1).collect();
    ensure!(words[..2] == ["bench", "node-b"], "The shown command is not for node-b: {line}");
    let agent = &cluster.agents[0];
    let measured =
        agent.run_command(&[&words[..], &["--seconds", "0.3", "-o", "json"]].concat())?;
    ran(&measured, 0)?;
    let outcome = json(&measured)?;
    for way in ["overlay", "beside"] {
        for quantity in ["upload_bits_per_second", "download_bits_per_second"] {
            let rate = outcome[way][quantity].as_f64();
            ensure!(rate > Some(1e6), "{way}: {quantity} is only {rate:?}: {outcome}");
        }
        let time = outcome[way]["round_trip_p50_us"].as_f64();
        ensure!(time > Some(1.0), "{way}: The round-trip time is {time:?} µs: {outcome}");
        let rate = outcome[way]["udp_received_per_second"].as_f64();
        ensure!(rate > Some(100.0), "{way}: Only {rate:?} datagrams per second: {outcome}");
    }
    // A terminal shows the progress, and at the end only the result.
    let shown = process::describe(&agent.command(&[&words[..], &["--seconds", "0.7"]].concat())?);
    let script = format!("{shown}; echo ended $?; sleep 60");
    let terminal = Terminal::open(cluster.lab.directory(), &script)?;
    terminal.shows("underlay: ")?;
    terminal.shows("ended 0")?;
    let screen = terminal.tmux(&["capture-pane", "-p"])?;
    let is_result = !screen.contains("underlay: ") && screen.contains("round-trip time");
    ensure!(is_result, "The screen does not show the result alone: {screen}");

    let huge = agent.run_command(&["bench", "--serve", "--limit", "18446744073709551615"])?;
    ran(&huge, 2)?;
    says(&huge.stderr, &["--limit"])?;
    let wrong = ["bench", "node-b", "--token", "guessed", "--seconds", "0.3"];
    let refused = agent.run_command(&wrong)?;
    ran(&refused, 2)?;
    says(&refused.stderr, &["token"])?;

    // EACCES from the kernel is not reported as a wrong token.
    cluster.lab.nodes[0].ns.ip("route add prohibit 10.244.2.77")?;
    let there = [&words[..], &["--address", "10.244.2.77", "--overlay-only"]].concat();
    let prohibited = agent.run_command(&there)?;
    ran(&prohibited, 1)?;
    says(&prohibited.stderr, &["Permission denied"])?;

    // A firewall drops the measurement over the underlay.
    cluster.lab.nodes[1].ns.nft(
        "table inet t { chain c { type filter hook input priority 0; \
         iifname eth0 tcp dport 51901 drop; }; }",
    )?;
    let table = agent.run_command(&[&words[..], &["--seconds", "0.2"]].concat())?;
    ran(&table, 0)?;
    says(&table.stdout, &["no measurement over the underlay", "firewall", "round-trip time"])?;
    serve.stop(checks::EVENT_TIMEOUT).map(drop)
}

#[test]
fn connectivity_test_without_kubernetes_probes_own_peers() -> Result<()> {
    let cluster = Cluster::up(&Plan { nodes: 3, ..Plan::default() }, Family::V4)?;
    let agent = &cluster.agents[0];
    let test = agent.run_command(&["connectivity-test"])?;
    ran(&test, 0)?;
    says(&test.stdout, &["node-b", "node-c", "2 of 2 pairs pass"])?;
    cluster.lab.set_cable(1, false)?;
    let mut command = agent.command(&["connectivity-test", "-o", "json"])?;
    let test = process::finish(&mut command, &[], Duration::from_secs(60))?;
    ran(&test, 1)?;
    let matrix = json(&test)?;
    let pairs = matrix["pairs"].as_array().context("no pairs")?;
    for pair in pairs {
        ensure!(pair["ok"] == (pair["to"] == "node-c"), "The wrong pair fails: {pair}");
        // Small and full-size ICMP requests of both families; all are shown if the pair fails.
        ensure!(pair["probed"] == 4, "The pair was not probed 4 times: {pair}");
        let shown = pair["probes"].as_array().map_or(0, Vec::len);
        let expected = if pair["ok"] == true { 0 } else { 4 };
        ensure!(shown == expected, "{shown} probes are shown instead of {expected}: {pair}");
    }
    ensure!(pairs.len() == 2, "The output has {} pairs instead of 2: {matrix}", pairs.len());
    says(&test.stderr, &["1 of 2 pairs fail"])
}

#[test]
fn sysdump_contains_state_and_no_private_key() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    joined(&cluster)?;
    let agent = &cluster.agents[0];
    let file = cluster.lab.directory().join("dump.tar.gz");
    let path = file.to_string_lossy().into_owned();
    let dumped = agent.run_command(&["sysdump", &path, "-o", "json"])?;
    ran(&dumped, 0)?;
    let entries = json(&dumped)?["entries"].as_array().context("no entries")?.len();
    ensure!(entries > 30, "The archive has only {entries} entries.");
    let mode = fs::metadata(&file)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "The archive has mode {mode:o} instead of 600.");
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
        ensure!(!read(name)?.is_empty(), "The file {name} is empty.");
    }

    let key = fs::read_to_string(cluster.lab.directory().join("node-a/node.key"))?;
    let base64 = key.trim().trim_end_matches('=');
    let raw = decode(key.trim())?;
    let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
    let forms = [base64.as_bytes(), hex.as_bytes(), hex.to_uppercase().as_bytes(), &raw]
        .map(<[u8]>::to_vec);
    let mut tar = Command::new("tar");
    let all = tar.args(["-xzOf", &path]).output()?.stdout;
    ensure!(all.len() > 10_000, "The archive contains only {} bytes.", all.len());
    for form in &forms {
        let is_found = all.windows(form.len()).any(|part| part == *form);
        ensure!(!is_found, "The archive contains the private key.");
    }
    let again = agent.run_command(&["sysdump", &path])?;
    ran(&again, 2)?;
    says(&again.stderr, &["already exists"])
}

/// Decodes base64 with the system's `base64`.
fn decode(text: &str) -> Result<Vec<u8>> {
    use std::io::Write as _;
    use std::process::Stdio;
    let mut base64 = Command::new("base64");
    let mut child = base64.arg("-d").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("no stdin")?.write_all(text.as_bytes())?;
    let raw = child.wait_with_output()?.stdout;
    ensure!(raw.len() == 32, "The key has {} bytes instead of 32.", raw.len());
    Ok(raw)
}

#[test]
fn shells_accept_completions_and_mandoc_the_pages() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let completions =
        |shell: &str| process::run(Command::new(binary()?).args(["completions", shell]));
    let bash = completions("bash")?;
    process::run_with_input(Command::new("bash").arg("-n"), bash.as_bytes())?;
    // bash completes `pe` to `peers`.
    let script = format!(
        "{bash}\nCOMP_WORDS=(skein-agent pe); COMP_CWORD=1; _skein__agent skein-agent pe skein-agent\n\
         printf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let offered = process::run_with_input(&mut Command::new("bash"), script.as_bytes())?;
    ensure!(offered.trim() == "peers", "bash completes `pe` to: {offered}");
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
        ensure!(names.iter().any(|page| page == name), "The page {name} is missing: {names:?}");
    }
    let has_hidden = names.iter().any(|page| page.contains("hold"));
    ensure!(!has_hidden, "A hidden command has a page: {names:?}");
    for name in &names {
        let mut mandoc = Command::new("mandoc");
        let lint = process::finish(
            mandoc.args(["-T", "lint", "-W", "error"]).arg(directory.path().join(name)),
            &[],
            Duration::from_secs(10),
        )?;
        ensure!(lint.code == 0, "mandoc refuses {name}: {}{}", lint.stdout, lint.stderr);
    }
    let mut mandoc = Command::new("mandoc");
    let page = process::run(mandoc.args(["-T", "ascii"]).arg(directory.path().join(&names[0])))?;
    says(&page, &["skein"])
}
