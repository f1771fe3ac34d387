//! Confinement of the processes of a data plane: capabilities, Landlock and seccomp.

use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;
use skein_ipc::{Confinement, ConfinementState};
use skein_sys::{confine, landlock, seccomp};

use super::busy_poll;

/// Confinement of a data process by the kernel's mechanisms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfinementOptions {
    /// Whether the process is confined at all.
    pub enabled: bool,
    /// Whether the process ends if a mechanism is not active.
    pub required: bool,
}

/// What a process of the data plane has given up.
#[must_use]
pub struct Confined {
    capabilities: CapabilitySet,
    /// Mechanisms that confine a data process; empty for a keeper.
    pub(super) mechanisms: Vec<Confinement>,
}

/// Gives up capabilities; a data process (`worker`) also all system calls and files that it does not
/// need. Call it before anything that an unauthenticated sender controls is read, and before there is
/// a second thread.
///
/// # Errors
/// An error if the kernel refuses to take capabilities, or if a mechanism that is required is not
/// active. A keeper checks that before its data process starts, and before it takes over.
pub fn confine(worker: bool, options: ConfinementOptions) -> anyhow::Result<Confined> {
    let capabilities =
        confine::drop_capabilities(confine::DATAPLANE).context("cannot give up capabilities")?;
    let mut confined = Confined { capabilities, mechanisms: Vec::new() };
    if !worker {
        if options.required {
            seccomp::probe().context(NOT_CONFINED)?;
            landlock::probe().context(NOT_CONFINED)?;
        }
        return Ok(confined);
    }
    // Nobody could give its descriptors to another one.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot be tied to the keeper")?;
    open_files();
    // The filter does not allow the system calls of Landlock.
    for (mechanism, activate) in
        [("landlock", landlock::confine as fn() -> _), ("seccomp", seccomp::confine)]
    {
        let (state, reason) = match options.enabled.then(activate) {
            None => (ConfinementState::ForcedOff, Some("off in the configuration".to_owned())),
            Some(Ok(())) => (ConfinementState::On, None),
            Some(Err(error)) if error.kind() == io::ErrorKind::Unsupported => {
                (ConfinementState::Unsupported, Some(error.to_string()))
            }
            Some(Err(error)) => (ConfinementState::Failed, Some(error.to_string())),
        };
        let mechanism = Confinement { mechanism: mechanism.to_owned(), state, reason };
        if options.required && state != ConfinementState::On {
            bail!("{NOT_CONFINED}: {mechanism}");
        }
        confined.mechanisms.push(mechanism);
    }
    Ok(confined)
}

const NOT_CONFINED: &str = "the data process cannot be confined, which --require-confinement \
                            (dataplane.require_confinement) demands";

/// Reads and opens the files that a data process needs after it has lost access to files.
fn open_files() {
    busy_poll::default_limit();
    // AWS-LC maps this device at the first use of its random generator, and the generator fails if
    // the device is there but cannot be opened.
    if Path::new("/dev/sysgenid").exists() {
        let _ = aws_lc_rs::rand::fill(&mut [0]);
    }
}

impl Confined {
    /// Logs it, once there is a log.
    pub fn log(&self) {
        tracing::info!(kept = ?self.capabilities, "capabilities dropped");
        for mechanism in &self.mechanisms {
            match mechanism.state {
                ConfinementState::On => tracing::info!("confined: {mechanism}"),
                _ => tracing::warn!("not confined: {mechanism}"),
            }
        }
    }
}
