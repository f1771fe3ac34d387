//! Errors of starting a data plane and of changing its settings.

use std::io;

use skein_ipc::ErrorKind;
use skein_sys::tun::TunError;
use skein_sys::udp::UdpError;
use thiserror::Error;

/// Errors of starting or changing a data plane.
#[derive(Debug, Error)]
pub(super) enum SetupError {
    /// The request is inconsistent in itself or with the active settings.
    #[error("{0}")]
    Invalid(String),
    /// The request changes a setting that only a restart of the data process can change.
    #[error(
        "some of the changed settings cannot be applied while the data process runs. Restart the \
         data process."
    )]
    Fixed,
    /// The TUN device or one of its queues cannot be used.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// A UDP socket cannot be opened or configured.
    #[error(transparent)]
    Underlay(#[from] UdpError),
    /// The keeper refused a request.
    #[error("{message}")]
    Refused {
        /// Kind of the failure, for the exit code.
        kind: ErrorKind,
        /// Error of the keeper, with the remedy.
        message: String,
    },
    /// A thread or an event descriptor cannot be created, or the channel to the keeper fails.
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
