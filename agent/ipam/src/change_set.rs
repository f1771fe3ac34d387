//! What a batch has changed in memory: to be written in one transaction, or to be undone.

use std::net::IpAddr;
use std::time::SystemTime;

use skein_cni_protocol::AttachmentId;

use super::family::Family;
use super::lease::Lease;

/// Changes in the order in which they were made.
#[derive(Debug, Default)]
pub(super) struct ChangeSet {
    /// Leases before and after.
    pub(super) leases: Vec<(AttachmentId, Step<Lease>)>,
    /// When a quarantined address was freed, before and after.
    pub(super) quarantined: Vec<(IpAddr, Step<SystemTime>)>,
    /// The address that was given last, before and after.
    pub(super) cursors: Vec<(Family, Step<u128>)>,
}

/// A value before and after a change.
#[derive(Debug)]
pub(super) struct Step<T> {
    /// To return to.
    pub(super) before: Option<T>,
    /// To be written.
    pub(super) after: Option<T>,
}

impl ChangeSet {
    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.quarantined.is_empty() && self.cursors.is_empty()
    }
}
