//! Log lines of the control process that report each problem once.

use skein_netlink::interface::ReconcileReport;

use super::desired::Desired;

pub(super) fn log_changes(outcome: &ReconcileReport) {
    if !outcome.changes.is_empty() {
        tracing::info!("routes of type unreachable changed: {}", abridged(&outcome.changes));
    }
}

/// Logs endpoints that have become unusable, each once.
pub(super) fn log_unresolved(before: &[String], now: &[String]) {
    for problem in now.iter().filter(|problem| !before.contains(problem)) {
        tracing::error!("{problem}");
    }
}

/// Logs that the MTU is too small, once for each problem.
pub(super) fn log_mtu_problem(before: Option<&Desired>, now: &Desired) {
    let problem = now.mtu_problem.as_ref();
    let known = before.and_then(|before| before.mtu_problem.as_ref());
    if let Some(problem) = problem.filter(|_| problem != known) {
        tracing::error!("{problem}");
    }
}

/// Returns the first 20 changes and the number of further ones.
pub(super) fn abridged(changes: &[String]) -> String {
    const SHOWN: usize = 20;
    let more = match changes.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    changes[..changes.len().min(SHOWN)].join("; ") + &more
}
