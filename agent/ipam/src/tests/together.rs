//! Tests of concurrent operations through the thread.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, channel};

use super::disk::{Disk, Fault};
use super::*;

/// Returns a reply and the receiver of its outcome.
fn reply<T: Send + 'static>() -> (Reply<T>, Receiver<Result<T, IpamError>>) {
    let (sender, receiver) = channel();
    (Box::new(move |result| drop(sender.send(result))), receiver)
}

#[test]
fn waiting_operations_share_a_transaction() {
    let disk = Disk::new();
    let (ipam, thread) = IpamHandle::spawn(disk.open().unwrap()).unwrap();
    ipam.set_pools(cidrs(&["10.1.0.0/24", "fd00::/64"]), vec![ip("10.1.0.1")]);
    // The reply blocks the thread, as a slow disk would.
    let (entered, wait) = (std::sync::Arc::new(std::sync::Barrier::new(2)), channel::<()>());
    let there = entered.clone();
    ipam.list(Box::new(move |_| {
        there.wait();
        wait.1.recv().unwrap();
    }));
    entered.wait();
    disk.reset(Fault::None);
    let asked: Vec<_> = (0..100)
        .map(|n| {
            let (reply, receiver) = reply();
            ipam.allocate(request(&n.to_string()), at(0), reply);
            receiver
        })
        .collect();
    wait.0.send(()).unwrap();
    let leases: Vec<_> = asked.iter().map(|asked| asked.recv().unwrap().unwrap()).collect();
    let ips: BTreeSet<_> = leases.iter().flat_map(Lease::ips).collect();
    assert_eq!(ips.len(), 200);
    assert!(disk.operations() < 60, "{} operations for 100 leases", disk.operations());
    let (reply_list, list) = reply();
    ipam.list(reply_list);
    assert_eq!(list.recv().unwrap().unwrap().len(), 100);
    let (reply_get, get) = reply();
    ipam.get(id("7"), reply_get);
    assert_eq!(get.recv().unwrap().unwrap().unwrap(), leases[7]);
    let (reply_usage, usage) = reply();
    ipam.usage(at(0), reply_usage);
    assert_eq!(usage.recv().unwrap().unwrap().pools[0].in_use, 100);
    let (reply_release, release) = reply();
    ipam.release(id("7"), at(0), reply_release);
    assert_eq!(release.recv().unwrap().unwrap().unwrap(), leases[7]);
    let (reply_adopt, adopt) = reply();
    ipam.adopt(leases[7].clone(), at(0), reply_adopt);
    assert_eq!(adopt.recv().unwrap().unwrap(), leases[7]);
    drop(ipam);
    thread.join().unwrap();
    assert_eq!(disk.open().unwrap().list().len(), 100);
}

#[test]
fn refusal_concerns_one_caller_and_failure_concerns_all() {
    let disk = Disk::new();
    let (ipam, thread) = IpamHandle::spawn(disk.open().unwrap()).unwrap();
    ipam.set_pools(cidrs(&["10.1.0.0/30"]), vec![]);
    let allocate_together = |names: [&str; 3]| {
        let (entered, hold) = (std::sync::Arc::new(std::sync::Barrier::new(2)), channel::<()>());
        let there = entered.clone();
        ipam.list(Box::new(move |_| {
            there.wait();
            hold.1.recv().unwrap();
        }));
        entered.wait();
        let asked = names.map(|name| {
            let (reply, receiver) = reply();
            ipam.allocate(request(name), at(0), reply);
            receiver
        });
        hold.0.send(()).unwrap();
        asked.map(|asked| asked.recv().unwrap())
    };
    disk.reset(Fault::From(0));
    for _ in 0..2 {
        let results = allocate_together(["a", "b", "c"]);
        let failed = |result: &Result<_, _>| matches!(result, Err(IpamError::Store(_)));
        assert!(results.iter().all(failed), "{results:?}");
    }
    disk.reset(Fault::None);
    let [a, b, c] = allocate_together(["a", "b", "c"]);
    assert_eq!((shown(&a.unwrap()), shown(&b.unwrap())), ("10.1.0.1".into(), "10.1.0.2".into()));
    assert!(matches!(c, Err(IpamError::Exhausted { in_use: 2, .. })));
    drop(ipam);
    thread.join().unwrap();
}
