//! Settings below /proc/sys/net, of the network namespace of the calling thread.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Where the settings are. Container runtimes show a container /proc/sys read-only and refuse every
/// mount below /proc, so that the host's directory may be mounted beside it. The kernel shows
/// whoever looks the settings of his own network namespace there as well.
const PLACES: [&str; 2] = ["/host/proc/sys/net", "/proc/sys/net"];

/// The place of a setting, from its path below /proc/sys/net.
fn place(key: impl AsRef<Path>) -> PathBuf {
    let [mounted, usual] = PLACES.map(Path::new);
    let root = if mounted.join("ipv4").is_dir() { mounted } else { usual };
    root.join(key)
}

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
    /// True if traffic or a protection needs it; the others only keep the kernel quiet.
    pub required: bool,
}

impl Sysctl {
    /// A setting that traffic or a protection needs.
    pub fn required(key: impl Into<String>, value: &'static str) -> Self {
        Self { key: key.into(), value, required: true }
    }

    /// A setting that is good to have.
    pub fn optional(key: impl Into<String>, value: &'static str) -> Self {
        Self { key: key.into(), value, required: false }
    }

    /// Returns the value of a setting, by its path below /proc/sys/net; `None` if it cannot be read.
    pub(super) fn read(key: &str) -> Option<String> {
        std::fs::read_to_string(place(key)).ok().map(|value| value.trim().to_owned())
    }

    /// Writes the value unless it is there already; says whether it wrote.
    pub fn ensure(&self) -> Result<bool, SysctlError> {
        let path = place(&self.key);
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
