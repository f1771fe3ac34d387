//! Constants of the form of nftables messages.

/// Subsystem of nftables in the upper byte of a message's type (linux/netfilter/nfnetlink.h).
pub(super) const NFNL_SUBSYS_NFTABLES: u8 = 10;
/// Flag of a request (linux/netlink.h).
pub(super) const NLM_F_REQUEST: u16 = 1;
/// Attribute with the table's name: the first one in messages about tables, chains, rules, sets,
/// elements and objects (linux/netfilter/nf_tables.h).
pub(super) const NFTA_TABLE: u16 = 1;
/// Bytes of the header before the attributes (struct nfgenmsg: family, version, resource).
pub(super) const NFGENMSG_LENGTH: usize = 4;
/// Bytes of the largest datagram that the kernel sends: NLMSG_GOODSIZE is a page or 8 KiB.
pub(super) const MAX_DATAGRAM: usize = 64 << 10;
