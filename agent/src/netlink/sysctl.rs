//! Settings below /proc/sys/net, of the network namespace of the calling thread.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A setting that could not be read or written.
#[derive(Debug, Error)]
#[error("cannot set {path} to {value}: {source}")]
pub struct SysctlError {
    /// The file.
    pub path: PathBuf,
    /// What was to be written.
    pub value: String,
    /// What the kernel said.
    pub source: io::Error,
}

/// One setting: its path below /proc/sys/net and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below /proc/sys/net.
    pub key: String,
    /// The value.
    pub value: &'static str,
}

impl Sysctl {
    /// A setting.
    pub fn new(key: impl Into<String>, value: &'static str) -> Self {
        Self { key: key.into(), value }
    }

    /// Writes the value unless it is there already; says whether it wrote.
    pub fn ensure(&self) -> Result<bool, SysctlError> {
        let path = PathBuf::from("/proc/sys/net").join(&self.key);
        let result = std::fs::read_to_string(&path).and_then(|now| {
            let differs = now.trim() != self.value;
            if differs {
                std::fs::write(&path, self.value)?;
            }
            Ok(differs)
        });
        result.map_err(|source| SysctlError { path, value: self.value.to_owned(), source })
    }
}
