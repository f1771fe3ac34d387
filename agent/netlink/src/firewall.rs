//! The firewall of the pod network, in an nftables table of its own: pods' addresses are accepted
//! from the overlay and from their own interfaces only, packets to pods never leave outside the
//! tunnel, and sources that the overlay does not carry are masqueraded.
//!
//! The rules are passed to the `nft` program as text, in one transaction. `nft list table inet
//! skein` shows the same rules as [`rules`]. The table does not change when a pod is created or
//! deleted, because a pod's host route assigns its address to its interface.

pub mod counters;
pub mod forward;
mod legacy;
pub(crate) mod monitor;
pub mod probe;
pub mod reconciler;
pub mod rules;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Output, Stdio};
use std::time::Duration;

use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use self::monitor::{Monitor, RECEIVE_BUFFER, Received};
pub use self::reconciler::Firewall;
pub use self::rules::{PodRules, Rules};

/// Timeout of one run of `nft`.
const NFT_TIMEOUT: Duration = Duration::from_secs(10);

/// Attempts to install the table while another program changes it.
const MAX_ATTEMPTS: usize = 3;

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
        "signal {0} ended nft: versions up to 1.1.1 crash on sets that later versions have written; \
         install a later version"
    )]
    Crashed(i32),
    /// The output of `nft` has an unknown form.
    #[error("cannot read what nft says: {0}")]
    Unreadable(String),
    /// `nft` did not end in time.
    #[error("nft did not end within {NFT_TIMEOUT:?}")]
    Late,
    /// The table was changed by another program during every attempt to install it.
    #[error("another program changes the table while it is installed: stop that program")]
    Contended,
    /// Notifications were lost during every attempt to install the table, and other transactions
    /// of nftables were among them.
    #[error(
        "notifications of nftables were lost while other programs changed rules: the agent tries \
         again within 10 s; reduce the size or the rate of the other programs' changes"
    )]
    Lost,
}

/// The table as it was installed.
struct Table {
    rules: Rules,
    /// Notifications about the table; `None` if the kernel offers none.
    monitor: Option<Monitor>,
    /// Output of `nft list` right after the installation.
    listed: Option<String>,
}

impl Table {
    fn new(rules: Rules) -> Self {
        Self::with_receive_buffer(rules, RECEIVE_BUFFER)
    }

    fn with_receive_buffer(rules: Rules, bytes: usize) -> Self {
        let monitor = Monitor::start(bytes);
        if let Err(error) = &monitor {
            tracing::warn!(%error, "no nftables notifications: changes are noticed within 10 s");
        }
        Self { rules, monitor: monitor.ok(), listed: None }
    }

    /// Replaces the rules; [`Table::ensure`] installs them.
    fn set_rules(&mut self, rules: Rules) {
        if self.rules != rules {
            self.rules = rules;
            self.listed = None;
        }
    }

    /// Waits for a transaction of nftables that touches the table.
    async fn changed(&mut self) {
        match &mut self.monitor {
            Some(monitor) => monitor.changed(&self.rules.table).await,
            None => std::future::pending().await,
        }
    }

    /// Installs the table if it is missing or differs from the last installed version. Returns
    /// whether a change was made.
    ///
    /// # Errors
    /// `Missing` if the host has no `nft` program, `Refused` with the first line of its error,
    /// `Crashed` if a signal ended it, `Late` after 10 s, `Contended` if other programs changed the table during the last of three
    /// attempts, `Lost` if notifications were lost then, `Io` otherwise.
    async fn ensure(&mut self) -> Result<bool, FirewallError> {
        if let Some(monitor) = &mut self.monitor {
            monitor.drain(&self.rules.table);
        }
        if self.rules.is_empty() {
            return remove(&self.rules.table).await;
        }
        if let Some(listed) = &self.listed
            && list(&self.rules.table).await.is_ok_and(|now| now == *listed)
        {
            return Ok(false);
        }
        self.listed = None;
        let mut failure = FirewallError::Contended;
        for _ in 0..MAX_ATTEMPTS {
            match self.install().await {
                Ok(listed) => {
                    self.listed = Some(listed);
                    return Ok(true);
                }
                Err(error @ (FirewallError::Contended | FirewallError::Lost)) => failure = error,
                Err(error) => return Err(error),
            }
        }
        Err(failure)
    }

