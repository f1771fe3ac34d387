//! The rules: who has what, in plain memory, with the changes that are still to be written.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use skein_cni::protocol::AttachmentId;

use super::pool::{Pool, Usage};
use super::{IpamError, Lease, Wanted};

/// How long an address that was given back is kept from the next: longer than a peer's connections
/// and the neighbour tables of the world remember it. Where nothing else is free it is not kept.
const REST: Duration = Duration::from_secs(30);

/// What the disk must learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// Whose lease.
    pub(super) id: AttachmentId,
    /// What it was.
    pub(super) before: Option<Lease>,
    /// What it is.
    pub(super) after: Option<Lease>,
}

/// Leases by attachment.
#[derive(Debug, Default)]
pub(super) struct Leases {
    leases: BTreeMap<AttachmentId, Lease>,
    owners: HashMap<IpAddr, AttachmentId>,
    resting: HashMap<IpAddr, SystemTime>,
    pools: Vec<Pool>,
    changes: Vec<Change>,
}

impl Leases {
    /// What was on the disk.
    pub(super) fn new(found: Vec<Lease>) -> Self {
        let mut leases = Self::default();
        leases.reset(found);
        leases
    }

    /// Forgets everything but the pools, and begins with what was on the disk.
    pub(super) fn reset(&mut self, found: Vec<Lease>) {
        self.owners = found.iter().flat_map(owned).collect();
        self.leases = found.into_iter().map(|lease| (lease.id.clone(), lease)).collect();
        self.changes.clear();
    }

    /// Takes back changes that were not written.
    pub(super) fn undo(&mut self, changes: Vec<Change>) {
        for change in changes.into_iter().rev() {
            self.put(&change.id, change.before);
        }
    }

    /// What is to be written, oldest first.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// What addresses may be given from. Leases outside of it stay until they are released.
    pub(super) fn set_pools(&mut self, cidrs: &[IpNet], reserved: &[IpAddr]) {
        let mut pools: Vec<Pool> = cidrs.iter().map(|&cidr| Pool::new(cidr, reserved)).collect();
        pools.sort_by_key(|pool| pool.cidr.addr().is_ipv6());
        for pool in &mut pools {
            if let Some(old) = self.pools.iter().find(|old| old.cidr == pool.cidr) {
                pool.cursor = old.cursor;
            } else {
                // After a restart the search goes on behind the largest address in use, which is
                // not the last given, but as far from those just freed as can be told.
                let used = self.owners.keys().copied().filter(|&ip| pool.has(ip));
                if let Some(last) = used.max() {
                    pool.advance(last);
                }
            }
        }
        self.pools = pools;
    }

