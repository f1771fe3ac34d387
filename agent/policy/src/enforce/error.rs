//! Errors of enforcement.

use std::io;

use skein_netlink::nftables::{FirewallError, NFT_TIMEOUT, NftablesError};
use thiserror::Error;

/// Reasons why the table is not as wanted.
#[derive(Debug, Error)]
pub enum EnforceError {
    /// The program `nft` failed.
    #[error(transparent)]
    Nft(#[from] FirewallError),
    /// A request by netlink failed.
    #[error(transparent)]
    Netlink(#[from] NftablesError),
    /// The number of the last transaction cannot be read.
    #[error("cannot read the generation of nftables: {0}")]
    Monitor(#[source] io::Error),
    /// The kernel did not answer within 10 s, for example because another program's transaction
    /// takes longer.
    #[error("nftables did not answer within {NFT_TIMEOUT:?}")]
    Timeout,
    /// The table was changed by another program during every attempt to install it.
    #[error("another program changes the table while it is installed. Stop that program.")]
    Contended,
}

impl EnforceError {
    /// Returns whether the table has changed since it was read, so that another attempt can
    /// succeed.
    pub(super) fn is_divergence(&self) -> bool {
        match self {
            Self::Netlink(error) => matches!(
                error,
                NftablesError::Absent { .. }
                    | NftablesError::Conflict { .. }
                    | NftablesError::Contended
            ),
            Self::Nft(_) | Self::Monitor(_) | Self::Timeout | Self::Contended => false,
        }
    }

    /// Returns whether the kernel has refused a change for a reason other than the presence or
    /// absence of an element.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Nft(FirewallError::Refused(_)) | Self::Netlink(NftablesError::Refused { .. })
        )
    }
}
