//! Confinement of the keeper and the data process: capabilities, Landlock and seccomp.

use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use skein_ipc::{Confinement, ConfinementState, Mechanism};
use skein_sys::{confine, landlock, seccomp};

use super::busy_poll;

/// Settings of the confinement of a data process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfinementOptions {
    /// True to activate Landlock and seccomp.
    pub enabled: bool,
    /// True if the process must exit when a mechanism is not active.
    pub required: bool,
}

/// Result of the confinement of this process, for the log and the report.
#[must_use]
pub struct Confined {
    capabilities: CapabilitySet,
    /// States of Landlock and seccomp; empty for a keeper.
    pub(super) mechanisms: Vec<Confinement>,
}

/// Drops all capabilities that the data plane does not need. A data process (`worker`) also gives
/// up access to files and all system calls that it does not need.
///
/// Call this function before the process reads data of an unauthenticated sender, and before it
/// starts a second thread.
///
/// # Errors
/// An error if capabilities cannot be dropped, if a data process cannot be tied to its keeper, or
/// if a required mechanism is not active. A keeper only probes required mechanisms, so that it
/// fails before it takes over and before its data process starts.
pub fn confine(worker: bool, options: ConfinementOptions) -> anyhow::Result<Confined> {
    let capabilities =
        confine::drop_capabilities(confine::DATAPLANE).context("cannot drop capabilities")?;
    let mut confined = Confined { capabilities, mechanisms: Vec::new() };
    if !worker {
        if options.required {
            seccomp::probe().context(NOT_CONFINED)?;
            landlock::probe().context(NOT_CONFINED)?;
        }
        return Ok(confined);
    }
    // Without its keeper, the process could pass its descriptors to no other process.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot set the death signal of the data process")?;
    open_files();
    // Landlock comes first, because the seccomp filter does not allow its system calls.
    for (mechanism, activate) in [
        (Mechanism::Landlock, landlock::confine as fn() -> _),
        (Mechanism::Seccomp, seccomp::confine),
    ] {
        let (state, reason) = match options.enabled.then(activate) {
            None => (ConfinementState::ForcedOff, Some("off in the configuration".to_owned())),
            Some(Ok(())) => (ConfinementState::On, None),
            Some(Err(error)) if error.kind() == io::ErrorKind::Unsupported => {
                (ConfinementState::Unsupported, Some(error.to_string()))
            }
            Some(Err(error)) => (ConfinementState::Failed, Some(error.to_string())),
        };
        let mechanism = Confinement { mechanism: mechanism.into(), state: state.into(), reason };
        if options.required && state != ConfinementState::On {
            bail!("{NOT_CONFINED}: {mechanism}");
        }
        confined.mechanisms.push(mechanism);
    }
    Ok(confined)
}

const NOT_CONFINED: &str = "the data process cannot be confined, which --require-confinement \
                            (dataplane.require_confinement) demands";

/// Reads and opens the files that a data process uses after it has lost access to files.
fn open_files() {
    busy_poll::default_limit();
    // AWS-LC maps this device at the first use of its random generator. The generator fails if the
    // device exists but cannot be opened.
    if Path::new("/dev/sysgenid").exists() {
        let _ = aws_lc_rs::rand::fill(&mut [0]);
    }
}

impl Confined {
    /// Logs the kept capabilities and the state of each mechanism. Call this method after the log
    /// is set up.
    pub fn log(&self) {
        tracing::info!(kept = ?self.capabilities, "capabilities dropped");
        for mechanism in &self.mechanisms {
            match mechanism.state == ConfinementState::On {
                true => tracing::info!("confined: {mechanism}"),
                false => tracing::warn!("not confined: {mechanism}"),
            }
        }
    }
}
