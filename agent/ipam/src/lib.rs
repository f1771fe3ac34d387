//! Which attachment has which addresses: leases, on the disk before anybody hears of them.
//!
//! Blocking code without a clock, without randomness and without a view of the kernel: `now` is an
//! argument, and what the kernel has is told by [`Ipam::adopt`]. [`IpamHandle`] puts it on a thread
//! of its own, which writes for all who wait in one transaction.

#![forbid(unsafe_code)]

mod allocator;
mod change_set;
mod error;
mod family;
mod free;
mod ipam;
mod lease;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod thread;

pub use allocator::{PoolUsage, QUARANTINE_TIME};
pub use error::{IpamError, OpenError, StoreError};
pub use ipam::{Damaged, FILE, Ipam, Opened};
pub use lease::{Lease, Netns};
pub use state::{Request, Usage};
pub use thread::{IpamHandle, Reply};
