//! Tests of links against the kernel. They need root.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::testing::{ensure_device, in_namespace, wanted};

#[test]
fn deleting_a_missing_link_succeeds() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let present = ensure_device(&wanted(), &netlink).await.unwrap();
        netlink.delete_link(present.index).await.unwrap();
        netlink.delete_link(present.index).await.unwrap();
        let change = LinkChange { up: true, ..LinkChange::default() };
        assert!(netlink.change_link(present.index, &change).await.is_err());
    });
}
