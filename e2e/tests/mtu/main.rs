//! MTU of the overlay's interface and path MTU discovery.

mod path;
mod underlay;
