//! containerd on a node of the laboratory, from the system's Debian release or from a newer suite.
//! It has its own files and runs in mount and PID namespaces; killing it also ends all its
//! containers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::agent::Agent;
use super::process::{self, Finished, Process};
use super::{Netns, cgroup, image, registry};
use crate::{checks, newer};

/// Name of the only image: busybox, whose default command sleeps.
pub const IMAGE: &str = "localhost/skein-test:1";
/// Maximum time of a command of `ctr`.
const CTR_TIMEOUT: Duration = Duration::from_secs(60);

/// A running containerd, which ends with all its containers when the value is dropped.
#[derive(Debug)]
pub struct Containerd {
    process: Process,
    directory: PathBuf,
    /// Name of the cgroup that is the parent of all containers' cgroups.
    pub cgroup: String,
}

impl Containerd {
    /// Starts containerd for the node of `agent`. containerd uses the CNI plugin and the network
    /// configuration list of this agent.
    ///
    /// # Errors
    /// If containerd does not answer after 20 s, or if the image cannot be made or imported.
    pub fn start(agent: &Agent, node: &Netns, laboratory: &Path) -> Result<Self> {
        Self::start_from(None, agent, node, laboratory)
    }

    /// Starts containerd as [`Containerd::start`] does, with containerd and runc of a newer suite
    /// ([`crate::newer::root`]).
    ///
    /// # Errors
    /// If the newer suite cannot be fetched; otherwise those of [`Containerd::start`].
    pub fn start_newer(agent: &Agent, node: &Netns, laboratory: &Path) -> Result<Self> {
        Self::start_from(Some(&newer::root()?), agent, node, laboratory)
    }

    fn start_from(
        newer: Option<&Path>,
        agent: &Agent,
        node: &Netns,
        laboratory: &Path,
    ) -> Result<Self> {
        let directory = laboratory.join(format!("{}-containerd", agent.record.name));
        fs::create_dir_all(directory.join("cni-bin"))?;
        fs::create_dir_all(agent.cni_directory("conf_dir"))?;
        let image = image(&directory)?;
        let config = directory.join("config.toml");
        fs::write(&config, configuration(&directory, agent))?;
        let script = script(&directory, laboratory, agent, newer);
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}/{}", registry::NETNS_DIR, node.name()));
        command.args(["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["sh", "-ec", &script]);
        let process = Process::start(&mut command, &directory.join("log"))?;
        let cgroup = format!("{}{}", CGROUP_PREFIX, process.pid());
        let containerd = Self { process, directory, cgroup };
        checks::eventually("containerd answers", Duration::from_secs(20), || {
            Ok(containerd.ctr(&["version"])?.code == 0)
        })
        .with_context(|| containerd.process.log_tail(20))?;
        let path = image.to_string_lossy();
        for namespace in ["k8s.io", "default"] {
            let mut import = vec!["-n", namespace, "images", "import", "--snapshotter", "native"];
            // containerd 2 would unpack by its transfer service, which has no snapshotter
            // configured.
            import.extend(newer.map(|_| "--local"));
            import.push(&path);
            let imported = containerd.ctr(&import)?;
            if imported.code != 0 {
                bail!("cannot import the image: {}{}", imported.stdout, imported.stderr);
            }
        }
        Ok(containerd)
    }

    /// Returns the path of containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// Returns the last 20 lines of containerd's log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail(20)
    }

    /// Runs `ctr` in the namespaces of containerd, because `ctr` itself calls the CNI plugin.
    ///
    /// # Errors
    /// If containerd does not run, or if `ctr` does not exit within 60 s. An exit code other than 0
    /// is not an error.
    pub fn ctr(&self, arguments: &[&str]) -> Result<Finished> {
        let children = format!("/proc/{0}/task/{0}/children", self.process.pid());
        let first = fs::read_to_string(&children).unwrap_or_default();
        let Some(pid) = first.split_whitespace().next() else {
            bail!("containerd does not run yet:\n{}", self.process.log_tail(20));
        };
        let mut command = Command::new("nsenter");
        command.args(["-t", pid, "-m", "-p", "-n", "ctr", "-a"]).arg(self.socket()).args(arguments);
        process::finish(&mut command, &[], CTR_TIMEOUT)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The kernel kills process 1 of the PID namespace together with this process (unshare
        // --kill-child), and then all processes of the namespace.
        self.process.kill();
        cgroup::remove(&self.cgroup);
    }
}

const CGROUP_PREFIX: &str = "skein-e2e-";

/// Returns the script that runs before containerd in its mount namespace. `/opt/cni/bin` and
/// `/etc/cni/net.d`, which `ctr` reads, are the agent's. `/run`, except for the laboratory's files,
/// and `/var/lib`, where libcni keeps results, are containerd's own. `newer` is a root directory
/// whose `usr` is mounted over `/usr`.
fn script(directory: &Path, laboratory: &Path, agent: &Agent, newer: Option<&Path>) -> String {
    let layer = newer.map_or_else(String::new, |root| {
        format!("mount -t overlay -o lowerdir={}/usr:/usr overlay /usr", root.display())
    });
    let (own, lab) = (directory.display(), laboratory.display());
    let bin = agent.cni_directory("bin_dir");
    let conf = agent.cni_directory("conf_dir");
    format!(
        "mount --rbind {lab} /mnt
         mount -t tmpfs tmpfs /run
         mkdir -p {lab} /run/layers/upper /run/layers/work
         mount --move /mnt {lab}
         mount -t tmpfs tmpfs /opt
         mount -t tmpfs tmpfs /var/lib
         mkdir -p /opt/cni/bin
         mount --bind {bin} /opt/cni/bin
         mount -t overlay -o lowerdir=/etc,upperdir=/run/layers/upper,workdir=/run/layers/work overlay /etc
         mkdir -p /etc/cni/net.d
         mount --bind {conf} /etc/cni/net.d
         {layer}
         exec containerd --config {own}/config.toml",
        bin = bin.display(),
        conf = conf.display(),
    )
}

fn configuration(directory: &Path, agent: &Agent) -> String {
    let own = directory.display();
    format!(
        r#"version = 2
root = "{own}/root"
state = "{own}/state"
disabled_plugins = [
    "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper",
]
[grpc]
address = "{own}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
disable_apparmor = true
restrict_oom_score_adj = true
tolerate_missing_hugetlb_controller = true
disable_hugetlb_controller = true
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin}"
conf_dir = "{conf}"
"#,
        bin = agent.cni_directory("bin_dir").display(),
        conf = agent.cni_directory("conf_dir").display(),
    )
}

/// Makes the image and returns the path of its archive.
fn image(directory: &Path) -> Result<PathBuf> {
    let (root, path) = (directory.join("rootfs"), directory.join("image.tar"));
    image::busybox(&root)?;
    image::write(
        &root,
        IMAGE,
        &json!({ "Cmd": ["/bin/sleep", "100000"], "Env": ["PATH=/bin"] }),
        &path,
    )?;
    Ok(path)
}
