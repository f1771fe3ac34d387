//! CNI server of an agent: its configuration and its directories.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Agent;

/// Reference plugins: `loopback`, which containerd calls itself, `portmap`, which follows Skein's
/// plugin by default, and two that may follow it.
const REFERENCE_PLUGINS: [&str; 4] = ["loopback", "portmap", "bandwidth", "tuning"];

impl Agent {
    /// Enables the CNI server, with all its files in the agent's own directory, and copies the
    /// reference plugins to `cni.bin_dir`.
    ///
    /// # Errors
    /// If a reference plugin is not installed or cannot be copied.
    pub fn serve_pods(&mut self) -> Result<()> {
        let path = |file: &str| self.directory.join(file).to_string_lossy().into_owned();
        let paths = ["cni.sock", "spool", "bin", "net.d"].map(path);
        for (key, path) in ["socket", "spool", "bin_dir", "conf_dir"].into_iter().zip(paths) {
            self.set(&format!("cni.{key}"), path);
        }
        self.set("cni.enabled", true);
        let bin = self.cni_directory("bin_dir");
        fs::create_dir_all(&bin)?;
        REFERENCE_PLUGINS.iter().try_for_each(|name| {
            fs::copy(Path::new("/usr/lib/cni").join(name), bin.join(name))
                .map(drop)
                .with_context(|| format!("cannot copy {name} of containernetworking-plugins"))
        })
    }

    /// Returns the path of the socket for the CNI plugin. Call [`Agent::serve_pods`] first.
    pub fn cni_socket(&self) -> &str {
        self.text("cni", "socket")
    }

    /// Returns the directory in which the plugin stores DEL requests while the agent does not
    /// answer. Call [`Agent::serve_pods`] first.
    pub fn cni_spool(&self) -> &Path {
        Path::new(self.text("cni", "spool"))
    }

    /// Returns the directory that the entry `key` of the table `[cni]` names. Call
    /// [`Agent::serve_pods`] first.
    pub fn cni_directory(&self, key: &str) -> PathBuf {
        self.text("cni", key).into()
    }
}
