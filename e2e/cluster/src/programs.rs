//! Programs of a cluster. Some come from Debian packages. Kubernetes and helm are in a cache
//! outside of the working tree; the first use of the cache fetches and builds them. The environment
//! variable [`OTHER`] selects a directory with the programs of another version of Kubernetes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use skein_lab::console::Console;
use skein_lab::programs::cache;
use skein_lab::{cargo, newer, packages};
use skein_lab::{image, process};

/// Name of the environment variable with the directory of another version of Kubernetes. The
/// programs of the directory, of version 1.31 or later, replace the Kubernetes of the cache.
pub const OTHER: &str = "SKEIN_KUBERNETES";

/// Programs that `e2e/cluster/build.sh` builds.
const KUBERNETES: [&str; 6] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];

/// Oldest minor version of Kubernetes 1 that [`OTHER`] may name. Kubelets before 1.31 lack settings
/// that these clusters use.
const MIN_OTHER_MINOR: u32 = 31;

/// Image with busybox, whose default command sleeps for ever. It is also the image of pod
/// sandboxes.
pub const BUSYBOX: &str = "skein.local/busybox:1";

/// Image with busybox and the programs of [`TOOLS_OF_HOST`].
pub const TOOLS: &str = "skein.local/tools:1";

/// Programs of this host in the image [`TOOLS`].
const TOOLS_OF_HOST: [&str; 8] =
    ["iperf3", "ping", "curl", "ip", "ss", "ethtool", "nft", "conntrack"];

/// Paths of the programs of a cluster.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Directory of Kubernetes' programs.
    pub kubernetes: PathBuf,
    /// Path of the program `helm`.
    pub helm: PathBuf,
    /// Root directory of a current container runtime. On every machine of the cluster, the
    /// subdirectory `usr` of this directory is mounted over `/usr` as an overlay, so that its files
    /// replace files with the same path. `None` for the Kubernetes of the cache, which runs on the
    /// containerd of the test host.
    pub(super) runtime: Option<PathBuf>,
}

impl Programs {
    /// Returns the path of `kubectl`, `helm` or another program of Kubernetes.
    pub fn path(&self, name: &str) -> PathBuf {
        if name == "helm" { self.helm.clone() } else { self.kubernetes.join(name) }
    }
}

/// Returns the directory that [`OTHER`] names.
pub fn other() -> Option<PathBuf> {
    std::env::var_os(OTHER).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Finds the programs without fetching or building any.
///
/// # Errors
/// If a program is missing, or if the directory of [`OTHER`] has a version before 1.31.
pub(super) fn find() -> Result<Programs> {
    let other = other();
    let bin = cache()?.join("bin");
    let kubernetes = other.clone().unwrap_or_else(|| bin.clone());
    if let Some(name) = KUBERNETES.iter().find(|name| !kubernetes.join(name).is_file()) {
        let remedy = match other {
            None => "Run `cargo e2e cluster build`.".to_owned(),
            Some(_) => format!("{OTHER} must name a directory with {}.", KUBERNETES.join(", ")),
        };
        bail!("no {name} in {}. {remedy}", kubernetes.display());
    }
    let runtime = match &other {
        None => None,
        Some(directory) => {
            let minor = minor_version(&directory.join("kubelet"))?;
            ensure!(
                minor >= MIN_OTHER_MINOR,
                "{OTHER}: Kubernetes 1.{minor} is older than 1.{MIN_OTHER_MINOR}"
            );
            Some(newer::root()?)
        }
    };
    let helm = bin.join("helm");
    ensure!(helm.is_file(), "no helm in {}. Run `cargo e2e cluster build`.", bin.display());
    Ok(Programs { kubernetes, helm, runtime })
}

/// Returns the minor version that a kubelet prints: 36 for `Kubernetes v1.36.1`.
fn minor_version(kubelet: &Path) -> Result<u32> {
    let text = process::run(Command::new(kubelet).arg("--version"))?;
    let minor = text.trim().strip_prefix("Kubernetes v1.").and_then(|rest| rest.split('.').next());
    minor
        .and_then(|minor| minor.parse().ok())
        .with_context(|| format!("{} printed no version: `{}`", kubelet.display(), text.trim()))
}

/// Installs, fetches or builds missing programs, and returns the paths of all.
///
/// # Errors
/// If a package cannot be installed, or a program cannot be built or fetched.
pub fn build(console: &Console) -> Result<Programs> {
    packages::ensure(&[packages::DEMO, packages::CLUSTER], console)?;
    if other().is_some() {
        skein_lab::programs::helm()?;
        return find();
    }
    if let Ok(programs) = find() {
        return Ok(programs);
    }
    packages::ensure(&[packages::CLUSTER_BUILD], console)?;
    console.step("building Kubernetes (about ten minutes, once)");
    let script = cargo::workspace().join("e2e/cluster/build.sh");
    let mut command = Command::new("bash");
    command.arg(&script).arg(cache()?).stdin(Stdio::null());
    let status = console.pause(|| command.status()).context("starting bash")?;
    if !status.success() {
        bail!("building Kubernetes failed: {} ended with {status}", script.display());
    }
    find()
}

/// Makes the images [`BUSYBOX`] and [`TOOLS`] in `directory` and returns the paths of their
/// archives.
pub(super) fn images(directory: &Path) -> Result<Vec<PathBuf>> {
    let path = "PATH=/usr/bin:/bin";
    let config = json!({ "Cmd": ["/bin/sleep", "infinity"], "Env": [path] });
    let root = directory.join("root");
    let paths = [directory.join("busybox.tar"), directory.join("tools.tar")];
    image::busybox(&root)?;
    image::write(&root, BUSYBOX, &config, &paths[0])?;
    image::add_programs(&root, &TOOLS_OF_HOST)?;
    image::write(&root, TOOLS, &config, &paths[1])?;
    fs::remove_dir_all(&root)?;
    Ok(paths.into())
}
