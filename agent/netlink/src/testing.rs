//! Helpers for tests against the kernel, each in a scratch network namespace. They need root.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use super::connection::Netlink;
use super::error::InterfaceError;
use super::interface::{InterfaceSpec, Present, ReconcileReport};

/// Runs a future in a scratch network namespace.
pub(super) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    };
    skein_sys::in_new_network_namespace(run)
        .expect("this test needs root: CAP_SYS_ADMIN for a network namespace");
}

/// Runs `ip` of iproute2 in the calling thread's namespace and returns its output.
pub(super) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    let output = output.expect("ip is missing: install the Debian package iproute2");
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {arguments}: {complaint}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) fn wanted() -> InterfaceSpec {
    InterfaceSpec {
        name: "sk-test".to_owned(),
        alias: "skein:node-1".to_owned(),
        mtu: 1440,
        txqueuelen: 777,
        addresses: vec!["10.1.0.1".parse().unwrap(), "fd00:1::1".parse().unwrap()],
        routes: ["10.2.0.0/24", "10.3.0.0/16", "fd00:2::/64"].map(|r| r.parse().unwrap()).into(),
        mtus: Default::default(),
        forwarding: true,
        forwarding_ipv6: true,
    }
}

/// Calls [`InterfaceSpec::ensure_device`] with the present links.
pub(super) async fn ensure_device(
    wanted: &InterfaceSpec,
    netlink: &Netlink,
) -> Result<Present, InterfaceError> {
    wanted.ensure_device(netlink, &netlink.links().await?).await
}

/// Calls [`InterfaceSpec::configure`] with the present addresses.
pub(super) async fn configure(
    wanted: &InterfaceSpec,
    netlink: &Netlink,
    index: u32,
) -> ReconcileReport {
    let addresses = netlink.addresses(None).await.unwrap();
    wanted.configure(netlink, index, &addresses).await
}

pub(super) async fn configured(netlink: &Netlink, wanted: &InterfaceSpec) -> u32 {
    let present = ensure_device(wanted, netlink).await.unwrap();
    let outcome = configure(wanted, netlink, present.index).await;
    assert_eq!(outcome.errors, [""; 0]);
    present.index
}
