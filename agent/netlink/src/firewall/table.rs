//! The nftables table: installation, comparison and removal.

use super::rules::Rules;
use crate::nftables::{FirewallError, Monitor, Received, Subscription, nft};

/// Maximum number of installations in a row while another program changes the table.
const MAX_ATTEMPTS: usize = 3;

/// The table and its state after the last installation.
pub(super) struct Table {
    pub(super) rules: Rules,
    /// Notifications about the table; `None` if the kernel supports none.
    notifications: Option<Subscription>,
    /// Output of `nft list` right after the installation.
    pub(super) listed: Option<String>,
}

impl Table {
    pub(super) fn new(rules: Rules, monitor: Option<&Monitor>) -> Self {
        let notifications = monitor.map(|monitor| monitor.subscribe(&rules.table));
        Self { rules, notifications, listed: None }
    }

    /// Replaces the rules; [`Table::ensure`] installs them.
    pub(super) fn set_rules(&mut self, rules: Rules) {
        if self.rules == rules {
            return;
        }
        if let Some(notifications) = &mut self.notifications
            && self.rules.table != rules.table
        {
            *notifications = notifications.monitor().subscribe(&rules.table);
        }
        self.rules = rules;
        self.listed = None;
    }

    /// Waits for a transaction of nftables that touches the table.
    pub(super) async fn changed(&mut self) {
        match &mut self.notifications {
            Some(notifications) => notifications.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Installs the table if it is missing or differs from the last installed version. Returns
    /// whether a change was made.
    ///
    /// # Errors
    /// `Missing` if the host has no `nft` program, `Refused` with the first line of its error,
    /// `Crashed` if a signal ended it, `Timeout` after 10 s, `Contended` if other programs changed
    /// the table during the last of three attempts, `Lost` if notifications were lost then, `Io`
    /// otherwise.
    pub(super) async fn ensure(&mut self) -> Result<bool, FirewallError> {
        if let Some(notifications) = &mut self.notifications {
            notifications.drain().await;
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
        let Some(notifications) = &mut self.notifications else { return work.await };
        let before = notifications.monitor().generation().ok();
        let (listed, received) = notifications.observe(work).await;
        let after = notifications.monitor().generation().ok();
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
///
/// # Errors
/// The error of `nft`.
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

/// Returns the output of `nft list` for the table, without the values of counters.
///
/// # Errors
/// The error of `nft`; `Refused` if the table does not exist.
pub(super) async fn list(table: &str) -> Result<String, FirewallError> {
    nft(&["--stateless", "list", "table", "inet", table], "").await
}

#[cfg(test)]
mod tests;
