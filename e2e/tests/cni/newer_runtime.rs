//! A current container runtime (containerd 2, runc 1.3 of a newer Debian suite) with the plugin.
//!
//! [`traces`] lists what pods leave on a node (interfaces, routes, rules and so on); [`same`]
//! compares the list after a test with the list before.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use crate::cri::Cri;
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use skein_lab::agent::{Agent, Cluster};
use skein_lab::cni::{same, traces};
use skein_lab::containerd::Containerd;
use skein_lab::pods::{list, node, prepared, put_list};
use skein_lab::{checks, newer};

/// Maximum time until the agent, which checks every 10 s, has repaired the list.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(20);

/// A node with an agent and containerd 2.
struct Node {
    // Declared before the cluster, so that containerd is dropped first.
    containerd: Containerd,
    cluster: Cluster,
}

impl Node {
    fn up(change: impl Fn(&mut Agent)) -> Result<Self> {
        let mut cluster = prepared(1, change)?;
        let agent = &cluster.agents[0];
        let ns = &cluster.lab.nodes[0].ns;
        let containerd = Containerd::start_newer(agent, ns, cluster.lab.directory())?;
        let version = containerd.ctr(&["version"])?.stdout;
        ensure!(version.contains("Version:  2."), "not containerd 2: {version}");
        cluster.start()?;
        Ok(Self { containerd, cluster })
    }

    fn agent(&self) -> &Agent {
        &self.cluster.agents[0]
    }

    fn cri(&self) -> Result<Cri> {
        let cri = Cri::connect(&self.containerd.socket(), &self.containerd.cgroup)?;
        checks::eventually("the network is ready", REPAIR_TIMEOUT, || cri.network_ready())
            .with_context(|| self.containerd.log_tail())?;
        Ok(cri)
    }

    fn offers(&self, newest: &str) -> Result<()> {
        checks::eventually(newest, REPAIR_TIMEOUT, || {
            let list = list(self.agent())?;
            Ok(list["cniVersions"].as_array().and_then(|all| all.last()) == Some(&newest.into()))
        })
        .map(drop)
    }
}

/// Replaces the reference plugins by those of the newer suite.
fn use_newer_plugins(agent: &Agent) -> Result<()> {
    let (from, bin) = (newer::root()?.join("usr/lib/cni"), agent.cni_directory("bin_dir"));
    for name in ["portmap", "loopback"] {
        let new = bin.join("new");
        fs::copy(from.join(name), &new)?;
        fs::rename(new, bin.join(name))?;
    }
    Ok(())
}

/// Debian 12's portmap 1.1.1 refuses CNI 1.1.0, which containerd 2 prefers.
#[test]
fn pods_start_and_end_with_old_portmap_in_the_list() -> Result<()> {
    let machine = Node::up(|_| ())?;
    let cri = machine.cri()?;
    machine.offers("1.0.0").context("this test needs portmap before 1.6, as Debian 12 has")?;
    // portmap creates chains for its first pod and never removes them.
    cri.remove(&cri.run("first", &[(8081, 81)])?)?;
    let before = traces(node(&machine.cluster, 0))?;
    let a = cri.run("a", &[(8080, 80)])?;
    ensure!(
        cri.addresses(&a)?.len() == 2,
        "The pod does not have two addresses: {:?}",
        cri.addresses(&a)?
    );
    cri.container(&a, "main", &["sleep", "1000"])?;
    // The plugins are updated under a running pod.
    use_newer_plugins(machine.agent())?;
    machine.offers("1.1.0")?;
    checks::eventually("containerd has read the list", checks::EVENT_TIMEOUT, || {
        cri.network_ready()
    })?;
    let b = cri.run("b", &[])?;
    ensure!(
        cri.addresses(&b)?.len() == 2,
        "The pod does not have two addresses: {:?}",
        cri.addresses(&b)?
    );
    cri.remove(&b)?;
    cri.remove(&a)?;
    same(&before, &traces(node(&machine.cluster, 0))?)
}

