//! Conversion of kernel errors to failures of the agent, which determine its exit code.

use skein_netlink::InterfaceError;
use skein_netlink::NetlinkError;
use skein_sys::tun::TunError;

use crate::failure::Failure;

pub(super) fn netlink_failure(error: NetlinkError) -> Failure {
    match error.source.kind() {
        std::io::ErrorKind::PermissionDenied => {
            Failure::Privilege(format!("{error}. Run the agent as root or grant CAP_NET_ADMIN."))
        }
        _ => Failure::Runtime(error.into()),
    }
}

pub(super) fn interface_failure(error: InterfaceError) -> Failure {
    match error {
        InterfaceError::Foreign { .. } | InterfaceError::OtherNode { .. } => {
            Failure::InUse(error.to_string())
        }
        InterfaceError::Netlink(error) => netlink_failure(error),
        InterfaceError::Tun(error) => match error {
            TunError::NotFound | TunError::NoDevice { .. } => Failure::Missing(error.to_string()),
            TunError::Permission { .. } => Failure::Privilege(error.to_string()),
            TunError::Exists { .. } | TunError::Busy { .. } | TunError::NotATun { .. } => {
                Failure::InUse(error.to_string())
            }
            TunError::Flags { .. } => Failure::InUse(error.to_string()),
            TunError::Name { .. } => Failure::Usage(error.to_string()),
            TunError::Io { .. } => Failure::Runtime(error.into()),
        },
    }
}
