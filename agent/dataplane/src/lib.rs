//! The data process: lanes that move packets and a manager that keeps their sessions. Plain
//! threads; fed over a unix socket by the control process, and indifferent to its death.

#![forbid(unsafe_code)]

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

/// For the fuzzer.
pub use self::vm_generation::fuzz_uevent;

/// For the fuzzer: what a keeper and its data process say to each other.
#[doc(hidden)]
pub fn fuzz_frames(bytes: &[u8]) {
    skein_ipc::fuzz_frames::<handover::StartMessage>(bytes);
    skein_ipc::fuzz_frames::<handover::ToKeeper>(bytes);
    skein_ipc::fuzz_frames::<handover::Answer>(bytes);
}
