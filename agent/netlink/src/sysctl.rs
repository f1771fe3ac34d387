//! Kernel settings below /proc/sys/net, in the network namespace of the calling thread.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Directories of the settings, in the order of preference. Container runtimes mount /proc/sys
/// read-only and refuse mounts below /proc, so the host's directory may be mounted at another path.
/// Both directories show the settings of the reader's network namespace.
const DIRECTORIES: [&str; 2] = ["/host/proc/sys/net", "/proc/sys/net"];

/// Returns the file of a setting, from its path below /proc/sys/net.
fn setting_file(key: impl AsRef<Path>) -> PathBuf {
    let [mounted, usual] = DIRECTORIES.map(Path::new);
    let root = if mounted.join("ipv4").is_dir() { mounted } else { usual };
    root.join(key)
}

/// Error of reading or writing a setting.
#[derive(Debug, Error)]
#[error("cannot set {path} to {value}: {source}")]
pub struct SysctlError {
    /// File of the setting.
    pub path: PathBuf,
    /// Value to write.
    pub value: String,
    /// Error of the kernel.
    pub source: io::Error,
}

/// A setting: its path below /proc/sys/net and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below /proc/sys/net.
    pub key: String,
    /// Value to write.
    pub value: &'static str,
    /// True if traffic or a protection needs the setting; other settings only avoid useless kernel
    /// traffic.
    pub required: bool,
}

impl Sysctl {
    /// Returns a setting that traffic or a protection needs.
    pub fn required(key: impl Into<String>, value: &'static str) -> Self {
        Self { key: key.into(), value, required: true }
    }

    /// Returns a setting that traffic and protections do not need.
    pub fn optional(key: impl Into<String>, value: &'static str) -> Self {
        Self { key: key.into(), value, required: false }
    }

    /// Returns the value of a setting, by its path below /proc/sys/net; `None` if it cannot be
    /// read.
    pub(super) fn read(key: &str) -> Option<String> {
        std::fs::read_to_string(setting_file(key)).ok().map(|value| value.trim().to_owned())
    }

    /// Writes the value if the setting differs. Returns whether it was written.
    ///
    /// # Errors
    /// [`SysctlError`] if the file cannot be read or written.
    pub fn ensure(&self) -> Result<bool, SysctlError> {
        let path = setting_file(&self.key);
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
