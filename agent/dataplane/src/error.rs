//! Errors of the start of a data plane and of a change of its settings.

use std::io;

use skein_ipc::ErrorKind;
use skein_sys::tun::TunError;
use skein_sys::udp::UdpError;
use thiserror::Error;

/// Why a data plane could not be started or changed.
#[derive(Debug, Error)]
pub(super) enum SetupError {
    /// The request contradicts itself or what runs.
    #[error("{0}")]
    Invalid(String),
    /// What is fixed for the life of a data process is to be another.
    #[error("settings that are fixed for the life of the data process differ: restart it")]
    Fixed,
    /// The TUN device.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// A UDP socket.
    #[error(transparent)]
    Underlay(#[from] UdpError),
    /// The keeper refused a request.
    #[error("{message}")]
    Refused {
        /// Kind of the failure.
        kind: ErrorKind,
        /// Error and remedy.
        message: String,
    },
    /// Threads or event descriptors.
    #[error("cannot start the lanes: {0}")]
    Io(#[from] io::Error),
}

impl SetupError {
    /// Returns the kind of the failure, for the exit code.
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            SetupError::Refused { kind, .. } => *kind,
            SetupError::Invalid(_) => ErrorKind::Invalid,
            SetupError::Fixed => ErrorKind::RestartRequired,
            SetupError::Tun(error) => match error {
                TunError::NotFound | TunError::NoDevice { .. } => ErrorKind::Missing,
                TunError::Permission { .. } => ErrorKind::Privilege,
                TunError::Exists { .. }
                | TunError::Busy { .. }
                | TunError::NotATun { .. }
                | TunError::Flags { .. } => ErrorKind::InUse,
                TunError::Name { .. } => ErrorKind::Invalid,
                TunError::Io { .. } => ErrorKind::Internal,
            },
            SetupError::Underlay(error) => match error {
                UdpError::AddrInUse { .. } => ErrorKind::InUse,
                UdpError::AddrNotAvailable { .. } | UdpError::NoFamily { .. } => ErrorKind::Invalid,
                UdpError::Permission { .. } => ErrorKind::Privilege,
                UdpError::Io { .. } => ErrorKind::Internal,
            },
            SetupError::Io(_) => ErrorKind::Internal,
        }
    }
}
