//! The programs of a cluster: from Debian's packages, and Kubernetes and helm from a cache outside of
//! the clone, which the first use fills.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::console::Console;
use crate::lab::image;
use crate::{cargo, packages};

/// Built or fetched by `e2e/cluster/build.sh`.
const CACHED: [&str; 7] = [
    "helm",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];

/// Sleeps for ever, as what holds a pod's namespaces does; has every command of busybox.
pub const BUSYBOX: &str = "skein.local/busybox:1";

/// Beside [`BUSYBOX`]'s commands, [`TOOLS_OF_HOST`].
pub const TOOLS: &str = "skein.local/tools:1";

/// What the image [`TOOLS`] has of this host.
const TOOLS_OF_HOST: [&str; 8] =
    ["iperf3", "ping", "curl", "ip", "ss", "ethtool", "nft", "conntrack"];

/// The directory of the cache.
fn cache() -> Result<PathBuf> {
    let of = |key: &str| std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = of("SKEIN_CACHE")
        .or_else(|| of("XDG_CACHE_HOME").map(|path| path.join("skein")))
        .or_else(|| of("HOME").map(|path| path.join(".cache/skein")));
    Ok(base.context("none of SKEIN_CACHE, XDG_CACHE_HOME and HOME is set")?.join("kubernetes"))
}

/// The directory with the cached programs, which must be there.
pub(super) fn find() -> Result<PathBuf> {
    let bin = cache()?.join("bin");
    match CACHED.iter().find(|name| !bin.join(name).is_file()) {
        None => Ok(bin),
        Some(name) => bail!("no {name} in {}: run `cargo e2e cluster build`", bin.display()),
    }
}

/// Installs, fetches and builds what is missing; the directory with the cached programs.
pub fn build(console: &Console) -> Result<PathBuf> {
    packages::ensure(&[packages::DEMO, packages::CLUSTER], console)?;
    if let Ok(bin) = find() {
        return Ok(bin);
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

/// Makes the images; their files.
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