    pub(super) fn get(&self, id: &AttachmentId) -> Option<&Lease> {
        self.leases.get(id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values()
    }

    /// See [`super::Ipam::allocate`].
    pub(super) fn allocate(&mut self, wanted: Wanted, now: SystemTime) -> Result<Lease, IpamError> {
        let Wanted { mut lease, addresses } = wanted;
        if let Some(present) = self.leases.get(&lease.id) {
            return match present.namespace.is_some() && present.namespace != lease.namespace {
                true => Err(IpamError::OtherNamespace(Box::new(present.clone()))),
                false => Ok(present.clone()),
            };
        }
        if self.pools.is_empty() {
            return Err(IpamError::NoPool);
        }
        self.resting.retain(|_, since| now.duration_since(*since).is_ok_and(|rest| rest < REST));
        if let Some(stray) = addresses.iter().find(|ip| !self.pools.iter().any(|p| p.has(**ip))) {
            return Err(IpamError::NotOurs(*stray));
        }
        if let Some(taken) = addresses.iter().find(|ip| self.owners.contains_key(ip)) {
            return Err(IpamError::Taken(*taken));
        }
        let mut chosen: Vec<(usize, IpAddr)> = Vec::new();
        for v4 in [true, false] {
            let ours = |pool: &Pool| pool.cidr.addr().is_ipv4() == v4;
            let asked = addresses.iter().copied().find(|ip| ip.is_ipv4() == v4);
            let mut exhausted = None;
            let found = self.pools.iter().enumerate().filter(|(_, pool)| ours(pool)).find_map(
                |(index, pool)| match asked {
                    Some(ip) => pool.has(ip).then_some((index, ip)),
                    None => {
                        let found = self.find(pool);
                        exhausted = exhausted.or(found.is_none().then_some(index));
                        found.map(|ip| (index, ip))
                    }
                },
            );
            match (found, exhausted) {
                (Some(found), _) => chosen.push(found),
                (None, Some(index)) => {
                    let pool = &self.pools[index];
                    return Err(IpamError::Exhausted { cidr: pool.cidr, used: self.used(pool) });
                }
                (None, None) => {}
            }
        }
        for &(pool, ip) in &chosen {
            self.pools[pool].advance(ip);
        }
        lease.addresses = chosen.into_iter().map(|(_, ip)| ip).collect();
        self.change(&lease.id.clone(), Some(lease.clone()));
        Ok(lease)
    }

    /// See [`super::Ipam::release`].
    pub(super) fn release(&mut self, id: &AttachmentId, now: SystemTime) -> Option<Lease> {
        let lease = self.leases.get(id).cloned()?;
        self.change(id, None);
        self.resting.extend(lease.addresses.iter().map(|&ip| (ip, now)));
        Some(lease)
    }

    /// See [`super::Ipam::adopt`].
    pub(super) fn adopt(&mut self, lease: Lease) -> Result<(), IpamError> {
        let other = |ip: &&IpAddr| self.owners.get(*ip).is_some_and(|owner| *owner != lease.id);
        if let Some(taken) = lease.addresses.iter().find(other) {
            return Err(IpamError::Taken(*taken));
        }
        if self.leases.get(&lease.id) != Some(&lease) {
            self.change(&lease.id.clone(), Some(lease));
        }
        Ok(())
    }

    /// See [`super::Ipam::usage`].
    pub(super) fn usage(&self, now: SystemTime) -> Vec<Usage> {
        let fresh = |since: &SystemTime| now.duration_since(*since).is_ok_and(|rest| rest < REST);
        let usage = |pool: &Pool| Usage {
            cidr: pool.cidr,
            total: pool.total(),
            used: self.used(pool),
            resting: self
                .resting
                .iter()
                .filter(|(ip, since)| {
                    pool.has(**ip) && fresh(since) && !self.owners.contains_key(ip)
                })
                .count() as u64,
        };
        self.pools.iter().map(usage).collect()
    }

    fn used(&self, pool: &Pool) -> u64 {
        self.owners.keys().filter(|ip| pool.has(**ip)).count() as u64
    }

    /// A free address that has not just been given back, or else the one that was longest ago.
    fn find(&self, pool: &Pool) -> Option<IpAddr> {
        let known = (self.owners.len() + self.resting.len()) as u64 + pool.reserved();
        let free = |ip| !self.owners.contains_key(&ip) && !self.resting.contains_key(&ip);
        pool.find(known + 1, free).or_else(|| {
            let free = |(ip, _): &(&IpAddr, _)| pool.has(**ip) && !self.owners.contains_key(ip);
            self.resting.iter().filter(free).min_by_key(|(_, since)| **since).map(|(ip, _)| *ip)
        })
    }

    fn change(&mut self, id: &AttachmentId, after: Option<Lease>) {
        let before = self.leases.get(id).cloned();
        self.put(id, after.clone());
        self.changes.push(Change { id: id.clone(), before, after });
    }

    fn put(&mut self, id: &AttachmentId, lease: Option<Lease>) {
        let before = match lease {
            Some(lease) => {
                for ip in &lease.addresses {
                    self.resting.remove(ip);
                }
                self.leases.insert(id.clone(), lease)
            }
            None => self.leases.remove(id),
        };
        for ip in before.iter().flat_map(|lease| &lease.addresses) {
            self.owners.remove(ip);
        }
        let owned = self.leases.get(id).into_iter().flat_map(owned).collect::<Vec<_>>();
        self.owners.extend(owned);
    }
}

fn owned(lease: &Lease) -> impl Iterator<Item = (IpAddr, AttachmentId)> {
    lease.addresses.iter().map(|&ip| (ip, lease.id.clone()))
}
