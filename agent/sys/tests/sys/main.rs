//! `skein_sys` against the running kernel, each test in a network namespace of its own.
//! They need root (CAP_SYS_ADMIN and CAP_NET_ADMIN), /dev/net/tun and iproute2, and fail without.

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
    .expect("a new network namespace: run the tests as root");
}

/// Runs `ip` with these arguments in this thread's namespace.
fn ip(arguments: &str) {
    run("ip", arguments);
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("{program} (Debian package iproute2): {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {said}");
}

/// Waits until a descriptor is readable; fails after thirty seconds.
fn wait_readable(fd: impl AsFd) {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "nothing came in thirty seconds");
}

/// Repeats `step` until it gives something; fails after thirty seconds.
fn eventually<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = step() {
            return value;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "{what} not within thirty seconds");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}
