//! Start, change, failure, upgrade and removal of an agent and its data process.

mod clocks;
mod dataplane;
mod faults;
mod operations;
mod records;
mod repairs;
mod resources;
mod start_errors;
mod upgrade;
