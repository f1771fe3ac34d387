//! What the plugin asks of the agent, and what the agent answers.
//!
//! One request a connection of a unix socket (`SOCK_STREAM`). Request and answer are each a frame: the
//! length of what follows in four bytes, little endian, then a JSON document of at most
//! [`MAX_FRAME`] bytes. A descriptor of the pod's network namespace comes with the first byte of
//! an ADD or a CHECK (`SCM_RIGHTS`), so that the agent needs no view of the runtime's files.

#![forbid(unsafe_code)]

pub mod address;
pub mod excerpt;
pub mod frame;
pub mod names;
pub mod spool;
pub mod types;

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Raised when a request or an answer changes in a way that the other side would misunderstand.
pub const VERSION: u32 = 1;

/// Where the agent listens unless it is told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/skein/cni.sock";

/// Where the plugin leaves a DEL that the agent could not take, unless it is told otherwise.
pub const DEFAULT_SPOOL: &str = "/var/lib/skein/cni/deletions";

/// The largest document in either direction, in bytes. A GC names every attachment of a node.
pub const MAX_FRAME: usize = 1 << 20;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`] of the one who asks.
    pub protocol: u32,
    /// What is asked.
    #[serde(flatten)]
    pub command: Command,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Command {
    /// Attach a container. Idempotent: the same again gets the same answer.
    Add(Add),
    /// Detach a container. Succeeds where there is nothing to detach.
    Del(Del),
    /// Whether an attachment is as it was made.
    Check(Check),
    /// Release what is not among those that are valid and whose namespace is gone.
    Gc(Gc),
    /// Whether an ADD could be served now.
    Status,
}

impl Command {
    /// The attachment that it is about, where it is about one.
    pub fn id(&self) -> Option<&AttachmentId> {
        match self {
            Self::Add(Add { id, .. }) | Self::Check(Check { id, .. }) | Self::Del(Del { id }) => {
                Some(id)
            }
            Self::Gc(_) | Self::Status => None,
        }
    }
}

/// Which attachment is meant: one interface of one container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentId {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// See [`Command::Add`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Add {
    /// Which.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// Name of the network in the configuration.
    pub network: String,
    /// `CNI_NETNS`, as the runtime names it.
    pub netns: PathBuf,
    /// Whose it is, where the runtime says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// Addresses that were asked for (`runtimeConfig.ips`); empty for any.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "crate::address::ips"
    )]
    pub ips: Vec<IpAddr>,
}

/// See [`Command::Del`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Del {
    /// Which.
    #[serde(flatten)]
    pub id: AttachmentId,
}

/// See [`Command::Check`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Which.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// Addresses of the interface by the previous result.
    #[serde(deserialize_with = "crate::address::nets")]
    pub ips: Vec<IpNet>,
}

/// See [`Command::Gc`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gc {
    /// Name of the network in the configuration.
    pub network: String,
    /// Attachments of it that the runtime still has.
    pub valid: Vec<AttachmentId>,
}

/// A Kubernetes pod, from `CNI_ARGS`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`, where the runtime gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Response {
    /// To an ADD.
    Attached(Attached),
    /// To anything else that was done.
    Done,
    /// It was not done.
    Refused(CniError),
}

/// What an ADD has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The interface on the node.
    pub host: Interface,
    /// The interface in the container.
    pub container: Interface,
    /// Addresses of the container with their gateways, IPv4 first.
    pub ips: Vec<Ip>,
    /// Routes that were added in the container.
    pub routes: Vec<Route>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Hardware address as `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u32,
}

/// An address of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// Address and prefix length (/32 or /128).
    pub address: IpNet,
    /// Gateway.
    pub gateway: IpAddr,
}

/// A route in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop; none for a destination on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

/// Why something was not done: an error of the CNI specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    /// As in [`crate::types::ErrorCode`], or 100 and above for Skein's own.
    pub code: u32,
    /// One line.
    pub msg: String,
    /// More of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}