/// Shows why the agent offers only CNI versions that all plugins of the list support: with CNI
/// 1.1.0 in the list, the old plugin prevents the deletion of a pod.
#[test]
fn list_newer_than_a_plugin_fails_deletions() -> Result<()> {
    let mut machine = Node::up(|_| ())?;
    let cri = machine.cri()?;
    machine.offers("1.0.0").context("this test needs portmap before 1.6, as Debian 12 has")?;
    let pod = cri.run("a", &[])?;
    // Without the agent, the list is not repaired.
    machine.cluster.agents[0].stop()?;
    let mut list = list(machine.agent())?;
    list["cniVersions"] = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    put_list(machine.agent(), &list)?;
    // containerd reads the list by inotify.
    std::thread::sleep(Duration::from_secs(3));
    let error = cri.remove(&pod).err().context("the pod ends with a list that portmap refuses")?;
    let text = format!("{error:#}");
    ensure!(
        text.contains("portmap") && text.contains("incompatible CNI versions"),
        "The error names another cause: {text}"
    );
    machine.cluster.agents[0].start()?;
    machine.offers("1.0.0")?;
    checks::eventually("the pod ends", REPAIR_TIMEOUT, || Ok(cri.remove(&pod).is_ok())).map(drop)
}

/// Appends a plugin to the list, like istio-cni and linkerd-cni.
#[test]
fn plugin_that_another_program_appends_is_called() -> Result<()> {
    let machine = Node::up(|_| ())?;
    let cri = machine.cri()?;
    let (agent, calls) = (machine.agent(), machine.cluster.lab.directory().join("calls"));
    let plugin = agent.cni_directory("bin_dir").join("istio-cni");
    let versions =
        json!({ "cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0"] });
    // The plugin returns the result of the previous plugins unchanged.
    let script = format!(
        "#!/bin/sh
         input=$(cat)
         [ \"$CNI_COMMAND\" = VERSION ] && echo '{versions}' && exit
         echo \"$CNI_COMMAND\" >> {calls}
         [ \"$CNI_COMMAND\" != ADD ] || echo \"$input\" | sed 's/.*\"prevResult\":\\({{.*}}\\),\"type\".*/\\1/'
        ",
        calls = calls.display()
    );
    fs::write(&plugin, script)?;
    fs::set_permissions(&plugin, Permissions::from_mode(0o755))?;
    let mut list = list(machine.agent())?;
    let plugins = list["plugins"].as_array_mut().context("plugins")?;
    plugins.push(json!({ "type": "istio-cni" }));
    put_list(agent, &list)?;
    // The wait is longer than the time after which earlier versions removed the entry.
    std::thread::sleep(Duration::from_secs(11));
    let pod = cri.run("a", &[])?;
    ensure!(
        cri.addresses(&pod)?.len() == 2,
        "The pod does not have two addresses: {:?}",
        cri.addresses(&pod)?
    );
    cri.remove(&pod)?;
    let called = fs::read_to_string(&calls)?;
    ensure!(
        called.contains("ADD") && called.contains("DEL"),
        "The plugin was not called for ADD and DEL: {called}"
    );
    ensure!(
        self::list(machine.agent())?["plugins"][2]["type"] == "istio-cni",
        "The entry of istio-cni was removed: {}",
        self::list(machine.agent())?
    );
    Ok(())
}

#[test]
fn runtime_status_returns_soon_while_agent_hangs() -> Result<()> {
    let machine = Node::up(|agent| {
        // STATUS needs CNI 1.1.0 of all plugins.
        use_newer_plugins(agent).expect("the plugins of the newer suite are needed");
    })?;
    let cri = machine.cri()?;
    machine.offers("1.1.0")?;
    let pod = cri.run("a", &[])?;
    let pid = machine.agent().control_pid().and_then(Pid::from_raw).context("no agent")?;
    kill_process(pid, Signal::STOP)?;
    let began = Instant::now();
    let problem = cri.network_problem();
    let took = began.elapsed();
    kill_process(pid, Signal::CONT)?;
    let problem = problem?.context("the runtime reports a network while the agent hangs")?;
    ensure!(
        problem.contains("did not answer within 5 s"),
        "The runtime reports another problem: {problem}"
    );
    // kubelet stops synchronising pods after 30 s without an answer.
    ensure!(took < Duration::from_secs(10), "the runtime's status took {took:?}");
    checks::eventually("the network is ready again", REPAIR_TIMEOUT, || cri.network_ready())?;
    cri.remove(&pod)
}
