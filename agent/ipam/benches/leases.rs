//! Benchmarks of lease operations on the disk of the temporary directory.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::SystemTime;

use divan::Bencher;
use divan::counter::ItemsCount;
use skein_cni_protocol::AttachmentId;
use skein_ipam::{Ipam, IpamHandle, Netns, Reply, Request};
use tempfile::TempDir;

/// Number of existing leases.
const OTHERS: [usize; 2] = [0, 10_000];
/// Number of pods that start at the same time.
const BURST: usize = 100;

fn main() {
    divan::main();
}

/// Leases of a node, in a temporary directory.
struct Node {
    path: PathBuf,
    _directory: TempDir,
}

impl Node {
    fn with(leases: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let node = Self { path: directory.path().join("leases.redb"), _directory: directory };
        let (handle, thread) = IpamHandle::spawn(node.open()).unwrap();
        burst("other", leases, |name, reply| {
            handle.allocate(request(name), SystemTime::now(), reply);
        });
        drop(handle);
        thread.join().unwrap();
        node
    }

    fn open(&self) -> Ipam {
        let mut ipam = Ipam::open(&self.path).unwrap().ipam;
        ipam.set_pools(&["10.0.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()], &[]);
        ipam
    }
}

fn id(name: &str) -> AttachmentId {
    AttachmentId { container_id: name.to_owned(), ifname: "eth0".to_owned() }
}

fn request(name: &str) -> Request {
    let netns = Netns {
        path: "/run/netns/pod".into(),
        dev: 4,
        inode: 1,
        path_visible: true,
        boot_id: "boot".to_owned(),
    };
    Request { id: id(name), network: "pods".to_owned(), netns, pod: None, ips: Vec::new() }
}

/// Queues a burst of requests and waits until all are answered.
fn burst<T: 'static>(prefix: &str, count: usize, ask: impl Fn(&str, Reply<T>)) {
    let (sender, receiver) = channel();
    for n in 0..count {
        let sender = sender.clone();
        let reply = move |result: Result<_, _>| sender.send(result.map(drop)).unwrap();
        ask(&format!("{prefix}-{n}"), Box::new(reply));
    }
    drop(sender);
    assert!(receiver.iter().all(|result| result.is_ok()));
}

#[divan::bench(args = OTHERS, sample_size = 1, sample_count = 200)]
fn allocate_and_release(bencher: Bencher<'_, '_>, others: usize) {
    let node = Node::with(others);
    let mut ipam = node.open();
    bencher.bench_local(|| {
        ipam.allocate(request("one"), SystemTime::now()).unwrap();
        ipam.release(&id("one"), SystemTime::now()).unwrap();
    });
}

#[divan::bench(args = OTHERS, sample_size = 1, sample_count = 50)]
fn a_burst_in_shared_transactions(bencher: Bencher<'_, '_>, others: usize) {
    let node = Node::with(others);
    let (handle, thread) = IpamHandle::spawn(node.open()).unwrap();
    // Each round starts with the same number of leases.
    let empty =
        || burst("burst", BURST, |name, reply| handle.release(id(name), SystemTime::now(), reply));
    bencher.counter(ItemsCount::new(BURST)).with_inputs(empty).bench_local_values(|()| {
        burst("burst", BURST, |name, reply| {
            handle.allocate(request(name), SystemTime::now(), reply)
        });
    });
    drop(handle);
    thread.join().unwrap();
}

#[divan::bench(args = OTHERS, sample_size = 1, sample_count = 20)]
fn open(bencher: Bencher<'_, '_>, leases: usize) {
    let node = Node::with(leases);
    bencher.bench_local(|| assert_eq!(node.open().list().len(), leases));
}

#[divan::bench(sample_size = 1, sample_count = 200)]
fn probe(bencher: Bencher<'_, '_>) {
    let node = Node::with(100);
    let mut ipam = node.open();
    bencher.bench_local(|| ipam.probe().unwrap());
}
