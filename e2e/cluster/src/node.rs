//! A node of a cluster: a machine with containerd, kubelet and kube-proxy.

use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::daemons::{self, NODE_FILES, Ranges};
use super::machine::{Machine, v4, v6};
use super::pki::Pki;
use super::programs::Programs;
use skein_lab::checks;
use skein_lab::process;

const CONTAINERD: &str = include_str!("../containerd.toml");

/// Configuration of containerd 2.
const CONTAINERD_2: &str = include_str!("../containerd-2.toml");

/// Directory of Debian's reference CNI plugins, relative to the root directory.
const PLUGINS: &str = "usr/lib/cni";

/// Maximum time until containerd answers.
const CONTAINERD_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum time of the import of an image.
const IMPORT_TIMEOUT: Duration = Duration::from_secs(180);

/// A node of a cluster, which dereferences to its [`Machine`].
#[derive(Debug)]
pub struct Node {
    machine: Machine,
    pki: Pki,
    ranges: Ranges,
}

impl Deref for Node {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl DerefMut for Node {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

impl Node {
    /// Writes the disk of a machine that is switched off. It has no network plugin:
    /// `/etc/cni/net.d` is empty, and `/opt/cni/bin` has the reference plugins only.
    ///
    /// # Errors
    /// If a file cannot be written, or if the reference plugins are missing.
    pub(super) fn new(
        machine: Machine,
        pki: &Pki,
        ranges: &Ranges,
        programs: &Programs,
    ) -> Result<Self> {
        let mut node = Self { machine, pki: pki.clone(), ranges: ranges.clone() };
        let name = node.name().to_owned();
        let files = node.disk_path(NODE_FILES);
        fs::create_dir_all(&files)?;
        let containerd = if ranges.is_1_31_or_later { CONTAINERD_2 } else { CONTAINERD };
        fs::write(files.join("containerd.toml"), containerd)?;
        fs::write(files.join("kubelet.json"), daemons::kubelet_settings(ranges).to_string())?;
        fs::copy(pki.path("ca.crt"), files.join("ca.crt"))?;
        let subject = format!("/O=system:nodes/CN=system:node:{name}");
        let kubeconfig = pki.kubeconfig(&format!("{name}-client"), &subject)?;
        fs::copy(kubeconfig, files.join("kubelet.kubeconfig"))?;
        node.certify()?;

        let bin = node.disk_path("/opt/cni/bin");
        fs::create_dir_all(&bin)?;
        let plugins = programs.runtime.as_deref().unwrap_or(Path::new("/")).join(PLUGINS);
        for plugin in fs::read_dir(&plugins).with_context(|| plugins.display().to_string())? {
            let plugin = plugin?;
            fs::copy(plugin.path(), bin.join(plugin.file_name()))?;
        }
        fs::create_dir_all(node.disk_path("/etc/cni/net.d"))?;

        let number = node.number();
        node.add_daemon("containerd", daemons::containerd());
        node.add_daemon("kubelet", daemons::kubelet(&name, ranges, number));
        node.add_daemon("kube-proxy", daemons::proxy(pki, &name, ranges));
        Ok(node)
    }

    /// Writes the kubelet's certificate for the present addresses, which the API server verifies.
    fn certify(&self) -> Result<()> {
        let (name, number) = (self.name(), self.number());
        let names = format!("DNS:{name},IP:{},IP:{}", v4(number), v6(number));
        self.pki.certify(name, &format!("/CN={name}"), Some(&names))?;
        for kind in ["crt", "key"] {
            let to = self.disk_path(&format!("{NODE_FILES}/kubelet.{kind}"));
            fs::copy(self.pki.path(&format!("{name}.{kind}")), to)?;
        }
        Ok(())
    }

    /// Switches the node on and starts its daemons, without waiting until the node is Ready.
    ///
    /// # Errors
    /// If the node is switched on already, if a daemon does not start, or if containerd does not
    /// answer after 30 s.
    pub fn power_on(&mut self) -> Result<()> {
        self.start_runtime()?;
        self.wait_for_runtime()?;
        self.start_kubernetes()
    }

    pub(super) fn start_runtime(&mut self) -> Result<()> {
        self.boot()?;
        self.start("containerd")
    }

    pub(super) fn wait_for_runtime(&mut self) -> Result<()> {
        checks::eventually("containerd answers", CONTAINERD_TIMEOUT, || {
            self.machine.check_daemons()?;
            Ok(process::finish(&mut self.ctr(&["version"])?, &[], CONTAINERD_TIMEOUT)?.code == 0)
        })
        .with_context(|| self.logs())
        .map(drop)
    }

    pub(super) fn start_kubernetes(&mut self) -> Result<()> {
        self.start("kubelet")?;
        self.start("kube-proxy")
    }

    /// Returns a command of `ctr` on this node, in Kubernetes' namespace `k8s.io`.
    ///
    /// # Errors
    /// If the node is switched off.
    pub fn ctr(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.command("ctr")?;
        command.args(["--namespace", "k8s.io"]).args(arguments);
        Ok(command)
    }

    /// Imports an image (format of `docker save`). The machine must see the file under this path.
    ///
    /// # Errors
    /// If the node is switched off, or if containerd refuses the image.
    pub fn load_image(&self, path: &Path) -> Result<()> {
        let mut command = self.ctr(&["images", "import", &path.to_string_lossy()])?;
        let finished = process::finish(&mut command, &[], IMPORT_TIMEOUT)?;
        if finished.code != 0 {
            bail!("{}: {}{}", process::describe(&command), finished.stdout, finished.stderr);
        }
        Ok(())
    }

    /// Changes the node's addresses on the underlay and restarts its kubelet with them.
    ///
    /// # Errors
    /// If `number` is 0 to 2, if the node is switched off, or if the kubelet does not restart.
    pub fn readdress(&mut self, number: u8) -> Result<()> {
        ensure!(number > 2, "the number {number} belongs to the control plane or to the switch");
        self.set_number(number)?;
        self.certify()?;
        let addresses = self.ranges.node_ip(number);
        self.set_option("kubelet", "node-ip", &addresses)?;
        self.restart("kubelet")
    }
}
