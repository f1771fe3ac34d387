//! Errors of the plugin's requests, and their codes in the CNI specification.

use skein_cni_protocol::CniError;
use skein_cni_protocol::types::ErrorCode;
use skein_ipam::IpamError;
use skein_netlink::NetlinkError;
use thiserror::Error;

use super::attach::AttachError;
use crate::policy::CommitError;

/// Error code of a CHECK that found differences. CNI leaves codes from 100 to plugins.
const BROKEN: u32 = 100;

/// Failure of a request of the plugin.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error(transparent)]
    Ipam(#[from] IpamError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("{0}")]
    Namespace(String),
    #[error("the network namespace is the node's own. Pass the namespace of the container.")]
    OwnNamespace,
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Broken(String),
    #[error("the agent has not read the pods and the firewall of this node yet: {0}")]
    NotPrepared(String),
    #[error(transparent)]
    Policy(#[from] CommitError),
    #[error("cannot remove a completed deletion from the spool: {0}")]
    Spool(String),
}

impl From<NetlinkError> for Error {
    fn from(error: NetlinkError) -> Self {
        Self::Attach(error.into())
    }
}

impl Error {
    /// Returns the error code of the CNI specification.
    fn code(&self) -> u32 {
        match self {
            Error::Ipam(error) => error.code() as u32,
            Error::Invalid(_) => ErrorCode::InvalidNetworkConfig as u32,
            Error::Attach(AttachError::Exists(_) | AttachError::DefaultRoute) => {
                ErrorCode::InvalidEnvironment as u32
            }
            Error::Attach(_) | Error::NotPrepared(_) | Error::Policy(_) => {
                ErrorCode::TryAgainLater as u32
            }
            Error::Spool(_) => ErrorCode::Io as u32,
            Error::Namespace(_) => ErrorCode::UnknownContainer as u32,
            Error::OwnNamespace => ErrorCode::InvalidNetns as u32,
            Error::Broken(_) => BROKEN,
        }
    }
}

pub(super) fn refuse(error: &Error) -> CniError {
    CniError { code: error.code(), msg: error.to_string(), details: String::new() }
}
