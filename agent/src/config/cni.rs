//! Configuration table `[cni]`: pods, the CNI plugin and their nftables table.

use std::path::PathBuf;

use ipnet::IpNet;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use skein_cni_protocol::names::check_name;
use skein_core::address;

use super::parse::path_if_any;
use super::{DEFAULT_INTERFACE, Invalid};

/// Name of the nftables table of an agent with pods, or with the default interface.
const DEFAULT_TABLE: &str = "skein";

/// Settings of the CNI plugin and of pods.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cni {
    /// Enables the CNI server, which attaches pods.
    pub enabled: bool,
    /// Path of the unix socket that receives the plugin's requests.
    pub socket: PathBuf,
    /// Directory in which the plugin stores DEL requests while the agent does not answer.
    pub spool: PathBuf,
    /// Directory in which the plugin is installed. `None` if the plugin is not installed.
    #[serde(deserialize_with = "path_if_any")]
    pub bin_dir: Option<PathBuf>,
    /// Further directories in which the container runtime searches plugins.
    pub plugin_dirs: Vec<PathBuf>,
    /// Directory of the network configuration. `None` if no configuration is written.
    #[serde(deserialize_with = "path_if_any")]
    pub conf_dir: Option<PathBuf>,
    /// File name of the network configuration, with the suffix `.conflist`.
    pub conf_file: String,
    /// Path of the plugin's binary to install. `None` means `skein-cni` in the directory of the
    /// agent's binary.
    pub plugin: Option<PathBuf>,
    /// Name of the network in the network configuration, 1 to 200 bytes.
    pub network: String,
    /// Renames configurations in `conf_dir` that sort before Skein's, so that the runtime ignores
    /// them.
    pub exclusive: bool,
    /// Plugins that follow Skein's plugin in the chain.
    pub chain: Vec<serde_json::Value>,
    /// Adds accept rules for pods to chains of other programs whose policy is drop.
    pub forward_accept: bool,
    /// Masquerades packets of pods to destinations outside of the pod network.
    pub masquerade: bool,
    /// Destinations outside of the cluster's pod CIDRs to which packets are not masqueraded.
    #[serde(deserialize_with = "destinations")]
    pub no_masquerade: Vec<IpNet>,
    /// Name of the nftables table.
    #[serde(deserialize_with = "table_name")]
    pub table: String,
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            enabled: false,
            socket: skein_cni_protocol::DEFAULT_SOCKET.into(),
            spool: skein_cni_protocol::DEFAULT_SPOOL.into(),
            bin_dir: Some("/opt/cni/bin".into()),
            plugin_dirs: Vec::new(),
            conf_dir: Some("/etc/cni/net.d".into()),
            conf_file: "10-skein.conflist".to_owned(),
            plugin: None,
            network: "skein".to_owned(),
            exclusive: false,
            chain: vec![serde_json::json!({
                "type": "portmap",
                "capabilities": { "portMappings": true },
            })],
            // Off, because the rules would open chains that are closed on purpose.
            forward_accept: false,
            masquerade: true,
            no_masquerade: Vec::new(),
            // The default depends on the name of the interface: `set_defaults`.
            table: String::new(),
        }
    }
}

impl Cni {
    /// Sets the values that the file can leave to the agent. `interface` is the name of the
    /// overlay's interface. Agents without pods can share a network namespace; each has its own
    /// interface, and therefore its own table.
    pub(super) fn set_defaults(&mut self, interface: &str) {
        self.plugin_dirs.retain(|path| !path.as_os_str().is_empty());
        if !self.table.is_empty() {
            return;
        }
        let word = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        self.table = match self.enabled || interface == DEFAULT_INTERFACE {
            true => DEFAULT_TABLE.to_owned(),
            false => {
                format!("{DEFAULT_TABLE}_{}", interface.chars().map(word).collect::<String>())
            }
        };
    }

    pub(super) fn check(&self) -> Result<(), Invalid> {
        let name = &self.conf_file;
        let suffix = [".conflist", ".conf", ".json"].iter().any(|suffix| name.ends_with(suffix));
        if name.contains('/') || name.starts_with('.') || !name.ends_with(".conflist") {
            let hint = if suffix {
                "The file is a list of plugins."
            } else {
                "Runtimes ignore other files."
            };
            return Err(Invalid(format!(
                "cni.conf_file = {name:?}: use a file name that ends in .conflist. {hint}"
            )));
        }
        check_name("cni.network", &self.network).map_err(|error| Invalid(error.to_string()))?;
        if self.network.len() > 200 {
            return Err(Invalid("cni.network: use 1 to 200 bytes".to_owned()));
        }
        for plugin in &self.chain {
            if plugin.get("type").and_then(|kind| kind.as_str()).is_none_or(str::is_empty) {
                return Err(Invalid(format!(
                    "cni.chain: {plugin} has no \"type\". Set \"type\" to the name of the plugin."
                )));
            }
        }
        self.check_paths()
    }

    /// Requires absolute paths, because the plugin receives the paths and runs in another
    /// directory.
    fn check_paths(&self) -> Result<(), Invalid> {
        let paths = [
            ("socket", Some(&self.socket)),
            ("spool", Some(&self.spool)),
            ("bin_dir", self.bin_dir.as_ref()),
            ("conf_dir", self.conf_dir.as_ref()),
        ];
        let directories = self.plugin_dirs.iter().map(|path| ("plugin_dirs", Some(path)));
        for (key, path) in paths.into_iter().chain(directories) {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                let shown = path.display();
                return Err(Invalid(format!("cni.{key} = {shown}: use an absolute path")));
            }
        }
        Ok(())
    }
}

fn table_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let table = String::deserialize(deserializer)?;
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if !(1..=32).contains(&table.len())
        || !table.chars().all(word)
        || !table.starts_with(|c: char| c.is_ascii_alphabetic())
    {
        return Err(D::Error::custom(Invalid(format!(
            "cni.table = {table:?}: use 1 to 32 letters, digits and '_', beginning with a letter"
        ))));
    }
    Ok(table)
}

fn destinations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| destination(text)).collect::<Result<_, _>>().map_err(D::Error::custom)
}

fn destination(text: &str) -> Result<IpNet, Invalid> {
    let net: IpNet = address::parse(text).map_err(|_| {
        Invalid(format!("cni.no_masquerade: {text:?} is not a prefix. Use an address and a length, as 192.0.2.0/24."))
    })?;
    Ok(net.trunc())
}
