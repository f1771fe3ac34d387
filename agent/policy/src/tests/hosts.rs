//! Hosts as network namespaces, connected by veth pairs to the calling thread's namespace.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;

use skein_sys::in_new_network_namespace;
use skein_sys::netns::in_network_namespace;

use super::kernel::run;

/// Hardware address of the router on every link.
const ROUTER_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// Hardware address of every host on its link.
const HOST_MAC: &str = "02:00:00:00:00:01";

/// A host: a network namespace with a link to the router.
pub(super) struct Host {
    /// Name of the router's end of the link.
    pub(super) interface: String,
    /// Addresses of the host.
    pub(super) addresses: Vec<IpAddr>,
    namespace: File,
}

/// Makes the calling thread's namespace a router.
pub(super) fn forward() {
    for setting in ["ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
    }
}

impl Host {
    /// Creates a host and connects it to the calling thread's namespace.
    pub(super) fn new(interface: String, addresses: Vec<IpAddr>) -> Self {
        let open = || File::open("/proc/thread-self/ns/net").unwrap();
        let namespace = in_new_network_namespace(open).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        let mut router = format!(
            "link add {interface} type veth peer name eth0 netns {path}\n\
             link set {interface} address {ROUTER_MAC} up\n"
        );
        let mut inner = format!("link set lo up\nlink set eth0 address {HOST_MAC} up\n");
        for address in &addresses {
            let (gateway, options) = match address {
                IpAddr::V4(_) => ("169.254.1.1", ""),
                IpAddr::V6(_) => ("fe80::1", "nodad"),
            };
            router += &format!("neigh add {address} lladdr {HOST_MAC} dev {interface}\n");
            router += &format!("route add {address} dev {interface}\n");
            inner += &format!("addr add {address} dev eth0 {options}\n");
            inner += &format!("neigh add {gateway} lladdr {ROUTER_MAC} dev eth0\n");
            inner += &format!("route add {gateway} dev eth0\n");
            inner += &format!("route add default via {gateway} dev eth0\n");
        }
        ip(&router);
        let host = Self { interface, addresses, namespace };
        host.within(|| ip(&inner));
        host
    }

    /// Runs a function in the host's namespace.
    pub(super) fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        in_network_namespace(self.namespace.as_fd(), f).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The namespace of the router may be gone already, and its links with it.
        let _ = Command::new("ip").args(["link", "del", &self.interface]).output();
    }
}

/// Runs `ip -batch` with commands in the calling thread's namespace.
fn ip(commands: &str) {
    run("ip", "iproute2", &["-batch", "-"], commands);
}
