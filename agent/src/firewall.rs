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
mod monitor;
pub(crate) mod probe;
pub mod reconciler;
pub mod rules;

use std::io;
use std::process::Stdio;
use std::time::Duration;

use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use self::monitor::Monitor;
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
    /// The output of `nft` has an unknown form.
    #[error("cannot read what nft says: {0}")]
    Unreadable(String),
    /// `nft` did not end in time.
    #[error("nft did not end within {NFT_TIMEOUT:?}")]
    Late,
    /// The table was changed by another program during every attempt to install it.
    #[error("another program changes the table while it is installed: stop that program")]
    Contended,
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
        let monitor = Monitor::start();
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
    /// `Late` after 10 s, `Contended` if other programs changed the table during three attempts,
    /// `Io` otherwise.
    async fn ensure(&mut self) -> Result<bool, FirewallError> {
        self.drain();
        if self.rules.is_empty() {
            return remove(&self.rules.table).await;
        }
        if let Some(listed) = &self.listed
            && list(&self.rules.table).await.is_ok_and(|now| now == *listed)
        {
            return Ok(false);
        }
        self.listed = None;
        for _ in 0..MAX_ATTEMPTS {
            self.install().await?;
            let listed = list(&self.rules.table).await?;
            // A change by another program between the two runs of `nft` would go unnoticed.
            if self.drain() <= 1 {
                self.listed = Some(listed);
                return Ok(true);
            }
        }
        Err(FirewallError::Contended)
    }

    async fn install(&mut self) -> Result<(), FirewallError> {
        self.drain();
        let text = self.rules.text();
        if nft(&["-f", "-"], &text).await.is_err() {
            // The table of an older agent may have chains or sets with the same name but another
            // type.
            let replacement = format!("{}{text}", delete(&self.rules.table));
            nft(&["-f", "-"], &replacement).await?;
        }
        Ok(())
    }

    /// Discards the notifications so far; returns the number of transactions that touched the
    /// table.
    fn drain(&mut self) -> usize {
        self.monitor.as_mut().map_or(0, |monitor| monitor.drain(&self.rules.table))
    }
}

/// For the fuzzer: all that is read of what `nft -j` prints.
pub(crate) fn fuzz_printed(text: &str) {
    let _ = counters::parse(text);
    forward::fuzz_printed(text);
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
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().next().unwrap_or_default();
        return Err(FirewallError::Refused(line.to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
