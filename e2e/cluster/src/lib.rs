//! A real Kubernetes on one host. Every node is a machine with containerd, kubelet and kube-proxy;
//! another machine runs etcd, the API server, the controllers and the scheduler. No network plugin
//! is installed.

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
use skein_lab::{LabPermit, Netns, UNDERLAY, link, registry};

/// Number of the control plane's machine, the last part of its addresses.
const CONTROL: u8 = 2;

/// Base of the nodes' numbers: node 1 has the number 11.
const NODE_BASE: u8 = 10;

/// Maximum time until the API server is ready.
const API_TIMEOUT: Duration = Duration::from_secs(90);

/// Maximum time until all nodes are registered at the API server.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum time of one command of kubectl or helm.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);

/// Plan of a cluster.
#[derive(Debug, Clone)]
pub struct Options {
    /// Number of nodes, 1 to 100.
    pub nodes: u8,
    /// Pods and Services have an address of each family.
    pub dual_stack: bool,
    /// MTU of the underlay, bytes.
    pub mtu: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 2, dual_stack: false, mtu: 1500 }
    }
}

/// A running cluster. Dropping the value ends it, as does the end of the thread that started it. A
/// cluster needs a permit ([`LabPermit`]), as every laboratory does.
#[derive(Debug)]
pub struct Kube {
    /// Nodes `node1`, `node2` and so on, in this order.
    pub nodes: Vec<Node>,
    /// Machine of the control plane: `etcd`, `kube-apiserver`, `kube-controller-manager` and
    /// `kube-scheduler`.
    pub control: Machine,
    switch: Arc<Netns>,
    programs: Programs,
    kubeconfig: PathBuf,
    directory: Directory,
    _permit: LabPermit,
}

/// Directory that is removed when the value is dropped.
#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        registry::remove_directory(&self.0);
    }
}

impl Kube {
    /// Waits for a permit and starts a cluster. On return, the nodes are registered at the API
    /// server, but not Ready, because they have no network plugin.
    ///
    /// # Errors
    /// If the number of nodes is not 1 to 100, if the process does not run as root, if a program is
    /// missing, if there is no permit, or if a machine or a daemon does not start; with the logs
    /// of the daemons.
    pub fn up(options: &Options) -> Result<Self> {
        ensure!((1..=100).contains(&options.nodes), "a cluster has 1 to 100 nodes");
        if !rustix::process::geteuid().is_root() {
            bail!("creating machines needs root. Run this as root, for example with sudo.");
        }
        let programs = programs::find()?;
        let permit = LabPermit::acquire()?;
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
            let machine = machine(&format!("node{i}"), NODE_BASE + i)?;
            Node::new(machine, &pki, &ranges, &programs)
        });
        let nodes = nodes.collect::<Result<Vec<_>>>()?;
        let mut kube =
            Self { nodes, control, switch, programs, kubeconfig, directory, _permit: permit };
        kube.start().with_context(|| kube.logs())?;
        Ok(kube)
    }

    /// Switches all machines on. They do their slow work concurrently.
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
        self.wait("the nodes are registered", REGISTER_TIMEOUT, |kube| {
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
        self.wait("the API server is ready", API_TIMEOUT, |kube| {
            kube.kubectl(&["get", "--raw=/readyz"]).map(|answer| answer == "ok")
        })
        .map(drop)
    }

    /// Waits until `is` returns true and returns the time that this took. Polls five times per
    /// second. An error of `is` counts as false before the limit.
    ///
    /// # Errors
    /// If `is` has not returned true within `limit`, or at once if a daemon has exited.
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
                let message = || format!("did not occur within {} s: {what}", limit.as_secs());
                now.with_context(message)?;
                bail!(message());
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits until all these nodes are Ready if `ready` is true, or until none of them is Ready if
    /// `ready` is false.
    ///
    /// # Errors
    /// Those of [`Kube::wait`].
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

    /// Returns a command that runs on the switch, from which every machine is reachable, with the
    /// cluster's `KUBECONFIG`.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.switch.command(program);
        // kubectl and helm keep files in the home directory.
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.directory.0);
        command
    }

    /// Runs kubectl and returns its standard output.
    ///
    /// # Errors
    /// If kubectl fails, or does not exit within 300 s.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run("kubectl", arguments, "")
    }

    /// Runs helm and returns its standard output.
    ///
    /// # Errors
    /// If helm fails, or does not exit within 300 s.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        self.run("helm", arguments, "")
    }

    /// Runs `kubectl apply` for objects in YAML or JSON and returns its standard output.
    ///
    /// # Errors
    /// If kubectl fails, or does not exit within 300 s.
    pub fn apply(&self, objects: &str) -> Result<String> {
        self.run("kubectl", &["apply", "--filename=-"], objects)
    }

    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.command(self.program(program));
        let finished = process::finish(command.args(arguments), input.as_bytes(), COMMAND_TIMEOUT)?;
        if finished.code != 0 {
            let text = format!("{}{}", finished.stderr, finished.stdout);
            bail!("{program} {}: {}", arguments.join(" "), text.trim());
        }
        Ok(finished.stdout)
    }

    /// Imports an image (format of `docker save`) on every node that is switched on.
    ///
    /// # Errors
    /// If the file cannot be read, or if containerd refuses the image.
    pub fn load_image(&self, path: &Path) -> Result<()> {
        let copy = self.directory.0.join("image.tar");
        std::fs::copy(path, &copy).with_context(|| format!("reading {}", path.display()))?;
        let nodes = self.nodes.iter().filter(|node| node.is_on());
        // The imports run concurrently: they wait for the disk most of the time.
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

    /// Kills the API server. After SIGTERM, it would wait for its watchers for a minute.
    ///
    /// # Errors
    /// If the control plane has no API server.
    pub fn stop_api_server(&mut self) -> Result<()> {
        self.control.kill("kube-apiserver")
    }

    /// Starts the API server and waits until it is ready.
    ///
    /// # Errors
    /// If the API server does not start, or is not ready after 90 s.
    pub fn start_api_server(&mut self) -> Result<()> {
        self.control.start("kube-apiserver")?;
        self.wait_for_api()
    }

    /// Creates a namespace on the switch that is not a machine, with the addresses [`v4`] and
    /// [`v6`] of `number` on its `eth0`. A test runs a client of the API server there.
    ///
    /// # Errors
    /// If the namespace or its link cannot be created.
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

    /// Returns the path of one of the cluster's programs, such as `kubectl` or `helm`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.path(name)
    }

    /// Returns the namespace of the switch, a bridge `br0` with a port for every machine. A test
    /// can capture frames there, and reach every machine from the bridge's address.
    pub fn switch(&self) -> &Netns {
        &self.switch
    }

    /// Returns the path of the administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Returns the directory of the cluster's files, which is removed together with it. Machines
    /// see it under the same path.
    pub fn directory(&self) -> &Path {
        &self.directory.0
    }

    /// Returns the ends of all daemons' logs, for the message of a failure.
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
