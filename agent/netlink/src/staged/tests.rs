//! Tests of the staged interface against the kernel. They need root.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::testing::{ensure_device, in_namespace, ip, wanted};

#[test]
fn staged_interface_of_killed_start_is_removed() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let staged = StagedInterface::new(&wanted.name, &wanted.alias);
        let name = staged.name();
        for alias in [None, Some(&wanted.alias)] {
            // State of the device when its process was killed.
            create_persistent(name).unwrap();
            if let Some(alias) = alias {
                ip(&format!("link set {name} alias {alias}"));
            }
            let present = ensure_device(&wanted, &netlink).await.unwrap();
            assert!(present.created);
            assert!(
                netlink.link(name).await.unwrap().is_none(),
                "No device may keep the staged name."
            );
            let link = netlink.link("sk-test").await.unwrap().unwrap();
            assert_eq!((link.index, &link.alias), (present.index, &wanted.alias));
            let again = ensure_device(&wanted, &netlink).await.unwrap();
            assert!(!again.created && again.index == present.index);
            netlink.delete_link(present.index).await.unwrap();
        }
    });
}

#[test]
fn foreign_interface_under_the_staged_name_stays() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let staged = StagedInterface::new(&wanted.name, &wanted.alias);
        let name = staged.name();
        for make in [
            format!("link add dev {name} type bridge"),
            format!("tuntap add {name} mode tun\nlink set {name} alias vpn"),
            format!("tuntap add {name} mode tun\nlink set {name} up"),
        ] {
            make.lines().for_each(|line| drop(ip(line)));
            let before = ip(&format!("-details link show {name}"));
            let error = ensure_device(&wanted, &netlink).await.unwrap_err();
            assert!(matches!(error, InterfaceError::Foreign { .. }), "{error}");
            assert_eq!(ip(&format!("-details link show {name}")), before);
            assert!(netlink.link("sk-test").await.unwrap().is_none());
            ip(&format!("link del {name}"));
        }
    });
}

#[test]
fn staged_names_are_valid_and_differ() {
    let names = [("skein0", "skein:a"), ("skein0", "skein:b"), ("skein1", "skein:a")]
        .map(|(name, alias)| StagedInterface::new(name, alias).name().to_owned());
    assert!(names.iter().all(|name| name.len() == 15), "{names:?}");
    assert!(names[0] != names[1] && names[0] != names[2] && names[1] != names[2], "{names:?}");
}

#[test]
fn failed_rename_removes_the_staged_interface() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let wanted = wanted();
        let staged = StagedInterface::new(&wanted.name, &wanted.alias);
        ip("link add dev sk-test type bridge");
        let error = staged.create(&netlink, "sk-test").await.unwrap_err();
        assert!(matches!(error, InterfaceError::Netlink(_)), "{error}");
        assert!(netlink.link(staged.name()).await.unwrap().is_none());
    });
}
