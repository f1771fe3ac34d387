//! The plugin as containerd (by ctr and by the CRI) and libcni call it.
//!
//! [`traces`] lists what pods leave on a node (interfaces, routes, rules and so on); [`same`]
//! compares the list after a test with the list before.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::cri::Cri;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skein_lab::agent::Cluster;
use skein_lab::cargo::workspace;
use skein_lab::checks;
use skein_lab::cni::{self, same, traces};
use skein_lab::containerd::{Containerd, IMAGE};
use skein_lab::load::iperf::{self, Flow};
use skein_lab::{Family, Lab, Netns, Plan, Underlay, process};

/// Two nodes, each with an agent and a containerd.
struct Nodes {
    // Declared before the cluster, so that containerd is dropped first.
    containerd: Vec<Containerd>,
    cluster: Cluster,
}

impl Nodes {
    fn up() -> Result<Self> {
        let lab = Lab::new(&Plan { pods: 0, ..Plan::default() })?;
        let mut cluster = Cluster::prepare(lab, Family::V4)?;
        cluster.agents.iter_mut().try_for_each(|agent| agent.serve_pods())?;
        let containerd = cluster.agents.iter().zip(&cluster.lab.nodes);
        let containerd = containerd
            .map(|(agent, node)| Containerd::start(agent, &node.ns, cluster.lab.directory()))
            .collect::<Result<_>>()?;
        cluster.start()?;
        Ok(Self { containerd, cluster })
    }

    fn node(&self, index: usize) -> &Netns {
        &self.cluster.lab.nodes[index].ns
    }

    fn used(&self, index: usize) -> Result<f64> {
        Ok(self.cluster.agents[index].metrics()?.sum("skein_ipam_addresses", &["state=\"used\""]))
    }

    fn cri(&self, index: usize) -> Result<Cri> {
        let containerd = &self.containerd[index];
        Cri::connect(&containerd.socket(), &containerd.cgroup)
    }
}

#[test]
fn ctr_attaches_containers_of_two_nodes() -> Result<()> {
    let nodes = Nodes::up()?;
    checks::eventually("the list is installed", checks::EVENT_TIMEOUT, || {
        Ok(nodes
            .cluster
            .agents
            .iter()
            .all(|agent| agent.cni_directory("conf_dir").join("10-skein.conflist").is_file()))
    })?;
    let before = [traces(nodes.node(0))?, traces(nodes.node(1))?];
    let ctr = |index: usize, arguments: &[&str]| -> Result<String> {
        let finished = nodes.containerd[index].ctr(arguments)?;
        let text = format!("{}{}", finished.stdout, finished.stderr);
        ensure!(
            finished.code == 0,
            "ctr {arguments:?} failed: {text}\n{}",
            nodes.containerd[index].log_tail()
        );
        Ok(text)
    };
    let names = ["one", "two"];
    for (index, name) in names.iter().enumerate() {
        let cgroup = format!("/{}/{name}", nodes.containerd[index].cgroup);
        let run =
            ["run", "-d", "--cni", "--snapshotter", "native", "--cgroup", &cgroup, IMAGE, name];
        ctr(index, &run)?;
    }
    let addresses: Vec<IpAddr> = (0..2)
        .map(|index| {
            let show = [
                "task",
                "exec",
                "--exec-id",
                "show",
                names[index],
                "ip",
                "address",
                "show",
                "eth0",
            ];
            let text = ctr(index, &show)?;
            let line = text.lines().find_map(|line| line.trim().strip_prefix("inet "));
            let address = line.and_then(|line| line.split(['/', ' ']).next());
            Ok(address.with_context(|| text.clone())?.parse()?)
        })
        .collect::<Result<_>>()?;
    for (index, name) in names.iter().enumerate() {
        let to = addresses[1 - index].to_string();
        let ping = ["task", "exec", "--exec-id", "ping", name, "ping", "-c", "3", "-W", "2", &to];
        let text = ctr(index, &ping)?;
        ensure!(text.contains("3 packets received"), "Not every ping was answered: {text}");
    }
    for index in 0..2 {
        let used = nodes.used(index)?;
        ensure!(used == 2.0, "Node {index} uses {used} addresses instead of 2.");
    }
    // ctr calls the plugin for DEL only if it waits for the container itself. In this test, the
    // agent notices that the namespace is gone.
    for (index, name) in names.iter().enumerate() {
        let _ = nodes.containerd[index].ctr(&["task", "kill", "-s", "SIGKILL", name]);
        checks::eventually(
            "the task has ended and the container is removed",
            checks::EVENT_TIMEOUT,
            || {
                let _ = nodes.containerd[index].ctr(&["task", "rm", name]);
                ctr(index, &["container", "rm", name]).map(|_| true)
            },
        )?;
    }
    for (index, before) in before.iter().enumerate() {
        checks::eventually("nothing is left", Duration::from_secs(25), || {
            same(before, &traces(nodes.node(index))?)?;
            Ok(true)
        })?;
    }
    Ok(())
}

