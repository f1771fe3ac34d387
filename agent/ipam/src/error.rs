//! Why an address was not given, and why the store of leases could not be used.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use skein_cni_protocol::AttachmentId;
use skein_cni_protocol::types::ErrorCode;
use thiserror::Error;

use super::lease::Lease;

/// Why an operation on leases was not done; nothing has changed then.
#[derive(Debug, Clone, Error)]
pub enum IpamError {
    /// Every address of a family is leased.
    #[error("no free address in {} ({in_use} in use)", DisplayCidrs(cidrs))]
    Exhausted {
        /// The pools of the family.
        cidrs: Vec<IpNet>,
        /// Leases in them.
        in_use: u64,
    },
    /// The node has no pod CIDR yet.
    #[error("this node has no pod CIDR yet")]
    NoPools,
    /// The attachment has a lease in another namespace, from which it has to be detached first.
    #[error("{} has a lease in another network namespace", DisplayId(&.0.id))]
    OtherNamespace(Box<Lease>),
    /// An address that was asked for is not this node's to give.
    #[error("{0} is in none of this node's pod CIDRs")]
    NotInPool(IpAddr),
    /// An address that was asked for is the network's, or the node's own.
    #[error("{0} is reserved")]
    Reserved(IpAddr),
    /// An address belongs to another attachment.
    #[error("{ip} belongs to {}", DisplayId(holder))]
    Taken {
        /// Which address.
        ip: IpAddr,
        /// Whose it is.
        holder: Box<AttachmentId>,
    },
    /// Two addresses of a family were asked for.
    #[error("{0} and {1} were both asked for, where an interface has one address of a family")]
    TooMany(IpAddr, IpAddr),
    /// A lease that was learnt has no address.
    #[error("the lease of {} has no address", DisplayId(.0))]
    NoAddress(Box<AttachmentId>),
    /// The path of a namespace cannot be stored.
    #[error("the path of the network namespace is not UTF-8: {}", .0.display())]
    Path(PathBuf),
    /// The store of leases failed. Whether the change reached the disk is known when the store can
    /// be read again; to ask the same again is right in either case.
    #[error("store of leases: {0}")]
    Store(Arc<StoreError>),
    /// The thread that keeps the leases has ended.
    #[error("the agent is ending")]
    Stopped,
}

impl IpamError {
    /// What the CNI specification calls it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Exhausted { .. } | Self::NoPools | Self::Stopped | Self::OtherNamespace(_) => {
                ErrorCode::TryAgainLater
            }
            Self::NotInPool(_) | Self::Reserved(_) | Self::Taken { .. } | Self::TooMany(..) => {
                ErrorCode::InvalidNetworkConfig
            }
            Self::NoAddress(_) | Self::Path(_) => ErrorCode::Decoding,
            Self::Store(_) => ErrorCode::Io,
        }
    }
}

/// What is wrong with the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("another process uses it: stop that one, or give each agent a state_dir of its own")]
    InUse,
    /// A newer Skein has written it.
    #[error(
        "it was written by a newer Skein (schema {found}, where this one knows {known}): install \
         that version again, or drain the node and remove the file"
    )]
    Newer {
        /// Schema of the file.
        found: u64,
        /// The newest that this version knows.
        known: u64,
    },
    /// It is not what was once written.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// The disk, or a quota, is full.
    #[error("no allocator left on its file system")]
    Full,
    /// Reading or writing failed.
    #[error(transparent)]
    Io(io::Error),
    /// Anything else that the database says.
    #[error(transparent)]
    Database(redb::Error),
}

impl From<redb::Error> for StoreError {
    fn from(error: redb::Error) -> Self {
        use redb::Error as E;
        match error {
            E::DatabaseAlreadyOpen | E::LockProtocolMismatch => Self::InUse,
            E::Io(error) => error.into(),
            E::Corrupted(_)
            | E::UpgradeRequired(_)
            | E::TableTypeMismatch { .. }
            | E::TypeDefinitionChanged { .. }
            | E::TableIsMultimap(_)
            | E::TableIsNotMultimap(_)
            | E::TableDoesNotExist(_) => Self::Damaged(error.to_string()),
            error => Self::Database(error),
        }
    }
}

macro_rules! from_parts_of_the_database {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                redb::Error::from(error).into()
            }
        }
    )*};
}
from_parts_of_the_database!(
    redb::CommitError,
    redb::DatabaseError,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError
);

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as K;
        match error.kind() {
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => Self::Full,
            // What the database says of bytes that it did not write, and of a file cut short.
            K::InvalidData | K::UnexpectedEof => Self::Damaged(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

/// The store could not be opened.
#[derive(Debug, Error)]
#[error("store of leases {}: {error}", .path.display())]
pub struct OpenError {
    /// Its file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub error: StoreError,
}

struct DisplayId<'a>(&'a AttachmentId);

impl fmt::Display for DisplayId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of container {}", self.0.ifname, self.0.container_id)
    }
}

struct DisplayCidrs<'a>(&'a [IpNet]);

impl fmt::Display for DisplayCidrs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, cidr) in self.0.iter().enumerate() {
            write!(f, "{}{cidr}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
