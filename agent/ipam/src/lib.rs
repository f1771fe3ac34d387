//! Address management (IPAM) of a node: leases of pod addresses, committed to disk before they are
//! returned.
//!
//! All functions are blocking. They use no clock, no randomness and no interface of the kernel
//! except the file system. The caller passes the time as `now`. If the caller finds a lease in the
//! kernel's state, it stores the lease with [`Ipam::adopt`]. [`IpamHandle`] runs an [`Ipam`] on a
//! thread of its own, which commits concurrent operations in one transaction.
//!
//! ```
//! use std::time::SystemTime;
//!
//! use skein_cni_protocol::AttachmentId;
//! use skein_ipam::{FILE, Ipam, Netns, Opened, Request};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let state_dir = tempfile::tempdir()?;
//! let Opened { mut ipam, damaged } = Ipam::open(&state_dir.path().join(FILE))?;
//! assert_eq!(damaged, None);
//! ipam.set_pools(&["10.244.1.0/24".parse()?], &["10.244.1.1".parse()?]);
//! let id = AttachmentId { container_id: "c1".to_owned(), ifname: "eth0".to_owned() };
//! let request = Request {
//!     id: id.clone(),
//!     network: "pods".to_owned(),
//!     netns: Netns {
//!         path: "/run/netns/c1".into(),
//!         dev: 4,
//!         inode: 1,
//!         path_visible: true,
//!         boot_id: "boot".to_owned(),
//!     },
//!     pod: None,
//!     ips: Vec::new(),
//! };
//! let lease = ipam.allocate(request.clone(), SystemTime::now())?;
//! assert_eq!(ipam.allocate(request, SystemTime::now())?, lease);
//! assert_eq!(ipam.release(&id, SystemTime::now())?, Some(lease));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

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
