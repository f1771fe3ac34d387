//! Task that keeps the nftables table installed. It reacts to new rules and to nftables
//! notifications. A timer covers lost notifications and other programs' chains.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::counters::{self, Counters};
use super::forward;
use super::rules::Rules;
use super::table::{Table, list};
use crate::nftables::{FirewallError, Monitor};

/// Interval of the periodic comparisons, in addition to those after notifications.
const RESYNC_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of comparisons within [`PACE_WINDOW`] that notifications cause, so that a program
/// that keeps changing the table does not keep a CPU busy.
const MAX_COMPARISONS: usize = 20;
/// Period over which [`MAX_COMPARISONS`] is counted.
const PACE_WINDOW: Duration = Duration::from_secs(1);
/// Maximum age of counters that are served to another scrape.
const COUNTERS_MAX_AGE: Duration = Duration::from_secs(1);

/// State of the firewall, for the agent's status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirewallStatus {
    /// Name of the table, of the family inet.
    pub table: String,
    /// True if the table is installed.
    pub active: bool,
    /// Reason why the configured table is not installed.
    pub error: Option<String>,
    /// Chains of other programs that drop forwarded packets of pods, each with the remedy.
    pub closed: Vec<String>,
    /// Chains of other programs whose policy is not known, each with the reason.
    #[serde(default)]
    pub unknown: Vec<String>,
    /// `true` once the FORWARD chains of other programs have been read with `nft`.
    #[serde(default)]
    pub forward_read: bool,
}

/// Reason why the table is not as configured.
#[derive(Debug, Error)]
pub enum TableError {
    /// The task of the firewall has ended.
    #[error("the firewall's task has ended")]
    Ended,
    /// The table is not installed; the text is [`FirewallStatus::error`].
    #[error("{0}")]
    NotInstalled(String),
    /// The table, which another program has changed.
    #[error("the nftables table inet {table} was changed")]
    Changed {
        /// Name of the table.
        table: String,
    },
    /// The table cannot be listed.
    #[error("the nftables table inet {table} cannot be read: {source}")]
    Unreadable {
        /// Name of the table.
        table: String,
        /// Error of `nft`.
        source: FirewallError,
    },
}

/// Result of the last comparison of the table.
#[derive(Debug, Clone, Default)]
struct State {
    /// Revision of the rules that were compared.
    revision: u64,
    /// Output of `nft list` while the table is as installed.
    listed: Option<String>,
    status: FirewallStatus,
}

/// Time of the last reading of the counters, and its result.
type LastCounters = (Instant, Option<Counters>);

/// Handle of the firewall task. Clones share the task, which ends with the last handle.
#[derive(Debug, Clone)]
pub struct Firewall {
    rules: Arc<watch::Sender<(u64, Rules)>>,
    state: watch::Receiver<State>,
    counters: Arc<Mutex<Option<LastCounters>>>,
    _task: Arc<JoinSet<()>>,
}

impl Firewall {
    /// Installs the table and starts the task. [`Firewall::status`] contains the error of a failed
    /// installation. Without a monitor, the task notices changes of the table within 10 s.
    pub async fn start(rules: Rules, monitor: Option<&Monitor>) -> Self {
        let table = Table::new(rules.clone(), monitor);
        let forward_unknown = !needs_accept_rules(&rules);
        let (rules_sender, rules) = watch::channel((1, rules));
        let (state_sender, state) = watch::channel(State::default());
        let mut reconciler = Reconciler {
            forward_unknown,
            table,
            rules,
            state: state_sender,
            reported: Vec::new(),
            comparisons: VecDeque::new(),
        };
        reconciler.on_rules_changed().await;
        let mut task = JoinSet::new();
        task.spawn(reconciler.run());
        Self {
            rules: Arc::new(rules_sender),
            state,
            counters: Arc::default(),
            _task: Arc::new(task),
        }
    }

    /// Replaces the rules; the task installs them.
    pub fn set_rules(&self, rules: Rules) {
        self.rules.send_if_modified(|(revision, present)| {
            let differs = *present != rules;
            if differs {
                (*revision, *present) = (*revision + 1, rules);
            }
            differs
        });
    }

    /// Waits until the latest rules were applied or refused.
    ///
    /// # Errors
    /// [`TableError::NotInstalled`] with the reason, [`TableError::Ended`] without the firewall's
    /// task.
    pub async fn wait_until_applied(&self) -> Result<(), TableError> {
        let revision = self.rules.borrow().0;
        let mut state = self.state.clone();
        let wait_until_applied = state.wait_for(|state| state.revision >= revision).await;
        let state = wait_until_applied.map_err(|_| TableError::Ended)?;
        state.status.error.clone().map_or(Ok(()), |error| Err(TableError::NotInstalled(error)))
    }

