//! Leases in memory: the allocation rules, without a disk. Every change is recorded in a
//! [`ChangeSet`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::SystemTime;

use ipnet::IpNet;
use skein_cni_protocol::{AttachmentId, Pod};

use super::allocator::{AddressAllocator, PoolUsage};
use super::change_set::{ChangeSet, Step};
use super::error::{IpamError, StoreError};
use super::family::{Family, number};
use super::lease::{Lease, Netns, millis};
use super::store::Contents;

/// Request for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Attachment that gets the lease.
    pub id: AttachmentId,
    /// Name of the network in the CNI configuration.
    pub network: String,
    /// Network namespace of the attachment.
    pub netns: Netns,
    /// Kubernetes pod, if it is known.
    pub pod: Option<Pod>,
    /// Requested addresses, at most one per family. For the other families any address is
    /// allocated.
    pub ips: Vec<IpAddr>,
}

/// Usage of all pools.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Usage of each pool, IPv4 first.
    pub pools: Vec<PoolUsage>,
    /// Number of leases, in pools or not.
    pub leases: u64,
}

impl Usage {
    /// Returns whether an address of each family could be allocated now.
    pub fn can_allocate(&self) -> bool {
        let free = |v4: bool| {
            let mut family = self.pools.iter().filter(|pool| pool.cidr.addr().is_ipv4() == v4);
            let has_pools = family.clone().next().is_some();
            !has_pools || family.any(|pool| u128::from(pool.in_use) < pool.total)
        };
        !self.pools.is_empty() && free(true) && free(false)
    }
}

