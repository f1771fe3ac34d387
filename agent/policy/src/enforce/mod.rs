//! Enforcement of a [`Program`] in the kernel: the nftables table and its changes.
//!
//! ```text
//! open ──► install(program) ──► apply(difference) ──► …
//!              ▲                      │ error
//!              └─ Event::Changed ◄────┘
//! ```

mod encode;
mod error;
mod kernel;
mod plan;
mod sweep;

use std::collections::BTreeMap;
use std::time::Duration;

use skein_netlink::firewall;
use skein_netlink::nftables::{Count, Monitor, nft};
use tokio::time::Instant;

use crate::program::{Difference, Program};
use crate::render::{self, Mode, Table};

pub use self::error::EnforceError;
use self::kernel::Kernel;
use self::plan::{Plan, Rules, element_steps};
use self::sweep::Sweeps;

/// Maximum number of installations in a row while another program changes the table.
const MAX_ATTEMPTS: usize = 3;
/// Minimum time between two returns of [`Enforcer::next_event`], so that a program that keeps
/// changing the table does not keep a CPU busy.
const MIN_CHANGE_INTERVAL: Duration = Duration::from_millis(50);
/// Delay before [`Enforcer::next_event`] returns after a failed installation.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Reason why the caller of [`Enforcer::next_event`] must act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The table can differ from the program: another program has changed the table, or an
    /// installation or difference has failed. The caller installs the program again.
    Changed,
    /// Connections may be open that the program refuses. The caller calls [`Enforcer::sweep`]; the
    /// event is reported once.
    SweepDue,
}

/// Result of an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installed {
    /// The table was as wanted.
    Unchanged,
    /// The table did not exist.
    Created,
    /// The table existed, and parts of it were changed.
    Repaired,
}

/// Owner of the policy table in the kernel, in the network namespace of the thread that called
/// [`Enforcer::open`].
///
/// # Contract
/// - One `Enforcer` exists for a table at a time.
/// - After `open`, the caller installs a whole program ([`Enforcer::install`]). Until then, the
///   table in the kernel stays as an earlier process has left it.
/// - Afterwards the caller applies each difference of the program in order ([`Enforcer::apply`]).
/// - After an error of `apply`, and after each [`Event::Changed`], the caller installs the present
///   program again. An installation compares the table with the program and changes
///   only what differs.
/// - The table stays in the kernel when the `Enforcer` is dropped. [`remove`] deletes it.
///
/// Futures of this type are not cancel-safe, with the exception of [`Enforcer::next_event`]: if one
/// is dropped, the caller installs the program again.
#[derive(Debug)]
pub struct Enforcer {
    table: Table,
    kernel: Kernel,
    /// Fingerprints of the rules of each chain after the last installation or difference.
    rules: Rules,
    /// True if the table can differ from the program.
    stale: bool,
    /// Earliest time of the next [`Event::Changed`].
    not_before: Instant,
    sweeps: Sweeps,
}

impl Enforcer {
    /// Opens the netlink socket for requests and subscribes to notifications about the table. The
    /// table in the kernel does not change.
    ///
    /// # Errors
    /// `Netlink` if the kernel has no nfnetlink.
    pub fn open(table: Table, monitor: &Monitor) -> Result<Self, EnforceError> {
        let kernel = Kernel::open(&table.name, monitor)?;
        let rules = Rules::default();
        let not_before = Instant::now();
        Ok(Self { table, kernel, rules, stale: true, not_before, sweeps: Sweeps::default() })
    }

    /// Returns the properties of the table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Changes the effect of refusals. The next installation changes the table.
    pub fn set_mode(&mut self, mode: Mode) {
        if self.table.mode != mode {
            self.table.mode = mode;
            self.rules.clear();
            self.stale = true;
        }
    }

    /// Makes the table equal to the program: sets and elements first, then chains, then verdicts of
    /// interfaces, and base chains last. An existing table is adopted: objects with the right
    /// content stay, and base chains are neither deleted nor re-created.
    ///
    /// # Errors
    /// `Nft` and `Netlink` if the kernel refuses the table or cannot be reached. `Contended` if
    /// another program changes the table during three attempts.
    pub async fn install(&mut self, program: &Program) -> Result<Installed, EnforceError> {
        let mut outcome = Installed::Unchanged;
        let mut failure = EnforceError::Contended;
        for _ in 0..MAX_ATTEMPTS {
            match self.reconcile(program).await {
                Ok(done) => {
                    if done != Installed::Unchanged && outcome != Installed::Created {
                        outcome = done;
                    }
                    if !self.stale {
                        self.sweeps.on_installed(outcome);
                        return Ok(outcome);
                    }
                }
                Err(error) if error.is_divergence() => failure = error,
                Err(error) => {
                    self.fail();
                    return Err(error);
                }
            }
        }
        self.fail();
        Err(failure)
    }

    /// Applies a difference to the table. Elements and verdicts of interfaces are changed by
    /// netlink, in one transaction for up to 1,000 changes. Other changes need one run of `nft`.
    ///
    /// # Errors
    /// `Netlink` if the table does not have the content that the difference assumes, or cannot be
    /// reached; `Nft` if `nft` fails. The caller then installs the whole program.
    pub async fn apply(&mut self, difference: &Difference) -> Result<(), EnforceError> {
        if difference.is_empty() {
            return Ok(());
        }
        let result = self.try_apply(difference).await;
        match result {
            Ok(()) => self.sweeps.request(),
            Err(_) => self.stale = true,
        }
        result
    }