#[test]
fn cri_starts_and_deletes_pods() -> Result<()> {
    let nodes = Nodes::up()?;
    let (first, second) = (nodes.cri(0)?, nodes.cri(1)?);
    for cri in [&first, &second] {
        checks::eventually("the network is ready", Duration::from_secs(10), || {
            cri.network_ready()
        })?;
    }
    // portmap creates chains for its first pod and never removes them.
    for cri in [&first, &second] {
        cri.remove(&cri.run("first", &[(8081, 81)])?)?;
    }
    let before = [traces(nodes.node(0))?, traces(nodes.node(1))?];
    let (a, b) = (first.run("a", &[])?, second.run("b", &[(8080, 80)])?);
    let (a_ips, b_ips) = (first.addresses(&a)?, second.addresses(&b)?);
    ensure!(
        a_ips.len() == 2 && a_ips[0].is_ipv4(),
        "The pod does not have an IPv4 address followed by an IPv6 address: {a_ips:?}"
    );
    // Two containers of a pod share its addresses.
    let server =
        ["sh", "-c", "mkdir -p /w; echo hello from b > /w/index.html; exec httpd -f -p 80 -h /w"];
    second.container(&b, "server", &server)?;
    let sibling = second.container(&b, "sibling", &["sleep", "1000"])?;
    let client = first.container(&a, "client", &["sleep", "1000"])?;
    for ip in &b_ips {
        let ping = ["ping", "-c", "3", "-W", "2", &ip.to_string()];
        let (code, text) = first.exec(&client, &ping)?;
        let is_complete = code == 0 && text.contains("3 packets received");
        ensure!(is_complete, "Not every ping was answered: {text}");
    }
    // The image's wget crashes in its static C library, so the client is a shell with nc.
    let get = |cri: &Cri, container: &str, ip: IpAddr, port: u16| -> Result<()> {
        let line = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {ip} {port}");
        checks::eventually(&line, Duration::from_secs(10), || {
            let (code, text) = cri.exec(container, &["sh", "-c", &line])?;
            ensure!(code == 0, "The client ended with code {code}: {text}");
            Ok(text.contains("hello from b"))
        })
        .map(drop)
    };
    let local = IpAddr::from([127, 0, 0, 1]);
    get(&second, &sibling, local, 80)?;
    for ip in &b_ips {
        get(&first, &client, *ip, 80)?;
    }
    // The hostPort of b's node is reachable from a pod of the other node.
    let node = nodes.cluster.lab.nodes[1].underlay(Family::V4);
    get(&first, &client, node, 8080)?;
    // Without an agent, running pods keep their network and can be deleted.
    let mut nodes = nodes;
    nodes.cluster.agents[1].stop()?;
    get(&second, &sibling, local, 80)?;
    second.remove(&b)?;
    nodes.cluster.agents[1].start()?;
    first.remove(&a)?;
    for (index, before) in before.iter().enumerate() {
        checks::eventually("nothing is left", Duration::from_secs(15), || {
            same(before, &traces(nodes.node(index))?)?;
            Ok(nodes.used(index)? == 0.0)
        })?;
    }
    Ok(())
}