/// Leases of a node, with the allocation state of both families.
#[derive(Debug)]
pub(super) struct State {
    leases: BTreeMap<AttachmentId, Lease>,
    v4: AddressAllocator,
    v6: AddressAllocator,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            leases: BTreeMap::new(),
            v4: AddressAllocator::new(Family::V4),
            v6: AddressAllocator::new(Family::V6),
        }
    }

    /// Replaces the state by the content of the store.
    ///
    /// # Errors
    /// `Damaged` if two leases have the same address.
    pub(super) fn load(&mut self, contents: Contents) -> Result<(), StoreError> {
        let Contents { leases, quarantined, cursors } = contents;
        let (mut v4, mut v6) = (BTreeMap::new(), BTreeMap::new());
        for lease in leases.values() {
            for ip in lease.ips() {
                let leased = if ip.is_ipv4() { &mut v4 } else { &mut v6 };
                if let Some(other) = leased.insert(number(ip), lease.id.clone()) {
                    let text = format!("{ip} is leased to {other:?} and to {:?}", lease.id);
                    return Err(StoreError::Damaged(text));
                }
            }
        }
        for (allocator, leased) in [(&mut self.v4, v4), (&mut self.v6, v6)] {
            let family = allocator.family();
            let ours = quarantined.iter().filter(|(ip, _)| Family::of(**ip) == family);
            let ours = ours.map(|(ip, time)| (number(*ip), *time));
            let quarantined = ours.filter(|(number, _)| !leased.contains_key(number)).collect();
            allocator.load(leased, quarantined, cursors.get(&family).copied());
        }
        self.leases = leases;
        Ok(())
    }

    /// Undoes the changes of a change set.
    pub(super) fn undo(&mut self, change_set: ChangeSet) {
        for (id, step) in change_set.leases.into_iter().rev() {
            for ip in step.after.iter().flat_map(Lease::ips) {
                self.allocator(ip).undo_lease(number(ip), None);
            }
            for ip in step.before.iter().flat_map(Lease::ips) {
                self.allocator(ip).undo_lease(number(ip), Some(id.clone()));
            }
            match step.before {
                Some(lease) => self.leases.insert(id, lease),
                None => self.leases.remove(&id),
            };
        }
        for (ip, step) in change_set.quarantined.into_iter().rev() {
            self.allocator(ip).undo_quarantine(number(ip), step.before);
        }
        for (family, step) in change_set.cursors.into_iter().rev() {
            match family {
                Family::V4 => self.v4.undo_cursor(step.before),
                Family::V6 => self.v6.undo_cursor(step.before),
            }
        }
        self.v4.rebuild_index();
        self.v6.rebuild_index();
    }

    pub(super) fn set_pools(&mut self, cidrs: &[IpNet], reserved: &[IpAddr]) {
        self.v4.set_pools(cidrs, reserved);
        self.v6.set_pools(cidrs, reserved);
    }

    pub(super) fn get(&self, id: &AttachmentId) -> Option<&Lease> {
        self.leases.get(id)
    }

    pub(super) fn list(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.leases.values()
    }

    pub(super) fn usage(&self, now: SystemTime) -> Usage {
        let pools = self.v4.usage(now).chain(self.v6.usage(now)).collect();
        Usage { pools, leases: self.leases.len() as u64 }
    }

    pub(super) fn allocate(
        &mut self,
        request: Request,
        now: SystemTime,
        change_set: &mut ChangeSet,
    ) -> Result<Lease, IpamError> {
        if let Some(lease) = self.leases.get(&request.id) {
            // An adopted lease has no namespace, so it is returned for every namespace. The caller
            // checks whether the attachment exists in the namespace of the request.
            let same = lease.netns.as_ref().is_none_or(|netns| netns.is_same(&request.netns));
            let lease = lease.clone();
            return if same { Ok(lease) } else { Err(IpamError::OtherNamespace(Box::new(lease))) };
        }
        check_path(&request.netns.path)?;
        let now = millis::rounded(now);
        let (asked_v4, asked_v6) = split(&request.ips)?;
        if !self.v4.has_pools() && !self.v6.has_pools() {
            return Err(IpamError::NoPools);
        }
        // Select all addresses before the first change, so that an error changes nothing.
        let v4 = choose(&mut self.v4, asked_v4, now, change_set)?;
        let v6 = choose(&mut self.v6, asked_v6, now, change_set)?;
        for (allocator, choice) in [(&mut self.v4, v4), (&mut self.v6, v6)] {
            let Some(choice) = choice else { continue };
            allocator.lease(choice.number, &request.id, change_set);
            if !choice.asked {
                allocator.set_cursor(choice.number, change_set);
            }
        }
        let Request { id, network, netns, pod, .. } = request;
        let v4 = v4.map(|choice| Ipv4Addr::from_bits(choice.number as u32));
        let v6 = v6.map(|choice| Ipv6Addr::from_bits(choice.number));
        let lease = Lease { id, network, v4, v6, netns: Some(netns), pod, time: now };
        self.put(None, lease.clone(), change_set);
        Ok(lease)
    }

    pub(super) fn release(
        &mut self,
        id: &AttachmentId,
        now: SystemTime,
        change_set: &mut ChangeSet,
    ) -> Option<Lease> {
        let now = millis::rounded(now);
        let lease = self.leases.remove(id)?;
        for ip in lease.ips() {
            self.allocator(ip).quarantine(number(ip), now, change_set);
        }
        let step = Step { before: Some(lease.clone()), after: None };
        change_set.leases.push((id.clone(), step));
        Some(lease)
    }

    /// Stores a lease that the kernel's state shows. Properties that this lease lacks keep the
    /// values of the stored lease. Addresses that only the stored lease has are released.
    ///
    /// # Errors
    /// `NoAddress`, `Taken` or `Path`.
    pub(super) fn adopt(
        &mut self,
        mut learnt: Lease,
        now: SystemTime,
        change_set: &mut ChangeSet,
    ) -> Result<Lease, IpamError> {
        let now = millis::rounded(now);
        learnt.time = millis::rounded(learnt.time);
        if let Some(netns) = &learnt.netns {
            check_path(&netns.path)?;
        }
        if learnt.ips().next().is_none() {
            return Err(IpamError::NoAddress(Box::new(learnt.id)));
        }
        let known = self.leases.get(&learnt.id).cloned();
        if let Some(known) = &known {
            learnt.time = known.time;
            learnt.netns = learnt.netns.or_else(|| known.netns.clone());
            learnt.pod = learnt.pod.or_else(|| known.pod.clone());
            if learnt.network.is_empty() {
                learnt.network.clone_from(&known.network);
            }
            if *known == learnt {
                return Ok(learnt);
            }
        }
        for ip in learnt.ips() {
            if let Some(holder) = self.allocator(ip).holder(number(ip))
                && *holder != learnt.id
            {
                return Err(IpamError::Taken { ip, holder: Box::new(holder.clone()) });
            }
        }
        let held: Vec<_> = known.iter().flat_map(Lease::ips).collect();
        for ip in held.iter().filter(|ip| !learnt.ips().any(|other| other == **ip)) {
            self.allocator(*ip).quarantine(number(*ip), now, change_set);
        }
        for ip in learnt.ips().filter(|ip| !held.contains(ip)) {
            let id = learnt.id.clone();
            self.allocator(ip).lease(number(ip), &id, change_set);
        }
        self.put(known, learnt.clone(), change_set);
        Ok(learnt)
    }

    fn put(&mut self, before: Option<Lease>, lease: Lease, change_set: &mut ChangeSet) {
        let id = lease.id.clone();
        change_set.leases.push((id.clone(), Step { before, after: Some(lease.clone()) }));
        self.leases.insert(id, lease);
    }

    fn allocator(&mut self, ip: IpAddr) -> &mut AddressAllocator {
        match Family::of(ip) {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// Address that was selected for a lease.
#[derive(Clone, Copy)]
struct Choice {
    number: u128,
    /// True if the request named the address.
    asked: bool,
}

/// Selects the address of a family for a new lease; `None` if the node has no pool of the family.
///
/// # Errors
/// Those of [`AddressAllocator::check`] for a requested address; `Exhausted` if no address is free.
fn choose(
    allocator: &mut AddressAllocator,
    asked: Option<IpAddr>,
    now: SystemTime,
    change_set: &mut ChangeSet,
) -> Result<Option<Choice>, IpamError> {
    if let Some(ip) = asked {
        allocator.check(number(ip))?;
        return Ok(Some(Choice { number: number(ip), asked: true }));
    }
    if !allocator.has_pools() {
        return Ok(None);
    }
    let number = allocator.pick(now, change_set).ok_or_else(|| allocator.exhausted())?;
    Ok(Some(Choice { number, asked: false }))
}

/// Returns the requested address of each family.
///
/// # Errors
/// `TooMany` if a family has two.
fn split(ips: &[IpAddr]) -> Result<(Option<IpAddr>, Option<IpAddr>), IpamError> {
    let one = |v4: bool| {
        let mut family = ips.iter().copied().filter(|ip| ip.is_ipv4() == v4);
        let first = family.next();
        match family.find(|ip| Some(*ip) != first) {
            Some(second) => Err(IpamError::TooMany(first.unwrap_or(second), second)),
            None => Ok(first),
        }
    };
    Ok((one(true)?, one(false)?))
}

fn check_path(path: &Path) -> Result<(), IpamError> {
    match path.to_str() {
        Some(_) => Ok(()),
        None => Err(IpamError::Path(path.to_owned())),
    }
}
