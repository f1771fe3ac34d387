//! Skein on a cluster of the laboratory, installed by its chart, and pods that use it.

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

/// Namespace in which the chart is installed.
pub const NAMESPACE: &str = "kube-system";

/// Option of helm for the maximum time until every agent is ready.
const INSTALL_TIMEOUT: &str = "--timeout=3m";

/// Maximum time until all nodes are Ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum time until a pod runs on each node. Also the timeout of a ping from a pod.
const POD_TIMEOUT: Duration = Duration::from_secs(60);

/// A pod with its own network namespace, whose container sleeps.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Name of the pod.
    pub name: String,
    /// Index of the pod's node.
    pub node: usize,
    /// Addresses of the pod, the one of the cluster's first family first.
    pub ips: Vec<IpAddr>,
    /// Path of the pod's network namespace on its node.
    netns: String,
}

/// Builds the image, imports it on every node, and installs the chart with these settings
/// (`--set`).
///
/// # Errors
/// If the image cannot be built or imported, or if the agents are not ready after three minutes.
pub fn install(kube: &Kube, settings: &[&str]) -> Result<()> {
    kube.load_image(&skein_image::build()?)?;
    helm(kube, "install", settings)
}

/// Upgrades the chart. Settings that are not given get their defaults.
///
/// # Errors
/// If helm fails, or if the agents are not ready after three minutes.
pub fn upgrade(kube: &Kube, settings: &[&str]) -> Result<()> {
    helm(kube, "upgrade", settings)
}

fn helm(kube: &Kube, verb: &str, settings: &[&str]) -> Result<()> {
    let chart = cargo::workspace().join("charts/skein");
    let chart = chart.to_string_lossy();
    let mut words =
        vec![verb, "skein", &*chart, "--namespace", NAMESPACE, "--wait", INSTALL_TIMEOUT];
    words.extend(["--set", "image.pullPolicy=Never"]);
    words.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    kube.helm(&words).map(drop)
}

/// Uninstalls the chart and waits until its objects are deleted.
///
/// # Errors
/// If helm fails, or if objects remain after three minutes.
pub fn uninstall(kube: &Kube) -> Result<()> {
    kube.helm(&["uninstall", "skein", "--namespace", NAMESPACE, "--wait", INSTALL_TIMEOUT])
        .map(drop)
}

/// Creates the DaemonSet `pod`, waits until a pod of it runs on every node that is switched on, and
/// returns these pods.
///
/// # Errors
/// If a pod does not run after 60 s.
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

/// Waits until a pod of the DaemonSet that [`pods`] created runs on every node that is switched on,
/// and returns these pods. Creates nothing.
///
/// # Errors
/// If a pod does not run after 60 s.
pub fn running(kube: &mut Kube) -> Result<Vec<Pod>> {
    let mut found = vec![];
    kube.wait("a pod runs on each node", POD_TIMEOUT, |kube| {
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
        let ip = ips.first().context("a pod has no address")?;
        let netns = namespace(&kube.nodes[node], *ip)?;
        let name = item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        pods.push(Pod { name, node, ips, netns });
    }
    pods.sort_by_key(|pod| pod.node);
    Ok(pods)
}

/// Returns the path, on the node, of the network namespace of the pod with this address. (Not a
/// namespace of Kubernetes.)
///
/// # Errors
/// If the node is switched off, or if no network namespace of the node has the address.
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
    bail!("no network namespace on {} has the address {ip}", node.name())
}

impl Pod {
    /// Returns a command that runs a program of the pod's node in the pod's network namespace. The
    /// command does not need the API server, which `kubectl exec` needs.
    ///
    /// # Errors
    /// If the pod's node is switched off.
    pub fn command(&self, kube: &Kube, words: &[&str]) -> Result<Command> {
        let mut command = kube.nodes[self.node].command("nsenter")?;
        command.arg(format!("--net={}", self.netns)).args(words);
        Ok(command)
    }

    /// Runs a command in the pod's network namespace and returns its standard output.
    ///
    /// # Errors
    /// If the node is switched off, or if the command fails or does not exit within 60 s.
    pub fn run(&self, kube: &Kube, words: &[&str]) -> Result<String> {
        process::run(&mut self.command(kube, words)?)
    }

    /// Returns whether an address answers a ping of the pod within a second.
    ///
    /// # Errors
    /// If the node is switched off, or if `ping` does not exit.
    pub fn reaches(&self, kube: &Kube, ip: IpAddr) -> Result<bool> {
        let words = ["ping", "-n", "-c", "1", "-W", "1", &ip.to_string()];
        let finished = process::finish(&mut self.command(kube, &words)?, &[], POD_TIMEOUT)?;
        Ok(finished.code == 0)
    }

    /// Starts `count` pings at intervals of `interval`. End them with [`Pings::wait_until_sent`] or
    /// [`Pings::stop`].
    ///
    /// # Errors
    /// If the node is switched off, or if `ping` cannot be started.
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

