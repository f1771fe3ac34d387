//! The packet and protocol core of Skein.
//!
//! Everything in here is a pure function of its arguments: there is no socket, no clock and no
//! source of randomness. Time ([`time::Time`]) and random bytes are handed in, datagrams to send
//! are polled out. That is what lets the tests join two engines by a simulated link with a virtual
//! clock, and the fuzzers reach every byte that a stranger controls.

#![forbid(unsafe_code)]

pub mod address;
pub mod drop;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod offload;
pub mod route;
pub mod time;
pub mod tunnel;
pub mod wire;
