//! Why a command ended without success. Only `main` turns these into exit codes.

use std::fmt::Display;
use std::io;

use thiserror::Error;

/// A failure, by what somebody has to mend.
#[derive(Debug, Error)]
pub enum Failure {
    /// The command line, the configuration or the node records are wrong.
    #[error("{0}")]
    Usage(String),
    /// A privilege is missing.
    #[error("{0}")]
    Privilege(String),
    /// A feature of the kernel or a device is missing.
    #[error("{0}")]
    Missing(String),
    /// Something belongs to somebody else: a port, an interface, a state directory.
    #[error("{0}")]
    Taken(String),
    /// Anything that went wrong at run time.
    #[error("{0:#}")]
    Runtime(#[from] anyhow::Error),
}

impl Failure {
    /// A failed system call: a missing privilege where the error says so, else a run-time failure.
    pub fn io(context: impl Display, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                Failure::Privilege(format!("{context}: {error}: run as root"))
            }
            _ => Failure::Runtime(anyhow::anyhow!("{context}: {error}")),
        }
    }
}
