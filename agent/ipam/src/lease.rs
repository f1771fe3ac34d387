//! What is known of an attachment's addresses, and of the namespace that they are in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use skein_cni_protocol::{AttachmentId, Pod};

/// The addresses of an attachment. Fields may be added: what an older agent left out gets its
/// default, what a newer one wrote is passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Whose.
    pub id: AttachmentId,
    /// Name of the network in the CNI configuration.
    #[serde(default)]
    pub network: String,
    /// Its IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Ipv6Addr>,
    /// Where it is attached; unknown of a lease that was learnt from the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<Netns>,
    /// The Kubernetes pod, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// When it was given or learnt; in milliseconds since 1970 where it is stored.
    #[serde(default = "epoch", with = "millis")]
    pub time: SystemTime,
}

/// A network namespace as it was when the lease was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    /// `CNI_NETNS`, as the runtime names it.
    #[serde(default)]
    pub path: PathBuf,
    /// Device of the namespace's inode.
    pub dev: u64,
    /// The inode. The kernel may give the same one to a later namespace.
    pub inode: u64,
    /// Whether the agent itself could see this inode at this path, so that its absence means
    /// something.
    #[serde(default)]
    pub path_visible: bool,
    /// The kernel's `boot_id` of that time: inodes mean nothing across a reboot.
    #[serde(default)]
    pub boot_id: String,
}

impl Netns {
    /// Whether both are one namespace of one boot, under whatever path.
    pub fn is_same(&self, other: &Self) -> bool {
        (self.dev, self.inode, &self.boot_id) == (other.dev, other.inode, &other.boot_id)
    }
}

impl Lease {
    /// Its addresses, IPv4 first.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

fn epoch() -> SystemTime {
    SystemTime::UNIX_EPOCH
}

/// Times as whole milliseconds since 1970; what was before is 1970.
pub(super) mod millis {
    use std::time::{Duration, SystemTime};

    use serde::{Deserialize, Deserializer, Serializer};

    /// Milliseconds of a time.
    pub(in super::super) fn of(time: SystemTime) -> u64 {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// The time of so many milliseconds; 1970 for what the clock cannot hold.
    pub(in super::super) fn to_time(millis: u64) -> SystemTime {
        let since = Duration::from_millis(millis);
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// The time as it is after it has been stored.
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
