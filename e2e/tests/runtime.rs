//! containerd starts containers, and calls the plugin as it does on every node of a cluster.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::cargo::workspace;
use skein_e2e::checks;
use skein_e2e::lab::agent::Cluster;
use skein_e2e::lab::cni::{self, traces};
use skein_e2e::lab::containerd::{Containerd, IMAGE};
use skein_e2e::lab::cri::Cri;
use skein_e2e::lab::{Family, Lab, Netns, Plan, Underlay, process};

/// Two nodes with agents and a containerd each.
struct Nodes {
    // Before the cluster: they go first.
    containerd: Vec<Containerd>,
    cluster: Cluster,
}

impl Nodes {
    fn up() -> Result<Self> {
        let lab = Lab::new(&Plan { pods: 0, ..Plan::default() })?;
        let mut cluster = Cluster::prepare(lab, Family::V4)?;
        cluster.agents.iter_mut().for_each(|agent| agent.serve_pods());
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

/// Less the chains that portmap keeps for the next, which are no interface's.
fn same(before: &[String], after: &[String]) -> Result<()> {
    let (before, after) = (BTreeSet::from_iter(before), BTreeSet::from_iter(after));
    ensure!(before == after, "before {before:#?}, after {after:#?}");
    Ok(())
}

#[test]
fn ctr_attaches_containers_of_two_nodes() -> Result<()> {
    let nodes = Nodes::up()?;
    checks::eventually("the configuration is there", Duration::from_secs(5), || {
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
            "ctr {arguments:?}: {text}\n{}",
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
        ensure!(text.contains("3 packets received"), "{text}");
    }
    ensure!(nodes.used(0)? == 2.0 && nodes.used(1)? == 2.0, "not one pod each");
    // ctr calls the plugin for DEL only where it waits for the container itself: so do we, by its end.
    for (index, name) in names.iter().enumerate() {
        let _ = nodes.containerd[index].ctr(&["task", "kill", "-s", "SIGKILL", name]);
        checks::eventually(
            "the task has ended, the container goes",
            Duration::from_secs(5),
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
fn the_runtime_interface_starts_pods_as_kubelet_does() -> Result<()> {
    let nodes = Nodes::up()?;
    let (first, second) = (nodes.cri(0)?, nodes.cri(1)?);
    for cri in [&first, &second] {
        checks::eventually("the network is ready", Duration::from_secs(10), || {
            cri.network_ready()
        })?;
    }
    let before = [traces(nodes.node(0))?, traces(nodes.node(1))?];
    let (a, b) = (first.run("a", &[])?, second.run("b", &[(8080, 80)])?);
    let (a_ips, b_ips) = (first.addresses(&a)?, second.addresses(&b)?);
    ensure!(a_ips.len() == 2 && a_ips[0].is_ipv4(), "IPv4 is the pod's address: {a_ips:?}");
    // Two containers of one pod share its address.
    let server =
        ["sh", "-c", "mkdir -p /w; echo hello from b > /w/index.html; exec httpd -f -p 80 -h /w"];
    second.container(&b, "server", &server)?;
    let beside = second.container(&b, "beside", &["sleep", "1000"])?;
    let client = first.container(&a, "client", &["sleep", "1000"])?;
    for ip in &b_ips {
        let ping = ["ping", "-c", "3", "-W", "2", &ip.to_string()];
        let (code, text) = first.exec(&client, &ping)?;
        ensure!(code == 0 && text.contains("3 packets received"), "{text}");
    }
    // The image's wget does not survive its static C library; a shell and nc are enough of a client.
    let get = |cri: &Cri, container: &str, ip: IpAddr, port: u16| -> Result<()> {
        let line = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {ip} {port}");
        checks::eventually(&line, Duration::from_secs(10), || {
            let (code, text) = cri.exec(container, &["sh", "-c", &line])?;
            ensure!(code == 0, "{code} {text}");
            Ok(text.contains("hello from b"))
        })
        .map(drop)
    };
    let local = IpAddr::from([127, 0, 0, 1]);
    get(&second, &beside, local, 80)?;
    for ip in &b_ips {
        get(&first, &client, *ip, 80)?;
    }
    // The hostPort of b's node, from another node's pod.
    let node = nodes.cluster.lab.nodes[1].underlay(Family::V4);
    get(&first, &client, node, 8080)?;
    // A restart of the agent is nothing to running pods; and they can be deleted without it.
    let mut nodes = nodes;
    nodes.cluster.agents[1].stop()?;
    get(&second, &beside, local, 80)?;
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

/// The library that runtimes use, from Debian's Go sources: every version that it knows, with portmap
/// behind Skein in the chain.
#[test]
fn libcni_adds_checks_and_deletes_in_every_version() -> Result<()> {
    let lab = Lab::new(&Plan { nodes: 1, pods: 0, underlay: Underlay::Switch, ..Plan::default() })?;
    let mut cluster = Cluster::prepare(lab, Family::V4)?;
    cluster.agents[0].serve_pods();
    cluster.start()?;
    let (agent, node) = (&cluster.agents[0], &cluster.lab.nodes[0].ns);
    let directory = cluster.lab.directory().join("libcni");
    fs::create_dir_all(&directory)?;
    let program = directory.join("libcni");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg("main.go");
    build.current_dir(workspace().join("e2e/libcni"));
    build.envs([("GO111MODULE", "off"), ("GOPATH", "/usr/share/gocode")]);
    build.env("GOCACHE", directory.join("cache"));
    process::run(&mut build)?;
    let bin = agent.cni_directory("bin_dir");
    checks::eventually("the plugin is there", Duration::from_secs(5), || {
        Ok(bin.join("skein-cni").is_file())
    })?;
    fs::copy("/usr/lib/cni/portmap", bin.join("portmap"))?;
    let installed = fs::read(agent.cni_directory("conf_dir").join("10-skein.conflist"))?;
    let mut list: Value = serde_json::from_slice(&installed)?;
    let before = traces(node)?;
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        list["cniVersion"] = version.into();
        let path = directory.join(format!("{version}.conflist"));
        fs::write(&path, list.to_string())?;
        let pod = Netns::create(&format!("libcni-{version}"))?;
        let mut command = node.command(&program);
        command.arg(&path).arg(cni::path(&pod)).arg(format!("id-{version}"));
        command.arg(&bin).arg(directory.join("state"));
        let said = process::run(&mut command).with_context(|| version)?;
        let result: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        ensure!(result["cniVersion"] == version, "{result}");
        ensure!(cni::addresses(&result)?.len() == 2, "{result}");
        ensure!(result["interfaces"][1]["name"] == "eth0", "{result}");
        same(&before, &traces(node)?)?;
    }
    Ok(())
}
