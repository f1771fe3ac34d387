//! Failures of commands. Only `main` converts a failure to an exit code.

use std::fmt::Display;
use std::io;

use thiserror::Error;

/// Failure of a command, by the kind that determines the exit code.
#[derive(Debug, Error)]
pub enum Failure {
    /// Error in the command line, the configuration or the node records (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// Missing privilege (exit code 3).
    #[error("{0}")]
    Privilege(String),
    /// Missing kernel feature or device (exit code 4).
    #[error("{0}")]
    Missing(String),
    /// Port, interface or state directory that another program uses (exit code 5).
    #[error("{0}")]
    InUse(String),
    /// Any other failure at run time (exit code 1).
    #[error("{0:#}")]
    Runtime(#[from] anyhow::Error),
}

impl Failure {
    /// Converts the error of a system call: `PermissionDenied` becomes [`Failure::Privilege`],
    /// every other error [`Failure::Runtime`].
    pub fn io(context: impl Display, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                Failure::Privilege(format!("{context}: {error}. Run the command as root."))
            }
            _ => Failure::Runtime(anyhow::anyhow!("{context}: {error}")),
        }
    }
}
