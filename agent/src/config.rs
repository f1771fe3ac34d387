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
mod policy;
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
pub use self::policy::{Policy, PolicyMode};
use crate::failure::Failure;
use crate::logging::Log;

/// Path of the configuration file, unless the command line sets another.
pub const DEFAULT_PATH: &str = "/etc/skein/agent.toml";

/// File name of the node's private key in the state directory.
pub const KEY: &str = "node.key";

/// Default UDP port of a node record and of `underlay.port`.
pub const DEFAULT_PORT: u16 = 51900;

/// Validated configuration of the agent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Name of this node.
    pub name: String,
    /// Identity of the cluster, 1 to 200 bytes. Nodes with different identities establish no
    /// session.
    pub cluster_id: String,
    /// Directory of the node's key, the last valid node records and the lock of the role.
    pub state_dir: PathBuf,
    /// File of the private key; `None`: `node.key` in the state directory.
    pub private_key_file: Option<PathBuf>,
    /// Schedule of key rotations.
    pub key_rotation: KeyRotation,
    /// Path of the file or directory of node records.
    pub nodes: PathBuf,
    /// Pod CIDRs of this node; `None`: those of its own record.
    pub pod_cidrs: Option<Vec<IpNet>>,
    /// Prefixes that contain the pod CIDRs of all nodes; empty if they are not restricted.
    pub cluster_cidrs: Vec<IpNet>,
    /// Settings of the TUN device.
    pub interface: Interface,
    /// Settings of the UDP sockets.
    pub underlay: UnderlaySettings,
    /// Settings of the data process.
    pub dataplane: Dataplane,
    /// Offload capabilities that the data process may use.
    pub offload: OffloadSettings,
    /// HTTP listener for metrics, liveness and readiness.
    pub metrics: Metrics,
    /// HTTP listener of the status page.
    pub status_page: StatusPage,
    /// Settings of the control socket.
    pub control: Control,
    /// Settings of the CNI plugin and of pods.
    pub cni: Cni,
    /// Protections of the pod network with nftables.
    pub firewall: Firewall,
    /// Settings of network policies.
    pub policy: Policy,
    /// Settings of the Kubernetes API.
    pub kubernetes: Kubernetes,
    /// Level and format of the log.
    pub log: Log,
    /// Defaults that this host does not support, one sentence each, for the log and the status.
    pub notes: Vec<String>,
}

impl Config {
    /// Reads and validates a configuration file. `name` overrides the name of the node.
    ///
    /// # Errors
    /// [`Failure::Usage`] if the file cannot be read, if a key or a value is not valid, or if
    /// `name` is not a valid name.
    pub fn load(path: &Path, name: Option<&str>) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::Usage(format!(
                "cannot read the configuration {}: {error}. Set the file with --config.",
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

    /// Parses and validates the text of a configuration file.
    ///
    /// # Errors
    /// The text is not TOML, a key is unknown, or a value is not valid. The error names the key,
    /// the value and the remedy.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let file: file::File =
            toml::from_str(text).map_err(|error| Invalid(toml_error(text, &error)))?;
        file.validate()
    }

    /// Returns the path of the private key.
    pub fn key_path(&self) -> PathBuf {
        self.private_key_file.clone().unwrap_or_else(|| self.state_dir.join(KEY))
    }

    /// Returns the alias (IFLA_IFALIAS) by which the agent recognizes its interface.
    pub fn alias(&self) -> String {
        format!("{ALIAS_PREFIX}{}", self.name)
    }
}

/// Error of a configuration: key, value and remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid(String);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The text can contain a value of any length.
        f.write_str(&message_excerpt(&self.0))
    }
}

impl std::error::Error for Invalid {}

/// Formats an error of the TOML parser in one line, with the number and an excerpt of the line.
pub fn toml_error(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let Some(number) = before.map(|before| before.matches('\n').count()) else {
        return message_excerpt(error.message()).into_owned();
    };
    let line = excerpt(text.lines().nth(number).unwrap_or_default().trim());
    format!("line {} ({line}): {}", number + 1, message_excerpt(error.message()))
}

/// Checks that `name` is a valid name of a node.
///
/// # Errors
/// The name is empty, longer than 200 bytes, or has other characters than letters, digits, `-`, `.`
/// and
/// `_`.
pub fn check_node_name(name: &str) -> Result<(), Invalid> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if name.is_empty() || name.len() > 200 || !name.chars().all(plain) {
        let name = excerpt(name);
        let text = format!("name = {name:?}: use 1 to 200 letters, digits, '-', '.' and '_'");
        return Err(Invalid(text));
    }
    Ok(())
}
