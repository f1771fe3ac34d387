//! Configuration table `[dataplane]`: settings of the data process.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use skein_core::wire::header::MAX_LANES;
use skein_ipc::CipherChoice;

use super::Invalid;

/// Maximum value of `busy_poll_us`, in microseconds.
const MAX_BUSY_POLL_US: u32 = 1000;

/// Settings of the data process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dataplane {
    /// Program that starts the data process.
    pub mode: Mode,
    /// Path of the unix socket of the data process.
    pub socket: PathBuf,
    /// Number of lanes, 1 to 64.
    pub lanes: u8,
    /// AEAD algorithms offered in handshakes.
    pub cipher: CipherChoice,
    /// Enables bundling: small packets that are already queued share a datagram.
    pub bundling: bool,
    /// Maximum time that a lane polls before it blocks, 0 to 1000 µs; `None`: 50, or 0 under a CPU
    /// quota.
    pub busy_poll_us: Option<u32>,
    /// Keeps the data process running when the control process shuts down.
    pub keep_on_exit: bool,
    /// Confines the data process with seccomp and Landlock, if the control process starts it.
    pub seccomp: bool,
    /// Refuses a data process that seccomp and Landlock do not confine.
    pub require_confinement: bool,
}

/// Program that starts the data process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The control process starts the data process as its child.
    #[default]
    Spawn,
    /// The data process is started by another program, for example a service manager or a second
    /// container.
    External,
}

impl Default for Dataplane {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            socket: "/run/skein/dataplane.sock".into(),
            lanes: default_lanes(),
            cipher: CipherChoice::default(),
            bundling: true,
            busy_poll_us: None,
            keep_on_exit: false,
            seccomp: true,
            require_confinement: false,
        }
    }
}

impl Dataplane {
    pub(super) fn check(&self) -> Result<(), Invalid> {
        let lanes = self.lanes;
        if !(1..=MAX_LANES).contains(&usize::from(lanes)) {
            return Err(Invalid(format!("dataplane.lanes = {lanes}: use 1 to {MAX_LANES}")));
        }
        if let Some(us) = self.busy_poll_us.filter(|us| *us > MAX_BUSY_POLL_US) {
            return Err(Invalid(format!(
                "dataplane.busy_poll_us = {us}: use 0 to {MAX_BUSY_POLL_US}"
            )));
        }
        if self.require_confinement && !self.seccomp {
            return Err(Invalid(
                "dataplane.require_confinement = true contradicts dataplane.seccomp = false. \
                 Remove one of them."
                    .to_owned(),
            ));
        }
        Ok(())
    }
}

/// Returns the number of CPUs, at most 4.
fn default_lanes() -> u8 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    cores.clamp(1, 4) as u8
}
