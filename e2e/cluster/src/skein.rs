//! Skein on a laboratory's cluster: installed by its chart, as an operator does it.

use std::net::IpAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Kube, Node, Options, programs};
use skein_lab::Netns;
use skein_lab::agent::Metrics;
use skein_lab::load::http;
use skein_lab::load::ping::Loss;
use skein_lab::process::{self, Process};
use skein_lab::{cargo, skein_image};

/// Where it is installed.
pub const NAMESPACE: &str = "kube-system";

/// How long helm may wait for every agent.
const INSTALL_LIMIT: &str = "--timeout=3m";

/// Time limit for nodes to be Ready.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// How long a pod may take to run.
const POD_LIMIT: Duration = Duration::from_secs(60);

/// A pod with its own network, which only sleeps.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Index of its node.
    pub node: usize,
    /// Its addresses, the first of the cluster's first family.
    pub ips: Vec<IpAddr>,
    /// Its network namespace's path on its node.
    netns: String,
}

/// Puts the image on every node and installs the chart with these settings (`--set`).
pub fn install(kube: &Kube, settings: &[&str]) -> Result<()> {
    kube.load_image(&skein_image::build()?)?;
    helm(kube, "install", settings)
}

/// Installs anew with other settings, which are all that differ from the defaults.
pub fn upgrade(kube: &Kube, settings: &[&str]) -> Result<()> {
    helm(kube, "upgrade", settings)
}

fn helm(kube: &Kube, verb: &str, settings: &[&str]) -> Result<()> {
    let chart = cargo::workspace().join("charts/skein");
    let chart = chart.to_string_lossy();
    let mut words = vec![verb, "skein", &*chart, "--namespace", NAMESPACE, "--wait", INSTALL_LIMIT];
    words.extend(["--set", "image.pullPolicy=Never"]);
    words.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    kube.helm(&words).map(drop)
}

/// What the chart leaves, it is asked to take along.
pub fn uninstall(kube: &Kube) -> Result<()> {
    kube.helm(&["uninstall", "skein", "--namespace", NAMESPACE, "--wait", INSTALL_LIMIT]).map(drop)
}

/// A pod on every node, running.
pub fn pods(kube: &mut Kube) -> Result<Vec<Pod>> {
    let set = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "pod" },
        "spec": {
            "selector": { "matchLabels": { "app": "pod" } },
            "template": {
                "metadata": { "labels": { "app": "pod" } },
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "main", "image": programs::TOOLS, "imagePullPolicy": "Never",
                        "command": ["sleep", "infinity"],
                    }],
                },
            },
        },
    });
    kube.apply(&set.to_string())?;
    running(kube)
}

/// The pods of [`pods`], once there is one on every node.
pub fn running(kube: &mut Kube) -> Result<Vec<Pod>> {
    let mut found = vec![];
    kube.wait("a pod runs on each node", POD_LIMIT, |kube| {
        found = list(kube)?;
        Ok(found.len() == kube.nodes.iter().filter(|node| node.is_on()).count())
    })?;
    Ok(found)
}

fn list(kube: &Kube) -> Result<Vec<Pod>> {
    let text = kube.kubectl(&["get", "pods", "--selector=app=pod", "--output=json"])?;
    let document: Value = serde_json::from_str(&text)?;
    let mut pods = vec![];
    for item in document["items"].as_array().into_iter().flatten() {
        let gone = !item["metadata"]["deletionTimestamp"].is_null();
        let ready = item["status"]["containerStatuses"][0]["ready"] == true;
        if gone || !ready {
            continue;
        }
        let node = item["spec"]["nodeName"].as_str().unwrap_or_default();
        let Some(node) = kube.nodes.iter().position(|known| known.name() == node) else { continue };
        let ips = item["status"]["podIPs"].as_array().into_iter().flatten();
        let ips = ips.map(|ip| Ok(ip["ip"].as_str().context("no IP")?.parse()?));
        let ips: Vec<IpAddr> = ips.collect::<Result<_>>()?;
        let ip = ips.first().context("a pod without an address")?;
        let netns = namespace(&kube.nodes[node], *ip)?;
        let name = item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        pods.push(Pod { name, node, ips, netns });
    }
    pods.sort_by_key(|pod| pod.node);
    Ok(pods)
}

