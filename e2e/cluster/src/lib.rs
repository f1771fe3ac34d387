//! A real Kubernetes on one host: every node a machine of its own with containerd, kubelet and
//! kube-proxy, beside one with etcd, the API server, the controllers and the scheduler. No network
//! plugin is installed: that is for whoever uses it.

#![forbid(unsafe_code)]

mod daemons;
mod machine;
mod node;
mod pki;
pub mod programs;
pub mod scale;
pub mod skein;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

pub use machine::{Machine, v4, v6};
pub use node::Node;

use daemons::Ranges;
use pki::Pki;
use programs::Programs;
use skein_lab::process;
use skein_lab::{Netns, Turn, UNDERLAY, link, registry};

/// Host number of the machine of the control plane.
const CONTROL: u8 = 2;

/// That of the first node is one more.
const FIRST_NODE: u8 = 10;

/// How long the API server may take to be ready.
const API_LIMIT: Duration = Duration::from_secs(90);

/// How long a node may take to be known to the API server.
const REGISTER_LIMIT: Duration = Duration::from_secs(60);

/// How long one command of kubectl or helm may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);

/// What to build.
#[derive(Debug, Clone)]
pub struct Options {
    /// Number of nodes.
    pub nodes: u8,
    /// Pods and Services have an address of each family.
    pub dual_stack: bool,
    /// MTU of the underlay in bytes.
    pub mtu: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 2, dual_stack: false, mtu: 1500 }
    }
}

/// A cluster, gone when dropped. As every laboratory it waits for its turn, and it ends too when
/// the thread ends that made it.
#[derive(Debug)]
pub struct Kube {
    /// The nodes: `node1`, `node2`, …
    pub nodes: Vec<Node>,
    /// The machine of the control plane: `etcd`, `kube-apiserver`, `kube-controller-manager` and
    /// `kube-scheduler`.
    pub control: Machine,
    switch: Arc<Netns>,
    programs: Programs,
    kubeconfig: PathBuf,
    directory: Directory,
    _turn: Turn,
}

/// Removed when dropped.
#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        registry::remove_directory(&self.0);
    }
}

impl Kube {
    /// Builds it; waits for its turn first. The nodes are known to the API server then, and not
    /// Ready, because they have no network.
    pub fn up(options: &Options) -> Result<Self> {
        ensure!((1..=100).contains(&options.nodes), "a cluster has 1 to 100 nodes");
        if !rustix::process::geteuid().is_root() {
            bail!("making machines out of namespaces needs root: run this as root");
        }
        let programs = programs::find()?;
        let turn = Turn::take()?;
        let directory = Directory(registry::directory("cluster")?);
        let ranges = Ranges::new(options.dual_stack, programs.runtime.is_some());
        let pki = Pki::create(directory.0.join("pki"), &format!("https://{}:6443", v4(CONTROL)))?;
        let kubeconfig = pki.kubeconfig("admin", "/O=system:masters/CN=admin")?;

        let switch = Arc::new(Netns::create("switch")?);
        link::bridge(&switch, machine::BRIDGE)?;
        switch.ip_batch(&[
            format!("link set {} mtu {}", machine::BRIDGE, options.mtu),
            format!("address add {}/24 dev {}", v4(1), machine::BRIDGE),
            format!("address add {}/64 dev {} nodad", v6(1), machine::BRIDGE),
        ])?;
        let machine = |name: &str, number| {
            Machine::new(name, number, &directory.0, &programs, &switch, options.mtu)
        };
        let mut control = machine("control", CONTROL)?;
        add_control_plane(&mut control, &pki, &ranges)?;
        let nodes = (1..=options.nodes).map(|i| {
            let machine = machine(&format!("node{i}"), FIRST_NODE + i)?;
            Node::new(machine, &pki, &ranges, &programs)
        });
        let nodes = nodes.collect::<Result<Vec<_>>>()?;
        let mut kube =
            Self { nodes, control, switch, programs, kubeconfig, directory, _turn: turn };
        kube.start().with_context(|| kube.logs())?;
        Ok(kube)
    }

    /// Switches all machines on. What takes time goes on in all of them at once.
    fn start(&mut self) -> Result<()> {
        self.control.boot()?;
        self.control.start("etcd")?;
        self.control.start("kube-apiserver")?;
        for node in &mut self.nodes {
            node.start_runtime()?;
        }
        let images = programs::images(&self.directory.0)?;
        for node in &mut self.nodes {
            node.wait_for_runtime()?;
        }
        for image in &images {
            self.load_image(image)?;
        }
        self.wait_for_api()?;
        self.control.start("kube-controller-manager")?;
        self.control.start("kube-scheduler")?;
        for node in &mut self.nodes {
            node.start_kubernetes()?;
        }
        self.wait("the nodes are known", REGISTER_LIMIT, |kube| {
            let known = kube.kubectl(&["get", "nodes", "--output=name"])?;
            Ok(known.lines().count() == kube.nodes.len())
        })
        .map(drop)
    }

    fn check_daemons(&mut self) -> Result<()> {
        self.control.check_daemons()?;
        self.nodes.iter_mut().try_for_each(|node| node.check_daemons())
    }

    fn wait_for_api(&mut self) -> Result<()> {
        self.wait("the API server is ready", API_LIMIT, |kube| {
            kube.kubectl(&["get", "--raw=/readyz"]).map(|answer| answer == "ok")
        })
        .map(drop)
    }