    /// Installs the table. Returns the output of `nft list` for it, without changes by other
    /// programs.
    ///
    /// # Errors
    /// Those of [`Table::ensure`] for one attempt.
    async fn install(&mut self) -> Result<String, FirewallError> {
        let rules = &self.rules;
        let work = async {
            replace(rules).await?;
            list(&rules.table).await
        };
        let Some(monitor) = &mut self.monitor else { return work.await };
        let before = monitor.generation().ok();
        let (listed, received) = monitor.observe(&rules.table, work).await;
        let after = monitor.generation().ok();
        // A change by another program between the two runs of `nft` would go unnoticed.
        let listed = listed?;
        check_alone(received, before, after)?;
        Ok(listed)
    }
}

/// Checks that an installation was the only change of the table. `before` and `after` are the
/// generations of the ruleset, which count transactions about other tables, too.
///
/// # Errors
/// `Contended` if another transaction touched the table, `Lost` if notifications were lost and the
/// generations do not rule another transaction out.
fn check_alone(
    received: Received,
    before: Option<u32>,
    after: Option<u32>,
) -> Result<(), FirewallError> {
    match (received, before, after) {
        (Received { transactions: 0 | 1, lost: false }, ..) => Ok(()),
        (Received { lost: false, .. }, ..) => Err(FirewallError::Contended),
        (_, Some(before), Some(after)) if after.wrapping_sub(before) == 1 => Ok(()),
        _ => Err(FirewallError::Lost),
    }
}

/// Loads the rules in one transaction.
async fn replace(rules: &Rules) -> Result<(), FirewallError> {
    let text = rules.text();
    if nft(&["-f", "-"], &text).await.is_err() {
        // The table of an older agent may have chains or sets with the same name but another type.
        let replacement = format!("{}{text}", delete(&rules.table));
        nft(&["-f", "-"], &replacement).await?;
    }
    Ok(())
}

/// Removes the table. Returns whether it existed.
///
/// # Errors
/// [`FirewallError`] if `nft` fails; a missing `nft` program is not an error.
pub async fn remove(table: &str) -> Result<bool, FirewallError> {
    match list(table).await {
        Err(FirewallError::Refused(why)) if why.contains("No such file") => return Ok(false),
        Err(FirewallError::Missing) => return Ok(false),
        listed => listed?,
    };
    nft(&["-f", "-"], &delete(table)).await?;
    Ok(true)
}

fn delete(table: &str) -> String {
    format!("add table inet {table}\ndelete table inet {table}\n")
}

/// Lists the table without its counters' values.
async fn list(table: &str) -> Result<String, FirewallError> {
    nft(&["--stateless", "list", "table", "inet", table], "").await
}

async fn nft(arguments: &[&str], input: &str) -> Result<String, FirewallError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => FirewallError::Missing,
            _ => FirewallError::Io(error),
        })?;
    let stdin = child.stdin.take();
    let talk = async {
        if let Some(mut stdin) = stdin {
            // One that ends without reading says why by its exit code.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output =
        tokio::time::timeout(NFT_TIMEOUT, talk).await.map_err(|_| FirewallError::Late)??;
    finished(&output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Checks how `nft` ended.
///
/// # Errors
/// `Crashed` if a signal ended it, `Refused` with the first line of its error if it failed.
fn finished(output: &Output) -> Result<(), FirewallError> {
    if output.status.success() {
        return Ok(());
    }
    if let Some(signal) = output.status.signal() {
        return Err(FirewallError::Crashed(signal));
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(FirewallError::Refused(text.lines().next().unwrap_or_default().to_owned()))
}
