//! What a long-running process needs: readiness, and the signals that end it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Whether the agent is ready: it is while nobody holds a guard.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<Blocks>>);

#[derive(Debug, Default)]
struct Blocks {
    next: u64,
    reasons: BTreeMap<u64, String>,
}

/// Keeps the agent from being ready until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it means ready"]
pub struct NotReady {
    readiness: Readiness,
    id: u64,
}

impl Readiness {
    /// Says that the agent is not ready, and why, until the guard is dropped.
    pub fn block(&self, reason: impl Into<String>) -> NotReady {
        let mut blocks = self.lock();
        let id = blocks.next;
        blocks.next += 1;
        blocks.reasons.insert(id, reason.into());
        drop(blocks);
        NotReady { readiness: self.clone(), id }
    }

    /// Why the agent is not ready; empty where it is.
    pub fn reasons(&self) -> Vec<String> {
        self.lock().reasons.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        // Nothing in here can panic half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NotReady {
    /// Gives another reason.
    pub fn because(&self, reason: impl Into<String>) {
        self.readiness.lock().reasons.insert(self.id, reason.into());
    }
}

impl Drop for NotReady {
    fn drop(&mut self) {
        self.readiness.lock().reasons.remove(&self.id);
    }
}

/// The signals of a service.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// SIGTERM, SIGINT: end in an orderly way.
    End,
    /// SIGHUP: read the node records again.
    Reload,
}

impl Signals {
    /// Takes the signals from now on.
    pub fn take() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for one that ends the process.
    pub async fn end(&mut self) {
        while self.next().await != Asked::End {}
    }

    /// Waits for the next.
    pub async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::End,
            _ = self.interrupt.recv() => Asked::End,
            _ = self.hangup.recv() => Asked::Reload,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_guard_is_dropped() {
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
