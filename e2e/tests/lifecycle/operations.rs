//! What an administrator does and sees: bad input, changes while it runs, reports, removal.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::agent::{Agent, Cluster, Record, binary};
use skein_lab::checks;
use skein_lab::process::{self, Finished, resident_bytes};
use skein_lab::{Family, Lab, Plan};

/// An agent that is prepared and not started.
fn prepared() -> Result<Cluster> {
    Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)
}

/// It ends soon with this code and says these words; nothing is left in the node.
fn refuses(cluster: &Cluster, finished: &Finished, code: i32, words: &[&str]) -> Result<()> {
    let said = &finished.stderr;
    ensure!(finished.code == code, "exit code {} instead of {code}: {said}", finished.code);
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    let interfaces = cluster.lab.nodes[0].ns.interfaces()?;
    ensure!(!interfaces.iter().any(|name| name == "skein0"), "left behind: {interfaces:?}");
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "a data process is left behind");
    Ok(())
}

fn run(agent: &Agent) -> Result<Finished> {
    agent.run_to_end(Duration::from_secs(15))
}

#[test]
fn an_unknown_key_is_named() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("underlay.prot", 51900);
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &["prot", "agent.toml"])
}

#[test]
fn overlapping_pod_cidrs_are_named() -> Result<()> {
    let cluster = prepared()?;
    let mut record = cluster.agents[1].record.clone();
    record.pod_cidrs = vec!["10.244.0.0/16".into()];
    cluster.agents[0].put_record(&record)?;
    let words = ["10.244.0.0/16", "10.244.1.0/24", "node-a", "node-b"];
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &words)
}

#[test]
fn bad_keys_are_named() -> Result<()> {
    let mut cluster = prepared()?;
    let mut record = cluster.agents[1].record.clone();
    record.public_key = "c2hvcnQ=".into();
    cluster.agents[0].put_record(&record)?;
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &["public_key", "node-b.toml"])?;

    cluster.agents[0].put_record(&cluster.agents[1].record)?;
    let path = cluster.lab.directory().join("bad.key");
    fs::write(&path, "no key at all\n")?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    cluster.agents[0].set("private_key_file", path.to_string_lossy().into_owned());
    refuses(&cluster, &run(&cluster.agents[0])?, 2, &["bad.key"])
}

#[test]
fn a_used_port_is_named() -> Result<()> {
    let cluster = prepared()?;
    let node = &cluster.lab.nodes[0];
    let address = (node.underlay(Family::V4), skein_lab::agent::PORT);
    let _holder = node.ns.run(|| std::net::UdpSocket::bind(address))??;
    refuses(&cluster, &run(&cluster.agents[0])?, 5, &["51900", "underlay"])
}

#[test]
fn an_address_of_another_machine_is_named() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("underlay.addresses", vec!["198.51.100.7".to_owned()]);
    let finished = run(&cluster.agents[0])?;
    ensure!(finished.code != 0, "it ended with code 0");
    refuses(&cluster, &finished, finished.code, &["198.51.100.7"])
}

#[test]
fn another_programs_interface_is_left_alone() -> Result<()> {
    let cluster = prepared()?;
    let node = &cluster.lab.nodes[0].ns;
    node.ip("link add skein0 type bridge")?;
    let finished = run(&cluster.agents[0])?;
    ensure!(finished.code == 5, "exit code {}: {}", finished.code, finished.stderr);
    ensure!(finished.stderr.contains("skein0"), "{}", finished.stderr);
    let link = node.ip("-d link show skein0")?;
    ensure!(link.contains("bridge"), "the interface was changed: {link}");
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "a data process is left behind");
    Ok(())
}

#[test]
fn a_missing_tun_device_is_named() -> Result<()> {
    let cluster = prepared()?;
    let config = cluster.agents[0].write_config()?;
    let mut command = cluster.lab.nodes[0].ns.command("unshare");
    let script = "mount -t tmpfs none /dev/net && exec \"$0\" run --config \"$1\"";
    command.args(["--mount", "sh", "-c", script]).arg(binary()?).arg(config);
    let finished = process::finish(&mut command, &[], Duration::from_secs(15))?;
    refuses(&cluster, &finished, 4, &["/dev/net/tun"])
}

#[test]
fn a_missing_privilege_is_named() -> Result<()> {
    let cluster = prepared()?;
    let config = cluster.agents[0].write_config()?;
    let mut command = cluster.lab.nodes[0].ns.command("setpriv");
    command.args(["--bounding-set", "-net_admin"]).arg(binary()?).args(["run", "--config"]);
    let finished = process::finish(command.arg(config), &[], Duration::from_secs(15))?;
    refuses(&cluster, &finished, 3, &["NET_ADMIN"])
}

