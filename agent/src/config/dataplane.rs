//! The table `[dataplane]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use skein_core::wire::header::MAX_LANES;
use skein_ipc::CipherChoice;

use super::Invalid;

/// Maximum of `busy_poll_us`, in microseconds.
const MAX_BUSY_POLL_US: u32 = 1000;

/// The data process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dataplane {
    /// Who starts it.
    pub mode: Mode,
    /// The unix socket that it listens on.
    pub socket: PathBuf,
    /// Number of lanes, 1 to 64.
    pub lanes: u8,
    /// Which AEAD to offer.
    pub cipher: CipherChoice,
    /// Whether small packets may share a datagram.
    pub bundling: bool,
    /// For how many microseconds a lane polls before it sleeps, 0 to 1000; `None`: 50, or 0 under a
    /// CPU quota.
    pub busy_poll_us: Option<u32>,
    /// Whether it goes on when the control process is told to end.
    pub keep_on_exit: bool,
    /// Whether it is confined to the system calls and files that it needs, where the control process starts it.
    pub seccomp: bool,
    /// Whether a data process that seccomp and Landlock do not confine is refused.
    pub require_confinement: bool,
}

/// Who starts the data process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The control process, as its child.
    #[default]
    Spawn,
    /// Somebody else: a second container, a service manager.
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
                "dataplane.require_confinement = true contradicts dataplane.seccomp = false: \
                 remove one of them"
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
