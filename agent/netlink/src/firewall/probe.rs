//! Probes of the host's nftables support and of other programs' chains.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use skein_sys::in_new_network_namespace;
use thiserror::Error;

use super::forward;
use super::rules::Rules;
use crate::nftables::{FirewallError, finished, start_error};

/// Loads a table with every kind of rule in a scratch network namespace.
///
/// # Errors
/// [`TableProbeError`] if the table is not loaded, or if there is no scratch network namespace.
pub fn table() -> Result<(), TableProbeError> {
    in_new_network_namespace(load).map_err(TableProbeError::Namespace)??;
    Ok(())
}

/// Checks that no forward chain of another program drops packets of pods, and changes nothing.
/// `pods` is true if the CNI plugin creates the pods' interfaces.
///
/// # Errors
/// [`ClosedChains`] with the chains that drop packets of pods, and the chains that cannot be read.
pub async fn forward_chains(interface: &str, pods: bool) -> Result<(), ClosedChains> {
    let forward = forward::ensure(interface, pods, false).await;
    let closed = [forward.errors, forward.unknown].concat();
    match closed.is_empty() {
        true => Ok(()),
        false => Err(ClosedChains(closed)),
    }
}

/// Reason why the kernel's support of the table is not known to be complete.
#[derive(Debug, Error)]
pub enum TableProbeError {
    /// There is no scratch network namespace.
    #[error("not tested, no scratch network namespace: {0}")]
    Namespace(io::Error),
    /// The table was not loaded.
    #[error(transparent)]
    Firewall(#[from] FirewallError),
}

/// Chains of other programs that drop packets of pods, each with the remedy, and chains that cannot
/// be read, each with the reason.
#[derive(Debug, Error)]
#[error("{}", .0.join("; "))]
pub struct ClosedChains(pub Vec<String>);

/// Loads a table with every kind of rule in the network namespace of this thread.
fn load() -> Result<(), FirewallError> {
    let rules = Rules::example();
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start_error)?;
    if let Some(mut stdin) = child.stdin.take() {
        // If the program exits without reading, its exit status gives the reason.
        let _ = stdin.write_all(rules.text().as_bytes());
    }
    finished(&child.wait_with_output()?)
}
