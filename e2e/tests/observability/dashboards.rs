//! Dashboards and alerts of the chart on a Prometheus that scrapes agents under traffic: every
//! query returns data.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::Cluster;
use skein_lab::chart;
use skein_lab::checks;
use skein_lab::cni::Runtime;
use skein_lab::load::http;
use skein_lab::process::{self, Process};
use skein_lab::{Family, Lab, Netns, Plan, Pod};

const ADDRESS: &str = "127.0.0.1:9090";

/// Maximum time for Prometheus to start, and for an alert to become pending.
const PROMETHEUS_TIMEOUT: Duration = Duration::from_secs(30);

/// Values that Grafana would insert for its variables, with a scrape interval of 1 s.
const VARIABLES: [(&str, &str); 1] = [("$__rate_interval", "8s")];

/// A Prometheus on the underlay that evaluates the chart's alerts.
struct Prometheus {
    ns: Netns,
    _process: Process,
}

impl Prometheus {
    fn start(cluster: &Cluster) -> Result<Self> {
        let ns = cluster.lab.attach("prometheus", 99)?;
        let directory = cluster.lab.directory().join("prometheus");
        fs::create_dir_all(&directory)?;
        let target = |agent: &skein_lab::agent::Agent| {
            let address = format!("{}:9464", agent.underlay_address()?);
            Ok(json!({ "targets": [address], "labels": { "node": agent.record.name } }))
        };
        let targets = cluster.agents.iter().map(target).collect::<Result<Vec<_>>>()?;
        let config = json!({
            "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
            "rule_files": [chart::path().canonicalize()?.join("alerts/skein.yaml")],
            "scrape_configs": [{ "job_name": "skein", "static_configs": targets }],
        });
        let file = directory.join("prometheus.json");
        fs::write(&file, config.to_string())?;
        let option = |name: &str, value: PathBuf| format!("--{name}={}", value.display());
        let mut command = ns.command("prometheus");
        command.arg(option("config.file", file));
        command.arg(option("storage.tsdb.path", directory.join("data")));
        command.arg(format!("--web.listen-address={ADDRESS}"));
        let mut process = Process::start(&mut command, &directory.join("log"))?;
        let ready = || {
            process.check_alive()?;
            let ask = || http::get(ADDRESS.parse()?, "/-/ready");
            Ok(ns.run(ask)?.is_ok_and(|answer| answer.status == 200))
        };
        checks::eventually("Prometheus is ready", PROMETHEUS_TIMEOUT, ready)?;
        Ok(Self { ns, _process: process })
    }

    /// Sends a request to the HTTP API and returns the field `data` of the response.
    fn ask(&self, path: &str, parameters: &[(&str, &str)]) -> Result<Value> {
        let encode = |text: &str| {
            let byte = |byte: u8| match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' => char::from(byte).to_string(),
                _ => format!("%{byte:02X}"),
            };
            text.bytes().map(byte).collect::<String>()
        };
        let pairs = parameters.iter().map(|(key, value)| format!("{key}={}", encode(value)));
        let path = format!("/api/v1/{path}?{}", pairs.collect::<Vec<_>>().join("&"));
        let answer = self.ns.run(|| http::get(ADDRESS.parse()?, &path))??;
        let mut value: Value = serde_json::from_str(&answer.body)?;
        ensure!(value["status"] == "success", "Prometheus refused a request: {}", answer.body);
        Ok(value["data"].take())
    }

    /// Returns the number of series of an expression with a number in the last 90 s.
    fn series(&self, expression: &str) -> Result<usize> {
        let now = self.ask("query", &[("query", "time()")])?;
        let now = now["result"][0].as_f64().context("no time")?;
        let (start, end) = ((now - 90.0).to_string(), now.to_string());
        let range = [("query", expression), ("start", &start), ("end", &end), ("step", "1")];
        let data = self.ask("query_range", &range)?;
        let number = |value: &Value| {
            let text = value[1].as_str().unwrap_or("NaN");
            text.parse::<f64>().is_ok_and(f64::is_finite)
        };
        let has =
            |series: &&Value| series["values"].as_array().is_some_and(|all| all.iter().any(number));
        Ok(data["result"].as_array().context("no result")?.iter().filter(has).count())
    }
}