    /// Compares the table in the kernel with the installed version.
    ///
    /// # Errors
    /// [`TableError::Changed`] or [`TableError::Unreadable`], and the errors of
    /// [`Self::wait_until_applied`].
    pub async fn verify(&self) -> Result<(), TableError> {
        self.wait_until_applied().await?;
        let (table, listed) = {
            let state = self.state.borrow();
            (state.status.table.clone(), state.listed.clone())
        };
        let Some(listed) = listed else { return Ok(()) };
        match list(&table).await {
            Ok(now) if now == listed => Ok(()),
            Ok(_) => Err(TableError::Changed { table }),
            Err(source) => Err(TableError::Unreadable { table, source }),
        }
    }

    /// Returns the result of the last comparison.
    pub fn status(&self) -> FirewallStatus {
        self.state.borrow().status.clone()
    }

    /// Returns the drop counters; `None` without a table. `nft` runs at most once per second,
    /// independent of the number of callers.
    pub async fn counters(&self) -> Option<Counters> {
        let mut last = self.counters.lock().await;
        if let Some((at, counters)) = *last
            && at.elapsed() < COUNTERS_MAX_AGE
        {
            return counters;
        }
        let table = self.rules.borrow().1.table.clone();
        let counters = counters::read(&table).await;
        *last = Some((Instant::now(), counters));
        counters
    }
}

struct Reconciler {
    table: Table,
    rules: watch::Receiver<(u64, Rules)>,
    state: watch::Sender<State>,
    /// True if accept rules of an earlier configuration may remain in chains of other programs. At
    /// the start, this is assumed if the configuration needs no accept rules.
    forward_unknown: bool,
    /// Messages that were logged already.
    reported: Vec<String>,
    /// Times of the last comparisons that notifications caused, at most [`MAX_COMPARISONS`].
    comparisons: VecDeque<Instant>,
}

impl Reconciler {
    async fn run(mut self) {
        let mut resync = tokio::time::interval(RESYNC_INTERVAL);
        resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = self.rules.changed() => match changed {
                    Ok(()) => self.on_rules_changed().await,
                    // All handles were dropped.
                    Err(_) => return,
                },
                () = self.table.changed() => {
                    self.pace().await;
                    self.compare().await;
                }
                _ = resync.tick() => {
                    self.compare().await;
                    self.update_forward_chains().await;
                }
            }
        }
    }

    /// Waits while notifications have caused [`MAX_COMPARISONS`] within [`PACE_WINDOW`].
    async fn pace(&mut self) {
        if self.comparisons.len() == MAX_COMPARISONS
            && let Some(first) = self.comparisons.pop_front()
        {
            tokio::time::sleep_until(first + PACE_WINDOW).await;
        }
        self.comparisons.push_back(Instant::now());
    }

    async fn on_rules_changed(&mut self) {
        let (revision, rules) = self.rules.borrow_and_update().clone();
        self.table.set_rules(rules);
        self.state.send_modify(|state| state.status.table.clone_from(&self.table.rules.table));
        self.compare().await;
        self.state.send_modify(|state| state.revision = revision);
    }

    async fn compare(&mut self) {
        let start = Instant::now();
        let known = self.table.listed.is_some();
        let result = self.table.ensure().await;
        let table = &self.table.rules.table;
        match &result {
            Ok(true) if known => {
                let took = start.elapsed();
                tracing::warn!(table, ?took, "nftables table was changed or deleted: restored");
            }
            Ok(true) => tracing::info!(table, "nftables table is in place"),
            Ok(false) => {}
            Err(error) => {
                let before = self.state.borrow().status.error.clone();
                if before.as_deref() != Some(&*error.to_string()) {
                    tracing::error!(table, %error, "nftables table is not in place");
                }
            }
        }
        self.state.send_modify(|state| {
            state.listed.clone_from(&self.table.listed);
            state.status.active = state.listed.is_some();
            state.status.error = result.err().map(|error| error.to_string());
        });
    }

    /// Adds accept rules for pods' packets to chains of other programs, or reports the chains that
    /// drop them.
    async fn update_forward_chains(&mut self) {
        let rules = &self.table.rules;
        let mut reported = Vec::new();
        if self.forward_unknown {
            match forward::remove().await {
                Ok(_) => self.forward_unknown = false,
                Err(error) => reported.push(format!(
                    "rules of an earlier configuration in chains of other programs: {error}"
                )),
            }
        }
        let pods = rules.pods.is_some();
        let forward = forward::ensure(&rules.interface, pods, needs_accept_rules(rules)).await;
        for chain in forward.opened {
            tracing::warn!(chain, "added accept rules for pods to a chain whose policy is drop");
        }
        reported.extend(forward.errors.iter().chain(&forward.unknown).cloned());
        for message in reported.iter().filter(|new| !self.reported.contains(new)) {
            tracing::error!("pods: {message}");
        }
        self.reported = reported;
        self.state.send_modify(|state| {
            state.status.closed = forward.errors;
            state.status.unknown = forward.unknown;
            state.status.forward_read = forward.read;
        });
    }
}

/// Returns whether this node adds accept rules for pods to the forward chains of other programs.
fn needs_accept_rules(rules: &Rules) -> bool {
    rules.pods.as_ref().is_some_and(|pods| pods.forward_accept)
}
