//! The table in the kernel, as the policy service uses it.

use std::collections::BTreeMap;
use std::future::Future;

use skein_netlink::nftables::Monitor;
use skein_netlink::pod::HOST_PREFIX;
use skein_policy::enforce::{self, EnforceError, Enforcer, Event, Installed};
use skein_policy::engine::Engine;
use skein_policy::program::{Difference, Program};
use skein_policy::render;

/// Name of the table, of the family inet.
pub const TABLE: &str = "skein-policy";
/// NFLOG group that receives refused packets.
const LOG_GROUP: u16 = 51;

/// Writer of the table. The service calls [`Table::install`] first, and again after each error and
/// after each [`Event::Changed`].
pub(super) trait Table: Send + 'static {
    /// Makes the table equal to a program. Returns whether an existing table was different.
    fn install(&mut self, program: &Program) -> impl Future<Output = Result<bool, String>>;

    /// Applies a difference from the last program.
    fn apply(&mut self, difference: &Difference) -> impl Future<Output = Result<(), String>>;

    /// Returns the packets of the table's counters, by name.
    fn counters(&mut self) -> impl Future<Output = Result<BTreeMap<String, u64>, String>>;

    /// Waits until the service must act. Cancel-safe.
    fn next_event(&mut self) -> impl Future<Output = Event>;

    /// Ends open connections that the engine's program refuses.
    fn sweep(&mut self, engine: &Engine) -> impl Future<Output = Result<(), String>>;

    /// Returns whether the kernel has a table of this or of an earlier agent.
    fn exists(&mut self) -> impl Future<Output = Result<bool, String>>;
}

/// The table in the kernel. It is opened by the first request, and by the next one after a failure.
#[derive(Debug)]
pub(super) struct KernelTable {
    mode: render::Mode,
    /// Notifications of the kernel; `None` until they are available.
    monitor: Option<Monitor>,
    enforcer: Option<Enforcer>,
}

impl KernelTable {
    /// Returns the table for policies with this effect. `monitor` has the notifications of the
    /// kernel; without it, the first request subscribes to them.
    pub(super) fn new(mode: render::Mode, monitor: Option<Monitor>) -> Self {
        Self { mode, monitor, enforcer: None }
    }

    fn open(&mut self) -> Result<&mut Enforcer, String> {
        let enforcer = match self.enforcer.take() {
            Some(enforcer) => enforcer,
            None => {
                let mode = self.mode;
                let (name, pod_prefix) = (TABLE.to_owned(), HOST_PREFIX.to_owned());
                let table = render::Table { name, pod_prefix, log_group: LOG_GROUP, mode };
                let monitor = match self.monitor.take() {
                    Some(monitor) => monitor,
                    None => Monitor::start().map_err(|error| format!("nftables: {error}"))?,
                };
                let opened = Enforcer::open(table, &monitor);
                self.monitor = Some(monitor);
                opened.map_err(text)?
            }
        };
        Ok(self.enforcer.insert(enforcer))
    }
}

impl Table for KernelTable {
    async fn install(&mut self, program: &Program) -> Result<bool, String> {
        let installed = self.open()?.install(program).await.map_err(text)?;
        Ok(installed == Installed::Repaired)
    }

    async fn apply(&mut self, difference: &Difference) -> Result<(), String> {
        self.open()?.apply(difference).await.map_err(text)
    }

    async fn counters(&mut self) -> Result<BTreeMap<String, u64>, String> {
        let counters = self.open()?.counters().await.map_err(text)?;
        Ok(counters.into_iter().map(|(name, count)| (name, count.packets)).collect())
    }

    async fn next_event(&mut self) -> Event {
        match &mut self.enforcer {
            Some(enforcer) => enforcer.next_event().await,
            None => std::future::pending().await,
        }
    }

    async fn sweep(&mut self, engine: &Engine) -> Result<(), String> {
        self.open()?.sweep(engine).await.map_err(text)?;
        Ok(())
    }

    async fn exists(&mut self) -> Result<bool, String> {
        self.open()?.exists().await.map_err(text)
    }
}

fn text(error: EnforceError) -> String {
    error.to_string()
}

/// Removes the table; returns whether it existed.
///
/// # Errors
/// A message if `nft` fails.
pub(super) async fn remove() -> Result<bool, String> {
    enforce::remove(TABLE).await.map_err(text)
}
