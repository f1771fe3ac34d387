//! Errors of the overlay's interface.

use skein_sys::tun::TunError;
use thiserror::Error;

use super::connection::NetlinkError;
use super::link::Link;

/// Errors of the creation of the overlay's interface.
#[derive(Debug, Error)]
pub enum InterfaceError {
    /// The interface with this name belongs to another program.
    #[error(
        "interface {name} belongs to another program ({found}). Set interface.name to another name, \
         or delete the interface (ip link delete {name})."
    )]
    Foreign {
        /// Name of the interface.
        name: String,
        /// Interface that was found under the name.
        found: Box<Link>,
    },
    /// The interface belongs to another Skein node.
    #[error(
        "interface {name} belongs to the Skein node {node:?}. Set interface.name to another name, \
         or remove the interface of that node (skein-agent cleanup with its configuration, or ip \
         link delete {name})."
    )]
    OtherNode {
        /// Name of the interface.
        name: String,
        /// Name of the node in the interface's alias.
        node: String,
    },
    /// The TUN device cannot be created.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// The kernel refused a request.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}