#[test]
fn a_changed_endpoint_takes_effect_within_a_second() -> Result<()> {
    let mut cluster = prepared()?;
    // B listens on every address that it has or will have.
    let any = vec!["0.0.0.0".to_owned()];
    cluster.agents[1].set("underlay.addresses", any);
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let mut moved = cluster.agents[1].record.clone();
    moved.endpoints = vec!["192.0.2.77:51900".into()];
    let outcome = thread::scope(|scope| -> Result<_> {
        let duration = Duration::from_secs(4);
        let sender = scope.spawn(move || checks::datagrams(a, b, Family::V4, 100, 1000, duration));
        thread::sleep(Duration::from_millis(1000));
        let node = &cluster.lab.nodes[1].ns;
        node.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
        node.ip("address add 192.0.2.77/24 dev eth0")?;
        node.ip("address del 192.0.2.2/24 dev eth0")?;
        cluster.agents[0].put_record(&moved)?;
        sender.join().ok().context("the sender panicked")?
    })?;
    let lost = outcome.sent - outcome.received;
    ensure!(lost < 1000, "{lost} datagrams lost at 1000 a second: {outcome:?}");
    let report = cluster.agents[0].report()?;
    let endpoint = report["peers"][0]["endpoint"].as_str().unwrap_or_default();
    ensure!(endpoint == "192.0.2.77:51900", "{report}");
    Ok(())
}

/// All records in one file instead of a file each, written in place or replaced.
#[test]
fn one_file_of_records_is_followed() -> Result<()> {
    let mut cluster = prepared()?;
    let records: Vec<Record> = cluster.agents.iter().map(|a| a.record.clone()).collect();
    let file = cluster.lab.directory().join("nodes.toml");
    fs::write(&file, Record::all_to_toml(&records))?;
    for agent in &mut cluster.agents {
        agent.set("nodes", file.to_string_lossy().into_owned());
    }
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let peers = |count: usize| {
        let agent = &cluster.agents[0];
        let now = || Ok(agent.report()?["peers"].as_array().map(Vec::len) == Some(count));
        checks::eventually("the change is in force", Duration::from_millis(1500), now)
    };

    fs::write(&file, Record::all_to_toml(&records[..1]))?;
    peers(0)?;
    checks::does_not_reach(a, b, Family::V4)?;

    let new = file.with_extension("new");
    fs::write(&new, Record::all_to_toml(&records))?;
    fs::rename(&new, &file)?;
    peers(1)?;
    checks::wait_until_reached(a, b, Family::V4, Duration::from_secs(6))?;
    Ok(())
}

#[test]
fn a_bad_record_while_running_is_reported_and_changes_nothing() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let path = cluster.agents[0].records_directory().join("node-b.toml");
    fs::write(&path, "name = \"node-b\"\npublic_key = 7\n")?;
    thread::sleep(Duration::from_millis(1500));
    checks::all_reach_all(&cluster.lab)?;
    let log = fs::read_to_string(cluster.agents[0].log())?;
    ensure!(log.contains("node-b.toml"), "the log does not name the file");
    Ok(())
}

#[test]
fn metrics_are_well_formed_and_health_is_told() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::mixed_traffic(&cluster.lab, 4 << 20)?;
    for agent in &cluster.agents {
        let metrics = agent.metrics()?;
        let mut promtool = Command::new("promtool");
        promtool.args(["check", "metrics"]);
        let limit = Duration::from_secs(20);
        let finished = process::finish(&mut promtool, metrics.0.as_bytes(), limit)?;
        let said = finished.stdout + &finished.stderr;
        ensure!(finished.code == 0 && said.trim().is_empty(), "promtool: {said}");
        for direction in ["egress", "ingress"] {
            let label = format!("direction=\"{direction}\"");
            let sum = |name: &str| metrics.sum(name, &[&label]);
            let (inner, outer) =
                (sum("skein_inner_packets_total"), sum("skein_outer_packets_total"));
            ensure!(inner > 1000.0 && outer > 100.0, "{direction}: {inner} inner, {outer} outer");
            ensure!(sum("skein_inner_bytes_total") > 8e6, "{direction} bytes");
            ensure!(sum("skein_packets_per_call_count") > 0.0, "{direction} calls");
        }
        ensure!(metrics.sum("skein_capability", &[]) > 0.0, "no capabilities");
        ensure!(metrics.sum("skein_build_info", &[]) == 1.0, "no build info");
        ensure!(!metrics.0.contains("node-b\"") || !metrics.0.contains("peer="), "peer series");
        ensure!(agent.http("/healthz")?.status == 200);
        ensure!(agent.http("/readyz")?.status == 200);
        ensure!(agent.http("/nothing")?.status == 404);
    }
    Ok(())
}