    /// Returns the throughput of one TCP connection to another pod, gigabits per second.
    ///
    /// # Errors
    /// If a node is switched off, or if iperf3 fails.
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

/// A running series of pings.
#[derive(Debug)]
pub struct Pings {
    process: Process,
    interval: Duration,
}

impl Pings {
    /// Stops the pings and returns the losses.
    ///
    /// # Errors
    /// If no ping was answered.
    pub fn stop(mut self) -> Result<Loss> {
        self.process.signal(Signal::INT)?;
        while self.process.exited().is_none() {
            thread::sleep(Duration::from_millis(50));
        }
        Loss::parse(&std::fs::read_to_string(self.process.log())?, self.interval)
    }

    /// Waits until `ping` has sent all requests and exits by itself. Returns the number of requests
    /// and the number of answers.
    ///
    /// # Errors
    /// If `ping` prints no summary.
    pub fn wait_until_sent(mut self) -> Result<(u32, u32)> {
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

/// Creates a cluster, installs Skein with `settings` (`--set`), creates a pod on every node
/// ([`pods`]), and runs `work`. The cluster is removed at the end.
///
/// # Errors
/// If the cluster cannot be created, or if `work` fails. The error contains the state of all pods
/// and the logs.
pub fn with(
    options: &Options,
    settings: &[&str],
    work: impl FnOnce(&mut Kube, Vec<Pod>) -> Result<()>,
) -> Result<()> {
    let mut kube = Kube::up(options)?;
    let all = || -> Result<()> {
        install(&kube, settings)?;
        let nodes: Vec<usize> = (0..kube.nodes.len()).collect();
        let took = kube.wait_ready(&nodes, true, READY_TIMEOUT)?;
        println!("all nodes Ready {:.1} s after the end of helm install", took.as_secs_f64());
        let pods = pods(&mut kube)?;
        work(&mut kube, pods)
    };
    let outcome = all();
    outcome.with_context(|| {
        let select = ["--selector=app.kubernetes.io/name=skein", "--all-containers", "--tail=40"];
        let get = ["get", "pods", "--all-namespaces", "--output=wide"];
        let text =
            |words: &[&str]| kube.kubectl(words).unwrap_or_else(|error| format!("{error:#}"));
        let logs = [&["logs", "--namespace=kube-system", "--prefix"][..], &select].concat();
        format!("{}\n{}\n{}", text(&get), text(&logs), kube.logs())
    })
}

/// Waits until every pod reaches every pod at every address, and returns the time that this took.
///
/// # Errors
/// If a pod does not reach another within `limit`.
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

/// Returns the name of the agent's pod on a node.
///
/// # Errors
/// If the node has no such pod.
pub fn agent_pod(kube: &Kube, node: usize) -> Result<String> {
    let select = "--selector=app.kubernetes.io/component=agent";
    let on = format!("--field-selector=spec.nodeName={}", kube.nodes[node].name());
    let get = ["--namespace=kube-system", "get", "pods", select, &on];
    let name =
        kube.kubectl(&[&get[..], &["--output=jsonpath={.items[0].metadata.name}"]].concat())?;
    Ok(name.trim().to_owned())
}

/// Returns a page of the HTTP server of a node's agent.
///
/// # Errors
/// If the node is switched off, or if the agent does not answer within 5 s.
pub fn page(node: &Node, path: &str) -> Result<http::Answer> {
    let (name, path) = (node.net()?.name().to_owned(), path.to_owned());
    Netns::run_in(&name, move || http::get(([127, 0, 0, 1], 9464).into(), &path))?
}

/// Returns the metrics of a node's agent.
///
/// # Errors
/// If the node is switched off, or if the agent does not answer with status 200.
pub fn metrics(node: &Node) -> Result<Metrics> {
    let answer = page(node, "/metrics")?;
    ensure!(answer.status == 200, "/metrics answers {}", answer.status);
    Ok(Metrics(answer.body))
}

/// Kills (SIGKILL) each process of `skein-agent` on a node whose first argument is `command`, for
/// example `run`.
///
/// # Errors
/// If the node is switched off, or if there is no such process.
pub fn kill(node: &Node, command: &str) -> Result<()> {
    let words = ["pkill", "-KILL", "-f", &format!("^(/usr/bin/)?skein-agent {command}")];
    node.exec(&words).map(drop)
}

/// Lists what Skein has left on a node: interfaces, routes, nftables tables and files. The list is
/// empty after a complete removal.
///
/// # Errors
/// If the node is switched off, or if a program fails.
pub fn traces(node: &Node) -> Result<Vec<String>> {
    let mut all = vec![];
    let links = node.exec(&["ip", "-o", "link"])?;
    all.extend(links.lines().filter(|line| line.contains("sk")).map(str::to_owned));
    let routes = node.exec(&["ip", "route", "show", "proto", "77"])?;
    all.extend(routes.lines().map(|line| format!("route {line}")));
    let tables = node.exec(&["nft", "list", "tables"])?;
    all.extend(tables.lines().filter(|line| line.contains("skein")).map(str::to_owned));
    for directory in ["/etc/cni/net.d", "/opt/cni/bin", "/run/skein", "/var/lib/skein"] {
        // Directories are ignored, because the mount points of a removed container may remain for
        // a moment.
        let ours = ["(", "-name", "*skein*", "-o", "-path", "*skein/*", ")", "!", "-type", "d"];
        let files = node.exec(&[&["find", directory][..], &ours].concat());
        all.extend(files.unwrap_or_default().lines().map(str::to_owned));
    }
    Ok(all)
}
