//! nftables: execution of the program `nft`, notifications of the kernel, and access to the content
//! of a table by netlink.
//!
//! The structure of a table (chains, rules, definitions of sets) is written as text for `nft`.
//! Elements of sets and maps are written by netlink ([`Connection::commit`]), because `nft` reads
//! the whole table before every change.

mod attribute;
mod connection;
mod dump;
mod element;
mod message;
pub(crate) mod monitor;
mod program;

pub(crate) use self::attribute::attribute;
pub use self::connection::{Connection, NftablesError};
pub use self::dump::{Count, Objects};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::element::fuzz_element;
pub use self::element::{Change, Element, ElementVerdict};
pub use self::monitor::{Monitor, Received, Subscription};
pub use self::program::{FirewallError, NFT_TIMEOUT, nft};
pub(crate) use self::program::{finished, start_error};