    /// Compares the table with the program and changes nothing. Returns whether they are equal.
    ///
    /// # Errors
    /// `Netlink` if the table cannot be read.
    pub async fn verify(&mut self, program: &Program) -> Result<bool, EnforceError> {
        let plan = Plan::new(&mut self.kernel, &self.rules, program).await?;
        Ok(plan.outcome() == Installed::Unchanged)
    }

    /// Waits until the caller must act. Returns [`Event::Changed`] at most 20 times per second; the
    /// first one after a failed installation comes 1 s later. Cancel-safe.
    pub async fn next_event(&mut self) -> Event {
        let changed = async {
            if !self.stale {
                self.kernel.changed().await;
                self.stale = true;
            }
            tokio::time::sleep_until(self.not_before).await;
        };
        tokio::select! {
            () = changed => {
                self.not_before = Instant::now() + MIN_CHANGE_INTERVAL;
                Event::Changed
            }
            () = self.sweeps.wait() => {
                self.sweeps.on_reported();
                Event::SweepDue
            }
        }
    }

    /// Returns whether the kernel has the table.
    ///
    /// # Errors
    /// `Netlink` if the table cannot be read.
    pub async fn exists(&mut self) -> Result<bool, EnforceError> {
        let table = self.table.name.clone();
        let objects = self.kernel.with(move |connection| connection.objects(&table)).await?;
        Ok(objects.is_some())
    }

    /// Returns the values of the table's counters, by name.
    ///
    /// # Errors
    /// `Netlink` if the counters cannot be read.
    pub async fn counters(&mut self) -> Result<BTreeMap<String, Count>, EnforceError> {
        let table = self.table.name.clone();
        self.kernel.with(move |connection| connection.counters(&table)).await
    }

    /// Installs the program once.
    async fn reconcile(&mut self, program: &Program) -> Result<Installed, EnforceError> {
        let before = self.kernel.begin().await?;
        let plan = Plan::new(&mut self.kernel, &self.rules, program).await?;
        let (outcome, is_absent) = (plan.outcome(), plan.is_absent);
        let mut own = 0;
        let mut result = Ok(());
        if outcome != Installed::Unchanged {
            result = self.execute(plan, &mut own).await;
        }
        if let Err(error) = result {
            if is_absent || !error.is_refusal() {
                return Err(error);
            }
            // Objects of an older agent or of another program have the same names but other types.
            let table = &self.table.name;
            let text = render::install(&self.table, program);
            run(&format!("add table inet {table}\ndelete table inet {table}\n{text}")).await?;
            own += 1;
            self.remember().await?;
        }
        self.stale = !self.kernel.end(before, own).await?;
        if self.stale {
            self.rules.clear();
        }
        Ok(outcome)
    }

    /// Executes a plan and adds the number of its transactions to `own`.
    async fn execute(&mut self, plan: Plan, own: &mut u32) -> Result<(), EnforceError> {
        if let Some(structure) = &plan.structure {
            run(&render::structure(&self.table, structure)).await?;
            *own += 1;
        }
        *own += self.kernel.commit(plan.steps).await?;
        if plan.hooks || !plan.removals.is_empty() {
            run(&render::completion(&self.table, plan.hooks, &plan.removals)).await?;
            *own += 1;
        }
        self.remember().await
    }

    /// Remembers the rules of all chains.
    async fn remember(&mut self) -> Result<(), EnforceError> {
        let table = self.table.name.clone();
        let objects = self.kernel.with(move |connection| connection.objects(&table)).await?;
        self.rules.remember(&objects.unwrap_or_default());
        Ok(())
    }

    async fn try_apply(&mut self, difference: &Difference) -> Result<(), EnforceError> {
        let before = self.kernel.begin().await?;
        let steps = element_steps(difference);
        let is_structure = steps.is_none();
        let own = match steps {
            Some(steps) => self.kernel.commit(steps).await?,
            None => {
                run(&render::apply(&self.table, difference)).await?;
                let table = self.table.name.clone();
                let objects =
                    self.kernel.with(move |connection| connection.objects(&table)).await?;
                self.rules.remember_new(&objects.unwrap_or_default());
                1
            }
        };
        let alone = self.kernel.end(before, own).await?;
        if !alone && is_structure {
            self.rules.clear();
        }
        self.stale |= before.foreign || !alone;
        Ok(())
    }

    fn fail(&mut self) {
        self.stale = true;
        self.not_before = Instant::now() + RETRY_DELAY;
    }
}

/// Runs `nft` with a transaction.
async fn run(transaction: &str) -> Result<(), EnforceError> {
    nft(&["-f", "-"], transaction).await?;
    Ok(())
}

/// Removes a table. Returns whether it existed.
///
/// # Errors
/// `Nft` if `nft` fails; a missing `nft` program is not an error.
pub async fn remove(table: &str) -> Result<bool, EnforceError> {
    Ok(firewall::remove(table).await?)
}
