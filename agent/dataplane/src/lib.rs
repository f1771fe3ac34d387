//! Data process of a node: lanes move packets, and a session manager maintains the sessions. The
//! data process uses plain threads. The control process configures the data process over a unix
//! socket; traffic continues while the control process is absent.
//!
//! A keeper process ([`run`]) starts the data process ([`work`]) and holds copies of its
//! descriptors, so that the next data process continues with the same sockets and sessions.

#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

pub mod activation;
mod active;
mod busy_poll;
mod capabilities;
mod changes;
mod channel;
mod clock;
mod confinement;
mod egress;
mod error;
mod fd_store;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handover;
mod ingress;
mod keeper;
mod lane;
mod lane_context;
mod manager;
mod memory;
mod options;
mod pending;
mod probe;
mod process;
mod queue;
mod report;
mod server;
mod setup;
mod stats;
mod tables;
mod tap;
#[cfg(test)]
mod testing;
mod totals;
mod vm_generation;
mod write;

pub use self::confinement::{Confined, ConfinementOptions, confine};
pub use self::keeper::run;
pub use self::manager::SetLogLevel;
pub use self::options::{Options, lock_path};
pub use self::probe::probe;
pub use self::process::{run_alone, work};
