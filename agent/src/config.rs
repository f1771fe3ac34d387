//! The agent's configuration: a TOML file, parsed and validated once into one [`Config`], which is
//! logged at start. It holds paths of secrets, never secrets.

mod cidr;
mod cni;
mod dataplane;
mod file;
mod firewall;
mod http;
mod interface;
mod key_rotation;
mod kubernetes;
mod parse;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod underlay;

use std::fmt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Serialize;
use skein_cni_protocol::excerpt::{excerpt, message_excerpt};
use skein_ipc::{OffloadSettings, UnderlaySettings};
use skein_netlink::interface::ALIAS_PREFIX;

pub use self::cidr::{check_disjoint, check_inside, check_outside, check_pod_cidr, overlap};
pub use self::cni::Cni;
pub use self::dataplane::{Dataplane, Mode};
pub use self::firewall::Firewall;
pub use self::http::{Control, Metrics, StatusPage};
pub(crate) use self::interface::DEFAULT_INTERFACE;
pub use self::interface::Interface;
pub use self::key_rotation::KeyRotation;
pub use self::kubernetes::Kubernetes;
use crate::failure::Failure;
use crate::logging::Log;

/// Where the configuration lies if the command line does not say.
pub const DEFAULT_PATH: &str = "/etc/skein/agent.toml";

/// The node's private key in its state directory.
pub const KEY: &str = "node.key";

/// The UDP port of Skein, where a record or the configuration names none.
pub const DEFAULT_PORT: u16 = 51900;

/// Everything that the agent was told, validated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Name of this node.
    pub name: String,
    /// Nodes of different clusters never join.
    pub cluster_id: String,
    /// Key, last good records, lock.
    pub state_dir: PathBuf,
    /// The private key's file, where it is not in the state directory.
    pub private_key_file: Option<PathBuf>,
    /// When and how the key is changed.
    pub key_rotation: KeyRotation,
    /// File or directory of node records.
    pub nodes: PathBuf,
    /// What this node owns; `None`: what its own record says.
    pub pod_cidrs: Option<Vec<IpNet>>,
    /// What the pod CIDRs of every node lie in; empty: anywhere.
    pub cluster_cidrs: Vec<IpNet>,
    /// The TUN device.
    pub interface: Interface,
    /// The UDP side.
    pub underlay: UnderlaySettings,
    /// The data process.
    pub dataplane: Dataplane,
    /// Which rungs of the ladder may be used.
    pub offload: OffloadSettings,
    /// Prometheus metrics, health, readiness.
    pub metrics: Metrics,
    /// The status page.
    pub status_page: StatusPage,
    /// The status socket.
    pub control: Control,
    /// Pods.
    pub cni: Cni,
    /// Protections of the pod network by nftables.
    pub firewall: Firewall,
    /// The Kubernetes API.
    pub kubernetes: Kubernetes,
    /// Logging.
    pub log: Log,
    /// Defaults that this host cannot have, one sentence each, for the log and the status.
    pub notes: Vec<String>,
}

impl Config {
    /// Reads and validates a file. `name` overrides the node's.
    pub fn load(path: &Path, name: Option<&str>) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::Usage(format!(
                "cannot read the configuration {}: {error}: name the file with --config",
                path.display()
            ))
        })?;
        let mut config = Self::parse(&text).map_err(|error| {
            Failure::Usage(format!("configuration {}: {error}", path.display()))
        })?;
        if let Some(name) = name {
            check_node_name(name).map_err(|error| Failure::Usage(format!("--name: {error}")))?;
            config.name = name.to_owned();
        }
        Ok(config)
    }

    /// Validates the text of a configuration file.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let file: file::File =
            toml::from_str(text).map_err(|error| Invalid(toml_error(text, &error)))?;
        file.validate()
    }

    /// Where the private key lies.
    pub fn key_path(&self) -> PathBuf {
        self.private_key_file.clone().unwrap_or_else(|| self.state_dir.join(KEY))
    }

    /// What the interface is marked with (IFLA_IFALIAS), so that it is told from a stranger's.
    pub fn alias(&self) -> String {
        format!("{ALIAS_PREFIX}{}", self.name)
    }
}

/// What is wrong with a configuration: the key, the value, the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid(String);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A value of the configuration may be of any length.
        f.write_str(&message_excerpt(&self.0))
    }
}

impl std::error::Error for Invalid {}

/// A parser's complaint about `text` on one line, with the place.
pub fn toml_error(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let Some(number) = before.map(|before| before.matches('\n').count()) else {
        return message_excerpt(error.message()).into_owned();
    };
    let line = excerpt(text.lines().nth(number).unwrap_or_default().trim());
    format!("line {} ({line}): {}", number + 1, message_excerpt(error.message()))
}

/// Whether `name` can be the name of a node.
pub fn check_node_name(name: &str) -> Result<(), Invalid> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if name.is_empty() || name.len() > 200 || !name.chars().all(plain) {
        let name = excerpt(name);
        let text = format!("name = {name:?}: use 1 to 200 letters, digits, '-', '.' and '_'");
        return Err(Invalid(text));
    }
    Ok(())
}
