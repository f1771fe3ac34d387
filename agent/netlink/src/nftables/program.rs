//! Execution of the program `nft`.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Output, Stdio};
use std::time::Duration;

use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Timeout of one execution of `nft`.
pub const NFT_TIMEOUT: Duration = Duration::from_secs(10);

/// Reasons why the table is not installed.
#[derive(Debug, Error)]
pub enum FirewallError {
    /// The host has no `nft` program.
    #[error("no program nft: install nftables")]
    Missing,
    /// `nft` could not be run.
    #[error("cannot run nft: {0}")]
    Io(#[from] io::Error),
    /// `nft` reported an error.
    #[error("nft refused: {0}")]
    Refused(String),
    /// A signal ended `nft`.
    #[error(
        "signal {0} ended nft. Versions up to 1.1.1 crash on sets that later versions have written: \
         install a later version"
    )]
    Crashed(i32),
    /// The output of `nft` has an unknown form.
    #[error("cannot parse the output of nft: {0}")]
    Unreadable(String),
    /// `nft` did not exit within 10 s.
    #[error("nft did not exit within {NFT_TIMEOUT:?}")]
    Timeout,
    /// The table was changed by another program during every attempt to install it.
    #[error("another program changes the table while it is installed. Stop that program.")]
    Contended,
    /// Notifications were lost during every attempt to install the table, and other transactions
    /// of nftables were among them.
    #[error(
        "notifications of nftables were lost while other programs changed rules. The agent \
         retries within 10 s. Reduce the size or the rate of the other programs' changes."
    )]
    Lost,
}

/// Runs `nft` with `arguments` and `input` on its standard input. Returns its standard output.
///
/// # Errors
/// `Missing` if the host has no `nft` program, `Timeout` after 10 s, `Crashed` if a signal ended
/// it, `Refused` with the first line of its error, `Io` otherwise.
pub async fn nft(arguments: &[&str], input: &str) -> Result<String, FirewallError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start_error)?;
    let stdin = child.stdin.take();
    let talk = async {
        if let Some(mut stdin) = stdin {
            // If the program exits without reading, its exit status gives the reason.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output =
        tokio::time::timeout(NFT_TIMEOUT, talk).await.map_err(|_| FirewallError::Timeout)??;
    finished(&output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns the reason why `nft` could not be started.
pub(crate) fn start_error(error: io::Error) -> FirewallError {
    match error.kind() {
        io::ErrorKind::NotFound => FirewallError::Missing,
        _ => FirewallError::Io(error),
    }
}

/// Checks the exit status of `nft`.
///
/// # Errors
/// `Crashed` if a signal ended it, `Refused` with the first line of its error if it failed.
pub(crate) fn finished(output: &Output) -> Result<(), FirewallError> {
    if output.status.success() {
        return Ok(());
    }
    if let Some(signal) = output.status.signal() {
        return Err(FirewallError::Crashed(signal));
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(FirewallError::Refused(text.lines().next().unwrap_or_default().to_owned()))
}