/// A program with libcni, the library of the runtimes, from Debian's Go sources, on a node with an
/// agent.
struct Libcni {
    cluster: Cluster,
    program: PathBuf,
    /// Capability arguments of each pod (`runtimeConfig`).
    capabilities: Value,
}

impl Libcni {
    /// Starts an agent whose list has the plugins `chain` after Skein's.
    fn up(chain: Value, capabilities: Value) -> Result<Self> {
        let lab =
            Lab::new(&Plan { nodes: 1, pods: 0, underlay: Underlay::Switch, ..Plan::default() })?;
        let mut cluster = Cluster::prepare(lab, Family::V4)?;
        cluster.agents[0].serve_pods()?;
        cluster.agents[0].set("cni.chain", toml::Value::try_from(chain)?);
        cluster.start()?;
        let program = cluster.lab.directory().join("libcni");
        let mut build = Command::new("go");
        build.args(["build", "-o"]).arg(&program).arg("main.go");
        build.current_dir(workspace().join("e2e/libcni"));
        build.envs([("GO111MODULE", "off"), ("GOPATH", "/usr/share/gocode")]);
        build.env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go"));
        process::run(&mut build)?;
        Ok(Self { cluster, program, capabilities })
    }

    fn node(&self) -> &Netns {
        &self.cluster.lab.nodes[0].ns
    }

    /// Returns the list that the agent has installed.
    fn list(&self) -> Result<Value> {
        let path = self.cluster.agents[0].cni_directory("conf_dir").join("10-skein.conflist");
        checks::eventually("the list is installed", checks::EVENT_TIMEOUT, || Ok(path.is_file()))?;
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Calls libcni with the operation `verb` for `container`, and returns its output, which is the
    /// result of an ADD.
    fn call(&self, verb: &str, list: &Value, container: &str, pod: &Netns) -> Result<String> {
        let directory = self.cluster.lab.directory();
        let path = directory.join("list.conflist");
        fs::write(&path, list.to_string())?;
        let mut command = self.node().command(&self.program);
        command.arg(verb).arg(&path).arg(cni::path(pod)).arg(container);
        command.arg(self.cluster.agents[0].cni_directory("bin_dir"));
        command.arg(directory.join("libcni-state")).arg(self.capabilities.to_string());
        process::run(&mut command).with_context(|| format!("{verb} with {list}"))
    }

    fn add(&self, list: &Value, container: &str, pod: &Netns) -> Result<Value> {
        let said = self.call("ADD", list, container, pod)?;
        serde_json::from_str(&said).with_context(|| said)
    }
}

/// The chain is skein-cni, portmap.
#[test]
fn libcni_adds_checks_and_deletes_in_every_version() -> Result<()> {
    let portmap = json!([{ "type": "portmap", "capabilities": { "portMappings": true } }]);
    // Without port mappings, because CHECK of portmap 1.1.1 searches the IPv6 table for IPv4 rules.
    let libcni = Libcni::up(portmap, json!({}))?;
    let mut list = libcni.list()?;
    let before = traces(libcni.node())?;
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        list["cniVersion"] = version.into();
        let (name, pod) = (format!("id-{version}"), Netns::create(&format!("libcni-{version}"))?);
        let result = libcni.add(&list, &name, &pod)?;
        ensure!(result["cniVersion"] == version, "The result is not of {version}: {result}");
        if version < "0.3.0" {
            for family in ["ip4", "ip6"] {
                ensure!(result[family]["ip"].is_string(), "The result is incomplete: {result}");
            }
        } else {
            ensure!(cni::addresses(&result)?.len() == 2, "The result is incomplete: {result}");
            ensure!(
                result["interfaces"][1]["name"] == "eth0",
                "The result is incomplete: {result}"
            );
        }
        // CHECK exists since CNI 0.4.0.
        if version >= "0.4.0" {
            libcni.call("CHECK", &list, &name, &pod)?;
        }
        for _ in 0..2 {
            libcni.call("DEL", &list, &name, &pod)?;
        }
        same(&before, &traces(libcni.node())?).context(version)?;
    }
    Ok(())
}

