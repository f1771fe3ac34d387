//! The table in the kernel, as the policy service uses it.

use std::collections::BTreeMap;
use std::future::Future;

use skein_policy::program::{Difference, Program};

use crate::config::PolicyMode;

/// Name of the table, of the family inet.
pub const TABLE: &str = "skein-policy";

/// Writer of the table. The service calls [`Table::install`] first, and again after each error and
/// after each return of [`Table::changed`].
pub(super) trait Table: Send + 'static {
    /// Makes the table equal to a program. Returns whether an existing table was different.
    fn install(&mut self, program: &Program) -> impl Future<Output = Result<bool, String>>;

    /// Applies a difference from the last program.
    fn apply(&mut self, difference: &Difference) -> impl Future<Output = Result<(), String>>;

    /// Returns the packets of the table's counters, by name.
    fn counters(&mut self) -> impl Future<Output = Result<BTreeMap<String, u64>, String>>;

    /// Waits until the table may differ from the last program. Cancel-safe.
    fn changed(&mut self) -> impl Future<Output = ()>;

    /// Returns whether the kernel has a table of this or of an earlier agent.
    fn exists(&mut self) -> impl Future<Output = Result<bool, String>>;
}

/// The table in the kernel.
#[derive(Debug)]
pub(super) struct KernelTable;

impl KernelTable {
    /// Returns the table for policies with this effect.
    pub(super) fn new(_: PolicyMode) -> Self {
        Self
    }
}

/// Error of every request.
fn missing<T>() -> Result<T, String> {
    Err("this version has no writer of the kernel's table".to_owned())
}

impl Table for KernelTable {
    async fn install(&mut self, _: &Program) -> Result<bool, String> {
        missing()
    }

    async fn apply(&mut self, _: &Difference) -> Result<(), String> {
        missing()
    }

    async fn counters(&mut self) -> Result<BTreeMap<String, u64>, String> {
        missing()
    }

    async fn changed(&mut self) {
        std::future::pending().await
    }

    async fn exists(&mut self) -> Result<bool, String> {
        Ok(false)
    }
}

/// Removes the table; returns whether it existed.
///
/// # Errors
/// A message if `nft` fails.
pub(super) async fn remove() -> Result<bool, String> {
    let removed = skein_netlink::firewall::remove(TABLE).await;
    removed.map_err(|error| error.to_string())
}