/// The network namespace of a node's pod with that address.
fn namespace(node: &Node, ip: IpAddr) -> Result<String> {
    let names = node.exec(&["ls", "/run/netns"])?;
    for name in names.lines() {
        let path = format!("/run/netns/{name}");
        let enter = format!("--net={path}");
        let addresses = node.exec(&["nsenter", &enter, "ip", "-o", "address"]).unwrap_or_default();
        if addresses.contains(&format!(" {ip}/")) {
            return Ok(path);
        }
    }
    bail!("no namespace on {} has {ip}", node.name())
}

impl Pod {
    /// A command in its network, with the host's programs: what `kubectl exec` needs, the API
    /// server, may be away.
    pub fn command(&self, kube: &Kube, words: &[&str]) -> Result<Command> {
        let mut command = kube.nodes[self.node].command("nsenter")?;
        command.arg(format!("--net={}", self.netns)).args(words);
        Ok(command)
    }

    /// Runs one to its end.
    pub fn run(&self, kube: &Kube, words: &[&str]) -> Result<String> {
        process::run(&mut self.command(kube, words)?)
    }

    /// Whether it reaches an address within a second.
    pub fn reaches(&self, kube: &Kube, ip: IpAddr) -> Result<bool> {
        let words = ["ping", "-n", "-c", "1", "-W", "1", &ip.to_string()];
        let finished = process::finish(&mut self.command(kube, &words)?, &[], POD_LIMIT)?;
        Ok(finished.code == 0)
    }

    /// Starts `count` pings, `interval` apart; [`Pings::end`] says how many were answered.
    pub fn start_pings(
        &self,
        kube: &Kube,
        to: IpAddr,
        count: u32,
        interval: Duration,
    ) -> Result<Pings> {
        let seconds = format!("{:.3}", interval.as_secs_f64());
        let (to, text) = (to.to_string(), count.to_string());
        let words = ["ping", "-n", "-c", &text, "-i", &seconds, "-W", "1", &to];
        let log = kube.directory().join(format!("{}.pings.log", self.name));
        let _ = std::fs::remove_file(&log);
        let process = Process::start_inside(&mut self.command(kube, &words)?, &log)?;
        Ok(Pings { process, interval })
    }

    /// Gigabits a second of one TCP connection to another pod.
    pub fn throughput(&self, kube: &Kube, to: &Pod, ip: IpAddr, seconds: u32) -> Result<f64> {
        let log = kube.directory().join("iperf3.log");
        let mut server = to.command(kube, &["iperf3", "--server", "--one-off"])?;
        let mut server = Process::start_inside(&mut server, &log)?;
        thread::sleep(Duration::from_millis(500));
        let (ip, seconds) = (ip.to_string(), seconds.to_string());
        let words = ["iperf3", "--json", "--client", &ip, "--time", &seconds];
        let text = self.run(kube, &words)?;
        server.kill();
        let document: Value = serde_json::from_str(&text)?;
        let rate = document["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(rate.with_context(|| format!("iperf3: {}", document["error"]))? / 1e9)
    }
}

/// Pings that run.
#[derive(Debug)]
pub struct Pings {
    process: Process,
    interval: Duration,
}

impl Pings {
    /// Ends them now.
    ///
    /// # Errors
    /// No ping was answered.
    pub fn stop(mut self) -> Result<Loss> {
        self.process.signal(Signal::INT)?;
        while self.process.exited().is_none() {
            thread::sleep(Duration::from_millis(50));
        }
        Loss::parse(&std::fs::read_to_string(self.process.log())?, self.interval)
    }

