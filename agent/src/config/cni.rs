//! The table `[cni]` as it is written, and its way to a valid [`Cni`].

use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;
use skein_cni_protocol::names::check_name;
use skein_core::address;

use super::{Cni, Invalid};

/// Name of the overlay's interface, unless the configuration has another.
pub(crate) const DEFAULT_INTERFACE: &str = "skein0";

/// Name of the nftables table of an agent with pods, or with the default interface.
const DEFAULT_TABLE: &str = "skein";

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct CniTable {
    enabled: bool,
    pub(super) socket: PathBuf,
    pub(super) spool: PathBuf,
    bin_dir: PathBuf,
    plugin_dirs: Vec<PathBuf>,
    conf_dir: PathBuf,
    conf_file: String,
    plugin: Option<PathBuf>,
    network: String,
    exclusive: bool,
    chain: Vec<serde_json::Value>,
    forward_accept: bool,
    masquerade: bool,
    no_masquerade: Vec<String>,
    table: Option<String>,
}

impl Default for CniTable {
    fn default() -> Self {
        Self {
            enabled: false,
            socket: skein_cni_protocol::DEFAULT_SOCKET.into(),
            spool: skein_cni_protocol::DEFAULT_SPOOL.into(),
            bin_dir: "/opt/cni/bin".into(),
            plugin_dirs: Vec::new(),
            conf_dir: "/etc/cni/net.d".into(),
            conf_file: "10-skein.conflist".to_owned(),
            plugin: None,
            network: "skein".to_owned(),
            exclusive: false,
            chain: vec![serde_json::json!({
                "type": "portmap",
                "capabilities": { "portMappings": true },
            })],
            // It opens what an allow-list by policy was to keep closed.
            forward_accept: false,
            masquerade: true,
            no_masquerade: Vec::new(),
            table: None,
        }
    }
}

impl CniTable {
    /// `interface` is the name of the overlay's interface.
    pub(super) fn validate(self, interface: &str) -> Result<Cni, Invalid> {
        let table = self.table.clone().unwrap_or_else(|| self.default_table(interface));
        let name = &self.conf_file;
        let suffix = [".conflist", ".conf", ".json"].iter().any(|suffix| name.ends_with(suffix));
        if name.contains('/') || name.starts_with('.') || !name.ends_with(".conflist") {
            let hint = if suffix { "it holds a list of plugins" } else { "others are not read" };
            return Err(Invalid(format!(
                "cni.conf_file = {name:?}: use a file name that ends in .conflist; {hint}"
            )));
        }
        check_name("cni.network", &self.network).map_err(|error| Invalid(error.to_string()))?;
        if self.network.len() > 200 {
            return Err(Invalid("cni.network: use 1 to 200 bytes".to_owned()));
        }
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if !(1..=32).contains(&table.len())
            || !table.chars().all(word)
            || !table.starts_with(|c: char| c.is_ascii_alphabetic())
        {
            return Err(Invalid(format!(
                "cni.table = {table:?}: use 1 to 32 letters, digits and '_', beginning with a letter"
            )));
        }
        for plugin in &self.chain {
            if plugin.get("type").and_then(|kind| kind.as_str()).is_none_or(str::is_empty) {
                return Err(Invalid(format!(
                    "cni.chain: {plugin} has no \"type\": name the plugin"
                )));
            }
        }
        let no_masquerade = self.no_masquerade.iter().map(|text| cidr(text));
        // The plugin, which is told the same, runs elsewhere.
        let paths = [
            ("socket", &self.socket),
            ("spool", &self.spool),
            ("bin_dir", &self.bin_dir),
            ("conf_dir", &self.conf_dir),
        ];
        let directories = self.plugin_dirs.iter().map(|path| ("plugin_dirs", path));
        for (key, path) in paths.into_iter().chain(directories) {
            if !path.as_os_str().is_empty() && !path.is_absolute() {
                let shown = path.display();
                return Err(Invalid(format!("cni.{key} = {shown}: use an absolute path")));
            }
        }
        let directory = |path: PathBuf| (!path.as_os_str().is_empty()).then_some(path);
        Ok(Cni {
            enabled: self.enabled,
            socket: self.socket,
            spool: self.spool,
            bin_dir: directory(self.bin_dir),
            plugin_dirs: self.plugin_dirs.into_iter().filter_map(directory).collect(),
            conf_dir: directory(self.conf_dir),
            conf_file: self.conf_file,
            plugin: self.plugin,
            network: self.network,
            exclusive: self.exclusive,
            chain: self.chain,
            forward_accept: self.forward_accept,
            masquerade: self.masquerade,
            no_masquerade: no_masquerade.collect::<Result<_, _>>()?,
            table,
        })
    }

    /// Returns the name of the table if none is configured. Agents without pods can share a network
    /// namespace; each has its own interface, and therefore its own table.
    fn default_table(&self, interface: &str) -> String {
        if self.enabled || interface == DEFAULT_INTERFACE {
            return DEFAULT_TABLE.to_owned();
        }
        let word = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        format!("{DEFAULT_TABLE}_{}", interface.chars().map(word).collect::<String>())
    }
}

fn cidr(text: &str) -> Result<IpNet, Invalid> {
    let net: IpNet = address::parse(text).map_err(|_| {
        Invalid(format!("cni.no_masquerade: {text:?} is no prefix: write it as 192.0.2.0/24"))
    })?;
    Ok(net.trunc())
}