#[test]
fn series_for_each_peer_are_there_where_they_are_asked_for() -> Result<()> {
    let mut cluster = prepared()?;
    cluster.agents[0].set("metrics.per_peer", true);
    cluster.start()?;
    checks::transfer(cluster.lab.pod(0), cluster.lab.pod(1), Family::V4, 4 << 20)?;
    let metrics = cluster.agents[0].metrics()?;
    let of_peer = |name: &str, label: &str| metrics.sum(name, &["peer=\"node-b\"", label]);
    ensure!(of_peer("skein_peer_up", "") == 1.0, "{}", metrics.0);
    let sent = of_peer("skein_peer_bytes_total", "direction=\"egress\"");
    ensure!(sent > f64::from(4 << 20), "{sent} bytes sent: {}", metrics.0);
    ensure!(of_peer("skein_peer_packets_total", "direction=\"ingress\"") > 0.0);
    let without = cluster.agents[1].metrics()?;
    ensure!(!without.0.contains("skein_peer_") && !without.0.contains("peer="), "{}", without.0);
    Ok(())
}

#[test]
fn status_tells_people_and_programs() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::mixed_traffic(&cluster.lab, 1 << 20)?;
    let agent = &cluster.agents[0];
    let report = agent.report()?;
    ensure!(report["lanes"].as_array().is_some_and(|lanes| lanes.len() == 2), "{report}");
    let peer = &report["peers"][0];
    ensure!(peer["name"] == "node-b" && peer["state"] == "established", "{report}");
    ensure!(peer["rx_bytes"].as_u64() > Some(1 << 20), "{report}");
    ensure!(peer["handshake_age_seconds"].as_f64().is_some_and(|age| age < 60.0), "{report}");
    ensure!(peer["public_key"] == *cluster.agents[1].record.public_key, "{report}");
    let table = agent.run_command(&["status"])?;
    ensure!(table.code == 0, "{}", table.stderr);
    for word in ["node-b", "192.0.2.2:51900", "established", "tun_uso", "udp_gso"] {
        ensure!(table.stdout.contains(word), "{word} is not in:\n{}", table.stdout);
    }
    Ok(())
}

#[test]
fn check_tells_what_this_machine_can_do() -> Result<()> {
    let cluster = prepared()?;
    let finished = cluster.agents[0].run_command(&["check"])?;
    ensure!(finished.code == 0, "{}{}", finished.stdout, finished.stderr);
    let finished = cluster.agents[0].run_command(&["check", "-o", "json"])?;
    serde_json::from_str::<serde_json::Value>(&finished.stdout).context("check -o json")?;
    let interfaces = cluster.lab.nodes[0].ns.interfaces()?;
    ensure!(!interfaces.iter().any(|name| name.starts_with("skein")), "{interfaces:?}");
    Ok(())
}

#[test]
fn several_agents_live_side_by_side_in_one_namespace() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let mut second = vec![];
    for node in &cluster.lab.nodes {
        let mut agent = Agent::prepare(&cluster.lab, node, Family::V4, 1)?;
        agent.record.pod_cidrs = vec![format!("10.99.{}.0/24", node.index)];
        second.push(agent);
    }
    for agent in &second {
        second.iter().try_for_each(|other| agent.put_record(&other.record))?;
    }
    for agent in &mut second {
        agent.start()?;
    }
    // The nodes' own addresses on the second overlay; the first goes on as before.
    let ping = "ping -n -c 3 -i 0.1 -W 2 10.99.1.1";
    let reached = || Ok(cluster.lab.nodes[0].ns.sh(ping).is_ok());
    checks::eventually("the second overlay works", Duration::from_secs(8), reached)?;
    checks::mixed_traffic(&cluster.lab, 1 << 20)?;
    for agent in &mut second {
        agent.stop()?;
    }
    checks::all_reach_all(&cluster.lab)?;
    for agent in &mut cluster.agents {
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn routes_addresses_and_the_device_are_healed() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let (a, b) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let node = &cluster.lab.nodes[0].ns;
    for damage in [
        "route del 10.244.2.0/24",
        "-6 route del fd00:10:244:2::/64",
        "link set skein0 down",
        "link set skein0 mtu 1300",
        "address flush dev skein0",
        "link del skein0",
    ] {
        node.ip(damage).with_context(|| damage.to_owned())?;
        for family in Family::BOTH {
            let limit = Duration::from_secs(5);
            checks::wait_until_reached(a, b, family, limit)
                .with_context(|| format!("after `{damage}`"))?;
        }
    }
    let link = node.ip("link show skein0")?;
    ensure!(link.contains("mtu 1440"), "{link}");
    checks::mixed_traffic(&cluster.lab, 1 << 20)
}