    /// Waits until `is` says so; how long that took. Looks five times a second, and fails at once
    /// where a daemon has ended of itself.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut is: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<Duration> {
        let start = Instant::now();
        loop {
            self.check_daemons()?;
            let now = is(self);
            if matches!(now, Ok(true)) {
                return Ok(start.elapsed());
            }
            if start.elapsed() > limit {
                now.with_context(|| format!("not within {} s: {what}", limit.as_secs()))?;
                bail!("not within {} s: {what}", limit.as_secs());
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits until these nodes are Ready, or are not.
    pub fn wait_ready(
        &mut self,
        nodes: &[usize],
        ready: bool,
        limit: Duration,
    ) -> Result<Duration> {
        let what = format!("nodes {nodes:?} are {}Ready", if ready { "" } else { "not " });
        self.wait(&what, limit, |kube| {
            nodes.iter().try_fold(true, |all, &i| Ok(all && kube.is_ready(i)? == ready))
        })
    }

    fn is_ready(&self, node: usize) -> Result<bool> {
        let path = "--output=jsonpath={.status.conditions[?(@.type=='Ready')].status}";
        Ok(self.kubectl(&["get", "node", self.nodes[node].name(), path])? == "True")
    }

    /// A command on the switch, from where every machine is reached; it finds the cluster in
    /// `KUBECONFIG`.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.switch.command(program);
        // Both keep files in the home directory.
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.directory.0);
        command
    }

    /// Runs kubectl, which must succeed; what it wrote to standard output.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run("kubectl", arguments, "")
    }

    /// Runs helm, which must succeed; what it wrote to standard output.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        self.run("helm", arguments, "")
    }

    /// `kubectl apply` of objects as YAML or JSON.
    pub fn apply(&self, objects: &str) -> Result<String> {
        self.run("kubectl", &["apply", "--filename=-"], objects)
    }

    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.command(self.program(program));
        let finished = process::finish(command.args(arguments), input.as_bytes(), COMMAND_LIMIT)?;
        if finished.code != 0 {
            let text = format!("{}{}", finished.stderr, finished.stdout);
            bail!("{program} {}: {}", arguments.join(" "), text.trim());
        }
        Ok(finished.stdout)
    }

    /// Imports an image (in the form of `docker save`) on every node that is switched on.
    pub fn load_image(&self, path: &Path) -> Result<()> {
        let copy = self.directory.0.join("image.tar");
        std::fs::copy(path, &copy).with_context(|| format!("reading {}", path.display()))?;
        let nodes = self.nodes.iter().filter(|node| node.is_on());
        // All at once: they wait for their disks most of the time.
        thread::scope(|scope| {
            let imports: Vec<_> = nodes
                .map(|node| {
                    let copy = &copy;
                    scope.spawn(move || node.load_image(copy))
                })
                .collect();
            let panicked = |_| Err(anyhow::anyhow!("an import panicked"));
            imports.into_iter().try_for_each(|import| import.join().unwrap_or_else(panicked))
        })?;
        std::fs::remove_file(&copy).context("removing a copy of an image")
    }

    /// Takes the API server away, at once: asked to end, it would wait a minute for its watchers.
    pub fn stop_api_server(&mut self) -> Result<()> {
        self.control.kill("kube-apiserver")
    }

    /// Starts it again and waits until it is ready.
    pub fn start_api_server(&mut self) -> Result<()> {
        self.control.start("kube-apiserver")?;
        self.wait_for_api()
    }

    /// A namespace that is on the switch and no machine, with the addresses [`v4`] and [`v6`] of
    /// `number` on its `eth0`: for a program of the test's own that talks to the API server.
    pub fn attach(&self, label: &str, number: u8) -> Result<Netns> {
        let port = format!("port{number}");
        let machine = Netns::create(label)?;
        link::veth((&machine, UNDERLAY), (&self.switch, &port), self.control.mtu())?;
        link::enslave(&self.switch, &port, machine::BRIDGE)?;
        machine.ip_batch(&[
            format!("address add {}/24 dev {UNDERLAY}", v4(number)),
            format!("address add {}/64 dev {UNDERLAY} nodad", v6(number)),
        ])?;
        Ok(machine)
    }

    /// The path of one of the cluster's programs: `kubectl`, `helm`, ….
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.path(name)
    }

    /// The switch: a bridge `br0` with a port for every machine, where a test can listen, and an
    /// address, from which it can reach every machine.
    pub fn switch(&self) -> &Netns {
        &self.switch
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A directory for files, gone with the cluster; machines see it under the same name.
    pub fn directory(&self) -> &Path {
        &self.directory.0
    }

    /// The ends of all logs, for whoever has to find out why something failed.
    pub fn logs(&self) -> String {
        let nodes = self.nodes.iter().map(|node| node.logs());
        std::iter::once(self.control.logs()).chain(nodes).collect()
    }
}

fn add_control_plane(control: &mut Machine, pki: &Pki, ranges: &Ranges) -> Result<()> {
    let names = format!(
        "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,\
         IP:{},IP:{},IP:{}",
        v4(CONTROL),
        v6(CONTROL),
        ranges.api
    );
    pki.certify("api-server", "/CN=kube-apiserver", Some(&names))?;
    pki.certify("api-server-client", "/O=system:masters/CN=kube-apiserver-client", None)?;
    for (file, user) in [
        ("controller-manager", "system:kube-controller-manager"),
        ("scheduler", "system:kube-scheduler"),
        ("proxy", "system:kube-proxy"),
    ] {
        pki.kubeconfig(file, &format!("/CN={user}"))?;
    }
    let state = control.disk_path("/etcd").to_string_lossy().into_owned();
    control.add_daemon("etcd", daemons::etcd(&state));
    control.add_daemon("kube-apiserver", daemons::api_server(pki, ranges, CONTROL));
    control.add_daemon("kube-controller-manager", daemons::controller_manager(pki, ranges));
    control.add_daemon("kube-scheduler", daemons::scheduler(pki));
    Ok(())
}