/// The chain is loopback, skein-cni, portmap, tuning, bandwidth: skein-cni extends the result of
/// loopback, and the reference plugins apply bandwidth limits and settings of the pod's interface.
#[test]
fn other_plugins_of_the_chain_take_effect() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let chain = json!([
        { "type": "portmap", "capabilities": { "portMappings": true } },
        {
            "type": "tuning",
            "sysctl": { "net.ipv4.conf.eth0.log_martians": "1", "net.core.somaxconn": "77" },
            "promisc": true,
            "mtu": 1300,
            "dataDir": lab.path(),
        },
        { "type": "bandwidth", "capabilities": { "bandwidth": true } },
    ]);
    let rates = json!({ "bandwidth": {
        "ingressRate": 8_000_000, "ingressBurst": 800_000,
        "egressRate": 4_000_000, "egressBurst": 400_000,
    } });
    let libcni = Libcni::up(chain, rates)?;
    let node = libcni.node();
    let mut list = libcni.list()?;
    list["plugins"].as_array_mut().context("plugins")?.insert(0, json!({ "type": "loopback" }));
    let before = traces(node)?;
    let ns = Netns::create("chained")?;
    let result = libcni.add(&list, "chained", &ns)?;
    let first = &result["interfaces"][0]["name"];
    ensure!(first == "lo", "The result of the previous plugin is missing: {result}");
    let host = result["interfaces"][1]["name"].as_str().context("interfaces")?.to_owned();
    ensure!(result["interfaces"][2]["name"] == "eth0", "The result is incomplete: {result}");
    let addresses = cni::addresses(&result)?;
    let own = addresses.iter().filter(|address| !address.is_loopback());
    ensure!(own.count() == 2, "The result is incomplete: {result}");

    // Effects of tuning in the pod.
    let link = ns.ip("-d link show eth0")?;
    ensure!(
        link.contains("mtu 1300") && link.contains("promiscuity 1"),
        "The settings of eth0 are missing: {link}"
    );
    for (key, value) in [("net.ipv4.conf.eth0.log_martians", "1"), ("net.core.somaxconn", "77")] {
        let found = ns.sh(&format!("sysctl -n {key}"))?;
        ensure!(found.trim() == value, "{key} is {found} instead of {value}.");
    }
    // The plugin bandwidth limits the pod's received traffic on the pod's link, and the pod's sent
    // traffic on an IFB interface. Both are on the node.
    let queues = node.sh("tc qdisc show")?;
    let queue = |rate: &str| queues.lines().find(|l| l.contains("tbf") && l.contains(rate));
    let (inward, outward) = (queue("rate 8Mbit"), queue("rate 4Mbit"));
    ensure!(
        inward.is_some_and(|line| line.contains(&host)),
        "The inward limit is missing: {queues}"
    );
    ensure!(
        outward.is_some_and(|line| line.contains("dev bwp")),
        "The outward limit is missing: {queues}"
    );
    ensure!(
        queues.contains(&format!("qdisc ingress ffff: dev {host}")),
        "The ingress queue is missing: {queues}"
    );

    libcni.call("CHECK", &list, "chained", &ns)?;
    // The next check of the agent (every 10 s) leaves the settings unchanged.
    thread::sleep(Duration::from_secs(11));
    libcni.call("CHECK", &list, "chained", &ns)?;
    let server = iperf::Server::start(&ns)?;
    let address = addresses.iter().find(|address| !address.is_loopback());
    let address = address.context("the pod has no address")?;
    let arrived = iperf::run(node, *address, Flow::Tcp { streams: 1 }, 3, false)?;
    let rate = arrived.bits_per_second;
    ensure!((1e6..10e6).contains(&rate), "The pod, limited to 8 Mbit/s, received {rate} bit/s.");
    drop(server);

    for _ in 0..2 {
        libcni.call("DEL", &list, "chained", &ns)?;
    }
    same(&before, &traces(node)?)
}
