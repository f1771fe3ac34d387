//! How long it takes on the disk of the temporary directory. Run with `--ignored --nocapture`.

use std::sync::mpsc::channel;
use std::time::Instant;

use super::*;

const POOLS: [&str; 2] = ["10.0.0.0/16", "fd00::/64"];

fn open(path: &Path) -> Ipam {
    let mut ipam = Ipam::open(path).unwrap().ipam;
    ipam.set_pools(&cidrs(&POOLS), &[]);
    ipam
}

fn quantiles(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("{what}: p50 {:.2?}, p99 {:.2?}, n = {}", at(0.5), at(0.99), times.len());
}

/// All at once through the thread: when each was answered.
fn burst(handle: &IpamHandle, round: usize, count: usize) -> Vec<Duration> {
    let (sender, receiver) = channel();
    let started = Instant::now();
    for n in 0..count {
        let sender = sender.clone();
        let reply = move |result: Result<Lease, IpamError>| {
            result.unwrap();
            sender.send(started.elapsed()).unwrap();
        };
        handle.allocate(request(&format!("{round}-{n}")), at(0), Box::new(reply));
    }
    drop(sender);
    receiver.iter().collect()
}

#[test]
#[ignore = "measures"]
fn times() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leases.redb");
    let mut ipam = open(&path);
    let (mut allocate, mut release) = (Vec::new(), Vec::new());
    for n in 0..1000 {
        let name = n.to_string();
        let started = Instant::now();
        ipam.allocate(request(&name), at(n)).unwrap();
        allocate.push(started.elapsed());
        let started = Instant::now();
        ipam.release(&id(&name), at(n)).unwrap();
        release.push(started.elapsed());
    }
    quantiles("allocate, one after the other", allocate);
    quantiles("release, one after the other", release);
    let mut alone = Vec::new();
    for round in 0..10 {
        let started = Instant::now();
        for n in 0..100 {
            ipam.allocate(request(&format!("alone-{round}-{n}")), at(2000)).unwrap();
        }
        alone.push(started.elapsed());
    }
    quantiles("100 allocations, a transaction each: the last answered", alone);
    let (handle, thread) = IpamHandle::spawn(ipam).unwrap();
    let (mut each, mut last) = (Vec::new(), Vec::new());
    for round in 0..20 {
        let times = burst(&handle, round, 100);
        last.extend(times.iter().max().copied());
        each.extend(times);
    }
    quantiles("100 allocations at once, in shared transactions: each answered", each);
    quantiles("100 allocations at once, in shared transactions: the last answered", last);
    drop(handle);
    thread.join().unwrap();
    drop(open(&path));
}

#[test]
#[ignore = "measures"]
fn opening_10_000_leases() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leases.redb");
    let (handle, thread) = IpamHandle::spawn(open(&path)).unwrap();
    let started = Instant::now();
    for round in 0..100 {
        burst(&handle, round, 100);
    }
    println!("10,000 leases in bursts of 100: {:.2?}", started.elapsed());
    drop(handle);
    thread.join().unwrap();
    let size = std::fs::metadata(&path).unwrap().len();
    let mut times = Vec::new();
    for _ in 0..10 {
        let started = Instant::now();
        let ipam = open(&path);
        times.push(started.elapsed());
        assert_eq!(ipam.list().len(), 10_000);
    }
    quantiles(&format!("opening 10,000 leases ({} KiB)", size >> 10), times);
    let mut ipam = open(&path);
    let mut allocate = Vec::new();
    for n in 0..300 {
        let started = Instant::now();
        ipam.allocate(request(&n.to_string()), at(0)).unwrap();
        allocate.push(started.elapsed());
    }
    quantiles("allocate beside 10,000 others", allocate);
}
