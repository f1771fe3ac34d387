//! Protocol between the CNI plugin and the agent over a unix socket (`SOCK_STREAM`).
//!
//! A connection carries one [`Request`] and one [`Response`], each in a frame ([`frame`]). A
//! descriptor of the pod's network namespace accompanies the first byte of an ADD or CHECK
//! (`SCM_RIGHTS`), so that the agent does not need access to the runtime's files. If the agent does
//! not respond to a DEL, the plugin stores the request in the [`spool`].

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

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

/// Version of the protocol. It is raised with every change that an earlier release would
/// misinterpret. The agent refuses a request of another version as
/// [`IncompatibleVersion`](types::ErrorCode::IncompatibleVersion).
pub const VERSION: u32 = 1;

/// Default path of the agent's CNI socket.
pub const DEFAULT_SOCKET: &str = "/run/skein/cni.sock";

/// Default directory of the spool.
pub const DEFAULT_SPOOL: &str = "/var/lib/skein/cni/deletions";

/// Maximum length of a document in bytes, in both directions. The largest one is a GC, which lists
/// every attachment of a node.
pub const MAX_FRAME: usize = 1 << 20;

/// A request of the plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`] of the plugin.
    pub protocol: u32,
    /// Operation and its parameters.
    #[serde(flatten)]
    pub command: Command,
}

/// An operation of the CNI specification with its parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Command {
    /// Attaches a container to the network. Idempotent: a repeated ADD gets the same response.
    Add(Add),
    /// Detaches a container. Succeeds if there is no such attachment.
    Del(Del),
    /// Compares an attachment with the state that ADD created.
    Check(Check),
    /// Removes the attachments that are not valid and have no namespace any more.
    Gc(Gc),
    /// Checks whether the agent can serve an ADD now.
    Status,
}

impl Command {
    /// Returns the attachment of an ADD, DEL or CHECK; `None` for other operations.
    pub fn id(&self) -> Option<&AttachmentId> {
        match self {
            Self::Add(Add { id, .. }) | Self::Check(Check { id, .. }) | Self::Del(Del { id }) => {
                Some(id)
            }
            Self::Gc(_) | Self::Status => None,
        }
    }
}

/// Identifier of an attachment: one interface of one container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentId {
    /// Container ID that the runtime chose (`CNI_CONTAINERID`).
    pub container_id: String,
    /// Name of the interface in the container (`CNI_IFNAME`).
    pub ifname: String,
}

/// Parameters of an ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Add {
    /// Attachment to create.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// Name of the network in the configuration.
    pub network: String,
    /// Path of the network namespace in the runtime's mount namespace (`CNI_NETNS`).
    pub netns: PathBuf,
    /// Pod of the container; `None` if the runtime does not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// Requested addresses (`runtimeConfig.ips`); empty to let the agent choose.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "crate::address::ips"
    )]
    pub ips: Vec<IpAddr>,
}

/// Parameters of a DEL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Del {
    /// Attachment to remove.
    #[serde(flatten)]
    pub id: AttachmentId,
}

/// Parameters of a CHECK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Attachment to compare.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// Addresses of the interface in the result of the ADD (`prevResult`).
    #[serde(deserialize_with = "crate::address::nets")]
    pub ips: Vec<IpNet>,
}

/// Parameters of a GC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gc {
    /// Name of the network in the configuration.
    pub network: String,
    /// Attachments to keep (`cni.dev/valid-attachments`).
    pub valid: Vec<AttachmentId>,
}

/// Kubernetes pod of a container, from `CNI_ARGS`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace of the pod (`K8S_POD_NAMESPACE`).
    pub namespace: String,
    /// Name of the pod (`K8S_POD_NAME`).
    pub name: String,
    /// UID of the pod (`K8S_POD_UID`); `None` if the runtime does not pass it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// A response of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Response {
    /// Result of an ADD.
    Attached(Attached),
    /// Success of any other operation.
    Done,
    /// Failure of the operation.
    Refused(CniError),
}

/// Result of an ADD: interfaces, addresses and routes of the attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Interface on the node.
    pub host: Interface,
    /// Interface in the container.
    pub container: Interface,
    /// Addresses of the container with their gateways, IPv4 first.
    pub ips: Vec<Ip>,
    /// Routes of the container that the agent added.
    pub routes: Vec<Route>,
}

/// An interface of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name of the interface.
    pub name: String,
    /// Hardware address in the form `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// MTU of the interface in bytes.
    pub mtu: u32,
}

/// An address of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// Address and prefix length (/32 or /128).
    pub address: IpNet,
    /// Next hop of the default route of the same address family.
    pub gateway: IpAddr,
}

/// A route in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination prefix.
    pub dst: IpNet,
    /// Next hop; `None` for a destination on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

/// An error of the agent, in the form of the CNI specification (section "Error").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    /// Code of [`types::ErrorCode`], or a code of Skein, 100 and above.
    pub code: u32,
    /// Error message of one line.
    pub msg: String,
    /// Details of the error; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}
