//! Crash safety: after any failure at any time, answered operations hold, no address has two
//! leases, and no address is lost.

use std::collections::{BTreeMap, BTreeSet};

use super::disk::{Disk, Fault, Kept};
use super::*;

const POOLS: [&str; 2] = ["10.1.0.0/28", "fd00::/124"];
/// Number of allocatable addresses of [`POOLS`] per family.
const USABLE: [usize; 2] = [14, 15];

fn set_pools(ipam: &mut Ipam) {
    ipam.set_pools(&cidrs(&POOLS), &[]);
}

enum ScriptStep {
    Allocate(&'static str),
    Release(&'static str),
    Adopt(&'static str),
}

/// Returns operations that allocate, release, allocate again while no other address is free, and
/// adopt.
fn script() -> Vec<(ScriptStep, u64)> {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"];
    let mut script: Vec<_> =
        names[..5].iter().map(|name| (ScriptStep::Allocate(name), 0)).collect();
    script.extend([
        (ScriptStep::Release("b"), 1),
        (ScriptStep::Release("d"), 2),
        (ScriptStep::Allocate("b"), 3),
    ]);
    script.extend([
        (ScriptStep::Adopt("x"), 4),
        (ScriptStep::Release("a"), 5),
        (ScriptStep::Allocate("a"), 40),
    ]);
    script
}

/// Answers of the operations so far. They determine which leases must exist after a failure, and
/// which may exist.
#[derive(Debug, Default)]
struct Answered {
    /// Lease of each attachment by its last successful operation; `None` after a release.
    known: BTreeMap<AttachmentId, Option<Lease>>,
    /// Attachments whose last operation failed. It may have changed the disk or not.
    unknown: BTreeSet<AttachmentId>,
}

impl Answered {
    fn record(&mut self, id: AttachmentId, result: Result<Option<Lease>, IpamError>) {
        match result {
            Ok(lease) => {
                self.unknown.remove(&id);
                self.known.insert(id, lease);
            }
            Err(IpamError::Store(_)) => drop(self.unknown.insert(id)),
            Err(error) => panic!("{error}"),
        }
    }

    fn check(&self, ipam: &Ipam) {
        for (id, lease) in &self.known {
            if !self.unknown.contains(id) {
                assert_eq!(
                    ipam.get(id),
                    lease.as_ref(),
                    "The answered operation of {id:?} must hold."
                );
            }
        }
        for lease in ipam.list() {
            let known = self.known.get(&lease.id).is_some_and(Option::is_some);
            assert!(
                known || self.unknown.contains(&lease.id),
                "No operation has created {lease:?}."
            );
        }
        let ips: Vec<_> = ipam.list().flat_map(Lease::ips).collect();
        assert_eq!(
            ips.iter().collect::<BTreeSet<_>>().len(),
            ips.len(),
            "An address has two leases."
        );
    }
}

/// Runs the script and records all answers.
fn run_script(ipam: &mut Ipam, answered: &mut Answered, fault: Fault) {
    for (step, seconds) in script() {
        let now = at(seconds);
        let before: Vec<_> = ipam.list().cloned().collect();
        let (usage, unknown) = (ipam.usage(now), answered.unknown.clone());
        match step {
            ScriptStep::Allocate(name) => {
                let result = ipam.allocate(request(name), now).map(Some);
                // An earlier release may have failed, so that the lease still exists and is
                // returned again.
                answered.record(id(name), result);
            }
            ScriptStep::Release(name) => {
                answered.record(id(name), ipam.release(&id(name), now).map(|_| None));
            }
            ScriptStep::Adopt(name) => {
                let v4 = "10.1.0.14".parse().ok();
                let v6 = "fd00::f".parse().ok();
                let lease = Lease {
                    id: id(name),
                    network: "pods".into(),
                    v4,
                    v6,
                    netns: None,
                    pod: None,
                    time: now,
                };
                answered.record(id(name), ipam.adopt(lease, now).map(Some));
            }
        }
        let ips: Vec<_> = ipam.list().flat_map(Lease::ips).collect();
        assert_eq!(
            ips.iter().collect::<BTreeSet<_>>().len(),
            ips.len(),
            "An address has two leases."
        );
        // After these faults the store cannot be read again, so that a failed operation must leave
        // the leases and the usage in memory as before.
        if matches!(fault, Fault::From(_) | Fault::Power(_)) && answered.unknown != unknown {
            assert!(ipam.list().eq(before.iter()), "{fault:?}");
            assert_eq!(ipam.usage(now), usage);
        }
    }
}

/// Checks that every address without a lease can be allocated, and that a caller without an answer
/// may repeat its request.
fn check_nothing_is_lost(ipam: &mut Ipam, answered: &Answered) {
    // If the disk could not be read, the outcome is still unknown. This call reads the disk.
    assert_eq!(ipam.release(&id("nobody"), at(41)).unwrap(), None);
    for id in &answered.unknown {
        let before = ipam.get(id).cloned();
        let request = Request { id: id.clone(), ..request("") };
        match (ipam.allocate(request, at(41)), before) {
            (Ok(lease), Some(before)) => assert_eq!(lease, before),
            (Ok(_), None) => {}
            // Adopted from the kernel, without a network namespace.
            (Err(IpamError::OtherNamespace(lease)), Some(before)) => assert_eq!(*lease, before),
            (result, before) => panic!("{result:?} {before:?}"),
        }
    }
    let leases = ipam.list().count();
    let mut more = 0;
    let error = loop {
        match ipam.allocate(request(&format!("more-{more}")), at(42)) {
            Ok(_) => more += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, IpamError::Exhausted { .. }), "{error}");
    assert_eq!(leases + more, USABLE[0]);
    let ips: BTreeSet<_> = ipam.list().flat_map(Lease::ips).collect();
    assert_eq!(ips.len(), 2 * USABLE[0]);
}

/// Runs the script on a disk with a fault. Returns the disk, the answers, the leases and the number
/// of operations of the disk.
fn run_with_fault(fault: Fault) -> (Disk, Answered, Option<Ipam>, usize) {
    let disk = Disk::new();
    let mut ipam = disk.open().unwrap();
    set_pools(&mut ipam);
    disk.reset(fault);
    let mut answered = Answered::default();
    run_script(&mut ipam, &mut answered, fault);
    let operations = disk.operations();
    (disk, answered, Some(ipam), operations)
}

#[test]
fn single_failure_loses_nothing() {
    let (_, answered, _, operations) = run_with_fault(Fault::None);
    assert!(answered.unknown.is_empty() && operations > 60, "{operations}");
    for k in 0..operations {
        let (disk, answered, mut ipam, _) = run_with_fault(Fault::Once(k));
        assert!(answered.unknown.len() <= 1, "{k}: {:?}", answered.unknown);
        let mut ipam = ipam.take().unwrap();
        answered.check(&ipam);
        disk.reset(Fault::None);
        // Memory must equal the disk.
        let leases: Vec<_> = ipam.list().cloned().collect();
        assert!(disk.copy().open().unwrap().list().eq(leases.iter()), "{k}");
        check_nothing_is_lost(&mut ipam, &answered);
    }
}

#[test]
fn full_disk_loses_nothing() {
    let (.., operations) = run_with_fault(Fault::None);
    for k in 0..operations {
        let (disk, answered, mut ipam, _) = run_with_fault(Fault::From(k));
        let mut ipam = ipam.take().unwrap();
        answered.check(&ipam);
        let error = ipam.allocate(request("z"), at(40)).unwrap_err();
        assert!(error.to_string().ends_with("no space left on its file system"), "{error}");
        assert_eq!(error.code() as u32, 5);
        assert!(
            ipam.usage(at(40)).can_allocate(),
            "Operations in memory must work while the disk fails."
        );
        disk.reset(Fault::None);
        check_nothing_is_lost(&mut ipam, &answered);
        let leases: Vec<_> = ipam.list().cloned().collect();
        drop(ipam);
        let mut ipam = disk.open().unwrap();
        set_pools(&mut ipam);
        assert!(ipam.list().eq(leases.iter()), "{k}");
    }
}

#[test]
fn probe_detects_a_store_that_cannot_be_written() {
    let disk = Disk::new();
    let mut ipam = disk.open().unwrap();
    set_pools(&mut ipam);
    let lease = ipam.allocate(request("a"), at(0)).unwrap();
    let before = disk.operations();
    ipam.probe().unwrap();
    let operations = disk.operations() - before;
    assert!(operations > 0, "A probe must write to the disk.");
    for k in 0..operations {
        disk.reset(Fault::From(k));
        let error = ipam.probe().unwrap_err().to_string();
        assert!(error.ends_with("no space left on its file system"), "{k}: {error}");
        assert!(ipam.probe().is_err(), "{k}");
        disk.reset(Fault::None);
        ipam.probe().unwrap();
    }
    // The process ends, and its memory with it.
    drop(ipam);
    assert!(disk.open().unwrap().list().eq([&lease]));
}

/// Returns patterns of a power loss. Each pattern gets the index of an unsynced operation and the
/// number of these operations, and returns the part of the operation that survives.
fn survival_patterns(seed: usize) -> Vec<Box<dyn Fn(usize, usize) -> Kept>> {
    let keep = |whole: bool| if whole { Kept::Whole } else { Kept::Lost };
    let random = move |salt: usize| {
        move |n: usize, _: usize| {
            let mut x = ((seed * 31 + salt) * 1009 + n + 1) as u64;
            for shift in [13, 7, 17, 5] {
                x ^= x << shift;
                x ^= x >> 9;
            }
            [Kept::Whole, Kept::Lost, Kept::Head, Kept::Tail][(x % 4) as usize]
        }
    };
    vec![
        // All operations survive: only the process was killed.
        Box::new(|_, _| Kept::Whole),
        Box::new(|_, _| Kept::Lost),
        Box::new(move |n, _| keep(n % 2 == 0)),
        Box::new(move |n, _| keep(n % 2 == 1)),
        Box::new(move |n, all| keep(n + 1 < all)),
        Box::new(move |n, all| keep(n + 1 == all)),
        Box::new(move |n, all| keep(n >= all / 2)),
        Box::new(|n, all| if n + 1 == all { Kept::Head } else { Kept::Whole }),
        Box::new(|n, all| if n + 1 == all { Kept::Tail } else { Kept::Whole }),
        Box::new(|_, _| Kept::Head),
        Box::new(random(1)),
        Box::new(random(2)),
        Box::new(random(3)),
    ]
}

#[test]
fn power_loss_loses_no_lease() {
    let (.., operations) = run_with_fault(Fault::None);
    for k in 0..operations {
        let (disk, answered, ipam, _) = run_with_fault(Fault::Power(k));
        drop(ipam);
        for (n, pattern) in survival_patterns(k).into_iter().enumerate() {
            let after = disk.after_power_loss(pattern);
            let mut ipam = after.open().unwrap_or_else(|error| panic!("{k}, {n}: {error}"));
            set_pools(&mut ipam);
            answered.check(&ipam);
            check_nothing_is_lost(&mut ipam, &answered);
        }
    }
}

#[test]
fn power_loss_during_recovery_loses_no_lease() {
    let (.., operations) = run_with_fault(Fault::None);
    for k in (0..operations).step_by(3) {
        let (disk, answered, ipam, _) = run_with_fault(Fault::Power(k));
        drop(ipam);
        for pattern in [1, 2, 10] {
            let once = disk.after_power_loss(&survival_patterns(k)[pattern]);
            for j in 0.. {
                let twice = once.copy();
                twice.reset(Fault::Power(j));
                let opened = twice.open();
                let done = opened.is_ok() && twice.operations() <= j;
                drop(opened);
                for pattern in &survival_patterns(j)[..6] {
                    let mut ipam = twice.after_power_loss(pattern).open().unwrap();
                    set_pools(&mut ipam);
                    answered.check(&ipam);
                }
                if done {
                    break;
                }
            }
        }
    }
}
