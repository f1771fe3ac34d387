//! A real Kubernetes: that the laboratory's cluster works, and leaves nothing. `cargo e2e cluster
//! test` runs these, the usual run does not.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use skein_cluster::{Kube, Options, programs, v4, v6};
use skein_lab::{process, registry};

/// Maximum time until nodes are ready, or a pod runs.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Installs Debian's reference plugins as the network of every node, without routes to other nodes.
fn install_network(kube: &Kube) -> Result<()> {
    for (i, node) in kube.nodes.iter().enumerate() {
        let network = json!({ "cniVersion": "0.4.0", "name": "local", "plugins": [{
            "type": "ptp", "ipMasq": true,
            "ipam": { "type": "host-local", "subnet": format!("10.244.{i}.0/24") },
        }]});
        let to = node.disk_path("/etc/cni/net.d/10-local.conflist");
        // The rename is atomic: the kubelet never reads half a file.
        fs::write(to.with_extension("new"), network.to_string())?;
        fs::rename(to.with_extension("new"), to)?;
    }
    Ok(())
}

/// Returns a DaemonSet with the local image in the host network.
fn daemon_set() -> String {
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "everywhere" },
        "spec": {
            "selector": { "matchLabels": { "app": "everywhere" } },
            "template": {
                "metadata": { "labels": { "app": "everywhere" } },
                "spec": {
                    "hostNetwork": true,
                    "terminationGracePeriodSeconds": 0,
                    "tolerations": [{ "operator": "Exists" }],
                    "containers": [{
                        "name": "main", "image": programs::TOOLS, "imagePullPolicy": "Never",
                        "command": ["sh", "-c", "echo here; exec sleep infinity"],
                    }],
                },
            },
        },
    })
    .to_string()
}

/// Returns the names of the running pods of [`daemon_set`] and of their nodes.
fn running(kube: &Kube) -> Result<Vec<(String, String)>> {
    let columns = "--output=custom-columns=:metadata.name,:spec.nodeName,:status.phase";
    let text =
        kube.kubectl(&["get", "pods", "--selector=app=everywhere", "--no-headers", columns])?;
    let rows = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let rows = rows.filter(|row| row.last() == Some(&"Running"));
    Ok(rows.map(|row| (row[0].to_owned(), row[1].to_owned())).collect())
}

/// Runs `test` on a cluster, and checks that the cluster leaves nothing on the host.
fn on_cluster(options: &Options, test: impl FnOnce(&mut Kube) -> Result<()>) -> Result<()> {
    let before = surroundings()?;
    let mut kube = Kube::up(options)?;
    let processes = processes_of(std::process::id());
    let outcome = test(&mut kube).with_context(|| kube.logs());
    ensure!(processes.len() > 10, "Too few processes of the machines were found: {processes:?}");
    drop(kube);
    outcome?;
    let left = remains_of(std::process::id());
    ensure!(left.is_empty(), "The cluster left: {left:?}");
    let alive = |pid: &i32| Path::new(&format!("/proc/{pid}")).exists();
    let alive: Vec<_> = processes.into_iter().filter(alive).collect();
    ensure!(alive.is_empty(), "These processes still run: {alive:?}");
    let after = surroundings()?;
    let new: Vec<_> = after.difference(&before).collect();
    ensure!(new.is_empty(), "The cluster left mounts or interfaces: {new:?}");
    Ok(())
}

/// Returns the names of namespaces, cgroups and directories of a process's laboratories.
fn remains_of(pid: u32) -> Vec<String> {
    let of_process = format!("-{pid}-");
    registry::existing().into_iter().filter(|name| name.contains(&of_process)).collect()
}

/// Returns the ids of all processes in the machines of a process's laboratories, including
/// containers.
fn processes_of(pid: u32) -> Vec<i32> {
    let of_process = format!("/skein-e2e-{pid}-");
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let inside = |pid: &i32| {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        cgroups.contains(&of_process)
    };
    all.filter(inside).collect()
}

/// Returns the mounts and interfaces of the host, without the mounts of network namespaces.
fn surroundings() -> Result<BTreeSet<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mounts = mounts.lines().filter_map(|line| line.split_whitespace().nth(4));
    let mounts = mounts.filter(|path| !path.starts_with("/run/netns/"));
    let mut all: BTreeSet<String> = mounts.map(|path| format!("mount {path}")).collect();
    for interface in fs::read_dir("/sys/class/net")? {
        all.insert(format!("interface {}", interface?.file_name().display()));
    }
    Ok(all)
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn nodes_become_ready_with_a_network_and_run_pods() -> Result<()> {
    on_cluster(&Options::default(), |kube| {
        kube.wait_ready(&[0, 1], false, READY_TIMEOUT)?;
        kube.apply(&daemon_set())?;
        // Pods in the host network run without a network plugin.
        kube.wait("a pod runs on each node", READY_TIMEOUT, |kube| Ok(running(kube)?.len() == 2))?;
        install_network(kube)?;
        kube.wait_ready(&[0, 1], true, READY_TIMEOUT)?;

        let pods = running(kube)?;
        let nodes: BTreeSet<&str> = pods.iter().map(|(_, node)| node.as_str()).collect();
        ensure!(nodes == BTreeSet::from(["node1", "node2"]), "The pods are on {nodes:?}.");
        for (pod, node) in &pods {
            let name = kube.kubectl(&["exec", pod, "--", "hostname"])?;
            ensure!(name.trim() == node, "The host name of {pod} on {node} is {name}.");
            let logs = kube.kubectl(&["logs", pod])?;
            ensure!(logs == "here\n", "The log of {pod} is {logs:?}.");
        }
        pods_have_addresses_and_services(kube)?;
        the_api_is_reached_from_outside(kube)?;
        helm_installs(kube)
    })
}

