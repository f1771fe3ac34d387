//! Errors of the overlay's interface.

use skein_sys::tun::TunError;
use thiserror::Error;

use super::connection::NetlinkError;
use super::link::Link;

/// Why the interface cannot be had.
#[derive(Debug, Error)]
pub enum InterfaceError {
    /// The name belongs to another program.
    #[error(
        "interface {name} belongs to another program ({found}): set interface.name to another name, \
         or delete it (ip link delete {name})"
    )]
    Foreign {
        /// The name.
        name: String,
        /// What was found there.
        found: Box<Link>,
    },
    /// The interface is of Skein, but of another node.
    #[error(
        "interface {name} belongs to the Skein node {node:?}: set interface.name to another name, or \
         remove that node's (skein-agent cleanup with its configuration, or ip link delete {name})"
    )]
    OtherNode {
        /// The name.
        name: String,
        /// Whose it is.
        node: String,
    },
    /// The device cannot be made.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// rtnetlink refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}