    /// Waits for the end; sent and received.
    pub fn end(mut self) -> Result<(u32, u32)> {
        while self.process.exited().is_none() {
            thread::sleep(Duration::from_millis(50));
        }
        let text = self.process.log_tail(5);
        let summary = text.lines().find(|line| line.contains("packets transmitted"));
        let summary = summary.with_context(|| format!("ping: {text}"))?;
        let mut numbers = summary.split(' ').filter_map(|word| word.parse().ok());
        Ok((numbers.next().context("no count")?, numbers.next().context("no count")?))
    }
}

/// Runs `work` on a cluster with Skein and a pod on every node.
///
/// # Errors
/// The cluster cannot be made, or `work` fails; with the state of all pods and the logs.
pub fn with(
    options: &Options,
    settings: &[&str],
    work: impl FnOnce(&mut Kube, Vec<Pod>) -> Result<()>,
) -> Result<()> {
    let mut kube = Kube::up(options)?;
    let all = || -> Result<()> {
        install(&kube, settings)?;
        let nodes: Vec<usize> = (0..kube.nodes.len()).collect();
        let took = kube.wait_ready(&nodes, true, READY_LIMIT)?;
        println!("the nodes are Ready {:.1} s after helm has returned", took.as_secs_f64());
        let pods = pods(&mut kube)?;
        work(&mut kube, pods)
    };
    let outcome = all();
    outcome.with_context(|| {
        let select = ["--selector=app.kubernetes.io/name=skein", "--all-containers", "--tail=40"];
        let get = ["get", "pods", "--all-namespaces", "--output=wide"];
        let say = |words: &[&str]| kube.kubectl(words).unwrap_or_else(|error| format!("{error:#}"));
        let logs = [&["logs", "--namespace=kube-system", "--prefix"][..], &select].concat();
        format!("{}\n{}\n{}", say(&get), say(&logs), kube.logs())
    })
}

/// Waits until every pod reaches every other by every address; returns the time that this took.
///
/// # Errors
/// A pod does not reach another within `limit`.
pub fn wait_until_all_reach_all(
    kube: &mut Kube,
    pods: &[Pod],
    limit: Duration,
) -> Result<Duration> {
    kube.wait("every pod reaches every other", limit, |kube| {
        for from in pods {
            for to in pods {
                for ip in &to.ips {
                    if !from.reaches(kube, *ip)? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    })
}

/// Returns the name of the DaemonSet's pod on a node.
///
/// # Errors
/// The node has none.
pub fn agent_pod(kube: &Kube, node: usize) -> Result<String> {
    let select = "--selector=app.kubernetes.io/component=agent";
    let on = format!("--field-selector=spec.nodeName={}", kube.nodes[node].name());
    let get = ["--namespace=kube-system", "get", "pods", select, &on];
    let name =
        kube.kubectl(&[&get[..], &["--output=jsonpath={.items[0].metadata.name}"]].concat())?;
    Ok(name.trim().to_owned())
}

/// A page of the agent of a node.
pub fn page(node: &Node, path: &str) -> Result<http::Answer> {
    let (name, path) = (node.net()?.name().to_owned(), path.to_owned());
    Netns::run_in(&name, move || http::get(([127, 0, 0, 1], 9464).into(), &path))?
}

/// The metrics of the agent of a node.
pub fn metrics(node: &Node) -> Result<Metrics> {
    let answer = page(node, "/metrics")?;
    ensure!(answer.status == 200, "/metrics answers {}", answer.status);
    Ok(Metrics(answer.body))
}

/// Kills a process of Skein on a node (SIGKILL), found by its first argument.
pub fn kill(node: &Node, command: &str) -> Result<()> {
    let words = ["pkill", "-KILL", "-f", &format!("^(/usr/bin/)?skein-agent {command}")];
    node.exec(&words).map(drop)
}

/// Everything on a node that Skein could leave.
pub fn traces(node: &Node) -> Result<Vec<String>> {
    let mut all = vec![];
    let links = node.exec(&["ip", "-o", "link"])?;
    all.extend(links.lines().filter(|line| line.contains("sk")).map(str::to_owned));
    let routes = node.exec(&["ip", "route", "show", "proto", "77"])?;
    all.extend(routes.lines().map(|line| format!("route {line}")));
    let tables = node.exec(&["nft", "list", "tables"])?;
    all.extend(tables.lines().filter(|line| line.contains("skein")).map(str::to_owned));
    for directory in ["/etc/cni/net.d", "/opt/cni/bin", "/run/skein", "/var/lib/skein"] {
        // Empty directories are the mounts of a container that is just gone.
        let ours = ["(", "-name", "*skein*", "-o", "-path", "*skein/*", ")", "!", "-type", "d"];
        let files = node.exec(&[&["find", directory][..], &ours].concat());
        all.extend(files.unwrap_or_default().lines().map(str::to_owned));
    }
    Ok(all)
}
