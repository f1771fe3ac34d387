//! Readiness and signals of a long-running process.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Readiness of the agent. The agent is ready while no [`NotReady`] guard exists.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<Blocks>>);

#[derive(Debug, Default)]
struct Blocks {
    next: u64,
    reasons: BTreeMap<u64, String>,
}

/// Guard that makes the agent not ready until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it means ready"]
pub struct NotReady {
    readiness: Readiness,
    id: u64,
}

impl Readiness {
    /// Makes the agent not ready, with a reason, until the guard is dropped.
    pub fn block(&self, reason: impl Into<String>) -> NotReady {
        let mut blocks = self.lock();
        let id = blocks.next;
        blocks.next += 1;
        blocks.reasons.insert(id, reason.into());
        drop(blocks);
        NotReady { readiness: self.clone(), id }
    }

    /// Returns the reasons that the agent is not ready; empty if the agent is ready.
    pub fn reasons(&self) -> Vec<String> {
        self.lock().reasons.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        // No code that holds the lock can leave the map inconsistent, so a poisoned lock is valid.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NotReady {
    /// Replaces the reason of this guard.
    pub fn because(&self, reason: impl Into<String>) {
        self.readiness.lock().reasons.insert(self.id, reason.into());
    }
}

impl Drop for NotReady {
    fn drop(&mut self) {
        self.readiness.lock().reasons.remove(&self.id);
    }
}

/// Handlers of SIGTERM, SIGINT and SIGHUP.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

/// Request that a signal expresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalEvent {
    /// SIGTERM or SIGINT: shut down.
    End,
    /// SIGHUP: reload the node records.
    Reload,
}

impl Signals {
    /// Installs the handlers. They replace the default actions for the rest of the process.
    ///
    /// # Errors
    /// The kernel refuses a handler.
    ///
    /// # Panics
    /// The function is called outside of a tokio runtime.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT. SIGHUP is ignored.
    pub async fn terminated(&mut self) {
        while self.next().await != SignalEvent::End {}
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) -> SignalEvent {
        tokio::select! {
            _ = self.terminate.recv() => SignalEvent::End,
            _ = self.interrupt.recv() => SignalEvent::End,
            _ = self.hangup.recv() => SignalEvent::Reload,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_is_ready_after_last_guard_is_dropped() {
        let readiness = Readiness::default();
        let a = readiness.block("a");
        let b = readiness.block("b");
        assert_eq!(readiness.reasons(), ["a", "b"]);
        drop(a);
        b.because("still b");
        assert_eq!(readiness.reasons(), ["still b"]);
        drop(b);
        assert!(readiness.reasons().is_empty());
    }
}