#[test]
fn cleanup_leaves_nothing() -> Result<()> {
    let mut cluster = Cluster::up(&Plan::default(), Family::V4)?;
    checks::all_reach_all(&cluster.lab)?;
    let before = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(before.code != 0, "cleanup under a running agent: {}", before.stdout);
    checks::all_reach_all(&cluster.lab)?;
    cluster.agents[0].stop()?;
    let finished = cluster.agents[0].run_command(&["cleanup"])?;
    ensure!(finished.code == 0, "{}", finished.stderr);
    let node = &cluster.lab.nodes[0].ns;
    let interfaces = node.interfaces()?;
    ensure!(!interfaces.iter().any(|name| name == "skein0"), "{interfaces:?}");
    for routes in [node.ip("route show table all")?, node.ip("-6 route show table all")?] {
        ensure!(!routes.contains("skein0"), "{routes}");
        ensure!(!routes.contains("10.244.2.0/24"), "{routes}");
    }
    ensure!(cluster.agents[0].dataplane_pids().is_empty(), "a data process is left");
    // A second time there is nothing to do, which is no failure.
    ensure!(cluster.agents[0].run_command(&["cleanup"])?.code == 0);
    cluster.agents[0].start()?;
    checks::all_reach_all(&cluster.lab)
}

#[test]
fn the_data_process_stays_small_with_a_hundred_peers() -> Result<()> {
    let mut cluster = prepared()?;
    for number in 0..100_u16 {
        let key = cluster.lab.directory().join(format!("peer-{number}.key"));
        let record = Record {
            name: format!("peer-{number}"),
            public_key: skein_lab::agent::new_key(&key)?,
            second_public_key: None,
            endpoints: vec![format!("192.0.2.{}:51900", 100 + number)],
            pod_cidrs: vec![
                format!("10.245.{number}.0/24"),
                format!("fd00:10:245:{number:x}::/64"),
            ],
        };
        cluster.agents[0].put_record(&record)?;
    }
    cluster.start()?;
    checks::mixed_traffic(&cluster.lab, 20 << 20)?;
    let report = cluster.agents[0].report()?;
    ensure!(report["peers"].as_array().is_some_and(|peers| peers.len() == 101), "{report}");
    let pid = *cluster.agents[0].dataplane_pids().first().context("no data process")?;
    let mebibytes = resident_bytes(pid)? >> 20;
    ensure!(mebibytes < 64, "{mebibytes} MiB resident");
    Ok(())
}

#[test]
fn what_is_logged_is_changed_at_run_time() -> Result<()> {
    let cluster = Cluster::up(&Plan::default(), Family::V4)?;
    let agent = &cluster.agents[0];
    let set = |level: &[&str]| {
        let finished = agent.run_command(&[&["log-level"], level].concat())?;
        ensure!(finished.code == 0, "{}", finished.stderr);
        Ok(())
    };
    let said = |text: &str| -> Result<usize> {
        Ok(fs::read_to_string(agent.log())?.lines().filter(|line| line.contains(text)).count())
    };
    // A record that comes and goes: the agent says so where it may.
    let change = || -> Result<()> {
        let number = |wanted| {
            let status = agent.status()?;
            Ok(status["records"]["accepted"].as_u64() == Some(wanted))
        };
        agent.remove_record(&cluster.agents[1].record.name)?;
        checks::eventually("one record", Duration::from_secs(5), || number(1))?;
        agent.put_record(&cluster.agents[1].record)?;
        checks::eventually("two records", Duration::from_secs(5), || number(2)).map(drop)
    };
    let (level, records) = ("the level of the log is set", "node records have changed");
    set(&["debug"])?;
    ensure!(said(level)? == 2, "not by both processes\n{}", cluster.logs());
    change()?;
    let before = said(records)?;
    ensure!(before >= 2, "{}", cluster.logs());
    set(&["error"])?;
    change()?;
    ensure!((said(level)?, said(records)?) == (2, before), "{}", cluster.logs());
    set(&[])?;
    change()?;
    ensure!((said(level)?, said(records)?) == (4, before + 2), "{}", cluster.logs());

    let refused = agent.run_command(&["log-level", "skein_agent=loud"])?;
    ensure!(refused.code == 2 && refused.stderr.contains("use error, warn"), "{}", refused.stderr);
    Ok(())
}