/// Checks a pod in the network of the plugins, and a Service for this pod.
fn pods_have_addresses_and_services(kube: &mut Kube) -> Result<()> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "web", "labels": { "app": "web" } },
        "spec": { "nodeName": "node1", "terminationGracePeriodSeconds": 0, "containers": [{
            "name": "main", "image": programs::BUSYBOX, "imagePullPolicy": "Never",
            "command": ["sh", "-c", "echo hello >/tmp/index.html; exec httpd -f -p 8080 -h /tmp"],
        }]},
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web" },
        "spec": {
            "selector": { "app": "web" }, "clusterIP": "10.96.1.1",
            "ports": [{ "port": 80, "targetPort": 8080 }],
        },
    });
    kube.apply(&pod.to_string())?;
    kube.apply(&service.to_string())?;
    kube.kubectl(&["wait", "pod/web", "--for=condition=Ready", "--timeout=60s"])?;
    let address = kube.kubectl(&["get", "pod", "web", "--output=jsonpath={.status.podIP}"])?;
    ensure!(address.starts_with("10.244.0."), "The address of the pod is {address:?}.");
    kube.wait("the Service answers on the node", READY_TIMEOUT, |kube| {
        let answer = kube.nodes[0].exec(&["curl", "--silent", "--max-time", "2", "10.96.1.1"])?;
        Ok(answer == "hello\n")
    })
    .map(drop)
}

/// Checks that a program outside of the cluster, such as an agent that is not a pod, reaches the
/// API server.
fn the_api_is_reached_from_outside(kube: &Kube) -> Result<()> {
    let elsewhere = kube.attach("elsewhere", 200)?;
    let mut command = elsewhere.command(kube.program("kubectl"));
    command.arg("--kubeconfig").arg(kube.kubeconfig()).args(["get", "--raw=/readyz"]);
    let answer = process::run(&mut command)?;
    ensure!(answer == "ok", "The API server answers {answer:?}.");
    Ok(())
}

fn helm_installs(kube: &Kube) -> Result<()> {
    let chart = kube.directory().join("chart");
    fs::create_dir_all(chart.join("templates"))?;
    fs::write(chart.join("Chart.yaml"), "apiVersion: v2\nname: tiny\nversion: 0.1.0\n")?;
    let map =
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: tiny}\ndata: {key: {{ .Values.key }}}\n";
    fs::write(chart.join("templates/map.yaml"), map)?;
    let chart = chart.to_string_lossy();
    kube.helm(&["install", "tiny", &chart, "--set", "key=value", "--wait"])?;
    let value = kube.kubectl(&["get", "configmap", "tiny", "--output=jsonpath={.data.key}"])?;
    ensure!(value == "value", "The object of the chart has the value {value:?}.");
    kube.helm(&["uninstall", "tiny"]).map(drop)
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn nodes_recover_from_power_loss_kills_and_new_addresses() -> Result<()> {
    on_cluster(&Options::default(), |kube| {
        install_network(kube)?;
        kube.apply(&daemon_set())?;
        kube.wait_ready(&[0, 1], true, READY_TIMEOUT)?;
        kube.wait("a pod runs on each node", READY_TIMEOUT, |kube| Ok(running(kube)?.len() == 2))?;

        // Files on the disk outlive a loss of power, processes and files in memory do not.
        let node = &mut kube.nodes[1];
        node.exec(&["touch", "/var/lib/kept", "/etc/kept", "/run/lost"])?;
        let pid = node.pid("kubelet")?.context("no kubelet")?;
        node.power_off();
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "The kubelet still runs.");
        ensure!(node.exec(&["true"]).is_err(), "A machine without power runs a command.");
        kube.wait_ready(&[1], false, READY_TIMEOUT)?;
        let node = &mut kube.nodes[1];
        node.power_on()?;
        node.exec(&["ls", "/var/lib/kept", "/etc/kept"])?;
        ensure!(
            node.exec(&["ls", "/run/lost"]).is_err(),
            "A file in memory outlived a loss of power."
        );
        kube.wait_ready(&[1], true, READY_TIMEOUT)?;
        kube.wait("both pods answer", READY_TIMEOUT, |kube| {
            let pods = running(kube)?;
            let answers =
                pods.iter().all(|(pod, _)| kube.kubectl(&["exec", pod, "--", "true"]).is_ok());
            Ok(pods.len() == 2 && answers)
        })?;

        let ping = ["ping", "-c", "1", "-W", "1", &v4(12).to_string()];
        kube.control.exec(&ping)?;
        kube.nodes[1].set_cable(false)?;
        ensure!(kube.control.exec(&ping).is_err(), "A ping was answered without a cable.");
        kube.nodes[1].set_cable(true)?;
        kube.wait("an answer", READY_TIMEOUT, |kube| kube.control.exec(&ping).map(|_| true))?;

        kube.stop_api_server()?;
        ensure!(kube.kubectl(&["get", "nodes"]).is_err(), "The stopped API server answers.");
        kube.start_api_server()?;
        kube.wait_ready(&[0, 1], true, READY_TIMEOUT)?;

        // Containers continue to run when containerd is killed.
        let before = containers(kube)?;
        kube.nodes[0].kill("containerd")?;
        kube.nodes[0].start("containerd")?;
        kube.nodes[0].restart("kubelet")?;
        kube.wait_ready(&[0], true, READY_TIMEOUT)?;
        let after = containers(kube)?;
        ensure!(
            !before.is_empty() && before == after,
            "The containers changed: {before:?} to {after:?}."
        );

        kube.nodes[0].readdress(50)?;
        kube.wait("the node's new address", READY_TIMEOUT, |kube| {
            let path = "--output=jsonpath={.status.addresses[?(@.type=='InternalIP')].address}";
            Ok(kube.kubectl(&["get", "node", "node1", path])? == v4(50).to_string())
        })?;
        kube.wait("the kubelet answers at its new address", READY_TIMEOUT, |kube| {
            let pods = running(kube)?;
            let (pod, _) = pods.iter().find(|(_, node)| node == "node1").context("no pod")?;
            Ok(kube.kubectl(&["logs", pod])? == "here\n")
        })
        .map(drop)
    })
}

