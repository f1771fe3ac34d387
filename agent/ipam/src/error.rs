//! Errors of allocations and of the store.

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

/// Errors of an operation on leases. The leases are unchanged after an error.
#[derive(Debug, Clone, Error)]
pub enum IpamError {
    /// Every address of a family is leased.
    #[error("no free address in {} ({in_use} in use)", DisplayCidrs(cidrs))]
    Exhausted {
        /// Pools of the family.
        cidrs: Vec<IpNet>,
        /// Number of leases in the pools.
        in_use: u64,
    },
    /// The node has no pod CIDR yet.
    #[error("this node has no pod CIDR yet")]
    NoPools,
    /// The attachment has a lease in another network namespace, which must be released first.
    #[error("{} has a lease in another network namespace", DisplayId(&.0.id))]
    OtherNamespace(Box<Lease>),
    /// The requested address is in no pool of this node.
    #[error("{0} is in none of this node's pod CIDRs")]
    NotInPool(IpAddr),
    /// The requested address is reserved: a network or broadcast address, or an address of the
    /// node.
    #[error("{0} is reserved")]
    Reserved(IpAddr),
    /// The requested address belongs to another attachment.
    #[error("{ip} belongs to {}", DisplayId(holder))]
    Taken {
        /// Address with a conflict.
        ip: IpAddr,
        /// Attachment that has the address.
        holder: Box<AttachmentId>,
    },
    /// Two requested addresses have the same family.
    #[error(
        "{0} and {1} have the same address family; an interface gets one address per family. \
         Request one of the two."
    )]
    TooMany(IpAddr, IpAddr),
    /// The adopted lease has no address.
    #[error("the lease of {} has no address", DisplayId(.0))]
    NoAddress(Box<AttachmentId>),
    /// The path of the network namespace is not UTF-8 and cannot be stored.
    #[error("the path of the network namespace is not UTF-8: {}", .0.display())]
    Path(PathBuf),
    /// The store failed. The outcome on disk is unknown until the store can be read again; a retry
    /// is correct in either case.
    #[error("store of leases: {0}")]
    Store(Arc<StoreError>),
    /// The thread of the leases has ended.
    #[error("the agent is ending")]
    Stopped,
}

impl IpamError {
    /// Returns the error code of the CNI specification.
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

/// Errors of the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The file is open in another process.
    #[error(
        "another process uses it. Stop that process, or give each agent a state_dir of its own."
    )]
    InUse,
    /// A newer version of Skein has written the file.
    #[error(
        "a newer version of Skein has written it (schema {found}, expected at most {known}). Install \
         that version again, or drain the node and remove the file."
    )]
    Newer {
        /// Schema version of the file.
        found: u64,
        /// Highest schema version that this program supports.
        known: u64,
    },
    /// The content differs from what was written.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// The file system or a quota is full.
    #[error("no space left on its file system")]
    Full,
    /// An I/O operation failed.
    #[error(transparent)]
    Io(io::Error),
    /// The database reported another error.
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

/// Implements `From` for the error types of redb's operations, by way of [`redb::Error`].
macro_rules! impl_from_database_errors {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                redb::Error::from(error).into()
            }
        }
    )*};
}
impl_from_database_errors!(
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
            // The database reports content that it has not written, or a truncated file, with these
            // kinds.
            K::InvalidData | K::UnexpectedEof => Self::Damaged(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

/// Error of opening the store.
#[derive(Debug, Error)]
#[error("store of leases {}: {error}", .path.display())]
pub struct OpenError {
    /// Path of the file.
    pub path: PathBuf,
    /// Cause of the failure.
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