/// Starts two agents that serve pods, with all optional metrics.
fn cluster() -> Result<Cluster> {
    let plan = Plan { pods: 0, ..Plan::default() };
    let mut cluster = Cluster::prepare(Lab::new(&plan)?, Family::V4)?;
    for agent in &mut cluster.agents {
        agent.set("metrics.listen", "0.0.0.0:9464");
        agent.set("metrics.per_peer", true);
        agent.serve_pods()?;
    }
    cluster.start()?;
    Ok(cluster)
}

/// Adds a pod on each node with the plugin, and waits until the pods reach each other.
fn pods(cluster: &Cluster) -> Result<[Pod; 2]> {
    let pod = |index: usize| {
        Runtime::new(&cluster.agents[index], &cluster.lab.nodes[index])?
            .pod(&format!("first-{index}"))
    };
    let pods = [pod(0)?, pod(1)?];
    checks::wait_until_reached(&pods[0], &pods[1], Family::V4, PROMETHEUS_TIMEOUT)?;
    Ok(pods)
}

#[test]
fn every_query_returns_data() -> Result<()> {
    let cluster = cluster()?;
    let prometheus = Prometheus::start(&cluster)?;
    let [a, b] = &pods(&cluster)?;
    // Bulk and small packets for longer than the range of a rate, while pods are added and deleted.
    let work = || -> Result<()> {
        let time = Duration::from_secs(12);
        let transfer = checks::start_transfer(a, b, Family::V4, 60 << 20, Some(6 << 20))?;
        thread::scope(|scope| {
            let sender = scope.spawn(move || checks::datagrams(b, a, Family::V6, 200, 500, time));
            let nodes = cluster.agents.iter().zip(&cluster.lab.nodes);
            let runtimes = nodes.map(|(agent, node)| Runtime::new(agent, node));
            let runtimes = runtimes.collect::<Result<Vec<_>>>()?;
            for number in 0..8 {
                let (runtime, name) = (&runtimes[number % 2], format!("pod-{number}"));
                let pod = runtime.pod(&name)?;
                // Pods are added until the end of the time: a rate without samples has no value.
                thread::sleep(time / 9);
                runtime.del(&name, Some(&pod.ns))?;
            }
            sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
            transfer.join().map(drop)
        })
    };
    work()?;

    let nodes = prometheus.ask("label/node/values", &[("match[]", "skein_build_info")])?;
    ensure!(nodes == json!(["node-a", "node-b"]), "The variable has the values {nodes}.");
    let (mut asked, mut empty) = (0, vec![]);
    for dashboard in chart::dashboards()? {
        let title = dashboard.0["title"].as_str().unwrap_or_default();
        for (panel, expression) in dashboard.expressions() {
            let node = if expression.contains("=~\"$node\"") { ".*" } else { "node-a" };
            let mut text = expression.replace("$node", node);
            for (variable, value) in VARIABLES {
                text = text.replace(variable, value);
            }
            ensure!(!text.contains('$'), "{title}, {panel}: A variable was not replaced: {text}");
            let series = prometheus.series(&text).with_context(|| text.clone())?;
            asked += 1;
            if series == 0 {
                empty.push(format!("{title}, {panel}: {text}"));
            }
        }
    }
    ensure!(asked > 50, "The dashboards have only {asked} queries.");
    ensure!(empty.is_empty(), "These queries returned no data:\n{}", empty.join("\n"));
    alerts_have_data(&prometheus)?;
    eprintln!("{asked} queries, each with data");
    Ok(())
}

