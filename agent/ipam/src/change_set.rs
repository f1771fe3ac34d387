//! Changes of a batch of operations in memory, to be committed in one transaction or undone.

use std::net::IpAddr;
use std::time::SystemTime;

use skein_cni_protocol::AttachmentId;

use super::family::Family;
use super::lease::Lease;

/// Changes in the order of the operations.
#[derive(Debug, Default)]
pub(super) struct ChangeSet {
    /// Leases before and after each change.
    pub(super) leases: Vec<(AttachmentId, Step<Lease>)>,
    /// Release times of quarantined addresses, before and after each change.
    pub(super) quarantined: Vec<(IpAddr, Step<SystemTime>)>,
    /// Cursor of a family before and after each change.
    pub(super) cursors: Vec<(Family, Step<u128>)>,
}

/// Value before and after a change.
#[derive(Debug)]
pub(super) struct Step<T> {
    /// Value that an undo restores; `None` if there was none.
    pub(super) before: Option<T>,
    /// Value to write; `None` deletes the entry.
    pub(super) after: Option<T>,
}

impl ChangeSet {
    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.quarantined.is_empty() && self.cursors.is_empty()
    }
}
