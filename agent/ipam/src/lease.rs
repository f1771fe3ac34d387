//! Leases, and the network namespaces that they belong to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use skein_cni_protocol::{AttachmentId, Pod};

/// Lease of an attachment. Later versions may add fields. A missing field gets its default, and an
/// unknown field is ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Attachment that has the lease.
    pub id: AttachmentId,
    /// Name of the network in the CNI configuration.
    #[serde(default)]
    pub network: String,
    /// Leased IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4: Option<Ipv4Addr>,
    /// Leased IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Ipv6Addr>,
    /// Network namespace of the attachment; `None` for a lease that was adopted from the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<Netns>,
    /// Kubernetes pod, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// Time of the allocation or adoption (wall clock), stored in milliseconds since 1970.
    #[serde(default = "epoch", with = "millis")]
    pub time: SystemTime,
}

/// Identity of a network namespace at the time of the allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    /// Path from `CNI_NETNS`.
    #[serde(default)]
    pub path: PathBuf,
    /// Device number of the namespace's inode.
    pub dev: u64,
    /// Inode number. The kernel may reuse it for a later namespace.
    pub inode: u64,
    /// True if the agent has seen this inode at `path`. If the inode is no longer there, the
    /// namespace is gone.
    #[serde(default)]
    pub path_visible: bool,
    /// The kernel's `boot_id` at that time; inode numbers do not survive a reboot.
    #[serde(default)]
    pub boot_id: String,
}

impl Netns {
    /// Returns whether both identify the same namespace of the same boot, independent of the path.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.dev, self.inode, &self.boot_id) == (other.dev, other.inode, &other.boot_id)
    }
}

impl Lease {
    /// Returns the addresses, IPv4 first.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

fn epoch() -> SystemTime {
    SystemTime::UNIX_EPOCH
}

/// Conversion of times to whole milliseconds since 1970; earlier times become 1970.
pub(super) mod millis {
    use std::time::{Duration, SystemTime};

    use serde::{Deserialize, Deserializer, Serializer};

    /// Returns a time in milliseconds since 1970.
    pub(in super::super) fn of(time: SystemTime) -> u64 {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns the time from milliseconds since 1970; 1970 if the clock cannot represent it.
    pub(in super::super) fn to_time(millis: u64) -> SystemTime {
        let since = Duration::from_millis(millis);
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Rounds a time to the value that it has after it was stored.
    pub(in super::super) fn rounded(time: SystemTime) -> SystemTime {
        to_time(of(time))
    }

    pub(in super::super) fn serialize<S: Serializer>(
        time: &SystemTime,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(of(*time))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<SystemTime, D::Error> {
        u64::deserialize(deserializer).map(to_time)
    }
}
