//! Tests of `skein_sys` with the running kernel, each in its own network namespace. They require
//! root (CAP_SYS_ADMIN and CAP_NET_ADMIN), /dev/net/tun, iproute2 and nftables, and fail without
//! them.

#![allow(missing_docs, clippy::unwrap_used)]

mod faults;
mod lanes;
mod segments;
mod tun;

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use skein_sys::in_new_network_namespace;
use skein_sys::udp::UdpOptions;

const OPTIONS: UdpOptions =
    UdpOptions { receive_buffer: 8 << 20, send_buffer: 4 << 20, gro: true, ecn: true };

/// Runs a test in a new network namespace whose loopback device is up.
fn in_namespace(test: impl FnOnce() + Send) {
    in_new_network_namespace(|| {
        ip("link set lo up");
        test();
    })
    .expect("cannot create a network namespace: run the tests as root");
}

/// Runs `ip` with `arguments`, separated by white space, in the namespace of this thread.
fn ip(arguments: &str) {
    run("ip", arguments);
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {stderr}");
}

/// Waits until a descriptor is readable; panics after 30 s.
fn wait_readable(fd: impl AsFd) {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec { tv_sec: 30, tv_nsec: 0 };
    let ready = poll(&mut fds, Some(&timeout)).unwrap();
    assert_eq!(ready, 1, "the descriptor was not readable within 30 s");
}

/// Repeats `step` until it returns a value; panics after 30 s.
fn eventually<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = step() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "{what} did not happen within 30 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
