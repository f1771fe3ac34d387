//! Tests of the crate: allocation rules, disk failures, killed processes.
#![allow(clippy::unwrap_used)]

mod crash;
mod disk;
mod file;
mod model;
mod rules;
mod together;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use skein_cni_protocol::AttachmentId;

use super::*;

/// Returns the time `seconds` after the start of the tests' clock.
fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds)
}

fn id(name: &str) -> AttachmentId {
    AttachmentId { container_id: name.to_owned(), ifname: "eth0".to_owned() }
}

fn netns(inode: u64) -> Netns {
    let path = format!("/run/netns/{inode}").into();
    Netns { path, dev: 4, inode, path_visible: true, boot_id: "boot".to_owned() }
}

/// Returns a request of an attachment whose network namespace has inode 1.
fn request(name: &str) -> Request {
    let network = "pods".to_owned();
    Request { id: id(name), network, netns: netns(1), pod: None, ips: Vec::new() }
}

fn asking(name: &str, ips: &[&str]) -> Request {
    let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
    Request { ips, ..request(name) }
}

fn cidrs(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Returns the addresses of a lease as text, separated by blanks.
fn shown(lease: &Lease) -> String {
    lease.ips().map(|ip| ip.to_string()).collect::<Vec<_>>().join(" ")
}
