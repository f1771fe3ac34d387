//! Probes of the host's nftables support and of other programs' chains.

use std::io::Write as _;
use std::process::{Command, Stdio};

use skein_sys::in_new_network_namespace;

use super::forward;
use super::nft::{finished, start_error};
use super::rules::Rules;

/// Loads a table with every kind of rule in a scratch network namespace.
///
/// # Errors
/// The reason why the table is not loaded, or why there is no scratch network namespace.
pub fn table() -> Result<(), String> {
    in_new_network_namespace(load)
        .map_err(|error| format!("not tested, no scratch network namespace: {error}"))?
}

/// Checks that no forward chain of another program drops packets of pods, and changes nothing.
/// Returns a sentence for users that says so. `pods` is true if the CNI plugin creates the pods'
/// interfaces.
///
/// # Errors
/// A text for users that lists the chains that drop packets of pods, with remedies, and the chains
/// that cannot be read, with reasons.
pub async fn forward_chains(interface: &str, pods: bool) -> Result<String, String> {
    let forward = forward::ensure(interface, pods, false).await;
    let closed = [forward.errors, forward.unknown].concat();
    match closed.is_empty() {
        true => Ok("no chain of another program drops forwarded packets".to_owned()),
        false => Err(closed.join("; ")),
    }
}

/// Loads a table with every kind of rule in the network namespace of this thread.
fn load() -> Result<(), String> {
    let rules = Rules::example();
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| start_error(error).to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        // If the program exits without reading, its exit status gives the reason.
        let _ = stdin.write_all(rules.text().as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    finished(&output).map_err(|error| error.to_string())
}