/// Checks that the data that each alert compares exists, and that no alert is active without a
/// problem.
fn alerts_have_data(prometheus: &Prometheus) -> Result<()> {
    for alert in chart::alerts()? {
        let (name, expression) = (&alert["alert"], alert["expr"].as_str().context("no expr")?);
        // The left side of the comparison, or the left operand of the set operation.
        let compared = [" == ", " > ", " < ", " unless "]
            .iter()
            .find_map(|operator| expression.rsplit_once(operator).map(|(left, _)| left));
        let compared = compared.with_context(|| format!("{name} compares nothing"))?;
        // An inner bound would remove all series while there is no problem.
        let compared = &compared.replace(" > 1)", ")");
        prometheus.series(expression).with_context(|| expression.to_owned())?;
        // A range of minutes contains only the seconds since the start, which is sufficient.
        let series = prometheus.series(compared).with_context(|| compared.clone())?;
        ensure!(series > 0, "{name} has no data to compare: {compared}");
    }
    let rules = prometheus.ask("rules", &[("type", "alert")])?;
    let rules = rules["groups"][0]["rules"].as_array().context("no rules")?.clone();
    let (count, expected) = (rules.len(), chart::alerts()?.len());
    ensure!(count == expected, "Prometheus has {count} rules instead of {expected}.");
    for rule in rules {
        let name = &rule["name"];
        ensure!(rule["health"] == "ok", "{name} has an error: {}", rule["lastError"]);
        ensure!(rule["state"] == "inactive", "{name} is active: {rule}");
    }
    Ok(())
}

/// Real problems of the agents make the alerts pending.
#[test]
fn alerts_become_pending_for_real_problems() -> Result<()> {
    let mut cluster = cluster()?;
    let [a, b] = &pods(&cluster)?;
    let prometheus = Prometheus::start(&cluster)?;
    let state = |name: &str, node: &str| -> Result<Value> {
        let rules = prometheus.ask("alerts", &[])?;
        let of_it = |alert: &&Value| {
            alert["labels"]["alertname"] == name && alert["labels"]["node"] == node
        };
        let found = rules["alerts"].as_array().context("no alerts")?.iter().find(of_it);
        Ok(found.map(|alert| alert["state"].clone()).unwrap_or_default())
    };
    let begins = |name: &str, node: &str| {
        let begun = || Ok(!state(name, node)?.is_null());
        checks::eventually(&format!("{name} of {node}"), PROMETHEUS_TIMEOUT, begun)
    };
    // The other node's record is damaged and repaired, and then its agent is stopped.
    let damaged = cluster.agents[0].records_directory().join("node-b.toml");
    let record = fs::read_to_string(&damaged)?;
    fs::write(&damaged, "name = 7\n")?;
    begins("SkeinRecordsRefused", "node-a")?;
    fs::write(&damaged, record)?;
    cluster.agents[1].stop()?;
    checks::does_not_reach(a, b, Family::V4)?;
    let mut ping = a.ns.command("ping");
    ping.args(["-n", "-q", "-i", "0.2", "-w", "40", &b.v4.to_string()]);
    let _ping = Process::start(&mut ping, &cluster.lab.directory().join("ping.log"))?;
    begins("SkeinPeersUnreachable", "node-a")?;
    begins("SkeinAgentSilent", "node-b")?;
    Ok(())
}

/// promtool accepts the metrics of the agent.
#[test]
fn promtool_accepts_metrics_under_traffic() -> Result<()> {
    let cluster = cluster()?;
    let [a, b] = &pods(&cluster)?;
    checks::transfer(a, b, Family::V4, 1 << 20)?;
    let reference = fs::read_to_string(skein_lab::cargo::workspace().join("docs/metrics.md"))?;
    let text = cluster.agents[0].metrics()?.0;
    let mut promtool = Command::new("promtool");
    let said =
        process::finish(promtool.args(["check", "metrics"]), text.as_bytes(), PROMETHEUS_TIMEOUT)?;
    ensure!(said.code == 0, "promtool refuses the metrics: {}{}", said.stdout, said.stderr);
    let mut families = 0;
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').context("no type")?;
        ensure!(
            reference.contains(&format!("| `{name}` | {kind} |")),
            "docs/metrics.md does not list {name} as a {kind}."
        );
        families += 1;
    }
    ensure!(families > 30, "Only {families} metric families are served.");
    Ok(())
}