/// Returns the ids of the first node's containers.
fn containers(kube: &Kube) -> Result<BTreeSet<String>> {
    let text = process::run(&mut kube.nodes[0].ctr(&["tasks", "list", "--quiet"])?)?;
    Ok(text.lines().map(str::to_owned).collect())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn dual_stack_nodes_and_services_have_both_families() -> Result<()> {
    on_cluster(&Options { nodes: 1, dual_stack: true, ..Options::default() }, |kube| {
        let of_node = |kube: &Kube, path: &str| {
            kube.kubectl(&["get", "node", "node1", &format!("--output=jsonpath={path}")])
        };
        kube.wait("two pod ranges", READY_TIMEOUT, |kube| {
            let ranges = of_node(kube, "{.spec.podCIDRs[*]}")?;
            let mut ranges = ranges.split(' ');
            let starts = |range: Option<&str>, with| range.is_some_and(|r| r.starts_with(with));
            Ok(starts(ranges.next(), "10.244.") && starts(ranges.next(), "fd00:10:244:"))
        })?;
        let addresses = of_node(kube, "{.status.addresses[?(@.type=='InternalIP')].address}")?;
        let expected = format!("{} {}", v4(11), v6(11));
        ensure!(addresses == expected, "The node has {addresses:?} instead of {expected:?}.");
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "both" },
            "spec": { "ipFamilyPolicy": "RequireDualStack", "ports": [{ "port": 80 }] },
        });
        kube.apply(&service.to_string())?;
        let path = "--output=jsonpath={.spec.clusterIPs[*]}";
        let addresses = kube.kubectl(&["get", "service", "both", path])?;
        let families: Vec<bool> = addresses.split(' ').map(|a| a.contains(':')).collect();
        ensure!(families == [false, true], "The Service has the addresses {addresses:?}.");
        Ok(())
    })
}

/// Ends `cargo e2e cluster up` with a signal, and checks what it leaves on the host.
fn ended_by(signal: Signal) -> Result<()> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_skein-e2e"))
        .args(["cluster", "up", "--nodes", "1"])
        .stdout(Stdio::piped())
        .spawn()?;
    let output = BufReader::new(child.stdout.take().context("no output")?);
    let is_up = output.lines().map_while(Result::ok).any(|line| line.starts_with("Ctrl-C"));
    let processes = processes_of(child.id());
    let pid = Pid::from_raw(child.id().cast_signed()).context("no process id")?;
    kill_process(pid, signal)?;
    let status = child.wait()?;
    let is_complete = is_up && processes.len() > 5;
    ensure!(is_complete, "The cluster was not up: {status}, {processes:?}");
    if signal == Signal::KILL {
        // After SIGKILL, the next run cleans up.
        registry::sweep();
    }
    let left = remains_of(child.id());
    ensure!(left.is_empty(), "The cluster left: {left:?}");
    let alive = processes_of(child.id());
    ensure!(alive.is_empty(), "These processes still run: {alive:?}");
    Ok(())
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn interrupted_cluster_leaves_nothing() -> Result<()> {
    ended_by(Signal::INT)
}

#[test]
#[ignore = "takes a cluster: cargo e2e cluster test"]
fn killed_cluster_is_cleaned_up_by_the_next_run() -> Result<()> {
    ended_by(Signal::KILL)
}
