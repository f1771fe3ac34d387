//! Connection to rtnetlink, and the error of its requests.

use std::fmt::Display;
use std::io;

use thiserror::Error;
use tokio::task::JoinHandle;

/// Error of a request to the kernel.
#[derive(Debug, Error)]
#[error("cannot {what}: {source}")]
pub struct NetlinkError {
    /// Operation that failed, as an infinitive phrase.
    pub what: String,
    /// Error of the kernel.
    pub source: io::Error,
}

impl NetlinkError {
    pub(super) fn new(what: impl Display, error: rtnetlink::Error) -> Self {
        let source = match &error {
            rtnetlink::Error::NetlinkError(message) => match message.code {
                Some(code) => io::Error::from_raw_os_error(-code.get()),
                None => io::Error::other("no error code"),
            },
            other => io::Error::other(other.to_string()),
        };
        Self { what: what.to_string(), source }
    }

    /// Returns whether the kernel refused the request as invalid (EINVAL), for example because no
    /// interface has the source address.
    pub fn is_invalid(&self) -> bool {
        self.errno() == Some(libc::EINVAL)
    }

    pub(super) fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// Connection to rtnetlink in the network namespace of the thread that created it.
#[derive(Debug)]
pub struct Netlink {
    pub(super) handle: rtnetlink::Handle,
    task: JoinHandle<()>,
    /// Lock of dumps, because the kernel refuses a second dump on the same socket (EBUSY).
    pub(super) dump: tokio::sync::Mutex<()>,
}

impl Netlink {
    /// Connects to rtnetlink and starts the task of the connection on the current runtime.
    ///
    /// # Errors
    /// [`NetlinkError`] if the socket cannot be created.
    pub fn connect() -> Result<Self, NetlinkError> {
        // Strict checking makes the kernel (4.20 and later) apply the filters of dumps.
        let connection = rtnetlink::new_connection_with_strict_check();
        let (connection, handle, _) = connection
            .map_err(|source| NetlinkError { what: "connect to rtnetlink".to_owned(), source })?;
        Ok(Self { handle, task: tokio::spawn(connection), dump: tokio::sync::Mutex::default() })
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}
